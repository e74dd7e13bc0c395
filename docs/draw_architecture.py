"""Draws docs/architecture.svg from the imports of alst_jax: its layers from bottom to top, their files, and who uses
whom.

    python docs/draw_architecture.py
"""

import ast
import collections
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.unit.test_layers import LAYERS, imports  # noqa: E402  (the order that the test holds)

ROW, LEFT, WIDTH = 42, 470, 1180


def layer_of(file: pathlib.Path) -> str:
    return file.relative_to(ROOT / "alst_jax").as_posix().removesuffix(".py").split("/")[0]


def read() -> tuple[dict[str, list[tuple[str, int]]], dict[str, set[str]]]:
    """(files and their lines by layer, the layers that each layer imports)"""
    files, uses = collections.defaultdict(list), collections.defaultdict(set)
    for file in sorted((ROOT / "alst_jax").rglob("*.py")):
        layer, source = layer_of(file), file.read_text()
        if layer not in LAYERS:
            continue
        ast.parse(source)
        name = file.relative_to(ROOT / "alst_jax").as_posix()
        if source.strip():
            files[layer].append((name.removeprefix(f"{layer}/").removesuffix(".py"), source.count("\n")))
        uses[layer] |= {other for other in (n.split(".")[0] for n in imports(source)) if other != layer}
    return files, uses


def draw() -> str:
    files, uses = read()
    y_of = {layer: 30 + ROW * row for row, layer in enumerate(reversed(LAYERS))}
    height = 30 + ROW * len(LAYERS) + 10
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif">',
             f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
             '<text x="10" y="18" font-size="12" fill="#555">A layer imports only from layers below it. '
             "Curves: imports. Numbers: lines.</text>"]
    for layer in LAYERS:
        for other in uses[layer]:
            top, bottom = y_of[layer] + ROW / 2 - 4, y_of[other] + ROW / 2 - 4
            bend = LEFT - 20 - 13 * abs(LAYERS.index(layer) - LAYERS.index(other))
            lines.append(f'<path d="M {LEFT} {top} C {bend} {top}, {bend} {bottom}, {LEFT} {bottom}" fill="none" '
                         'stroke="#4477aa" stroke-opacity="0.35"/>')
    for layer in LAYERS:
        y, total = y_of[layer], sum(n for _, n in files[layer])
        lines.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 10}" height="{ROW - 8}" rx="4" fill="#eef3f8" '
                     'stroke="#4477aa"/>')
        lines.append(f'<text x="{LEFT + 8}" y="{y + 15}" font-size="13" font-weight="bold">{layer} '
                     f'<tspan font-weight="normal" fill="#555">{total}</tspan></text>')
        names = ", ".join(name for name, _ in files[layer] if name not in (layer, "__init__"))
        lines.append(f'<text x="{LEFT + 8}" y="{y + 29}" font-size="10" fill="#333">{names}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    (ROOT / "docs" / "architecture.svg").write_text(draw())
