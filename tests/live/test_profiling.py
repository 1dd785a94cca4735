"""Two measuring workers over the fake executor: questions in, seconds out, and what happens when one of them ends."""

import sys

import pytest

from headrace.live.measuring import Copy, Echo, KeepRunning, Rest, RunSteps
from headrace.live.profiling import (
    FIRST,
    SECOND,
    measure_copies,
    measure_message,
    measure_pairs,
    measure_steps,
    rig,
)
from headrace.live.shapes import Limits, Shape
from headrace.types.errors import ConfigError, HeadraceError
from tests.live.fake import SPEC
from tests.live.serving import MODEL, config_for, run

COMMAND = [sys.executable, "-m", "tests.live.fake_measured"]
LIMITS = Limits(tokens=32, sequences=4, length=256, blocks=600, block_size=SPEC.block_size)
SHAPES = [Shape(((24, 8),), 3, 60), Shape(decodes=2, context=40), Shape(((16, 0), (8, 0)))]


def test_steps_pairs_copies_and_messages_are_measured() -> None:
    ticks: list[None] = []

    def tick() -> None:
        ticks.append(None)

    async def scenario() -> None:
        async with rig(config_for(options={"step_s": 0.002}), MODEL, COMMAND, 600) as measuring:
            steps = await measure_steps(measuring, SHAPES, tick)
            assert [(s.prefills, s.decodes, s.context) for s in steps] == [
                (((24, 8),), 3, 180),
                ((), 2, 80),
                (((16, 0), (8, 0)), 0, 0),
            ]
            assert all(len(s.seconds) == 7 and min(s.seconds) > 0.002 for s in steps)
            pairs = await measure_pairs(measuring, LIMITS, tick)
            assert [(p.kind, p.beside) for p in pairs] == [
                ("prefill", "prefill"),
                ("prefill", "decode"),
                ("decode", "prefill"),
                ("decode", "decode"),
            ]
            copies = await measure_copies(measuring, MODEL, 600, tick)
            block = SPEC.block_bytes(0)
            assert {(c.nbytes, c.writes) for c in copies} >= {(block, 1), (256 * block, 1), (64 * block, 64)}
            assert all(len(c.seconds) == 7 and min(c.seconds) > 0 for c in copies)
            assert 0 < await measure_message(measuring) < 5
            assert len(ticks) == 3 + 4 + 9

    run(scenario())


def test_one_worker_runs_beside_the_other_until_it_rests() -> None:
    async def scenario() -> None:
        async with rig(config_for(options={"step_s": 0.001}), MODEL, COMMAND, 64) as measuring:
            shape = Shape(decodes=1, context=20)
            assert await measuring.ask(SECOND, KeepRunning(shape)) == ()
            assert len(await measuring.ask(FIRST, RunSteps(shape, 1, 5))) == 5
            assert await measuring.ask(SECOND, Rest()) == ()
            assert len(await measuring.ask(SECOND, RunSteps(shape, 0, 2))) == 2
            assert await measuring.ask(SECOND, Rest()) == ()

    run(scenario())


def test_a_worker_that_ends_is_an_error_that_says_so() -> None:
    async def scenario() -> None:
        async with rig(config_for(), MODEL, COMMAND, 64) as measuring:
            await measuring.ask(FIRST, KeepRunning(Shape(decodes=1, context=20)))
            with pytest.raises(HeadraceError, match=r"has ended \(status 1\)(.|\n)*copy"):
                await measuring.ask(FIRST, Copy(SECOND, writes=1, blocks=1000, repeats=1))
            with pytest.raises(HeadraceError, match="has ended"):
                await measuring.ask(SECOND, Echo())

    run(scenario())


def test_a_worker_that_cannot_load_says_why() -> None:
    async def scenario() -> None:
        config = config_for(options={"start_fault": "second"})
        with pytest.raises(HeadraceError, match=r"has ended(.|\n)*cannot be loaded"):
            async with rig(config, MODEL, COMMAND, 64):
                pass

    run(scenario())


def test_memory_that_is_not_there_is_named() -> None:
    async def scenario() -> None:
        with pytest.raises(ConfigError, match="2 pools"):
            async with rig(config_for(), MODEL, COMMAND, 2**40):
                pass

    run(scenario())
