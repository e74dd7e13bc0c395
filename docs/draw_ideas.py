"""Draw the six ideas: docs/ideas.svg with a panel each, and docs/idea-1.svg to idea-6.svg, each beside its bytes.

uv run python docs/draw_ideas.py
"""

import math
import pathlib
from typing import NamedTuple

WIDTH, HEIGHT, BLUE, ORANGE, GRAY, LIGHT = 380, 190, "#3b76b8", "#e08a2e", "#6f6f6f", "#dfe8f3"


def box(x, y, w, h, fill=LIGHT, stroke=BLUE, dash="") -> str:
    return (
        f'<rect x="{x}" y="{y}" width="{w}" height="{h}" fill="{fill}" stroke="{stroke}"'
        + (f' stroke-dasharray="{dash}"' if dash else "")
        + "/>"
    )


def text(x, y, words, size=11, anchor="middle", color="#222") -> str:
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{color}">{words}</text>'


def arrow(x1, y1, x2, y2) -> str:
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="#444" marker-end="url(#head)"/>'


def tiled(wide: str, small: str, result: str) -> list[str]:
    """A token-wise function run on one tile of the sequence after the other."""
    parts = [box(20, 45 + 16 * n, 34, 16, BLUE if n == 2 else LIGHT) for n in range(7)]
    parts += [
        text(37, 172, "S x D"),
        arrow(58, 85, 96, 85),
        box(100, 77, 150, 16, BLUE),
        text(175, 108, f"{small}, one tile"),
    ]
    parts += [box(100, 45, 150, 112, "none", GRAY, "4 3"), text(175, 172, f"{wide}, never stored", color=GRAY)]
    return parts + [arrow(254, 85, 290, 85), text(332, 89, result), text(332, 120, "then the next tile", 10)]


def ulysses() -> list[str]:
    parts = []
    for device in range(4):
        color = (BLUE, ORANGE, "#5a9a5a", "#8a63a8")[device]
        parts += [box(25, 50 + 25 * device, 110, 25, color, "#fff"), box(245 + 27 * device, 50, 27, 100, color, "#fff")]
        parts += [
            text(80, 67 + 25 * device, f"GPU {device}", color="#fff"),
            text(259 + 27 * device, 104, str(device), color="#fff"),
        ]
    return parts + [
        arrow(145, 100, 235, 100),
        text(190, 92, "all-to-all"),
        text(80, 168, "some tokens, all heads"),
        text(299, 168, "all tokens, some heads"),
        text(14, 104, "S", color=GRAY),
        text(80, 44, "heads", color=GRAY),
    ]


def remat() -> list[str]:
    """Eight layers in segments of 4, 3 and 1: the input of each segment's first layer is kept, but not layer 1's."""
    parts = [
        text(35, 53, "layer", color=GRAY),
        text(35, 75, "segment", color=GRAY),
        text(35, 106, "input", color=BLUE),
        text(35, 142, "attention", color=ORANGE),
    ]
    for start, stop in ((0, 4), (4, 7), (7, 8)):
        width = 36 * (stop - start) - 6
        parts += [
            box(72 + 36 * start, 60, width, 94, "#f4f4f4", "#bbb"),
            text(
                72 + 36 * start + width / 2, 75, f"{stop - start} layers" if stop - start > 1 else "1", 10, color=GRAY
            ),
        ]
    for n in range(8):
        x = 75 + 36 * n
        first = n in (4, 7)
        parts += [
            text(x + 12, 53, str(n + 1), color=GRAY),
            box(x, 90, 24, 24, LIGHT if first else "none", BLUE, "" if first else "3 2"),
            box(x, 126, 24, 24, "none" if n < 3 else "#f6dfc4" if n < 5 else ORANGE, ORANGE, "3 2" if n < 3 else ""),
        ]
    return parts + [text(205, 174, "full: on the device; pale: in host memory; dashed: recomputed", 10)]


def host() -> list[str]:
    parts = [
        box(20, 50, 130, 105),
        text(85, 68, "GPU, 80 GB"),
        box(240, 50, 120, 105, "#f6ecdf", ORANGE),
        text(300, 68, "host memory"),
    ]
    parts += [
        text(85, 92, "layer n: compute", color=BLUE),
        text(300, 92, "weights"),
        text(300, 110, "gradients"),
        text(300, 128, "optimizer state"),
        text(300, 146, "residuals"),
    ]
    return parts + [
        arrow(236, 85, 156, 85),
        text(196, 78, "layer n+1", 10),
        arrow(156, 125, 236, 125),
        text(196, 118, "layer n-1", 10),
        text(190, 174, "copies beside the computation", 10),
    ]


