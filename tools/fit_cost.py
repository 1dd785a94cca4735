"""Fits what kernels reach of a device (`cost.hardware.Efficiency`) to measured tables, and says how well.

The tables lie in DIR/profiles (default: HEADRACE_DATA): operations measured by aiconfigurator on A100, H100 and H200, by vidur on A100
and H100, collectives by apex, and the step constants that DistServe fitted. For each table: how many shapes, and the median and the 90th
percentile of the relative error, in sample and held out. Prints the constants as the catalogue's YAML wants them and writes
benchmarks/results/cost_fit.json.

    python tools/fit_cost.py --data DIR
"""

import argparse
import csv
import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import yaml
from rich.console import Console
from rich.table import Table

from headrace.cli import catalogue
from headrace.cost.arithmetic import shape_of
from headrace.cost.fit import Array, fit_relative, summary
from headrace.cost.hardware import DecodeAttention, Efficiency, Gemm, Hardware
from headrace.cost.roofline import Roofline

RESULT = Path(__file__).parent.parent / "benchmarks" / "results" / "cost_fit.json"
DEVICES = {"a100-80g-sxm": ("a100", "0.14.0"), "h100-sxm": ("h100", "0.24.0"), "h200-sxm": ("h200", "0.24.0")}
HEADS_HELD = (12, 32)
MIB = 2**20
Columns = dict[str, Any]
Mask = npt.NDArray[np.bool_]
Rows = list[dict[str, Any]]


