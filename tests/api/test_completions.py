"""`/v1/completions` through the real client over real HTTP."""

from typing import Any

import openai
import pytest
from openai.types import Completion

from headrace.api.tokenizer import Tokenizer
from tests.api.fakes import LENGTH_MAX, MODEL, FakeGateway

PROMPT = "The quick brown fox"


class Streamed:
    """A stream's chunks, joined."""

    def __init__(self, chunks: list[Completion]) -> None:
        self.chunks = chunks
        choices = [choice for chunk in chunks for choice in chunk.choices]
        self.texts: dict[int, str] = {}
        self.finishes: dict[int, str] = {}
        for choice in choices:
            self.texts[choice.index] = self.texts.get(choice.index, "") + choice.text
            if choice.finish_reason:
                assert choice.index not in self.finishes, "a choice ends once"
                self.finishes[choice.index] = choice.finish_reason
        self.usage = chunks[-1].usage


def create(client: openai.OpenAI, prompt: Any = PROMPT, **fields: Any) -> Completion:
    extra = {name: fields.pop(name) for name in list(fields) if name in EXTRA}
    return client.completions.create(model=MODEL, prompt=prompt, extra_body=extra, **fields)


def stream(client: openai.OpenAI, prompt: Any = PROMPT, **fields: Any) -> Streamed:
    fields["stream_options"] = {"include_usage": True} | fields.get("stream_options", {})
    return Streamed(list(create(client, prompt, stream=True, **fields)))  # type: ignore[call-overload]


EXTRA = {
    "ignore_eos", "min_tokens", "stop_token_ids", "top_k", "min_p", "repetition_penalty", "priority", "cache_salt",
    "include_stop_str_in_output", "skip_special_tokens", "return_token_ids", "return_tokens_as_token_ids",
    "ttft_slo_ms", "tpot_slo_ms", "category", "add_special_tokens", "return_timings",
}  # fmt: skip


def test_text_in_text_out(client: openai.OpenAI, gateway: FakeGateway, tokenizer: Tokenizer) -> None:
    gateway.text("jumps over 你好 🎉")
    gateway.cached = 3
    answer = create(client, max_tokens=100)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason, choice.index) == ("jumps over 你好 🎉", "stop", 0)
    assert answer.id.startswith("cmpl-")
    assert (answer.object, answer.model) == ("text_completion", MODEL)
    assert answer.system_fingerprint == "headrace-0.1.0-fake-numerics"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert answer.usage.completion_tokens == len(gateway.script or []) + 1
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_sixteen_tokens_unless_told(client: openai.OpenAI, gateway: FakeGateway) -> None:
    answer = create(client, ignore_eos=True)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("stride", [1, 3, 50])
def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, gateway: FakeGateway, stride: int) -> None:
    gateway.stride = stride
    fields: dict[str, Any] = {"max_tokens": 40, "n": 3, "seed": 5, "ignore_eos": True}
    whole = create(client, **fields)
    streamed = stream(client, **fields)
    assert streamed.texts == {choice.index: choice.text for choice in whole.choices}
    assert len(set(streamed.texts.values())) == 3
    assert streamed.finishes == {0: "length", 1: "length", 2: "length"}
    assert streamed.usage == whole.usage
    assert all(chunk.usage is None for chunk in streamed.chunks[:-1])
    assert {chunk.id for chunk in streamed.chunks} == {streamed.chunks[0].id}


def test_usage_with_every_chunk(client: openai.OpenAI, gateway: FakeGateway) -> None:
    streamed = stream(client, max_tokens=5, seed=1, stream_options={"continuous_usage_stats": True})
    counts = [chunk.usage.completion_tokens for chunk in streamed.chunks if chunk.usage]
    assert len(counts) == len(streamed.chunks)
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_no_usage_unless_asked(client: openai.OpenAI, gateway: FakeGateway) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt=PROMPT, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_seeds(client: openai.OpenAI, gateway: FakeGateway) -> None:
    texts = [create(client, seed=seed).choices[0].text for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]
    create(client)
    create(client)
    unseeded = [submission.payload.sampling.seed for submission in gateway.submissions[-2:]]
    assert unseeded[0] != unseeded[1]


