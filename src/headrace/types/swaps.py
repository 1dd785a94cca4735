"""Copies between a pool and the host memory of one instance: what its core asks for, and what came of it."""

from typing import NewType

import msgspec

from headrace.types.ids import SequenceKey

SwapId = NewType("SwapId", int)


class SwapRun(msgspec.Struct, frozen=True, array_like=True):
    """`count` whole blocks of one group (all its layers): `device ..` in the instance's pool, `host ..` in its host area."""

    group: int
    device: int
    host: int
    count: int


class SwapOut(msgspec.Struct, frozen=True, tag=True):
    """Copy blocks of a sequence's table to the host area, one copy a run. Answered by one `Swapped`.

    Nothing writes the blocks meanwhile, and nobody else gets them.
    """

    swap: SwapId
    key: SequenceKey
    runs: tuple[SwapRun, ...]


class SwapIn(msgspec.Struct, frozen=True, tag=True):
    """The way back, into blocks that no plan names before `Swapped`."""

    swap: SwapId
    key: SequenceKey
    runs: tuple[SwapRun, ...]


class Swapped(msgspec.Struct, frozen=True, tag=True):
    """All copies of this swap have ended. Not `ok`: what is in the blocks that were to be written is unknown."""

    swap: SwapId
    ok: bool
