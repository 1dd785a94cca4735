"""Copies within one process's address space: the native routine where it was built, else numpy."""

import os
from importlib import import_module
from typing import Any

from headrace.live.transfer.pieces import Pieces
from headrace.live.transfer.regions import Region

STREAMING_MIN = 4096
"""Bytes of a piece from which stores bypass the caches: whoever reads them does so from another core, and later."""


def _load() -> Any:
    if os.environ.get("HEADRACE_NATIVE") == "0":
        return None
    try:
        return import_module("headrace.live._native")
    except ModuleNotFoundError:
        return None


native: Any = _load()
"""The extension module, or None where it was not built (no C++ compiler) or is hidden."""


def copy(source: Region, target: Region, pieces: Pieces) -> None:
    """Pieces that have been checked against both; other threads run meanwhile."""
    if native is not None:
        native.copy(source.address, target.address, pieces.ctypes.data, len(pieces), STREAMING_MIN)
        return
    into, out_of = target.bytes, source.bytes
    for start, to, nbytes in pieces.tolist():
        into[to : to + nbytes] = out_of[start : start + nbytes]