class TestPrompts:
    def test_token_ids(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        create(client, [5, 6, 7])
        assert gateway.submissions[0].payload.token_ids == [5, 6, 7]
        assert gateway.submissions[0].request.prompt == 3

    def test_several(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        prompts = ["fox", "dog", "END"]
        whole = create(client, prompts, n=2, seed=3, max_tokens=6)
        assert [choice.index for choice in whole.choices] == list(range(6))
        assert len(gateway.submissions) == 3
        assert [s.request.choices for s in gateway.submissions] == [2, 2, 2]
        streamed = stream(client, prompts, n=2, seed=3, max_tokens=6)
        assert streamed.texts == {choice.index: choice.text for choice in whole.choices}
        assert streamed.usage == whole.usage
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 36

    def test_several_as_token_ids(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        answer = create(client, [[5, 6], [7], [8, 9, 10]])
        assert [s.payload.token_ids for s in gateway.submissions] == [[5, 6], [7], [8, 9, 10]]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == 6

    def test_cached_tokens_count_once_a_prompt(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        """Choice c finds `cached + c`: what it finds of its siblings was not cached before the request."""
        gateway.cached = 2
        answer = create(client, ["fox jumps", "lazy dog"], n=3)
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 4

    def test_full_context(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        answer = create(client, [5] * (LENGTH_MAX - 1))
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 1

    @pytest.mark.parametrize("prompt", ["fox 你好", [70, 71, 72]])
    def test_echo(
        self, client: openai.OpenAI, gateway: FakeGateway, tokenizer: Tokenizer, prompt: Any
    ) -> None:
        shown = prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
        gateway.text(" and so on")
        assert create(client, prompt, echo=True).choices[0].text == shown + " and so on"
        assert stream(client, prompt, echo=True, n=2).texts == dict.fromkeys(range(2), shown + " and so on")


class TestStops:
    @pytest.mark.parametrize("stride", [1, 4, 99])
    @pytest.mark.parametrize("include", [False, True])
    def test_across_tokens(
        self, client: openai.OpenAI, gateway: FakeGateway, tokenizer: Tokenizer, stride: int, include: bool
    ) -> None:
        before, after = "The fox jumps ove", "r the lazy dog"
        gateway.text(before + after)
        gateway.stride = stride
        fields: dict[str, Any] = {"stop": ["er th", "never"], "max_tokens": 60, "logprobs": 0}
        fields["include_stop_str_in_output"] = include
        shown = "The fox jumps over th" if include else "The fox jumps ov"
        drawn = next(
            k for k in range(99) if "er th" in tokenizer.decode(tokenizer.encode(before + after)[:k])
        )
        whole, streamed = create(client, **fields), stream(client, **fields)
        assert whole.choices[0].text == streamed.texts[0] == shown
        assert whole.choices[0].finish_reason == streamed.finishes[0] == "stop"
        assert whole.choices[0].to_dict()["stop_reason"] == "er th"
        assert whole.usage is not None
        assert whole.usage.completion_tokens == drawn
        assert whole.choices[0].logprobs is not None
        assert len(whole.choices[0].logprobs.tokens or []) == drawn
        tokens = [t for c in streamed.chunks for choice in c.choices for t in choice.logprobs.tokens]  # type: ignore
        assert tokens == whole.choices[0].logprobs.tokens
        if stride == 1:
            assert gateway.withdrawn == [(s.request.id, 0) for s in gateway.submissions]

    def test_ends_one_choice_and_not_the_others(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        texts = [choice.text for choice in create(client, n=3, seed=2, max_tokens=30).choices]
        gateway.reset()
        stop = texts[1][5:8]
        expected = [text.split(stop)[0] for text in texts]
        assert expected[0] == texts[0]
        answer = create(client, n=3, seed=2, max_tokens=30, stop=stop)
        assert [choice.text for choice in answer.choices] == expected
        assert [choice for _, choice in gateway.withdrawn] == [1]

    def test_what_might_begin_a_stop_is_given_at_the_end(
        self, client: openai.OpenAI, gateway: FakeGateway
    ) -> None:
        gateway.text("fox STO")
        assert create(client, stop="STOP", max_tokens=60).choices[0].text == "fox STO"
        assert stream(client, stop="STOP", max_tokens=60).texts[0] == "fox STO"

    def test_token_ids(self, client: openai.OpenAI, gateway: FakeGateway, tokenizer: Tokenizer) -> None:
        gateway.text("fox. dog")
        dot = tokenizer.encode(".", special=False)[0]
        choice = create(client, stop_token_ids=[dot], max_tokens=60).choices[0]
        assert (choice.text, choice.to_dict()["stop_reason"]) == ("fox", dot)
        included = create(client, stop_token_ids=[dot], max_tokens=60, include_stop_str_in_output=True)
        assert included.choices[0].text == "fox."

    def test_not_before_min_tokens(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        gateway.text("aaaa aaaa aaaa")
        answer = create(client, stop="aa", min_tokens=6, max_tokens=60)
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 8

    def test_special_tokens(self, client: openai.OpenAI, gateway: FakeGateway, tokenizer: Tokenizer) -> None:
        end = tokenizer.encode("<|end|>", special=False)
        gateway.script = [*tokenizer.encode("fox", special=False), *end]
        assert create(client).choices[0].text == "fox"
        assert create(client, skip_special_tokens=False).choices[0].text == "fox<|end|>"


class TestLogprobs:
    def test_parallel_lists(self, client: openai.OpenAI, gateway: FakeGateway, tokenizer: Tokenizer) -> None:
        gateway.text("fox 你 🦊")
        lists = create(client, logprobs=2).choices[0].logprobs
        assert lists is not None
        assert lists.tokens is not None
        assert lists.text_offset is not None
        assert lists.top_logprobs is not None
        assert len(lists.tokens) == len(lists.text_offset) == len(lists.top_logprobs)
        assert lists.token_logprobs == [-0.5] * len(lists.tokens)
        assert [len(top) for top in lists.top_logprobs] == [2] * len(lists.tokens)
        assert lists.text_offset == sorted(lists.text_offset)
        assert any(token.startswith("bytes:\\x") for token in lists.tokens)

    def test_streamed(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        gateway.text("fox 你 🦊 and more")
        whole = create(client, logprobs=3, max_tokens=50).choices[0].logprobs
        joined: dict[str, list[Any]] = {}
        for chunk in stream(client, logprobs=3, max_tokens=50).chunks:
            for choice in chunk.choices:
                assert choice.logprobs is not None
                for name, values in choice.logprobs.to_dict().items():
                    joined.setdefault(name, []).extend(values)  # type: ignore[arg-type]
        assert whole is not None
        assert joined == whole.to_dict()

    def test_none_unless_asked(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        assert create(client).choices[0].logprobs is None

    def test_tokens_as_ids(self, client: openai.OpenAI, gateway: FakeGateway) -> None:
        answer = create(client, logprobs=1, return_tokens_as_token_ids=True, return_token_ids=True)
        choice = answer.choices[0]
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == [f"token_id:{i}" for i in choice.to_dict()["token_ids"]]  # type: ignore


def test_token_ids_of_prompt_and_answer(client: openai.OpenAI, gateway: FakeGateway) -> None:
    whole = create(client, [5, 6], return_token_ids=True, seed=4).choices[0].to_dict()
    assert whole["prompt_token_ids"] == [5, 6]
    streamed = stream(client, [5, 6], return_token_ids=True, seed=4)
    choices = [choice.to_dict() for chunk in streamed.chunks for choice in chunk.choices]
    assert choices[0]["prompt_token_ids"] == [5, 6]
    assert [i for choice in choices for i in choice.get("token_ids", [])] == whole["token_ids"]


@pytest.mark.parametrize("streamed", [True, False])
def test_timings_of_every_choice(client: openai.OpenAI, gateway: FakeGateway, streamed: bool) -> None:
    fields: dict[str, Any] = {"n": 2, "max_tokens": 3, "ignore_eos": True, "return_timings": True}
    usage = stream(client, **fields).usage if streamed else create(client, **fields).usage
    assert usage is not None
    timings: Any = usage.to_dict()["timings"]
    assert [timing["completion_tokens"] for timing in timings] == [3, 3]
    assert [timing["writes"] for timing in timings] == [2, 2]
    plain = create(client).usage
    assert plain is not None
    assert "timings" not in plain.to_dict()


def test_everything_asked_reaches_the_service(client: openai.OpenAI, gateway: FakeGateway) -> None:
    create(
        client, temperature=0.5, top_p=0.9, presence_penalty=0.1, frequency_penalty=-0.2, logit_bias={"7": -100, "9": 5},
        seed=-3, top_k=40, min_p=0.05, repetition_penalty=1.1, stop_token_ids=[11, 12], ignore_eos=True, min_tokens=2,
        max_tokens=9, logprobs=4, priority=-5, cache_salt="tenant", user="alice", ttft_slo_ms=200, tpot_slo_ms=12.5,
        category="chat", n=2,
    )  # fmt: skip
    submission = gateway.submissions[0]
    sampling, request = submission.payload.sampling, submission.request
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.05)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.1, -0.2)
    assert sampling.repetition_penalty == 1.1
    assert sampling.logit_bias == {7: -100, 9: 5}
    assert sampling.seed == 2**63 - 3
    assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.min_tokens) == ((11, 12), True, 2)
    assert (sampling.tokens_max, sampling.logprobs) == (9, 4)
    assert (request.tokens_max, request.choices, request.priority) == (9, 2, -5)
    assert (request.tenant, request.category) == ("alice", "chat")
    assert (request.slo.ttft_ns, request.slo.tpot_ns) == (200_000_000, 12_500_000)
    assert submission.payload.root == gateway.root("tenant") != gateway.root("")


def test_hashes_chain_over_full_blocks(client: openai.OpenAI, gateway: FakeGateway) -> None:
    create(client, list(range(5, 25)))
    create(client, [*range(5, 21), 99])
    create(client, list(range(5, 25)), cache_salt="x")
    one, two, salted = (submission.request.hashes for submission in gateway.submissions)
    assert one == two
    assert len(one) == 2
    assert set(one).isdisjoint(salted)


def test_small_temperatures_mean_greedy(client: openai.OpenAI, gateway: FakeGateway) -> None:
    create(client, temperature=1e-7, top_k=-1)
    sampling = gateway.submissions[0].payload.sampling
    assert (sampling.temperature, sampling.top_k) == (0, 0)
