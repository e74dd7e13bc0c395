"""python -m tests.faults.campaign_kills 200 --results FILE: kill train.py anywhere, resume, compare.

A trial starts a run of a tiny model and kills it one to three times, each time in the run that goes on. Then the run
ends without a kill. It must equal the run that was never killed: each line of the metrics, the last checkpoint's arrays
and the exported file, bit for bit; and all its checksums must be right. Trials are numbered: the number is the seed.
The results file gets a line a trial; a second call goes on where the first stopped.
"""

import contextlib
import datetime
import hashlib
import io
import itertools
import json
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile

import tyro

from alst_jax.data.tokenizer import load_tokenizer
from tests.faults import kills, trials
from tests.faults.kills import Kill

ROOT = pathlib.Path(__file__).parents[2]
STEPS = 5
MOST = {
    "starting": 8,
    "loading": 24,
    "resuming": 40,
    "caching": 12,
    "stepping": 2 * STEPS,
    "logging": 2 * STEPS,
    "saving": 60,
    "committing": 25,
    "rotating": 100,
    "exporting": 50,
}  # calls, about: a later number is never reached
SIGABRT = -6
COMPARED = ("step", "loss", "grad_norm", "learning_rate", "labels")


def campaign(
    kills_wanted: tyro.conf.Positional[int] = 200,
    results: pathlib.Path | None = None,
    first: int = 0,
    seconds: float = float("inf"),
    stages: tuple[str, ...] = (),
) -> int:
    """Add trials to the results until they hold this many kills. seconds: begin no trial after so many. stages: kill
    there alone, one trial each, in this order; STAGE:NUMBER names the call. Exit code 1 if a run was lost or a bit
    differs."""
    done = trials.read(results)
    first = max(line["trial"] for line in done) + 1 if done and not stages else first
    kills.preload()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        bench = Bench(pathlib.Path(folder))
        numbers = range(first, first + len(stages)) if stages else itertools.count(first)
        trial = lambda number: bench.trial(number, stages[number - first] if stages else None)
        return trials.play(trial, numbers, results, kills_wanted, lambda line: len(line["kills"]), "same", seconds)


