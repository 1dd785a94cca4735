"""`headrace replay --verify DIR`: the journals of a recording, fed back to fresh cores."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from headrace.live.journal import CoreVerdict, Difference, verify

LINES_MAX = 20
"""Of events, and of commands that differ."""
CHARACTERS_MAX = 400
"""Of each line."""


def verify_recording(folder: Path, console: Console) -> bool:
    """Print a line a core, and where one first decides otherwise. True if none does. Raises ConfigError if there are no journals."""
    with console.status("feeding the journals to fresh cores"):
        verdicts = list(verify(folder))
    console.print(_table(verdicts))
    for verdict in verdicts:
        if verdict.problem:
            console.print(Text(f"{verdict.name}: {verdict.problem}", style="bold red"))
        if verdict.difference is not None:
            console.print(f"[bold red]{verdict.name} decides otherwise[/] at {_where(verdict.difference)}")
            for line in _story(verdict.difference):
                console.print(line)
    return all(verdict.ok for verdict in verdicts)


def _table(verdicts: list[CoreVerdict]) -> Table:
    table = Table()
    for name in ("core", "instants", "events", "digest", "verdict"):
        table.add_column(name, justify="right" if name in ("instants", "events") else "left", overflow="fold")
    for verdict in verdicts:
        counts = (f"{verdict.instants:,}", f"{verdict.events:,}")
        table.add_row(verdict.name, *counts, verdict.digest if verdict.ok else "", _word(verdict))
    return table


def _word(verdict: CoreVerdict) -> Text:
    if verdict.problem:
        return Text("cannot be read to its end", style="red")
    if verdict.difference is not None:
        return Text(f"differs at instant {verdict.difference.instant:,}", style="red")
    return Text("ok; its last record was cut short" if verdict.cut else "ok", style="green")


def _where(difference: Difference) -> str:
    return f"instant {difference.instant:,} ({difference.now_ns / 1e9:.6f} s on its clock)"


def _story(difference: Difference) -> list[Text]:
    styles = {"-": "red", "+": "green"}
    events = [f"  {event!r}" for event in difference.events]
    changes = difference.lines()
    return [
        Text("it was told:"),
        *(Text(_short(line), style="dim") for line in _first(events)),
        Text("what it says ('-' then, '+' now):"),
        *(Text(_short(line), style=styles.get(line[0], "")) for line in _first(changes)),
    ]


def _first(lines: list[str]) -> list[str]:
    left = len(lines) - LINES_MAX
    return lines if left <= 0 else [*lines[:LINES_MAX], f"  ... and {left} more"]


def _short(line: str) -> str:
    return line if len(line) <= CHARACTERS_MAX else f"{line[:CHARACTERS_MAX]} ..."
