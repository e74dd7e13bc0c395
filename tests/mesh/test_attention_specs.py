# pytest tests/mesh/test_attention_specs.py
"""What attention computes by its specification, and what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alst_jax.config import UserError
from alst_jax.ops.attention import AttentionSpec, attention, attention_forward
from tests.helpers import make_step, relative_error


@pytest.mark.parametrize(
    "spec",
    [
        AttentionSpec(),
        AttentionSpec(scale=0.3),
        AttentionSpec(window=5),
        AttentionSpec(soft_cap=2.0),
        AttentionSpec(causal=False),
        AttentionSpec(window=3, soft_cap=1.5, scale=0.7),
    ],
    ids=str,
)
@pytest.mark.parametrize("documents", [None, [0, 7, 7, 20, 23, 46, 46]])
def test_specs_of_the_xla_kernel(spec, documents):
    """Output, log-sum-exp and gradients against a dense mask written out here."""
    q, do = (jax.random.normal(jax.random.key(i), (2, 23, 4, 8)) for i in (0, 3))
    k, v = (jax.random.normal(jax.random.key(i), (2, 23, 2, 8)) for i in (1, 2))
    offsets = None if documents is None else jnp.int32(documents)
    numbers = np.zeros((2, 23), int)
    for start in documents or []:
        numbers.reshape(-1)[start:] += 1

    def naive(q, k, v):
        k, v = jnp.repeat(k, 2, 2), jnp.repeat(v, 2, 2)
        scores = jnp.einsum("bsnh,btnh->bnst", q, k) * (8**-0.5 if spec.scale is None else spec.scale)
        scores = scores if spec.soft_cap is None else jnp.tanh(scores / spec.soft_cap) * spec.soft_cap
        s, t = np.arange(23)[:, None], np.arange(23)[None]
        mask = np.tile(t <= s if spec.causal else np.ones((23, 23), bool), (2, 1, 1))
        mask &= numbers[:, :, None] == numbers[:, None, :]
        if spec.window is not None:
            mask &= s - t < spec.window
        scores = jnp.where(mask[:, None], scores, -jnp.inf)
        return jnp.einsum("bnst,btnh->bsnh", jax.nn.softmax(scores, -1), v), jax.nn.logsumexp(scores, -1)

    def both_ways(forward, attend):
        return jax.jit(lambda *qkv: (*forward(*qkv), *jax.vjp(attend, *qkv)[1](do)))(q, k, v)

    ours = both_ways(
        lambda *qkv: attention_forward(*qkv, spec, offsets, kernel="xla"),
        lambda *qkv: attention(*qkv, spec, offsets, kernel="xla"),
    )
    for one, other in zip(ours, both_ways(naive, lambda *qkv: naive(*qkv)[0]), strict=True):
        assert relative_error(one, other) < 1e-5


@pytest.mark.parametrize("kernel", ["cudnn"])
@pytest.mark.parametrize(
    "spec,feature",
    [
        (AttentionSpec(window=4), "window"),
        (AttentionSpec(soft_cap=1.0), "soft cap"),
        (AttentionSpec(causal=False), "full"),
    ],
)
def test_a_kernel_refuses_what_it_does_not_implement(kernel, spec, feature):
    x = jnp.ones((1, 128, 2, 64), jnp.bfloat16)
    with pytest.raises(UserError, match=f"--attention {kernel} does not implement {feature}.*use --attention xla"):
        attention(x, x, x, spec, kernel=kernel)


@pytest.mark.parametrize("pattern", [".*", "no such name"])
def test_freezing_all_or_nothing_is_refused(pattern):
    with pytest.raises(UserError, match="must match some parameters of the model, and not all"):
        make_step(freeze=pattern)
