"""Charts for pages: what stands where in an SVG of a given size; utils/templates/charts.html draws it.

A chart holds text as it is: the template escapes it. Colors are names of CSS classes, so that a page has them in light
and dark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 44  # margins in pixels, for axes and their labels
LETTER = 7.0  # pixels of a letter in a tick label
LONGEST = 16  # letters of a tick label
NAMED = 12  # classes whose names stand along an axis


@dataclass
class Mark:
    """Something drawn: a "line" or "band" with a path, a "dot" at x, y, a "bar" from x, y.

    Args:
        kind: "line", "band", "dot" or "bar".
        color: class of its color.
        path: of a line or band, SVG's `d`.
        x, y, width, height: in pixels; a dot's width is its radius.
        title: shown when the pointer rests on it.
        style: further classes: "dashed", "thin", "hollow".
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
class Chart:
    """A chart, ready to be drawn.

    Args:
        label: what it shows, for those who do not see it.
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

    @property
    def left(self) -> int:
        return LEFT

    @property
    def right(self) -> int:
        return self.width - RIGHT

    @property
    def base(self) -> int:
        """Where the x axis is."""
        return self.height - self.bottom


@dataclass
class Scale:
    """Numbers to pixels, linear or logarithmic.

    Args:
        low, high: numbers at the ends; a logarithmic scale needs positive ones.
        start, end: pixels at the ends.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        part = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + min(max(part, 0.0), 1.0) * (self.end - self.start), 1)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        values = log_ticks(self.low, self.high) if self.log else linear_ticks(self.low, self.high, count)
        return [(self(value), f"{value:g}") for value in values]


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


def percent_range(values: Sequence[float]) -> tuple[float, float]:
    """The part of 0..100 that an axis shows for some percentages, a little wider than they are."""
    low, high = min(values), max(values)
    margin = max(2.0, 0.08 * (high - low))
    return max(0.0, low - margin), min(100.0, high + margin)


def path_of(points: Sequence[tuple[float, float] | None]) -> str:
    """SVG's `d` of a line through points in pixels; None leaves a gap."""
    parts, move = [], True
    for point in points:
        if point is None:
            move = True
            continue
        parts.append(f"{'M' if move else 'L'}{point[0]:g},{point[1]:g}")
        move = False
    return "".join(parts)


