"""P/D-Serve's path (arXiv 2408.08147, block-free transfer): scattered blocks go through one send buffer, one write and one scatter.

Life cycle of a batch, which is many runs from this pool to one peer's:
 1. source: it takes a slot of the send buffer, and says to the target `Ask`: so many bytes, for these places. Without a free slot: runs.
 2. target: a slot of its staging memory is reserved and its arrival expected, then `Granted`; or `Full`, and the source sends runs.
    A source that has no answer in time sends runs, too, and gives back what is granted later.
 3. source: its copy thread gathers, then one write with one immediate goes to the staging slot.
 4. target: when that has arrived, its copy thread scatters; then the core is told of what landed, never before; then the source: `Ended`.
 5. source: the core is told that the writes are done.
A write that fails is followed by `Cancel`: the target answers `Ended` when it neither scatters nor will. A peer that is forgotten ends its
batches: on return no thread of ours copies for it. Slots are bounded on both sides and free again when their batch has ended.
Leaves out: P/D-Serve's choice of diverse network paths; gathering layer by layer.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from threading import Lock, Thread

import msgspec
import numpy as np

from headrace.live.pools import Pool
from headrace.live.settings import PoolLayout
from headrace.live.transfer import pieces as forms
from headrace.live.transfer.copying import copy
from headrace.live.transfer.counters import SLOTS, WEIGHT_MAX, immediate
from headrace.live.transfer.engine import TransferEngine
from headrace.live.transfer.outgoing import Turns
from headrace.live.transfer.pieces import Pieces
from headrace.live.transfer.regions import Card, Descriptor, Region
from headrace.types.errors import TransferError
from headrace.types.ids import Address

log = logging.getLogger(__name__)

CHANNEL = 2
"""Of the immediates that say that a staging slot is full: the slot's number."""
MAIL = b"gather:"
"""What this path's messages begin with, among those of an engine."""
STEP_BYTES = 1 << 22
"""Copied at a time: what a cancel or a peer's end waits for."""


AGAIN_S = 0.05


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    slot_bytes: int = 16 << 20
    slots: int = 4
    """Of the send buffer, and of the staging memory."""
    answer_ns: int = 200_000_000
    """How long a source waits for a slot before it sends runs."""


class Ask(msgspec.Struct, frozen=True, tag=True, array_like=True):
    number: int
    nbytes: int
    runs: list[tuple[int, int]]
    """Where the bytes belong in the target's pool, in order: (offset, nbytes)."""
    arrivals: list[tuple[int, int]]
    """What the target's core counts when they are there: (slot, weight)."""


class Granted(msgspec.Struct, frozen=True, tag=True, array_like=True):
    number: int
    slot: int
    staging: Descriptor


