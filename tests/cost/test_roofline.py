from functools import cache

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from headrace.cli import catalogue
from headrace.cost.arithmetic import shape_of
from headrace.cost.memory import check_fits, memory_bytes_for_kv
from headrace.cost.roofline import Roofline
from headrace.types.errors import ConfigError
from tests.cost import models
from tests.cost.properties import CHUNKS, LENGTH, ROWS, check_affine, check_monotone

MODELS = (
    models.LLAMA_8B,
    models.MISTRAL_7B,
    models.GEMMA3_1B,
    models.MIXTRAL,
    models.DEEPSEEK_V3,
    models.QWEN3_NEXT,
    models.QWEN3_06B,
)
DEVICES = catalogue.names()


@cache
def roofline(device: str, model: int, tensor_parallel: int = 1) -> Roofline:
    return Roofline(shape_of(MODELS[model]), catalogue.hardware(device), tensor_parallel)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=30)
@given(model=st.integers(0, len(MODELS) - 1), chunks=CHUNKS, rows=ROWS, length=LENGTH, more=LENGTH)
@example(model=0, chunks=[], rows=0, length=1, more=1)
def test_monotone(device, model, chunks, rows, length, more):
    check_monotone(roofline(device, model), chunks, rows, rows * length, more)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=30)
@given(model=st.integers(0, len(MODELS) - 1), rows=st.integers(1, 600), length=LENGTH)
def test_decode_is_affine(device, model, rows, length):
    check_affine(roofline(device, model), rows, rows * length)


@settings(max_examples=30)
@given(chunks=CHUNKS, rows=st.integers(1, 600), length=LENGTH, more=LENGTH)
def test_parallel_devices_keep_both(chunks, rows, length, more):
    for model in (models.LLAMA_8B, models.DEEPSEEK_V3, models.QWEN3_NEXT):
        costs = roofline("h200-sxm", MODELS.index(model), 8)
        check_monotone(costs, chunks, rows, rows * length, more)
        check_affine(costs, rows, rows * length)


def test_every_row_count_in_turn():
    """Rows one by one at a fixed context: no rounding makes one more row cheaper."""
    for model in range(len(MODELS)):
        costs = roofline("h100-sxm", model)
        for context in (1, 5_000, 400_000):
            took = [costs.step_ps((), rows, context) for rows in range(1, 300)]
            assert took == sorted(took)


def test_parallel_devices_are_faster_but_not_as_many_times():
    shape = models.LLAMA_70B
    one, four = (Roofline(shape_of(shape), catalogue.hardware("h200-sxm"), n) for n in (1, 4))
    for step in ((((2048, 0),), 0, 0), ((), 64, 64_000)):
        assert 1.5 < one.step_ps(*step) / four.step_ps(*step) < 4
    assert four.transfer_ns(10**9) < one.transfer_ns(10**9)


def test_bounds_that_physics_sets():
    """A decode step reads every weight and all KV once; a prefill cannot exceed the device's rate."""
    device = catalogue.hardware("h100-sxm")
    shape = shape_of(models.LLAMA_8B)
    costs = Roofline(shape, device)
    read = shape.weight_bytes - 2 * shape.embedding_weights
    for rows, length in ((1, 100), (32, 1000), (256, 2000)):
        seconds = costs.step_ps((), rows, rows * length) / 1e12
        least = (read + rows * length * 131_072) / device.memory_bandwidth
        assert least < seconds < 3 * least
    seconds = costs.step_ps(((8192, 0),), 0, 0) / 1e12
    least = (8192 * shape.token_flops + shape.attention_flops(8192, 0)) / device.rates.bf16
    assert least < seconds < 2 * least


def test_experts_cost_by_those_that_are_hit():
    costs = roofline("h200-sxm", MODELS.index(models.MIXTRAL))
    alone, eight, many = (costs.decode(rows, 0).fixed_ps for rows in (1, 8, 64))
    assert 2.5 < eight / alone < 4  # of 8 experts, 2 are hit by one token and 7.2 by eight
    assert many / eight < 1.5


