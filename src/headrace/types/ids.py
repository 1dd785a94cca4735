"""Names of things. All are small, hashable and ordered, so that no core ever iterates in hash order."""

from typing import NewType

import msgspec

RequestId = NewType("RequestId", int)
"""A request as the router counts them; the API maps `X-Request-Id` to it."""

PoolId = NewType("PoolId", int)
Slot = NewType("Slot", int)
"""16-bit number of one expectation at a transfer's target."""

StepId = NewType("StepId", int)
WriteId = NewType("WriteId", int)

BlockHash = NewType("BlockHash", bytes)
"""16 bytes that name a block by everything before and in it (see `types.hashing`)."""


class Address(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One incarnation of one node: a restarted worker keeps its name and gets a higher epoch."""

    name: str
    epoch: int = 0

    def __str__(self) -> str:
        return f"{self.name}#{self.epoch}"


class SequenceKey(msgspec.Struct, frozen=True, array_like=True, order=True):
    """One attempt at one choice of one request. A retry is a new attempt, so a late message of an old one matches nothing."""

    request: RequestId
    choice: int = 0
    attempt: int = 0

    def __str__(self) -> str:
        return f"{self.request}.{self.choice}.{self.attempt}"
