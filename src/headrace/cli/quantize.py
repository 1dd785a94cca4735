"""`headrace quantize`: its flags. What it does is in `quantization`, which takes torch to read."""

from pathlib import Path
from typing import Annotated

import typer


def quantize(
    model: Annotated[
        Path | None, typer.Argument(help="Checkpoint folder \\[default: the bundled one]", show_default=False)
    ] = None,
    bits: Annotated[int, typer.Option("--bits", help="Of a weight: 1 to 8")] = 4,
    group: Annotated[
        int, typer.Option("--group", help="Inputs that share a scale; -1: one scale a column (output)")
    ] = 128,
    asymmetric: Annotated[
        bool, typer.Option("--asymmetric", help="Zero points: better below 4 bits, needed for 1")
    ] = False,
    scales: Annotated[
        str, typer.Option("--scales", help="search (least squared error) or minmax")
    ] = "search",
    calibrate: Annotated[
        Path | None,
        typer.Option(
            "--calibrate", help="Text for GPTQ, like what will be served \\[default: round to nearest]"
        ),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Stretches of the text")] = 128,
    length: Annotated[int, typer.Option("--length", min=16, help="Tokens of each")] = 512,
    act_order: Annotated[
        str,
        typer.Option(
            "--act-order",
            help="none, static (free when served), or group (best fit; inputs are gathered when served, which not every engine does)",
        ),
    ] = "static",
    damping: Annotated[float, typer.Option("--damping", min=0, help="Share of the mean energy")] = 0.01,
    evaluate: Annotated[
        Path | None,
        typer.Option(
            "--evaluate", help="Text for perplexities \\[default: a tenth of --calibrate, set aside]"
        ),
    ] = None,
    evaluate_tokens: Annotated[
        int, typer.Option("--evaluate-tokens", min=1, help="At most so many")
    ] = 32_768,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="New folder \\[default: the model's name and the width, here]"),
    ] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="\\[default: all]")] = None,
) -> None:
    """Write a checkpoint with weights of fewer bits, in the compressed-tensors format; `serve` and `generate` take it.

    headrace quantize MODEL --bits 4 --group 128

    headrace quantize MODEL --bits 4 --calibrate text.txt --output model-int4

    Without a text, weights are rounded to nearest; with one, GPTQ lets later inputs make up for the error of earlier ones, and the
    perplexity before and after is printed. One layer is in memory at a time.
    """
    from headrace.cli.quantization import Texts
    from headrace.cli.quantization import quantize as command
    from headrace.compute.quant.recipe import Recipe

    if scales not in ("search", "minmax"):
        raise typer.BadParameter("--scales is search or minmax")
    if act_order not in ("none", "static", "group"):
        raise typer.BadParameter("--act-order is none, static or group")
    texts = Texts(calibrate, evaluate, samples, length, evaluate_tokens, act_order, damping)
    recipe = Recipe(bits, group, symmetric=not asymmetric, search=scales == "search")
    command(model, recipe, texts, output, threads)
