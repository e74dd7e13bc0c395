"""What the backward pass of a layer finds kept, and where: the policy of the per-layer checkpoint."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

LAYER_INPUT = "layer_input"


def checkpoint_layer(body: Callable, remat: bool, offload: bool) -> Callable:
    """Wrap the body (h, layer) -> (h, None) of the scan over layers.

    remat: keep only the layer's input (one [B, T, D] a layer) and compute the rest again in the backward pass.
    offload: keep that input in pinned host memory, copied out and back while other layers compute, so that device
    memory no longer grows with depth (ALST's activation checkpoint offload).
    """
    if not remat:
        return body

    def named(h, layer):
        # Only a name given to the carry on the first line of the body makes the scan's residual offloadable; a name
        # on the output is accepted and does nothing.
        return body(checkpoint_name(h, LAYER_INPUT), layer)

    if offload:
        policy = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT],
            offload_src="device", offload_dst="pinned_host")
    else:
        policy = jax.checkpoint_policies.save_only_these_names(LAYER_INPUT)
    return jax.checkpoint(named, policy=policy, prevent_cse=False)  # inside a scan, CSE cannot undo it
