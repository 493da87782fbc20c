"""Charts: what stands where in an SVG of a given size; report/templates/charts.html draws it, for pages and for files.

A chart holds text as it is: the template escapes it. Colors are names of CSS classes, so that charts follow a reader's
light or dark mode.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 44  # margins in pixels, for axes and their labels
LETTER = 7.0  # pixels of a letter in a tick label
LONGEST = 16  # letters of a tick label
WIDE, NARROW = (1080, 340), (330, 290)  # width and height in pixels: for a desktop, for a telephone
SMALL = (440, 300)


@dataclass
class Mark:
    """Something drawn: a "line" or "band" with a path, a "dot" at x, y, a "bar" from x, y.

    Args:
        kind: "line", "band", "dot" or "bar".
        color: class of its color.
        path: of a line or band, SVG's `d`.
        x, y, width, height: in pixels; a dot's width is its radius.
        title: shown when the pointer rests on it.
        style: further classes: "dashed", "thin", "soft".
    """

    kind: str
    color: str
    path: str = ""
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0
    height: float = 0.0
    title: str = ""
    style: str = ""


@dataclass
class Series:
    """Values over the names of a line chart.

    Args:
        label: in the legend.
        values: one a name; None leaves a gap.
        color, style: see Mark.
        low, high: a band around the values.
        titles: of the dots; by default name, label and value.
    """

    label: str
    values: Sequence[float | None]
    color: str
    style: str = ""
    low: Sequence[float | None] = ()
    high: Sequence[float | None] = ()
    titles: Sequence[str] = ()


@dataclass
class Point:
    """A dot of a scatter chart: numbers on the axes, class of its color, title, pixels that it is moved to the side."""

    x: float
    y: float
    color: str
    title: str
    aside: float = 0.0


@dataclass
class Scale:
    """Numbers to pixels, linear or logarithmic.

    Args:
        low, high: numbers at the ends; a logarithmic scale needs positive ones.
        start, end: pixels at the ends.
    """

    low: float
    high: float
    start: float = 0.0
    end: float = 1.0
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        part = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + min(max(part, 0.0), 1.0) * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, str]]:
        values = log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high)
        return [(self(value), f"{value:g}") for value in values]


@dataclass
class Chart:
    """A chart, ready to be drawn.

    Args:
        label: what it shows, for those who do not see it; the title of a chart in a file of its own.
        width, height: in pixels.
        x_label, y_label: of the axes.
        x_ticks, y_ticks: (pixel, text).
        marks: in the order they are drawn.
        legend: (color, style, text).
        turned: x tick labels are turned, for want of room.
    """

    label: str
    width: int
    height: int
    x_label: str
    y_label: str
    x_ticks: list[tuple[float, str]] = field(default_factory=list)
    y_ticks: list[tuple[float, str]] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    legend: list[tuple[str, str, str]] = field(default_factory=list)
    turned: bool = False
    bottom: int = BOTTOM

    left = LEFT

    @property
    def right(self) -> int:
        return self.width - RIGHT

    @property
    def base(self) -> int:
        """Where the x axis is."""
        return self.height - self.bottom

    def scales(self, x: Scale, y: Scale) -> tuple[Scale, Scale]:
        """Fit two scales to the chart's axes, with their ticks."""
        x.start, x.end, y.start, y.end = LEFT, self.right, self.base, TOP
        self.x_ticks, self.y_ticks = x.ticks(), y.ticks()
        return x, y


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two numbers, about so many."""
    if high <= low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20, ... between two positive numbers; powers of ten alone where that is enough."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1,) if len(powers) > 4 else (1, 2, 5)
    return [m * 10.0**p for p in powers for m in steps if low * 0.999 <= m * 10.0**p <= high * 1.001]


def path_of(points: Sequence[tuple[float, float] | None]) -> str:
    """SVG's `d` of a line through points in pixels; None leaves a gap."""
    parts, move = [], True
    for point in points:
        if point is not None:
            parts.append(f"{'M' if move else 'L'}{point[0]:g},{point[1]:g}")
        move = point is None
    return "".join(parts)


def wide_and_narrow(draw: Callable[[tuple[int, int]], Chart], height: int = WIDE[1]) -> list[Chart]:
    """The same chart for a desktop and for a telephone, where shrinking would make its text too small to read."""
    return [draw((WIDE[0], height)), draw((NARROW[0], min(height + 10, NARROW[1])))]


