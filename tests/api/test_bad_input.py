"""Bad input: each a clear error that names the field, and the server goes on."""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import openai
import pytest

from tests.api.fakes import LENGTH_MAX, MODEL, FakeGateway, Running

HELLO = [{"role": "user", "content": "hello"}]
COMPLETION = {"model": MODEL, "prompt": "fox", "max_tokens": 2}
CHAT = {"model": MODEL, "messages": HELLO, "max_tokens": 2}


@pytest.fixture
def http(plain: httpx.Client, gateway: FakeGateway) -> Iterator[httpx.Client]:
    """A client whose server still serves after the test, with nothing left over."""
    yield plain
    assert plain.post("/v1/completions", json=COMPLETION).status_code == 200
    assert gateway.open == 0


def check(
    response: httpx.Response, status: int, param: str | None, code: str | None = None
) -> dict[str, Any]:
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert code is None or error["code"] == code
    assert param is None or error["message"].startswith(param) or status == 404, error["message"]
    return error


BOTH: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 10**40}, "n"),
    ({"n": "2"}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 2.5}, "max_tokens"),
    ({"max_tokens": LENGTH_MAX}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"stop": ""}, "stop[0]"),
    ({"stop": ["x", ""]}, "stop[1]"),
    ({"stop": ["x"] * 33}, "stop"),
    ({"stop": "x" * 1025}, "stop[0]"),
    ({"stop": [1]}, "stop[0]"),
    ({"stop": 1}, "stop"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [0, 10**9]}, "stop_token_ids[1]"),
    ({"stop_token_ids": 3}, "stop_token_ids"),
    ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ({"logit_bias": {"99999": 1}}, "logit_bias.99999"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": [1]}, "logit_bias"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 3}, "min_tokens"),
    ({"best_of": 2}, "best_of"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"typo": True}}, "stream_options.typo"),
    ({"priority": 2**40}, "priority"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"timeout": 0}, "timeout"),
    ({"timeout": 1e9}, "timeout"),
    ({"model": 3}, "model"),
    ({"user": 3}, "user"),
    ({"request_id": "a b"}, "request_id"),
    ({"max_tokns": 3}, "max_tokns"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"guided_json": {}}, "guided_json"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"chat_template": "x"}, "chat_template"),
    ({"suffix": "x"}, "suffix"),
]
COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt[0]"),
    ({"prompt": ["fox", ""]}, "prompt[1]"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"prompt": [1.5]}, "prompt[0]"),
    ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [1, "a"]}, "prompt[1]"),
    ({"prompt": ["a", 1]}, "prompt[1]"),
    ({"prompt": [[1], ["a"]]}, "prompt[1][0]"),
    ({"prompt": [-1]}, "prompt[0]"),
    ({"prompt": [1, 10**6]}, "prompt[1]"),
    ({"prompt": [[1], [2, 2**70]]}, "prompt[1][1]"),
    ({"prompt": ["a"] * 1025}, "prompt"),
    ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": True, "logprobs": 1}, "echo"),
    ({"messages": HELLO}, "messages"),
]
CHATS: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": ["user"], "content": "x"}]}, "messages[0].role"),
    ({"messages": [*HELLO, {"role": "user", "content": 5}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "tool_calls": [5]}]}, "messages[0].tool_calls[0].function"),
    ({"messages": [{"role": "assistant", "audio": {"id": "a"}}]}, "messages[0].audio"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages"),
    ({"logprobs": 3}, "logprobs"),
    ({"top_logprobs": 3}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"max_completion_tokens": LENGTH_MAX * 2}, "max_completion_tokens"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "x"}}, "audio"),
    ({"store": True}, "store"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"echo": True}, "echo"),
    ({"prompt": "x"}, "prompt"),
]


def label(case: tuple[dict[str, Any], str]) -> str:
    return json.dumps(case[0])[:60]


@pytest.mark.parametrize("case", BOTH, ids=label)
def test_fields_of_both(http: httpx.Client, case: tuple[dict[str, Any], str]) -> None:
    fields, param = case
    check(http.post("/v1/completions", json=COMPLETION | fields), 400, param)
    check(http.post("/v1/chat/completions", json=CHAT | fields), 400, param)


@pytest.mark.parametrize("case", COMPLETIONS, ids=label)
def test_completion_fields(http: httpx.Client, case: tuple[dict[str, Any], str]) -> None:
    check(http.post("/v1/completions", json=COMPLETION | case[0]), 400, case[1])


