"""How blocks get into a peer's pool. One file a transport: `Transport(site)`, as `ports.Transport`. Chosen by its file's name."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from headrace import registry
from headrace.ports import Transport
from headrace.types.errors import ConfigError
from headrace.types.events import Write
from headrace.types.ids import Address, Slot, WriteId

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Site:
    """What a transport needs of the worker that it serves."""

    source: list[memoryview]
    """The worker's pool, per group."""
    target: Callable[[Address], list[memoryview] | None]
    """A peer's pool, per group; None if the peer is lost."""
    block_bytes: tuple[int, ...]
    """Per group."""
    layers: tuple[int, ...]
    """Per group, how many."""
    landed: Callable[[Address, Slot, int], None]
    """Tell the peer that a write with this slot and weight is in its memory. On the loop's thread, before `written`."""
    written: Callable[[WriteId, bool], None]
    """Tell the core. On the loop's thread."""
    call: Callable[..., Any]
    """`call(function, *arguments)`: run it on the loop's thread; from any thread."""

    def copy(self, write: Write, target: list[memoryview]) -> bool:
        """Carry a write out; other threads run meanwhile. False for blocks that are not there: that is said in the log."""
        size, all_layers = self.block_bytes[write.group], self.layers[write.group]
        part = size // all_layers
        layers = slice(write.layer * part, (write.layer + (write.layers or all_layers)) * part)
        try:
            into = _span(target[write.group], write.target_first * size, write.count * size)
            out_of = _span(self.source[write.group], write.source_first * size, write.count * size)
            np.copyto(into.reshape(-1, size)[:, layers], out_of.reshape(-1, size)[:, layers])
        except ValueError:
            log.exception("%s cannot be carried out", write)
            return False
        return True


def check_transport(name: str) -> None:
    """Raises ConfigError naming what exists."""
    names = registry.names("live.transports")
    if name not in names:
        raise ConfigError(f"no live.transports {name!r}; there are: {', '.join(names)}")


def open_transport(name: str, site: Site) -> Transport:
    """Raises ConfigError."""
    check_transport(name)
    return import_module(f"headrace.live.transports.{name}").Transport(site)


def _span(memory: memoryview, first: int, nbytes: int) -> np.ndarray:
    if first < 0 or first + nbytes > len(memory):
        raise ValueError(f"bytes {first}..{first + nbytes} of a pool of {len(memory)}")
    return np.frombuffer(memory, np.uint8, nbytes, first)