def test_a_window_bounds_the_context_that_counts():
    costs = roofline("h100-sxm", MODELS.index(models.MISTRAL_7B))
    assert costs.decode(4, 4 * 5000).slope_ps == 0
    assert costs.decode(4, 4 * 4000).slope_ps > 0
    assert costs.step_ps((), 4, 4 * 5000) == costs.step_ps((), 4, 4 * 50_000)


def test_fewer_bits_read_less():
    device = catalogue.hardware("a100-80g-sxm")
    plain, four = (Roofline(shape_of(models.LLAMA_8B, weight_bits=b), device) for b in (16, 4))
    assert plain.decode(1, 0).fixed_ps > 2 * four.decode(1, 0).fixed_ps


def test_the_two_core_machine_is_near_what_was_measured_there():
    """A 0.6B-shaped model with 32,000 words: about 650 to 760 prefill tokens/s, 30 to 33 decode tokens/s, 206 for 16 requests."""
    costs = Roofline(shape_of(models.QWEN3_06B | {"vocab_size": 32000}), catalogue.hardware("epyc-2core"))
    assert 500 < 512 / (costs.step_ps(((512, 0),), 0, 0) / 1e12) < 800
    assert 25 < 1 / (costs.step_ps((), 1, 544) / 1e12) < 36
    assert 150 < 16 / (costs.step_ps((), 16, 16 * 544) / 1e12) < 280


@pytest.mark.parametrize(
    ("device", "tensor_parallel", "words"),
    [
        ("h100-sxm", 0, "expected at least 1"),
        ("h100-sxm", 3, "does not divide the 32 attention heads"),
        ("h100-sxm", 16, "exceeds the 8 devices"),
        ("epyc-2core", 2, "exceeds the 1 devices"),
    ],
)
def test_impossible_parallelism(device, tensor_parallel, words):
    with pytest.raises(ConfigError, match=words):
        Roofline(shape_of(models.LLAMA_8B), catalogue.hardware(device), tensor_parallel)


def test_memory_left_for_kv():
    shape, device = shape_of(models.LLAMA_8B), catalogue.hardware("h100-sxm")
    left = memory_bytes_for_kv(shape, device)
    assert 50e9 < left < 65e9  # vLLM reports about 56 GiB at 0.9
    assert memory_bytes_for_kv(shape, device, 2) > 2 * left
    latent = shape_of(models.DEEPSEEK_V3)
    eight = memory_bytes_for_kv(latent, catalogue.hardware("h200-sxm"), 8)
    each = catalogue.hardware("h200-sxm").memory_bytes * 0.9 - latent.device_weight_bytes(8)
    assert eight < each  # every device keeps all of a latent


def test_what_does_not_fit_says_what_is_short():
    with pytest.raises(ConfigError, match=r"does not fit on 1 x h100-sxm .* GiB more than there is"):
        check_fits(shape_of(models.LLAMA_70B), catalogue.hardware("h100-sxm"))
    check_fits(shape_of(models.LLAMA_70B), catalogue.hardware("h100-sxm"), 4, context_tokens=8192)
    with pytest.raises(
        ConfigError, match=r"leaves .* GiB for KV; 100 sequence.s. of 8192 tokens need 100.00 GiB"
    ):
        check_fits(
            shape_of(models.LLAMA_8B),
            catalogue.hardware("h100-sxm"),
            context_tokens=8192,
            sequences=100,
        )
    check_fits(
        shape_of(models.MISTRAL_7B), catalogue.hardware("h100-sxm"), context_tokens=10**6, sequences=50
    )
    with pytest.raises(ConfigError, match="utilization is"):
        memory_bytes_for_kv(shape_of(models.LLAMA_8B), catalogue.hardware("h100-sxm"), utilization=1.2)
