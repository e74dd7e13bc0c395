"""Draw docs/packing.png: a packed batch, and how full packs are. `uv run --extra plot docs/draw_packing.py`"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from alst_jax.data.packing import pack

SEQ_LEN, DOCUMENTS = 131072, 20_000


def lengths() -> np.ndarray:
    """Web-like: log-normal, half of the documents below 700 tokens, cut at the sequence's length."""
    return np.minimum(np.random.default_rng(0).lognormal(6.5, 1.5, DOCUMENTS).astype(int) + 1, SEQ_LEN)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (batch, full) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=(2, 1))
    sizes = np.array([40000, 30000, 20000, 15000, 10000, 8000, 5000, 3072])
    mask = np.zeros((256, 256))
    edges = np.concatenate([[0], np.cumsum(sizes)]) * 256 // sizes.sum()
    for number, (start, end) in enumerate(zip(edges, edges[1:])):
        mask[start:end, start:end] = np.tril(np.full((end - start, end - start), 0.35 + 0.6 * (number % 2)))
    batch.imshow(mask, cmap="Blues", aspect="auto", vmin=0, vmax=1, extent=(0, sizes.sum(), sizes.sum(), 0))
    batch.set(title="8 documents in one sequence: the keys that each query reads", xlabel="key", ylabel="query")
    data = lengths()
    alone = data.sum() / (DOCUMENTS * SEQ_LEN)
    packed = data.sum() / (len(pack(data, SEQ_LEN, 0)) * SEQ_LEN)
    full.bar(["one document\na sequence", "--pack"], [100 * alone, 100 * packed], color=["tab:gray", "tab:blue"])
    full.set(
        title=f"positions with a token, %\n{DOCUMENTS:,} web-like documents,\n{SEQ_LEN:,} positions", ylim=(0, 108)
    )
    for i, part in enumerate((alone, packed)):
        full.text(i, 100 * part + 1, f"{100 * part:.1f}", ha="center")
    figure.tight_layout()
    path = pathlib.Path(__file__).with_name("packing.png")
    figure.savefig(path, dpi=110)
    print(f"{path.name}: {100 * alone:.1f}% full alone, {100 * packed:.1f}% packed")


if __name__ == "__main__":
    main()
