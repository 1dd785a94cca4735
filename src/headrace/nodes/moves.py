"""The router's part in live migrations. See `nodes.migrating` for the instances' part.

A choice has one owner, `Choice.decode`. While it is on the way to another instance, that one is `Choice.moving`, and is started like any
decode instance, with the owner as its source. It ends in one of these:
 - `Moved` from the owner: the other one is the owner now. If that has given up or died meanwhile, nobody has it: a new attempt.
 - `Stayed` from the owner, or it ends there: the other one is cancelled.
 - the other one gives up, dies, or the router does not want it there: the owner is told to `Stay`.
"""

from collections.abc import Callable

from headrace.nodes.choices import Choice, Stage
from headrace.nodes.fleet import Fleet
from headrace.types.ids import Address
from headrace.types.messages import AnyMessage, Cancel, Offer, Stay


class Moves:
    """`count` adds to a counter."""

    def __init__(
        self, fleet: Fleet, send: Callable[[Address, AnyMessage], None], count: Callable[[str], None]
    ) -> None:
        self._fleet = fleet
        self._send = send
        self._count = count
        self.bars: Callable[[Choice], bool] = lambda choice: False
        """May it not migrate, for a reason of others?"""

    def begins(self, choice: Choice, source: Address, offer: Offer) -> bool:
        """May it go there? Then the caller starts it there. An instance sees an attempt once, and its first token is here."""
        target = offer.target
        rests = choice.stage is Stage.DECODE and choice.decode == source and choice.moving is None
        if self.bars(choice):
            rests = False
        if rests and choice.next > choice.history and target not in choice.seen and self._fleet.takes(target):
            choice.moving = target
            return True
        self._send(source, Stay(choice.key, target))
        return False

    def moved(self, choice: Choice, target: Address) -> bool:
        """The owner has let go. False: nobody has it now."""
        if choice.moving != target:
            return False
        source, choice.decode, choice.moving = choice.decode, target, None
        assert source is not None
        self.release(choice, source)
        self._count("migrations")
        return True

    def ends(self, choice: Choice, target: Address) -> None:
        """It does not go there: whoever is there is to know, the owner is not."""
        if choice.moving == target:
            choice.moving = None
            if target in choice.assigned and target in self._fleet:
                self._send(target, Cancel(choice.key))
            self.release(choice, target)
            self._count("migrations_aborted")

    def refused(self, choice: Choice, target: Address) -> None:
        """It has given up: the owner keeps it."""
        assert choice.decode is not None
        choice.moving = None
        self.release(choice, target)
        self._send(choice.decode, Stay(choice.key, target))
        self._count("migrations_aborted")

    def release(self, choice: Choice, instance: Address) -> None:
        """The attempt has no work there any more."""
        tokens = choice.assigned.pop(instance, None)
        if tokens is not None:
            self._fleet.assign(instance, -1, -tokens)
