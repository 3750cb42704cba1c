"""Curves as SVG, drawn by hand: the page that shows them then needs no other package and no file.

In       curves: a label, x and y of equal length; labels of the axes
Out      one <svg> element, for a page of HTML
Try      python -m plumbing.plot > curves.html
"""
import html
import math
from dataclasses import dataclass

from plumbing.flags import read_log

COLORS = ("#1f77b4", "#d95f02", "#2ca02c", "#7b5fb2", "#8c564b", "#e377c2", "#555555", "#b5b000")
WIDTH, HEIGHT = 860, 320               # of the plot with its axes, in pixels
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 12, 48  # from there to the curves: ticks and labels
LINE = 20                              # height of a line of the legend, below the plot
MOST = 600                             # points that are drawn of one curve
DOTS = 40                              # points of a curve up to which each gets a dot


@dataclass
class Curve:
    label: str
    x: list
    y: list            # None where there is no value
    color: str = COLORS[0]
    dashed: bool = False
    spread: list | None = None  # half the length of a vertical bar at each point


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers from low to high: 1, 2 or 5 times a power of ten."""
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        inside = [m * 10.0 ** p for p in powers for m in (1, 2, 5) if low <= m * 10.0 ** p <= high]
        if len(inside) > 1:
            return inside[::3] if len(inside) > 9 else inside
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def span(values: list[float], log: bool, zero: bool = True) -> tuple[float, float]:
    """The ends of an axis: a little more than all values; with 0, unless it is logarithmic."""
    low, high = min(values), max(values)
    if log:
        return low / 1.1, high * 1.1
    low = min(0, low) if zero else low - 0.02 * (high - low)
    return low, high + 0.02 * (high - low) if high > low else low + 1


def svg(curves: list[Curve], x_label: str, y_label: str, log: bool = False, marks=(),
        zero: bool = True) -> str:
    """The curves with axes, and a legend below them. log: of y; marks: x of vertical gray lines;
    zero: both axes begin at 0.

    A y that is None, not finite, or not positive under log is left out.
    """
    def drawable(y) -> bool:
        return y is not None and math.isfinite(y) and (y > 0 or not log)
    points = [[point for point in zip(c.x, c.y, c.spread or [0] * len(c.x)) if drawable(point[1])]
              for c in curves]
    if not any(points):
        return "<p>There is nothing to draw yet.</p>"
    x_low, x_high = span([x for part in points for x, _, _ in part], False, zero)
    y_low, y_high = span([end for part in points for _, y, half in part
                          for end in (y - half, y + half)], log, zero)
    scale = math.log10 if log else float

    def place(x, y) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (scale(y) - scale(y_low)) / (scale(y_high) - scale(y_low))
        return (LEFT + across * (WIDTH - LEFT - RIGHT),
                HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM))

    def line(x1, y1, x2, y2, color) -> str:
        return (f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" '
                f'stroke="{color}"/>')

    def text(x, y, words, anchor="middle", more="") -> str:
        return (f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>'
                f'{html.escape(str(words))}</text>')

    parts, right, bottom = [], WIDTH - RIGHT, HEIGHT - BOTTOM
    middle = (TOP + bottom) / 2
    for t in ticks(y_low, y_high, log):
        _, y = place(x_low, t)
        parts += [line(LEFT, y, right, y, "#e4e4e4"), text(LEFT - 6, y + 4, f"{t:g}", "end")]
    for t in ticks(x_low, x_high, False):
        x, _ = place(t, y_low)
        parts += [line(x, bottom, x, bottom + 4, "#222"), text(x, bottom + 18, f"{t:g}")]
    for mark in marks:
        x, _ = place(mark, y_low)
        parts.append(line(x, TOP, x, bottom, "#bbb"))
    parts += [line(LEFT, bottom, right, bottom, "#222"), line(LEFT, TOP, LEFT, bottom, "#222"),
              text((LEFT + right) / 2, HEIGHT - 10, x_label),
              text(0, 0, y_label, more=f' transform="translate(16 {middle}) rotate(-90)"')]
    for k, (curve, part) in enumerate(zip(curves, points)):
        part = part[::math.ceil(len(part) / MOST) or 1]
        places = [place(x, y) for x, y, _ in part]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        if len(part) <= DOTS:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{curve.color}"/>'
                      for x, y in places]
        for x, y, half in part if curve.spread else ():
            (across, low), (_, high) = place(x, y - half), place(x, y + half)
            parts.append(line(across, low, across, high, curve.color))
        stroke = f'stroke="{curve.color}" stroke-width="2"'
        stroke += ' stroke-dasharray="6 4"' if curve.dashed else ""
        y = HEIGHT + LINE * k + 8
        parts += [f'<polyline points="{path}" fill="none" {stroke}/>',
                  f'<line x1="{LEFT}" y1="{y}" x2="{LEFT + 30}" y2="{y}" {stroke}/>',
                  text(LEFT + 38, y + 4, curve.label, "start")]
    height = HEIGHT + LINE * len(curves)
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
            'font-family="system-ui, sans-serif" font-size="13">' + "".join(parts) + "</svg>")


def log_curves(folder: str) -> str:
    """The losses in a run's log.jsonl, phase after phase; of an autoencoder the error of pixels."""
    rows = [row for row in read_log(folder) if "learning_rate" in row and "loss" in row]
    curves, ends, offset = [], [], 0
    for k, phase in enumerate(dict.fromkeys(row["phase"] for row in rows)):
        of_phase = [row for row in rows if row["phase"] == phase]
        key = "pixels" if "pixels" in of_phase[0] else "loss"
        curves.append(Curve(f"{phase} ({key})", [offset + row["step"] for row in of_phase],
                            [row.get(key) for row in of_phase], COLORS[k % len(COLORS)]))
        offset += of_phase[-1]["step"]
        ends.append(offset)
    return svg(curves, "steps, phase after phase", "loss", log=True, marks=ends)


if __name__ == "__main__":
    steps = list(range(1, 1000, 10))
    losses = [Curve(f"1 / step^{power}", steps, [step ** -power for step in steps], color)
              for power, color in zip((0.25, 0.5, 1), COLORS)]
    print(svg(losses, "steps", "loss, logarithmic", log=True))
