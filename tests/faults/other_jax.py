"""python -m tests.faults.other_jax --python OTHER/bin/python: a run moves to another jax, mesh and memory profile.

Each of the two environments, this one and OTHER, trains six steps of a tiny model in float32 and keeps the checkpoint of
step 3. Then each resumes the checkpoint of the other environment, with the devices divided in another way and with
another profile. Each loss must be within 1e-5 (relative) of the run that stayed in this environment. --results: write
a line of JSON a run to this file. Not a part of the test suite, because it needs a second environment.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import tyro

ROOT = pathlib.Path(__file__).parents[2]
STEPS, SAVED = 6, 3
LIMIT = 1e-5
BEGIN = (
    f"--seq-len 64 --dp 1 --sp 2 --batch-size 2 --simulate-devices 2 --dtype float32 --steps {STEPS} --save-every {SAVED} "
    "--no-export --data-cache off --memory manual"
).split()
# Another mesh and another profile: other tiles, two groups of heads, weights, states and residuals in host memory.
MOVE = (
    "--dp 2 --sp 1 --batch-size 1 --loss-tile 24 --mlp-tile 20 --head-chunks 2 --offload-activations --offload-optimizer "
    "--offload-weights"
).split()


def main(python: str, results: pathlib.Path | None = None) -> int:
    """Exit code 1 if a loss differs by more than the limit. python: the other interpreter. results: gets a line a run."""
    pythons = [sys.executable, python]
    names = [f"jax {version(each)}" for each in pythons]
    if names[0] == names[1]:
        print(f"error: both interpreters have {names[0]}; give one with another jax (--python)", file=sys.stderr)
        return 2
    lines = []
    with tempfile.TemporaryDirectory(prefix="other-jax-") as made:
        folder = pathlib.Path(made)
        text = " ".join(f"{n} times {n} is {n * n}." for n in range(400))
        (folder / "text.txt").write_text(text)
        for at, name in enumerate(names):
            losses = train(pythons[at], folder / str(at), *BEGIN, "--data", folder / "text.txt")
            lines.append({"run": name, "losses": losses})
        for at, name in enumerate(names):
            out = folder / f"{1 - at}-then-{at}"
            shutil.copytree(folder / str(1 - at), out)
            shutil.rmtree(out / "checkpoints" / str(STEPS))
            losses = train(pythons[at], out, "--resume", *MOVE)
            lines.append(
                {"run": f"{names[1 - at]}, from step {SAVED} on {name} with {' '.join(MOVE)}", "losses": losses}
            )
    for line in lines:
        pairs = zip(line["losses"], lines[0]["losses"], strict=True)
        line["difference"] = max(abs(loss / first - 1) for loss, first in pairs)
        print(json.dumps(line), flush=True)
    if results:
        results.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return int(max(line["difference"] for line in lines) > LIMIT)


def version(python: str) -> str:
    done = subprocess.run(
        [python, "-c", "import jax; print(jax.__version__)"], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def train(python: str, out: pathlib.Path, *flags: object) -> list[float]:
    """The losses of all steps of a run."""
    command = [python, "train.py", *map(str, flags), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with code {done.returncode}\n{done.stdout}{done.stderr}")
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    found = {record["step"]: record["loss"] for record in records if "loss" in record and "event" not in record}
    if sorted(found) != list(range(1, STEPS + 1)):
        raise RuntimeError(f"{out}/metrics.jsonl has the losses of steps {sorted(found)}, not of 1 to {STEPS}")
    return [found[step] for step in sorted(found)]


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
