# pytest tests/unit/test_flash.py
"""The flash kernel without a GPU: its entry in the table, its refusals, its tables of tiles, bytes and rates."""

import dataclasses
import importlib.metadata
import importlib.util
import subprocess
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.config import UserError
from alst_jax.ops.attention import KERNELS, AttentionSpec, attention, find_kernel, flash, refusal
from alst_jax.ops.attention.costs import speed, workspace
from alst_jax.ops.attention.devices import Gpu, choose_kernel
from alst_jax.ops.attention.flash_rates import DOCUMENT_RATES, RATES, RATES_BY_HEADS
from alst_jax.ops.attention.flash_tiles import (
    BACKWARD,
    FORWARD,
    HEAD_DIMS,
    Call,
    block_offsets,
    padded,
    padded_of,
    workspace_bytes,
)

GIB = 2**30
PACKAGES = ("flash_attn", "cutlass", "torch")


def spec_call(head_dim=128, group=4, **spec):
    q, k = (jnp.zeros((1, 64, n, head_dim), jnp.bfloat16) for n in (2 * group, 2))
    return Call.of(q, k, AttentionSpec(**spec))


def test_the_table_has_it_and_it_serves_every_feature():
    kernel = find_kernel("flash")
    assert kernel is KERNELS["flash"] and kernel.needs_gpu and kernel.multiple == 1 and kernel.capabilities == ("9.0",)
    assert kernel.dtypes == ("bfloat16", "float16") and kernel.package == "flash_attn.cute"
    _, takes = kernel.head_dims
    assert [h for h in range(8, 264, 8) if takes(h)] == list(HEAD_DIMS) == [64, 96, 128, 192, 256]
    for spec in (AttentionSpec(), AttentionSpec(window=8), AttentionSpec(soft_cap=5.0), AttentionSpec(causal=False)):
        assert refusal(kernel, spec, documents=True) is None


def test_importing_the_project_imports_none_of_its_packages():
    code = f"import sys, alst_jax.ops.attention; print(*[m for m in {PACKAGES} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


class Installed:
    """Stands for the installed packages: those in `missing` are not found."""

    def __init__(self, monkeypatch, missing=(), torch="2.11.0+cu130", library="lib.so"):
        found = lambda module: None if {module, module.split(".")[0]} & set(missing) else object()
        monkeypatch.setattr(importlib.util, "find_spec", found)
        monkeypatch.setattr(importlib.metadata, "version", lambda name: torch)
        cutlass = types.SimpleNamespace(find_cute_dsl_runtime_library=lambda: library)
        self.broken = {}

        def import_module(name):
            if name in self.broken:
                raise self.broken[name]
            return cutlass

        monkeypatch.setattr(flash.importlib, "import_module", import_module)


@pytest.mark.parametrize("missing,named", zip(PACKAGES, ("flash-attn-4", "nvidia-cutlass-dsl", "torch")))
def test_a_missing_package_is_named(missing, named, monkeypatch):
    Installed(monkeypatch, [missing])
    with pytest.raises(UserError, match=rf"--attention flash: {named} is not installed; pip install") as error:
        find_kernel("flash").prepare()
    assert "\n" not in str(error.value)


def test_jax_on_cuda_12_is_refused(monkeypatch):
    Installed(monkeypatch, ["jax_plugins.xla_cuda13"])
    with pytest.raises(UserError, match="tested with jax on CUDA 13, .* install the extra cuda13 instead of cuda12"):
        flash.prepare()


def test_an_old_torch_is_named(monkeypatch):
    Installed(monkeypatch, torch="2.6.0+cu124")
    with pytest.raises(UserError, match=r"needs torch 2.7 or newer, not 2.6.0\+cu124; pip install -U torch"):
        flash.prepare()


def test_a_missing_cuda_part_is_named(monkeypatch):
    Installed(monkeypatch, library=None)
    with pytest.raises(UserError, match=r"lacks its CUDA part; pip install 'nvidia-cutlass-dsl\[cu13\]'"):
        flash.prepare()
    Installed(monkeypatch).broken["cutlass.jax"] = ImportError("no _cutlass_ir")
    with pytest.raises(UserError, match=r"lacks its CUDA part \(no _cutlass_ir\)"):
        flash.prepare()


def test_a_package_of_a_package_that_is_missing_is_named(monkeypatch):
    Installed(monkeypatch).broken[flash.LAUNCHERS] = ModuleNotFoundError("No module named 'einops'")
    with pytest.raises(UserError, match="--attention flash: No module named 'einops'; pip install"):
        flash.prepare()


def test_a_call_without_the_packages_is_refused_and_not_served_by_another_kernel():
    if importlib.util.find_spec("cutlass") is not None:
        pytest.skip("the packages are installed")
    q = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
    with pytest.raises(UserError, match="--attention flash: .*pip install"):
        attention(q, q, q, kernel="flash")


