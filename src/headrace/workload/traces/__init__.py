"""Traces from files. A format is one module here, and the module's name is the format's: `headrace trace describe --format azure`.

Such a module has a frozen `Config`, `recognises(first_line) -> bool`, and `parse(text, name, report, config, sort) -> Trace`.
"""

import os
from importlib import import_module
from pathlib import Path
from typing import Any

from headrace import registry
from headrace.types.errors import ConfigError
from headrace.types.trace import Trace
from headrace.workload.reading import ReadReport, text_of
from headrace.workload.settings import settings

BEGIN = 16_384
"""Characters of a file by which its format is found."""

__all__ = ["ReadReport", "find", "names", "read"]


def names() -> list[str]:
    """Formats, sorted."""
    return registry.names("workload.traces")


def read(
    path: Path | str, format: str | None = None, *, sort: bool = False, **config: Any
) -> tuple[Trace, ReadReport]:
    """The trace in a file, and what became of its rows. The first arrival is at 0.

    `format`: one of `names()`; found from the first line if not given. `sort`: put rows in order of time in place of refusing them.
    `config`: the format's own settings. Raises ConfigError for a file that cannot be read, has no good row, or times that go back.
    """
    path = Path(path)
    text = text_of(path)
    chosen = format if format is not None else detect(text[:BEGIN].lstrip().partition("\n")[0], str(path))
    if chosen not in names():
        raise ConfigError(f"no trace format {chosen!r}; there are: {', '.join(names())}")
    module = import_module(f"headrace.workload.traces.{chosen}")
    report = ReadReport(str(path), chosen)
    name = path.name.removesuffix(".gz")
    return module.parse(text, name, report, settings(f"format {chosen}", module.Config, config), sort), report


def detect(first_line: str, path: str) -> str:
    """The one format that a file begins like. Raises ConfigError if none."""
    for name in names():
        if import_module(f"headrace.workload.traces.{name}").recognises(first_line):
            return name
    shown = first_line[:80] + ("..." if len(first_line) > 80 else "")
    raise ConfigError(
        f"{path}: begins like no known trace ({shown!r}); give --format, one of: {', '.join(names())}"
    )


def find(name: Path | str, data_dir: Path | None = None) -> Path:
    """The file that a trace's name means: a path that exists, or one below the data folder.

    `data_dir`: that folder, as `--data` says; None: what HEADRACE_DATA says, if it says anything.
    Raises ConfigError if neither is a file.
    """
    path = Path(name)
    if path.is_file():
        return path
    if data_dir is None and os.environ.get("HEADRACE_DATA"):
        data_dir = Path(os.environ["HEADRACE_DATA"])
    if data_dir is not None and (data_dir / path).is_file():
        return data_dir / path
    where = f"not in {data_dir} either" if data_dir is not None else "and no data folder is given"
    raise ConfigError(
        f"no trace {name}, {where}; `--data DIR` or HEADRACE_DATA says where traces lie, and tools/fetch_data.py fetches public ones"
    )
