"""The fixed-order linear layer against F.linear, by rows, microseconds. Weights change from call to call, so none is in a cache.

make bench NAME=linear [ARGS="--threads 2 --rounds 10"]
"""

import argparse
import statistics
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from _report import pairs, target, write
from torch import Tensor

from headrace.compute import ops

SHAPES = ((1024, 3072), (3072, 1024), (2048, 1024), (1024, 4096))
ROWS = (1, 4, 16, 64, 128, 512)
CACHE_BYTES = 64 << 20  # weights in turn take at least this


def calls(
    features_in: int, features_out: int, rows: int, dtype: torch.dtype, threads: int
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(ours, F.linear), the next weight at each call."""
    x = torch.randn(rows, features_in).to(dtype)
    weight = torch.randn(features_out, features_in).to(dtype)
    copies = 1 + CACHE_BYTES // weight.nbytes
    plain = cycle([weight.clone() for _ in range(copies)])
    packed = cycle([ops.pack(weight) for _ in range(copies)])

    def ours() -> Tensor:
        return ops.fixed_linear(x, next(packed), threads=threads, out_dtype=dtype)

    def torch_linear() -> Tensor:
        return F.linear(x, next(plain))

    return ours, torch_linear


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    own: dict[str, dict[str, float]] = {}
    peer: dict[str, dict[str, float]] = {}
    ratios: dict[str, list[float]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for features_in, features_out in SHAPES:
            shape = f"{name} {features_in}x{features_out}"
            own[shape], peer[shape] = {}, {}
            for rows in ROWS:
                ours, theirs = pairs(
                    *calls(features_in, features_out, rows, dtype, arguments.threads), arguments.rounds
                )
                own[shape][str(rows)] = round(statistics.median(ours) * 1e6)
                peer[shape][str(rows)] = round(statistics.median(theirs) * 1e6)
                ratios.setdefault(f"{name}, {rows} rows", []).append(
                    statistics.median(theirs) / statistics.median(ours)
                )
            columns = "  ".join(f"{m}: {own[shape][str(m)]}/{peer[shape][str(m)]}" for m in ROWS)
            print(f"{shape:24} own/torch us  {columns}")
    targets: list[dict[str, Any]] = [
        target(f"F.linear's time over ours, {what}", values, "x", ">= 0.95", met=min(values) >= 0.95)
        for what, values in ratios.items()
    ]
    figures = {"threads": arguments.threads, "backend": ops.describe(torch.bfloat16), "us_by_rows": own}
    notes = "Shapes are inputs x outputs; value, low and high of a target are over the shapes."
    write("linear", figures, targets, {"torch F.linear": {"us_by_rows": peer}}, notes)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
