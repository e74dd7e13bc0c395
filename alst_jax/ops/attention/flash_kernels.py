"""Launchers of flash-attn-4's four Hopper kernels, as functions of jax arrays. Imports cutlass, flash_attn and torch:
flash.py imports this module only when the kernel is used.

B rows, S tokens, T = B S, N query heads, K kv heads, H head dim, D documents. Sizes in float32 accumulators are padded:
Q query rows, R key rows. Arrays are dense (q[B, S, N, H], lse[B, N, S]) or packed (q[T, N, H], lse[N, T]) with offsets.
The launch functions are plain: `cutlass_call` traces them inside its own `cute.jit`. Arguments, tiles and buffer sizes
follow flash_attn/cute/interface.py of flash-attn-4 4.0.0b36 (`_flash_attn_fwd`, `_flash_attn_bwd`).
"""

import cutlass
import jax
import jax.numpy as jnp
from cutlass import Float32, Int32
from cutlass.jax import cutlass_call
from flash_attn.cute.flash_bwd_postprocess import FlashAttentionBackwardPostprocess
from flash_attn.cute.flash_bwd_preprocess import FlashAttentionBackwardPreprocess
from flash_attn.cute.flash_bwd_sm90 import FlashAttentionBackwardSm90
from flash_attn.cute.flash_fwd_sm90 import FlashAttentionForwardSm90
from flash_attn.cute.utils import create_softcap_scoremod, create_softcap_scoremod_bwd

from alst_jax.ops.attention.flash_tiles import Call, block_offsets, padded

DTYPES = {"bfloat16": cutlass.BFloat16, "float16": cutlass.Float16}
ARCHITECTURE = 90  # of the postprocess kernel
shape = jax.ShapeDtypeStruct


def call_kernel(launch, name, call, outputs, inputs, aliases=None):
    """The outputs of one kernel. name and call identify everything that `launch` captures: they are the cache key."""
    key = ("alst_jax.flash", name, call)
    return cutlass_call(launch, output_shape_dtype=outputs, input_output_aliases=aliases, compile_key=key)(*inputs)


def window(call: Call) -> dict:
    """Runtime bounds of a sliding window; none without one."""
    if call.window is None:
        return {}
    left, right = call.window
    return {"window_size_left": Int32(left), "window_size_right": Int32(right)}


def offsets(cu, table) -> dict:
    """Arguments for packed documents: offsets of queries and keys and, of many documents, the table of their blocks."""
    if cu is None:
        return {}
    return {"mCuSeqlensQ": cu, "mCuSeqlensK": cu} | ({} if table is None else {"mCuTotalMBlocks": table})


def documents_of(call: Call, cu, rows: int, heads: int = 1) -> tuple:
    """Inputs of a kernel with blocks of `rows` rows: (), (offsets,) or, of many documents, (offsets, table)."""
    if cu is None:
        return ()
    return (cu, block_offsets(cu, rows, heads)) if call.has_table(cu.shape[0] - 1) else (cu,)


def unpack(arrays, count):
    """The first `count` arrays, then offsets and table (None where absent)."""
    extra = arrays[count:]
    return (*arrays[:count], *extra, *[None] * (2 - len(extra)))


def forward(q, k, v, *documents, call: Call):
    """(o like q, lse float32[B, N, S] or [N, T])."""
    tiles, dtype = call.forward_tiles, DTYPES[call.dtype]
    cap = {} if call.soft_cap is None else {"score_mod": create_softcap_scoremod(call.soft_cap)}
    kernel = FlashAttentionForwardSm90(
        dtype,
        call.head_dim,
        call.head_dim,
        call.group,
        is_causal=call.is_causal,
        is_local=call.is_local,
        pack_gqa=call.group > 1,
        tile_m=tiles.rows,
        tile_n=tiles.keys,
        num_stages=2,
        num_threads=384,
        Q_in_regs=False,
        intra_wg_overlap=True,
        mma_pv_is_rs=tiles.weights_in_registers,
        **cap,
    )
    (cu,) = documents or (None,)
    inputs = (q, k, v, *documents_of(call, cu, tiles.rows, call.group))

    def launch(stream, *arrays):
        q, k, v, cu, table = unpack(arrays[:-2], 3)
        kernel(q, k, v, *arrays[-2:], Float32(call.scale), **offsets(cu, table), **window(call), stream=stream)

    lse = (q.shape[1], q.shape[0]) if documents else (q.shape[0], q.shape[2], q.shape[1])
    return call_kernel(launch, "forward", call, (shape(q.shape, q.dtype), shape(lse, jnp.float32)), inputs)


def backward(q, k, v, o, lse, do, *documents, call: Call):
    """(dq, dk, dv): preprocess, main kernel, postprocess."""
    (cu,) = documents or (None,)
    sum_lse, lse_log2, dq_sum = preprocess(o, do, lse, cu, call)
    sums = ()
    if call.group > 1:
        rows = padded(k.shape[-3], call.backward_tiles.keys, cu)
        sums = two_zeros((*k.shape[:-3], k.shape[-2], rows * call.head_dim), jnp.float32, lse)
    semaphores = semaphores_of(q, k, lse, cu, call) if call.deterministic else ()
    dq_sum, dk, dv = main((q, k, v, do, lse_log2, sum_lse, dq_sum), cu, call, sums, semaphores)
    if call.group > 1:
        dk = postprocess(dk, k, cu, call, call.scale, of_keys=True)
        dv = postprocess(dv, v, cu, call, 1.0, of_keys=True)
    return postprocess(dq_sum, q, cu, call, call.scale, of_keys=False), dk, dv


