# pytest -m gpu -s tests/gpu/test_copies.py
"""Copies between the device and host memory run beside the computation: a step with them is no slower than one
without them."""

import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu
STEP = [sys.executable, "-m", "benchmarks.step", *"--layers 4 --seq-len 131072 --steps 4 --no-update".split()]
AHEAD = "--offload-activations --prefetch-activations"


def seconds(flags: str, attention: str) -> float:
    """The fastest step but the first, in a process of its own."""
    command = [*STEP, "--attention", attention, *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    return min(map(float, re.findall(r"^step [2-9]: loss [\d.]+ after ([\d.]+) s", done.stdout, re.MULTILINE)))


@pytest.mark.parametrize(
    "copies,none",
    [
        (AHEAD, ""),
        (f"{AHEAD} --keep-attention-on-host 4", f"{AHEAD} --keep-attention-on-device 4"),
        ("--offload-activations --offload-weights", "--offload-activations"),
    ],
    ids=("inputs", "attention outputs", "weights and gradients"),
)
def test_copies_are_hidden(copies, none, capsys):
    attention = "flash" if flash_is_installed() else "cudnn"
    with_copies, without = seconds(copies, attention), seconds(none, attention)
    with capsys.disabled():
        print(f"\n{copies}: {with_copies:.3f} s, {none or 'none'}: {without:.3f} s, {with_copies / without - 1:+.1%}")
    assert with_copies < 1.02 * without


def flash_is_installed() -> bool:
    from alst_jax.ops.attention.devices import installed

    return all(map(installed, ("flash_attn.cute", "cutlass", "torch")))
