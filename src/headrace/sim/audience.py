"""The clients of the timing simulation: they ask what a trace says, when it says, and note what they are given as columns."""

from collections.abc import Callable

import numpy as np

from headrace.sim.timing import Script
from headrace.types.events import Deliver, Reject
from headrace.types.ids import Address, BlockHash, RequestId
from headrace.types.messages import Role, Start
from headrace.types.outcomes import Outcomes
from headrace.types.request import Request
from headrace.types.trace import Ints, Trace, block_name


class Audience:
    """Implements `sim.shell.Users`. Row i of the trace is request i + 1. Times in `outcomes` are the trace's, not the loop's."""

    def __init__(
        self,
        trace: Trace,
        block_size: int,
        instances: tuple[str, ...],
        *,
        begin_ns: int,
        ingress_ns: int = 0,
        egress_ns: int = 0,
        output_limit: int | None = None,
        deadline_ns: int | None = None,
        caching: bool = True,
    ) -> None:
        self.trace = trace
        self.outcomes = Outcomes.empty(len(trace), instances)
        self.outcomes.arrival_ns[:] = trace.arrival_ns
        self.outcomes.prompt[:] = trace.prompt
        self.outcomes.attempts[:] = 1
        self.unfinished = len(trace)
        self.doomed: dict[RequestId, int] = {}
        self.progress_ns = begin_ns
        """When anybody was given anything last."""
        self._size = block_size
        self._begin_ns = begin_ns
        self._ingress_ns = ingress_ns
        self._egress_ns = egress_ns
        self._output_limit = output_limit
        self._deadline_ns = deadline_ns
        self._hashed = caching and trace.block_size > 0
        self._next_turn = _next_turns(trace.follows)
        self._rows = {name: row for row, name in enumerate(instances)}
        self._scripts: dict[int, Script] = {}

    def due_ns(self, row: int) -> int:
        """When the router hears of a request, on the loop's clock."""
        return int(self.trace.arrival_ns[row]) + self._begin_ns + self._ingress_ns

    def request(self, row: int) -> Request:
        trace = self.trace
        output = int(trace.output[row])
        arrival_ns = int(trace.arrival_ns[row]) + self._begin_ns
        hashes = self._prompt_names(row) if self._hashed else ()
        limit = max(output, self._output_limit) if self._output_limit else output
        name = self._namer(row, hashes) if self._hashed else None
        self._scripts[row] = Script(output, output < limit, name)
        return Request(
            id=RequestId(row + 1),
            prompt=int(trace.prompt[row]),
            hashes=hashes,
            tokens_max=limit,
            arrival_ns=arrival_ns,
            **({} if self._deadline_ns is None else {"deadline_ns": arrival_ns + self._deadline_ns}),
            priority=int(trace.priority[row]),
            tenant=trace.tenants[trace.tenant[row]],
            category=trace.categories[trace.category[row]],
            slo=trace.goals[trace.goal[row]],
        )

    def payload_for(self, start: Start, target: Address) -> tuple[Script, int]:
        row = start.key.request - 1
        instance = self._rows.get(target.name, -1)
        if start.role is not Role.DECODE:
            self.outcomes.prefill[row] = instance
        if start.role is not Role.PREFILL:
            self.outcomes.decode[row] = instance
        return self._scripts[row], start.history

    def drawn(self, emissions: None) -> None:
        """There are no ids."""

    def deliver(self, command: Deliver, now_ns: int) -> None:
        self.progress_ns = now_ns
        row = command.request - 1
        outcomes, shift_ns = self.outcomes, self._begin_ns
        if command.first == 0:
            outcomes.first_ns[row] = now_ns - shift_ns + self._egress_ns
        if command.finish is None:
            return
        timeline = command.timeline
        assert timeline is not None
        outcomes.finished_ns[row] = now_ns - shift_ns + self._egress_ns
        outcomes.placed_ns[row] = timeline.placed_ns - shift_ns
        outcomes.prefill_ns[row] = timeline.prefill_ns - shift_ns
        outcomes.joined_ns[row] = max(0, timeline.joined_ns - shift_ns)
        outcomes.output[row] = command.first + command.count
        outcomes.cached[row] = timeline.cached
        outcomes.bytes_moved[row] = timeline.bytes_moved
        outcomes.recomputed[row] = timeline.recomputed
        outcomes.attempts[row] = timeline.attempts
        self._ended(row)

    def reject(self, command: Reject, now_ns: int) -> None:
        row = command.request - 1
        self.progress_ns = now_ns
        self.outcomes.fail(row, "overloaded" if command.overloaded else command.reason)
        self._ended(row)

    def withdraw(self, request: RequestId, choice: int | None) -> bool:
        """The client leaves."""
        if request - 1 not in self._scripts:
            return False
        self.outcomes.fail(request - 1, "withdrawn")
        self._ended(request - 1)
        return True

    def waiting(self) -> list[RequestId]:
        """Requests that were made and have not ended."""
        return [RequestId(row + 1) for row in self._scripts]

    def _ended(self, row: int) -> None:
        del self._scripts[row]
        self.unfinished -= 1

    # Names of blocks

    def _prompt_names(self, row: int) -> tuple[BlockHash, ...]:
        """Of the prompt's full blocks, where the trace knows them: its blocks may be larger or smaller than ours."""
        ids, theirs, ours = self.trace.hashes(row).tolist(), self.trace.block_size, self._size
        if theirs >= ours:
            parts = theirs // ours
            return tuple(block_name(name, part) for name in ids for part in range(parts))
        step = ours // theirs
        return tuple(block_name(name) for name in ids[step - 1 :: step])

    def _namer(self, row: int, prompt: tuple[BlockHash, ...]) -> Callable[[int], BlockHash]:
        """Names of all its blocks: what the next turn's prompt says of them, if there is one, else names that nobody else has."""
        follower = int(self._next_turn[row])
        full = (int(self.trace.prompt[row]) + int(self.trace.output[row])) // self._size

        def name(block: int) -> BlockHash:
            nonlocal prompt, follower
            if block >= len(prompt) and follower >= 0:
                prompt, follower = self._prompt_names(follower)[:full], -1
            return prompt[block] if block < len(prompt) else block_name(-2 - row, block)

        return name


def _next_turns(follows: Ints) -> Ints:
    """For each row the first later one that follows it; -1: none."""
    turns = follows.copy()
    turns[:] = -1
    for row in np.flatnonzero(follows >= 0)[::-1].tolist():
        turns[follows[row]] = row
    return turns
