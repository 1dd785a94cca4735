"""Azure LLM inference traces, 2023 and 2024 (Azure/AzurePublicDataset; Splitwise, ISCA'24): TIMESTAMP, ContextTokens, GeneratedTokens.

Times are instants of a calendar. No prefixes, no sessions.
"""

import msgspec
import numpy as np

from headrace.types.trace import Ints, Trace
from headrace.workload.reading import ReadReport, Rows, csv_columns, finish, floats

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
NOT_A_TIME = np.iinfo(np.int64).min


class Config(msgspec.Struct, frozen=True):
    pass


def recognises(first_line: str) -> bool:
    return set(COLUMNS) <= {cell.strip() for cell in first_line.split(",")}


def parse(text: str, name: str, report: ReadReport, config: Config, sort: bool) -> Trace:
    rows, cells = csv_columns(text, report, COLUMNS)
    arrival = _instants(cells["TIMESTAMP"], rows)
    prompt, output = (rows.tokens(floats(cells[column]), column) for column in COLUMNS[1:])
    return finish(name, rows, arrival, prompt, output, sort=sort, negative=True)


def _instants(cells: list[str], rows: Rows) -> Ints:
    """Nanoseconds since 1970."""
    try:
        zone_free = [cell.removesuffix("Z").removesuffix("+00:00") for cell in cells]
        found = np.array(zone_free, dtype="datetime64[ns]")
    except ValueError:
        found = np.array([_instant(cell) for cell in zone_free], dtype="datetime64[ns]")
    instants = found.astype(np.int64)
    rows.reject(instants == NOT_A_TIME, "TIMESTAMP is not a date and time")
    return np.where(instants == NOT_A_TIME, 0, instants)


def _instant(cell: str) -> np.datetime64:
    try:
        return np.datetime64(cell, "ns")
    except ValueError:
        return np.datetime64("NaT")