def test_windows_and_tiles():
    assert (spec_call().is_causal, spec_call().is_local, spec_call().window) == (True, False, None)
    windowed = spec_call(window=16)
    assert (windowed.is_causal, windowed.is_local, windowed.window) == (False, True, (15, 0))
    assert spec_call(window=16, causal=False).window == (15, 15)
    assert spec_call(causal=False).backward_tiles.rows == 80 and windowed.backward_tiles.rows == 64
    assert spec_call(256, window=16).forward_tiles.keys == 64 and spec_call(256).forward_tiles.keys == 80
    assert spec_call(scale=0.5).scale == 0.5 and spec_call(64).scale == 0.125
    assert len({spec_call(), spec_call(window=16), spec_call(soft_cap=5.0), spec_call(group=1)}) == 4  # cache keys
    assert hash(dataclasses.replace(spec_call(), deterministic=True)) != hash(spec_call())
    for head_dim in HEAD_DIMS:  # the kernels were written for these
        assert all(t.rows % 64 == 0 and t.keys % 16 == 0 for t in FORWARD[head_dim])
        assert all(head_dim % t.head_dim_multiple == 0 and t.rows % 16 == 0 for t in BACKWARD[head_dim])


def test_block_offsets_count_the_blocks_before_each_document():
    offsets = jnp.array([0, 1, 130, 130, 258, 258, 258], jnp.int32)
    np.testing.assert_array_equal(block_offsets(offsets, 128), [0, 1, 3, 3, 4, 4, 4])
    np.testing.assert_array_equal(block_offsets(offsets, 128, heads=4), [0, 1, 6, 6, 10, 10, 10])
    assert block_offsets(offsets, 64).dtype == jnp.int32


