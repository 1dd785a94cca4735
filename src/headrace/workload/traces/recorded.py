"""Headrace's own recordings, and how every other trace is kept: JSONL, one line a request, in order of arrival.

Block ids are integers that mean something within one recording only: a block's hash under a key that is not kept (`live.record`). Each
choice of a request has its own output length, finish reason and output blocks; it becomes a row of its own. `output_blocks` are the full
blocks that the answer filled, the one that holds the prompt's end among them. From them it is known which prompt goes on from which answer.
No text is recorded. A choice that gave no token has failed, and is left out unless asked for.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Annotated

import msgspec
import numpy as np

from headrace.types.errors import ConfigError
from headrace.types.request import Slo
from headrace.types.trace import Ints, Trace
from headrace.workload.lines import decode
from headrace.workload.reading import Floats, ReadReport, Rows, classes, finish

Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
Time = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]


NO_GOAL = Slo()


class Config(msgspec.Struct, frozen=True):
    failed: bool = False
    """Keep choices that gave no token, as such that want one."""


class Line(msgspec.Struct, frozen=True):
    """One request."""

    arrival_ns: Time
    """From the recording's begin."""
    prompt: Count
    """Tokens."""
    output: list[Count]
    """Tokens of each choice."""
    block_size: Count = 0
    """Tokens a block; 0: no ids."""
    prompt_blocks: list[Id] = []
    """Of the prompt's full blocks."""
    output_blocks: list[list[Id]] = []
    """By choice: of the full blocks after those."""
    category: str = ""
    tenant: str = ""
    priority: Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31)] = 0
    ttft_ns: Count | None = None
    """Goals."""
    tpot_ns: Count | None = None
    session: Annotated[int, msgspec.Meta(ge=-1, le=2**62)] = -1
    hidden: Count = 0
    """Leading tokens of each choice that the user does not see."""
    finish: list[str] = []
    """By choice: `stop`, `length`, or the kind of error."""


def line_of(
    *,
    arrival_ns: int,
    prompt: int,
    output: Sequence[int],
    block_size: int,
    prompt_blocks: Sequence[int],
    output_blocks: Sequence[Sequence[int]],
    finish: Sequence[str] = (),
    category: str = "",
    tenant: str = "",
    priority: int = 0,
    goal: Slo = NO_GOAL,
    session: int = -1,
    hidden: int = 0,
) -> bytes:
    """One request as a line, its newline too. `output`, `output_blocks` and `finish` have one entry a choice."""
    line = Line(
        arrival_ns=arrival_ns,
        prompt=prompt,
        output=list(output),
        block_size=block_size,
        prompt_blocks=list(prompt_blocks),
        output_blocks=[list(blocks) for blocks in output_blocks],
        category=category,
        tenant=tenant,
        priority=priority,
        ttft_ns=goal.ttft_ns,
        tpot_ns=goal.tpot_ns,
        session=session,
        hidden=hidden,
        finish=list(finish),
    )
    return msgspec.json.encode(line) + b"\n"


def lines_of(trace: Trace) -> list[bytes]:
    """Any trace as lines, in its order."""
    answers = _answer_blocks(trace)
    flat, starts = trace.hash_ids.tolist(), trace.hash_starts.tolist()
    names = ("arrival_ns", "prompt", "output", "category", "tenant", "priority", "goal", "session", "hidden")
    columns = zip(*(getattr(trace, name).tolist() for name in names), strict=True)
    return [
        line_of(
            arrival_ns=arrival,
            prompt=prompt,
            output=(output,),
            block_size=trace.block_size,
            prompt_blocks=flat[starts[row] : starts[row + 1]],
            output_blocks=(answers.get(row, []),),
            category=trace.categories[category],
            tenant=trace.tenants[tenant],
            priority=priority,
            goal=trace.goals[goal],
            session=session,
            hidden=hidden,
        )
        for row, (arrival, prompt, output, category, tenant, priority, goal, session, hidden) in enumerate(
            columns
        )
    ]