def two_zeros(size, dtype, lse):
    """Two arrays of zeros, each written in place by a kernel. XLA would make one of two equal constants."""
    never = jnp.where(lse.ravel()[0] > jnp.inf, 1, 0).astype(dtype)
    return jnp.zeros(size, dtype), jnp.full(size, never)


def preprocess(o, do, lse, cu, call: Call):
    """(sum over H of o do, lse in base 2, zeros of dq): float32 [B, N, Q], [B, N, Q], [B, N, Q H], or without B."""
    rows, heads = call.backward_tiles.rows, o.shape[-2]
    kernel = FlashAttentionBackwardPreprocess(
        DTYPES[call.dtype],
        call.head_dim,
        call.head_dim,
        rows,
        use_padded_offsets=True,
        hdim_multiple_of=call.backward_tiles.head_dim_multiple,
    )

    def launch(stream, *arrays):
        o, do, lse, cu, table = unpack(arrays[:-3], 3)
        sum_lse, lse_log2, dq_sum = arrays[-3:]
        kernel(o, do, sum_lse, lse, lse_log2, dq_sum, cu, None, None, None, None, Float32(1.0), table, None, stream)

    lead, length = o.shape[:-3], padded(o.shape[-3], rows, cu)
    outputs = tuple(shape((*lead, heads, size), jnp.float32) for size in (length, length, length * call.head_dim))
    return call_kernel(launch, "preprocess", call, outputs, (o, do, lse, *documents_of(call, cu, rows)))


def main(arrays, cu, call: Call, sums, semaphores):
    """(dq sum, dk, dv). arrays: q, k, v, do, lse in base 2, sum of o do, zeros of dq, to which dq is added. sums: zeros
    of dk and dv [B, K, R H], to which these are added, or () if each kv head has one query head."""
    kernel = main_kernel(call)
    written = (arrays[6], *sums, *semaphores)  # in place
    inputs = (*arrays, *sums, *semaphores, *documents_of(call, cu, call.backward_tiles.keys))
    made = () if sums else arrays[1:3]
    outputs = tuple(shape(x.shape, x.dtype) for x in (*written, *made))
    aliases = {6 + i: i for i in range(len(written))}
    first, fixed = 7 + len(sums), 6 + len(written)

    def launch(stream, *buffers):
        *_, cu, table = unpack(buffers[: len(inputs)], fixed)
        gradients = buffers[7:9] if sums else buffers[len(inputs) :]
        fences = dict(zip(("mdQ_semaphore", "mdK_semaphore", "mdV_semaphore"), buffers[first:fixed]))
        more = fences | offsets(cu, table) | window(call)
        kernel(*buffers[:7], *gradients, Float32(call.scale), **more, stream=stream)

    results = call_kernel(launch, "main", call, outputs, inputs, aliases)
    return results[0], *(results[1:3] if sums else results[-2:])


def main_kernel(call: Call):
    tiles, cap = call.backward_tiles, {}
    if call.soft_cap is not None:
        cap = {
            "score_mod": create_softcap_scoremod(call.soft_cap),
            "score_mod_bwd": create_softcap_scoremod_bwd(call.soft_cap),
        }
    return FlashAttentionBackwardSm90(
        DTYPES[call.dtype],
        call.head_dim,
        call.head_dim,
        call.group,
        call.is_causal,
        is_local=call.is_local,
        deterministic=call.deterministic,
        tile_m=tiles.rows,
        tile_n=tiles.keys,
        Q_stage=2,
        dO_stage=tiles.do_stages,
        PdS_stage=tiles.score_stages,
        SdP_swapAB=tiles.swap_scores,
        dKV_swapAB=tiles.swap_dkv,
        dQ_swapAB=tiles.swap_dq,
        AtomLayoutMSdP=1,
        AtomLayoutNdKV=tiles.atoms_dkv,
        AtomLayoutMdQ=tiles.atoms_dq,
        num_threads=384,
        V_in_regs=False,
        dQ_single_wg=tiles.one_group_for_dq,
        **cap,
    )


def semaphores_of(q, k, lse, cu, call: Call):
    """Zeros [B or D, heads, blocks, 1 or 2] that fix the order of sums: of dq and, with shared kv heads, dk, dv."""
    batch, tiles = q.shape[0] if cu is None else cu.shape[0] - 1, call.backward_tiles
    fences = (jnp.zeros((batch, q.shape[-2], -(-q.shape[-3] // tiles.rows), 1), jnp.int32),)
    if call.group == 1:
        return fences
    return *fences, *two_zeros((batch, k.shape[-2], -(-k.shape[-3] // tiles.keys), 2), jnp.int32, lse)


def postprocess(total, like, cu, call: Call, scale: float, *, of_keys: bool):
    """scale total in the dtype and shape of `like`, from the layout in which the main kernel adds."""
    tiles = call.backward_tiles
    if of_keys:
        rows, threads, atoms, swap = tiles.keys, 256, tiles.atoms_dkv, tiles.swap_dkv
    else:
        rows, threads, atoms, swap = tiles.rows, 128 if tiles.one_group_for_dq else 256, tiles.atoms_dq, tiles.swap_dq
    kernel = FlashAttentionBackwardPostprocess(
        DTYPES[call.dtype],
        call.head_dim,
        ARCHITECTURE,
        rows,
        threads,
        atoms,
        swap,
        hdim_multiple_of=tiles.head_dim_multiple,
    )

    def launch(stream, *arrays):
        total, cu, table = unpack(arrays[:-1], 1)
        kernel(total, arrays[-1], Float32(scale), cu, None, None, table, stream)

    name = ("postprocess", of_keys, scale)
    return call_kernel(launch, name, call, shape(like.shape, like.dtype), (total, *documents_of(call, cu, rows)))
