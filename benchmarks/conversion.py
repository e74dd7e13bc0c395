"""Seconds and memory of convert.from_hf and convert.to_hf, beside the seconds that the disk alone needs.

    python -m benchmarks.conversion FOLDER --shape 70B --layers 10      # needs twice the model's bytes, and 4 GB

FOLDER gets generated bfloat16 shards of that shape. Each round imports them, removes them, and exports the checkpoint:
the shards of the next round, which then have checksums. Before and after each conversion, a file of --probe GB is
written, read and copied. The page cache is emptied (Linux, as root) before each of these, and a `sync` belongs to each
write. At the end all tensors are compared with the generated bits.

Columns: "disk" is (bytes read / read speed + bytes written / write speed) / seconds. "copy" is GB/s / GB/s of the copy.
"GiB" is the largest RssAnon: pages of mapped files do not count. "CPU s" is user and system time.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Annotated, Literal

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
import numpy as np
import psutil
import tyro

from alst_jax.models.block import abstract_params
from alst_jax.models.hf_config import hf_config_dict
from alst_jax.models.hf_saving import layer_of, tensors_of, write_tensors
from alst_jax.models.weight_files import find_tensors, read_stored
from benchmarks.shapes import LLAMA_70B, QWEN3_32B

SHAPES = {"32B": QWEN3_32B, "70B": LLAMA_70B}
BLOCK = 2**24  # bytes that the probe reads and writes at a time
HEAD = "", "GB", "seconds", "GB/s", "read GB/s", "write GB/s", "copy GB/s", "disk", "copy", "GiB", "CPU s"
ROW = "| {:7} | {:>5} | {:>7} | {:>5} | {:>10} | {:>10} | {:>10} | {:>5} | {:>5} | {:>5} | {:>5} |"


@dataclasses.dataclass(frozen=True)
class Options:
    """folder: on the disk that is measured. layers: of all. rounds: imports and exports. probe: GB."""

    folder: Annotated[pathlib.Path, tyro.conf.Positional]
    shape: Literal["32B", "70B"] = "70B"
    layers: int = 10
    rounds: int = 2
    probe: float = 4.0


def main(options: Options) -> None:
    options.folder.mkdir(parents=True)
    shards, checkpoint = options.folder / "hf", options.folder / "checkpoint"
    hashes = generate(shards, options)
    size = _bytes(shards)
    print(f"{options.shape}, {options.layers} layers: {size / 1e9:.2f} GB", flush=True)
    print(ROW.format(*HEAD), flush=True)
    before = probe(options)
    for _ in range(options.rounds):
        for name, source, target in (("from_hf", shards, checkpoint), ("to_hf", checkpoint, shards)):
            if target.exists():
                shutil.rmtree(target)
            seconds, memory, cpu = run(name, source, target)
            after = probe(options)
            read, write, copy = ((a + b) / 2 for a, b in zip(before, after))
            disk = (_bytes(source) / read + _bytes(target) / write) / 1e9 / seconds
            cells = f"{size / 1e9:.2f}", f"{seconds:.1f}", f"{size / 1e9 / seconds:.2f}"
            speeds = [f"{a:.2f}, {b:.2f}" for a, b in zip(before, after)]
            shares = f"{disk:.0%}", f"{size / 1e9 / seconds / copy:.0%}"
            print(ROW.format(name, *cells, *speeds, *shares, f"{memory / 2**30:.2f}", f"{cpu:.0f}"), flush=True)
            shutil.rmtree(source)
            before = after
    found = {name: _hash(read_stored(tensor)) for name, tensor in find_tensors(shards).items()}
    print(f"{len(found)} tensors: {'the generated bits' if found == hashes else 'OTHER BITS'}")
    shutil.rmtree(options.folder)
    sys.exit(found != hashes)


def generate(shards: pathlib.Path, options: Options) -> dict[str, str]:
    """Write shards of at most 5 GB with random values; returns the hash of each tensor."""
    config = dataclasses.replace(SHAPES[options.shape], num_layers=options.layers)
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, np.dtype("bfloat16")), abstract_params(config, np.float32)
    )
    rng, hashes = np.random.Generator(np.random.SFC64(0)), {}

    def drawn(tensor):
        def read():
            bits = rng.integers(0, 2**63, -(-tensor.nbytes // 8), np.uint64).view(np.uint16) & 0xBFFF  # all are finite
            value = bits[: tensor.nbytes // 2].view(tensor.dtype).reshape(tensor.shape)
            hashes[tensor.name] = _hash(value)
            return value

        return tensor._replace(read=read)

    shards.mkdir()
    (shards / "config.json").write_text(json.dumps(hf_config_dict(config)))
    tensors = sorted(
        tensors_of(jax.tree_util.tree_leaves_with_path(abstract), config), key=lambda x: layer_of(x.name, config)
    )
    write_tensors(map(drawn, tensors), shards, 5 * 10**9)
    return hashes


def probe(options: Options) -> tuple[float, float, float]:
    """GB/s: a cold file that is read, a new file that is written, a cold file that is copied in blocks."""
    file, blocks = options.folder / "probe", int(options.probe * 1e9) // BLOCK
    data = memoryview(np.random.default_rng(0).bytes(BLOCK))
    empty_cache()
    started = time.perf_counter()
    with open(file, "wb", buffering=0) as out:
        for _ in range(blocks):
            out.write(data)
        os.fsync(out.fileno())
    written = time.perf_counter() - started
    empty_cache()
    buffer, started = bytearray(BLOCK), time.perf_counter()
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
    read = time.perf_counter() - started
    empty_cache()
    started = time.perf_counter()
    with open(file, "rb", buffering=0) as stream, open(options.folder / "copy", "wb", buffering=0) as out:
        while size := stream.readinto(buffer):
            out.write(memoryview(buffer)[:size])
        os.fsync(out.fileno())
    copied = time.perf_counter() - started
    file.unlink()
    (options.folder / "copy").unlink()
    return tuple(blocks * BLOCK / seconds / 1e9 for seconds in (read, written, copied))


def run(name: str, source: pathlib.Path, target: pathlib.Path) -> tuple[float, int, float]:
    """Seconds, the largest RssAnon in bytes and CPU seconds of a conversion in its own process."""
    empty_cache()
    command = [sys.executable, "-m", f"convert.{name}", str(source), str(target)]
    cpu, started, memory = os.times(), time.perf_counter(), 0
    process = psutil.Popen(command, stdout=subprocess.PIPE)
    status = pathlib.Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        memory = max(memory, int(fields.get("RssAnon", "0 kB").split()[0]) * 1024)
        time.sleep(0.02)
    if process.returncode:
        raise SystemExit(process.returncode)
    os.sync()
    seconds, spent = time.perf_counter() - started, os.times()
    cpu_seconds = spent.children_user + spent.children_system - cpu.children_user - cpu.children_system
    return seconds, memory, cpu_seconds


def empty_cache() -> None:
    os.sync()
    pathlib.Path("/proc/sys/vm/drop_caches").write_text("3")


def _bytes(folder: pathlib.Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _hash(value: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).view(np.uint8)).hexdigest()


if __name__ == "__main__":
    main(tyro.cli(Options))