def line_chart(
    label: str, names: Sequence[str], series: Sequence[Series], y_label: str, width: int = 1080, height: int = 340
) -> Chart:
    """Values over names, a line each; the names' order is theirs."""
    room = (width - LEFT - RIGHT) / len(names)
    longest = max(map(len, names))
    turned = longest * LETTER > room
    shown = [name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…" for name in names]
    bottom = 24 + int(min(longest, LONGEST) * 4.6) if turned else 28
    chart = Chart(label, width, height, "", y_label, turned=turned, bottom=bottom)
    numbers = [v for s in series for v in (*s.values, *s.low, *s.high) if v is not None]
    y = Scale(*percent_range(numbers or [0, 100]), chart.base, TOP)
    places = [round(LEFT + room * (i + 0.5), 1) for i in range(len(names))]
    chart.x_ticks = list(zip(places, shown, strict=True))
    chart.y_ticks = y.ticks()
    for s in series:
        if s.low:
            ends = [(x, v) for x, v in zip(places, s.high) if v is not None]
            ends += [(x, v) for x, v in reversed(list(zip(places, s.low))) if v is not None]
            band = path_of([(x, y(v)) for x, v in ends]) + "Z"
            chart.marks.append(Mark("band", s.color, band))
    for s in series:
        points = [None if v is None else (x, y(v)) for x, v in zip(places, s.values, strict=True)]
        chart.marks.append(Mark("line", s.color, path_of(points), style=s.style))
        for i, (name, value, point) in enumerate(zip(names, s.values, points, strict=True)):
            if point is not None:
                title = s.titles[i] if s.titles else f"{name}, {s.label}: {value:.1f}"
                radius = 2.0 if "thin" in s.style else 3.5
                chart.marks.append(Mark("dot", s.color, x=point[0], y=point[1], width=radius, title=title))
        chart.legend.append((s.color, s.style, s.label))
    return chart


def scatter_chart(
    label: str,
    points: Sequence[tuple[float, float, str, str]],
    x_label: str,
    y_label: str,
    legend: Sequence[tuple[str, str, str]] = (),
    width: int = 440,
    height: int = 300,
) -> Chart:
    """Dots over a logarithmic axis: (x > 0, y in 0..100, color, title) each."""
    chart = Chart(label, width, height, x_label, y_label, legend=list(legend))
    xs = [p[0] for p in points]
    x = Scale(min(xs) * 0.85, max(xs) * 1.15, LEFT, chart.right, log=True)
    y = Scale(0, 100, chart.base, TOP)
    chart.x_ticks, chart.y_ticks = x.ticks(), y.ticks()
    radius = 4.0 if len(points) <= 250 else 3.0
    chart.marks = [Mark("dot", c, x=x(px), y=y(py), width=radius, title=t, style="soft") for px, py, c, t in points]
    return chart


def reliability_chart(
    label: str, bins: Sequence[tuple[int, float, float]], color: str, width: int = 440, height: int = 300
) -> Chart:
    """Accuracy over confidence: (images, mean confidence, accuracy) of equal bins from 0 to 1, figures in percent."""
    chart = Chart(label, width, height, "confidence (%)", "accuracy (%)")
    x, y = Scale(0, 100, LEFT, chart.right), Scale(0, 100, chart.base, TOP)
    chart.x_ticks, chart.y_ticks = x.ticks(), y.ticks()
    room = 100 / len(bins)
    for k, (images, confidence, accuracy) in enumerate(bins):
        if images:
            left, right, top = x(room * k) + 1, x(room * (k + 1)) - 1, y(accuracy)
            title = f"{images} images: confidence {confidence:.1f} %, accuracy {accuracy:.1f} %"
            height_ = max(chart.base - top, 1.0)
            chart.marks.append(
                Mark("bar", color, x=left, y=round(chart.base - height_, 1), width=right - left, height=height_)
            )
            whole = Mark("bar", "unseen", x=left, y=TOP, width=right - left, height=chart.base - TOP, title=title)
            chart.marks.append(whole)  # so that low bars can be pointed at, too
    diagonal = path_of([(x(0), y(0)), (x(100), y(100))])
    chart.marks.append(Mark("line", "ink", diagonal, style="dashed"))
    return chart


def share_chart(
    label: str,
    series: Sequence[Series],
    names: Sequence[str],
    x_label: str,
    width: int = 440,
    height: int = 300,
) -> Chart:
    """Shares of classes in percent, classes in the order given; few classes have dots that tell their names."""
    chart = Chart(label, width, height, x_label, "share (%)")
    numbers = [v for s in series for v in s.values if v is not None]
    x = Scale(1, len(names), LEFT + 6, chart.right - 6)
    y = Scale(0, max(max(numbers), 1e-9) * 1.08, chart.base, TOP)
    whole = sorted({round(v) for v in linear_ticks(1, len(names), 5)} | {1})
    if len(names) <= NAMED and max(map(len, names)) <= 5:
        chart.x_ticks = [(x(i + 1), name) for i, name in enumerate(names)]
    else:
        chart.x_ticks = [(x(v), str(v)) for v in whole]
    chart.y_ticks = y.ticks()
    dots = len(names) <= 120
    for s in series:
        points = [None if v is None else (x(i + 1), y(v)) for i, v in enumerate(s.values)]
        chart.marks.append(Mark("line", s.color, path_of(points), style=s.style))
        for name, value, point in zip(names, s.values, points, strict=True) if dots else ():
            if point is not None:
                title = f"{name}, {s.label}: {value:.2f} %"
                chart.marks.append(Mark("dot", s.color, x=point[0], y=point[1], width=2.5, title=title))
        chart.legend.append((s.color, s.style, s.label))
    return chart


def histogram(
    label: str, counts: Sequence[int], x_label: str, y_label: str, color: str, width: int = 440, height: int = 300
) -> Chart:
    """Counts in equal bins from 0 to 100."""
    chart = Chart(label, width, height, x_label, y_label)
    x, y = Scale(0, 100, LEFT, chart.right), Scale(0, max(max(counts), 1) * 1.05, chart.base, TOP)
    chart.x_ticks, chart.y_ticks = x.ticks(), [tick for tick in y.ticks() if "." not in tick[1]]
    room = 100 / len(counts)
    for k, count in enumerate(counts):
        if count:
            left, right, top = x(room * k) + 1, x(room * (k + 1)) - 1, y(count)
            title = f"{room * k:.0f} to {room * (k + 1):.0f} %: {count} images"
            size = max(chart.base - top, 1.0)
            chart.marks.append(
                Mark("bar", color, x=left, y=chart.base - size, width=right - left, height=size, title=title)
            )
    return chart
