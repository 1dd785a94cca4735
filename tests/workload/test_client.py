"""The load client against the real HTTP API over a fake service, and against servers that misbehave."""

import asyncio
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from headrace.api.settings import ApiSettings
from headrace.api.tokenizer import Tokenizer
from headrace.cli.bench import bench
from headrace.types.errors import ConfigError, Overloaded, RequestFailed
from headrace.workload.client import run_load
from headrace.workload.load import Goals, LoadConfig
from headrace.workload.report import RunReport, summarize
from tests.api.fakes import MODEL, FakeGateway, Running, byte_level, serving, write_checkpoint


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(write_checkpoint(tmp_path_factory.mktemp("checkpoint"), byte_level()))


@pytest.fixture(scope="module")
def shared(tokenizer: Tokenizer) -> Iterator[tuple[FakeGateway, Running]]:
    gateway = FakeGateway(tokenizer)
    with serving(gateway, tokenizer) as running:
        yield gateway, running


@pytest.fixture
def gateway(shared: tuple[FakeGateway, Running]) -> FakeGateway:
    shared[0].reset()
    return shared[0]


def load(shared: tuple[FakeGateway, Running], **fields: object) -> RunReport:
    config = LoadConfig(
        url=shared[1].address, **{"input_tokens": 12, "output_tokens": 5, "warmups": 0} | fields
    )  # type: ignore[arg-type]
    return summarize(asyncio.run(run_load(config)))


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_load(shared: tuple[FakeGateway, Running], gateway: FakeGateway, endpoint: str) -> None:
    gateway.cached = 3
    progress: list[tuple[int, int]] = []
    config = LoadConfig(
        url=f"{shared[1].address}/v1/",
        endpoint=endpoint,  # type: ignore[arg-type]
        prompts=12,
        input_tokens=8,
        output_tokens=6,
        concurrency=4,
        warmups=2,
        goals=Goals(ttft_ms=60_000),
    )
    report = summarize(asyncio.run(run_load(config, lambda done, total: progress.append((done, total)))))
    assert (report.facts["model"], report.completed, report.failed) == (MODEL, 12, 0)
    assert report.output_tokens == 12 * 6
    assert report.cached_tokens == 12 * 3
    assert report.goodput_share == 1.0
    assert report.ttft_ms is not None
    assert report.e2e_ms is not None
    assert 0 < report.ttft_ms.median <= report.e2e_ms.median
    assert progress == [(i, 12) for i in range(13)]
    assert len(gateway.submissions) == 14
    assert report.concurrency <= 4.01


def test_sends_what_was_planned(shared: tuple[FakeGateway, Running], gateway: FakeGateway) -> None:
    load(shared, prompts=6, spread=0.5, seed=1, concurrency=1)
    first = [submission.payload.token_ids for submission in gateway.submissions]
    gateway.reset()
    load(shared, prompts=6, spread=0.5, seed=1, concurrency=1)
    assert [submission.payload.token_ids for submission in gateway.submissions] == first
    sampling = gateway.submissions[0].payload.sampling
    assert (sampling.temperature, sampling.ignore_eos) == (0.0, True)
    assert max(max(ids) for ids in first) < gateway.info().vocabulary


def test_waits_for_arrivals(shared: tuple[FakeGateway, Running], gateway: FakeGateway) -> None:
    report = load(shared, prompts=5, request_rate=50.0, seed=2)
    assert report.completed == 5
    assert report.duration_s > 0.02


def test_errors_are_counted_by_kind(shared: tuple[FakeGateway, Running], gateway: FakeGateway) -> None:
    gateway.error = Overloaded("full")
    assert load(shared, prompts=3).errors == {"http 503": 3}
    gateway.error, gateway.error_after = RequestFailed("lost"), 2
    report = load(shared, prompts=3)
    assert report.errors == {"stream error: request_failed": 3}
    assert report.completed == 0


def test_keys(tokenizer: Tokenizer) -> None:
    gateway = FakeGateway(tokenizer)
    with serving(gateway, tokenizer, ApiSettings(api_keys=("k",))) as running:
        assert load((gateway, running), prompts=1, api_key="k").completed == 1
        with pytest.raises(ConfigError, match="--model"):
            load((gateway, running), prompts=1)
        assert load((gateway, running), prompts=1, model=MODEL).errors == {"http 401": 1}


def test_no_server() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        config = LoadConfig(url=f"http://127.0.0.1:{unused.getsockname()[1]}")
        with pytest.raises(ConfigError, match="does not answer"):
            asyncio.run(run_load(config))


MODELS = b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 23\r\nconnection: close\r\n\r\n{"data": [{"id": "m"}]}'
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
EVENT = b'data: {"choices": [{"text": "a"}]}\r\n\r\n'


def hear_all(connection: socket.socket) -> None:
    """A whole request: who closes a connection with something unread in it takes back what he has answered."""
    heard = b""
    while b"\r\n\r\n" not in heard:
        heard += connection.recv(65536)
    head, _, body = heard.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    left = int(length[1]) - len(body) if length else 0
    while left:
        left -= len(connection.recv(left))


@contextmanager
def answering(*answers: bytes | None) -> Iterator[str]:
    """A server that gives these bytes, one connection each, and closes; for None it holds the connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        held: list[socket.socket] = []

        def serve() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                hear_all(connection)
                if answer is None:
                    held.append(connection)
                else:
                    with connection:
                        connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()
        for connection in held:
            connection.close()


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (STREAM + EVENT, "incomplete stream"),
        (STREAM + b"data: {not json\n\n", "unexpected answer: DecodeError"),
        (STREAM + b'data: {"choices": 5}\n\n', "unexpected answer: TypeError"),
        (STREAM + b'data: {"error": {"type": "server_error"}}\n\n', "stream error: server_error"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\ndata: ", "connection: ClientPayloadError"),
        (b"", "connection: ServerDisconnectedError"),
        (None, "timeout"),
    ],
)
def test_servers_that_misbehave(answer: bytes | None, kind: str) -> None:
    with answering(MODELS, answer) as url:
        config = LoadConfig(url=url, prompts=1, warmups=0, timeout_s=1.5 if answer is None else 60)
        report = summarize(asyncio.run(run_load(config)))
    assert report.errors == {kind: 1}


def test_a_server_without_usage() -> None:
    with answering(MODELS, STREAM + EVENT * 3 + b"data: [DONE]\n\n") as url:
        report = summarize(asyncio.run(run_load(LoadConfig(url=url, prompts=1, warmups=0))))
    assert (report.completed, report.output_tokens) == (1, 3)


def test_prompts_from_a_file(
    shared: tuple[FakeGateway, Running], gateway: FakeGateway, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "The fox", "max_tokens": 2}\n')
    report = load(shared, prompts=2, text=file)
    assert report.output_tokens == 4


def test_bench_prints_and_saves(
    shared: tuple[FakeGateway, Running],
    gateway: FakeGateway,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = LoadConfig(url=shared[1].address, prompts=3, input_tokens=8, output_tokens=4, warmups=0)
    asyncio.run(bench(config, tmp_path / "result.json"))
    assert capsys.readouterr().out.startswith("Live")
    saved = msgspec.json.decode((tmp_path / "result.json").read_bytes())
    assert (saved["completed"], saved["output_tokens"], saved["settings"]["prompts"]) == (3, 12, 3)
    gateway.error = Overloaded("full")
    with pytest.raises(RequestFailed, match="no request"):
        asyncio.run(bench(config, None))
    with pytest.raises(ConfigError, match="does not exist"):
        asyncio.run(bench(config, tmp_path / "absent" / "result.json"))
