"""train.py in several real processes on 127.0.0.1, forked from one that has imported everything.

`python -m tests.processes.ranks FOLDER SCENARIO...` plays scenarios and prints a line of JSON for each: tests start it,
since a process whose jax has run must not be forked.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np

from alst_jax.processes import hang
from tests.faults import kills
from tests.faults.kills import Kill

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = (
    "--seq-len 64 --schedule constant --warmup-steps 0 --learning-rate 1e-3 --eps 1e-4 --no-remat --no-tiled-loss "
    "--no-tiled-mlp --data-cache off --sp 2"
).split()


def make_model(top: pathlib.Path) -> None:
    """A tiny model and data. Uses jax: not in a process that forks later."""
    from alst_jax.data.tokenizer import byte_tokenizer
    from alst_jax.models.config import ModelConfig
    from alst_jax.models.hf_config import hf_config_dict
    from alst_jax.models.hf_weights import expected_shapes
    from alst_jax.models.weight_files import Unwritten, write_file

    model = ModelConfig(
        vocab_size=264, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8
    )
    byte_tokenizer().save_pretrained(top / "model")
    (top / "model" / "config.json").write_text(json.dumps(hf_config_dict(model)))
    rng = np.random.default_rng(0)
    draw = lambda name, shape: (
        np.ones(shape, np.float32) if "norm" in name else rng.normal(0, 0.05, shape).astype(np.float32)
    )
    write_file(
        top / "model" / "model.safetensors",
        [
            Unwritten(name, shape, np.dtype("float32"), lambda name=name, shape=shape: draw(name, shape))
            for name, shape in expected_shapes(model).items()
        ],
    )
    words = lambda: " ".join(rng.choice(["alpha", "beta", "gamma", "delta"], 12))
    (top / "data.jsonl").write_text("".join(json.dumps({"text": words()}) + "\n" for _ in range(50)))


@dataclasses.dataclass
class Ended:
    """How a process ended. after: seconds after the first process of the run that ended."""

    code: int
    log: str
    after: float


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


class Run:
    """Processes of one run. kill: of process `victim`."""

    def __init__(
        self,
        folder: pathlib.Path,
        arguments: list[str],
        count: int,
        devices: int,
        victim: int = -1,
        kill: Kill | None = None,
    ):
        port, self.pids, self.logs = free_port(), [], []
        self.victim, self.kill, self.began = victim, kill, time.monotonic()
        for rank in range(count):
            log = folder / f"log.{rank}"
            log.unlink(missing_ok=True)
            of_rank = (
                []
                if count == 1
                else f"--coordinator 127.0.0.1:{port} --processes {count} --process {rank} --start-timeout 50".split()
            )
            child = os.fork()
            if child == 0:
                if kill is not None and kill.hang:
                    hang.LEAST = kill.limit
                kills.in_child(
                    [*arguments, "--simulate-devices", str(devices), *of_rank], log, kill if rank == victim else None
                )
            self.pids.append(child)
            self.logs.append(log)

    def wait(self, limit: float = 500) -> list[Ended]:
        """Wait for all; those that are left `limit` seconds after the first one's end are killed: code -9."""
        ended, first = {}, None
        while len(ended) < len(self.pids):
            for rank, pid in enumerate(self.pids):
                if rank in ended:
                    continue
                if rank == self.victim and self.kill.seconds and time.monotonic() - self.began > self.kill.seconds:
                    os.kill(pid, signal.SIGKILL)
                if first is not None and time.monotonic() - first > limit:
                    os.kill(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    first = first or time.monotonic()
                    log = self.logs[rank].read_text(errors="replace") if self.logs[rank].exists() else ""
                    ended[rank] = Ended(os.waitstatus_to_exitcode(status), log, time.monotonic() - first)
            time.sleep(0.05)
        return [ended[rank] for rank in range(len(self.pids))]


class Bench:
    """A tiny model, data, and a folder for runs."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        kills.preload()
        kills.in_fork(lambda: make_model(folder))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "programs")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

    def flags(self, out: str, *more: str) -> list[str]:
        return [
            *f"--model {self.folder}/model --data {self.folder}/data.jsonl --out {self.folder}/{out}".split(),
            *FLAGS,
            *more,
        ]

    def losses(self, out: str, name: str = "loss") -> list[float]:
        """The values of that name of all steps that have one."""
        file = self.folder / out / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line)[name] for line in lines if line.startswith('{"step"') and f'"{name}"' in line]

    def packed(self, out: str, *more: str) -> list[str]:
        """Flags of a run with packs, and held-out data."""
        held_out = f"--pack --eval-data {self.folder}/data.jsonl --eval-every 1".split()
        return self.flags(out, *held_out, *more)

    def result(self, ended: list[Ended], **more: object) -> dict:
        return {
            "codes": [e.code for e in ended],
            "logs": [e.log for e in ended],
            "after": [e.after for e in ended],
            **more,
        }

    # ----------------------------------------------------------------------------------------------------- scenarios

    def interrupted(self) -> dict:
        """2 x 2 devices until SIGTERM to process 1; then one process with 4 devices goes on for two steps."""
        run = Run(self.folder, self.packed("two", "--steps", "900"), 2, 2)
        while len(self.losses("two")) < 2 and all(
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None for pid in run.pids
        ):
            time.sleep(0.05)
        os.kill(run.pids[1], signal.SIGTERM)
        first = run.wait()
        done = len(self.losses("two"))
        shutil.copytree(self.folder / "two", self.folder / "one")
        (later,) = Run(self.folder, ["--resume", "--out", f"{self.folder}/one", "--steps", str(done + 2)], 1, 4).wait()
        return self.result(
            first,
            done=done,
            losses=self.losses("two"),
            resumed=later.code,
            resumed_log=later.log,
            resumed_losses=self.losses("one"),
            resumed_eval=self.losses("one", "eval_loss"),
        )

    def alone(self, steps: str = "0") -> dict:
        """One process with 4 devices. steps: 0 for those of the run that `interrupted` left."""
        steps = str(int(steps) or len(self.losses("one")))
        ended = Run(self.folder, self.packed("alone", "--steps", steps), 1, 4).wait()
        return self.result(ended, losses=self.losses("alone"), eval=self.losses("alone", "eval_loss"))

    def together(self, count: str, devices: str, steps: str, *more: str) -> dict:
        """count x devices, to the end, with an export. more: flags without their dashes."""
        out = "-".join([f"together-{count}x{devices}", *more])
        flags = self.flags(out, "--steps", steps, "--save-every", "2", *(f"--{name}" for name in more))
        ended = Run(self.folder, flags, int(count), int(devices)).wait()
        return self.result(ended, losses=self.losses(out))

    def resumed(self, count: str, devices: str, of: str, dp: str, sp: str, rows: str, steps: str) -> dict:
        """count x devices go on with a copy of the run `of`, on another mesh."""
        out = f"resumed-{count}x{devices}"
        shutil.copytree(self.folder / of, self.folder / out, ignore=shutil.ignore_patterns("hf"))
        ended = Run(
            self.folder,
            [
                "--resume",
                "--out",
                f"{self.folder}/{out}",
                "--dp",
                dp,
                "--sp",
                sp,
                "--batch-size",
                rows,
                "--steps",
                steps,
            ],
            int(count),
            int(devices),
        ).wait()
        return self.result(ended, losses=self.losses(out))

    def adapters(self, count: str, devices: str) -> dict:
        """count x devices train adapters for two steps, and other processes go on for two, with --eval-long."""
        out = f"adapters-{count}x{devices}"
        more = f"--pack --lora-rank 2 --seq-len 512 --eval-long {self.folder}/long.txt --eval-long-sequences 1".split()
        text = "".join(f"The number {i} is less than {i * i}. " for i in range(100))
        (self.folder / "long.txt").write_text(text)
        ended = Run(self.folder, self.flags(out, *more, "--steps", "2"), int(count), int(devices)).wait()
        if any(e.code for e in ended):
            return self.result(ended)
        again = ["--resume", "--out", f"{self.folder}/{out}", "--steps", "4"]
        ended += Run(self.folder, again, int(count), int(devices)).wait()
        lines = [json.loads(line) for line in (self.folder / out / "metrics.jsonl").read_text().splitlines()]
        names = [name for name in lines[-1] if name.startswith("long_") and name != "long_seconds"]
        long = {name: [line[name] for line in lines if name in line] for name in names}
        return self.result(ended, losses=self.losses(out), long=long)

    def hung(self, stage: str, victim: str, limit: str) -> dict:
        """2 x 2 devices; process `victim` hangs at the second call of a stage; parts of a run may take `limit` seconds."""
        kill = Kill(stage, 2, hang=True, limit=float(limit))
        flags = self.flags(f"hung-{stage}", "--steps", "2", "--save-every", "1")
        began = time.monotonic()
        return self.result(Run(self.folder, flags, 2, 2, int(victim), kill).wait(), seconds=time.monotonic() - began)

    def killed(self, stage: str, number: str, victim: str) -> dict:
        """2 x 2 devices; process `victim` is killed at a call of a stage, or after "seconds"; then two others go on."""
        out = f"killed-{stage}-{number}-{victim}"
        kill = Kill(seconds=float(number)) if stage == "seconds" else Kill(stage, int(number))
        flags = self.flags(out, "--steps", "4", "--save-every", "1")
        ended = Run(self.folder, flags, 2, 2, int(victim), kill).wait(limit=90)
        saved = self.folder / out / "checkpoints"
        again = saved.is_dir() and any(path.name.isdigit() for path in saved.iterdir())
        later = Run(self.folder, ["--resume", "--out", f"{self.folder}/{out}"] if again else flags, 2, 2).wait()
        return self.result(ended, resumed=[e.code for e in later], resumed_log=later[0].log, losses=self.losses(out))


def main(folder: str, *scenarios: str) -> None:
    pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
    bench = Bench(pathlib.Path(folder))
    for scenario in scenarios:
        name, *words = scenario.split(":")
        print(json.dumps({"scenario": scenario} | getattr(bench, name)(*words)), flush=True)


def play(folder: pathlib.Path, *scenarios: str) -> list[dict]:
    """The results of scenarios, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.processes.ranks", str(folder), *scenarios],
        cwd=ROOT,
        text=True,
        capture_output=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"scenario"')]


if __name__ == "__main__":
    main(*sys.argv[1:])
