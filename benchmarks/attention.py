"""Paged attention against torch's SDPA on a contiguous cache, bf16: one layer of prefill, and decode out of memory.

    make bench NAME=attention [ARGS="--threads 2 --rounds 20"]

16 heads, 8 KV heads, dim 128, blocks of 32 at random places. SDPA gets what suits it: equal lengths, no mask, no paging.
"""

import argparse
import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _report import pairs, seconds, target, write
from torch import Tensor

from headrace.compute import ops

HEADS, KV_HEADS, DIM, BLOCK = 16, 8, 128, 32
SCALE = DIM**-0.5
PREFILL = 512
SEQUENCES, LENGTH, LAYERS = 16, 550, 16
LONG = (8, 4096, 4)


class Cache:
    """One pool, and the same K and V as SDPA wants them: [layers, sequences, KV heads, length, dim]."""

    def __init__(self, sequences: int, length: int, layers: int) -> None:
        per = -(-length // BLOCK)
        self.tables = torch.randperm(sequences * per).int().view(sequences, per)
        self.kv = torch.randn(sequences * per, layers, 2, KV_HEADS, BLOCK, DIM).bfloat16()
        gathered = self.kv[self.tables.long()].permute(2, 3, 0, 4, 1, 5, 6).flatten(4, 5)[..., :length, :]
        self.k, self.v = gathered[:, 0].contiguous(), gathered[:, 1].contiguous()

    def bytes(self) -> int:
        return 2 * self.k.numel() * self.k.element_size()


def prefill(threads: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """One layer's attention of a prompt: (ours, SDPA), each giving [tokens, heads * dim]."""
    cache = Cache(1, PREFILL, 1)
    q = torch.randn(PREFILL, HEADS, DIM).bfloat16()
    rows, positions = torch.zeros(PREFILL).int(), torch.arange(PREFILL).int()

    def ours() -> Tensor:
        return ops.paged_attention(
            q, cache.kv, 0, cache.tables, rows, positions, scale=SCALE, threads=threads
        )

    def sdpa() -> Tensor:
        x = q.transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(x, cache.k[0], cache.v[0], is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1).reshape(PREFILL, -1)

    return ours, sdpa


def decode(cache: Cache, threads: int) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """One step's attention in every layer: (ours, SDPA), each giving the last layer's [sequences, heads * dim]."""
    layers, sequences, _, length, _ = cache.k.shape
    q = torch.randn(sequences, HEADS, DIM).bfloat16()
    rows, positions = torch.arange(sequences).int(), torch.full((sequences,), length - 1).int()

    def ours() -> Tensor:
        for layer in range(layers):
            out = ops.paged_attention(
                q, cache.kv, layer, cache.tables, rows, positions, scale=SCALE, threads=threads
            )
        return out

    def sdpa() -> Tensor:
        x = q[:, :, None]
        for layer in range(layers):
            out = F.scaled_dot_product_attention(x, cache.k[layer], cache.v[layer], enable_gqa=True)
        return out.flatten(1)

    return ours, sdpa


def measured(shape: tuple[int, int, int], threads: int, rounds: int) -> dict[str, list[float]]:
    """A decode step of (sequences, length, layers): seconds of ours and of SDPA, and of a sum over the same K; GB/s of both."""
    cache = Cache(*shape)
    ours, sdpa = decode(cache, threads)
    torch.testing.assert_close(ours(), sdpa(), atol=2e-2, rtol=2e-2)
    own, theirs = pairs(ours, sdpa, rounds)
    words = cache.k.view(torch.int64).flatten()
    read = [words.nbytes / 1e9 / seconds(words.sum) for _ in range(rounds)]
    return {"own": own, "sdpa": theirs, "read": read, "rate": [cache.bytes() / 1e9 / s for s in own]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    threads, rounds = arguments.threads, arguments.rounds
    torch.set_num_threads(threads)
    torch.manual_seed(0)

    ours, sdpa = prefill(threads)
    torch.testing.assert_close(ours(), sdpa(), atol=2e-2, rtol=2e-2)
    prefill_ours, prefill_sdpa = pairs(ours, sdpa, rounds)

    short = measured((SEQUENCES, LENGTH, LAYERS), threads, rounds)
    long = measured(LONG, threads, rounds)
    milliseconds = [1e3 * s for s in prefill_ours]
    share = statistics.median(short["rate"]) / statistics.median(short["read"])
    long_share = [rate / statistics.median(long["read"]) for rate in long["rate"]]
    write(
        "attention",
        {
            "threads": threads,
            "backend": ops.describe(torch.bfloat16),
            "prefill_512_ms": statistics.median(milliseconds),
            "decode_16x550_us_a_layer": statistics.median(short["own"]) / LAYERS * 1e6,
            "decode_gb_s": statistics.median(short["rate"]),
            "decode_8x4096_gb_s": statistics.median(long["rate"]),
            "sequential_read_gb_s": statistics.median(short["read"]),
        },
        [
            target("prefill of 512 tokens, one layer", milliseconds, "ms", "< 5", met=max(milliseconds) < 5),
            target(
                "KV read by decode, 16 x 550 tokens",
                short["rate"],
                "GB/s",
                "> 0.8 of a sum's",
                met=share > 0.8,
            ),
            target(
                "share of a sum's rate at which decode reads KV, 8 x 4,096 tokens",
                long_share,
                "",
                ">= 0.75",
                met=statistics.median(long_share) >= 0.75,
            ),
        ],
        {
            "torch SDPA": {
                "prefill_512_ms": statistics.median(prefill_sdpa) * 1e3,
                "decode_16x550_us_a_layer": statistics.median(short["sdpa"]) / LAYERS * 1e6,
                "decode_8x4096_us_a_layer": statistics.median(long["sdpa"]) / LONG[2] * 1e6,
            }
        },
        "The sum is torch's over the same K; it reads in order, decode reads 8 KiB pieces at random places.",
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
