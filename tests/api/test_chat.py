"""`/v1/chat/completions` through the real client over real HTTP."""

from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from headrace.api.tokenizer import Tokenizer
from tests.api.fakes import LENGTH_MAX, MODEL, FakeGateway

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " hello "}]


def create(client: openai.OpenAI, messages: Any = MESSAGES, **fields: Any) -> ChatCompletion:
    return client.chat.completions.create(model=MODEL, messages=messages, **fields)


def stream(client: openai.OpenAI, **fields: Any) -> list[ChatCompletionChunk]:
    options = {"include_usage": True}
    return list(create(client, stream=True, stream_options=options, **fields))  # type: ignore[call-overload]


def prompt_of(gateway: FakeGateway, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(gateway.submissions[-1].payload.token_ids, skip_special=False)


def test_an_answer(client: openai.OpenAI, gateway: FakeGateway, tokenizer: Tokenizer) -> None:
    gateway.text("你好, fox!")
    gateway.cached = 5
    answer = create(client)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content) == ("assistant", "你好, fox!")
    assert (choice.finish_reason, choice.message.refusal) == ("stop", None)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 5
    assert prompt_of(gateway, tokenizer) == "<s>[system] Be brief.\n[user] hello\n[assistant] "


def test_the_whole_context_is_open(client: openai.OpenAI, gateway: FakeGateway) -> None:
    answer = create(client, extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.total_tokens == LENGTH_MAX
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("fields", [{"max_completion_tokens": 7}, {"max_tokens": 7}])
def test_limits(client: openai.OpenAI, gateway: FakeGateway, fields: dict[str, Any]) -> None:
    answer = create(client, extra_body={"ignore_eos": True}, **fields)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 7


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, gateway: FakeGateway) -> None:
    fields: dict[str, Any] = {"n": 2, "seed": 9, "max_tokens": 30}
    whole = create(client, **fields)
    chunks = stream(client, **fields)
    roles = [choice.delta.role for chunk in chunks[:2] for choice in chunk.choices]
    assert roles == ["assistant", "assistant"]
    texts = {0: "", 1: ""}
    finishes: dict[int, str | None] = {}
    for chunk in chunks[2:-1]:
        (choice,) = chunk.choices
        assert choice.delta.role is None
        texts[choice.index] += choice.delta.content or ""
        finishes[choice.index] = choice.finish_reason or finishes.get(choice.index)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert finishes == {choice.index: choice.finish_reason for choice in whole.choices}
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_the_clients_own_stream_reader(client: openai.OpenAI, gateway: FakeGateway) -> None:
    """Its accumulator is strict about what chunks may say."""
    gateway.text("fox and dog")
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, logprobs=True) as events:  # type: ignore
        kinds = {event.type for event in events}
        final = events.get_final_completion()
    assert final.choices[0].message.content == "fox and dog"
    assert "content.delta" in kinds


class TestLogprobs:
    def test_content(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        gateway.text("fox 🦊")
        logprobs = create(client, logprobs=True, top_logprobs=3).choices[0].logprobs
        assert logprobs is not None
        assert logprobs.content is not None
        raw = b"".join(bytes(entry.bytes or []) for entry in logprobs.content[:-1])
        assert raw.decode() == "fox 🦊"
        assert all(len(entry.top_logprobs) == 3 for entry in logprobs.content)
        assert all(entry.logprob == -0.5 for entry in logprobs.content)

    def test_streamed(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        gateway.text("fox 🦊")
        whole = create(client, logprobs=True, top_logprobs=1).choices[0].logprobs
        parts = [
            entry
            for chunk in stream(client, logprobs=True, top_logprobs=1)
            for choice in chunk.choices
            if choice.logprobs is not None
            for entry in choice.logprobs.content or []
        ]
        assert whole is not None
        assert parts == whole.content

    def test_without_alternatives(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        logprobs = create(client, logprobs=True).choices[0].logprobs
        assert logprobs is not None
        assert all(entry.top_logprobs == [] for entry in logprobs.content or [])
        assert create(client).choices[0].logprobs is None


def test_stop_strings(client: openai.OpenAI, gateway: FakeGateway) -> None:
    gateway.text("one two three")
    answer = create(client, stop=[" three", "two th"])
    assert answer.choices[0].message.content == "one "
    assert answer.choices[0].finish_reason == "stop"
    text = "".join(
        choice.delta.content or ""
        for chunk in stream(client, stop=[" three", "two th"])
        for choice in chunk.choices
    )
    assert text == "one "


def test_text_parts_are_joined(client: openai.OpenAI, gateway: FakeGateway, tokenizer: Tokenizer) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    create(client, [{"role": "user", "content": parts}], max_tokens=1)
    assert prompt_of(gateway, tokenizer) == "<s>[user] one\ntwo\n[assistant] "


def test_earlier_tool_calls_reach_the_template(client: openai.OpenAI, gateway: FakeGateway) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"zone": "UTC"}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "noon"},
    ]
    assert create(client, messages, max_tokens=1).choices


def test_continues_the_final_message(
    client: openai.OpenAI, gateway: FakeGateway, tokenizer: Tokenizer
) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "Once upon"}]
    create(client, messages, max_tokens=1, extra_body={"continue_final_message": True})
    assert prompt_of(gateway, tokenizer).endswith("[assistant] Once upon")
    create(client, messages, max_tokens=1, extra_body={"add_generation_prompt": False})
    assert prompt_of(gateway, tokenizer).endswith("[assistant] Once upon\n")


def test_fields_that_ask_for_nothing(client: openai.OpenAI, gateway: FakeGateway) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    create(
        client,
        max_tokens=1,
        tools=[tool],
        tool_choice="none",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        modalities=["text"],
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
        user="bob",
        extra_body={"logit_bias": None, "stop": None, "function_call": "none", "use_beam_search": False},
    )
    assert gateway.submissions[0].request.tenant == "bob"


def test_token_ids(client: openai.OpenAI, gateway: FakeGateway) -> None:
    whole = create(client, seed=1, max_tokens=5, extra_body={"return_token_ids": True}).to_dict()
    assert whole["prompt_token_ids"] == gateway.submissions[0].payload.token_ids
    chunks = [
        c.to_dict() for c in stream(client, seed=1, max_tokens=5, extra_body={"return_token_ids": True})
    ]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    ids = [i for chunk in chunks for choice in chunk["choices"] for i in choice.get("token_ids", [])]  # type: ignore
    assert ids == whole["choices"][0]["token_ids"]  # type: ignore[index]
