"""ShareGPT, and the request files of vLLM's benchmarks: JSON (a list) or JSONL of conversations, or of prompts with their lengths.

Lengths need a tokenizer. Where an item has token counts (`prompt_len` and `output_len`, or their like) these are taken; a text's length
is otherwise estimated as characters / `characters_per_token`, which the trace's name then says. There are no times: conversations begin
by `arrivals`, and with `turns: all` the next turn comes when the answer has ended (30 ms a token) and `think_s` has passed. Numbers of bad
rows count items, from 1.
Leaves out: prefixes shared between conversations.
"""

from typing import Any, Literal

import msgspec
import numpy as np

from headrace.types.errors import ConfigError
from headrace.types.trace import Trace
from headrace.workload.arrivals import Arrivals, Poisson, instants
from headrace.workload.mix import stream
from headrace.workload.reading import ReadReport, Rows
from headrace.workload.sessions import Turns, spoken

PROMPT_COUNTS = (
    "prompt_len",
    "prompt_tokens",
    "num_prompt_tokens",
    "input_len",
    "input_tokens",
    "input_length",
)
OUTPUT_COUNTS = ("output_len", "output_tokens", "completion_tokens", "expected_output_len", "output_length")
ANSWERS = frozenset({"gpt", "assistant", "bot", "chatgpt", "bard"})
TOKEN_NS = 30_000_000

Exchange = tuple[int, int]
"""New tokens of the prompt, and tokens of the answer."""


class Config(msgspec.Struct, frozen=True):
    characters_per_token: float = 4.0
    turns: Literal["first", "all"] = "first"
    arrivals: Arrivals = Poisson()
    """Of conversations."""
    seed: int = 0
    think_s: float = 15.0
    block_size: int = 32
    """Of turns: all."""


def recognises(first_line: str) -> bool:
    begin = first_line[:4096]
    if begin.startswith("["):
        return begin[1:].lstrip()[:1] in ("{", "")
    return begin.startswith("{") and any(
        f'"{key}"' in begin for key in ("conversations", "messages", "prompt")
    )


def parse(text: str, name: str, report: ReadReport, config: Config, sort: bool) -> Trace:
    if not config.characters_per_token > 0:
        raise ConfigError(
            f"format sharegpt: characters_per_token is {config.characters_per_token}; give a number above 0"
        )
    found, estimated = _exchanges(_items(text, report), config, report)
    if not found:
        raise ConfigError(f"{report.path}: no good row; " + "; ".join(report.lines()))
    counts = np.array([len(turns) for turns in found], dtype=np.int64)
    asked, answered = np.array([exchange for turns in found for exchange in turns], dtype=np.int64).T
    session = np.repeat(np.arange(len(found)), counts)
    first = np.concatenate(([True], np.diff(session) != 0))
    if estimated:
        name += f", tokens estimated at {config.characters_per_token:g} characters each"
    return spoken(
        name,
        Turns(session, asked, answered, np.where(first, 0, round(config.think_s * 1e9))),
        instants(config.arrivals, len(found), stream(config.seed, "arrivals")),
        np.zeros(len(found), dtype=np.int64),
        np.zeros(1, dtype=np.int64),
        block_size=config.block_size,
        context_max=2**40,
        token_ns=TOKEN_NS,
    )


def _items(text: str, report: ReadReport) -> list[Any]:
    """Items of a list, or of lines. Something that is not JSON among lines is an item that is None."""
    if text.lstrip().startswith("["):
        try:
            return msgspec.json.decode(text, type=list[Any])
        except msgspec.DecodeError as error:
            raise ConfigError(f"{report.path}: is not JSON: {error}") from error
    items: list[Any] = []
    for line in filter(str.strip, text.split("\n")):
        try:
            items.append(msgspec.json.decode(line))
        except msgspec.DecodeError:
            items.append(None)
    return items


def _exchanges(items: list[Any], config: Config, report: ReadReport) -> tuple[list[list[Exchange]], bool]:
    """The exchanges of each good item, and whether any length is estimated."""
    rows = Rows(np.arange(1, len(items) + 1), report)
    found: list[list[Exchange]] = []
    wrong: dict[str, list[int]] = {}
    estimated = False
    for at, item in enumerate(items):
        turns, guessed = _turns(item, config.characters_per_token)
        if isinstance(turns, str):
            wrong.setdefault(turns, []).append(at)
            continue
        estimated |= guessed
        found.append(turns if config.turns == "all" else turns[:1])
    for reason, places in wrong.items():
        rows.reject(np.isin(np.arange(len(items)), places), reason)
    report.kept = len(found)
    return found, estimated


def _turns(item: Any, characters: float) -> tuple[list[Exchange] | str, bool]:
    """An item's exchanges, or what is wrong with it; and whether their lengths are estimated."""
    if not isinstance(item, dict):
        return "it is no JSON object", False
    given = _counted(item)
    if given is not None:
        return ([given], False) if min(given) > 0 else ("a token count is zero or negative", False)
    messages = item.get("conversations", item.get("messages"))
    if not isinstance(messages, list):
        return "it has neither token counts nor a conversation", False
    turns: list[Exchange] = []
    asked = 0
    for message in messages:
        if not isinstance(message, dict):
            return "a message is no JSON object", False
        who = str(message.get("from", message.get("role", ""))).lower()
        text = message.get("value", message.get("content"))
        tokens = max(1, round(len(text) / characters)) if isinstance(text, str) and text else 0
        if who in ANSWERS and asked and tokens:
            turns.append((asked, tokens))
            asked = 0
        else:
            asked += tokens
    return (turns, True) if turns else ("it has no question with an answer", False)


def _counted(item: dict[str, Any]) -> Exchange | None:
    """Token counts that the item has."""
    prompt = next((item[name] for name in PROMPT_COUNTS if type(item.get(name)) is int), None)
    output = next((item[name] for name in OUTPUT_COUNTS if type(item.get(name)) is int), None)
    return (prompt, output) if prompt is not None and output is not None else None
