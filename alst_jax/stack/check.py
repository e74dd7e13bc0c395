"""Whether a memory profile goes with a model and a mesh, and whether its flags have an effect."""

from alst_jax.config import UserError
from alst_jax.models.config import ModelConfig
from alst_jax.ops.attention import find_kernel, refusal
from alst_jax.parallel.ulysses import Ulysses
from alst_jax.profile import Profile


def check_profile(profile: Profile, model: ModelConfig, sp: int) -> None:
    """UserError if the profile does not go with this model on this mesh."""
    profile.check()
    Ulysses.check(model, sp, profile.head_chunks)
    for kind in model.kinds:
        if reason := refusal(find_kernel(profile.attention), model.attention_spec(kind)):
            raise UserError(reason)
    segments, layers = profile.segment_layers, model.num_layers
    if len(segments) != 1 and sum(segments) != layers:
        raise UserError(
            f"--segment-layers {' '.join(map(str, segments))}: {sum(segments)} layers in all, where the "
            f"model has {layers}; give one number for all segments alike, or one each that add up to "
            f"{layers}"
        )
    kept = profile.keep_attention_on_device + profile.keep_attention_on_host
    if kept > layers:
        raise UserError(
            f"--keep-attention-on-device + --keep-attention-on-host = {kept} layers, where the model has {layers}"
        )


def check_effect(profile: Profile, shared_inputs: int, reads_ahead: bool) -> None:
    """UserError for a flag without effect. shared_inputs: inputs of segments that are kept in the memory of gradients
    (stack/shared.py). reads_ahead: whether a loop reads rows from host memory ahead (stack/rows.py)."""
    if profile.rebuild_inputs_alone and max(profile.segment_layers) == 1:
        raise UserError(
            "--rebuild-inputs-alone: no segment has several layers here, so no segment is recomputed; add "
            "--segment-layers, or leave the flag out"
        )
    if profile.prefetch_activations and not reads_ahead:
        raise UserError(
            "--prefetch-activations: has no effect here: no loop over layers reads inputs or attention outputs "
            "from host memory (--offload-activations, --keep-attention-on-host). Leave the flag out"
        )
    if profile.share_gradients and not shared_inputs:
        raise UserError(
            "--share-gradients: has no effect here: no segment's input can use the memory of gradients. The "
            "input must be larger than the gradients of one layer, and fit into those of the layers up to "
            "the segment's last one; the first segment and segments of one layer do not count "
            "(--segment-layers). Leave the flag out"
        )
