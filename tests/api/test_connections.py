"""Clients that leave, stall or send half a request, and services that fail: nothing hangs, nothing leaks, others go on."""

import json
import socket
from typing import Any

import httpx
import openai
import pytest

from headrace.api.settings import ApiSettings
from headrace.api.tokenizer import Tokenizer
from headrace.types.errors import Overloaded, RequestFailed
from tests.api.fakes import MODEL, WAIT_S, FakeGateway, Pace, Running, serving

ENDLESS = {"prompt": "fox", "max_tokens": 200, "ignore_eos": True, "stream": True}
HELLO: Any = [{"role": "user", "content": "hello"}]


def read_to_end(connection: socket.socket) -> bytes:
    """Until the server closes the connection, or drops it."""
    received = b""
    try:
        while part := connection.recv(65536):
            received += part
    except ConnectionResetError:
        pass
    return received


def metric(plain: httpx.Client, name: str) -> float:
    lines = plain.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def wait_until_idle(plain: httpx.Client, gateway: FakeGateway) -> None:
    """Every request has left the server. Asks again until it has; the client's timeout ends a test that fails."""
    for _ in range(5000):
        if plain.get("/ready").json()["requests"]["http"] == 0 and gateway.open == 0:
            return
    raise AssertionError("a request is left over")


