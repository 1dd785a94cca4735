"""A load follows from its configuration and seed."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from headrace.types.errors import ConfigError
from headrace.workload.load import LoadConfig, plan_load


def test_one_seed_one_load() -> None:
    config = LoadConfig(prompts=20, request_rate=5, spread=0.5, seed=3)
    assert plan_load(config, 300) == plan_load(config, 300)
    assert plan_load(config, 300) != plan_load(
        LoadConfig(prompts=20, request_rate=5, spread=0.5, seed=4), 300
    )


def test_a_longer_load_begins_as_the_shorter() -> None:
    short, long = (plan_load(LoadConfig(prompts=n, request_rate=2, spread=0.3), 300) for n in (5, 50))
    assert long[:5] == short


def test_arrivals_have_the_rate() -> None:
    plan = plan_load(LoadConfig(prompts=4000, request_rate=20, input_tokens=1), 300)
    times = [request.at_s for request in plan]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(4000 / 20, rel=0.1)
    gaps = [b - a for a, b in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.1), "exponential gaps deviate by their mean"


def test_all_at_once() -> None:
    assert {request.at_s for request in plan_load(LoadConfig(prompts=9), 300)} == {0.0}


def test_lengths() -> None:
    plan = plan_load(LoadConfig(prompts=500, input_tokens=100, output_tokens=10, spread=0.2), 300)
    inputs = {len(request.prompt) for request in plan}
    outputs = {request.output_tokens for request in plan}
    assert (min(inputs), max(inputs)) == (80, 120)
    assert outputs == {8, 9, 10, 11, 12}
    exact = plan_load(LoadConfig(prompts=9, input_tokens=7, output_tokens=3), 300)
    assert {(len(r.prompt), r.output_tokens) for r in exact} == {(7, 3)}


def test_ids_are_in_the_vocabulary_and_share_a_prefix() -> None:
    plan = plan_load(LoadConfig(prompts=30, input_tokens=50, prefix_tokens=20), 40)
    prompts = [request.prompt for request in plan]
    assert all(isinstance(p, list) and len(p) == 70 and 0 <= min(p) <= max(p) < 40 for p in prompts)
    assert len({tuple(p[:20]) for p in prompts}) == 1
    assert len({tuple(p[20:]) for p in prompts}) == 30


def test_chat_gets_words() -> None:
    plan = plan_load(LoadConfig(prompts=2, endpoint="chat", input_tokens=9, prefix_tokens=3), 300)
    assert all(isinstance(r.prompt, str) and len(r.prompt.split()) == 12 for r in plan)


def test_text_files(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text(" ".join(str(i) for i in range(100)))
    plan = plan_load(LoadConfig(prompts=5, input_tokens=10, text=text), 300)
    for request in plan:
        assert isinstance(request.prompt, str)
        numbers = [int(word) for word in request.prompt.split()]
        assert numbers == list(range(numbers[0], numbers[0] + 10))


def test_json_lines(tmp_path: Path) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "a b", "max_tokens": 3, "more": 1}\n\n{"prompt": [1, 2]}\n')
    plan = plan_load(LoadConfig(prompts=3, output_tokens=9, text=lines), 300)
    assert [(r.prompt, r.output_tokens) for r in plan] == [("a b", 3), ([1, 2], 9), ("a b", 3)]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"prompts": 0}, "prompts"),
        ({"request_rate": 0.0}, "request_rate"),
        ({"concurrency": 0}, "concurrency"),
        ({"input_tokens": 0}, "input_tokens"),
        ({"output_tokens": 0}, "output_tokens"),
        ({"spread": 1.0}, "spread"),
        ({"prefix_tokens": -1}, "prefix_tokens"),
        ({"url": "localhost:8000"}, "url"),
        ({"text": Path("/nonexistent/prompts.jsonl")}, "cannot be read"),
    ],
)
def test_wrong_configurations_are_named(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        plan_load(LoadConfig(**fields), 300)


@pytest.mark.parametrize("content", ['{"prompt": 5}\n', "not json\n", '{"text": "x"}\n'])
def test_broken_lines_are_named(tmp_path: Path, content: str) -> None:
    lines = tmp_path / "prompts.jsonl"
    lines.write_text('{"prompt": "x"}\n' + content)
    with pytest.raises(ConfigError, match=r"prompts\.jsonl:2"):
        plan_load(LoadConfig(text=lines), 300)


def test_a_short_text_is_named(tmp_path: Path) -> None:
    text = tmp_path / "note.txt"
    text.write_text("few words")
    with pytest.raises(ConfigError, match="2 words"):
        plan_load(LoadConfig(text=text, input_tokens=10), 300)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(ConfigError, match="no prompt"):
        plan_load(LoadConfig(text=empty), 300)
    text.write_text("")
    with pytest.raises(ConfigError, match="0 words"):
        plan_load(LoadConfig(text=text, input_tokens=1), 300)
