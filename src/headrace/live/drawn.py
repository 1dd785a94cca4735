"""What a worker has drawn: the ids behind the counts that its core reports, kept until the sequence is closed."""

from dataclasses import dataclass, field

from headrace.types.ids import SequenceKey
from headrace.types.messages import Tail, Tokens
from headrace.types.payload import Emission


@dataclass(slots=True)
class Opened:
    history: int
    """Tokens emitted before this attempt."""
    token_ids: list[int] = field(default_factory=list[int])
    """From index `history` on: drawn elsewhere before the sequence came here, then drawn here."""
    unsent: dict[int, Emission] = field(default_factory=dict[int, Emission])
    """Not yet said to the router, by first index."""


class Drawn:
    """Sequences that are open on this worker."""

    def __init__(self) -> None:
        self._opened: dict[SequenceKey, Opened] = {}

    def __contains__(self, key: SequenceKey) -> bool:
        return key in self._opened

    def open(self, key: SequenceKey, history: int) -> None:
        self._opened[key] = Opened(history)

    def close(self, key: SequenceKey) -> None:
        self._opened.pop(key, None)

    def received(self, emissions: tuple[Emission, ...]) -> None:
        """What came with the sequence, from where it was before. The router has it from there."""
        for emission in emissions:
            opened = self._opened[emission.key]
            assert emission.first == opened.history + len(opened.token_ids)
            opened.token_ids += emission.token_ids

    def add(self, emissions: tuple[Emission, ...]) -> None:
        """What a step drew. After preemption the same tokens come again."""
        for emission in emissions:
            opened = self._opened.get(emission.key)
            if opened is not None:
                at = emission.first - opened.history
                opened.token_ids[at : at + len(emission.token_ids)] = emission.token_ids
                opened.unsent[emission.first] = emission

    def for_tokens(self, message: Tokens) -> tuple[Emission, ...]:
        return tuple(self._joined(r.key, r.first, r.count) for r in message.runs if r.count)

    def _joined(self, key: SequenceKey, first: int, count: int) -> Emission:
        """What several steps drew, as one."""
        unsent = self._opened[key].unsent
        pieces: list[Emission] = []
        at = first
        while at < first + count:
            pieces.append(unsent.pop(at))
            at += len(pieces[-1].token_ids)
        if len(pieces) == 1:
            return pieces[0]
        ids = tuple(token for piece in pieces for token in piece.token_ids)
        entries = tuple(entry for piece in pieces for entry in piece.logprobs)
        oldest, newest = zip(*(piece.weights for piece in pieces), strict=True)
        return Emission(key, first, ids, entries, (min(oldest), max(newest)))

    def for_tail(self, message: Tail) -> tuple[Emission, ...]:
        opened = self._opened[message.key]
        at = len(opened.token_ids) - message.emitted
        return (Emission(message.key, opened.history + at, tuple(opened.token_ids[at:])),)
