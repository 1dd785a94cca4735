"""A checkpoint's text half, read as `transformers` reads it."""

import json
from pathlib import Path
from typing import Any

import pytest

import headrace
from headrace.api.chat import ChatError, ChatTemplate
from headrace.api.tokenizer import Tokenizer, byte_alphabet
from headrace.types.errors import CheckpointError, ConfigError
from tests.api.fakes import TEMPLATE, byte_level, sentencepiece, write_checkpoint

HELLO = [{"role": "user", "content": "hello"}]
OLD_TEMPLATE = """{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}
{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}
{% endfor %}
{%- set ns = namespace(last='') %}
{% for m in messages %}{% set ns.last = m['role'] %}{% endfor %}
{% generation %}{{ ns.last }} {{ messages | tojson }}{% endgeneration %}
{% if add_generation_prompt %}assistant:{% endif %}"""


def load(folder: Path, **config: Any) -> Tokenizer:
    return Tokenizer.load(write_checkpoint(folder, byte_level(), **config))


def test_reads_special_tokens(tmp_path: Path) -> None:
    config = {"eos_token": {"content": "<|end|>", "special": True}}
    write_checkpoint(tmp_path, byte_level(), **config)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 7], "temperature": 0.6, "x": 1}')
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.bos_id == 0
    assert tokenizer.eos_ids == (1, 2, 7)
    assert tokenizer.defaults.temperature == 0.6
    assert tokenizer.defaults.top_p is None


@pytest.mark.parametrize(("add_bos", "expected"), [(True, True), (False, False), (None, False)])
def test_begins_texts_as_configured(tmp_path: Path, add_bos: bool | None, expected: bool) -> None:
    tokenizer = load(tmp_path, add_bos_token=add_bos)
    assert (tokenizer.encode("fox")[0] == tokenizer.bos_id) is expected
    assert tokenizer.encode("fox", special=False)[0] != tokenizer.bos_id


def test_begins_no_text_twice(tmp_path: Path) -> None:
    tokenizer = load(tmp_path, add_bos_token=True)
    assert tokenizer.encode("<s>fox").count(0) == 1


def test_forgets_truncation_of_training(tmp_path: Path) -> None:
    rust = byte_level()
    rust.enable_truncation(4)
    rust.enable_padding(length=99)
    tokenizer = Tokenizer.load(write_checkpoint(tmp_path, rust))
    assert 9 < len(tokenizer.encode("a b c d e f g h i j")) < 99


def test_template_sources(tmp_path: Path) -> None:
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    tokenizer = load(tmp_path, chat_template=named)
    assert tokenizer.chat is not None
    assert tokenizer.chat.render(HELLO) == "D"
    (tmp_path / "chat_template.jinja").write_text("J")
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.chat is not None
    assert tokenizer.chat.render(HELLO) == "J"
    other = tmp_path / "other.jinja"
    other.write_text("O")
    tokenizer = Tokenizer.load(tmp_path, chat_template=other)
    assert tokenizer.chat is not None
    assert tokenizer.chat.render(HELLO) == "O"


def test_no_template(tmp_path: Path) -> None:
    assert load(tmp_path, chat_template=None).chat is None


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{}", "tokenizer.json cannot be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json cannot be read"),
        ("tokenizer_config.json", "[]", "holds no JSON object"),
        ("generation_config.json", '{"top_k": "many"}', "generation_config.json"),
        ("chat_template.jinja", "{% if %}", "does not compile"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str | None, complaint: str) -> None:
    write_checkpoint(tmp_path, byte_level())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=complaint):
        Tokenizer.load(tmp_path)


def test_a_missing_template_file_names_the_flag(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, byte_level())
    with pytest.raises(ConfigError, match="--chat-template"):
        Tokenizer.load(tmp_path, chat_template=tmp_path / "absent")


def test_token_bytes(tokenizer: Tokenizer, spaced: Tokenizer) -> None:
    text = "The fox, 你好 🦊"
    for one in (tokenizer, spaced):
        ids = one.encode(text, special=False)
        assert b"".join(one.token_bytes(i) for i in ids).decode().lstrip() == text
    part = tokenizer.encode("🦊", special=False)[0]
    assert tokenizer.token_text(part).startswith("bytes:\\xf0")
    assert tokenizer.token_text(0) == "<s>"
    assert tokenizer.token_text(10**6) == ""
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_the_bundled_checkpoint() -> None:
    """What `headrace serve` serves without a model."""
    folder = Path(headrace.__file__).parent / "assets" / "headrace-python-5m"
    tokenizer = Tokenizer.load(folder)
    text = "def add(a, b):\n    return a + b  # 你好\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_ids


class TestTemplates:
    def render(self, source: str, **options: Any) -> str:
        return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}).render(HELLO, **options)

    def test_continues_the_final_message(self) -> None:
        messages = [*HELLO, {"role": "assistant", "content": "Once upon "}]
        template = ChatTemplate(TEMPLATE, {"bos_token": "<s>"})
        text = template.render(messages, add_generation_prompt=False, continue_final_message=True)
        assert text == "<s>[user] hello\n[assistant] Once upon "

    def test_reports_what_a_template_raises(self) -> None:
        with pytest.raises(ChatError, match="alternate"):
            self.render("{{ raise_exception('roles must alternate') }}")

    @pytest.mark.parametrize(
        "source",
        [
            "{{ ''.__class__ }}",
            "{{ messages.append(1) }}",
            "{{ dict.__init__ }}",
            "{% set ns = namespace(__class__=1) %}",
            "{{ namespace.__init__.__globals__ }}",
            "{% for i in range(10**9) %}{% endfor %}",
            "{{ 1 / 0 }}",
        ],
    )
    def test_is_a_sandbox(self, source: str) -> None:
        """Nothing of Python is reached: the text is empty, or the template refused."""
        try:
            text = self.render(source)
        except ChatError:
            return
        assert text == ""

    def test_options_reach_the_template(self) -> None:
        assert self.render("{{ enable_thinking }}", options={"enable_thinking": False}) == "False"

    def test_options_do_not_replace_the_messages(self) -> None:
        assert self.render("{{ messages[0].content }}", options={"messages": [], "bos_token": "x"}) == "hello"

    def test_dates(self) -> None:
        assert len(self.render("{{ strftime_now('%Y') }}")) == 4


@pytest.mark.parametrize("source", [TEMPLATE, OLD_TEMPLATE])
def test_agrees_with_transformers(tmp_path: Path, source: str) -> None:
    from transformers import PreTrainedTokenizerFast

    rust = sentencepiece()
    tokenizer = Tokenizer.load(write_checkpoint(tmp_path, rust, chat_template=source))
    assert tokenizer.chat is not None
    oracle = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=source,
    )
    messages = [*HELLO, {"role": "assistant", "content": '"<b>" 你好'}, {"role": "user", "content": " fox\n"}]
    for generate in (True, False):
        text = tokenizer.chat.render(messages, add_generation_prompt=generate)
        expected = oracle.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
        assert text == expected
        assert tokenizer.encode(text, special=False) == oracle.encode(text, add_special_tokens=False)
    assert json.dumps(messages, ensure_ascii=False) in expected or source is TEMPLATE
