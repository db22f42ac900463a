"""Draw charts as inline SVG.

The outer SVG has no viewBox. Its text therefore keeps its size at any width of the page, and all
positions are percentages. Lines lie in an inner SVG that is stretched to the size of the outer one.
The colors are classes of `style.CSS`, so that a chart follows the theme of the page.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from nanogpt_flower.report.text import LABEL_LENGTH, clean

Point = tuple[float, float | None]  # a point without a value interrupts its line

_SIDE = 1000  # width and height of the inner SVG in its own units
_LINE_HEIGHT = 16  # pixels between two labels at the right edge
_MOST_DOTS = 30  # a line with more points has no dots
_CUT = 1.5  # lines of clients may rise to this multiple of the highest other value


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    label: str
    points: Sequence[Point]
    style: str  # a class of the CSS, such as "server" or "client"
    legend: str = ""  # the name in the legend, which several lines can share; else the label
    faint: bool = False  # one of many lines: thin, without dots and without a label at its end


@dataclass(frozen=True)
class Reference:
    """A horizontal line across a chart."""

    label: str
    value: float
    style: str


@dataclass(frozen=True)
class Bar:
    """A bar of several parts that are stacked."""

    label: str
    values: Sequence[float]
    title: str  # what a pointer on the bar shows
    outline: float | None = None  # a value to compare the bar with


@dataclass(frozen=True)
class Dot:
    """A value in a row of a dot chart."""

    value: float
    style: str  # a class of the CSS
    title: str  # what a pointer on the dot shows


@dataclass(frozen=True)
class DotRow:
    """A row of a dot chart, with a line from its lowest to its highest value."""

    label: str
    dots: Sequence[Dot]


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high`."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def position(self, value: float) -> float:
        """Return the position of a value, from 0 at `low` to 1 at `high`."""
        return (value - self.low) / (self.high - self.low)


def axis(low: float, high: float, *, count: int = 5, whole: bool = False, tight: bool) -> Axis:
    """Choose an axis with about `count` round ticks.

    A tight axis ends at `low` and `high`. Any other axis ends at its first and its last tick. The
    ticks of a `whole` axis are whole numbers.
    """
    if high <= low:
        high = low + 1.0
    rough = (high - low) / count
    scale = 10.0 ** math.floor(math.log10(rough))
    step = next(m * scale for m in (1, 2, 2.5, 5, 10) if m * scale >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, float(math.ceil(step)))
    slack = 1e-9 * step
    if tight:
        first, last = math.ceil((low - slack) / step), math.floor((high + slack) / step)
    else:
        first, last = math.floor((low + slack) / step), math.ceil((high - slack) / step)
        low, high = first * step, last * step
    return Axis(low, high, tuple(i * step for i in range(first, last + 1)))


def line_chart(
    series: Sequence[Series],
    *,
    description: str,
    x_label: str,
    y_label: str,
    references: Sequence[Reference] = (),
    format_x: Callable[[float], str] = "{:g}".format,
    format_end: Callable[[float], str] = "{:.2f}".format,
    whole_x: bool = False,
    height: int = 280,
) -> Markup:
    """Draw lines over a common x axis.

    Each line that is not faint has its label and its last value at the right edge on wide screens.
    Faint lines that rise far above all other lines are cut off at the upper edge.
    """
    lines = [s for s in series if any(y is not None for _, y in s.points)]
    bold = [s for s in lines if not s.faint] or lines
    xs = [x for s in lines for x, _ in s.points] or [0.0]
    values = [r.value for r in references] + [y for s in bold for y in _values(s)]
    highest = max(values, default=1.0)
    values += [min(y, _CUT * highest) for s in lines if s.faint for y in _values(s)]
    x_axis = axis(min(xs), max(xs), whole=whole_x, tight=True)
    y_axis = axis(min(values, default=0.0), max(values, default=1.0), tight=False)

    marks = [_grid(x_axis, y_axis, format_x)]
    for reference in references:
        y = _percent(1 - y_axis.position(reference.value))
        marks.append(
            f'<line class="line {reference.style}" x1="0" x2="100%" y1="{y}" y2="{y}"></line>'
        )
    ordered = sorted(lines, key=lambda s: not s.faint)  # faint lines lie below the others
    marks.append(
        f'<svg viewBox="0 0 {_SIDE} {_SIDE}" preserveAspectRatio="none" width="100%" height="100%">'
        + "".join(_line(s, x_axis, y_axis) for s in ordered)
        + "</svg>"
    )
    marks += [_dots(s, x_axis, y_axis) for s in ordered]
    ends = [
        (s.style, f"{clean(s.label, LABEL_LENGTH)} {format_end(_values(s)[-1])}", _values(s)[-1])
        for s in lines
        if not s.faint
    ]
    ends += [(r.style, f"{clean(r.label, LABEL_LENGTH)} {r.value:g}", r.value) for r in references]
    marks.append(_end_labels(ends, y_axis, height))
    legend = {s.legend or s.label: (s.style, s.faint) for s in lines}
    legend |= {f"{r.label}: {r.value:g}": (r.style, False) for r in references}
    return _figure(
        "".join(marks),
        description,
        [(label, f"line {style}{' faint' * faint}") for label, (style, faint) in legend.items()],
        x_label=x_label,
        y_label=y_label,
        height=height,
        kind="lines",
    )


def bar_chart(
    bars: Sequence[Bar],
    parts: Sequence[tuple[str, str]],
    *,
    description: str,
    label: str,
    value_label: str,
    format_value: Callable[[float], str],
    outline: str = "",
    horizontal: bool = False,
    height: int = 220,
) -> Markup:
    """Draw stacked bars. `parts` names each part of a bar, with its class of the CSS.

    `label` is the name of the axis along the bars' labels, and `outline` is the legend of
    `Bar.outline`.
    """
    tops = [max(sum(bar.values), bar.outline or 0.0) for bar in bars]
    values = axis(0.0, max(tops, default=0.0), count=4, tight=False)
    band = 1 / max(len(bars), 1)
    width = min(0.72 * band, 0.12)
    every = math.ceil(len(bars) / (24 if horizontal else 10))  # each of these bars has a label
    if horizontal:
        height = max(120, min(26 * len(bars), 420))

    def rectangle(style: str, middle: float, start: float, end: float) -> str:
        low, size = _percent(middle - width / 2), _percent(width)
        if horizontal:
            place = (_percent(start), low, _percent(end - start), size)
        else:
            place = (low, _percent(1 - end), size, _percent(end - start))
        x, y, across, down = place
        return f'<rect class="{style}" x="{x}" y="{y}" width="{across}" height="{down}"></rect>'

    marks = []
    for tick in values.ticks:
        at, text = values.position(tick), format_value(tick)
        if horizontal:
            x = _percent(at)
            marks.append(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="100%"></line>')
            marks.append(_text(x, "100%", text, "x", dy=18))
        else:
            y = _percent(1 - at)
            marks.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"></line>')
            marks.append(_text("0", y, text, "y"))
    for i, bar in enumerate(bars):
        middle = (i + 0.5) * band
        stack, total = [], 0.0
        if bar.outline is not None:
            stack.append(rectangle("outline", middle, 0.0, values.position(bar.outline)))
        for (_, style), value in zip(parts, bar.values, strict=True):
            if value > 0:
                start, end = values.position(total), values.position(total + value)
                stack.append(rectangle(f"bar {style}", middle, start, end))
                total += value
        marks.append(f"<g><title>{escape(bar.title)}</title>{''.join(stack)}</g>")
        if i % every == 0:
            place = _percent(middle)
            name = clean(bar.label, 12)
            marks.append(
                _text("0", place, name, "y")
                if horizontal
                else _text(place, "100%", name, "x", dy=18)
            )
    legend = [(name, f"bar {style}") for name, style in parts]
    if outline:
        legend.append((outline, "outline"))
    x_label, y_label = (value_label, label) if horizontal else (label, value_label)
    return _figure(
        "".join(marks),
        description,
        legend,
        x_label=x_label,
        y_label=y_label,
        height=height,
        kind="bars",
    )


def dot_chart(
    rows: Sequence[DotRow], legend: Sequence[tuple[str, str]], *, description: str, x_label: str
) -> Markup:
    """Draw one row of dots for each thing, over a common x axis.

    `legend` has the name and the CSS class of each kind of dot. The label of a row stands above its
    line, so that long labels have room on a phone.
    """
    found = [dot.value for row in rows for dot in row.dots]
    x_axis = axis(min(found, default=0.0), max(found, default=1.0), count=4, tight=False)
    height = 44 * max(len(rows), 1)
    marks = []
    for tick in x_axis.ticks:
        x = _percent(x_axis.position(tick))
        marks.append(f'<line class="grid" x1="{x}" x2="{x}" y1="0" y2="100%"></line>')
        marks.append(_text(x, "100%", f"{tick:g}", "x", dy=18))
    for i, row in enumerate(rows):
        y = _percent((i + 0.68) / len(rows))
        places = sorted(x_axis.position(dot.value) for dot in row.dots)
        marks.append(_text("0", _percent((i + 0.3) / len(rows)), row.label, "name"))
        marks.append(
            f'<line class="span" x1="{_percent(places[0])}" x2="{_percent(places[-1])}" '
            f'y1="{y}" y2="{y}"></line>'
        )
        marks += [
            f'<circle class="dot {dot.style}" cx="{_percent(x_axis.position(dot.value))}" '
            f'cy="{y}" r="5.5"><title>{escape(dot.title)}</title></circle>'
            for dot in row.dots
        ]
    return _figure(
        "".join(marks),
        description,
        [(name, f"dot {style}") for name, style in legend],
        x_label=x_label,
        y_label="",
        height=height,
        kind="dots",
    )


def sparkline(points: Sequence[Point], low: float, high: float) -> Markup:
    """Draw a small line for a cell of a table. The vertical scale goes from `low` to `high`.

    A screen reader passes over it, because the cell also has the last value.
    """
    xs = [x for x, _ in points] or [0.0]
    x_axis = axis(min(xs), max(xs), tight=True)
    y_axis = Axis(low, max(high, low + 1e-9), ())
    line = _line(Series("", points, "client"), x_axis, y_axis, digits=0)
    return Markup(
        f'<svg class="spark" aria-hidden="true" viewBox="0 0 {_SIDE} {_SIDE}" '
        f'preserveAspectRatio="none">{line}</svg>'
    )


def share_bar(share: float) -> Markup:
    """Draw a number from 0 to 1 as a small bar for a cell of a table."""
    width = f"{100 * min(max(share, 0.0), 1.0):.1f}%"
    return Markup(f'<span class="share" aria-hidden="true"><i style="width:{width}"></i></span>')


def _values(series: Series) -> list[float]:
    return [y for _, y in series.points if y is not None]


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f}".rstrip("0").rstrip(".") + "%"


def _text(x: str, y: str, text: str, style: str, *, dy: int = 0) -> str:
    shift = f' dy="{dy}"' if dy else ""
    return f'<text class="{style}" x="{x}" y="{y}"{shift}>{escape(text)}</text>'


def _grid(x_axis: Axis, y_axis: Axis, format_x: Callable[[float], str]) -> str:
    marks = []
    for tick in y_axis.ticks:
        y = _percent(1 - y_axis.position(tick))
        marks.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"></line>')
        marks.append(_text("0", y, f"{tick:g}", "y"))
    for tick in x_axis.ticks:
        x = _percent(x_axis.position(tick))
        marks.append(f'<line class="tick" x1="{x}" x2="{x}" y1="100%" y2="100%"></line>')
        marks.append(_text(x, "100%", format_x(tick), "x", dy=18))
    return "".join(marks)


def _line(series: Series, x_axis: Axis, y_axis: Axis, digits: int = 1) -> str:
    """Draw a line in the units of the inner SVG, with a gap at each point without a value."""
    path, command = [], "M"
    for x, y in series.points:
        if y is None:
            command = "M"
            continue
        across = f"{_SIDE * x_axis.position(x):.{digits}f}"
        down = f"{_SIDE * (1 - y_axis.position(y)):.{digits}f}"
        path.append(f"{command}{across} {down}")
        command = "L"
    title = f"<title>{escape(clean(series.label, LABEL_LENGTH))}</title>" if series.label else ""
    style = f"line {series.style}{' faint' * series.faint}"
    return f'<path class="{style}" d="{"".join(path)}">{title}</path>'


def _dots(series: Series, x_axis: Axis, y_axis: Axis) -> str:
    values = _values(series)
    if len(values) > 1 and (series.faint or len(values) > _MOST_DOTS):
        return ""
    return "".join(
        f'<circle class="dot {series.style}" cx="{_percent(x_axis.position(x))}" '
        f'cy="{_percent(1 - y_axis.position(y))}" r="{2 if series.faint else 3}">'
        f"<title>{escape(clean(series.label, LABEL_LENGTH))}: {y:.4f}</title></circle>"
        for x, y in series.points
        if y is not None and y <= y_axis.high
    )


def _end_labels(ends: Iterable[tuple[str, str, float]], y_axis: Axis, height: int) -> str:
    """Write a label at the right end of each line, and keep the labels apart from each other."""
    labels = sorted(
        (height * (1 - y_axis.position(value)), style, label) for style, label, value in ends
    )
    places: list[float] = []
    for y, *_ in labels:
        places.append(max(y, places[-1] + _LINE_HEIGHT) if places else y)
    for i in reversed(range(len(places))):  # push the labels up that are now too low
        limit = height if i == len(places) - 1 else places[i + 1] - _LINE_HEIGHT
        places[i] = min(places[i], limit)
    return "".join(
        f'<text class="end {style}" x="100%" y="{y:.0f}" dx="10">{escape(text)}</text>'
        for y, (_, style, text) in zip(places, labels, strict=True)
    )


def _figure(
    marks: str,
    description: str,
    legend: Sequence[tuple[str, str]],
    *,
    x_label: str,
    y_label: str,
    height: int,
    kind: str,
) -> Markup:
    """Wrap the marks of a chart in a figure with a legend and the names of its axes."""
    keys = "".join(
        f'<li><svg width="22" height="12" aria-hidden="true">{_key(style)}</svg>'
        f"{escape(clean(label, LABEL_LENGTH))}</li>"
        for label, style in legend
    )
    description = str(escape(description))
    return Markup(
        f'<figure class="chart {kind}"><ul class="legend">{keys}</ul>'
        f'<p class="axis">{escape(y_label)}</p>'
        f'<div class="plot"><svg role="img" aria-label="{description}" width="100%" '
        f'height="{height}"><title>{description}</title>{marks}</svg></div>'
        f'<p class="axis below">{escape(x_label)}</p></figure>'
    )


def _key(style: str) -> str:
    if style.startswith("line"):
        return f'<line class="{style}" x1="1" x2="21" y1="6" y2="6"></line>'
    if style.startswith("dot"):
        return f'<circle class="{style}" cx="11" cy="6" r="5"></circle>'
    return f'<rect class="{style}" x="5" y="1" width="11" height="10"></rect>'
