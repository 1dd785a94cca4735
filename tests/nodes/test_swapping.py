"""Preempted sequences that go to host memory and come back, one core at a time. See `nodes.swapping`."""

from typing import Any

from headrace.engine.preemption import swap
from headrace.engine.sequence import Status
from headrace.types.kv import TableRun
from headrace.types.messages import Cancel, Matched, Publish, Release
from headrace.types.swaps import SwapIn, SwapOut, Swapped, SwapRun
from headrace.types.weights import Switch
from tests.nodes.harness import POOL, ROUTER, InstanceBench, key, start


class SwapBench(InstanceBench):
    """Sixteen blocks of 4 tokens in hand, and the pool has no more."""

    def __init__(self, host: int = 16, **settings: Any) -> None:
        preemption = swap.Policy(swap.Config(**settings))
        super().__init__(spare=16, preemption=preemption, swap_blocks=(host,))

    def end(self, command: SwapOut | SwapIn, *, ok: bool = True) -> None:
        self.tell(Swapped(command.swap, ok))

    def stop_second(self) -> None:
        """As the scheduler does when the first lacks blocks."""
        self.core.scheduler.stop(self.second, ends=False)

    def until(self, kind: type[SwapOut] | type[SwapIn]) -> Any:
        """Run on until a swap begins."""
        for _ in range(9):
            if self.commands(kind):
                break
            self.step()
        (command,) = self.commands(kind)
        return command

    def resume(self, tokens: int = 0, table: tuple[TableRun, ...] = ()) -> SwapIn:
        """The second is looked up and admitted again."""
        for _ in range(9):
            if self.commands(SwapIn):
                break
            if self.second.status is Status.MATCHING:
                self.hear(POOL, Matched(key(2), tokens, table))
            else:
                self.step()
        (command,) = self.commands(SwapIn)
        return command

    @property
    def second(self) -> Any:
        return self.core.sequences[key(2)]

    @property
    def blocks(self) -> int:
        """That the second needs for its KV."""
        return self.core.memory.spec.blocks_for(self.second.total - 1)


def swapped_out(bench: SwapBench) -> SwapOut:
    """Two sequences have run for a while; the second is on its way to host memory."""
    bench.begin_all(start(1, 14, emits_max=40), start(2, 14, emits_max=40))
    bench.steps(6)
    bench.stop_second()
    return bench.until(SwapOut)


def size(command: SwapOut | SwapIn) -> int:
    return sum(run.count for run in command.runs)


def hosts(command: SwapOut | SwapIn) -> list[int]:
    return [run.host + i for run in command.runs for i in range(run.count)]


def test_blocks_are_nobody_elses_until_their_copy_has_ended():
    bench = SwapBench()
    command = swapped_out(bench)
    assert bench.second.status is Status.STOPPING and size(command) == bench.blocks
    free = bench.free
    assert not bench.sent(Release)
    bench.end(command)
    assert bench.second.tables == [[]] and bench.sent(Release) and bench.free > free
    assert bench.second.kept == bench.second.total - 1, "all but its newest token had KV"
    assert bench.core.swapping.counts.out == 1


def test_a_run_is_one_copy_and_without_groups_each_block_is():
    bench = SwapBench()
    assert swapped_out(bench).runs == (SwapRun(0, 4, 0, 4), SwapRun(0, 9, 4, 1)), "host blocks are one run"
    bench = SwapBench(groups=False)
    assert swapped_out(bench).runs == tuple(SwapRun(0, d, h, 1) for h, d in enumerate((4, 5, 6, 7, 9)))


def test_what_comes_back_is_not_computed_again():
    bench = SwapBench()
    out = swapped_out(bench)
    bench.end(out)
    back = bench.resume()
    assert bench.second.status is Status.LOADING
    assert hosts(back) == hosts(out)
    assert all(work.key != key(2) for plan in bench.plans for work in plan.work)
    bench.end(back)
    assert bench.second.status is Status.RUNNING
    bench.step()
    (begun,) = bench.plans[0].starts
    assert begun.computed == begun.total - 1 and [w.count for w in bench.plans[0].work] == [1, 1]
    assert bench.second.recomputed == 0


def test_what_the_pool_still_has_is_not_copied_back():
    bench = SwapBench()
    bench.end(swapped_out(bench))
    back = bench.resume(8, (TableRun(0, 0, 30, 2),))
    assert (bench.core.swapping.counts.found, size(back)) == (2, bench.blocks - 2)
    bench.end(back)
    assert bench.sent(Publish)[0].table[0].at == 2, "what came back can be shared again"