def line_chart(
    label: str, names: Sequence[str], series: Sequence[Series], y_label: str, size: tuple[int, int] = WIDE
) -> Chart:
    """Values over names, a line each; the names' order is theirs. The y axis shows the part of 0..100 that is used."""
    room = (size[0] - LEFT - RIGHT) / len(names)
    longest = max(map(len, names))
    turned = longest * LETTER > room
    bottom = 24 + int(min(longest, LONGEST) * 4.6) if turned else 28
    chart = Chart(label, *size, "", y_label, turned=turned, bottom=bottom)
    numbers = [v for s in series for v in (*s.values, *s.low, *s.high) if v is not None] or [0, 100]
    margin = max(2.0, 0.08 * (max(numbers) - min(numbers)))
    y = Scale(max(0.0, min(numbers) - margin), min(100.0, max(numbers) + margin), chart.base, TOP)
    places = [round(LEFT + room * (i + 0.5), 1) for i in range(len(names))]
    shown = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in names]
    chart.x_ticks, chart.y_ticks = list(zip(places, shown, strict=True)), y.ticks()
    for s in series:
        if s.low:
            ends = [*zip(places, s.high, strict=True), *reversed(list(zip(places, s.low, strict=True)))]
            band = path_of([(x, y(v)) for x, v in ends if v is not None]) + "Z"
            chart.marks.append(Mark("band", s.color, band))
    for s in series:
        points = [None if v is None else (x, y(v)) for x, v in zip(places, s.values, strict=True)]
        chart.marks.append(Mark("line", s.color, path_of(points), style=s.style))
        titles = s.titles or [f"{n}, {s.label}: {v or 0:.1f}" for n, v in zip(names, s.values, strict=True)]
        radius = 2.0 if "thin" in s.style else 3.5
        for point, title in zip(points, titles, strict=True):
            if point is not None:
                chart.marks.append(Mark("dot", s.color, x=point[0], y=point[1], width=radius, title=title))
        chart.legend.append((s.color, s.style, s.label))
    return chart


def scatter_chart(
    label: str,
    points: Sequence[Point],
    x_label: str,
    y_label: str,
    x: Scale,
    y: Scale,
    legend: Sequence[tuple[str, str, str]] = (),
    size: tuple[int, int] = SMALL,
    diagonal: bool = False,
) -> Chart:
    """Dots over two axes; `diagonal` draws the line of equal x and y."""
    chart = Chart(label, *size, x_label, y_label, legend=list(legend))
    x, y = chart.scales(x, y)
    radius = 4.0 if len(points) <= 250 else 3.0
    if diagonal:
        ends = [(x(value), y(value)) for value in (max(x.low, y.low), min(x.high, y.high))]
        chart.marks.append(Mark("line", "ink", path_of(ends), style="dashed thin"))
    chart.marks += [
        Mark("dot", p.color, x=x(p.x) + p.aside, y=y(p.y), width=radius, title=p.title, style="soft") for p in points
    ]
    return chart


def bin_chart(
    label: str,
    rows: Sequence[tuple[str, str, Sequence[float]]],
    titles: Sequence[str],
    x_label: str,
    y_label: str,
    top: float = 100,
    diagonal: bool = False,
) -> Chart:
    """Bars over equal bins from 0 to 100, each further row narrower and in front.

    Args:
        rows: (color, text of the legend, values), one value a bin.
        titles: of each bin; empty where it holds nothing.
        top: end of the y axis.
        diagonal: draw the line from 0 to 100.
    """
    legend = [(color, "", text) for color, text, _ in rows] if len(rows) > 1 else []
    chart = Chart(label, *SMALL, x_label, y_label, legend=legend)
    x, y = chart.scales(Scale(0, 100), Scale(0, top))
    room = 100 / len(titles)
    for k, title in enumerate(titles):
        if title:
            left, right = x(room * k) + 1, x(room * (k + 1)) - 1
            for number, (color, _, values) in enumerate(rows):
                inset, height = number * (right - left) / 4, max(chart.base - y(values[k]), 1.0)
                bar = Mark(
                    "bar", color, "", left + inset, round(chart.base - height, 1), right - left - 2 * inset, height
                )
                chart.marks.append(bar)
            # So that low bars can be pointed at, too.
            chart.marks.append(Mark("bar", "unseen", "", left, TOP, right - left, chart.base - TOP, title))
    if diagonal:
        chart.marks.append(Mark("line", "ink", path_of([(x(0), y(0)), (x(100), y(100))]), style="dashed"))
    return chart
