"""Linear layers by rows, microseconds: the fixed-order one against F.linear, and weights of few bits against both in bf16.

Weights change from call to call, so none is in a cache. A low-bit weight is compared with a bf16 weight of the same shape.

make bench NAME=linear [ARGS="--threads 2 --rounds 10"]
"""

import argparse
import statistics
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from _report import pairs, target, write
from torch import Tensor

from headrace.compute import ops
from headrace.compute.quant import Format, QuantizedWeight

SHAPES = ((1024, 3072), (3072, 1024), (2048, 1024), (1024, 4096))
ROWS = (1, 4, 16, 64, 128, 512)
CACHE_BYTES = 64 << 20  # weights in turn take at least this

LOW_SHAPES = ((1024, 3072), (4096, 4096))
LOW_ROWS = {1: 4.0, 4: 0.97, 8: 1.6, 16: 0.97, 32: 0.97, 64: 0.97, 512: 0.97}
"""By rows: how many times as fast as bf16 4-bit weights should be."""
WIDTHS = ("uint1", "int2", "int3", "int4", "int5", "int6", "int7", "int8", "e2m1", "e3m2", "e4m3")
GROUP = 128


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


def low_bit_weight(name: str, features_in: int, features_out: int) -> QuantizedWeight:
    """Random codes in groups of 128 with bf16 scales."""
    form = Format.named(name)
    codes = torch.randint(2**form.bits - (form.name == "e4m3"), (features_out, features_in)).to(torch.uint8)
    codes[codes == 0x7F] = 0  # of e4m3: no number
    return QuantizedWeight(form, codes, torch.rand(features_out, features_in // GROUP).bfloat16(), GROUP)


def low_bit_call(
    name: str, features_in: int, features_out: int, rows: int, threads: int
) -> Callable[[], Tensor]:
    x = torch.randn(rows, features_in).bfloat16()
    packed = ops.pack_low_bit(low_bit_weight(name, features_in, features_out), torch.bfloat16)
    copies = cycle(
        [replace(packed, data=packed.data.clone()) for _ in range(1 + CACHE_BYTES // packed.data.nbytes)]
    )
    return lambda: ops.low_bit_linear(x, next(copies), threads=threads, out_dtype=torch.bfloat16)


def low_bit(threads: int, rounds: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and targets of 4-bit weights against bf16 ones, and of every width with one row."""
    figures: dict[str, Any] = {}
    ratios: dict[int, list[float]] = {rows: [] for rows in LOW_ROWS}
    for features_in, features_out in LOW_SHAPES:
        shape = f"{features_in}x{features_out}"
        for rows in LOW_ROWS:
            four = low_bit_call("int4", features_in, features_out, rows, threads)
            own, torch_linear = calls(features_in, features_out, rows, torch.bfloat16, threads)
            low, theirs = map(statistics.median, pairs(four, torch_linear, rounds))
            low_again, ours = map(statistics.median, pairs(four, own, rounds))
            ratios[rows].append(theirs / low)
            figures.setdefault(shape, {})[str(rows)] = {
                "us": round(low * 1e6),
                "torch bf16 us": round(theirs * 1e6),
                "own bf16 us": round(ours * 1e6),
                "over own bf16": round(ours / low_again, 2),
            }
        columns = "  ".join(
            f"{m}: {f['us']}/{f['torch bf16 us']}/{f['own bf16 us']}" for m, f in figures[shape].items()
        )
        print(f"int4 {shape:12} low/torch bf16/own bf16 us  {columns}")
        widths = {name: low_bit_call(name, features_in, features_out, 1, threads) for name in WIDTHS}
        times = {name: statistics.median(pairs(call, call, rounds)[1]) for name, call in widths.items()}
        figures[f"{shape}, 1 row, by width"] = {name: round(time * 1e6) for name, time in times.items()}
        print(f"1 row {shape}", "  ".join(f"{name}: {round(time * 1e6)}" for name, time in times.items()))
    targets = [
        target(
            f"bf16 F.linear's time over int4's, {rows} rows",
            values,
            "x",
            f">= {LOW_ROWS[rows]}",
            met=min(values) >= LOW_ROWS[rows],
        )
        for rows, values in ratios.items()
    ]
    return figures, targets


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
    four, more = low_bit(arguments.threads, arguments.rounds)
    figures = {
        "threads": arguments.threads,
        "backend": ops.describe(torch.bfloat16),
        "us_by_rows": own,
        "low_bit": four,
    }
    targets += more
    notes = "Shapes are inputs x outputs; value, low and high of a target are over the shapes."
    write("linear", figures, targets, {"torch F.linear": {"us_by_rows": peer}}, notes)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
