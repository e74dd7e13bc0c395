"""Pictures of an evaluation at length, as SVG: loss by position, and the heat map of the needles."""

import pathlib
from typing import Any

from alst_jax.at_length.words import short

GREY, BLUE, ORANGE = "#555", "#1f77b4", "#ff7f0e"


def draw(folder: pathlib.Path, results: dict[str, Any], before: dict[str, Any] | None) -> None:
    """loss-by-position.svg (with the run's first evaluation beside), needle-STEP.svg and needle.svg, the newest one."""
    (folder / "loss-by-position.svg").write_text(loss_picture(results, before))
    if any(cell["task"] == "needle" for cell in results["cells"]):
        picture = heat_map(results)
        for name in (f"needle-{results['step']:08d}.svg", "needle.svg"):
            (folder / name).write_text(picture)


def loss_picture(results: dict[str, Any], before: dict[str, Any] | None) -> str:
    """Loss against position, a line an evaluation."""
    lines = [(one, colour) for one, colour in ((before, ORANGE), (results, BLUE)) if one]
    curves = [
        (
            [(b["start"] + b["stop"]) / 2 for b in one["curve"] if b["loss"] is not None],
            [b["loss"] for b in one["curve"] if b["loss"] is not None],
        )
        for one, _ in lines
    ]
    losses, length = [y for _, ys in curves for y in ys], results["curve"][-1]["stop"]
    low, high = min(losses, default=0.0), max(losses, default=1.0)
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    across, down = lambda x: 60 + 520 * x / length, lambda y: 260 - 230 * (y - low) / (high - low)
    parts = [_text(320, 295, "position"), _text(60, 18, "loss, nats a token", "start")]
    for part in range(5):
        x, y = length * part / 4, low + (high - low) * part / 4
        parts += [
            _text(across(x), 278, short(round(x))),
            _text(54, down(y) + 4, f"{y:.2f}", "end"),
            f'<line x1="60" x2="580" y1="{down(y):.1f}" y2="{down(y):.1f}" stroke="#ddd"/>',
        ]
    for number, ((xs, ys), (one, colour)) in enumerate(zip(curves, lines)):
        points = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in zip(xs, ys))
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>',
            _text(580 - 90 * (len(lines) - 1 - number), 18, f"step {one['step']}", "end", colour),
        ]
    return _svg(600, 305, parts)


def heat_map(results: dict[str, Any]) -> str:
    """Needles: a row a depth, a column a length. Colour and large number: exact match; small: loss of the answer."""
    cells = [cell for cell in results["cells"] if cell["task"] == "needle"]
    lengths, depths = sorted({c["length"] for c in cells}), sorted({c["depth"] for c in cells})
    width, height = 90 + 100 * len(lengths), 75 + 50 * len(depths)
    parts = [
        _text(width / 2, 18, f"needle at step {results['step']}: exact match, nats a token of the answer"),
        _text(width / 2, height - 8, "tokens of the text"),
    ]
    for row, depth in enumerate(depths):
        parts.append(_text(84, 60 + 50 * row, f"depth {depth:.0%}", "end"))
    for column, length in enumerate(lengths):
        parts.append(_text(140 + 100 * column, 45 + 50 * len(depths), short(length)))
    for cell in cells:
        x, y = 90 + 100 * lengths.index(cell["length"]), 30 + 50 * depths.index(cell["depth"])
        parts += [
            f'<rect x="{x}" y="{y}" width="98" height="48" fill="{_colour(cell["exact"])}"/>',
            _text(x + 49, y + 22, f"{cell['exact']:.0%}", size=15, colour="#111"),
            _text(x + 49, y + 40, f"{cell['loss']:.2f}", colour="#111"),
        ]
    return _svg(width, height, parts)


def _colour(part: float) -> str:
    """From red over yellow to green."""
    red, green = min(1.0, 2 - 2 * part), min(1.0, 2 * part)
    return f"rgb({90 + 150 * red:.0f},{80 + 150 * green:.0f},95)"


def _text(x: float, y: float, text: str, anchor: str = "middle", colour: str = GREY, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}">{text}</text>'


def _svg(width: float, height: float, parts: list[str]) -> str:
    begin = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="sans-serif">'
    )
    return "\n".join([begin, f'<rect width="{width:g}" height="{height:g}" fill="white"/>', *parts, "</svg>\n"])
