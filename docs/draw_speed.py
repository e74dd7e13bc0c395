"""Draw docs/speed.png: tokens a second against length, Llama-8B, beside other trainers. `uv run --extra plot
docs/draw_speed.py`"""

import pathlib

# Full fine-tuning of Llama-8B on one H200 limited to an H100's memory, with the optimizer step: (tokens in a sequence, tokens a second, note).
OURS = [  # 12 and 5 sequences a step at the first two lengths; 2026-11-28-h200-as-h100.md and -copies.md
    (32768, 6999, ""),
    (65536, 5165, ""),
    (131072, 3440, ""),
    (262144, 1944, ""),
    (524288, 1064, ""),
]
# ml_dataflow's recorded runs of 2025-09: its smallest and largest host memory at each length.
ML_DATAFLOW = [
    (32768, 7426, "64 GiB"),
    (65536, 5235, "80 GiB"),
    (131072, 3253, "112 GiB"),
    (262144, 1810, "160 GiB"),
    (524288, 928, "256 GiB"),
    (1048576, 481, "464 GiB"),
]
ML_DATAFLOW_MORE = [
    (32768, 7908, "112 GiB"),
    (65536, 5487, "144 GiB"),
    (131072, 3385, "128 GiB"),
    (262144, 2070, "224 GiB"),
    (524288, 1128, "356 GiB"),
    (1048576, 505, "496 GiB"),
]
ALST = [(500_000, 495, "1.9 TB node")]  # arXiv 2506.13996, 1,010 s a step
# Four layers, forward and backward, one script: benchmarks/results/2026-11-27-flash.md
FOUR_LAYERS = {"alst_jax": 24448, "transformers\n+ Liger": 19499}


def curve(axes, points, label, away, **style) -> None:
    """away: distance of the notes from their points, in points of type."""
    tokens, speed, notes = zip(*points)
    axes.plot(tokens, speed, label=label, **style)
    for x, y, note in points:
        axes.annotate(note, (x, y), textcoords="offset points", xytext=away, fontsize=7)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (lengths, layers) = plt.subplots(1, 2, figsize=(10, 3.8), width_ratios=(3, 1))
    curve(lengths, OURS, "alst_jax, 125 GiB (an H200 limited to 75 GiB)", (0, 0), marker="o", color="tab:blue")
    curve(
        lengths,
        ML_DATAFLOW_MORE,
        "ml_dataflow, most host memory",
        (6, 7),
        marker="^",
        color="tab:orange",
        linestyle="--",
    )
    curve(
        lengths,
        ML_DATAFLOW,
        "ml_dataflow, least host memory",
        (-14, -13),
        marker="v",
        color="tab:orange",
        linestyle=":",
    )
    curve(lengths, ALST, "ALST", (8, -3), marker="s", color="tab:red", linestyle="")
    lengths.set(
        xscale="log",
        yscale="log",
        xlabel="tokens in a sequence",
        ylabel="tokens a second",
        title="Llama-8B, full step, one GPU: H100 80 GB, if not said otherwise\n(host memory at each point)",
        xlim=(2.5e4, 1.7e6),
        ylim=(380, 9500),
    )
    ticks = [32768, 65536, 131072, 262144, 524288, 1048576]
    lengths.set_xticks(ticks, [f"{n:,}" for n in ticks])
    lengths.set_yticks([500, 1000, 2000, 4000, 8000], ["500", "1,000", "2,000", "4,000", "8,000"])
    lengths.minorticks_off()
    lengths.legend(fontsize=8, loc="lower left")
    bars = layers.bar(list(FOUR_LAYERS), list(FOUR_LAYERS.values()), color=["tab:blue", "tab:gray"])
    layers.bar_label(bars, fmt="{:,.0f}")
    layers.set(title="4 layers, 131,072 tokens", ylabel="tokens a second", ylim=(0, 28000))
    figure.tight_layout()
    path = pathlib.Path(__file__).with_name("speed.png")
    figure.savefig(path, dpi=110)
    print(f"{path.name}: {len(OURS)} lengths of ours, {len(ML_DATAFLOW) + len(ML_DATAFLOW_MORE) + len(ALST)} of others")


if __name__ == "__main__":
    main()
