"""Mooncake's traces (kvcache-ai/Mooncake, FAST'25) and those of its form (LLMServingSim): JSONL with `hash_ids` of the prompt's blocks.

Times are milliseconds. Ids name blocks of 512 tokens in Mooncake, 16 in LLMServingSim; `block_size` 0 finds the size from the lengths.
Only full blocks can be shared, so the id of a partly filled last block is left out. `pad` keeps it and rounds each prompt up to whole
blocks: so the publisher counts (ideal hit rate 36.6% of the conversation trace; 38.2% of full blocks).
"""

from itertools import chain
from typing import Annotated

import msgspec
import numpy as np

from headrace.types.errors import ConfigError
from headrace.types.trace import Ints, Trace
from headrace.workload.chains import earlier_turns, rechained
from headrace.workload.lines import decode
from headrace.workload.reading import ReadReport, finish

Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
PREFERRED = (512, 16, 32, 64, 128, 256, 1024, 8, 4, 2048, 2, 1)
"""Block sizes, where lengths allow several."""


class Config(msgspec.Struct, frozen=True):
    block_size: int = 0
    """Tokens; 0: found from the lengths."""
    pad: bool = False
    """Round prompts up to whole blocks, and keep the ids of partly filled ones."""


class Row(msgspec.Struct):
    timestamp: float = float("nan")
    input_length: float = float("nan")
    output_length: float = float("nan")
    hash_ids: list[Id] = []


def recognises(first_line: str) -> bool:
    return first_line.startswith("{") and '"input_length"' in first_line and '"timestamp"' in first_line


def parse(text: str, name: str, report: ReadReport, config: Config, sort: bool) -> Trace:
    rows, found = decode(text, Row, Row(), report)
    arrival = rows.instants(_column(found, "timestamp"), 1_000_000, "timestamp")
    prompt = rows.tokens(_column(found, "input_length"), "input_length")
    output = rows.tokens(_column(found, "output_length"), "output_length")
    counts = np.fromiter((len(row.hash_ids) for row in found), dtype=np.int64, count=len(found))
    size = config.block_size or _block_size(prompt[rows.good], counts[rows.good], report)
    if size:
        rows.reject(counts < prompt // size, f"it has fewer hash_ids than full blocks of {size} tokens")
        rows.reject(counts > -(-prompt // size), f"it has more hash_ids than blocks of {size} tokens")
    if config.pad and size:
        prompt = np.where(counts > 0, counts * size, prompt)
        report.notes.append(f"prompts are rounded up to whole blocks of {size} tokens")
    kept = [
        row.hash_ids[: length // size] if size else []
        for row, length in zip(found, prompt.tolist(), strict=True)
    ]
    starts = np.concatenate(([0], np.cumsum([len(ids) for ids in kept]))).astype(np.int64)
    ids = np.fromiter(chain.from_iterable(kept), dtype=np.int64, count=int(starts[-1]))
    columns = {"block_size": size, "hash_ids": ids, "hash_starts": starts}
    trace = finish(name, rows, arrival, prompt, output, sort=sort, **columns)
    trace, renamed = rechained(trace)
    if renamed:
        report.notes.append(
            f"{renamed:,} hash ids stood after different blocks; they were told apart by what is before them"
        )
    return earlier_turns(trace)


def _column(found: list[Row], name: str) -> np.ndarray:
    return np.fromiter((getattr(row, name) for row in found), dtype=np.float64, count=len(found))


def _block_size(prompt: Ints, counts: Ints, report: ReadReport) -> int:
    """The size with which every row's number of ids is that of its full blocks, or one more. 0: the file has no ids."""
    prompt, counts = prompt[counts > 0], counts[counts > 0]
    if not len(prompt):
        return 0
    for size in PREFERRED:
        misfits = (counts < prompt // size) | (counts > -(-prompt // size))
        if misfits.mean() < 0.01:  # a broken row must not hide the size
            report.notes.append(f"blocks of {size} tokens, found from the lengths")
            return size
    raise ConfigError(f"{report.path}: lengths and hash_ids fit no usual block size; give block_size")
