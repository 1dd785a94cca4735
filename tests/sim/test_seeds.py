"""Thousands of worlds: each must tell every client the right text, end every request once, and come to rest with nothing left over."""

from collections import Counter

import pytest

from headrace.sim.fuzz import happened
from headrace.sim.run import Outcome, run, simulate
from headrace.sim.scenarios import KINDS, draw_world
from headrace.transfer import target
from headrace.types.messages import Abandon, Adopted, Handover, Recall, Resume, Start
from tests.sim.regressions import REGRESSIONS

CHUNK = 100


@pytest.mark.parametrize("first", range(0, 2000, CHUNK))
def test_worlds(first: int):
    for seed in range(first, first + CHUNK):
        run(seed)


@pytest.mark.parametrize("seed", REGRESSIONS)
def test_regressions(seed: int):
    run(seed)


def test_slots_that_come_round_soon(monkeypatch: pytest.MonkeyPatch):
    """Sixteen slots in place of 65,536: a late piece of an old transfer would be counted to a new one."""
    monkeypatch.setattr(target, "SLOTS", 16)
    for seed in range(100):
        world = draw_world(seed)
        if len(world.pools) > 1:
            simulate(world)


def messages(outcome: Outcome) -> set[str]:
    """What was said in a run."""
    said: set[str] = set()
    for node in outcome.shell.nodes:
        for record in node.journal:
            for event in record.events:
                message = getattr(event, "message", None)
                said.add(type(message or event).__name__)
                if isinstance(message, Recall) and message.force:
                    said.add("forced stop")
                if isinstance(message, Start) and message.history:
                    said.add("failover with history")
    return said


def test_worlds_leave_no_path_out():
    said: set[str] = set()
    counts: Counter[str] = Counter()
    for seed in range(200):
        outcome = run(seed)
        said |= messages(outcome)
        counts += happened(outcome)
    wanted = {Abandon, Adopted, Handover, Resume}
    paths = {kind.__name__ for kind in wanted} | {"forced stop", "failover with history"}
    paths |= {"Unfenced", "Quiet", "Refused", "Failed", "Drain", "Withdrawn", "PeerLost", "Trim"}
    assert paths <= said, f"no seed reaches {sorted(paths - said)}"
    happens = {"deaths", "sessions broken", "messages lost", "messages doubled", "messages stalled"}
    happens |= {"writes stalled", "writes failed", "partitions", "ambushes", "preemptions", "failovers"}
    assert happens <= set(counts), f"in no seed: {sorted(happens - set(counts))}"


def test_each_kind_of_fault_is_on_in_about_a_quarter_of_the_seeds():
    worlds = [draw_world(seed) for seed in range(400)]
    on = Counter(kind for world in worlds for kind in world.kinds)
    # What goes wrong with tiers needs worlds that have them.
    rare = {"broken request", "slow tier", "failed tier"}
    assert all(0.15 < on[kind] / len(worlds) < 0.4 for kind in KINDS if kind not in rare | {"crash"}), on
    assert 0.15 < on["crash"] / len(worlds) < 0.5, "each mechanism that a world has may be ambushed"
    assert all(on[kind] > 20 for kind in rare), on
    assert any(not world.kinds for world in worlds), "and in some nothing goes wrong"
