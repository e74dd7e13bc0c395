"""python -m benchmarks.processes OUT --model DIR --data FILE --shapes 1x2 2x1: the same run divided into processes.

A shape is processes x devices of each. Runs train.py in each shape, in float32 and with the same flags, and prints
losses, tokens a second, device and host memory; then how far losses and exported weights are from those of the first
shape. Expected: several processes equal each other to the bit, and one process to 1e-6; tokens a second within 3%, the
same planned bytes of a device.
"""

import dataclasses
import json
import pathlib
import re
import socket
import statistics
import subprocess
import sys

import numpy as np
import tyro
from safetensors.numpy import load_file

ROOT = pathlib.Path(__file__).parents[1]


@dataclasses.dataclass
class Options:
    out: tyro.conf.Positional[pathlib.Path]
    model: str
    data: str
    shapes: tuple[str, ...] = ("1x2", "2x1")
    seq_len: str = "32k"
    sp: int = 2
    steps: int = 6
    simulate: bool = False
    """CPU devices instead of GPUs."""
    flags: str = ""
    """More flags of train.py, in one word."""


def compare(options: Options) -> None:
    """Run all shapes, and print a line for each and for each pair."""
    given = f"--model {options.model} --data {options.data} --seq-len {options.seq_len} --sp {options.sp}".split()
    given += f"--steps {options.steps} {options.flags}".split()
    given += ["--dtype", "float32", "--attention", "xla", "--random-weights", "--export"]
    results = {}
    for shape in options.shapes:
        count, devices = map(int, shape.split("x"))
        run_dir = options.out / shape
        more = ["--simulate-devices", str(devices)] if options.simulate else []
        log = start([*given, *more, "--out", str(run_dir)], count)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "loss" in line]
        memory = {name: max(line[name] for line in lines) for name in lines[0] if name.startswith("peak_")}
        speed = statistics.median(line["tokens_per_second"] for line in lines[1:])
        losses, plan = [line["loss"] for line in lines], re.findall(r"^plan .*", log, re.M)
        print(
            json.dumps({"shape": shape, "losses": losses, "tokens_per_second": speed, **memory, "plan": plan}),
            flush=True,
        )
        results[shape] = losses, weights(run_dir)
    for i, shape in enumerate(options.shapes):
        for other in options.shapes[:i]:
            print(json.dumps({"shape": shape, "against": other} | distance(results[shape], results[other])))


def weights(run_dir: pathlib.Path) -> dict[str, np.ndarray]:
    """The exported weights by name."""
    found = {}
    for file in sorted((run_dir / "hf").glob("*.safetensors")):
        found |= load_file(file)
    return found


def distance(ours, theirs) -> dict[str, float | bool]:
    """The largest relative difference of a loss, the largest of a tensor (in the Euclidean norm), and whether all bits
    are equal. ours, theirs: (losses, weights)."""
    (losses, tensors), (other_losses, other_tensors) = ours, theirs
    apart = lambda a, b: float(np.linalg.norm(a - b) / np.linalg.norm(b))
    same = losses == other_losses and all(np.array_equal(tensors[name], other_tensors[name]) for name in tensors)
    return {
        "loss": max(abs(a - b) / abs(b) for a, b in zip(losses, other_losses, strict=True)),
        "weights": max(apart(tensors[name], other_tensors[name]) for name in other_tensors),
        "identical": same,
    }


def start(arguments: list[str], count: int) -> str:
    """The output of process 0. RuntimeError if one fails."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    of = lambda rank: (
        [] if count == 1 else f"--coordinator 127.0.0.1:{port} --processes {count} --process {rank}".split()
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, ROOT / "train.py", *arguments, *of(rank)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in range(count)
    ]
    logs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise RuntimeError("\n".join(logs))
    return logs[0]


if __name__ == "__main__":
    compare(tyro.cli(Options))