def load(path: Path) -> Columns:
    """A table's columns: float arrays where every value is a number, else arrays of text. Empty cells are NaN."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        rows = list(csv.DictReader(file))
    columns: Columns = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        try:
            columns[key] = np.array([float(value) if value else np.nan for value in values])
        except ValueError:
            columns[key] = np.array(values)
    return columns


def take(columns: Columns, mask: Mask) -> Columns:
    return {key: values[mask] for key, values in columns.items()}


class Report:
    """Errors by table, for people and for the file."""

    def __init__(self) -> None:
        self.rows: Rows = []

    def add(
        self,
        device: str,
        table: str,
        what: str,
        seconds: Array,
        predicted: Array,
        held: Mask | None,
        how: str,
    ) -> None:
        """`held`: True where a shape was kept from the fit; None: nothing of this table was fitted."""
        inside = np.zeros(len(seconds), bool) if held is None else ~held
        self.rows.append(
            {
                "device": device,
                "table": table,
                "what": what,
                "held_out_by": how,
                "in_sample": summary(predicted[inside], seconds[inside]),
                "held_out": summary(predicted[~inside], seconds[~inside]),
            }
        )

    def show(self) -> None:
        shown = Table(title="Relative error: median / 90th percentile (bias)")
        for title in ("device", "table", "what", "in sample", "held out", "held out are"):
            shown.add_column(title)
        for row in self.rows:
            shown.add_row(
                row["device"],
                row["table"],
                row["what"],
                _cell(row["in_sample"]),
                _cell(row["held_out"]),
                row["held_out_by"],
            )
        Console(width=200).print(shown)


def _cell(found: dict[str, float]) -> str:
    if not found["samples"]:
        return "-"
    return f"{found['median']:.1%} / {found['p90']:.1%} ({found['bias']:+.1%}), n={found['samples']:.0f}"


def search(seconds: Callable[[Array], Array], measured: Array, start: list[float]) -> Array:
    """Constants with the least mean |log error|: one at a time, by ever smaller factors. What starts at 0 stays there."""

    def miss(constants: Array) -> float:
        return float(np.minimum(np.abs(np.log(seconds(constants) / measured)), 1.0).mean())

    constants, steps = np.array(start), np.full(len(start), 0.3)
    least = miss(constants)
    free = np.flatnonzero(constants)
    while steps[free].max() > 1e-3:
        for index in free:
            for factor in (1 + steps[index], 1 / (1 + steps[index])):
                trial = constants.copy()
                trial[index] *= factor
                if (found := miss(trial)) < least:
                    constants, least = trial, found
                    break
            else:
                steps[index] /= 2
    return constants


def fit_gemm(
    table: Columns, device: Hardware, arithmetic: str
) -> tuple[dict[str, float], Array, Array, Mask]:
    """Constants of `Gemm`; (seconds, predicted, held) of the shapes a language model has."""
    name, element = ("bfloat16", 2) if arithmetic == "bf16" else ("fp8", 1)
    m, n, k = table["m"], table["n"], table["k"]
    table = take(table, (table["gemm_dtype"] == name) & (n >= 512) & (k >= 512) & (m <= 8192))
    m, n, k, seconds = table["m"], table["n"], table["k"], table["latency"] / 1e3
    index = np.unique(np.stack([n, k], axis=1), axis=0, return_inverse=True)[1]
    held = index.reshape(-1) % 5 == 0
    compute = 2 * m * n * k / device.rate(arithmetic)
    memory = (element * n * k + 2 * m * (n + k)) / device.memory_bandwidth

    inputs = 2 * m * k / device.memory_bandwidth

    def roof(c: Array, some: Any) -> Array:
        bound = ((compute[some] / c[1]) ** c[3] + (memory[some] / c[2]) ** c[3]) ** (1 / c[3])
        return c[0] + bound + c[4] * inputs[some]

    some = np.flatnonzero(~held)[:: max(1, int((~held).sum()) // 6000)]
    # 16-bit products take their input as it is: only 8-bit ones quantize it first
    start = [4e-6, 0.7, 0.8, 3.0, 0.3 if arithmetic == "fp8" else 0.0]
    found = search(lambda c: roof(c, some), seconds[some], start)
    constants = dict(zip(Gemm.__struct_fields__, map(float, found), strict=True))
    return constants, seconds, roof(found, slice(None)), held


def decode_terms(
    device: Hardware, rows: Array, context: Array, heads: Array, kv_heads: Array, dim: int
) -> Array:
    """Columns that the fields of `DecodeAttention` multiply; `context`: sum over rows."""
    kv = kv_heads * dim * 4 / device.memory_bandwidth
    nbytes = context * kv_heads * dim * 4
    return np.stack(
        [
            np.ones_like(rows),
            rows * kv_heads,
            rows * heads,
            context * kv,
            np.maximum(context, 128 * rows) * kv,
            np.minimum(nbytes, MIB) / device.memory_bandwidth,
            np.minimum(nbytes, 16 * MIB) / device.memory_bandwidth,
        ],
        axis=1,
    )


def prefill_terms(
    device: Hardware, batch: Array, chunk: Array, context: Array, heads: Array, kv_heads: Array, dim: int
) -> Array:
    """Columns of the fields of `PrefillAttention`: launch, 1/compute, 1/memory, head, token."""
    flops = 4 * batch * heads * dim * (chunk * context + chunk * (chunk + 1) / 2)
    nbytes = 4 * dim * batch * (heads * chunk + kv_heads * (context + chunk))
    return np.stack(
        [
            np.ones_like(batch),
            flops / device.rates.bf16,
            nbytes / device.memory_bandwidth,
            batch * heads,
            chunk,
        ],
        axis=1,
    )


def fit_attention(folder: Path, device: Hardware, report: Report) -> dict[str, Any]:
    """`decode` and `prefill` of the device, from aiconfigurator's tables."""
    short, version = DEVICES[device.name]
    how = f"query heads {HEADS_HELD[0]} and {HEADS_HELD[1]}"
    name = f"aic_{short}_sxm_gen_attn_v{version}.csv.gz"
    table = load(folder / name)
    rows, heads, kv_heads = table["batch_size"], table["num_heads"], table["num_key_value_heads"]
    terms = decode_terms(device, rows, rows * (table["isl"] + table["step"]), heads, kv_heads, 128)
    seconds, held = table["latency"] / 1e3, np.isin(heads, HEADS_HELD)
    decode = fit_relative(terms[~held], seconds[~held])
    report.add(device.name, name, "decode attention", seconds, terms @ decode, held, how)
    large = rows * (table["isl"] + table["step"]) * kv_heads * 512 > 1e7
    found = terms[large] @ decode
    report.add(device.name, name, "  over 10 MB of KV", seconds[large], found, held[large], how)
    name = f"aic_{short}_sxm_ctx_attn_v{version}.csv.gz"
    table = load(folder / name)
    heads, kv_heads = table["num_heads"], table["num_key_value_heads"]
    terms = prefill_terms(device, table["batch_size"], table["isl"], table["step"] * 0, heads, kv_heads, 128)
    seconds, held = table["latency"] / 1e3, np.isin(heads, HEADS_HELD)
    prefill = fit_relative(terms[~held], seconds[~held])
    report.add(device.name, name, "prefill attention", seconds, terms @ prefill, held, how)
    launch, flops, nbytes, head, token = map(float, prefill)
    return {
        "decode": dict(zip(DecodeAttention.__struct_fields__, map(float, decode), strict=True)),
        "prefill": {
            "launch_s": launch,
            "compute": 1 / flops,
            "memory": 1 / nbytes,
            "head_s": head,
            "token_s": token,
        },
    }


