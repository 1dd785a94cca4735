"""What `headrace quantize` does: a checkpoint folder with weights of fewer bits, and what that costs in quality."""

import os
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from headrace.api.tokenizer import Tokenizer
from headrace.cli.wiring import BUNDLED
from headrace.compute import models, perplexity
from headrace.compute.checkpoint import Checkpoint
from headrace.compute.numerics import prepare
from headrace.compute.quant.conversion import BLOCK_SIZE, Calibration, Outcome, convert, samples_of
from headrace.compute.quant.gptq import Order
from headrace.compute.quant.recipe import Recipe
from headrace.compute.quant.weight import PER_COLUMN
from headrace.types.errors import ConfigError
from headrace.workload.report import progress_bar

WINDOW_MAX = 2048
HELD_OUT = 10
"""One part of so many of a calibration text is kept to measure on."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Where texts come from, and how much of them is used."""

    calibrate: Path | None = None
    evaluate: Path | None = None
    samples: int = 128
    length: int = 512
    evaluate_tokens: int = 32_768
    order: Order = "static"
    damping: float = 0.01


@dataclass(frozen=True, slots=True)
class Prepared:
    """Token ids of the texts."""

    calibration: Calibration | None
    held_out: list[int]
    """To measure on; empty: nothing."""
    said: str
    """What text that is."""


def quantize(
    model: Path | None, recipe: Recipe, texts: Texts, output: Path | None, threads: int | None
) -> None:
    """Raises ConfigError or CheckpointError, and leaves no folder behind then."""
    console = Console(highlight=False, soft_wrap=True)
    source = Checkpoint(model or BUNDLED)
    width = f"g{recipe.group}" if recipe.group != PER_COLUMN else "column"
    method = "rtn" if texts.calibrate is None else "gptq"
    target = output or Path(f"{source.folder.resolve().name}-w{recipe.bits}-{width}-{method}")
    count = threads or os.cpu_count() or 1
    prepare(count)
    texts_read = read(source, texts)
    began = perf_counter()
    with progress_bar(Console(stderr=True), "layers") as progress:
        outcome = convert(source, target, recipe, texts_read.calibration, threads=count, progress=progress)
    describe(console, target, recipe, outcome, perf_counter() - began, method)
    if texts_read.held_out:
        measure(console, source.folder, target, texts_read, count)


def read(source: Checkpoint, texts: Texts) -> Prepared:
    """Read and tokenize before any work begins. Raises ConfigError naming the flag."""
    if texts.calibrate is None and texts.evaluate is None:
        return Prepared(None, [], "")
    tokenizer = Tokenizer.load(source.folder)
    length = min(texts.length, models.context_length(source))
    calibration, held_out, said = None, [], ""
    if texts.calibrate is not None:
        ids = encoded("--calibrate", texts.calibrate, tokenizer)
        last = len(ids) - len(ids) // HELD_OUT if len(ids) >= 2 * HELD_OUT * length else len(ids)
        calibration = Calibration(samples_of(ids[:last], texts.samples, length), texts.order, texts.damping)
        held_out, said = ids[last:], f"the last tenth of {texts.calibrate.name}, not calibrated on"
        if not held_out:
            held_out, said = ids, f"{texts.calibrate.name}, calibrated on: give --evaluate another text"
    if texts.evaluate is not None:
        held_out, said = encoded("--evaluate", texts.evaluate, tokenizer), texts.evaluate.name
    return Prepared(calibration, held_out[: texts.evaluate_tokens + 1], said)


def encoded(flag: str, path: Path, tokenizer: Tokenizer) -> list[int]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{flag} {path}: {error}") from error
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise ConfigError(f"{flag} {path}: holds {len(ids)} tokens; give a longer text")
    return ids


def describe(
    console: Console, target: Path, recipe: Recipe, outcome: Outcome, seconds: float, method: str
) -> None:
    """What was done, by kind of projection."""
    console.print(f"[bold]{escape(str(target))}[/]: {recipe.bits} bits, {method.upper()}, {seconds:.1f} s")
    table = Table()
    for name in ("projection", "matrices", "group", "mean error"):
        table.add_column(name, justify="left" if name == "projection" else "right")
    for kind, errors in outcome.errors.items():
        groups = {size for module, size in outcome.groups.items() if module.endswith(f".{kind}")}
        sizes = ", ".join("column" if size == PER_COLUMN else str(size) for size in sorted(groups))
        table.add_row(kind, str(len(errors)), sizes, f"{sum(errors) / len(errors):.2%}")
    console.print(table)
    before, after = outcome.plain_bytes + outcome.other_bytes, outcome.quantized_bytes + outcome.other_bytes
    console.print(
        f"{outcome.modules} matrices: {outcome.plain_bytes / 2**20:.1f} MiB became {outcome.quantized_bytes / 2**20:.1f} "
        f"({outcome.plain_bytes / outcome.quantized_bytes:.2f}x smaller); the whole checkpoint: {before / 2**20:.1f} MiB became "
        f"{after / 2**20:.1f}. Errors are |W - Q| / |W|: of weights, not of what the model says."
    )
    odd = sorted(set(outcome.groups.values()) - {recipe.group})
    if odd and recipe.group != PER_COLUMN:
        console.print(
            f"Groups of {recipe.group} do not divide the inputs of all matrices: the table says which have smaller ones, or one "
            "scale a column."
        )


def measure(console: Console, source: Path, target: Path, texts: Prepared, threads: int) -> None:
    """Perplexity before and after."""
    found = []
    for folder in (source, target):
        with progress_bar(Console(stderr=True), "tokens") as progress:
            found.append(perplexity_of(folder, texts.held_out, threads, progress))
    before, after = found
    console.print(
        f"Perplexity on {before.tokens} tokens ({texts.said}): {before.value:.3f} before, {after.value:.3f} after "
        f"({after.value / before.value - 1:+.1%})"
    )


def perplexity_of(
    folder: Path, ids: list[int], threads: int, progress: perplexity.Progress = lambda done, total: None
) -> perplexity.Perplexity:
    """Of a checkpoint folder, as it would be served in 2,048-token windows (or shorter, if it must be)."""
    checkpoint = Checkpoint(folder)
    window = min(WINDOW_MAX, models.context_length(checkpoint))
    model = models.load(checkpoint, length=window)
    spec = models.kv_spec(checkpoint, block_size=BLOCK_SIZE)
    return perplexity.measure(model, spec, ids, window=window, threads=threads, progress=progress)
