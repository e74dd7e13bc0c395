# python -m pytest tests/faults/test_resume_compares.py
"""--resume refuses each setting without which the checkpoint means something else: one case for each."""

import dataclasses

import numpy as np
import pytest

from alst_jax import run_state
from alst_jax.config import TrainConfig, UserError
from alst_jax.models.config import ModelConfig
from alst_jax.ops.rope import RopeConfig
from alst_jax.planning.job import Job
from alst_jax.profile import Profile
from alst_jax.storage.run_directory import check_geometry, check_same_model
from tests.helpers import TINY

CONFIG = TrainConfig(seed=3, seq_len=64, grad_accum=2)
JOB = Job(TINY, Profile(), 4, 64, 2, 1, 2, "float32", "float32")


def settings(dtype="bfloat16", data="0a", job=None, **flags):
    return run_state.geometry(
        dataclasses.replace(CONFIG, **flags), dataclasses.replace(JOB, **(job or {})), np.dtype(dtype), data
    )


# What a resumed run compares -> (the change, the words of the refusal).
COMPARED = {
    "data": (dict(data="0b"), r"--data \(0a -> 0b\)"),
    "seed": (dict(seed=4), r"--seed \(3 -> 4\)"),
    "samples_per_step": (dict(job=dict(rows=8)), r"--dp x .*sequences of a step \(8 -> 16\)"),
    "seq_len": (dict(seq_len=128), r"--seq-len \(64 -> 128\)"),
    "dtype": (dict(dtype="float32"), r"--dtype \(bfloat16 -> float32\)"),
    "optimizer_states": (dict(job=dict(states="int8")), r"--optimizer-states \(float32 -> int8\)"),
    "master_weights": (dict(job=dict(master="none")), r"--master-weights \(float32 -> none\)"),
    "freeze": (dict(freeze="norm"), r"--freeze \(None -> norm\)"),
    "rope_scaling": (dict(rope_scaling="yarn"), r"--rope-scaling \(None -> yarn\)"),
    "rope_factor": (dict(rope_factor=2.0), r"--rope-factor \(None -> 2.0\)"),
    "rope_theta": (dict(rope_theta=1e6), r"--rope-theta \(None -> 1000000.0\)"),
}


@pytest.mark.parametrize("field", COMPARED)
def test_each_setting_is_compared(field):
    change, message = COMPARED[field]
    saved = settings()
    check_geometry(saved, settings())
    with pytest.raises(
        UserError, match=f"^--resume: changed since the checkpoint: {message}. The position in the data"
    ):
        check_geometry(saved, settings(**change))


def test_every_setting_has_its_case():
    assert settings().keys() == COMPARED.keys()


OTHER = {"rope": RopeConfig(theta=5e5)}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModelConfig)])
def test_each_field_of_the_model_is_compared(field):
    now = getattr(TINY, field)
    other = OTHER.get(field, not now if isinstance(now, bool) else now + 1 if isinstance(now, int | float) else "other")
    changed = object.__new__(ModelConfig)  # not every change alone makes a model that is possible
    for each in dataclasses.fields(ModelConfig):
        object.__setattr__(changed, each.name, other if each.name == field else getattr(TINY, each.name))
    check_same_model(TINY, TINY)
    with pytest.raises(
        UserError, match=rf"^--resume: the model has changed since the checkpoint \({field} [^;]*\); start"
    ):
        check_same_model(TINY, changed)
