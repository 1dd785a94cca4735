"""What a plan says happens, when it says so, and nothing after healing."""

from dataclasses import replace

import pytest

from headrace.sim.faults import Ambush, Break, FaultPlan, Victim
from headrace.sim.network import Partition
from headrace.sim.run import Outcome, simulate
from headrace.sim.scenarios import MICRO, MILLI, World
from tests.sim.test_equal import calm, split

HEAL_NS = 2 * MILLI


def world(seed: int = 3) -> World:
    """Prefill on i0, decode on i1, a pool each."""
    return split(calm(seed))


def struck(plan: FaultPlan, seed: int = 3) -> tuple[Outcome, list[str]]:
    """The run with this plan, and the lines of its trace that tell of faults."""
    lines: list[str] = []
    outcome = simulate(replace(world(seed), faults=replace(plan, heal_ns=HEAL_NS)), lines.append)
    return outcome, [line for line in lines if " ! " in line]


@pytest.mark.parametrize(
    ("victim", "counted"),
    [
        (Victim.SENDER, "deaths"),
        (Victim.RECEIVER, "deaths"),
        (Victim.CLIENT, "ambushes"),
        (Victim.SESSION, "ambushes"),
    ],
)
def test_an_ambush_strikes_once_where_its_message_is(victim: Victim, counted: str):
    outcome, lines = struck(FaultPlan(ambushes=(Ambush("Dispatch", 1, victim, 10, 5 * MICRO),)))
    assert outcome.counts["ambushes"] == 1 and outcome.counts[counted] == 1
    assert f"{victim.value} of " in lines[0]
    died = [str(w.address) for w in outcome.shell.workers.values() if not w.alive]
    assert died == {Victim.SENDER: ["i1#0"], Victim.RECEIVER: ["i0#0"]}.get(victim, [])
    left = [s for c in outcome.shell.clients.all.values() for s in c.streams if s.withdrawn]
    assert len(left) == (victim is Victim.CLIENT)
    assert outcome.shell.network.counts["sessions broken"] == 2 * (victim is Victim.SESSION)


def test_an_ambush_whose_message_never_comes_does_not_strike():
    outcome, lines = struck(FaultPlan(ambushes=(Ambush("Dispatch", 9_999, Victim.SENDER, 1),)))
    assert "ambushes" not in outcome.counts and len(lines) == 1


def test_breaks_and_partitions_are_traced_counted_and_change_no_text():
    everybody = ("router", "pool0", "pool1", "i0", "i1")
    plan = FaultPlan(
        breaks=tuple(Break(at, at + 30 * MICRO, ("i0",), everybody) for at in (50_000, 100_000, 200_000)),
        partitions=(Partition(300_000, 500_000, ("i0",), ("i1",)),),
    )
    outcome, lines = struck(plan)
    assert outcome.texts == simulate(world()).texts
    assert (outcome.counts["breaks"], outcome.counts["partitions"]) == (3, 1)
    assert outcome.shell.network.counts["sessions broken"] > 6
    assert [line.split()[3] for line in lines] == ["breaks", "breaks", "breaks", "partitions", "the"]


def test_kills_drains_and_clients_that_leave():
    [ask, *_] = world().asks
    plan = FaultPlan(
        kills=((200_000, "i0"), (210_000, "i0")),
        drains=((100_000, "i1"),),
        leaves=((ask.request.arrival_ns + 10, ask.request.id, None),),
    )
    outcome, _ = struck(plan)
    assert outcome.counts["kills"] == 2 and outcome.counts["deaths"] == 1, "nobody dies twice"
    assert outcome.counts["drains"] == 1
    assert all(stream.withdrawn for stream in outcome.shell.clients.all[ask.request.id].streams)
