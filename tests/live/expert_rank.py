"""One rank of an expert group: random steps, each compared with what one process computes alone."""

import asyncio
import sys

import msgspec
import numpy as np
import uvloop

from headrace.live.transfer.engine import TransferEngine
from headrace.live.transfer.experts import Experts, Shape
from headrace.live.transfer.regions import Descriptor
from headrace.live.transports import Settings, open_transports
from headrace.types.ids import Address

HIDDEN = 24


def shape_of(ranks: int, *, tokens_max: int = 12, rows_max: int = 0) -> Shape:
    return Shape(
        ranks=ranks,
        experts=4 * ranks,
        chosen=3,
        tokens_max=tokens_max,
        row_bytes=HIDDEN * 4,
        hidden=HIDDEN,
        rows_max=rows_max,
    )


def routed(shape: Shape, seed: int, step: int, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, experts and weights of one rank: sometimes none, sometimes all to one rank."""
    rng = np.random.default_rng((seed, step, rank))
    count = int(rng.choice([0, 1, shape.tokens_max, rng.integers(0, shape.tokens_max + 1)]))
    favour = rng.random(shape.experts) ** (20 if rng.random() < 0.3 else 1)
    experts = np.array(
        [
            rng.choice(shape.experts, shape.chosen, replace=False, p=favour / favour.sum())
            for _ in range(count)
        ],
        np.int32,
    ).reshape(count, shape.chosen)
    tokens = rng.standard_normal((count, HIDDEN), np.float32)
    return tokens, experts, rng.random((count, shape.chosen), np.float32)


def expert(number: int, rows: np.ndarray) -> np.ndarray:
    values = rows.view(np.float32)
    return np.sin(values * np.float32(number + 1)) + values[:, ::-1] * np.float32(0.3)


def alone(shape: Shape, tokens: np.ndarray, experts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What a plain all-to-all gives: every rank is sent all tokens, and its part is added in the order of the ranks."""
    out = np.zeros((len(tokens), HIDDEN), np.float32)
    for rank in range(shape.ranks):
        part = np.zeros_like(out)
        for number in range(rank * shape.local, (rank + 1) * shape.local):
            for at, column in zip(*np.nonzero(experts == number), strict=True):
                part[at] += weights[at, column] * expert(number, tokens[at : at + 1].view(np.uint8))[0]
        out += part
    return out


async def step_of(group: Experts, seed: int, step: int) -> None:
    tokens, experts, weights = routed(group.shape, seed, step, group.rank)
    got = await group.dispatch(tokens, experts, weights)
    results = got.compute(expert, HIDDEN)
    mixed = await group.combine(results, got.counts)
    wanted = alone(group.shape, tokens, experts, weights)
    assert mixed.tobytes() == wanted.tobytes(), f"rank {group.rank}, step {step}"


async def main(rank: int, ranks: int, transport: str, seed: int, steps: int) -> None:
    loop = asyncio.get_running_loop()
    address = Address(f"rank{rank}")
    engine = TransferEngine(address, open_transports(transport, Settings(address, "secret")), loop)
    group = Experts(engine, rank, shape_of(ranks))
    sys.stdout.write(msgspec.json.encode(group.descriptor).decode() + "\n")
    sys.stdout.flush()
    line = await loop.run_in_executor(None, sys.stdin.readline)
    group.join(msgspec.json.decode(line, type=list[Descriptor]))
    for step in range(steps):
        await step_of(group, seed, step)
    await group.close()
    sys.stdout.write("done\n")
    sys.stdout.flush()
    # Others may still wait for an acknowledgement of ours.
    await loop.run_in_executor(None, sys.stdin.readline)
    engine.close()


if __name__ == "__main__":
    numbers = [int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[4]), int(sys.argv[5])]
    uvloop.run(main(numbers[0], numbers[1], sys.argv[3], numbers[2], numbers[3]))
