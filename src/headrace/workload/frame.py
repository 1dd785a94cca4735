"""The frame of a report's HTML page: one file, nothing loaded from elsewhere, readable light and dark, on screen and on paper."""

from collections.abc import Iterable, Sequence
from html import escape

STYLE = """
:root{color-scheme:light dark;--ground:#fff;--card:#f5f6f8;--text:#1a1d21;--faint:#5b6470;--line:#d8dce2;--good:#15803d;--bad:#b91c1c}
@media(prefers-color-scheme:dark){:root{--ground:#14171b;--card:#1e2329;--text:#e6e9ed;--faint:#9aa4b0;--line:#343b44;--good:#4ade80;
--bad:#f87171}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:24px;background:var(--ground);color:var(--text);font:15px/1.5 system-ui,sans-serif}
h1{font-size:24px;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;margin:32px 0 8px;border-bottom:1px solid var(--line);padding-bottom:4px}
p{margin:4px 0;max-width:100ch}
.origin{font-weight:600}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:10px;margin:16px 0}
.card{background:var(--card);border-radius:8px;padding:10px 12px}
.card b{display:block;font-size:20px;line-height:1.3}
.card span,figcaption,.note{color:var(--faint);font-size:13px}
.tables{display:flex;flex-wrap:wrap;gap:0 48px}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(480px,100%),1fr));gap:18px}
figure{margin:0;background:var(--card);border-radius:8px;padding:10px 12px;min-width:0}
.wide{grid-column:1/-1}
svg{display:block;width:100%;height:auto}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:14px;margin:6px 0 12px;font-variant-numeric:tabular-nums}
th,td{padding:3px 12px 3px 0;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
th{font-weight:600}
td.good{color:var(--good);font-weight:600}
td.bad{color:var(--bad);font-weight:600}
td.faint{color:var(--faint)}
.words td,.words th{text-align:left;white-space:normal;overflow-wrap:anywhere;vertical-align:top}
@media print{figure{break-inside:avoid}}
"""

Cell = str | tuple[str, str]
"""Text, or text and the class of its cell: good, bad, faint."""


def page(title: str, lead: Iterable[str], parts: Iterable[str]) -> str:
    """A whole page. `lead`: sentences as plain text; the first says what the page is of. `parts`: HTML."""
    first, *others = lead
    opening = f'<p class="origin">{escape(first)}</p>' + "".join(f"<p>{escape(line)}</p>" for line in others)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(title)}</h1>{opening}\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def section(title: str, *parts: str) -> str:
    """`parts`: HTML."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def cards(figures: Iterable[tuple[str, str, str]]) -> str:
    """Headline figures: (name, value, what to know of it)."""
    each = (
        f'<div class="card">{escape(name)}<b>{escape(value)}</b><span>{escape(more)}</span></div>'
        for name, value, more in figures
    )
    return f'<div class="cards">{"".join(each)}</div>'


def plots(*figures: str) -> str:
    """Side by side where there is room."""
    return f'<div class="plots">{"".join(figures)}</div>'


def tables(*each: str) -> str:
    """Side by side where there is room."""
    return f'<div class="tables">{"".join(each)}</div>'


def figure(svg: str, reading: str, wide: bool = False) -> str:
    """A plot and the sentences that say how to read it."""
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}>{svg}<figcaption>{escape(reading)}</figcaption></figure>"


def table(heads: Sequence[str], rows: Iterable[Sequence[Cell]], words: bool = False) -> str:
    """`words`: cells hold text, not numbers."""
    names = "".join(f"<th>{escape(name)}</th>" for name in heads)
    head = f"<thead><tr>{names}</tr></thead>" if any(heads) else ""
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    kind = ' class="words"' if words else ""
    return f'<div class="scroll"><table{kind}>{head}<tbody>{body}</tbody></table></div>'


def _cell(cell: Cell) -> str:
    text, kind = (cell, "") if isinstance(cell, str) else cell
    return f'<td class="{kind}">{escape(text)}</td>' if kind else f"<td>{escape(text)}</td>"
