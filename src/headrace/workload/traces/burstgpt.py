"""BurstGPT (HPMLL/BurstGPT; KDD'25): Timestamp, Session ID, Elapsed time, Model, Request tokens, Response tokens, Total tokens, Log Type.

Older files have neither Session ID nor Elapsed time. Response tokens of 0 mean that the request failed: counted and left out, or kept
as requests that want one token. A request's category is its model and log type. Elapsed time and total tokens are not used.
"""

import msgspec
import numpy as np

from headrace.types.trace import Ints, Trace
from headrace.workload.reading import ReadReport, classes, csv_columns, finish, floats

COLUMNS = ("Timestamp", "Model", "Request tokens", "Response tokens", "Log Type")


class Config(msgspec.Struct, frozen=True):
    failed: bool = False
    """Keep failed requests, as such that want one token."""


def recognises(first_line: str) -> bool:
    return set(COLUMNS) <= {cell.strip() for cell in first_line.split(",")}


def parse(text: str, name: str, report: ReadReport, config: Config, sort: bool) -> Trace:
    rows, cells = csv_columns(text, report, COLUMNS)
    arrival = rows.instants(floats(cells["Timestamp"]), 1_000_000_000, "Timestamp")
    prompt = rows.tokens(floats(cells["Request tokens"]), "Request tokens")
    answers = floats(cells["Response tokens"])
    failed = answers == 0
    if config.failed:
        kept = int((failed & rows.good).sum())
        report.notes.append(f"{kept:,} failed requests are kept, with one token to come")
        answers = np.where(failed, 1.0, answers)
    else:
        rows.fail(failed)
    output = rows.tokens(answers, "Response tokens")
    kinds = [f"{model}, {kind}" for model, kind in zip(cells["Model"], cells["Log Type"], strict=True)]
    category, categories = classes(kinds)
    columns = {"category": category, "categories": categories}
    if "Session ID" in cells:
        columns["session"] = _sessions(cells["Session ID"])
    return finish(name, rows, arrival, prompt, output, sort=sort, **columns)


def _sessions(cells: list[str]) -> Ints:
    """Numbers from 0; -1 where the row is of no session."""
    numbers: dict[str, int] = {}
    return np.array(
        [numbers.setdefault(cell, len(numbers)) if cell.strip() else -1 for cell in cells], dtype=np.int64
    )