def fit_all_reduce(folder: Path, device: Hardware, report: Report) -> dict[int, dict[str, float]]:
    short, version = DEVICES[device.name]
    name = f"aic_{short}_sxm_vllm_allreduce_v{version}.csv.gz"
    table = load(folder / name)
    size = table["message_size"]
    table = take(table, (table["kernel_source"] == "vLLM_custom_graph") & (size >= 1024) & (size <= 2**28))
    found: dict[int, dict[str, float]] = {}
    for devices in (2, 4, 8):
        part = take(table, table["num_gpus"] == devices)
        size, seconds = part["message_size"], part["latency"] / 1e3
        terms = np.stack([np.ones_like(size), size, np.minimum(size, MIB) / MIB], axis=1)
        held = np.arange(len(size)) % 4 == 2
        latency, byte, first = map(float, fit_relative(terms[~held], seconds[~held]))
        found[devices] = {"latency_s": latency, "bandwidth": 1 / byte, "first_mib_s": first}
        predicted = terms @ np.array([latency, byte, first])
        report.add(
            device.name, name, f"all-reduce over {devices}", seconds, predicted, held, "every fourth size"
        )
    return found


ELEMENTWISE = ("input_layernorm", "post_attention_layernorm", "attn_rope", "mlp_act", "add")


def fit_elementwise(
    folder: Path, device: Hardware, models: tuple[str, ...], report: Report
) -> dict[str, float]:
    """`elementwise` from vidur's tables; the degree 2 of tensor parallelism is held out."""
    short = DEVICES[device.name][0]
    tables = [_octaves(load(folder / f"vidur_{short}_{model}_mlp.csv.gz")) for model in models]
    seconds = np.concatenate([sum(t[f"time_stats.{op}.median"] for op in ELEMENTWISE) / 1e3 for t in tables])
    terms = np.concatenate([_elementwise_terms(table, device) for table in tables])
    held = np.concatenate([table["num_tensor_parallel_workers"] == 2 for table in tables])
    fitted = fit_relative(terms[~held], seconds[~held])
    name = f"vidur_{short}_*_mlp.csv.gz"
    report.add(device.name, name, "elementwise", seconds, terms @ fitted, held, "tensor parallel 2")
    return {"launch_s": float(fitted[0]), "memory": 1 / float(fitted[1])}


def _octaves(table: Columns) -> Columns:
    """Numbers of tokens about a factor of 1.4 apart: the table has most of its rows at thousands of tokens."""
    tokens = np.unique(table["num_tokens"])
    wanted = 2 ** np.arange(0, np.log2(tokens.max()) + 0.1, 0.5)
    nearest = tokens[np.abs(tokens[:, None] / wanted - 1).argmin(axis=0)]
    return take(table, np.isin(table["num_tokens"], nearest))


def _elementwise_terms(table: Columns, device: Hardware) -> Array:
    hidden, split = table["n_embd"], table["num_tensor_parallel_workers"]
    projected = (table["n_head"] + 2 * table["n_kv_head"]) * hidden / table["n_head"]
    elements = 8 * hidden + 1.5 * (projected + 2 * table["n_expanded_embd"]) / split
    return np.stack(
        [np.ones_like(hidden), 2 * table["num_tokens"] * elements / device.memory_bandwidth], axis=1
    )


def gemm_seconds(device: Hardware, rows: Array, inner: Array, outer: Array) -> Array:
    """Of bf16 products: the formula of `cost.roofline`, by columns."""
    gemm = device.gemm("bf16")
    compute = 2 * rows * inner * outer / (device.rates.bf16 * gemm.compute)
    memory = 2 * (inner * outer + rows * (inner + outer)) / (device.memory_bandwidth * gemm.memory)
    bound = (compute**gemm.sharpness + memory**gemm.sharpness) ** (1 / gemm.sharpness)
    return gemm.launch_s + bound + gemm.inputs * 2 * rows * inner / device.memory_bandwidth


