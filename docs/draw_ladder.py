"""Draw docs/ladder.svg and write the table of docs/how-it-works.md: bytes of one step, one idea after the other.

    uv run python docs/draw_ladder.py

All numbers are the cost model's (alst_jax/planning/), for Llama-8B at 524,288 tokens on one H100 80 GB with 125 GiB of
host memory and 8-bit optimizer states. The last rung is the profile that `--memory auto` chooses there.
"""

import math
import pathlib
import sys
from typing import NamedTuple

DOCS = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS)]

from draw_ideas import BLUE, GRAY, ORANGE, box, picture, text  # noqa: E402

from alst_jax.hardware.machines import parse_cluster  # noqa: E402
from alst_jax.planning.estimate import estimate  # noqa: E402
from alst_jax.planning.job import Job  # noqa: E402
from alst_jax.profile import Profile  # noqa: E402
from benchmarks.shapes import LLAMA_8B  # noqa: E402

TOKENS, GIB, HOST_GIB = 524288, 2**30, 125
PAGE, PICTURE = DOCS / "how-it-works.md", DOCS / "ladder.svg"
MARK = "<!-- ladder -->"
START = dict(remat=False, loss_tile=None, mlp_tile=None)  # everything off
RUNGS = (  # each rung has the changes of all rungs above it
    ("every intermediate kept", {}, "`--memory manual --no-remat --no-tiled-loss --no-tiled-mlp`"),
    ("+ recompute: a layer keeps its input", dict(remat=True), "`--remat`"),
    ("+ tiled loss", dict(loss_tile=8192), "`--tiled-loss --loss-tile 8192`"),
    ("+ tiled MLP", dict(mlp_tile=16384), "`--tiled-mlp --mlp-tile 16384`"),
    ("+ layer inputs in host memory", dict(offload_activations=True), "`--offload-activations`"),
    ("+ 8 groups of heads", dict(head_chunks=8), "`--head-chunks 8`"),
    ("+ weights, gradients in host memory", dict(offload_weights=True), "`--offload-weights`"),
    (
        "+ save levels, as the plan chooses",
        dict(
            segment_layers=(2, 4, 4, 7, 8, 4, 2, 1),
            keep_attention_on_device=7,
            keep_attention_on_host=15,
            share_gradients=True,
        ),
        "`--segment-layers`, `--keep-attention-on-device`, `--keep-attention-on-host`, `--share-gradients`",
    ),
)


class Rung(NamedTuple):
    """Planned GiB of the device and of host memory."""

    name: str
    device: float
    host: float
    flags: str


def limits() -> tuple[float, float]:
    """GiB of an H100 and of its host that a run may use."""
    cluster = parse_cluster("H100-80", HOST_GIB)
    return cluster.machine.usable / GIB, cluster.host_share / GIB


def rungs() -> list[Rung]:
    """The ladder by the cost model. The 3 GiB that a save needs count as host memory."""
    changes, found = dict(START), []
    for name, more, flags in RUNGS:
        changes |= more
        profile = Profile(attention="flash", compute_dtype="bfloat16", **changes)
        plan = estimate(Job(LLAMA_8B, profile, 1, TOKENS, states="int8", master="none"))
        found.append(Rung(name, sum(plan.device.values()) / GIB, sum(plan.host.values()) / GIB, flags))
    return found


def table() -> str:
    """The ladder in Markdown."""
    device, host = limits()
    rows = [f"| {rung.name} | {rung.device:,.0f} | {rung.host:,.0f} | {rung.flags} |" for rung in rungs()]
    head = ["| Llama-8B, 524,288 tokens, one H100 | device GiB | host GiB | flags |", "|---|---|---|---|"]
    return "\n".join([*head, *rows, f"| *the limit* | {device:,.0f} | {host:,.0f} | |"])


def page(old: str) -> str:
    """The page with a current table between its two marks."""
    before, _, after = old.split(MARK)
    return f"{before}{MARK}\n{table()}\n{MARK}{after}"


def draw() -> str:
    """Two columns of bars, device and host, on a logarithmic scale."""
    columns, width, top = ((240, BLUE, "device"), (520, ORANGE, "host memory")), 200, 62
    at = lambda gib: max(2.0, width * math.log(gib / 8) / math.log(4096 / 8))
    found, limit = rungs(), limits()
    bottom = top + 30 * len(found)
    parts = [
        text(14, 24, "Llama-8B, 524,288 tokens, one H100 80 GB: planned GiB, one idea after the other", 13, "start")
    ]
    for (x, color, name), most in zip(columns, limit):
        line = x + at(most)
        parts += [
            text(x, 48, name, 12, "start", color),
            f'<line x1="{line}" y1="52" x2="{line}" y2="{bottom}" stroke="#222" stroke-dasharray="4 3"/>',
            text(line, bottom + 14, f"limit {most:.0f} GiB", 10),
        ]
    for n, rung in enumerate(found):
        y = top + 30 * n
        parts.append(text(230, y + 14, rung.name, 11, "end"))
        for (x, color, _), gib, most in zip(columns, (rung.device, rung.host), limit):
            fits = gib <= most
            parts += [
                box(x, y, round(at(gib), 1), 20, color if fits else "#fff", color),
                box(
                    x + at(gib) + 5, y + 4, 7 * len(f"{gib:,.0f}") + 2, 13, "#fff", "none"
                ),  # the limit's line stays behind
                text(x + at(gib) + 6, y + 14, f"{gib:,.0f}", 11, "start"),
            ]
    parts.append(
        text(
            14,
            bottom + 34,
            "filled: fits; empty: does not fit; dashed line: the limit; logarithmic scale",
            10,
            "start",
            GRAY,
        )
    )
    return picture(760, bottom + 44, parts)


if __name__ == "__main__":
    PICTURE.write_text(draw())
    if PAGE.exists():
        PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"{PICTURE.name}: {len(RUNGS)} rungs")
