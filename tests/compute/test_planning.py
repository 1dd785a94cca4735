"""The runner's plans: one a step and KV group, and the same tokens whether prefixes are attended to together or not."""

import pytest
import torch

from headrace.compute import ops, planning
from headrace.compute.plans import Plan
from headrace.types.payload import SamplingParams
from tests.compute.harness import BLOCK_SIZE, GREEDY, Driver, key, load, make_model, open_driver

SEEDED = SamplingParams(temperature=1.0, top_p=0.9, seed=11, tokens_max=10_000, logprobs=2)
PREFIX = [(7 * i + i // 160) % 160 for i in range(1050)]
REQUESTS = 6


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    make_model("llama", seed=5, num_key_value_heads=2, max_position_embeddings=2048).save_pretrained(folder)
    return load(folder, request.param, length=1100)


@pytest.fixture
def plans(monkeypatch) -> list[Plan]:
    """Every plan that is made."""
    made: list[Plan] = []

    def make_plan(*arguments) -> Plan:
        made.append(planning_make_plan(*arguments))
        return made[-1]

    planning_make_plan = planning.make_plan
    monkeypatch.setattr(planning, "make_plan", make_plan)
    return made


def generate(driver: Driver, requests: list[int], together: bool = True) -> list[list[object]]:
    """Tokens and logprobs of requests that share `PREFIX`, the first of which computes it."""
    driver.add(key(99), PREFIX, GREEDY)
    driver.run([key(99)], 1)
    names = [key(n) for n in requests]
    for n, name in zip(requests, names, strict=True):
        ids = [*PREFIX[:1040], *(n + i for i in range(8))]
        driver.add(name, ids, SEEDED, like=key(99), computed=1040 // BLOCK_SIZE * BLOCK_SIZE)
    for batch in [names] if together else [[name] for name in names]:
        driver.run(batch, 6)
    return [[(e.token_ids, e.logprobs) for e in driver.tracks[name].emissions] for name in names]


def test_tokens_are_the_same_together_and_alone(loaded, plans):
    model, spec = loaded
    every = list(range(REQUESTS))
    together = generate(open_driver(model, spec, blocks=128, threads=2), every)
    assert plans[-1].shared, "decode steps share the prefix"
    plans.clear()
    apart = generate(open_driver(model, spec, blocks=128, shared_prefixes=False), every)
    assert not any(plan.shared for plan in plans), "switched off"
    alone = generate(open_driver(model, spec, blocks=128), every, together=False)
    if ops.describe(getattr(torch, spec.dtype))["invariant"]:
        assert together == apart == alone
    else:  # the fallback's logprobs differ in their last digits
        assert [len(tokens) for tokens in together] == [len(tokens) for tokens in apart] == [6] * REQUESTS


def test_one_plan_a_step_serves_all_layers(loaded, plans):
    model, spec = loaded
    driver = open_driver(model, spec, blocks=128)
    driver.add(key(1), PREFIX[:50], GREEDY)
    driver.run([key(1)], 4)
    assert len(model.layers) == 3
    assert len(plans) == 2, "one for the prompt, and one that goes on as it decodes"