def kept_over_a_push() -> SwapBench:
    """The second keeps its 15 tokens of KV; four more are of newer weights when it is swapped out, and the host has both."""
    bench = SwapBench()
    bench.begin_all(start(1, 14, emits_max=40), start(2, 14, emits_max=40))
    bench.steps(2)
    bench.hear(ROUTER, Switch(1))
    bench.steps(4)
    bench.stop_second()
    bench.end(bench.until(SwapOut))
    return bench


def test_what_newer_weights_made_comes_back_and_is_not_published():
    bench = kept_over_a_push()
    assert (bench.second.genuine, bench.second.kept) == (15, 19)
    bench.end(bench.resume())
    assert [(m.key, m.table[0].at, m.table[0].count) for m in bench.sent(Publish)] == [(key(2), 0, 3)]
    bench.steps(4)
    assert bench.second.computed > 20 and bench.second.published == [3]


def test_what_newer_weights_made_does_not_go_on_after_more_of_the_older_ones_than_it_was_made_from():
    bench = kept_over_a_push()
    while bench.second.status is not Status.MATCHING:
        bench.step()
    bench.hear(POOL, Matched(key(2), 16, (TableRun(0, 0, 30, 4),)))
    assert (bench.second.kept, bench.second.genuine) == (0, 16) and not bench.core.swapping.area.copies
    bench = kept_over_a_push()
    assert size(bench.resume(12, (TableRun(0, 0, 30, 3),))) == 2, "else the host has the rest"
    assert bench.second.genuine == 15


def test_a_copy_that_fails_leads_to_computing_again():
    bench = SwapBench()
    bench.end(swapped_out(bench), ok=False)
    assert bench.second.kept == 0 and not bench.core.swapping.area.copies
    bench = SwapBench()
    bench.end(swapped_out(bench))
    kept = bench.second.kept
    bench.end(bench.resume(), ok=False)
    sequence = bench.second
    assert sequence.status in (Status.WAITING, Status.MATCHING) and (sequence.kept, sequence.lost) == (
        0,
        kept,
    )
    assert sequence.tables == [[]] and not bench.core.swapping.area.copies


def test_where_the_host_is_full_it_is_computed_again():
    bench = SwapBench(host=2)
    bench.begin_all(start(1, 14, emits_max=40), start(2, 14, emits_max=40))
    bench.steps(6)
    bench.stop_second()
    bench.steps(2)
    assert bench.second.status is not Status.STOPPING and bench.second.kept == 0
    assert bench.core.swapping.counts.full == 1


def test_only_what_is_new_is_copied_a_second_time():
    for reuse in (True, False):
        bench = SwapBench(reuse=reuse)
        bench.end(swapped_out(bench))
        full = bench.second.kept // 4
        bench.end(bench.resume())
        assert bool(bench.core.swapping.area.copies) == reuse
        bench.steps(2)
        bench.stop_second()
        again = bench.until(SwapOut)
        assert size(again) == (bench.blocks - full if reuse else bench.blocks)
        assert bench.core.swapping.counts.reused == (full if reuse else 0)


def test_steps_wait_for_copies_unless_they_run_in_the_background():
    for background in (True, False):
        bench = SwapBench(background=background)
        command = swapped_out(bench)
        for _ in range(3):
            if bench.core.scheduler.inflight:
                bench.step()
        assert bool(bench.core.scheduler.inflight) == background
        bench.end(command)
        assert bench.core.scheduler.inflight


def test_a_client_that_leaves_while_its_kv_is_copied_is_waited_for():
    for comes_back in (False, True):
        bench = SwapBench()
        command = swapped_out(bench)
        if comes_back:
            bench.end(command)
            command = bench.resume()
        bench.hear(ROUTER, Cancel(key(2)))
        assert key(2) in bench.core.sequences and not bench.closed
        bench.end(command)
        assert key(2) not in bench.core.sequences and bench.closed == [key(2)]
        assert bench.core.swapping.idle


def test_whoever_needs_a_block_that_is_being_copied_waits_for_that_copy_alone():
    bench = SwapBench()
    command = swapped_out(bench)
    bench.begin(start(3, 40))
    bench.step()
    assert bench.core.memory.need[0] and bench.core.swapping.counts.conflicts == 1
    bench.step()
    assert [work.key for work in bench.plans[0].work] == [key(1)], "the others go on"
    bench.end(command)
    assert bench.core.swapping.counts.conflicts == 1
