"""Ways to get swapping wrong: see `tests.sim.mutants`. `MUTANTS` has all, those of that file, too."""

import pytest
from msgspec.structs import replace

from headrace.kv.hostarea import HostArea, HostCopy
from headrace.nodes.swapping import Job, Swapping
from headrace.sim.scenarios import World
from headrace.types.swaps import Swapped
from tests.sim.mutants import MUTANTS, mutant

__all__ = ["MUTANTS"]


def swaps(world: World) -> bool:
    return world.policies["engine.preemption"] == "swap" and any(world.instance.swap_blocks)


@mutant(swaps)
def a_device_block_is_free_before_it_was_copied_out(patch: pytest.MonkeyPatch) -> None:
    """A copy is taken for done as soon as it is asked for."""
    begin, ended = Swapping._begin, Swapping.ended

    def trusting(self: Swapping, job: Job, runs) -> None:
        begin(self, job, runs)
        if not job.back:
            key = job.sequence.key
            del self._busy[key]
            self.area.commit(key, job.tokens // self._memory.spec.block_size)
            job.sequence.kept = job.tokens

    def late(self: Swapping, event: Swapped):
        if self._jobs[event.swap].back:
            return ended(self, event)
        del self._jobs[event.swap]
        self._scheduler.copying = len(self._jobs)
        return None

    patch.setattr(Swapping, "_begin", trusting)
    patch.setattr(Swapping, "ended", late)


def reuses_little(world: World) -> bool:
    """Copies in host memory that is often too small; what is too long for a pool is never copied."""
    little = swaps(world) and world.instance.swap_blocks[0] < 60 and not world.instance.lend_share
    return little and world.options["engine.preemption"]["reuse"]


@mutant(reuses_little)
def a_contaminated_host_copy_is_reused(patch: pytest.MonkeyPatch) -> None:
    """What was taken away for others is believed to be there still."""
    cut = HostCopy.cut

    def forgetful(self: HostCopy, blocks: int) -> list[int]:
        valid, gone = self.valid, cut(self, blocks)
        self.valid = valid
        return gone

    patch.setattr(HostCopy, "cut", forgetful)


@mutant(lambda world: swaps(world) and world.options["engine.preemption"]["reuse"])
def a_block_that_was_not_full_is_not_copied_again(patch: pytest.MonkeyPatch) -> None:
    commit = HostArea.commit
    patch.setattr(HostArea, "commit", lambda self, key, full: commit(self, key, full + 1))


@mutant(lambda world: swaps(world) and world.shell.failed_copy_share > 0)
def a_failed_copy_is_taken_for_a_good_one(patch: pytest.MonkeyPatch) -> None:
    ended = Swapping.ended
    patch.setattr(Swapping, "ended", lambda self, event: ended(self, replace(event, ok=True)))
