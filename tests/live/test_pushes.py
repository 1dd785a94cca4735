"""Pushes of weights over fake executors: workers that die at the worst moments, trainers that lie or leave."""

import asyncio
import os
import signal
from collections.abc import Iterable

import pytest

from headrace.live import pushes
from headrace.live.members import State
from headrace.live.service import Service
from headrace.types.errors import PushRefused
from headrace.types.ids import Address
from headrace.types.weights import Running, Tensor
from tests.live.fake import expected
from tests.live.pushing import TENSORS, push, serving, written
from tests.live.serving import collect, drawn, hear, prompt_of, quiet, run, submission, until


async def said(service: Service, number: int, version: int) -> None:
    """A request of now is answered by these weights."""
    wanted = submission(service, prompt_of(number, 40), 6)
    assert (await collect(service, wanted))[0] == expected(wanted.payload, 0, 6, version)


def kill(service: Service, names: Iterable[str] = ("decode-0",)) -> None:
    for name in names:
        pid = service.launcher.pid(service.members.by_name[name].address)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)


async def ready(service: Service, epoch: int = 1) -> None:
    await until(lambda: service.members.by_name["decode-0"].epoch >= epoch)
    await until(lambda: all(m.state is State.READY for m in service.members))


def served(test, **fields: object) -> None:
    async def within() -> None:
        service = serving(**fields)
        await service.start()
        try:
            await test(service)
            assert not service.failed.done(), service.failed.exception()
        finally:
            await service.stop()

    run(within())


def test_what_is_asked_before_and_after():
    async def test(service: Service) -> None:
        await said(service, 1, 0)
        for version in (1, 2, 3):
            pushed = await push(service)
            assert (pushed.version, service.status().weights) == (version, version)
            await said(service, 1, version)
        await until(lambda: all(m.report is not None and m.report.version == 3 for m in service.members))

    served(test, shared=False)


def test_a_worker_killed_while_tensors_come_is_back_for_the_switch():
    async def test(service: Service) -> None:
        ticket = service.pushes.begin(TENSORS, Running.KEEP, 10**9)
        kill(service)
        digests = await written(ticket)
        await ready(service)
        await service.pushes.commit(ticket.push, digests)
        await said(service, 2, 1)

    served(test)


def test_a_worker_killed_while_it_prepares_holds_nobody_up():
    async def test(service: Service) -> None:
        pushing = asyncio.ensure_future(push(service))
        await until(lambda: service.pushes.stage is pushes.Stage.PREPARING)
        kill(service)
        assert (await pushing).version == 1
        await ready(service)
        await said(service, 3, 1)

    served(test, options={"prepare_s": 1.0})


def test_workers_killed_in_the_midst_of_the_switch_come_back_with_the_new_weights():
    async def test(service: Service) -> None:
        await said(service, 4, 0)
        pushing = asyncio.ensure_future(push(service))
        await until(lambda: service.pushes.stage is pushes.Stage.CHANGED)
        kill(service, ("decode-0", "prefill-0"))
        assert (await pushing).version == 1
        await ready(service)
        assert {m.info.version for m in service.members} == {1}
        await said(service, 4, 1)

    served(test, options={"apply_s": 1.0})


def test_a_worker_that_cannot_use_them_keeps_all_on_the_old_ones():
    async def test(service: Service) -> None:
        with pytest.raises(
            PushRefused, match="old weights go on serving: decode-0#0 cannot use them: they are"
        ):
            await push(service)
        await said(service, 5, 0)
        assert service.status().weights == 0

    served(test, options={"unfit": "decode-0"})


def test_digests_that_differ_and_tensors_that_are_missing():
    async def test(service: Service) -> None:
        ticket = service.pushes.begin(TENSORS, Running.KEEP, 10**9)
        with pytest.raises(PushRefused, match="push 1 is under way"):
            service.pushes.begin(TENSORS, Running.KEEP, 10**9)
        with pytest.raises(PushRefused, match="3 of its tensors have not arrived"):
            await service.pushes.commit(ticket.push, [])
        digests = await written(ticket)
        with pytest.raises(PushRefused, match="tensor 'embed' did not arrive as it was sent"):
            await service.pushes.commit(ticket.push, ["0" * 32, *digests[1:]])
        with pytest.raises(PushRefused, match="there is no push 1"):
            service.pushes.drop(ticket.push)
        service.pushes.drop(service.pushes.begin(TENSORS, Running.KEEP, 10**9).push)
        await push(service)
        await said(service, 6, 3)

    served(test)


def test_a_trainer_that_leaves(monkeypatch: pytest.MonkeyPatch):
    async def test(service: Service) -> None:
        monkeypatch.setattr(pushes, "SILENCE_S", 0.01)
        service.pushes.begin(TENSORS, Running.KEEP, 10**9)
        await until(lambda: service.pushes.stage is None)
        await said(service, 7, 0)

    served(test)


def test_running_sequences_are_kept_or_computed_again():
    async def test(service: Service) -> None:
        for running in Running:
            await until(lambda: quiet(service))
            before, done = drawn(service), asyncio.Event()
            wanted = submission(service, prompt_of(8, 30), 3000)
            answering = asyncio.ensure_future(hear(service, wanted, done.is_set))
            await until(lambda before=before: drawn(service) > before + 5)
            pushed = await push(service, running)
            done.set()
            assert len(await answering) > 25
            assert pushed.kept + pushed.recomputed == 1
            assert pushed.recomputed == (running is Running.RECOMPUTE)

    served(test, options={"step_s": 0.01})


def test_tensors_are_compared_by_name():
    for wrong, words in (
        ((), "'embed' is missing"),
        ((*TENSORS, TENSORS[0]), "'embed' comes twice"),
        ((Tensor("embed", (64, 33)),), r"'embed' has shape \[64, 33\]"),
        ((Tensor("other", (1,)),), "'other' is none"),
    ):
        with pytest.raises(PushRefused, match=words):
            pushes.check_tensors(TENSORS, wrong)
    with pytest.raises(PushRefused, match="takes no new weights"):
        pushes.check_tensors((), TENSORS)
    assert Address("weights") == pushes.ADDRESS
