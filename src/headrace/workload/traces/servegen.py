"""ServeGen's samples (alibaba/ServeGen), and any CSV of its columns: timestamp_s, input_tokens, output_tokens. No prefixes, no sessions."""

import msgspec

from headrace.types.trace import Trace
from headrace.workload.reading import ReadReport, csv_columns, finish, floats

COLUMNS = ("timestamp_s", "input_tokens", "output_tokens")


class Config(msgspec.Struct, frozen=True):
    pass


def recognises(first_line: str) -> bool:
    return set(COLUMNS) <= {cell.strip() for cell in first_line.split(",")}


def parse(text: str, name: str, report: ReadReport, config: Config, sort: bool) -> Trace:
    rows, cells = csv_columns(text, report, COLUMNS)
    arrival = rows.instants(floats(cells["timestamp_s"]), 1_000_000_000, "timestamp_s")
    prompt, output = (rows.tokens(floats(cells[column]), column) for column in COLUMNS[1:])
    return finish(name, rows, arrival, prompt, output, sort=sort)