def _answer_blocks(trace: Trace) -> dict[int, list[int]]:
    """Of rows with a later turn: ids of the full blocks that the answer filled, as that turn's prompt tells them."""
    found: dict[int, list[int]] = {}
    for row in np.flatnonzero(trace.follows >= 0).tolist():
        earlier = int(trace.follows[row])
        begin = int(trace.prompt[earlier]) // trace.block_size if trace.block_size else 0
        end = int(trace.prompt[earlier] + trace.output[earlier]) // max(trace.block_size, 1)
        found.setdefault(earlier, trace.hashes(row)[begin:end].tolist())
    return found


def recognises(first_line: str) -> bool:
    return first_line.startswith("{") and '"arrival_ns"' in first_line and '"prompt_blocks"' in first_line


def parse(text: str, name: str, report: ReadReport, config: Config, sort: bool) -> Trace:
    rows, lines, answers = _choices(text, report)
    prompt = rows.tokens(_floats([line.prompt for line, _ in lines]), "prompt")
    tokens = _floats(answers)
    if config.failed:
        report.notes.append(f"{int((tokens == 0).sum()):,} failed requests are kept, with one token to come")
        tokens = np.maximum(tokens, 1)
    else:
        rows.fail(tokens == 0)
    output = rows.tokens(tokens, "output")
    size = _block_size(rows, lines, report)
    rows.reject(
        _floats([len(line.prompt_blocks) for line, _ in lines]) * max(size, 1) > prompt,
        "it has more prompt_blocks than full blocks",
    )
    category, categories = classes([line.category for line, _ in lines])
    tenant, tenants = classes([line.tenant for line, _ in lines])
    goal, goals = classes([(line.ttft_ns, line.tpot_ns) for line, _ in lines])
    ids = [line.prompt_blocks for line, _ in lines]
    return finish(
        name,
        rows,
        np.array([line.arrival_ns for line, _ in lines], dtype=np.int64),
        prompt,
        output,
        sort=sort,
        block_size=size,
        hash_ids=np.fromiter(chain.from_iterable(ids), dtype=np.int64),
        hash_starts=np.cumsum([0, *map(len, ids)], dtype=np.int64),
        category=category,
        categories=categories,
        tenant=tenant,
        tenants=tenants,
        goal=goal,
        goals=tuple(Slo(*times) for times in goals),
        priority=np.array([line.priority for line, _ in lines], dtype=np.int64),
        session=np.array([line.session for line, _ in lines], dtype=np.int64),
        hidden=np.array([line.hidden for line, _ in lines], dtype=np.int64),
        follows=_follows(lines),
    )


def _choices(text: str, report: ReadReport) -> tuple[Rows, list[tuple[Line, int]], list[int]]:
    """A row for each choice: its request, its number, and its tokens."""
    read, requests = decode(text, Line, Line(0, 1, [1]), report)
    several = sum(len(line.output) > 1 for line in requests)
    if several:
        report.notes.append(f"{several:,} requests had several choices; each choice is a row")
    counts = [max(len(line.output), 1) for line in requests]
    of_row = np.repeat(np.arange(len(requests)), counts)
    report.rows -= len(requests)
    rows = Rows(read.numbers[of_row], report)
    rows.good = read.good[of_row]
    lines = [(line, choice) for line, count in zip(requests, counts, strict=True) for choice in range(count)]
    return rows, lines, [tokens for line in requests for tokens in line.output or (0,)]


def _block_size(rows: Rows, lines: list[tuple[Line, int]], report: ReadReport) -> int:
    sizes = {line.block_size for (line, _), good in zip(lines, rows.good.tolist(), strict=True) if good}
    sizes.discard(0)
    if len(sizes) > 1:
        raise ConfigError(
            f"{report.path}: has blocks of {' and '.join(map(str, sorted(sizes)))} tokens; a trace has one size"
        )
    return min(sizes, default=0)


def _follows(lines: list[tuple[Line, int]]) -> Ints:
    """The latest earlier row whose answer filled a block of this row's prompt: the deepest such block decides."""
    answered: dict[int, int] = {}
    follows = np.full(len(lines), -1, dtype=np.int64)
    for row, (line, choice) in enumerate(lines):
        follows[row] = next(
            (answered[block] for block in reversed(line.prompt_blocks) if block in answered), -1
        )
        if choice < len(line.output_blocks):
            answered.update(dict.fromkeys(line.output_blocks[choice], row))
    return follows


def _floats(values: Sequence[int]) -> Floats:
    return np.array(values, dtype=np.float64)
