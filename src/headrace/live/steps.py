"""The executor's thread: makes the executor, then runs what it is given, in order.

So the loop's thread always answers, whatever a step takes. `open`, `append` and `close` stand in the same queue as plans: a sequence is
opened before any plan that names it, and closed behind the last one.
"""

import asyncio
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from time import monotonic_ns
from typing import Generic, Protocol, TypeVar

from headrace.ports import Executor
from headrace.types.events import LayersDone
from headrace.types.ids import SequenceKey
from headrace.types.payload import Emission, SequencePayload
from headrace.types.plan import StepPlan, StepResult


class Loaded(Protocol):
    @property
    def executor(self) -> Executor: ...
    @property
    def ahead(self) -> Callable[[StepPlan], None] | None: ...


L = TypeVar("L", bound=Loaded)


class Steps(Generic[L]):
    """Callbacks run on the loop's thread. After `failed` nothing is run any more."""

    def __init__(
        self,
        make: Callable[[], L],
        loaded: Callable[[L], None],
        done: Callable[[StepResult, tuple[Emission, ...]], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self.since_ns = 0
        """When the executor began what it does now; 0: it waits."""
        self._make = make
        self._loaded = loaded
        self._done = done
        self._failed = failed
        self._ahead: Callable[[StepPlan], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._calls: SimpleQueue[Callable[[Executor], None]] = SimpleQueue()
        Thread(target=self._run, name="headrace-steps", daemon=True).start()

    def open(self, key: SequenceKey, payload: SequencePayload) -> None:
        self._calls.put(lambda executor: executor.open(key, payload))

    def append(self, emission: Emission) -> None:
        self._calls.put(lambda executor: executor.append(emission))

    def close(self, key: SequenceKey) -> None:
        self._calls.put(lambda executor: executor.close(key))

    def between(self, call: Callable[[], None], done: Callable[[], None]) -> None:
        """Behind the plans that are given, before those that come; then `done` is called."""

        def carried(_: Executor) -> None:
            call()
            self._tell(done)

        self._calls.put(carried)

    def execute(self, plan: StepPlan, layers_done: Callable[[LayersDone], None] | None = None) -> None:
        """`layers_done` hears how far a layered plan has come."""
        if self._ahead is not None:
            # At once, and not behind the step that runs now.
            self._ahead(plan)

        def told(layers: int) -> None:
            assert layers_done is not None
            self._tell(layers_done, LayersDone(plan.step, layers))

        self._calls.put(lambda executor: self._tell(self._done, *executor.execute(plan, told)))

    def _run(self) -> None:
        try:
            loaded = self._make()
            self._ahead = loaded.ahead
            self._tell(self._loaded, loaded)
            executor = loaded.executor
            while True:
                call = self._calls.get()
                self.since_ns = monotonic_ns()
                call(executor)
                self.since_ns = 0
        except Exception as error:
            self._tell(self._failed, error)

    def _tell(self, callback: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon_threadsafe(callback, *arguments)
