"""What a scheduler wants of others while it plans."""

from dataclasses import dataclass, field

from headrace.engine.sequence import Sequence


@dataclass(slots=True)
class Wishes:
    """What the scheduler wants said to others, collected while it plans."""

    match: list[Sequence] = field(default_factory=list[Sequence])
    """Look up and lock the prefix."""
    unlock: list[Sequence] = field(default_factory=list[Sequence])
    """Give the prefix back."""
    receive: list[Sequence] = field(default_factory=list[Sequence])
    """Blocks are reserved: ask the source for the KV."""
    load: list[Sequence] = field(default_factory=list[Sequence])
    """Blocks are reserved: bring the KV back from host memory."""

    def clear(self) -> None:
        for wish in (self.match, self.unlock, self.receive, self.load):
            wish.clear()
