"""Where pieces lie: the same for Headrace and for its peers, so that all move the same bytes from and to the same places."""

import random


def places(pieces: int, piece_bytes: int, *, target: bool) -> list[int]:
    """Offset of each piece within the memory of one side. Several pieces lie in every second slot, in a random order.

    So no two pieces touch, on neither side, and the order of one side says nothing of the other's.
    """
    if pieces == 1:
        return [0]
    slots = list(range(0, 2 * pieces, 2))
    random.Random(2 * pieces + target).shuffle(slots)
    return [slot * piece_bytes for slot in slots]


def memory_bytes(shapes: list[tuple[int, int]]) -> int:
    """What one side must have for all of these (pieces, bytes of a piece)."""
    return max(pieces * piece_bytes * (1 if pieces == 1 else 2) for pieces, piece_bytes in shapes)
