# pytest -m gpu tests/gpu/test_flash.py
"""flash-attn-4's kernels on a Hopper GPU: against XLA in float32, documents, transformations, beyond 2^31 elements.

Each test prints its relative errors, also when it passes. Select with -k: equals_xla (27 cases, about 12 s each),
documents, transformed, wall, bits. One failing case hides no other.
"""

import dataclasses
import functools
import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from alst_jax.ops.attention import AttentionSpec, attention, attention_backward, attention_forward, flash
from alst_jax.ops.attention.devices import installed
from alst_jax.ops.attention.flash_tiles import Call, workspace_bytes

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # packages warn when they are imported
NAMES = ("o", "lse", "dq", "dk", "dv")
BFLOAT16 = 5e-3  # rounding of bfloat16: 2.0e-3 (o) to 2.7e-3 (dq, dk) were measured
TANH = 1e-2  # the kernel's tanh is the GPU's approximation, 2^-11
CAUSAL, FULL = AttentionSpec(), AttentionSpec(causal=False)
WINDOW, CAP = AttentionSpec(window=300), AttentionSpec(soft_cap=2.0)
BOTH_SIDES, CAPPED_WINDOW = AttentionSpec(window=300, causal=False), AttentionSpec(window=300, soft_cap=2.0, scale=0.1)


@pytest.fixture(autouse=True, scope="module")
def packages():
    if not all(map(installed, ("flash_attn.cute", "cutlass", "torch"))):
        pytest.skip("flash-attn-4, nvidia-cutlass-dsl or torch is not installed")
    flash.prepare()


@pytest.fixture(autouse=True)
def free_memory():
    yield
    gc.collect()
    jax.clear_caches()


@pytest.fixture
def report(capsys, request):
    def show(errors):
        with capsys.disabled():
            words = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
            print(f"\n{request.node.name}: {words}", flush=True)
        return errors

    return show


