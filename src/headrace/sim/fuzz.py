"""Many seeds, on several processes: which of them fail, and what happened in the others.

Seeds are handed out in chunks, no more at a time than there are processes. So if a process dies, the seeds that may have killed it are
known; they are tried again one chunk at a time, and the chunk with which its process dies again is reported.
"""

import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

from msgspec.structs import asdict

from headrace.nodes.instance import Instance
from headrace.nodes.pool import PoolCore
from headrace.nodes.router import Router
from headrace.sim.run import Failure, Outcome, simulate
from headrace.sim.scenarios import draw_world
from headrace.sim.tiers import ContentTiers

CHUNK = 25
CPU_SECONDS_MAX = 60.0
"""For one seed; most take hundredths of a second. A core that goes round and round within one instant would never end by itself."""

Progress = Callable[[int, int], None]
"""Told how many seeds are done, of how many."""


@dataclass(frozen=True, slots=True)
class Found:
    """A seed that fails."""

    seed: int
    reason: str
    """One line."""
    kinds: tuple[str, ...]
    """Of faults that are on in it."""

    @property
    def replay(self) -> str:
        return f"headrace fuzz --seed {self.seed} --trace"


@dataclass(slots=True)
class Tally:
    """What came of some seeds."""

    done: int = 0
    found: list[Found] = field(default_factory=list[Found])
    fatal: list[range] = field(default_factory=list[range])
    """Seeds whose process died: killed from outside (out of memory?) or crashed."""
    kinds: Counter[str] = field(default_factory=Counter[str])
    """Seeds in which a kind of fault was on."""
    counts: Counter[str] = field(default_factory=Counter[str])
    """How often something happened, over all seeds that passed."""
    seconds: float = 0.0
    """Wall clock."""

    @property
    def passed(self) -> bool:
        return not self.found and not self.fatal

    def add(self, other: "Tally") -> None:
        """Takes in all but the time."""
        self.done += other.done
        self.found = sorted(self.found + other.found, key=lambda found: found.seed)
        self.fatal = sorted(self.fatal + other.fatal, key=lambda seeds: seeds.start)
        self.kinds += other.kinds
        self.counts += other.counts


class Fuzzer:
    """Runs `seeds`; `tally` is good at any moment, so also when `run` is interrupted. Stops at the first failure unless `keep_going`."""

    def __init__(self, seeds: range, jobs: int = 1, *, keep_going: bool = False, chunk: int = CHUNK) -> None:
        self.tally = Tally()
        self._seeds = seeds
        self._jobs = jobs
        self._keep_going = keep_going
        self._chunk = chunk

    def run(self, progress: Progress = lambda done, total: None) -> Tally:
        """Raises what interrupts it, KeyboardInterrupt for one; running chunks end first, at most some seconds later."""
        started = time.perf_counter()
        chunks = [self._seeds[at : at + self._chunk] for at in range(0, len(self._seeds), self._chunk)]
        try:
            with closing(self._alone(chunks) if self._jobs == 1 else self._together(chunks)) as parts:
                for part in parts:
                    self.tally.add(part)
                    progress(self.tally.done, len(self._seeds))
                    if not (self.tally.passed or self._keep_going):
                        break
        finally:
            self.tally.seconds = time.perf_counter() - started
        return self.tally

    def _alone(self, chunks: list[range]) -> Generator[Tally]:
        for seeds in chunks:
            yield run_chunk(seeds, self._keep_going)

    def _together(self, chunks: list[range]) -> Generator[Tally]:
        waiting = chunks[::-1]
        while waiting:
            suspects: list[range] = []
            with _processes(self._jobs) as pool:
                yield from self._hand_out(pool, waiting, suspects)
            for seeds in suspects:
                with _processes(1) as pool:
                    try:
                        part = pool.submit(run_chunk, seeds, self._keep_going).result()
                    except BrokenProcessPool:
                        part = Tally(done=len(seeds), fatal=[seeds])
                yield part

    def _hand_out(
        self, pool: ProcessPoolExecutor, waiting: list[range], suspects: list[range]
    ) -> Generator[Tally]:
        """Until nothing waits or a process has died: then `suspects` are the chunks that were running."""
        running: dict[Future[Tally], range] = {}
        while (waiting or running) and not suspects:
            while waiting and len(running) < self._jobs:
                seeds = waiting.pop()
                running[pool.submit(run_chunk, seeds, self._keep_going)] = seeds
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                seeds = running.pop(future)
                try:
                    yield future.result()
                except BrokenProcessPool:
                    suspects.append(seeds)
        suspects += running.values()


def run_chunk(seeds: range, keep_going: bool) -> Tally:
    """One after another, to the first that fails unless `keep_going`."""
    tally = Tally()
    for seed in seeds:
        tally.done += 1
        world = draw_world(seed)
        tally.kinds.update(world.kinds)
        try:
            with _limited():
                outcome = simulate(world)
        except Failure as failure:
            tally.found.append(Found(seed, str(failure).splitlines()[0], world.kinds))
            if not keep_going:
                break
        else:
            tally.counts += happened(outcome)
    return tally


def happened(outcome: Outcome) -> Counter[str]:
    """What a run reached, beside its end."""
    shell = outcome.shell
    router = shell.router.state
    assert isinstance(router, Router)
    counts = Counter(outcome.counts)
    counts.update(shell.network.counts)
    counts.update(
        {
            "requests": len(shell.clients.all),
            "requests rejected": sum(client.rejected is not None for client in shell.clients.all.values()),
            "events": outcome.events,
            "steps": outcome.steps,
            "tokens": router.counters.get("tokens_generated", 0),
            "failovers": router.counters.get("failovers", 0),
            "writes landed and used": router.counters.get("transfer_writes", 0),
        }
    )
    for below in shell.tiers.values():
        assert isinstance(below, ContentTiers)
        counts.update(below.counts)
    for pool, _ in shell.pools.values():
        if isinstance(pool.state, PoolCore) and pool.state.tiering is not None:
            counts.update(pool.state.tiering.counters)
    for worker in shell.workers.values():
        if isinstance(worker.state, Instance):
            counts["preemptions"] += worker.state.scheduler.preemptions
            counts.update({f"swaps {k}": n for k, n in asdict(worker.state.swapping.counts).items() if n})
            counts["blocks contaminated"] += worker.state.swapping.area.contaminated
    return counts


@contextmanager
def _processes(count: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh interpreters: a fork would copy the locks of a progress bar's thread. Ctrl-C is for the parent alone."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(count, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _limited() -> Iterator[None]:
    """Raises TimeoutError within when a seed takes far too much processor time."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"no end after {CPU_SECONDS_MAX:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_SECONDS_MAX)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
