"""What the tidy rules look at: the repository's files, parsed once, and the layer of each."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

FOLDERS = ("src", "tests", "benchmarks", "tools", "docs", ".ci")
SUFFIXES = frozenset(
    {"", ".cpp", ".cu", ".h", ".json", ".md", ".py", ".pyi", ".sh", ".toml", ".txt", ".yaml"}
)
GENERATED = frozenset({".git", "__pycache__", "assets"})

CORES = ("types", "ports.py", "kv", "engine", "cluster", "transfer", "cost", "nodes")
"""L0 to L3: what decides. Everything else under src/headrace is a shell, or wiring."""

SEAMS = (
    "cluster/placement",
    "cluster/rebalance",
    "cluster/roles",
    "cluster/scaling",
    "compute/models",
    "compute/ops",
    "compute/quant/checkpoints",
    "engine/admission",
    "engine/batching",
    "engine/ordering",
    "engine/preemption",
    "kv/evict",
    "live/transports",
    "workload/generators",
    "workload/traces",
)
"""Folders whose files are found by their names, so that nobody needs to import them."""


class Finding(NamedTuple):
    """One place that breaks a rule."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


@dataclass(frozen=True)
class Source:
    """One text file, by its path from the repository's root."""

    path: str
    text: str
    tree: ast.Module = field(init=False, repr=False)
    """Empty unless it is Python."""

    def __post_init__(self) -> None:
        python = self.path.endswith(".py")
        object.__setattr__(self, "tree", ast.parse(self.text if python else "", self.path))

    def under(self, *places: str) -> bool:
        """Is it one of these files, or in one of these folders?"""
        return any(self.path == place or self.path.startswith(f"{place}/") for place in places)

    @property
    def core(self) -> bool:
        return self.under(*(f"src/headrace/{name}" for name in CORES))

    @property
    def seam(self) -> bool:
        """Is it found by its name in a seam's folder (which the folder's `__init__` is not)?"""
        return self.under(*(f"src/headrace/{name}" for name in SEAMS)) and not self.path.endswith(
            "__init__.py"
        )

    @property
    def module(self) -> str:
        """Dotted name of a file under src; a package's is that of its folder."""
        return self.path.removeprefix("src/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    def at(self, node: ast.AST, message: str) -> Finding:
        return Finding(self.path, getattr(node, "lineno", 1), message)


def sources(root: Path = ROOT) -> Iterator[Source]:
    """Every text file that people write, in order of path."""
    paths = [path for path in root.iterdir() if path.is_file()]
    for folder in FOLDERS:
        paths += (path for path in root.joinpath(folder).rglob("*") if path.is_file())
    for path in sorted(paths):
        relative = path.relative_to(root)
        if path.suffix in SUFFIXES and not GENERATED.intersection(relative.parts):
            yield Source(relative.as_posix(), path.read_text(encoding="utf-8"))