def inputs(length, heads, kv_heads, head_dim=128, batch=1, dtype=jnp.bfloat16):
    """q, k, v, do."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes)]


@functools.partial(jax.jit, static_argnames=("spec", "kernel"))
def both(q, k, v, do, documents=None, *, spec, kernel):
    """(o, lse, dq, dk, dv)."""
    o, lse = attention_forward(q, k, v, spec, documents, kernel=kernel)
    return o, lse, *attention_backward(q, k, v, (o, lse), do, spec, documents, kernel=kernel)


@jax.jit
def relative(a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel())


def errors_of(found, expected, names=NAMES):
    return {name: float(relative(a, b)) for name, a, b in zip(names, found, expected)}


def exact(arrays, spec, documents=None):
    with jax.default_matmul_precision("highest"):
        return both(*(x.astype(jnp.float32) for x in arrays), documents, spec=spec, kernel="xla")


def check(errors, tolerance):
    """All of them are compared before any fails. Not a number is a failure too."""
    wrong = {name: error for name, error in errors.items() if not error < tolerance}
    assert not wrong, f"above {tolerance}: {wrong}"


CASES = {
    f"{h}-{name}": (h, *case)
    for h in (64, 96, 128, 192, 256)
    for name, case in {
        "causal": (CAUSAL, 8, 2, 1999),
        "full": (FULL, 8, 2, 1999),
        "window": (WINDOW, 8, 2, 1999),
        "mha": (CAUSAL, 4, 4, 1999),
    }.items()
}
CASES |= {
    "128-even": (128, CAUSAL, 8, 2, 2048),
    "128-mqa": (128, CAUSAL, 8, 1, 1999),
    "128-cap": (128, CAP, 8, 2, 1999),
    "128-sides": (128, BOTH_SIDES, 8, 2, 1999),
    "128-capped-window": (128, CAPPED_WINDOW, 8, 2, 1999),
    "64-cap": (64, CAP, 8, 2, 1999),
    "256-cap": (256, CAP, 8, 2, 1999),
    "128-six": (128, CAUSAL, 12, 2, 1999),
}


@pytest.mark.parametrize("case", CASES)
def test_flash_equals_xla(case, report):
    head_dim, spec, heads, kv_heads, length = CASES[case]
    arrays = inputs(length, heads, kv_heads, head_dim)
    errors = report(errors_of(both(*arrays, spec=spec, kernel="flash"), exact(arrays, spec)))
    check(errors, TANH if spec.soft_cap else BFLOAT16)
    assert errors["lse"] < (2e-3 if spec.soft_cap else 1e-4)


@pytest.mark.parametrize("heads,kv_heads", [(8, 2), (4, 4)])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_batch_of_two_equals_xla(head_dim, heads, kv_heads, report):
    arrays = inputs(1999, heads, kv_heads, head_dim, batch=2)
    check(report(errors_of(both(*arrays, spec=CAUSAL, kernel="flash"), exact(arrays, CAUSAL))), BFLOAT16)


def test_float16_equals_xla(report):
    arrays = inputs(1999, 8, 2, dtype=jnp.float16)
    check(report(errors_of(both(*arrays, spec=CAUSAL, kernel="flash"), exact(arrays, CAUSAL))), 2e-3)


@pytest.mark.parametrize("length", [1, 63, 130])
def test_a_short_sequence_equals_xla(length, report):
    arrays = inputs(length, 8, 2)
    found, expected = both(*arrays, spec=CAUSAL, kernel="flash"), exact(arrays, CAUSAL)
    if length == 1:  # the weight is 1: dq and dk are zero
        found, expected = (results[:2] + results[4:] for results in (found, expected))
    check(report(errors_of(found, expected, NAMES if length > 1 else ("o", "lse", "dv"))), BFLOAT16)


@pytest.mark.parametrize("kernel", ["flash", "cudnn"])
@pytest.mark.parametrize("lengths", [None, (1000, 1, 47, 1000, 1024, 1024)], ids=("whole", "documents"))
def test_sinks_equal_xla(kernel, lengths, report):
    spec, offsets = AttentionSpec(sinks=True), None if lengths is None else offsets_of(lengths)
    *arrays, do = inputs(2048, 8, 2, batch=2)
    sinks = jnp.linspace(-3.0, 6.0, 8)

    @functools.partial(jax.jit, static_argnames="kernel")
    def both(q, k, v, sinks, do, kernel):
        o, pullback = jax.vjp(lambda *x: attention(*x[:3], spec, offsets, x[3], kernel=kernel), q, k, v, sinks)
        return o, *pullback(do)

    with jax.default_matmul_precision("highest"):
        true = both(*(x.astype(jnp.float32) for x in (*arrays, sinks, do)), kernel="xla")
    names = ("o", "dq", "dk", "dv", "dsinks")
    check(
        report(errors_of(both(*arrays, sinks, do, kernel=kernel), true, names)), 1e-2 if kernel == "cudnn" else BFLOAT16
    )


# -------------------------------------------------------------------------------------------------------- documents

LENGTHS = {  # of documents in 2 x 2,048 tokens; none crosses a row
    "mixed": [1000, 1, 47, 1000, 1024, 1024],
    "empty": [0, 0, 2048, 0, 700, 1348, 0, 0],
    "many": [8] * 256 + [4] * 512,
}


def offsets_of(lengths):
    return jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)


@pytest.mark.parametrize("heads,kv_heads", [(8, 2), (4, 4)])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_documents_equal_xla(lengths, heads, kv_heads, report):
    offsets = offsets_of(LENGTHS[lengths])
    arrays = inputs(2048, heads, kv_heads, batch=2)
    found = both(*arrays, offsets, spec=CAUSAL, kernel="flash")
    check(report(errors_of(found, exact(arrays, CAUSAL, offsets))), BFLOAT16)


@pytest.mark.parametrize(
    "head_dim,spec",
    [(64, CAUSAL), (96, CAUSAL), (192, CAUSAL), (256, CAUSAL), (128, WINDOW), (128, FULL)],
    ids=("64", "96", "192", "256", "window", "full"),
)
def test_documents_of_other_shapes_equal_xla(head_dim, spec, report):
    offsets, arrays = offsets_of(LENGTHS["empty"]), inputs(2048, 8, 2, head_dim, batch=2)
    check(report(errors_of(both(*arrays, offsets, spec=spec, kernel="flash"), exact(arrays, spec, offsets))), BFLOAT16)


def test_documents_equal_one_at_a_time(report):
    """Empty documents behind change nothing; o and lse are those of a dense call."""
    lengths = [512, 1024, 512, 1024, 1024]
    offsets = jnp.concatenate([offsets_of(lengths), jnp.full(8, sum(lengths), jnp.int32)])
    arrays = inputs(4096, 8, 2)
    packed, at, worst = both(*arrays, offsets, spec=CAUSAL, kernel="flash"), 0, dict.fromkeys(NAMES, 0.0)
    for n in lengths:
        alone = both(*(x[:, at : at + n] for x in arrays), spec=CAUSAL, kernel="flash")
        piece = [x[:, :, at : at + n] if name == "lse" else x[:, at : at + n] for name, x in zip(NAMES, packed)]
        worst = {name: max(worst[name], error) for name, error in errors_of(piece, alone).items()}
        at += n
    check(report(worst), 1e-3)  # the order of sums
    assert worst["o"] < 1e-6 and worst["lse"] < 1e-6


def test_one_program_serves_any_number_of_documents(report):
    arrays = inputs(2048, 8, 2)
    run = jax.jit(functools.partial(both, spec=CAUSAL, kernel="flash"))
    for lengths in ([2048, 0, 0, 0], [512] * 4, [0, 1, 2046, 1]):
        offsets = offsets_of(lengths)
        check(report(errors_of(run(*arrays, offsets), exact(arrays, CAUSAL, offsets))), BFLOAT16)
    assert run._cache_size() == 1  # jax has no public name for it


# -------------------------------------------------------------------------------------------------- transformations


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("kv_heads", [2, 8])
def test_transformed_equals_plain(kv_heads, devices, report):
    """Inside jit, shard_map with checked axes, scan and checkpoint, against three layers one by one. Each device has
    a row of the batch."""
    if devices > jax.device_count():
        pytest.skip(f"{devices} GPUs are needed")
    q, k, v, do = inputs(1999, 8, kv_heads, batch=devices)

    def loss(q, k, v, do):
        layer = jax.checkpoint(lambda h: (h + attention(h, k, v, kernel="flash"), None))
        h, _ = jax.lax.scan(lambda h, _: layer(h), q, None, length=3)
        return jax.lax.psum((h.astype(jnp.float32) * do).sum(), "data")

    def plain(q, k, v, kernel):
        for _ in range(3):
            q = q + attention(q, k, v, kernel=kernel).astype(q.dtype)
        return (q.astype(jnp.float32) * do).sum()

    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
    sharded = P("data")
    gradient = jax.grad(loss, (0, 1, 2))
    run = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=(sharded,) * 4, out_specs=(sharded,) * 3))
    found = run(q, k, v, do)
    same = jax.jit(jax.grad(functools.partial(plain, kernel="flash"), (0, 1, 2)))(q, k, v)
    with jax.default_matmul_precision("highest"):
        true = jax.grad(functools.partial(plain, kernel="xla"), (0, 1, 2))(*(x.astype(jnp.float32) for x in (q, k, v)))
    gradients = ("dq", "dk", "dv")
    check(report(errors_of(found, same, gradients)), 5e-3)
    check(report(errors_of(found, true, gradients)), 2e-2)  # three layers in bfloat16


def test_bits_are_the_same_in_a_fixed_order(report):
    arrays = inputs(4096, 8, 2)
    o, lse = attention_forward(*arrays[:3], CAUSAL, kernel="flash")
    call = dataclasses.replace(Call.of(*arrays[:2], CAUSAL), deterministic=True)
    run = jax.jit(lambda *args: flash.opaque(flash.backward_kernel)(*args, call=call))
    args = (*arrays[:3], o, lse, arrays[3])
    first, again, free = run(*args), run(*args), both(*arrays, spec=CAUSAL, kernel="flash")[2:]
    check(report(errors_of(first, free, ("dq", "dk", "dv"))), 1e-3)
    for a, b in zip(first, again):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_workspace_is_planned(report):
    """Temporary bytes of the compiled backward pass against `workspace_bytes`."""
    q, k = (jax.ShapeDtypeStruct((1, 131072, n, 128), jnp.bfloat16) for n in (32, 8))
    lse = jax.ShapeDtypeStruct((1, 32, 131072), jnp.float32)
    run = jax.jit(lambda q, k, v, o, lse, do: attention_backward(q, k, v, (o, lse), do, kernel="flash"))
    measured = run.lower(q, k, k, q, lse, q).compile().memory_analysis().temp_size_in_bytes
    planned = workspace_bytes(1, 131072, 32, 8, 128)
    report({"planned GiB": planned / 2**30, "compiled GiB": measured / 2**30})
    assert abs(measured - planned) < 0.05 * planned


@pytest.mark.slow
def test_wall_of_2_31_elements_is_none(report):
    """589,824 tokens x 32 heads in one call: the last ninth of dq against calls of 4 heads each."""
    arrays, last = inputs(589_824, 32, 8), 65_536
    whole = np.asarray(both(*arrays, spec=CAUSAL, kernel="flash")[2][0, -last:], np.float32)
    errors = {}
    for i in range(8):
        q, k, v, do = (x[:, :, i * n : (i + 1) * n] for x, n in zip(arrays, (4, 1, 1, 4)))
        part = np.asarray(both(q, k, v, do, spec=CAUSAL, kernel="flash")[2][0, -last:], np.float32)
        errors[f"heads {4 * i}"] = float(np.linalg.norm(whole[:, 4 * i : 4 * i + 4] - part) / np.linalg.norm(part))
    check(report(errors), 1e-3)
