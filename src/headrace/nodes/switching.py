"""The router's part in a change of weights: one moment at which all of the service has the new version.

Life cycle of a switch:
 1. `SwitchAsked`: every instance has the new weights at hand. Nothing new is started (requests queue, streams go on), nothing migrates.
 2. HOLD: with `Running.KEEP`, until what was started has drawn its first token and rests on one instance, or `hold_ns` have passed.
 3. COMMIT, in one instant: what does not rest (with `Running.RECOMPUTE`: all that runs) is cancelled and queued again, with what its client
    was sent as history; then every instance is told to `Switch`; then new starts go on, under the new version.
 4. COMPLETE: every instance has said `Switched`, or has ended. One that joins with another version is told to `Switch` when it joins.
Before 3 the switch can be dropped, and all goes on as it was.

Why no KV of one version serves another: messages of a pair come in order, so an instance hears `Cancel` of whatever is given up, then
`Switch`, then the first `Start` of the new version. The version is part of the hash chain's root (`types.hashing`), so a start finds
nothing that was cached before: hashes of an older version are forgotten here, and the instance names its blocks anew. What is kept stays
where it is, under its old root, and does not migrate.
"""

from collections.abc import Callable, Mapping

from headrace.nodes.choices import Choice, Stage
from headrace.nodes.fleet import Fleet
from headrace.types.events import Command
from headrace.types.ids import Address, RequestId
from headrace.types.messages import AnyMessage, InstanceInfo
from headrace.types.weights import (
    Committed,
    Completed,
    Running,
    Switch,
    SwitchAsked,
    SwitchDropped,
)

RUNNING = (Stage.PREFILL, Stage.BINDING, Stage.TRANSFER, Stage.DECODE)


class Switching:
    """`again` gives a choice's attempt up and queues it; `send` says something to an instance, `out` takes commands for the shell."""

    def __init__(
        self,
        fleet: Fleet,
        choices: Mapping[RequestId, list[Choice]],
        again: Callable[[Choice], None],
        send: Callable[[Address, AnyMessage], None],
        out: Callable[[Command], None],
    ) -> None:
        self.version = 0
        """Of what is started now."""
        self._fleet = fleet
        self._choices = choices
        self._again = again
        self._send = send
        self._out = out
        self._asked: SwitchAsked | None = None
        """The switch that is held for."""
        self._since_ns = 0
        self._behind: dict[Address, None] = {}
        """Instances that have not said `Switched` yet."""
        self._completed = True

    @property
    def holds(self) -> bool:
        """Nothing new is started now."""
        return self._asked is not None

    def bars(self, choice: Choice) -> bool:
        """It may not migrate."""
        return self.holds or choice.version != self.version

    def due_ns(self) -> int:
        """When it is held no longer; 0: it is not."""
        return 0 if self._asked is None else self._since_ns + self._asked.hold_ns

    def told(self, event: SwitchAsked | SwitchDropped, now_ns: int) -> None:
        match event:
            case SwitchAsked(version):
                assert version > self.version and self._asked is None
                self._asked = event
                self._since_ns = now_ns
            case SwitchDropped(version):
                if self._asked is not None and self._asked.version == version:
                    self._asked = None
                    self._fleet.touch()

    def joined(self, instance: Address, info: InstanceInfo) -> None:
        if info.version != self.version:
            self._behind[instance] = None
            self._send(instance, Switch(self.version))

    def switched(self, instance: Address, version: int) -> None:
        """It computes with this version, or (`lost`) not at all."""
        if version == self.version and instance in self._behind:
            del self._behind[instance]
            self._complete()

    def lost(self, instance: Address) -> None:
        self.switched(instance, self.version)

    def settle(self, now_ns: int) -> None:
        """Change, if it is time."""
        asked = self._asked
        if asked is None:
            return
        keep = asked.running is Running.KEEP
        running = [c for group in self._choices.values() for c in group if c.stage in RUNNING]
        restless = [c for c in running if not (keep and _rests(c))]
        if keep and restless and now_ns < self._since_ns + asked.hold_ns:
            return
        self._asked = None
        self.version, self._completed = asked.version, False
        for choice in restless:
            self._again(choice)
        self._behind = dict.fromkeys(self._fleet.addresses())
        for instance in self._behind:
            self._send(instance, Switch(self.version))
        self._fleet.touch()
        held_ns = now_ns - self._since_ns
        self._out(Committed(self.version, len(running) - len(restless), len(restless), held_ns))
        self._complete()

    def renew(self, choice: Choice) -> None:
        """It is about to be started: under this version, without hashes of another."""
        if choice.version != self.version:
            choice.renew(self.version)

    def _complete(self) -> None:
        if not (self._behind or self._completed):
            self._completed = True
            self._out(Completed(self.version))


def _rests(choice: Choice) -> bool:
    """It decodes on one instance, and nothing of it is on its way to another."""
    drew = choice.next > choice.history
    return choice.stage is Stage.DECODE and choice.joined and drew and choice.moving is None
