"""Charts as SVG: axes with ticks, a legend, lines, dots and bars, placed in the units of the figures.

A chart stands in a page or, with its own styles, in a file. Its colors are CSS classes of templates/charts.css, light
and dark. ElementTree escapes all text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, tostring

from utils.errors import printable

TEMPLATES = Path(__file__).parent / "templates"
WIDE, NARROW, PANEL = (1080, 340), (330, 330), (400, 290)  # pixels: across a screen, across a telephone, half a screen
LEFT, RIGHT = 46, 12  # margins in pixels
LETTER, LONGEST = 6.8, 16  # pixels of a letter, letters of a tick's text
COLORS = ("c1", "c2", "c3", "c4", "c5", "c6", "c7")


@dataclass(frozen=True)
class Axis:
    """The figures along an axis, linear or logarithmic.

    Args:
        low, high: at its ends; figures beyond them are drawn at the ends.
        label: beside it.
        log: logarithmic; low is positive.
        names: of the figures 0, 1, 2, ..., in place of ticks.
    """

    low: float
    high: float
    label: str = ""
    log: bool = False
    names: Sequence[str] = ()

    @classmethod
    def around(cls, values: Sequence[float], label: str) -> "Axis":
        """A logarithmic axis a little wider than the positive ones of some figures."""
        positive = [value for value in values if value > 0] or [1.0]
        return cls(min(positive) * 0.8, max(positive) * 1.25, label, log=True)

    def part(self, value: float) -> float:
        """Where a figure stands, from 0 at the low end to 1."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[tuple[float, str]]:
        """(figure, text) of round numbers, or of the names."""
        if self.names:
            return [(i, n if len(n) <= LONGEST else f"{n[: LONGEST - 1]}…") for i, n in enumerate(self.names)]
        return [(value, f"{value:,g}") for value in round_numbers(self.low, self.high, self.log)]


def round_numbers(low: float, high: float, log: bool = False) -> list[float]:
    """About five round numbers between two numbers; over several powers of ten 1, 2, 5, 10, 20, ... or the powers."""
    if log and high >= 10 * low:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [m * 10.0**p for p in powers for m in ((1,) if len(powers) > 4 else (1, 2, 5))]
        return [value for value in values if low * 0.999 <= value <= high * 1.001]
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= (high - low) / 5 * 0.999)
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Series:
    """Figures of one color.

    Args:
        label: in the legend.
        color: a CSS class: "main", "equal", one of COLORS.
        y: the figures; NaN for none.
        x: where they are; 0, 1, 2, ... by default.
        titles: shown where the pointer rests on one; by default its name, the label and the figure.
        low, high: of a band around them.
        style: further CSS classes: "thin", "dashed".
    """

    label: str
    color: str
    y: Sequence[float]
    x: Sequence[float] = ()
    titles: Sequence[str] = ()
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    style: str = ""


