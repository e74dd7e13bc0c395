"""The learning rate of each step."""

from collections.abc import Callable

import optax

from alst_jax.config import TrainConfig


def learning_rate_schedule(config: TrainConfig, steps: int, peak: float) -> Callable[[int], float]:
    """Linear warm-up from 0 to `peak`, then cosine, linear or no decay to the final ratio at `steps`."""
    warmup = config.warmup_steps if config.warmup_steps is not None else steps // 20
    decay_steps = max(1, steps - warmup)
    final = peak * config.final_learning_rate_ratio
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps, config.final_learning_rate_ratio),
        "linear": optax.linear_schedule(peak, final, decay_steps),
        "constant": optax.constant_schedule(peak),
    }[config.schedule]
    # Step 0 of a warm-up has rate 0 and would be wasted: count from 1.
    ramp = optax.linear_schedule(0.0, peak, max(1, warmup))
    return lambda step: float(ramp(step + 1) if step < warmup else decay(step - warmup))
