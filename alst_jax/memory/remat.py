"""The scan over layers, and what its backward pass finds kept, and where."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from alst_jax.memory import host
from alst_jax.memory.profile import Profile

LAYER_INPUT = "layer_input"  # the input of a segment of layers
ON_DEVICE, ON_HOST, FOR_NOW = "attention_on_device", "attention_on_host", "attention_for_now"


def scan_layers(layer: Callable, h: jax.Array, layers: Any, profile: Profile) -> jax.Array:
    """h through all layers; layer(h, weights, name) -> h is one, and names its attention output and statistics `name`.

    layers: weights stacked on dim 0, on the device or in host memory. They are cut into segments of
    `profile.segment_layers`; the scan keeps each segment's input (on the device or, offloaded, in host memory) and the
    attention outputs that the profile names, and computes the rest again. Within a segment that is done layer by layer:
    the inputs of all its layers first (attention outputs that were kept make that matrix products alone), then back
    through one layer at a time.
    """
    size = profile.segment_layers
    names = attention_names(profile)

    def segment(h, shards):
        # Only a name given to the carry on the first line of the body makes the scan's residual offloadable; a name on
        # the output is accepted and does nothing.
        h = checkpoint_name(h, LAYER_INPUT)
        if profile.offload_weights:
            shards = host.to_device(shards)  # the whole segment: a scan inside would not compile on host-resident weights
        if size == 1:
            return layer(h, shards, names[0]), None
        # Unrolled, so that layers may differ in what is kept, and so that kept outputs are residuals of the outer scan:
        # those of a scan inside cannot be offloaded.
        for one, name in zip(_unstack(shards, size), names):
            body = jax.checkpoint(lambda h, w, name=name: layer(h, w, name), policy=_keep_within_segment)
            h = body(h, one)
        return h, None

    if not profile.remat:
        return lax.scan(lambda h, w: segment(h, w), h, layers)[0]
    if size > 1:
        layers = jax.tree.map(lambda w: w.reshape(-1, size, *w.shape[1:]), layers)
    segment = jax.checkpoint(segment, policy=_policy(profile), prevent_cse=False)  # inside a scan, CSE cannot undo it
    return lax.scan(segment, h, layers)[0]


def attention_names(profile: Profile) -> list[str]:
    """What is done with the attention output of each layer of a segment.

    Kept ones come first: the last layer of a segment needs no output kept to rebuild the input of a next one.
    """
    names = [ON_DEVICE] * profile.keep_attention_on_device + [ON_HOST] * profile.keep_attention_on_host
    return names + [FOR_NOW] * (profile.segment_layers - len(names))


def _policy(profile: Profile) -> Callable:
    inputs = [LAYER_INPUT]
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[ON_DEVICE] + ([] if profile.offload_activations else inputs),
        names_which_can_be_offloaded=[ON_HOST] + (inputs if profile.offload_activations else []),
        offload_src=host.DEVICE, offload_dst=host.HOST)


_keep_within_segment = jax.checkpoint_policies.save_only_these_names(ON_DEVICE, ON_HOST, FOR_NOW)


def _unstack(tree: Any, count: int) -> list[Any]:
    # lax.split, because the gradient of a split is one concatenation; that of slices, a sum of padded copies.
    leaves, treedef = jax.tree.flatten(tree)
    pieces = [[piece.squeeze(0) for piece in lax.split(leaf, (1,) * count, axis=0)] for leaf in leaves]
    return [treedef.unflatten(column) for column in zip(*pieces)]