class Chart:
    """An SVG drawing with two axes and a legend; `line`, `dot` and `bar` draw into it.

    Args:
        label: what it shows, for those who do not see it.
        x, y: the axes.
        legend: series to explain.
        size: width and height in pixels.
    """

    def __init__(self, label: str, x: Axis, y: Axis, legend: Sequence[Series] = (), size: tuple[int, int] = PANEL):
        width, height = size
        self.x, self.y, self.right = x, y, width - RIGHT
        self.svg = Element("svg", {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": printable(label)})
        self.top = self._legend(legend)
        ticks = x.ticks()
        longest = max(len(text) for _, text in ticks)
        turned = longest * LETTER > (self.right - LEFT) / len(ticks)
        self.base = height - (20 + int(longest * 4.6) if turned else 28) - (16 if x.label else 0)
        for value, text in y.ticks():
            self._add("path", "grid", d=f"M{LEFT},{self.py(value)}H{self.right}")
            self._text(LEFT - 6, self.py(value) + 4, text, "end")
        self._add("path", "axis", d=f"M{LEFT},{self.base}H{self.right}")
        for value, text in ticks:
            if turned:
                self._text(self.px(value) + 4, self.base + 14, text, "end", turn=-40)
            else:
                self._text(self.px(value), self.base + 18, text)
        self._text((LEFT + self.right) / 2, height - 5, x.label)
        self._text(12, (self.top + self.base) / 2, y.label, turn=-90)

    def px(self, value: float) -> float:
        return round(LEFT + self.x.part(value) * (self.right - LEFT), 1)

    def py(self, value: float) -> float:
        return round(self.base - self.y.part(value) * (self.base - self.top), 1)

    def line(self, points: Sequence[tuple[float, float]], kind: str, shift: float = 0.0, closed: bool = False) -> None:
        """Join points (x, y), moved to the right by some pixels; those that are NaN are left out."""
        places = [f"{round(self.px(x) + shift, 1)},{self.py(y)}" for x, y in points if not math.isnan(y)]
        self._add("path", kind, d=f"M{'L'.join(places)}{'Z' if closed else ''}" if places else "")

    def dot(self, x: float, y: float, color: str, title: str, radius: float = 3.5, shift: float = 0.0) -> None:
        self._add("circle", f"dot {color}", title, cx=round(self.px(x) + shift, 1), cy=self.py(y), r=radius)

    def bar(self, left: float, right: float, y: float, title: str, text: str = "") -> None:
        """A bar with a text on its top; the pointer finds its title above it, too."""
        x, width, top = self.px(left) + 1, round(self.px(right) - self.px(left) - 2, 1), min(self.py(y), self.base - 1)
        size = {"x": x, "width": width}
        self._add("rect", "bar main", y=top, height=round(self.base - top, 1), **size)
        self._text(x + width / 2, top - 4, text, kind="count")
        self._add("rect", "bar unseen", title, y=self.top, height=round(self.base - self.top, 1), **size)

    def diagonal(self) -> None:
        """Where x and y are equal; both axes have the same ends."""
        self.line([(self.x.low, self.y.low), (self.x.high, self.y.high)], "line ink dashed")

    def __html__(self) -> str:
        """The drawing as it stands in a page; Jinja2 asks for it."""
        return tostring(self.svg, encoding="unicode")

    def file(self, title: str) -> bytes:
        """The drawing as an SVG file, with lines of a title above it."""
        _, _, width, height = map(int, self.svg.attrib["viewBox"].split())
        lines = title.split("\n")
        head = 12 + 20 * len(lines)
        size = {"width": str(width), "height": str(height + head), "viewBox": f"0 {-head} {width} {height + head}"}
        svg = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", **size})
        SubElement(svg, "style").text = (TEMPLATES / "charts.css").read_text()
        SubElement(svg, "rect", {"class": "paper", "y": str(-head), "width": "100%", "height": "100%"})
        for number, line in enumerate(lines):
            place = {"x": "16", "y": str(24 + 20 * number - head)}
            SubElement(svg, "text", {"class": "title", **place}).text = printable(line)
        svg.extend(self.svg)
        return tostring(svg, encoding="utf-8")

    def _legend(self, series: Sequence[Series]) -> int:
        """Lines and labels, in rows; returns where the chart below may begin."""
        x, y = LEFT, 10
        for each in series:
            room = int(26 + LETTER * len(each.label))
            if x > LEFT and x + room > self.right:
                x, y = LEFT, y + 18
            self._add("path", f"line {each.color} {each.style}", d=f"M{x},{y}h18")
            self._text(x + 24, y + 4, each.label, "start", kind="legend")
            x += room + 12
        return y + 18 if series else y

    def _text(self, x: float, y: float, text: str, anchor: str = "middle", turn: int = 0, kind: str = "tick") -> None:
        if text:
            place = {"transform": f"translate({x:g},{y:g}) rotate({turn})"} if turn else {"x": f"{x:g}", "y": f"{y:g}"}
            SubElement(self.svg, "text", {"class": kind, "text-anchor": anchor, **place}).text = printable(text)

    def _add(self, tag: str, kind: str, title: str = "", **attributes: str | float) -> None:
        mark = SubElement(self.svg, tag, {"class": kind, **{key: str(value) for key, value in attributes.items()}})
        if title:
            SubElement(mark, "title").text = printable(title)


def line_charts(label: str, names: Sequence[str], series: Sequence[Series], y_label: str) -> list[Chart]:
    """Percentages over names, a line a series, side by side where they meet: for a screen and for a telephone."""
    figures = [v for s in series for v in (*s.y, *s.low, *s.high) if not math.isnan(v)]
    margin = max(2.0, 0.08 * (max(figures) - min(figures)))
    x = Axis(-0.5, len(names) - 0.5, names=names)
    y = Axis(max(0.0, min(figures) - margin), min(100.0, max(figures) + margin), y_label)
    charts = [Chart(label, x, y, series, size) for size in (WIDE, NARROW)]
    for chart in charts:
        step = min(4.0, 0.4 * (chart.right - LEFT) / len(names) / len(series))
        for number, s in enumerate(series):
            shift = step * (number - (len(series) - 1) / 2)
            if s.low:
                ends = [*enumerate(s.high), *reversed(list(enumerate(s.low)))]
                chart.line(ends, f"band {s.color}", shift, closed=True)
            chart.line(list(enumerate(s.y)), f"line {s.color} {s.style}", shift)
            for place, (name, value) in enumerate(zip(names, s.y, strict=True)):
                if not math.isnan(value):
                    band = f" ({s.low[place]:.1f} to {s.high[place]:.1f})" if s.low else ""
                    title = f"{name}, {s.label}: {value:.1f} %{band}"
                    chart.dot(place, value, s.color, title, 2.0 if "thin" in s.style else 3.5, shift)
    return charts


def scatter_chart(
    label: str, series: Sequence[Series], x: Axis, y: Axis, diagonal: bool = False, size: tuple[int, int] = PANEL
) -> Chart:
    """Dots of several series; those at the same place are drawn side by side."""
    chart = Chart(label, x, y, series if len(series) > 1 else (), size)
    if diagonal:
        chart.diagonal()
    radius = 4.0 if sum(len(s.y) for s in series) <= 250 else 3.0
    for number, s in enumerate(series):
        shift = radius * (number - (len(series) - 1) / 2)
        for at, value, title in zip(s.x, s.y, s.titles, strict=True):
            chart.dot(at, value, f"{s.color} soft", title, radius, shift)
    return chart