class Bench:
    """A tiny model, data, and the run that was never killed."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.log = folder, folder / "log.txt"
        self.commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
        ).stdout
        made = subprocess.run([sys.executable, "-c", MAKE_MODEL, str(folder)], cwd=ROOT, capture_output=True, text=True)
        if made.returncode:
            raise RuntimeError(made.stderr)
        load_tokenizer(folder / "model")  # its imports take longer than a run
        self.reference, self.seconds = folder / "reference", 0.0
        code, _ = kills.run(self.flags(self.reference), self.log)  # compiles
        if code:
            raise RuntimeError(self.log.read_text())
        shutil.rmtree(self.reference)
        code, self.seconds = kills.run(self.flags(self.reference), self.log)
        self.expected = outcome(self.reference)

    def flags(self, out: pathlib.Path) -> list[str]:
        return [
            *f"--model {self.folder}/model --data {self.folder}/data.jsonl --seq-len 64 --dp 2 --simulate-devices 2 "
            f"--steps {STEPS} --save-every 1 --keep-checkpoints 2 --learning-rate 1e-3 "
            f"--data-cache {out}-cache --out {out}".split()
        ]

    def trial(self, number: int, stage: str | None = None) -> dict:
        """Kill a run, let it go on, compare. stage: the only one."""
        rng, out = random.Random(number), self.folder / f"trial-{number}"
        self.log.write_text("")
        killed, codes = [], []
        for _ in range(1 if stage else rng.choice((1, 1, 2, 3))):
            kill = self._draw(rng, stage)
            code, _ = self._go(out, kill)
            codes.append(code)
            if code == -9:
                killed.append(str(kill))
            elif code and not self._xla_aborted(code):
                break
        for _ in range(2 + codes.count(SIGABRT)):
            if codes[-1] in (0, -9) or self._xla_aborted(codes[-1]):
                codes.append(self._go(out, None)[0])
        line = {
            "trial": number,
            "commit": self.commit.strip(),
            "date": f"{datetime.date.today()}",
            "kills": killed,
            "exit_codes": codes,
        }
        try:
            line["same"] = codes[-1] == 0 and outcome(out) == self.expected
        except (OSError, ValueError, KeyError) as error:
            line |= {"same": False, "why": f"{type(error).__name__}: {error}"[:300]}
        if not line["same"]:
            line["log"] = fatal(self.log.read_text())
            shutil.copytree(out, f"/tmp/failed-trial-{number}", dirs_exist_ok=True) if out.exists() else None
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(f"{out}-cache", ignore_errors=True)
        return line

    def _xla_aborted(self, code: int) -> bool:
        """Whether XLA ended the process because its simulated devices did not meet (docs/log.md). The run goes on."""
        return code == SIGABRT and "rendezvous.h" in fatal(self.log.read_text())

    def _draw(self, rng: random.Random, stage: str | None) -> Kill:
        if stage is None and rng.random() < 0.3:
            return Kill(seconds=rng.uniform(0.05, 1.2) * self.seconds)
        stage, _, number = (stage or rng.choice(sorted(MOST))).partition(":")
        return Kill(stage, int(number or rng.randint(1, MOST[stage])))

    def _go(self, out: pathlib.Path, kill: Kill | None) -> tuple[int, float]:
        """Resume where there is a checkpoint. Without one there is nothing to lose: the same command again."""
        steps = out / "checkpoints"
        saved = steps.is_dir() and any(p.name.isdigit() for p in steps.iterdir())
        arguments = ["--resume", "--out", str(out)] if saved else self.flags(out)
        return kills.run(arguments, self.log, kill)


def fatal(log: str) -> str:
    """The lines that say why a process ended: XLA's fatal ones, else the last."""
    lines = [line for line in log.splitlines() if re.match(r"F\d{4} ", line)]
    return "\n".join(lines)[:1000] or log[-600:]


def outcome(out: pathlib.Path) -> dict:
    """What must be equal: metrics, arrays of the last checkpoint, the export; and whether all checksums are right."""
    return kills.in_fork(lambda: _outcome(out))


def _outcome(out: pathlib.Path) -> dict:
    from alst_jax.storage.checkpoint import Checkpoints
    from convert.verify import verify

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    with contextlib.redirect_stdout(io.StringIO()):
        verified = verify(out)
    checkpoints = Checkpoints(out)
    steps, digest = checkpoints.steps(), lambda content: hashlib.sha256(content).hexdigest()
    arrays = {
        f"{item}.{'.'.join(name)}": digest(array.tobytes())
        for item in ("params", "optimizer")
        for name, array in checkpoints.read_item(steps[-1], item)
    }
    return {
        "metrics": [[line[name] for name in COMPARED] for line in lines if "event" not in line],
        "verified": verified,
        "steps": steps,
        "arrays": arrays,
        "export": digest((out / "hf" / "model.safetensors").read_bytes()),
    }


MAKE_MODEL = """
import json, pathlib, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from alst_jax.data.tokenizer import byte_tokenizer
folder = pathlib.Path(sys.argv[1])
tokenizer = byte_tokenizer()
torch.manual_seed(0)
LlamaForCausalLM(LlamaConfig(
    vocab_size=264, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, max_position_embeddings=64, bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id)).save_pretrained(folder / "model")
tokenizer.save_pretrained(folder / "model")
with (folder / "data.jsonl").open("w") as file:
    for i in range(1, 9):
        file.write(json.dumps({"text": " ".join(f"{i} x {n} is {i * n}." for n in range(4 + 3 * i))}) + chr(10))
"""

if __name__ == "__main__":
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(tempfile.gettempdir()) / "alst-jax-kills-full"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA ends a process whose simulated devices do not meet within 40 s, as on a machine with much other work.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_collective_call_terminate_timeout_seconds=600"
    )
    sys.exit(tyro.cli(campaign))