def check_linear(folder: Path, device: Hardware, models: tuple[str, ...], report: Report) -> None:
    """Linear layers as vidur measured them; no part of any fit."""
    for model in models:
        name = f"vidur_{DEVICES[device.name][0]}_{model}_mlp.csv.gz"
        table = load(folder / name)
        hidden, split = table["n_embd"], table["num_tensor_parallel_workers"]
        projected = (table["n_head"] + 2 * table["n_kv_head"]) * hidden / table["n_head"] / split
        wide = table["n_expanded_embd"] / split
        sizes = {
            "attn_pre_proj": (hidden, projected),
            "attn_post_proj": (hidden / split, hidden),
            "mlp_up_proj": (hidden, 2 * wide),
            "mlp_down_proj": (wide, hidden),
        }
        seconds = [table[f"time_stats.{op}.median"] / 1e3 for op in sizes]
        predicted = [gemm_seconds(device, table["num_tokens"], *size) for size in sizes.values()]
        report.add(
            device.name,
            name,
            "linear layers",
            np.concatenate(seconds),
            np.concatenate(predicted),
            None,
            "all",
        )


def check_attention(folder: Path, device: Hardware, report: Report) -> None:
    """Attention of Llama-2-70B at tensor parallel 2 on A100 as vidur measured it (in whole microseconds); no part of any fit."""
    name = "vidur_a100_llama2-70b_tp_attention_e2d00e9a.csv.gz"
    table = load(folder / name)
    decodes = table["is_prefill"] == "False"
    part = take(table, decodes)
    batch = part["batch_size"]
    terms = decode_terms(device, batch, batch * part["kv_cache_size"], 32 * batch**0, 4 * batch**0, 128)
    predicted = terms @ np.array(msgspec.structs.astuple(device.efficiency.decode))
    report.add(
        device.name,
        name,
        "decode attention",
        part["time_stats.attn_decode.median"] / 1e3,
        predicted,
        None,
        "all",
    )
    part = take(table, ~decodes)
    chunk, context, seconds = (
        part["prefill_chunk_size"],
        part["kv_cache_size"],
        part["time_stats.attn_prefill.median"] / 1e3,
    )
    prefill = device.efficiency.prefill
    constants = [prefill.launch_s, 1 / prefill.compute, 1 / prefill.memory, prefill.head_s, prefill.token_s]
    one = np.ones_like(chunk)
    predicted = prefill_terms(device, one, chunk, context, 32 * one, 4 * one, 128) @ np.array(constants)
    report.add(device.name, name, "chunked prefill", seconds, predicted, None, "all")
    # That kernel is slow within a chunk. What 512 or more tokens of context add to a chunk is a check of its own.
    first = {
        float(c): np.flatnonzero((chunk == c) & (context == context[chunk == c].min()))[0]
        for c in np.unique(chunk)
    }
    alone = np.array([first[float(c)] for c in chunk])
    more = (context - context[alone] >= 512) & (seconds > seconds[alone])
    added, expected = (seconds - seconds[alone])[more], (predicted - predicted[alone])[more]
    report.add(device.name, name, "  what context adds", added, expected, None, "all")


def check_all_reduce(folder: Path, device: Hardware, report: Report) -> None:
    """Collectives as vidur and apex measured them (NCCL, which is slower for small messages); no part of any fit."""
    short = DEVICES[device.name][0]
    found: list[tuple[str, Array, Array, Array]] = []
    if short != "h200":
        table = load(folder / f"vidur_{short}_dgx_all_reduce.csv.gz")
        inside = table["num_workers"] == table["devices_per_node"]
        table = take(table, inside & (table["num_workers"] <= 8))
        nbytes, seconds = table["size"], table["time_stats.all_reduce.median"] / 1e3
        found.append((f"vidur_{short}_dgx_all_reduce.csv.gz", table["num_workers"], nbytes, seconds))
    if short != "a100":
        name = f"apex_{'H100-SXM-80GB' if short == 'h100' else 'H200-SXM-141GB'}_all_reduce.csv"
        table = load(folder / name)
        table = take(table, (table["num_nodes"] == 1) & (table["dtype"] == "half") & (table["size(kb)"] > 0))
        found.append((name, table["num_gpus_per_node"], table["size(kb)"] * 1024, table["time(us)"] / 1e6))
    for name, devices, nbytes, seconds in found:
        predicted = [device.all_reduce(int(d)).seconds(int(n)) for d, n in zip(devices, nbytes, strict=True)]
        report.add(device.name, name, "all-reduce (NCCL)", seconds, np.array(predicted), None, "all")


