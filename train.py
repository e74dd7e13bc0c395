"""Train a Llama on very long sequences: `python train.py --help`. Without flags, a tiny one learns in about a minute."""

import dataclasses
import pathlib
import sys
import time

import tyro

from alst_jax import environment
from alst_jax.config import TrainConfig, UserError, check_run


def main() -> int:
    config = tyro.cli(TrainConfig, description=TrainConfig.__doc__, config=(tyro.conf.AvoidSubcommands,))
    try:
        check_run(config)
        config = with_demo_defaults(config)
        environment.prepare(config.simulate_devices)
        from alst_jax.run import run  # imports jax, which reads the environment

        return run(config)
    except UserError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped at once: nothing was saved since the last checkpoint", file=sys.stderr)
        return 130


def with_demo_defaults(config: TrainConfig) -> TrainConfig:
    """Without --model: a tiny Llama, four simulated devices, sequence parallelism on; what was typed is kept."""
    if config.model is not None or config.resume:
        return config
    sp = config.sp or 4
    demo = dict(sp=sp, simulate_devices=sp * (config.dp or 1), steps=60, seq_len=4096, learning_rate=3e-3,
                out=f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    return dataclasses.replace(config, **{k: v for k, v in demo.items() if getattr(config, k) is None})


if __name__ == "__main__":
    sys.exit(main())
