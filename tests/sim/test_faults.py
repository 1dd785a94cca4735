"""What a plan says happens, when it says so, and nothing after healing."""

from dataclasses import replace

import pytest

from headrace.sim.faults import Ambush, Break, FaultPlan, Slowdown, Victim
from headrace.sim.network import Partition
from headrace.sim.run import Outcome, simulate
from headrace.sim.scenarios import MICRO, MILLI, World
from headrace.types.events import PeerLost, StepDone
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
        (Victim.WAY, "ambushes"),
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


def test_an_instance_is_slow_for_a_while():
    """Its steps take ten times as long, and then as long as before."""

    def longest(outcome: Outcome, first_ns: int, last_ns: int) -> int:
        results = [
            event.result
            for node in outcome.shell.nodes
            if node.address.name == "i0"
            for record in node.journal
            for event in record.events
            if isinstance(event, StepDone)
        ]
        took = [r.ended_ns - r.started_ns for r in results if first_ns <= r.started_ns < last_ns]
        return max(took, default=0)

    calm_outcome = simulate(world())
    usual = longest(calm_outcome, 0, HEAL_NS)
    slow, lines = struck(FaultPlan(slowdowns=(Slowdown(1, 300_000, "i0", 10.0),)))
    assert longest(slow, 0, 300_000) > 2 * usual
    assert longest(slow, 300_000, 2**62) <= usual
    assert slow.texts == calm_outcome.texts and slow.counts["slowdowns"] == 1
    assert "as fast again" in lines[1]


def test_who_is_cut_off_hears_of_a_death_later():
    cut = Partition(100_000, 900_000, ("router", "pool0", "pool1"), ("i1",), both=False)
    heard = {}
    for partitions in ((), (cut,)):
        outcome, _ = struck(FaultPlan(kills=((150_000, "i0"),), partitions=partitions))
        heard[partitions] = {
            str(node.address): record.now_ns
            for node in outcome.shell.nodes
            for record in node.journal
            for event in record.events
            if isinstance(event, PeerLost)
        }
    assert heard[(cut,)]["router#0"] == heard[()]["router#0"]
    assert heard[()]["i1#0"] < 900_000 <= heard[(cut,)]["i1#0"]