class TestLeaving:
    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("prompt", ["fox", ["fox", "dog", "END"]])
    def test_before_the_first_token(
        self, running: Running, plain: httpx.Client, gateway: FakeGateway, stream: bool, prompt: Any
    ) -> None:
        gateway.pace = Pace(0)
        connection = running.connect()
        running.post(connection, "/v1/completions", ENDLESS | {"prompt": prompt, "stream": stream})
        assert gateway.started.wait(WAIT_S)
        connection.close()
        assert gateway.cancelled.wait(WAIT_S)
        wait_until_idle(plain, gateway)
        assert gateway.sent == 0

    def test_in_the_middle(self, client: openai.OpenAI, plain: httpx.Client, gateway: FakeGateway) -> None:
        gateway.pace = Pace(3)
        before = metric(plain, "headrace:client_disconnects_total")
        aborted = metric(plain, 'vllm:request_success_total{engine="0",finished_reason="abort"')
        stream = client.completions.create(
            model=MODEL, prompt="fox", max_tokens=200, n=2, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        stream.close()
        assert gateway.cancelled.wait(WAIT_S)
        wait_until_idle(plain, gateway)
        assert gateway.sent <= 3
        assert metric(plain, "headrace:client_disconnects_total") == before + 1
        assert metric(plain, 'vllm:request_success_total{engine="0",finished_reason="abort"') == aborted + 2

    def test_with_half_a_body_sent(self, running: Running, plain: httpx.Client, gateway: FakeGateway) -> None:
        connection = running.connect()
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
        connection.close()
        wait_until_idle(plain, gateway)
        assert gateway.submissions == []

    def test_after_the_answer_cancels_nothing(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        client.completions.create(model=MODEL, prompt="fox", max_tokens=3)
        assert not gateway.cancelled.is_set()


class TestStalling:
    def test_a_client_that_does_not_read(self, tokenizer: Tokenizer) -> None:
        """It is cut after the write timeout; until then the service is held back, and others are served."""
        gateway = FakeGateway(tokenizer, length_max=100_000)
        settings = ApiSettings(write_timeout_s=0.3)
        large = ENDLESS | {"max_tokens": 12_000, "logprobs": 20, "return_token_ids": True}
        with (
            serving(gateway, tokenizer, settings) as running,
            httpx.Client(base_url=running.address, timeout=WAIT_S) as plain,
            running.connect(receive_buffer=4096) as connection,
        ):
            running.post(connection, "/v1/completions", large)
            assert gateway.started.wait(WAIT_S)
            answer = plain.post("/v1/completions", json={"prompt": "fox", "max_tokens": 2})
            assert answer.status_code == 200
            assert gateway.cancelled.wait(WAIT_S)
            wait_until_idle(plain, gateway)
            assert gateway.sent < 12_000
            assert metric(plain, "headrace:client_stalls_total") == 1
            assert not read_to_end(connection).endswith(b"0\r\n\r\n")

    def test_a_body_that_does_not_come(self, tokenizer: Tokenizer) -> None:
        gateway = FakeGateway(tokenizer)
        with (
            serving(gateway, tokenizer, ApiSettings(body_timeout_s=0.1)) as running,
            running.connect() as connection,
        ):
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
            assert connection.recv(65536).startswith(b"HTTP/1.1 408")

    @pytest.mark.parametrize("head", [b"", b"POST /v1/completions HTTP/1.1\r\nx: "])
    def test_a_head_that_does_not_come(self, tokenizer: Tokenizer, head: bytes) -> None:
        gateway = FakeGateway(tokenizer)
        with (
            serving(gateway, tokenizer, ApiSettings(head_timeout_s=0.1)) as running,
            running.connect() as connection,
        ):
            connection.sendall(head)
            assert read_to_end(connection) == b""


class TestFailing:
    @pytest.mark.parametrize("stream", [True, False])
    @pytest.mark.parametrize("prompt", ["fox", ["fox", "dog"]])
    def test_overloaded(
        self, client: openai.OpenAI, plain: httpx.Client, gateway: FakeGateway, stream: bool, prompt: Any
    ) -> None:
        gateway.error = Overloaded("no blocks")
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=MODEL, prompt=prompt, stream=stream)
        assert caught.value.status_code == 503
        assert caught.value.response.headers["retry-after"] == "1"
        assert (caught.value.type, caught.value.code) == ("overloaded_error", "overloaded")
        assert "no blocks" in str(caught.value)
        wait_until_idle(plain, gateway)

    @pytest.mark.parametrize("stream", [True, False])
    def test_failed(self, client: openai.OpenAI, gateway: FakeGateway, stream: bool) -> None:
        gateway.error = RequestFailed("no worker is left")
        with pytest.raises(openai.InternalServerError, match="no worker is left") as caught:
            client.chat.completions.create(model=MODEL, messages=HELLO, stream=stream)
        assert (caught.value.status_code, caught.value.code) == (500, "request_failed")

    def test_late(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        gateway.error = RequestFailed("waited too long")
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=MODEL, prompt="fox", extra_body={"timeout": 1e-9})
        assert (caught.value.status_code, caught.value.code) == (504, "deadline_exceeded")

    def test_a_bug(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        gateway.error = ZeroDivisionError("secret detail")
        with pytest.raises(openai.InternalServerError) as caught:
            client.completions.create(model=MODEL, prompt="fox")
        assert "secret detail" not in str(caught.value)

    def test_in_the_middle_of_a_stream(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        gateway.text("The fox jumps over")
        gateway.error, gateway.error_after = RequestFailed("worker d0 was lost"), 4
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        texts: list[str] = []
        with pytest.raises(openai.APIError, match="worker d0 was lost"):
            texts.extend(chunk.choices[0].delta.content or "" for chunk in stream)
        gateway.error = None
        assert client.completions.create(model=MODEL, prompt="fox").choices

    def test_the_error_event_is_the_last(self, plain: httpx.Client, gateway: FakeGateway) -> None:
        gateway.text("fox jumps")
        gateway.error, gateway.error_after = RequestFailed("lost"), 2
        response = plain.post("/v1/completions", json=ENDLESS)
        events = response.text.strip().split("\n\n")
        assert response.status_code == 200
        assert len(events) == 3
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "request_failed"

    def test_a_stream_that_ends_early(self, plain: httpx.Client, gateway: FakeGateway) -> None:
        """The service must say how each choice ended; silence is an error."""

        class Silent(FakeGateway):
            async def submit(self, submission: Any) -> Any:
                async for chunk in super().submit(submission):
                    if chunk.finish is None:
                        yield chunk

        tokenizer = gateway._tokenizer
        with serving(Silent(tokenizer), tokenizer) as running:
            asked = ENDLESS | {"stream": False}
            response = httpx.post(f"{running.address}/v1/completions", json=asked, timeout=WAIT_S)
        assert response.status_code == 500
        assert "before the answer was complete" in response.text


@pytest.mark.parametrize("tokens", [0, 2])
def test_a_service_that_forgets_a_request(tokenizer: Tokenizer, tokens: int) -> None:
    """No request hangs: some time after its deadline the API ends it itself."""
    gateway = FakeGateway(tokenizer)
    gateway.text("fox jumps over")
    gateway.pace = Pace(tokens)
    # The first token must have come by then, on however slow a machine.
    with serving(gateway, tokenizer, ApiSettings(deadline_grace_s=2.0 if tokens else 0.1)) as running:
        asked = ENDLESS | {"timeout": 0.05}
        response = httpx.post(f"{running.address}/v1/completions", json=asked, timeout=WAIT_S)
        assert response.status_code == (200 if tokens else 504)
        last = response.text.strip().split("\n\n")[-1].removeprefix("data: ")
        assert json.loads(last)["error"]["code"] == "deadline_exceeded"
        assert gateway.cancelled.wait(WAIT_S)


def test_too_many_requests(tokenizer: Tokenizer) -> None:
    gateway = FakeGateway(tokenizer)
    gateway.pace = Pace(0)
    with (
        serving(gateway, tokenizer, ApiSettings(requests_max=1, retry_after_s=7)) as running,
        running.connect() as connection,
    ):
        running.post(connection, "/v1/completions", ENDLESS)
        assert gateway.started.wait(WAIT_S)
        response = httpx.post(f"{running.address}/v1/completions", json=ENDLESS, timeout=WAIT_S)
        assert (response.status_code, response.headers["retry-after"]) == (503, "7")
        assert response.json()["error"]["code"] == "overloaded"
