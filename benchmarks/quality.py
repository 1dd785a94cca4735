"""What quantization costs the bundled model: perplexity of held-out text at every width, beside its bfloat16 value.

    make bench NAME=quality [ARGS="--tokens 16384 --widths 4 8"]

Each width, symmetric and (up to 4 bits) with zero points, in groups of 32, 64 and 128 and per column; rounded to nearest and by GPTQ,
calibrated on text that the model was trained on. Held-out text is what `tools/train_model.py evaluate` reads. The down projection has
576 inputs, which 128 does not divide: its groups are of 64 there, as `headrace quantize` makes them.
"""

import argparse
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

from _report import target, write
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from headrace.cli.quantization import perplexity_of
from headrace.cli.wiring import BUNDLED
from headrace.compute.checkpoint import Checkpoint
from headrace.compute.numerics import prepare
from headrace.compute.ops.backend import describe
from headrace.compute.quant.conversion import Calibration, convert, samples_of
from headrace.compute.quant.recipe import Recipe
from headrace.compute.quant.weight import PER_COLUMN

sys.path.append(str(Path(__file__).parents[1] / "tools"))
from corpus import pack, split_texts

GROUPS = (32, 64, 128, PER_COLUMN)
METHODS = ("nearest", "gptq")
ASYMMETRIC_MAX = 4
CALIBRATION_FILES = 10
"""One in so many of the training files."""


class Row(NamedTuple):
    """One line of the table."""

    bits: int
    symmetric: bool

    @property
    def name(self) -> str:
        return f"{self.bits}" if self.symmetric else f"{self.bits} with zero points"


def rows(widths: list[int]) -> Iterator[Row]:
    for bits in widths:
        yield Row(bits, True)
        if bits <= ASYMMETRIC_MAX:
            yield Row(bits, False)


def column(method: str, group: int) -> str:
    return f"{method} {'column' if group == PER_COLUMN else group}"


def texts(tokens: int, samples: int) -> tuple[Calibration, list[int]]:
    """The calibration's samples, and the ids to measure on."""
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))
    training, held_out = split_texts(Path(sysconfig.get_path("stdlib")))
    ids = pack(tokenizer, training[::CALIBRATION_FILES]).tolist()
    return Calibration(samples_of(ids, samples, 512)), pack(tokenizer, held_out).tolist()[: tokens + 1]


def measured(
    row: Row, method: str, group: int, calibration: Calibration, ids: list[int], threads: int
) -> float:
    """Perplexity of the model quantized so."""
    with tempfile.TemporaryDirectory() as folder:
        quantized = Path(folder) / "model"
        convert(
            Checkpoint(BUNDLED),
            quantized,
            Recipe(row.bits, group, row.symmetric),
            calibration if method == "gptq" else None,
            threads=threads,
        )
        return perplexity_of(quantized, ids, threads).value


def shown(table: dict[str, dict[str, float]], plain: float) -> Table:
    printed = Table(title=f"perplexity; bfloat16: {plain:.3f}")
    printed.add_column("bits")
    columns = [column(method, group) for method in METHODS for group in GROUPS]
    for name in columns:
        printed.add_column(name, justify="right")
    for name, found in table.items():
        printed.add_row(name, *(f"{found[c]:.3f}" for c in columns))
    return printed


def targets_of(table: dict[str, dict[str, float]], plain: float) -> list[dict[str, Any]]:
    found = []
    for name, columns, limit in (
        ("8", ("nearest 128", "nearest column"), 1.002),
        ("4", ("gptq 128",), 1.02),
        ("3 with zero points", ("gptq 32",), 1.03),
    ):
        if name in table:
            values = [table[name][c] / plain for c in columns]
            what = f"perplexity over bf16's, {name} bits, {' and '.join(columns)}"
            found.append(target(what, values, "x", f"<= {limit}", met=max(values) <= limit))
    gains = [
        row[column("gptq", group)] / row[column("nearest", group)]
        for name, row in table.items()
        for group in GROUPS
        if int(name.split()[0]) <= ASYMMETRIC_MAX
    ]
    if gains:
        what = f"perplexity by GPTQ over that by rounding, up to {ASYMMETRIC_MAX} bits"
        found.append(target(what, gains, "x", "< 1", met=max(gains) < 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1 << 20, help="of the held-out text, at most")
    parser.add_argument("--samples", type=int, default=128, help="of 512 tokens, for GPTQ")
    parser.add_argument("--widths", type=int, nargs="*", default=list(range(2, 9)))
    arguments = parser.parse_args()
    prepare(arguments.threads)
    calibration, ids = texts(arguments.tokens, arguments.samples)
    plain = perplexity_of(BUNDLED, ids, arguments.threads).value
    table: dict[str, dict[str, float]] = {}
    for row in rows(arguments.widths):
        began = perf_counter()
        table[row.name] = {
            column(method, group): round(measured(row, method, group, calibration, ids, arguments.threads), 4)
            for method in METHODS
            for group in GROUPS
        }
        print(f"{row.name}: {table[row.name]} ({perf_counter() - began:.0f} s)", flush=True)
    Console(width=140).print(shown(table, plain))
    figures = {
        "bf16": round(plain, 4),
        "perplexity": table,
        "tokens": len(ids) - 1,
        "calibration_tokens": calibration.samples.numel(),
        "act_order": calibration.order,
        "backend": describe(),
    }
    notes = (
        "Perplexity per token, windows of 2,048; all of attention's and the MLP's matrices are quantized, embedding and head are not. "
        "The model has 4.7 M parameters: larger models lose less at the same width."
    )
    write("quality", figures, targets_of(table, plain), {}, notes)


if __name__ == "__main__":
    main()
