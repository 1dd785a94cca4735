"""Expert dispatch and combine: bit-equal to a plain all-to-all, whatever arrives first."""

import asyncio
import os
import subprocess
import sys

import msgspec
import numpy as np
import pytest
import uvloop
from msgspec.structs import replace

from headrace.live.transfer.engine import TransferEngine
from headrace.live.transfer.experts import Experts, Shape
from headrace.live.transports import Settings
from headrace.live.transports.loop import Switch, Transport
from headrace.types.errors import ConfigError, TransferError
from headrace.types.ids import Address
from tests.live.expert_rank import HIDDEN, shape_of, step_of
from tests.live.serving import REPOSITORY


def groups(shape: Shape, seed: int, timeout_s: float = 5.0) -> list[Experts]:
    """All ranks in this process, with every order of arrival that a network could show."""
    loop = asyncio.get_running_loop()
    switch = Switch(loop, seed)
    made: list[Experts] = []
    for rank in range(shape.ranks):
        address = Address(f"rank{rank}")
        engine = TransferEngine(address, {"loop": Transport(Settings(address), switch)}, loop)
        made.append(Experts(engine, rank, shape, timeout_s=timeout_s))
    for group in made:
        group.join([other.descriptor for other in made])
    return made


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_random_routings_in_random_order(ranks: int):
    async def within() -> None:
        for seed in range(12):
            team = groups(shape_of(ranks), seed)
            for step in range(5):
                await asyncio.gather(*(step_of(group, seed, step) for group in team))
            await asyncio.gather(*(group.close() for group in team))

    uvloop.run(within())


def test_a_rank_may_be_ahead_of_the_others():
    async def all_steps(group: Experts, pause: bool) -> None:
        for step in range(8):
            if pause:
                await asyncio.sleep(0)
            await step_of(group, 7, step)

    async def within() -> None:
        team = groups(shape_of(3), 1)
        await asyncio.gather(*(all_steps(group, group.rank == 0) for group in team))

    uvloop.run(within())


def test_rows_that_do_not_fit_are_refused_before_anything_is_sent():
    async def within() -> None:
        team = groups(shape_of(2, rows_max=4), 0)
        tokens = np.ones((5, HIDDEN), np.float32)
        experts = np.tile(np.array([4, 5, 6], np.int32), (5, 1))
        with pytest.raises(TransferError, match="rank 0 has 5 rows for rank 1, which keeps room for 4"):
            await team[0].dispatch(tokens, experts, np.ones((5, 3), np.float32))
        assert team[0].bytes_sent == 0
        await asyncio.gather(*(step_of(group, 3, 0) for group in groups(shape_of(2), 0)))
        for bad, words in (
            ((np.ones((5, 2), np.float32), experts), "rows of 8 bytes"),
            ((tokens, experts + 99), "an expert is none of 0 to 7"),
            ((tokens, experts[:, :2]), "do not fit 12 tokens with 3 each"),
        ):
            with pytest.raises(TransferError, match=words):
                await team[0].dispatch(*bad, np.ones((5, 3), np.float32))

    uvloop.run(within())


def test_a_peer_that_sends_nothing_is_not_waited_for_for_ever():
    async def within() -> None:
        team = groups(shape_of(2), 0, timeout_s=0.05)
        with pytest.raises(TransferError, match=r"rank 0 has waited 0\.05 s for rows"):
            await step_of(team[0], 1, 0)

    uvloop.run(within())


def test_shapes_that_cannot_be():
    for wrong in ({"experts": 7}, {"chosen": 9}, {"rows_max": -1}):
        with pytest.raises(ConfigError):
            replace(shape_of(2), **wrong).check()


@pytest.mark.parametrize(("transport", "ranks"), [("shm", 3), ("tcp", 2)])
def test_real_processes(transport: str, ranks: int):
    environment = os.environ | {"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'src'}"}
    command = [sys.executable, "-m", "tests.live.expert_rank"]
    team = [
        subprocess.Popen(
            [*command, str(rank), str(ranks), transport, "5", "20"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        pipes = [(p.stdin, p.stdout) for p in team]
        descriptors = [msgspec.json.decode(out.readline()) for _, out in pipes if out]
        for into, _ in pipes:
            assert into is not None
            into.write(msgspec.json.encode(descriptors).decode() + "\n")
            into.flush()
        assert [out.readline() for _, out in pipes if out] == ["done\n"] * ranks
        for process in team:
            process.communicate("\n", timeout=60)
        assert [process.returncode for process in team] == [0] * ranks
    finally:
        for process in team:
            process.kill()
