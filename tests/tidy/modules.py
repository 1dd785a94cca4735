"""Rules over all files together: every folder is a package, and every module has a user."""

import ast
from collections.abc import Iterator
from pathlib import PurePosixPath

from tests.tidy.source import Finding, Source

ENTRY_POINTS = ("src/headrace/cli/main.py", "__main__.py", "__init__.py")


def missing_packages(sources: list[Source]) -> Iterator[Finding]:
    """Without its `__init__.py`, import-linter would not see a folder."""
    modules = {source.path for source in sources if source.under("src") and source.path.endswith(".py")}
    for folder in sorted({PurePosixPath(path).parent for path in modules}):
        if f"{folder}/__init__.py" not in modules:
            yield Finding(str(folder), 1, "has no `__init__.py`")


def dead_modules(sources: list[Source]) -> Iterator[Finding]:
    """A module that only tests import, or nobody, is not part of the product."""
    python = [source for source in sources if source.path.endswith(".py")]
    used = {
        name
        for source in python
        if not source.under("tests")
        for name in _mentioned(source)
        if name != source.module
    }
    for source in python:
        if source.under("src") and not (
            source.seam or source.path.endswith(ENTRY_POINTS) or source.module in used
        ):
            yield Finding(source.path, 1, "nobody imports it: wire it in, or delete it")


def _mentioned(source: Source) -> Iterator[str]:
    """Dotted names that a file imports, or holds as text for a later import."""
    for node in ast.walk(source.tree):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module, names, 0):
                yield str(module)
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Constant(str(text)) if text.startswith("headrace."):
                yield text.partition(":")[0]
            case _:
                pass
