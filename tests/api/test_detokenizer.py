"""Pieces of text, joined, are the text of all tokens, whatever characters the tokens cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.detokenizer import Detokenizer
from headrace.api.tokenizer import Tokenizer

TEXT = st.text(st.sampled_from("ab fox.\n é你好世🎉👩‍👧"), max_size=40)


def stream(tokenizer: Tokenizer, prompt: list[int], ids: list[int], skip_special: bool = True) -> str:
    detokenizer = Detokenizer(tokenizer, prompt, skip_special)
    return "".join(detokenizer.push(i) for i in ids) + detokenizer.flush()


@pytest.fixture(params=["tokenizer", "spaced"])
def either(request: pytest.FixtureRequest) -> Tokenizer:
    return request.getfixturevalue(request.param)


class TestPieces:
    @given(text=TEXT, cut=st.integers(0, 100))
    def test_join_to_the_text(self, tokenizer: Tokenizer, text: str, cut: int) -> None:
        ids = tokenizer.encode(text, special=False)
        before = tokenizer.decode(ids[:cut]).rstrip("\ufffd")
        assert before + stream(tokenizer, ids[:cut], ids[cut:]) == tokenizer.decode(ids)

    @given(text=TEXT, cut=st.integers(1, 100))
    def test_join_with_byte_fallback(self, spaced: Tokenizer, text: str, cut: int) -> None:
        ids = spaced.encode("fox " + text, special=False)
        raw = b"".join(spaced.token_bytes(i) for i in ids[:cut])
        before = raw.decode(errors="ignore").removeprefix(" ")
        assert before + stream(spaced, ids[:cut], ids[cut:]) == "fox " + text

    @given(ids=st.lists(st.integers(0, 380), max_size=120))
    def test_random_tokens(self, tokenizer: Tokenizer, ids: list[int]) -> None:
        assert stream(tokenizer, [], ids) == tokenizer.decode(ids)

    @given(ids=st.lists(st.integers(0, 399), max_size=120))
    def test_random_tokens_with_byte_fallback(self, spaced: Tokenizer, ids: list[int]) -> None:
        prompt = spaced.encode("fox", special=False)
        ids = [i % spaced.size for i in ids]
        raw = b"".join(spaced.token_bytes(i) for i in ids if i not in spaced.special_ids)
        assert stream(spaced, prompt, ids) == raw.decode(errors="replace")

    def test_a_space_before_the_first_word_is_kept(self, spaced: Tokenizer) -> None:
        ids = spaced.encode("The quick fox", special=False)
        prompt = spaced.encode("The", special=False)
        assert ids[: len(prompt)] == prompt
        assert stream(spaced, prompt, ids[len(prompt) :]) == " quick fox"

    def test_special_tokens_are_skipped_or_shown(self, either: Tokenizer) -> None:
        text = either.encode("fox", special=False)
        end = either.eos_ids[0]
        prompt = either.encode("The", special=False)
        assert "</s>" not in stream(either, prompt, [*text, end, *text])
        assert "</s>" in stream(either, prompt, [*text, end, *text], skip_special=False)


def test_a_character_is_shown_when_it_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦊", special=False)
    assert len(ids) > 1
    detokenizer = Detokenizer(tokenizer, [])
    assert [detokenizer.push(i) for i in ids] == [""] * (len(ids) - 1) + ["🦊"]


def test_an_unfinished_character_is_shown_at_the_end(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🦊", special=False)
    detokenizer = Detokenizer(tokenizer, [])
    assert [detokenizer.push(i) for i in ids[:-1]] == [""] * (len(ids) - 1)
    assert detokenizer.flush() == "\ufffd"


def test_the_window_stays_short(tokenizer: Tokenizer) -> None:
    """A token costs the same wherever it stands, even where nothing but broken bytes comes."""
    longest = 0
    decode = tokenizer.decode

    class Counting(Detokenizer):
        def _decode(self) -> str:
            nonlocal longest
            longest = max(longest, len(self._window))
            return decode(self._window)

    broken = tokenizer.encode("🦊", special=False)[0]
    for ids in (tokenizer.encode("fox " * 300, special=False), [broken] * 300, [10**6] * 300):
        detokenizer = Counting(tokenizer, [])
        for token_id in ids:
            detokenizer.push(token_id)
    assert longest <= 60
