"""Seconds and resident memory of a run's first and second start on a file of texts, packed, and the loader's speed.

    python -m benchmarks.data_starts --megabytes 10 500 --folder /tmp/data-starts

Texts of web-like lengths (log-normal, median 1,800 characters) are made of random letters. Four bytes are a token, as
in English, without the tokenizer. Each start is a process of its own.
"""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import time

import numpy as np
import tyro


@dataclasses.dataclass
class Options:
    megabytes: tuple[int, ...] = (10, 100)
    """Of text, in one file."""
    folder: pathlib.Path = pathlib.Path("data-starts")
    """For the files and the cache; removed at the end."""
    seq_len: int = 131072
    bytes_per_token: int = 4
    batches: int = 40
    """Sequences that are read to measure the loader."""
    start: pathlib.Path | None = None
    """Measure one start on this file, and print JSON: used by this program itself."""


def main():
    options = tyro.cli(Options)
    if options.start:
        print(json.dumps(measure(options)))
        return
    print("| text | start | tokens | seconds | resident before | at its peak | loader, tokens/s of one core |")
    print("|" + "---|" * 7)
    for megabytes in options.megabytes:
        file = make_texts(options.folder / f"{megabytes}.jsonl", megabytes * 10**6)
        for name in ("first", "second"):
            command = [
                sys.executable,
                "-m",
                "benchmarks.data_starts",
                "--start",
                str(file),
                "--seq-len",
                str(options.seq_len),
                "--batches",
                str(options.batches),
                "--bytes-per-token",
                str(options.bytes_per_token),
            ]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {megabytes:,} MB | {name} | {row['tokens']:,} | {row['seconds']:.1f} (CPU {row['cpu']:.1f}) | "
                f"{row['before']} MiB | {row['peak']} MiB | {row['speed']:,.0f} |",
                flush=True,
            )
    shutil.rmtree(options.folder)


def make_texts(file: pathlib.Path, size: int) -> pathlib.Path:
    """About `size` bytes of JSON lines."""
    rng, written = np.random.default_rng(0), 0
    letters = "".join(rng.choice(list("abcdefghijklmnop qrst uvwxyz"), 1 << 21))
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as stream:
        while written < size:
            length = min(int(rng.lognormal(7.5, 1.2)) + 10, 1 << 20)
            start = int(rng.integers(0, len(letters) - length))
            written += stream.write(json.dumps({"text": letters[start : start + length]}) + "\n")
    return file


def measure(options: Options) -> dict[str, float]:
    """A start on --start."""
    from alst_jax import run_data
    from alst_jax.config import TrainConfig
    from alst_jax.data import report
    from alst_jax.data.tokenizer import byte_tokenizer
    from alst_jax.models.config import TINY_LLAMA
    from alst_jax.planning.job import Job
    from alst_jax.profile import Profile
    from alst_jax.storage.source import ModelSource

    def tokenize(texts, _):
        every = [np.frombuffer(text.encode(), np.uint8)[:: options.bytes_per_token] for text in texts]
        return [(tokens.astype(np.int32), np.ones(len(tokens), bool)) for tokens in every]

    report.tokenize_texts = tokenize
    config = TrainConfig(
        data=(str(options.start),),
        seq_len=options.seq_len,
        pack=True,
        data_cache=str(options.start.with_suffix(".cache")),
    )
    source = ModelSource("tiny", TINY_LLAMA, byte_tokenizer(), None)
    job = Job(TINY_LLAMA, Profile(), 1, options.seq_len)
    before, started, cpu = resident(), time.perf_counter(), time.process_time()
    data, stats, _ = run_data.read_data(config, source, job)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    next(data.training)
    reading = time.process_time()
    for _ in range(options.batches):
        next(data.training)
    reading = time.process_time() - reading
    return dict(
        tokens=stats.tokens,
        seconds=seconds,
        cpu=cpu,
        before=before["VmRSS"],
        peak=resident()["VmHWM"],
        speed=options.batches * options.seq_len / reading,
    )


def resident() -> dict[str, int]:
    """MiB of this process: VmRSS now, VmHWM at its peak."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    names = ("VmRSS", "VmHWM")
    return {name: int(line.split()[1]) // 1024 for name in names for line in lines if line.startswith(name)}


if __name__ == "__main__":
    main()
