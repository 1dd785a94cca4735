"""Lines of JSON as rows: one object a line, decoded by type."""

from typing import TypeVar

import msgspec
import numpy as np

from headrace.workload.reading import ReadReport, Rows

T = TypeVar("T", bound=msgspec.Struct)


def decode(text: str, kind: type[T], absent: T, report: ReadReport) -> tuple[Rows, list[T]]:
    """One object a line that is not empty. A line that is none, or has a wrong field, is a bad row, and `absent` stands in its place."""
    decoder = msgspec.json.Decoder(kind)
    numbers: list[int] = []
    found: list[T] = []
    wrong: dict[str, list[int]] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if not line or line.isspace():
            continue
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            reason = str(error) if isinstance(error, msgspec.ValidationError) else "it is not JSON"
            wrong.setdefault(reason, []).append(len(found))
            found.append(absent)
        numbers.append(number)
    rows = Rows(np.array(numbers, dtype=np.int64), report)
    for reason, places in wrong.items():
        mask = np.zeros(len(found), dtype=bool)
        mask[places] = True
        rows.reject(mask, reason)
    return rows, found
