"""Draw docs/architecture.svg: the layers of alst_jax from bottom to top, each with its purpose and its files.

    uv run python docs/draw_architecture.py

The order is the one that tests/unit/test_layers.py holds; the files are read from the directory.
"""

import collections
import pathlib
import sys
import textwrap

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from draw_ideas import picture, text  # noqa: E402

from tests.unit.test_layers import LAYERS  # noqa: E402

WIDTH, COLUMNS, PICTURE = 860, 150, ROOT / "docs" / "architecture.svg"
PURPOSE = (  # neighbouring layers that are drawn as one box, and their purpose
    (
        "declare segments profile data_flags lora_flags watch_flags extend_flags process_flags config flag_checks",
        "the flags, each declared once; the memory profile and its segments; errors of users",
    ),
    ("processes", "several processes of one run"),
    ("hardware", "machines, limits of host memory, the environment of jax"),
    ("xla", "orders and places that the compiler must be told"),
    ("ops", "pure functions of local arrays: tiling, attention kernels, loss"),
    ("data", "files -> documents -> sequences -> batches"),
    ("models", "the block, the families, Hugging Face's format"),
    ("parallel", "mesh, ZeRO-3 shards, Ulysses"),
    ("stack", "one layer in tiles, all layers, embedding and loss"),
    ("optim", "AdamW, its storage formats, the update in pieces"),
    ("in_backward step lowered", "the compiled programs of a step"),
    ("storage", "run directories, checkpoints, checksums"),
    ("metrics profiling watch refused trainer", "the loop, its log, its warnings"),
    ("at_length", "the evaluation at length"),
    ("planning", "bytes and seconds before a run; the choice of a profile"),
    ("preflight", "a step against an independent computation"),
    (
        "run_packs run_data run_long run_lora run_state run run_report",
        "flags -> data, model, mesh, step, state, report",
    ),
)


def files() -> dict[str, list[str]]:
    """The files of each layer that is a directory, below it and without their suffix."""
    found = collections.defaultdict(list)
    for file in sorted((ROOT / "alst_jax").rglob("*.py")):
        layer, *below = file.relative_to(ROOT / "alst_jax").parts
        if below and file.stem != "__init__":
            found[layer].append("/".join(below).removesuffix(".py"))
    return found


def boxes() -> list[tuple[list[str], str]]:
    """(neighbouring layers, their purpose), bottom to top. A layer without a purpose has a box of its own."""
    found, purposes = [], {names.split()[0]: (names.split(), text) for names, text in PURPOSE}
    covered = {name for names, _ in PURPOSE for name in names.split()}
    for layer in LAYERS:
        if layer in purposes or layer not in covered:
            found.append(purposes.get(layer, ([layer], "")))
    return found


def draw() -> str:
    """The picture."""
    names, y, lines = files(), 34, []
    for layers, purpose in reversed(boxes()):
        listed = textwrap.wrap(", ".join(name for layer in layers for name in names[layer]), COLUMNS)
        title = ", ".join(reversed(layers)) if len(layers) > 1 else layers[0]
        titles = textwrap.wrap(title, 105)
        height = 8 + 16 * len(titles) + 15 + 13 * len(listed)
        lines.append(
            f'<rect x="10" y="{y}" width="{WIDTH - 20}" height="{height}" rx="4" fill="#eef3f8" stroke="#4477aa"/>'
        )
        at = y + 2
        for style, size, part in (
            [('font-weight="bold" fill="#222"', 13, line) for line in titles]
            + [('fill="#a05a10"', 12, purpose)]
            + [('fill="#444"', 10, line) for line in listed]
        ):
            at += size + 2.5
            lines.append(f'<text x="18" y="{at}" font-size="{size}" {style}>{part.replace(">", "&gt;")}</text>')
        y += height + 5
    title = "alst_jax/: a file imports only from the layers below its own"
    return picture(WIDTH, y + 4, [text(12, 20, title, 12, "start", "#555"), *lines])


if __name__ == "__main__":
    PICTURE.write_text(draw())
    print(f"{PICTURE.name}: {len(LAYERS)} layers")
