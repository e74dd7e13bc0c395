"""Next-token loss. The logits of a long sequence are never made at once: 128k tokens of Llama-3 would be 61 GiB of
float32."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from alst_jax.config import IGNORED
from alst_jax.ops.tiling import stream, tiled
from alst_jax.xla.dtypes import accumulation_dtype
from alst_jax.xla.varying import vary_like

LOGITS_BYTES = 2**30  # float32 logits held at once by default


def default_tile(vocab_size: int) -> int:
    """Tokens whose float32 logits take about 1 GiB, a multiple of 128."""
    return max(128, LOGITS_BYTES // (4 * vocab_size) // 128 * 128)


class LogitScaling(NamedTuple):
    """Logits are soft_cap * tanh(x / soft_cap), x = h @ table.T / divisor; no cap: x."""

    divisor: float = 1.0
    soft_cap: float | None = None

    def __call__(self, x: Float[Array, "T V"]) -> Float[Array, "T V"]:
        x = x if self.divisor == 1 else x / self.divisor
        return x if self.soft_cap is None else self.soft_cap * jnp.tanh(x / self.soft_cap)

    def backward(self, logits: Float[Array, "T V"], dlogits: Float[Array, "T V"]) -> Float[Array, "T V"]:
        """The gradient of h @ table.T."""
        if self.soft_cap is not None:
            dlogits = dlogits * (1 - jnp.square(logits / self.soft_cap))
        return dlogits if self.divisor == 1 else dlogits / self.divisor


AS_THEY_ARE = LogitScaling()


def cross_entropy(
    h: Float[Array, "T D"], table: Float[Array, "V D"], labels: Int[Array, "T"], scaling: LogitScaling = AS_THEY_ARE
) -> Float[Array, ""]:
    """Sum of -log softmax(logits)[label] over the labels that are not IGNORED, float32; all logits at once.

    logits: scaling(h @ table.T).
    """
    return jnp.sum(_token_losses(scaling(_logits(h, table)), labels)[0])


def _logits(h, table):
    dims = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(h, table.astype(h.dtype), dims, preferred_element_type=accumulation_dtype(h.dtype))


def _token_losses(logits, labels):
    """Loss of each token (0 where ignored) and the log of its softmax denominator."""
    log_normaliser = jax.nn.logsumexp(logits, axis=-1)
    valid = labels != IGNORED
    picked = jnp.take_along_axis(logits, jnp.where(valid, labels, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(valid, log_normaliser - picked, 0), log_normaliser


class TokenLosses(NamedTuple):
    """Of each token: its loss in nats, float32, and whether its label has the largest logit. 0 and False if IGNORED."""

    losses: Float[Array, "T"]
    hits: Array  # bool[T]


def token_losses(
    h: Float[Array, "T D"],
    table: Float[Array, "V D"],
    labels: Int[Array, "T"],
    tile: int | None,
    scaling: LogitScaling = AS_THEY_ARE,
) -> TokenLosses:
    """The terms of `cross_entropy`, `tile` tokens at a time: the logits of one tile exist at a time. Of equal logits
    the first one counts as the largest."""

    def of_tile(h, table, labels):
        logits = scaling(_logits(h, table))
        losses = _token_losses(logits, labels)[0].astype(jnp.float32)
        return TokenLosses(losses, jnp.argmax(logits, axis=-1).astype(labels.dtype) == labels)

    return tiled(of_tile, h, table, labels, tile=tile)


def tiled_cross_entropy(
    h: Float[Array, "T D"],
    table: Float[Array, "V D"],
    labels: Int[Array, "T"],
    tile: int,
    scaling: LogitScaling = AS_THEY_ARE,
) -> Float[Array, ""]:
    """`cross_entropy`, `tile` tokens at a time; when differentiated, each tile's gradients are made with its logits.

    So logits are computed once and never kept. The loss is a sum, not a mean: a tile with few valid labels weighs
    little, one with none gives exactly 0. The gradient of the table is summed over tiles in float32.
    """
    return _tiled_cross_entropy(tile, scaling, h, vary_like(table, h), labels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tiled_cross_entropy(tile, scaling, h, table, labels):
    table = table.astype(h.dtype)  # once, not for each tile

    def body(total, _, rows):
        h_tile, labels_tile = rows
        return total + jnp.sum(_token_losses(scaling(_logits(h_tile, table)), labels_tile)[0]), ()

    zero = vary_like(jnp.zeros((), accumulation_dtype(h.dtype)), h, table, labels)
    return stream(body, zero, written=(), read=(h, labels), rows=tile)[0]


def _fwd(tile, scaling, h, table, labels):
    trained = table.perturbed  # a frozen table has no gradient, and no sum over tiles
    h, table, labels = h.value, table.value, labels.value
    narrow = table.astype(h.dtype)  # once, not for each tile

    def body(carry, _, rows):
        (total, dtable), (h_tile, labels_tile) = carry, rows
        logits = scaling(_logits(h_tile, narrow))
        losses, log_normaliser = _token_losses(logits, labels_tile)
        is_label = labels_tile[:, None] == jnp.arange(logits.shape[1])[None, :]
        valid = (labels_tile != IGNORED)[:, None]
        dlogits = jnp.where(valid, jnp.exp(logits - log_normaliser[:, None]) - is_label, 0)
        dlogits = scaling.backward(logits, dlogits).astype(h.dtype)
        dh = dlogits @ narrow
        if trained:
            dtable += jax.lax.dot_general(
                dlogits, h_tile, (((0,), (0,)), ((), ())), preferred_element_type=dtable.dtype
            )
        return (total + jnp.sum(losses), dtable), (dh,)

    wide = accumulation_dtype(h.dtype)
    zeros = (jnp.zeros((), wide), jnp.zeros(table.shape, wide) if trained else None), (jnp.zeros_like(h),)
    sums, dh = jax.tree.map(lambda z: vary_like(z, h, table, labels), zeros)
    (total, dtable), (dh,) = stream(body, sums, written=dh, read=(h, labels), rows=tile)
    return total, (dh, dtable.astype(table.dtype) if trained else None)


def _bwd(tile, scaling, residuals, dtotal):
    return *jax.tree.map(lambda d: (d * dtotal).astype(d.dtype), residuals), None


_tiled_cross_entropy.defvjp(_fwd, _bwd, symbolic_zeros=True)