class Full(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """No slot is free, or (`reason`) such a batch will not be taken."""

    number: int
    reason: str = ""


class Cancel(msgspec.Struct, frozen=True, tag=True, array_like=True):
    number: int


class Ended(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Nothing of the batch is copied any more. `scattered`: all of it was."""

    number: int
    scattered: bool


Said = Ask | Granted | Full | Cancel | Ended

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Said).decode

Landed = Callable[[Address, int, int], None]
"""(source, slot, weight)."""


@dataclass(eq=False, slots=True)
class Batch:
    """At the source."""

    peer: Card
    number: int
    pieces: Pieces
    slot: int
    done: Callable[[TransferError | None], None]
    runs: Callable[[], None]
    """Send it as runs instead."""
    answered: bool = False
    granted: Granted | None = None
    copying: "Copying | None" = None
    error: TransferError | None = None


@dataclass(eq=False, slots=True)
class Intake:
    """At the target."""

    source: Card
    ask: Ask
    slot: int
    copying: "Copying | None" = None


@dataclass(eq=False, slots=True)
class Copying:
    """One gather or scatter, for the copy thread. `stop` returns when it copies no more."""

    source: Region
    target: Region
    pieces: Pieces
    then: Callable[[bool], None]
    """On the engine's thread: was all copied?"""
    stopped: bool = False
    lock: Lock = field(default_factory=Lock)

    def run(self) -> bool:
        for step in steps(self.pieces):
            with self.lock:
                if self.stopped:
                    return False
                copy(self.source, self.target, step)
        return True

    def stop(self) -> None:
        # First, so that the copy thread does not take the lock again for its next step.
        self.stopped = True
        with self.lock:
            pass


class GatherPath:
    """Both halves, of one engine. All methods run on the engine's thread."""

    def __init__(
        self, engine: TransferEngine, pool: Region, turns: Turns, landed: Landed, settings: Settings
    ) -> None:
        self.settings = settings
        self._engine = engine
        self._pool = pool
        self._turns = turns
        self._landed = landed
        size, slots = settings.slot_bytes, settings.slots
        shape = PoolLayout((slots,), (size,), (0,), slots * size)
        self._buffers = [Pool.create(name, shape) for name in ("send", "staging")]
        layout = f"staging of {pool.layout}"
        self._send, self._staging = (engine.register(b.buffers()[0], layout, b.fd) for b in self._buffers)
        self._free_sends = list(range(settings.slots))
        self._free_staging = list(range(settings.slots))
        self._number = 0
        self._batches: dict[int, Batch] = {}
        self._intakes: dict[tuple[Address, int], Intake] = {}
        self._gone: dict[Address, None] = {}
        self._jobs: SimpleQueue[Copying | None] = SimpleQueue()
        self._thread = Thread(target=self._copy, name="headrace-gather", daemon=True)
        self._thread.start()

    # The source

    def write(
        self,
        peer: Card,
        pieces: Pieces,
        arrivals: list[tuple[int, int]],
        done: Callable[[TransferError | None], None],
        runs: Callable[[], None],
    ) -> None:
        """Move pieces (from our pool to the peer's) as one, and have the peer count `arrivals`; then `done`.

        Or call `runs`, and nothing else: no slot is free, or the batch is larger than one.
        """
        nbytes = forms.total(pieces)
        if not self._free_sends or nbytes > self.settings.slot_bytes:
            runs()
            return
        self._number += 1
        batch = Batch(peer, self._number, pieces, self._free_sends.pop(), done, runs)
        self._batches[batch.number] = batch
        places = [(int(at), int(size)) for at, size in pieces[:, 1:]]
        self._say(peer, Ask(batch.number, nbytes, places, arrivals), partial(self._unasked, batch))
        self._turns.call_later(self.settings.answer_ns / 1e9, self._overdue, batch)

    def heard(self, source: Card, body: bytes) -> bool:
        """A message has come; False if it is none of ours. Raises TransferError for one that cannot be read."""
        if not body.startswith(MAIL):
            return False
        try:
            said = _decode(body[len(MAIL) :])
        except msgspec.MsgspecError as error:
            raise TransferError(f"{source.owner} says what cannot be read: {error}") from None
        match said:
            case Ask():
                self._asked(source, said)
            case Cancel(number):
                self._cancelled(source, number)
            case Granted(number) | Full(number) | Ended(number):
                batch = self._batches.get(number)
                if batch is not None and batch.peer.owner == source.owner:
                    self._answered(batch, said)
                elif isinstance(said, Granted):
                    # It was given up meanwhile.
                    self._insist(source, Cancel(number))
        return True

    def forget(self, peer: Address) -> Callable[[], None]:
        """It has ended. On return nothing is copied for it, and nothing of it will be.

        What is returned gives its staging to others: call it when nothing of it can land there any more.
        """
        self._gone[peer] = None
        for batch in [b for b in self._batches.values() if b.peer.owner == peer]:
            if batch.copying is not None:
                batch.copying.stop()
            self._finish(batch, TransferError(f"{peer} has ended"))
        slots = [self._drop_intake(self._intakes[key]) for key in list(self._intakes) if key[0] == peer]
        return partial(self._free_staging.extend, slots)

    def close(self) -> None:
        for job in (*self._batches.values(), *self._intakes.values()):
            if job.copying is not None:
                job.copying.stop()
        self._jobs.put(None)
        self._thread.join()
        # The engine, which is closed next, may still write from them: what is mapped stays so for as long.
        for buffer in self._buffers:
            buffer.close()

    def _unasked(self, batch: Batch, error: TransferError | None) -> None:
        """The question did not get there, so nothing was granted; the runs find out why."""
        if error is not None and batch.number in self._batches:
            self._to_runs(batch)

    def _overdue(self, batch: Batch) -> None:
        if batch.number in self._batches and not batch.answered:
            # What is granted from now on is given back, as its number is not known any more.
            self._to_runs(batch)

    def _answered(self, batch: Batch, said: Granted | Full | Ended) -> None:
        batch.answered = True
        match said:
            case Full(_, reason):
                if reason:
                    self._finish(batch, TransferError(f"{batch.peer.owner} refused a batch: {reason}"))
                else:
                    self._to_runs(batch)
            case Granted() if batch.granted is None:
                batch.granted = said
                start = batch.slot * self.settings.slot_bytes
                gathered = np.column_stack(
                    (batch.pieces[:, 0], start + places_of(batch.pieces), batch.pieces[:, 2])
                )
                batch.copying = Copying(self._pool, self._send, gathered, partial(self._gathered, batch))
                self._jobs.put(batch.copying)
            case Ended(_, scattered):
                error = batch.error or TransferError(f"{batch.peer.owner} did not scatter a batch")
                self._finish(batch, None if scattered else error)
            case _:
                # It was said twice, as the first time was not acknowledged.
                pass

    def _gathered(self, batch: Batch, complete: bool) -> None:
        batch.copying = None
        if not complete or batch.number not in self._batches:
            return
        granted, size = batch.granted, self.settings.slot_bytes
        assert granted is not None
        pieces = forms.single(batch.slot * size, granted.slot * size, forms.total(batch.pieces))
        told = partial(self._written, batch)
        try:
            imm = immediate(granted.slot, 1)
            self._engine.write(self._send, granted.staging, pieces, told, imm=imm, channel=CHANNEL)
        except TransferError as error:
            told(error)

    def _written(self, batch: Batch, error: TransferError | None) -> None:
        if error is not None and batch.number in self._batches:
            batch.error = error
            self._insist(batch.peer, Cancel(batch.number))

    def _to_runs(self, batch: Batch) -> None:
        self._drop(batch)
        batch.runs()

    def _finish(self, batch: Batch, error: TransferError | None) -> None:
        self._drop(batch)
        batch.done(error)

    def _drop(self, batch: Batch) -> None:
        del self._batches[batch.number]
        self._free_sends.append(batch.slot)

    # The target

    def _asked(self, source: Card, ask: Ask) -> None:
        why = self._wrong(ask)
        if why or not self._free_staging:
            self._insist(source, Full(ask.number, why))
            return
        intake = Intake(source, ask, self._free_staging.pop())
        self._intakes[source.owner, ask.number] = intake
        # Expected before the source is told that it may.
        self._engine.counter(CHANNEL).expect(intake.slot, 1, partial(self._arrived, intake))
        self._insist(source, Granted(ask.number, intake.slot, self._engine.describe(self._staging)))

    def _wrong(self, ask: Ask) -> str:
        try:
            runs = np.array(ask.runs, np.int64).reshape(-1, 2)
        except OverflowError:
            return "its runs are in no memory"
        if not 0 < ask.nbytes <= self.settings.slot_bytes or int(runs[:, 1].sum()) != ask.nbytes:
            return f"{ask.nbytes} bytes do not fit into a slot of {self.settings.slot_bytes}, or its runs are others"
        if any(not (0 <= slot < SLOTS and 1 <= weight <= WEIGHT_MAX) for slot, weight in ask.arrivals):
            return "a slot or a weight does not fit into 16 bits"
        try:
            forms.check_side(runs[:, 0], runs[:, 1], self._pool.nbytes, "target")
        except TransferError as error:
            return str(error)
        return ""

    def _arrived(self, intake: Intake) -> None:
        runs = np.array(intake.ask.runs, np.int64).reshape(-1, 2)
        start = intake.slot * self.settings.slot_bytes
        staged = start + np.cumsum(runs[:, 1]) - runs[:, 1]
        pieces = np.column_stack((staged, runs))
        intake.copying = Copying(self._staging, self._pool, pieces, partial(self._scattered, intake))
        self._jobs.put(intake.copying)

    def _scattered(self, intake: Intake, complete: bool) -> None:
        source = intake.source.owner
        if not complete or self._intakes.get((source, intake.ask.number)) is not intake:
            return
        intake.copying = None
        self._release(intake)
        for slot, weight in intake.ask.arrivals:
            self._landed(source, slot, weight)
        self._insist(intake.source, Ended(intake.ask.number, True))

    def _cancelled(self, source: Card, number: int) -> None:
        """What was scattered before has been said already."""
        intake = self._intakes.get((source.owner, number))
        if intake is not None and intake.copying is None:
            self._release(intake)
            self._insist(source, Ended(number, False))

    def _release(self, intake: Intake) -> None:
        self._free_staging.append(self._drop_intake(intake))

    def _drop_intake(self, intake: Intake) -> int:
        """Its slot, which is not free yet."""
        if intake.copying is not None:
            intake.copying.stop()
        self._engine.counter(CHANNEL).close(intake.slot)
        del self._intakes[intake.source.owner, intake.ask.number]
        return intake.slot

    # What is said

    def _insist(self, peer: Card, said: Said) -> None:
        """Say it until it is heard: the other end keeps memory for as long."""

        def told(error: TransferError | None) -> None:
            if error is not None and peer.owner not in self._gone:
                self._turns.call_later(AGAIN_S, self._insist, peer, said)

        self._say(peer, said, told)

    def _say(self, peer: Card, said: Said, done: Callable[[TransferError | None], None]) -> None:
        self._engine.send(peer, MAIL + _encode(said), done)

    # Copying

    def _copy(self) -> None:
        while (job := self._jobs.get()) is not None:
            complete = job.run()
            try:
                self._turns.call_soon_threadsafe(job.then, complete)
            except RuntimeError:
                # The loop has ended: so does this process, or its test.
                return


def places_of(pieces: Pieces) -> np.ndarray:
    """Where each lies when they are put one after the other."""
    return np.cumsum(pieces[:, 2]) - pieces[:, 2]


def steps(pieces: Pieces) -> Iterator[Pieces]:
    """Pieces of at most STEP_BYTES together; longer ones are cut."""
    taken: list[tuple[int, int, int]] = []
    filled = 0
    for source, target, nbytes in pieces.tolist():
        at = 0
        while at < nbytes:
            size = min(nbytes - at, STEP_BYTES - filled)
            taken.append((source + at, target + at, size))
            at, filled = at + size, filled + size
            if filled == STEP_BYTES:
                yield np.array(taken, np.int64)
                taken, filled = [], 0
    if taken:
        yield np.array(taken, np.int64)