def plan() -> list[str]:
    parts = []
    for n, (label, gib) in enumerate((("planned", 71.4), ("measured", 71.4))):  # benchmarks/results/2026-11-27-flash.md
        y = 58 + 40 * n
        parts += [
            text(62, y + 17, label, anchor="end"),
            box(70, y, 3.4 * gib, 26, (LIGHT, BLUE)[n]),
            text(82 + 3.4 * 75.2, y + 17, f"{gib}", anchor="start"),
        ]
    limit = 70 + 3.4 * 75.1
    parts.append(f'<line x1="{limit}" y1="48" x2="{limit}" y2="140" stroke="{ORANGE}" stroke-width="2"/>')
    return parts + [
        text(limit, 155, "limit 75.1 GiB", 10, color=ORANGE),
        text(190, 174, "Llama-8B, 524,288 tokens, one H100: GiB of device memory", 10),
    ]


class Idea(NamedTuple):
    """title; the panel; the two bars beside it: (label, size), and a line about them; the unit."""

    title: str
    panel: list[str]
    bars: tuple[tuple[str, float], tuple[str, float]]
    about: str
    unit: str = "GiB"


S, D, F, V, LAYERS = 524288, 4096, 14336, 128256, 32  # Llama-8B
gib = lambda *factors: math.prod(factors) / 2**30
IDEAS = (
    Idea(
        "1  tiled loss",
        tiled("logits S x V", "tile x V", "sum of losses"),
        (("whole: S x V", gib(S, V, 4)), ("one tile of 8,192", gib(8192, V, 4))),
        "logits, float32",
    ),
    Idea(
        "2  tiled MLP",
        tiled("gate, up S x F", "tile x F", "next S x D"),
        (("whole: S x F", gib(2, S, F, 2)), ("one tile of 16,384", gib(2, 16384, F, 2))),
        "gate and up of one layer, bfloat16",
    ),
    Idea(
        "3  Ulysses",
        ulysses(),
        (("one GPU", gib(LAYERS, S, D, 2)), ("each of 8 GPUs", gib(LAYERS, S // 8, D, 2))),
        "inputs of 32 layers, bfloat16",
    ),
    Idea(
        "4  recompute, and save levels",
        remat(),
        (("all intermediates", 32 * gib(S, 2, 4 * D + 2 * 1024 + 4 * F + 64)), ("layer inputs", gib(LAYERS, S, D, 2))),
        "saved by 32 layers for the backward pass",
    ),
    Idea(
        "5  host memory",
        host(),
        (("layer inputs on the device", 216.9), ("layer inputs in host memory", 87.0)),
        "device memory of a step, all arrays (two rows of the ladder)",
    ),
    Idea("6  the plan", plan(), (("planned", 491.3), ("measured", 510.3)), "seconds of the same step", "s"),
)


def bars(idea: Idea) -> list[str]:
    """Two horizontal bars to one scale, and the labels above them."""
    most, parts = max(size for _, size in idea.bars), [text(0, 45, idea.about, 11, "start", GRAY)]
    for n, (label, size) in enumerate(idea.bars):
        y, width = 72 + 50 * n, max(2.0, 250 * size / most)
        parts += [
            text(0, y - 5, label, 11, "start"),
            box(0, y, round(width, 1), 22, (ORANGE, BLUE)[n], "none"),
            text(width + 8, y + 16, f"{size:,.{size < 100:d}f} {idea.unit}", 11, "start"),
        ]
    return parts


def picture(width: int, height: int, parts: list[str]) -> str:
    """An SVG on a white ground, so that it is legible on dark pages too."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
            'font-family="sans-serif">',
            '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="7" refY="3" orient="auto"><path '
            'd="M0,0 L7,3 L0,6 z" fill="#444"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="6" fill="#fff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def pictures() -> dict[str, str]:
    """File name -> SVG."""
    place = lambda x, y, parts: [f'<g transform="translate({x},{y})">', *parts, "</g>"]
    title = lambda idea: text(14, 26, idea.title, 14, "start")
    panels = [
        part
        for n, idea in enumerate(IDEAS)
        for part in place(n % 2 * WIDTH, n // 2 * HEIGHT, [title(idea), *idea.panel])
    ]
    files = {"ideas.svg": picture(2 * WIDTH, 3 * HEIGHT, panels)}
    for n, idea in enumerate(IDEAS, 1):
        parts = [title(idea), *idea.panel, *place(WIDTH + 30, 0, bars(idea))]
        files[f"idea-{n}.svg"] = picture(2 * WIDTH, HEIGHT, parts)
    return files


if __name__ == "__main__":
    for name, svg in pictures().items():
        pathlib.Path(__file__).with_name(name).write_text(svg)
    print(f"{len(IDEAS)} ideas")
