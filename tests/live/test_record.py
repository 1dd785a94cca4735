"""What a recorded service leaves behind: journals that replay to the byte, and a trace of what was asked."""

import asyncio
from contextlib import aclosing, closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from headrace.live.journal import (
    Difference,
    Header,
    Journal,
    JournalError,
    JournalReader,
    RouterSettings,
    remake,
    verify,
)
from headrace.live.record import CLUSTER, META, TRACE
from headrace.live.service import Service
from headrace.live.settings import PolicySettings, RecordSettings
from headrace.nodes.limits import RouterConfig
from headrace.ports import Core
from headrace.types.errors import ConfigError, Overloaded
from headrace.types.events import Command, Event, PeerUp, Send, Submitted
from headrace.types.ids import Address, PoolId, RequestId
from headrace.types.messages import InstanceInfo
from headrace.types.recording import RecordedRequest, Recording
from headrace.types.request import Request
from tests.live.fake import SPEC
from tests.live.serving import (
    MODEL,
    collect,
    config_for,
    prompt_of,
    run,
    serving,
    submission,
    until,
    wanted_of,
)

ROUTER = Header(Address("router"), RouterSettings(PolicySettings("round_robin"), RouterConfig()))
WORKER = Address("w")
INFO = InstanceInfo(PoolId(0), Address("pool0"), "mixed", 8, (64,))


# Journals


class Scripted:
    """A core that says what it is told to say."""

    def __init__(self, commands: list[list[Command]]) -> None:
        self._commands = commands

    def handle(self, event: Event, now_ns: int) -> None: ...

    def settle(self, now_ns: int) -> list[Command]:
        return self._commands.pop(0)

    def observe(self, now_ns: int) -> None: ...


def asked(number: int, prompt: int = 8) -> Submitted:
    return Submitted(Request(RequestId(number), prompt, (), tokens_max=4))


def write(folder: Path, core: Core, instants: list[list[Event]]) -> Path:
    """The journal of a core that is told this, at 10, 20, ... ns."""
    folder.mkdir(exist_ok=True)
    with closing(Journal(core, folder, ROUTER)) as journal:
        for number, events in enumerate(instants, 1):
            for event in events:
                journal.handle(event, number * 10)
            journal.settle(number * 10)
    return journal.path


LIFE: list[list[Event]] = [[PeerUp(WORKER, INFO)], [asked(1), asked(2)], [], [asked(3)]]


