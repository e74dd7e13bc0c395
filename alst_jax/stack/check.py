"""Whether a memory profile goes with a model and a mesh."""

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
