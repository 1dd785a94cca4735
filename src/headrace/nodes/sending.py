"""The source's half of all transfers of one instance: sessions, fences, and peers that were lost. See `transfer.source` for one session."""

from collections.abc import Callable

from headrace.engine.memory import Memory
from headrace.engine.sequence import Sequence, Status
from headrace.nodes.limits import Stream
from headrace.transfer.source import Outgoing
from headrace.types.events import Command, Send
from headrace.types.ids import Address, RequestId, SequenceKey, Slot, WriteId
from headrace.types.kv import KVSpec, TableRun
from headrace.types.messages import Abandon, Dispatch, Fenced, Handover, InstanceInfo, Quiet, Role, Tail


def loan_key(key: SequenceKey) -> SequenceKey:
    """The key under which a sequence's blocks are written to a peer that lends: none that a sequence or an errand has."""
    return SequenceKey(RequestId(-1 - key.request), key.choice, key.attempt)


class Sending:
    """Appends its commands to the instance's `out`."""

    def __init__(
        self, spec: KVSpec, memory: Memory, pool: Address, stream: Stream, out: Callable[[Command], None]
    ) -> None:
        self._spec = spec
        self._stream = stream
        self._memory = memory
        self._pool = pool
        self._out = out
        self._sessions: dict[SequenceKey, Outgoing] = {}
        self._early: dict[SequenceKey, tuple[Address, Dispatch]] = {}
        """Dispatches whose sequence has not been started yet."""
        self._fences: dict[SequenceKey, tuple[Address, Slot]] = {}
        """Targets that wait for a session's writes to end."""
        self._writes: dict[WriteId, SequenceKey] = {}
        self._write_count = 0
        self._quiet_due: dict[Address, Address] = {}
        """Lost peer -> its pool, to be told once no write to it is in flight."""

    def __contains__(self, key: SequenceKey) -> bool:
        return key in self._sessions

    @property
    def idle(self) -> bool:
        return not (self._sessions or self._early or self._fences or self._writes)

    @property
    def sessions(self) -> int:
        """Sequences that are being sent."""
        return len(self._sessions)

    def busy(self, key: SequenceKey) -> bool:
        """Writes from this sequence's blocks are in flight."""
        return any(not self._sessions[k].quiet for k in (key, loan_key(key)) if k in self._sessions)

    # Sessions

    def dispatched(self, target: Address, dispatch: Dispatch, sequence: Sequence | None) -> None:
        """Where the target wants a sequence's KV; its `Start` may come later."""
        if sequence is None:
            self._early[dispatch.key] = (target, dispatch)
        else:
            self._sessions[dispatch.key] = Outgoing(dispatch, target, self._spec)

    def opened(self, key: SequenceKey, target: Address) -> Outgoing | None:
        """The session to this target, if it is still wanted."""
        session = self._sessions.get(key)
        return session if session is not None and session.target == target and not session.stopped else None

    def moves(self, target: Address, dispatch: Dispatch) -> Outgoing:
        """Where the target wants a sequence that runs on here, or more of it."""
        session = self.opened(dispatch.key, target)
        if session is None:
            assert dispatch.key not in self._sessions
            session = Outgoing(dispatch, target, self._spec, moving=True)
            self._sessions[dispatch.key] = session
        else:
            session.extend(dispatch.table)
        return session

    def give(self, target: Address, dispatch: Dispatch, tables: list[list[int]], ready: int) -> Outgoing:
        """Send cached blocks, of no sequence here: those of the first `ready` that `tables` has."""
        assert dispatch.key not in self._sessions
        session = self._sessions[dispatch.key] = Outgoing(dispatch, target, self._spec, moving=True)
        for write in session.advance(tables, ready, self._next_write):
            self._writes[write.write] = dispatch.key
            self._out(write)
        session.drop_rest()
        return session

    def lend(self, target: Address, key: SequenceKey, slot: Slot, table: tuple[TableRun, ...]) -> Outgoing:
        """Blocks of this sequence, which runs on here, are to go to a peer that lends memory: see `push`."""
        dispatch = Dispatch(loan_key(key), slot, table, shared=False, expected=0)
        assert dispatch.key not in self._sessions
        session = self._sessions[dispatch.key] = Outgoing(dispatch, target, self._spec, moving=True)
        return session

    def push(self, sequence: Sequence, session: Outgoing, ready: int, layers: int | None = None) -> None:
        """Send what is wanted of the logical blocks before `ready`: of the model's first `layers` layers, or (None) of all."""
        for write in session.advance(sequence.tables, ready, self._next_write, layers):
            self._writes[write.write] = session.dispatch.key
            self._out(write)

    def keep(self, key: SequenceKey) -> None:
        """The sequence runs on here, and its session is over: forgotten once its writes have ended."""
        self.stop(key)
        self._forget_stopped(key)

    def started(self, sequence: Sequence) -> None:
        """A PREFILL sequence began: has its target asked already?"""
        if sequence.key in self._early:
            self.dispatched(*self._early.pop(sequence.key), sequence)

    def advance(self, sequence: Sequence) -> bool:
        """Send what is ready. True once all is sent and acknowledged: the sequence is no longer needed here."""
        session = self._sessions.get(sequence.key)
        if session is None or session.stopped or sequence.status not in (Status.RUNNING, Status.HELD):
            return False
        held = sequence.status is Status.HELD
        if self._stream is Stream.REQUEST and not held:
            return False
        size = self._spec.block_size
        ready = self._spec.blocks_for(sequence.computed) if held else sequence.computed // size
        self.push(sequence, session, ready)
        if held and not session.tail_sent:
            self.send_tail(sequence, session)
        return session.done

    def stream(self, sequence: Sequence, computed: int, layers: int, *, last: bool) -> None:
        """A chunk that runs has the KV of the first `layers` layers up to token `computed`; with `last`, that of the whole prompt."""
        session = self._sessions.get(sequence.key)
        if session is None or sequence.status is not Status.RUNNING or sequence.role is not Role.PREFILL:
            return
        self.push(sequence, session, sequence.computed // self._spec.block_size)
        ready = self._spec.blocks_for(computed) if last else computed // self._spec.block_size
        self.push(sequence, session, ready, layers)

    def handed_over(self, key: SequenceKey) -> bool:
        """The sequence's blocks belong to the target now."""
        return self._sessions[key].dispatch.shared and self._sessions[key].tail_sent

    def close(self, key: SequenceKey) -> None:
        """The sequence has left."""
        session = self._sessions.pop(key, None)
        assert session is None or session.quiet
        self._early.pop(key, None)

    def stop(self, key: SequenceKey) -> None:
        """Issue nothing more for this sequence."""
        if key in self._sessions:
            self._sessions[key].stop()
        self._early.pop(key, None)

    def written(self, write: WriteId, ok: bool) -> tuple[SequenceKey, bool]:
        """A write ended: whose it was, and whether that session fails by it."""
        key = self._writes.pop(write)
        session = self._sessions[key]
        session.acknowledge(write)
        failed = not ok and not session.stopped
        if failed:
            session.stop()
        self._answer_fence(key)
        self._forget_stopped(key)
        return key, failed

    # Fences

    def abandoned(self, target: Address, message: Abandon) -> None:
        """The target gives up: no write into this slot may land after `Fenced`."""
        key, session = message.key, self._sessions.get(message.key)
        if self._early.get(key, (target, None))[0] == target:
            self._early.pop(key, None)
        if session is not None and session.target != target:
            # Its own session is long over: another target has the sequence now.
            self._out(Send(target, Fenced(key, message.slot)))
            return
        self.stop(key)
        self._fences[key] = (target, message.slot)
        self._answer_fence(key)
        self._forget_stopped(key)

    def peer_lost(self, peer: Address, info: InstanceInfo) -> list[SequenceKey]:
        """Stop all sessions to a dead peer; their keys."""
        for key in [k for k, (target, _) in self._early.items() if target == peer]:
            del self._early[key]
        for key in [k for k, (target, _) in self._fences.items() if target == peer]:
            del self._fences[key]
        open_to = {k: s for k, s in self._sessions.items() if s.target == peer and not s.stopped}
        for key in open_to:
            self.stop(key)
            self._forget_stopped(key)
        self._quiet_due[peer] = info.pool_address
        # What moves there stays here (`nodes.migrating`), and cached blocks are of no sequence.
        return [key for key, session in open_to.items() if not session.moving]

    def tell_quiet(self) -> None:
        """Tell the pools of lost peers that nothing of ours can land there any more, once that is so."""
        for peer, pool in list(self._quiet_due.items()):
            if all(s.quiet for s in self._sessions.values() if s.target == peer):
                del self._quiet_due[peer]
                self._out(Send(pool, Quiet(peer)))

    def _answer_fence(self, key: SequenceKey) -> None:
        if key in self._fences and not self.busy(key):
            target, slot = self._fences.pop(key)
            self._out(Send(target, Fenced(key, slot)))

    def _forget_stopped(self, key: SequenceKey) -> None:
        """Of a sequence that has stayed no session is left once its writes have ended."""
        session = self._sessions.get(key)
        if session is not None and session.moving and session.stopped and session.quiet:
            del self._sessions[key]

    def send_tail(self, sequence: Sequence, session: Outgoing) -> None:
        """The last piece, with the tokens that the target does not know."""
        session.tail_sent = True
        total = session.dispatch.known if session.moving else sequence.total - sequence.emitted
        if session.dispatch.shared:
            private = tuple(self._memory.private(sequence))
            self._out(Send(self._pool, Handover(sequence.key, session.target, private)))
        tail = Tail(
            key=sequence.key,
            slot=session.dispatch.slot,
            emitted=sequence.total - total,
            hashes=tuple(sequence.hashes),
            blocks=session.blocks,
            bytes=session.bytes,
            writes=session.writes,
            skipped=session.skipped,
            moved=session.moving,
        )
        self._out(Send(session.target, tail))

    def _next_write(self) -> WriteId:
        self._write_count += 1
        return WriteId(self._write_count)
