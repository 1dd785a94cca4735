"""What a decode step costs besides the model: plan, messages through the codec, router, the runner's own work, sampling. Batch 16.

    make bench NAME=step_overhead [ARGS="--steps 400"]

The real cores and the real runner in one thread, on a one-layer model with a vocabulary of 32,000; `model.forward` is taken out.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import msgspec
import torch
from _model import VOCABULARY, make, prompt
from _report import target, write

from headrace.compute import models
from headrace.compute.checkpoint import Checkpoint
from headrace.compute.runner import Runner
from headrace.engine.policies import EnginePolicies
from headrace.nodes.instance import Instance
from headrace.nodes.limits import InstanceConfig, RouterConfig
from headrace.nodes.pool import PoolCore
from headrace.nodes.router import Router
from headrace.ports import Core
from headrace.registry import load
from headrace.types.events import Close, Execute, PeerUp, Received, Send, StepDone, Submitted
from headrace.types.hashing import block_hashes, chain_root
from headrace.types.ids import Address, PoolId, RequestId
from headrace.types.messages import AnyMessage, InstanceInfo, Start
from headrace.types.payload import SamplingParams, SequencePayload
from headrace.types.plan import StepPlan
from headrace.types.request import Request

ROUTER, POOL, WORKER = Address("router"), Address("pool0"), Address("worker0")
SHAPE = {"layers": 1, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "intermediate": 128}
BATCH = 16
SHARPEN = 100.0
PROMPT = 128
DEPTH = 2


class Bench:
    """Three cores, one runner, messages through the codec, no sockets."""

    def __init__(self, folder: Path, sampling: SamplingParams, sharpen: float) -> None:
        checkpoint = Checkpoint(folder)
        model = models.load(checkpoint, length=4096)
        spec = models.kv_spec(checkpoint)
        blocks = (BATCH * 140,)
        self.model = Timed(model, sharpen)
        self.runner = Runner(self.model, spec, blocks, eos_token_ids=(), threads=2)
        info = InstanceInfo(PoolId(0), POOL, "mixed", 256, blocks)
        axes = (
            ("batching", "splitfuse"),
            ("admission", "aggressive"),
            ("ordering", "fcfs"),
            ("preemption", "recompute"),
        )
        policies = EnginePolicies(*(load(f"engine.{axis}", name) for axis, name in axes))
        self.cores: dict[Address, Core] = {
            POOL: PoolCore(POOL, PoolId(0), spec, blocks, load("kv.evict", "lru")),
            ROUTER: Router(ROUTER, load("cluster.placement", "least_load"), RouterConfig()),
            WORKER: Instance(WORKER, ROUTER, info, spec, policies, InstanceConfig(depth=DEPTH)),
        }
        self.plans: list[StepPlan] = []
        self._sampling = sampling
        self._root = chain_root("bench")
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(AnyMessage).decode
        for address in (POOL, ROUTER, WORKER):
            self.cores[address].handle(PeerUp(WORKER, info), 0)
            self.settle(address)
        for i in range(BATCH):
            self._submit(RequestId(i), prompt(i, PROMPT))

    def step(self) -> None:
        """Run the oldest plan, and everything that follows from its result."""
        result, _ = self.runner.execute(self.plans.pop(0))
        self.cores[WORKER].handle(StepDone(result), 0)
        self.settle(WORKER)

    def settle(self, address: Address) -> None:
        """Settle a core, carry its commands out, and settle whom they reach."""
        reached: dict[Address, None] = {}
        for command in self.cores[address].settle(0):
            match command:
                case Send(to, message):
                    arrived = self._decode(self._encode(message))
                    if isinstance(arrived, Start):
                        self.runner.open(arrived.key, self._payload(arrived))
                    self.cores[to].handle(Received(address, arrived), 0)
                    reached[to] = None
                case Execute(plan):
                    self.plans.append(plan)
                case Close(key):
                    self.runner.close(key)
                case _:
                    pass
        for to in reached:
            self.settle(to)

    def _submit(self, number: RequestId, ids: list[int]) -> None:
        request = Request(
            number, len(ids), tuple(block_hashes(self._root, ids, 32)), tokens_max=4096 - PROMPT
        )
        self.cores[ROUTER].handle(Submitted(request), 0)
        self.settle(ROUTER)

    def _payload(self, start: Start) -> SequencePayload:
        return SequencePayload(self._root, prompt(start.key.request, PROMPT), PROMPT, self._sampling)


class Timed:
    """A model whose `forward` is timed. `sharpen` scales logits: random weights give a flat distribution, trained ones do not."""

    def __init__(self, model: Any, sharpen: float) -> None:
        self.vocab, self.length = model.vocab, model.length
        self.forward_ns = 0
        self._model = model
        self._sharpen = sharpen

    def forward(self, *arguments: Any) -> torch.Tensor:
        started = perf_counter_ns()
        logits = self._model.forward(*arguments) * self._sharpen
        self.forward_ns += perf_counter_ns() - started
        return logits


def overhead_ms(folder: Path, sampling: SamplingParams, steps: int, sharpen: float = 1.0) -> list[float]:
    """Milliseconds a step, without the model."""
    bench = Bench(folder, sampling, sharpen)
    for _ in range(40):
        bench.step()
    times: list[float] = []
    for _ in range(steps):
        bench.model.forward_ns = 0
        started = perf_counter_ns()
        bench.step()
        times.append((perf_counter_ns() - started - bench.model.forward_ns) / 1e6)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=400)
    steps = parser.parse_args().steps
    long = {"ignore_eos": True, "tokens_max": 4096}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        make(Path(folder), **SHAPE, vocabulary=VOCABULARY)
        greedy = overhead_ms(Path(folder), SamplingParams(temperature=0, **long), steps)
        top_p = SamplingParams(temperature=0.8, top_p=0.95, seed=1, **long)
        nucleus = overhead_ms(Path(folder), top_p, steps, SHARPEN)
        flat = overhead_ms(Path(folder), top_p, steps)
    figures = {
        "batch": BATCH,
        "vocabulary": VOCABULARY,
        "greedy_ms": {"median": statistics.median(greedy), "p90": sorted(greedy)[int(steps * 0.9)]},
        "top_p_ms": {"median": statistics.median(nucleus), "p90": sorted(nucleus)[int(steps * 0.9)]},
        "top_p_flat_ms": {"median": statistics.median(flat), "p90": sorted(flat)[int(steps * 0.9)]},
    }
    targets = [
        target(
            "host overhead of a step, greedy", greedy, "ms", "median < 1", met=statistics.median(greedy) < 1
        ),
        target("with seeded top-p", nucleus, "ms", "median < 3", met=statistics.median(nucleus) < 3),
    ]
    notes = f"Logits of random weights times {SHARPEN:g}; top_p_flat: unscaled, so the nucleus is nearly all words and is sorted in full."
    write("step_overhead", figures, targets, {}, notes)


if __name__ == "__main__":
    main()
