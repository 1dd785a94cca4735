"""The weights of a running service change: what the router, the instances and their shells say to each other about it.

A push gives the service a new version of its weights, counted from 0 (what it was started with). See `nodes.switching`.
"""

from enum import Enum

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
