"""Small pieces of HTML and SVG. Widths are shares of the page's and heights are pixels, so that text keeps its size on a phone.

Rules of the pictures:
1. Nothing is told by colour alone: what is coloured is also labelled, hatched or dashed.
2. Behind each picture stands a table with its numbers, for those who cannot see it.
3. All text that comes from elsewhere passes `esc`.
"""

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from fanmark.loadgen.table import number

_COLOURS, _DASHES = 6, 5  # classes c0 ... c5, d0 ... d4

Points = Sequence[tuple[float, float]]  # x in percent, y from 0 (bottom) to 1
Rows = Sequence[Sequence[str]]


def esc(text: object) -> str:
    """Safe in text and in attributes."""
    return html.escape(str(text))


@dataclass(frozen=True)
class Scale:
    """Values to percent of the width."""

    low: float
    high: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value stands; beyond the ends, at the end."""
        if self.log:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return 100.0 * min(1.0, max(0.0, share))

    def ticks(self) -> list[float]:
        """Round values within, four to ten of them."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            wide = math.log10(self.high / self.low)
            steps = (1,) if wide > 3 else (1, 3) if wide > 2 else (1, 2, 5)
            values = [step * 10.0**decade for decade in decades for step in steps]
        else:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / 2))
            step *= next(n for n in (1, 2, 5) if (self.high - self.low) / (n * step) <= 7 or n == 5)
            values = [step * n for n in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [value for value in values if self.low * 0.999999 <= value <= self.high * 1.000001]


def log_scale(values: Iterable[float], *, beside: Sequence[float] = ()) -> Scale:
    """From the 1, 2 or 5 below the least value to the one above the greatest."""
    found = [value for value in (*values, *beside) if value > 0]
    low, high = min(found, default=1.0), max(found, default=1.0)
    low = max(n for n in _rounds(low) if n <= low * 1.000001)
    high = min(n for n in _rounds(high) if n >= high * 0.999999)
    return Scale(low, high if high > low else low * 10, log=True)


def _rounds(value: float) -> list[float]:
    decade = math.floor(math.log10(value))
    return [n * 10.0**d for d in (decade - 1, decade, decade + 1) for n in (1, 2, 5)]


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    return f'<rect x="{x:.3f}%" y="{y:g}" width="{max(0.0, width):.3f}%" height="{height:g}" class="{kind}"/>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.3f}%" y1="{y1:g}" x2="{x2:.3f}%" y2="{y2:g}" class="{kind}"/>'


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Centred at x, but for the ends of the width."""
    anchor = "start" if x < 4 else "end" if x > 96 else "middle"
    return f'<text x="{x:.3f}%" y="{y:g}" text-anchor="{anchor}" class="{kind}">{esc(words)}</text>'


def curve(points: Points, top: float, height: float, kind: str) -> str:
    """A line through points, in a field of this height."""
    path = " ".join(f"{x:.2f},{100 * (1 - y):.2f}" for x, y in points)
    return (
        f'<svg x="0" y="{top:g}" width="100%" height="{height:g}" viewBox="0 0 100 100" preserveAspectRatio="none">'
        f'<polyline points="{path}" class="curve {kind}"/></svg>'
    )


def curve_kind(i: int) -> str:
    """The class of the i-th of some curves; 30 are unlike each other."""
    return f"curve c{i % _COLOURS} d{i % _DASHES}"


def axis(scale: Scale, top: float, bottom: float, unit: str = "", shown: Callable[[float], str] = number) -> list[str]:
    """Lines at the scale's ticks, with their values below."""
    parts = []
    for value in scale.ticks():
        x = scale.at(value)
        parts += [line(x, top, x, bottom, "grid"), text(x, bottom + 13, shown(value) + unit, "tick")]
    return parts


def picture(label: str, height: float, parts: Iterable[str]) -> str:
    """An SVG as wide as its place; `label` says what is to be seen, for those who do not see it."""
    return f'<svg role="img" aria-label="{esc(label)}" width="100%" height="{height:g}">{"".join(parts)}</svg>'


def key(swatches: Mapping[str, str]) -> str:
    """What the kinds of a picture mean: class by word. A class that begins with "curve" is shown as a line."""
    items = []
    for word, kind in swatches.items():
        mark = line(0, 6, 100, 6, kind) if kind.startswith("curve") else rect(0, 1, 100, 10, kind)
        items.append(f'<li><svg width="26" height="12" aria-hidden="true">{mark}</svg> {esc(word)}</li>')
    return f'<ul class="key">{"".join(items)}</ul>'


def table(rows: Rows, caption: str = "", kind: str = "") -> str:
    """The first row and the first column are titles. Of the kind "words" the cells are text."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{esc(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{esc(row[0])}</th>{"".join(f"<td>{esc(cell)}</td>" for cell in row[1:])}</tr>'
        for row in rows[1:]
    )
    named = f"<caption>{esc(caption)}</caption>" if caption else ""
    where = f' role="region" aria-label="{esc(caption)}"' if caption else ""
    whole = f'<table class="{kind}">{named}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="wide" tabindex="0"{where}>{whole}</div>'


def numbers(name: str, rows: Rows, words: str = "The numbers", kind: str = "") -> str:
    """A table that is opened by who wants it. `name` is its own on the page."""
    return (
        f'<details id="{esc(name)}"><summary>{esc(words)}</summary>{table(rows, words, kind)}</details>' if rows else ""
    )


def figure(title: str, *parts: str) -> str:
    return f"<figure><figcaption>{esc(title)}</figcaption>{''.join(parts)}</figure>"


def grid(figures: Iterable[str]) -> str:
    """Side by side where there is room."""
    return f'<div class="side">{"".join(figures)}</div>'