def test_the_journals_of_a_service_replay_to_the_same_commands(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with serving(shared=False, record=RecordSettings(folder=f"{tmp_path}")) as service:
            wanted = submission(service, prompt_of(1, 40), 20)
            assert await collect(service, wanted) == wanted_of(wanted)
            await service.drain()

    run(scenario())
    verdicts = list(verify(tmp_path))
    assert [v.name for v in verdicts] == ["decode-0#0", "pool0#0", "pool1#0", "prefill-0#0", "router#0"]
    assert all(v.ok and not v.cut and v.instants and v.events and v.digest for v in verdicts)
    assert list(verify(tmp_path / "journal")) == verdicts


def test_what_was_written_is_read(tmp_path: Path) -> None:
    reader = JournalReader(write(tmp_path, remake(ROUTER), LIFE))
    assert reader.header == ROUTER
    instants = list(reader.instants())
    assert [(i.now_ns, i.events) for i in instants] == [(10 * n, e) for n, e in enumerate(LIFE, 1)]
    said = [msgspec.msgpack.decode(i.commands, type=list[Command]) for i in instants]
    assert [len(commands) for commands in said] == [0, 2, 0, 1]
    assert not reader.cut


@pytest.mark.parametrize("lost", [1, 9, 40])
def test_a_record_cut_short_by_a_kill_is_left_out(tmp_path: Path, lost: int) -> None:
    path = write(tmp_path, remake(ROUTER), LIFE)
    path.write_bytes(path.read_bytes()[:-lost])
    [verdict] = verify(tmp_path)
    assert verdict.ok and verdict.cut and verdict.instants == 3


def test_each_changed_byte_is_found(tmp_path: Path) -> None:
    path = write(tmp_path, remake(ROUTER), LIFE)
    whole = path.read_bytes()
    last = whole.index(b"Submitted", whole.rindex(b"Submitted") - 5)
    for at in range(last, last + len(b"Submitted") + 12):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        [verdict] = verify(tmp_path)
        assert not verdict.ok and "frame 4 is not as it was written" in verdict.problem
        assert verdict.instants == 3


def test_the_first_instant_that_differs_is_shown(tmp_path: Path) -> None:
    commands: list[list[Command]] = [
        msgspec.msgpack.decode(i.commands, type=list[Command])
        for i in JournalReader(write(tmp_path / "true", remake(ROUTER), LIFE)).instants()
    ]
    told = [LIFE[0], [asked(1), asked(2, prompt=9)], *LIFE[2:]]
    write(tmp_path / "other", Scripted([*commands]), told)
    [verdict] = verify(tmp_path / "other")
    difference = verdict.difference
    assert not verdict.ok and verdict.instants == 1 and isinstance(difference, Difference)
    assert (difference.instant, difference.now_ns, difference.events) == (1, 20, told[1])
    was, now = difference.lines()
    assert was.startswith("- Send(") and "total=8" in was
    assert now.startswith("+ Send(") and "total=9" in now
    write(tmp_path / "fewer", Scripted([*commands[:3], []]), LIFE)
    [verdict] = verify(tmp_path / "fewer")
    assert verdict.difference is not None and verdict.difference.instant == 3
    [line] = verdict.difference.lines()
    assert line.startswith("+ Send(")


def test_a_core_that_raised_raises_again(tmp_path: Path) -> None:
    twice: list[list[Event]] = [[asked(1)], [asked(1)]]
    with pytest.raises(AssertionError, match="submitted twice"):
        write(tmp_path, remake(ROUTER), twice)
    [verdict] = verify(tmp_path)
    assert verdict.ok and (verdict.instants, verdict.events) == (2, 2)
    write(tmp_path / "healed", Scripted([[], []]), twice)
    [verdict] = verify(tmp_path / "healed")
    assert verdict.difference is not None and "submitted twice" in verdict.difference.lines()[-1]


def test_what_is_no_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no journals"):
        verify(tmp_path)
    foreign = tmp_path / "a.journal"
    foreign.write_bytes(b"something else, of some length")
    with pytest.raises(JournalError, match="is no journal"):
        JournalReader(foreign)
    whole = write(tmp_path, remake(ROUTER), LIFE)
    headless = tmp_path / "b.journal"
    headless.write_bytes(whole.read_bytes()[:40])
    with pytest.raises(JournalError, match="before it says what core"):
        JournalReader(headless)
    verdicts = {v.name: v for v in verify(tmp_path)}
    assert [name for name, v in verdicts.items() if v.ok] == ["router#0"]
    assert "is no journal" in verdicts["a.journal"].problem


def test_a_full_disk_ends_the_journal_and_not_the_service(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    journal = Journal(remake(ROUTER), tmp_path, ROUTER)
    journal.close()
    journal._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115 (closed by the journal)
    for number in (1, 2):
        journal.handle(asked(number), number)
        journal.settle(number)
    assert journal.core.idle is False  # pyright: ignore[reportAttributeAccessIssue]
    assert caplog.text.count("the journal") == 1 and "No space left" in caplog.text


# The trace


def lines(folder: Path) -> list[RecordedRequest]:
    raw = (folder / TRACE).read_bytes()
    return [msgspec.json.decode(line, type=RecordedRequest) for line in raw.splitlines()]


def recorded(folder: Path, scenario: Any, text: bool = False, **fields: Any) -> list[RecordedRequest]:
    """What a service leaves behind that lived through `scenario(service)`."""

    async def living() -> None:
        record = RecordSettings(folder=f"{folder}", text=text, settings={"block-size": 8})
        async with serving(record=record, **fields) as service:
            await scenario(service)

    run(living())
    return lines(folder)


def test_a_request_is_recorded_with_its_times_and_what_moved(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        await collect(service, submission(service, prompt_of(1, 44), 20))

    [request] = recorded(tmp_path, scenario, shared=False)
    assert (request.prompt, request.tokens_max, request.block_size) == (44, 20, SPEC.block_size)
    assert len(request.prompt_blocks) == 5 and request.error == "" and request.prompt_ids == ()
    [choice] = request.choices
    assert (request.output, request.finish, choice.attempts) == ((20,), ("length",), 1)
    assert (choice.prefill, choice.decode) == ("prefill-0", "decode-0")
    assert len(request.output_blocks[0]) == (44 + 20) // 8 - 44 // 8
    stages = [request.arrival_ns, choice.placed_ns, choice.prefill_ns, choice.prefilled_ns, choice.first_ns]
    assert stages == sorted(stages) and stages[0] > 0
    assert choice.prefilled_ns < choice.joined_ns < choice.finished_ns
    assert choice.blocks_moved > 0 and choice.bytes_moved > 0 and choice.writes > 0
    recording = msgspec.json.decode((tmp_path / META).read_bytes(), type=Recording)
    assert recording.spec == SPEC and recording.length_max == MODEL.length_max and recording.threads == 1
    assert [(i.name, i.leaning, i.pool) for i in recording.instances] == [
        ("prefill-0", "prefill", 0),
        ("decode-0", "decode", 1),
    ]
    assert len(recording.pools) == 2 and min(min(blocks) for blocks in recording.pools) > 100
    assert yaml.safe_load((tmp_path / CLUSTER).read_text()) == {"block-size": 8}


def test_equal_blocks_have_equal_names_within_one_recording_only(tmp_path: Path) -> None:
    texts: list[list[int]] = []

    async def scenario(service: Service) -> None:
        answers = await collect(service, submission(service, prompt_of(1, 44), 20))
        texts.append([*prompt_of(1, 44), *answers[0]])
        await collect(service, submission(service, [*texts[0], *prompt_of(2, 20)], 4))

    first, second = recorded(tmp_path / "a", scenario)
    whole = (*first.prompt_blocks, *first.output_blocks[0])
    assert len(whole) == 64 // 8 and second.prompt_blocks[:8] == whole
    assert len({*whole, *second.prompt_blocks}) == len(second.prompt_blocks) == 84 // 8
    assert all(0 <= name < 2**63 for name in second.prompt_blocks)
    again, _ = recorded(tmp_path / "b", scenario)
    assert not {*again.prompt_blocks} & {*first.prompt_blocks}


def test_text_is_kept_only_when_asked_for(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        wanted = submission(service, prompt_of(1, 44), 20)
        named = msgspec.structs.replace(
            wanted.request, tenant="mail@example.org", category="chat", priority=2
        )
        await collect(service, msgspec.structs.replace(wanted, request=named))

    [without] = recorded(tmp_path / "a", scenario)
    assert without.prompt_ids == without.output_ids == ()
    assert without.tenant and "mail" not in (tmp_path / "a" / TRACE).read_text()
    assert (without.category, without.priority) == ("chat", 2)
    [kept] = recorded(tmp_path / "b", scenario, text=True)
    assert kept.prompt_ids == tuple(prompt_of(1, 44)) and len(kept.output_ids[0]) == 20
    assert kept.tenant == "mail@example.org"


def test_how_choices_end_is_recorded(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        stopped = submission(service, prompt_of(3, 40), 300, choices=2)
        async for chunk in service.submit(stopped):
            if chunk.choice == 0 and chunk.first == 4:
                service.withdraw(stopped.request.id, 0)
        async with aclosing(service.submit(submission(service, prompt_of(4, 40), 4000))) as stream:
            await anext(stream)
        late = asyncio.create_task(collect(service, submission(service, prompt_of(5, 40), 3000)))
        await until(lambda: service.status().requests_running == 1)
        draining = asyncio.create_task(service.drain())
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await collect(service, submission(service, prompt_of(6, 40), 5))
        await draining
        await service.stop()
        await asyncio.gather(late, return_exceptions=True)

    stopped, left, late, refused = recorded(
        tmp_path, scenario, options={"step_s": 0.002}, shutdown_ns=100_000_000
    )
    assert stopped.finish == ("stop", "length")
    assert 5 <= stopped.output[0] < 300 and stopped.output[1] == 300
    assert left.finish == ("cancelled",) and 1 <= left.output[0] < 4000
    assert late.finish == ("failed",) and "shut down" in late.error
    assert refused.finish == ("rejected",) and "shutting down" in refused.error
    assert (refused.choices[0].attempts, refused.output, refused.choices[0].placed_ns) == (0, (0,), 0)


def test_a_killed_worker_leaves_a_journal_that_replays_and_a_trace_that_says_so(tmp_path: Path) -> None:
    async def scenario(service: Service) -> None:
        wanted = submission(service, prompt_of(1, 40), 60)
        texts: list[int] = []
        async for chunk in service.submit(wanted):
            texts += chunk.token_ids
        assert texts == wanted_of(wanted)[0]
        await until(lambda: service.status().instances[1].state == "ready")

    options = {"step_s": 0.002, "dies_at": {"decode-0": 20}}
    [request] = recorded(tmp_path, scenario, options=options, backoff_ns=1_000_000)
    assert (request.choices[0].attempts, request.output) == (2, (60,))
    verdicts = list(verify(tmp_path))
    assert all(v.ok for v in verdicts)
    assert {"decode-0#0", "decode-0#1"} < {v.name for v in verdicts}


def test_a_folder_is_never_recorded_to_twice(tmp_path: Path) -> None:
    config = config_for(record=RecordSettings(folder=f"{tmp_path / 'new'}"))
    Service(config, MODEL, ["true"])
    (tmp_path / "new" / TRACE).write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        Service(config, MODEL, ["true"])
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--record"):
        Service(config_for(record=RecordSettings(folder=f"{tmp_path / 'file'}")), MODEL, ["true"])


def test_the_recorded_sends_are_the_routers(tmp_path: Path) -> None:
    """Commands are kept whole, so that a difference can be read."""
    [_, second, *_] = JournalReader(write(tmp_path, remake(ROUTER), LIFE)).instants()
    commands = msgspec.msgpack.decode(second.commands, type=list[Command])
    assert all(isinstance(c, Send) and c.target == WORKER for c in commands)
