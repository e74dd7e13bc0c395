"""python -m benchmarks.processes OUT --model DIR --data FILE --gpus 2: one process for all GPUs against one a GPU.

Runs train.py both ways, in float32 and with the same flags, and prints losses, tokens a second, device and host memory.
Expected: losses equal to 1e-6, tokens a second within 3%, the same planned bytes of a device.
"""

import json
import pathlib
import re
import socket
import statistics
import subprocess
import sys

import tyro

ROOT = pathlib.Path(__file__).parents[1]


def compare(
    out: tyro.conf.Positional[pathlib.Path],
    model: str,
    data: str,
    gpus: int = 2,
    seq_len: str = "32k",
    sp: int = 2,
    steps: int = 6,
    simulate: bool = False,
) -> None:
    """simulate: CPU devices instead of GPUs."""
    flags = f"--model {model} --data {data} --seq-len {seq_len} --sp {sp} --steps {steps}".split()
    flags += ["--dtype", "float32", "--random-weights"]
    for count in (1, gpus):
        run_dir = out / f"{count}-processes"
        more = ["--simulate-devices", str(gpus // count)] if simulate else []
        log = start([*flags, *more, "--out", str(run_dir)], count)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "loss" in line]
        memory = {name: max(line[name] for line in lines) for name in lines[0] if name.startswith("peak_")}
        print(
            json.dumps(
                {
                    "processes": count,
                    "losses": [line["loss"] for line in lines],
                    "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines[1:]),
                    **memory,
                    "plan": re.findall(r"^plan .*", log, re.M),
                }
            ),
            flush=True,
        )


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
    tyro.cli(compare)
