"""Many seeds at once: what is counted, what is found, and what happens to a process that dies."""

import os
import signal

import pytest

from headrace.nodes.router import Router
from headrace.sim import fuzz
from headrace.sim.fuzz import Fuzzer, Tally
from headrace.sim.scenarios import KINDS, draw_world
from tests.sim.mutants import MUTANTS


def test_all_seeds_are_run_once_and_counted():
    told: list[tuple[int, int]] = []
    tally = Fuzzer(range(30, 60), chunk=12).run(lambda done, total: told.append((done, total)))
    assert told == [(12, 30), (24, 30), (30, 30)]
    assert tally.done == 30 and tally.passed and tally.seconds > 0
    drawn = [draw_world(seed).kinds for seed in range(30, 60)]
    assert {k: n for k, n in tally.kinds.items() if n} == {
        kind: n for kind in KINDS if (n := sum(kind in kinds for kinds in drawn))
    }
    for what in ("requests", "steps", "tokens", "deaths", "sessions broken", "messages stalled", "failovers"):
        assert tally.counts[what] > 0


def test_two_processes_count_as_one_does():
    alone, together = Fuzzer(range(16)).run(), Fuzzer(range(16), 2, chunk=5).run()
    assert (together.done, together.kinds, together.counts) == (alone.done, alone.kinds, alone.counts)
    assert together.passed


def test_a_failing_seed_is_named_with_its_reason_and_the_way_to_see_it(monkeypatch: pytest.MonkeyPatch):
    MUTANTS["transfer_counts_calls"][0](monkeypatch)
    first = Fuzzer(range(200)).run()
    assert len(first.found) == 1 and not first.passed
    [found] = first.found
    assert found.replay == f"headrace fuzz --seed {found.seed} --trace"
    assert found.reason.startswith(f"seed {found.seed}: ") and "\n" not in found.reason
    assert found.kinds == draw_world(found.seed).kinds
    assert first.done <= found.seed + 1 and first.done < 200
    more = Fuzzer(range(found.seed + 30), keep_going=True).run()
    assert more.done == found.seed + 30 and len(more.found) > 1 and more.found[0] == found


def deadly(seeds: range, keep_going: bool) -> Tally:
    """In place of `run_chunk`: seed 13 takes its process with it."""
    if 13 in seeds:
        os.kill(os.getpid(), signal.SIGKILL)
    return Tally(done=len(seeds))


def test_a_process_that_dies_is_reported_with_its_seeds_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fuzz, "run_chunk", deadly)
    tally = Fuzzer(range(40), 2, keep_going=True, chunk=5).run()
    assert tally.fatal == [range(10, 15)] and tally.done == 40 and not tally.passed


def test_a_seed_that_never_ends_fails(monkeypatch: pytest.MonkeyPatch):
    def settle(self: Router, now_ns: int):
        while True:
            pass

    monkeypatch.setattr(Router, "settle", settle)
    monkeypatch.setattr(fuzz, "CPU_SECONDS_MAX", 0.05)
    [found] = Fuzzer(range(1)).run().found
    assert "no end after 0.05 s of processor time" in found.reason


def test_an_interrupted_run_keeps_what_it_has():
    def interrupt(done: int, total: int) -> None:
        if done >= 10:
            raise KeyboardInterrupt

    fuzzer = Fuzzer(range(100), chunk=5)
    with pytest.raises(KeyboardInterrupt):
        fuzzer.run(interrupt)
    assert fuzzer.tally.done == 10 and fuzzer.tally.seconds > 0
