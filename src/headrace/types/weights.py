"""The weights of a running service change: what the router, the instances and their shells say to each other about it.

A push gives the service a new version of its weights, counted from 0 (what it was started with). See `nodes.switching`.
"""

from enum import Enum
from typing import Any

import msgspec


class Running(Enum):
    """What becomes of sequences that run when the version changes."""

    KEEP = "keep"
    """They keep their KV and go on under the new weights; their answers name both versions."""
    RECOMPUTE = "recompute"
    """All KV of theirs is computed again by the new weights; what their clients were sent stays."""


# Messages


class Switch(msgspec.Struct, frozen=True, tag=True):
    """Router to instance: from the next plan on compute with these weights."""

    version: int


class Switched(msgspec.Struct, frozen=True, tag=True):
    """Instance to router: all that it was given from now on is computed with these weights."""

    version: int


# Events


class SwitchAsked(msgspec.Struct, frozen=True, tag=True):
    """To the router: every instance has these weights at hand; change to them."""

    version: int
    """Higher than any before."""
    running: Running
    hold_ns: int
    """So long new starts may wait for what is on its way between instances; what is on its way then is computed again."""


class SwitchDropped(msgspec.Struct, frozen=True, tag=True):
    """To the router: do not change after all. Without effect once it has."""

    version: int


class WeightsReady(msgspec.Struct, frozen=True, tag=True):
    """To an instance: its executor has carried `UseWeights` out."""

    version: int


# Commands


class UseWeights(msgspec.Struct, frozen=True, tag=True):
    """Of an instance: plans given from now on are computed with these weights. Answered by `WeightsReady`."""

    version: int


class Committed(msgspec.Struct, frozen=True, tag=True):
    """Of the router: the service has this version now. There is no way back."""

    version: int
    kept: int
    """Choices that go on with the KV they have,"""
    recomputed: int
    """and those whose KV is computed again."""
    held_ns: int
    """How long new starts have waited."""


class Completed(msgspec.Struct, frozen=True, tag=True):
    """Of the router: every instance has said that it computes with this version, or has ended."""

    version: int


# A push, from the trainer to the workers


class Tensor(msgspec.Struct, frozen=True, array_like=True):
    """One tensor of a checkpoint, by the name it has there."""

    name: str
    shape: tuple[int, ...]


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a tensor lies in staged memory: `nbytes` from `offset` on, row-major. Its slot is its index."""

    name: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Staged(msgspec.Struct, frozen=True):
    """All tensors of one version, in one memory file of a host."""

    version: int
    path: str
    """By which processes of the service's user can open it."""
    nbytes: int
    dtype: str
    """Of all tensors, by the name that `KVSpec` uses."""
    places: tuple[Place, ...]
    fingerprint: str
    """Of names, shapes and content; empty while they arrive."""


class Ticket(msgspec.Struct, frozen=True):
    """What a trainer needs to write a push: the static plan, and the memory."""

    push: int
    version: int
    dtype: str
    places: tuple[Place, ...]
    target: dict[str, Any]
    """Descriptor of the staged memory, for the trainer's transfer engine."""


class Pushed(msgspec.Struct, frozen=True):
    """How a push went."""

    version: int
    fingerprint: str
    kept: int
    """Choices that went on with the KV they had,"""
    recomputed: int
    """and those whose KV is computed again."""
    held_ms: float
    """How long new starts waited."""
    switched_ms: float
    """From then until every worker computed with the new weights."""


class WeightsStatus(msgspec.Struct, frozen=True):
    """What the service computes with."""

    version: int
    fingerprint: str
    dtype: str
    tensors: tuple[Tensor, ...]
    """That a push must bring: those, in any order, and no others."""