def opt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """config.json of an OPT model."""
    return {
        "architectures": ["OPTForCausalLM"],
        "hidden_size": hidden,
        "ffn_dim": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 2048,
        "vocab_size": 50272,
    }


OPTS = {"facebook/opt-13b": opt(5120, 40, 40), "facebook/opt-66b": opt(9216, 64, 72)}


def check_steps(folder: Path, device: Hardware, report: Report) -> None:
    """Whole steps: the constants that DistServe fitted to its own engine and to vLLM (2023) on A100."""
    for engine in ("distserve", "vllm"):
        name = f"profiler-a100-80g.{engine}.json"
        fitted = json.loads((folder / name).read_text())
        for model, config in OPTS.items():
            prefills: list[tuple[float, float]] = []
            decodes: list[tuple[float, float]] = []
            for split, constants in fitted[model].items():
                cost = Roofline(shape_of(config), device, int(split))
                a, b, c = constants["prefill"]
                prefills += [
                    (a + b * tokens + c * tokens**2, cost.step_ps(((tokens, 0),), 0, 0) / 1e9)
                    for tokens in (128, 256, 512, 1024, 2048)
                ]
                for rows in (1, 8, 32, 64, 128):
                    small = rows < constants["decoding_large_small_bs_threshold"]
                    a, b, c = constants["decoding_smallbs" if small else "decoding_largebs"]
                    for length in (256, 1024):
                        context = rows * length
                        decodes.append((a + b * context + c * rows, cost.step_ps((), rows, context) / 1e9))
            for what, pairs in (("prefill", prefills), ("decode", decodes)):
                theirs, ours = np.array(pairs).T
                report.add(
                    device.name, name, f"{model.split('/')[1]} {what} steps", theirs, ours, None, "all"
                )


def fit(folder: Path, name: str, report: Report) -> Hardware:
    """The device with constants fitted to the tables in `folder`."""
    device = catalogue.hardware(name)
    short, version = DEVICES[name]
    products = f"aic_{short}_sxm_gemm_v{version}.csv.gz"
    table = load(folder / products)
    gemms: dict[str, dict[str, float]] = {}
    for arithmetic in ("bf16", "fp8") if short != "a100" else ("bf16",):
        constants, seconds, predicted, held = fit_gemm(table, device, arithmetic)
        gemms[arithmetic] = constants
        report.add(
            name, products, f"products, {arithmetic}", seconds, predicted, held, "every fifth weight shape"
        )
    models = ("Llama-2-70b-hf", "Meta-Llama-3-8B") if short == "a100" else ("Llama-2-70b-hf",)
    constants: dict[str, Any] = {"gemm": gemms, **fit_attention(folder, device, report)}
    constants["all_reduce"] = fit_all_reduce(folder, device, report)
    # vidur has no H200: its processors are an H100's, so what passes over them is taken from there
    other = catalogue.hardware("h100-sxm") if short == "h200" else device
    constants["elementwise"] = fit_elementwise(folder, other, models, report if short != "h200" else Report())
    efficiency = msgspec.convert(_rounded(constants), Efficiency)
    device = msgspec.structs.replace(device, efficiency=efficiency)
    if short != "h200":
        check_linear(folder, device, models, report)
    check_all_reduce(folder, device, report)
    if short == "a100":
        check_attention(folder, device, report)
        check_steps(folder, device, report)
    return device


def _rounded(tree: Any) -> Any:
    """Four digits of every number."""
    if isinstance(tree, dict):
        return {key: _rounded(value) for key, value in tree.items()}
    return float(f"{tree:.4g}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Fit the hardware catalogue's constants to measured tables.")
    parser.add_argument("--data", type=Path, default=os.environ.get("HEADRACE_DATA"), help="holds profiles/")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    if options.data is None or not (folder := options.data / "profiles").is_dir():
        print("fit_cost: no tables; give --data DIR (or HEADRACE_DATA) with profiles/ in it", file=sys.stderr)
        return 2
    report = Report()
    devices = {name: fit(folder, name, report) for name in DEVICES}
    report.show()
    constants = {name: msgspec.to_builtins(device.efficiency) for name, device in devices.items()}
    print(yaml.safe_dump(constants, sort_keys=False))
    command = "python tools/fit_cost.py --data DIR"
    result = {
        "name": "cost_fit",
        "command": command,
        "figures": {"tables": report.rows, "constants": constants},
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
