"""Stop strings are found wherever the text is cut, and nothing is lost before them."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headrace.api.stop import StopFinder

TEXT = st.text("abc", max_size=30)
STOPS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=3)


def first_stop(text: str, stops: list[str]) -> tuple[int, str] | None:
    """End and name of the stop string that is complete first, the longest of those complete there."""
    for end in range(1, len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return end, stop
    return None


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


@given(TEXT, STOPS, st.lists(st.integers(0, 30), max_size=6), st.booleans())
def test_any_cut_finds_the_same(text: str, stops: list[str], cuts: list[int], include: bool) -> None:
    finder = StopFinder(tuple(stops), include)
    shown = ""
    stopped: str | None = None
    for piece in pieces_of(text, cuts):
        found = finder.push(piece)
        shown += found.text
        stopped = found.stop
        if stopped is not None:
            break
    else:
        shown += finder.flush()
    expected = first_stop(text, stops)
    if expected is None:
        assert (shown, stopped) == (text, None)
    else:
        end, stop = expected
        assert (shown, stopped) == (text[: end if include else end - len(stop)], stop)


@given(TEXT, STOPS)
def test_holds_back_only_what_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    finder = StopFinder(tuple(stops))
    shown = ""
    for at, char in enumerate(text):
        found = finder.push(char)
        shown += found.text
        if found.stop is not None:
            return
        held = text[: at + 1].removeprefix(shown)
        assert held == "" or any(stop.startswith(held) for stop in stops)


def test_text_passes_without_stop_strings() -> None:
    finder = StopFinder(())
    assert finder.push("anything").text == "anything"
    assert finder.flush() == ""


@pytest.mark.parametrize("stop", ["\n\n", "好的", "🎉"])
def test_other_scripts(stop: str) -> None:
    finder = StopFinder((stop,))
    shown = [finder.push(char).text for char in f"before{stop[:-1]}x"]
    assert "".join(shown) + finder.flush() == f"before{stop[:-1]}x"