@pytest.mark.parametrize("case", CHATS, ids=label)
def test_chat_fields(http: httpx.Client, case: tuple[dict[str, Any], str]) -> None:
    check(http.post("/v1/chat/completions", json=CHAT | case[0]), 400, case[1])


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
class TestBodies:
    @pytest.mark.parametrize(
        "body",
        [
            b"", b"{", b"null", b"[]", b'"x"', b"{'a': 1}", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}', b'{"n": NaN}',
            b'{"n": 1e999}', b"[" * 100_000, b"\x00\x01", b'{"model": "m"} trailing', b"a=1&b=2",
            b'{"n": ' + b"1" * 5000 + b"}",
        ],
    )  # fmt: skip
    def test_no_json(self, http: httpx.Client, path: str, body: bytes) -> None:
        check(http.post(path, content=body), 400, None, "invalid_json")

    def test_too_large(self, http: httpx.Client, path: str) -> None:
        check(http.post(path, content=b" " * (32 * 2**20 + 1)), 413, None, "body_too_large")

    def test_too_large_in_pieces(self, http: httpx.Client, path: str) -> None:
        pieces = (b" " * 2**20 for _ in range(40))
        check(http.post(path, content=pieces), 413, None, "body_too_large")

    def test_unknown_model(self, http: httpx.Client, path: str) -> None:
        fields = {"/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [1]}}.get(path, COMPLETION)
        fields = (CHAT if "chat" in path else fields) | {"model": "gpt-4"}
        error = check(http.post(path, json=fields), 404, "model", "model_not_found")
        assert "gpt-4" in error["message"]
        assert MODEL in error["message"]

    def test_wrong_method(self, http: httpx.Client, path: str) -> None:
        response = http.get(path)
        check(response, 405, None)
        assert response.headers["allow"] == "POST"


class TestLength:
    @pytest.mark.parametrize("prompt", [[5] * LENGTH_MAX, "fox " * LENGTH_MAX, "x" * 10**6])
    def test_prompt(self, http: httpx.Client, prompt: Any) -> None:
        response = http.post("/v1/completions", json=COMPLETION | {"prompt": prompt})
        error = check(response, 400, "prompt", "context_length_exceeded")
        assert str(LENGTH_MAX) in error["message"]

    def test_one_of_several_prompts(self, http: httpx.Client) -> None:
        response = http.post("/v1/completions", json=COMPLETION | {"prompt": [[5], [6] * 300]})
        check(response, 400, "prompt[1]", "context_length_exceeded")

    def test_messages(self, http: httpx.Client) -> None:
        messages = [{"role": "user", "content": "fox " * LENGTH_MAX}]
        response = http.post("/v1/chat/completions", json=CHAT | {"messages": messages})
        check(response, 400, "messages", "context_length_exceeded")

    def test_prompt_and_new_tokens(self, http: httpx.Client) -> None:
        response = http.post("/v1/completions", json=COMPLETION | {"prompt": [5] * 200, "max_tokens": 100})
        error = check(response, 400, "max_tokens", "context_length_exceeded")
        assert all(number in error["message"] for number in ("256", "200", "100"))


class TestTokens:
    @pytest.mark.parametrize("fields", [{}, {"prompt": "x", "messages": HELLO}])
    def test_tokenize_needs_one_source(self, http: httpx.Client, fields: dict[str, Any]) -> None:
        check(http.post("/tokenize", json=fields), 400, "prompt")

    @pytest.mark.parametrize(
        ("tokens", "param"), [([-1], "tokens[0]"), (["x"], "tokens[0]"), (None, "tokens")]
    )
    def test_detokenize(self, http: httpx.Client, tokens: Any, param: str) -> None:
        check(http.post("/detokenize", json={"tokens": tokens}), 400, param)


def test_unknown_path(http: httpx.Client) -> None:
    check(http.get("/v1/nothing"), 404, None)


def test_the_real_client_raises_the_right_error(client: openai.OpenAI, gateway: FakeGateway) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="fox", n=1000)
    assert caught.value.param == "n"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="fox")
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
    ],
)
def test_no_http(http: httpx.Client, running: Running, data: bytes) -> None:
    with running.connect() as connection:
        received = b""
        # It may hang up at any byte: what is said after that fails, with ENOTCONN where a half-close meets the end.
        with suppress(OSError):
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
        with suppress(ConnectionError):
            while part := connection.recv(65536):
                received += part
    assert received == b"" or received.startswith(b"HTTP/1.1 400")