@pytest.mark.parametrize("lengths", [[5, 0, 64, 1, 200], [1] * 300, [0, 0, 7]])
def test_padded_documents_do_not_overlap(lengths):
    """Document i begins at row (offset + i rows) // rows rows, as in flash_attn/cute/seqlen_info.py."""
    offsets, rows = np.concatenate([[0], np.cumsum(lengths)]), 64
    starts = [(at + i * rows) // rows * rows for i, at in enumerate(offsets)]
    ends = [start + -(-n // rows) * rows for start, n in zip(starts, lengths)]
    assert all(end <= start for end, start in zip(ends, starts[1:]))
    room = padded(int(offsets[-1]), rows, jnp.asarray(offsets))
    assert max(ends) <= room == padded_of(int(offsets[-1]), rows, len(lengths))
    assert padded(1999, 64) == 2048 and padded(2048, 64) == 2048


def test_workspace_is_the_measured_one():
    assert workspace_bytes(1, 131072, 32, 8, 128) / GIB == pytest.approx(3.0, abs=0.05)  # measured
    assert workspace_bytes(1, 524288, 4, 1, 128) / GIB == pytest.approx(1.5, abs=0.03)
    one_kv_head_each = workspace_bytes(1, 131072, 32, 32, 128)
    assert one_kv_head_each / GIB == pytest.approx(2.0, abs=0.05)  # no sums of dk and dv
    assert workspace_bytes(2, 1000, 8, 2, 64) == 2 * workspace_bytes(1, 1000, 8, 2, 64)
    packed = workspace_bytes(1, 131072, 32, 8, 128, documents=64)
    assert 0 < packed - workspace_bytes(1, 131072, 32, 8, 128) <= 4 * 65 * (32 * 64 * 130 + 2 * 8 * 128 * 128)


@pytest.mark.parametrize("documents", [0, 64])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_the_workspace_of_a_fixed_order_has_semaphores(documents, kv_heads):
    """int32[documents or rows, heads, blocks of queries], and 2 x [..., kv heads, blocks of keys, 2]."""
    shape = (2, 4096, 8, kv_heads, 128)
    free, ordered = (workspace(name, *shape, documents) for name in ("flash", "flash-deterministic"))
    batch, length = (documents, 8192) if documents else (2, 4096)
    of_keys = 2 * 2 * kv_heads * length // 128 if kv_heads < 8 else 0
    assert ordered - free == 4 * batch * (8 * length // 64 + of_keys)


def test_rates_have_the_form_of_the_planner():
    at_heads = lambda heads: speed(
        "flash", "backward", 131072, 989, heads=heads
    )  # between 4 and 32 heads by the logarithm
    assert [at_heads(n) for n in (2, 4, 32, 64)] == [639, 639, 595, 595] and at_heads(8) == pytest.approx(639 - 44 / 3)
    assert speed("flash", "backward", 131072, 989) == 595 and speed("cudnn", "forward", 131072, 989, heads=4) == 590
    for rates in (*RATES.values(), *RATES_BY_HEADS.values()):
        assert set(rates) == {"forward", "backward"} and rates["forward"].keys() == rates["backward"].keys()
        assert all(isinstance(n, int) and 300 < tflops < 989 for which in rates.values() for n, tflops in which.items())
    assert all(DOCUMENT_RATES["forward"][n] > DOCUMENT_RATES["backward"][n] for n in DOCUMENT_RATES["forward"])


# ----------------------------------------------------------------------------------------------- which kernel is taken

HERE, PLANNED = Gpu("NVIDIA H100 80GB HBM3", "9.0", present=True), Gpu("H100-80", "9.0", present=False)
BLACKWELL = Gpu("NVIDIA B200", "10.0", present=True)


def choose(gpu, wanted="auto", dtype="bfloat16", head_dim=128, deterministic=False):
    kernel, why = choose_kernel(wanted, KERNELS, gpu, dtype, head_dim, deterministic)
    return kernel.name, why


def test_auto_takes_flash_on_hopper_where_it_is_installed(monkeypatch):
    Installed(monkeypatch)
    assert choose(HERE) == choose(PLANNED) == ("flash", "the fastest on Hopper")
    assert choose(HERE, head_dim=256)[0] == "flash" and choose(HERE, "cudnn") == ("cudnn", "as --attention says")
    name, why = choose(HERE, head_dim=80)
    assert name == "cudnn" and "head_dim=80 must be one of 64, 96, 128, 192, 256" in why
    name, why = choose(BLACKWELL)
    assert name == "cudnn" and "tested on Hopper GPUs only, not on NVIDIA B200" in why
    assert choose(None, dtype="float32") == ("xla", "the only one without a GPU")


def test_auto_says_why_it_does_not_take_flash(monkeypatch):
    Installed(monkeypatch, ["flash_attn"])
    name, why = choose(HERE)
    assert name == "cudnn" and why.startswith(
        "not flash, the fastest on Hopper: the package is not installed (pip install"
    )
    Installed(monkeypatch, torch="2.6.0")
    name, why = choose(HERE)
    assert name == "cudnn" and "needs torch 2.7 or newer, not 2.6.0" in why


def test_a_wrong_card_is_named_before_a_missing_package(monkeypatch):
    Installed(monkeypatch, ["flash_attn"])
    with pytest.raises(UserError, match="tested on Hopper GPUs only, not on NVIDIA B200; use --attention cudnn"):
        choose(BLACKWELL, "flash")


@pytest.mark.parametrize(
    "gpu,wanted,head_dim,other",
    [
        (HERE, "flash", 80, "cudnn"),
        (HERE, "flash", 160, "xla"),
        (HERE, "auto", 256, "flash"),  # which is not installed
        (PLANNED, "cudnn", 256, "flash"),
        (BLACKWELL, "auto", 256, "xla"),
    ],
)
def test_another_kernel_for_a_head_dim_is_named(gpu, wanted, head_dim, other, monkeypatch):
    Installed(monkeypatch, ["flash_attn"])
    with pytest.raises(UserError, match=f"head_dim={head_dim} must be .*; use --attention {other}$"):
        choose(gpu, wanted, head_dim=head_dim)


def test_a_named_kernel_is_not_replaced(monkeypatch):
    Installed(monkeypatch, ["flash_attn"])
    with pytest.raises(UserError, match="--attention flash: the package is not installed"):
        choose(HERE, "flash")
    with pytest.raises(UserError, match="--attention tokamax: there is no such kernel any more; use --attention auto"):
        choose(HERE, "tokamax")


def test_deterministic_takes_the_kernel_that_sums_in_a_fixed_order(monkeypatch):
    Installed(monkeypatch)
    assert choose(HERE, deterministic=True)[0] == choose(HERE, "flash", deterministic=True)[0] == "flash-deterministic"
    assert choose(None, dtype="float32", deterministic=True)[0] == choose(None, "xla", deterministic=True)[0] == "xla"
    for refused in (dict(wanted="cudnn"), dict(head_dim=80)):
        with pytest.raises(UserError, match="--deterministic with --attention cudnn: cuDNN adds gradients in no fixed"):
            choose(HERE, deterministic=True, **refused)


def test_deterministic_reaches_the_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(flash, "opaque", lambda kernel: lambda *arrays, call: calls.append(call) or arrays[:3])
    q, lse = jnp.ones((1, 64, 2, 64), jnp.bfloat16), jnp.ones((1, 2, 64))
    for name in ("flash", "flash-deterministic"):
        KERNELS[name].backward(q, q, q, q, lse, q, AttentionSpec())
    assert [call.deterministic for call in calls] == [False, True]
