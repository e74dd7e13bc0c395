# pytest tests/cli/test_lora_base.py
"""The base model of an adapter: compared with --model as far as the files say, and its stretched positions."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from alst_jax.config import TrainConfig, UserError
from alst_jax.models.extend import record_extension, rope_flags
from alst_jax.models.hf_config import model_config
from alst_jax.models.lora import Lora
from alst_jax.models.peft_files import Base, read_base, save_adapter
from alst_jax.run_lora import check_base, with_lora
from alst_jax.storage.source import ModelSource, identity
from convert.merge import merge_adapter
from tests.helpers import make_step
from tests.runs import make_hf

OLD, NEW = 64, 256


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_hf(tmp_path_factory.mktemp("model") / "base", max_position_embeddings=OLD)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """An adapter of random numbers, in PEFT's format."""
    directory = tmp_path_factory.mktemp("adapter")
    config = dataclasses.replace(model_config(base), lora=Lora(2, 4.0, ("q_proj", "down_proj")))
    rng, trained = np.random.default_rng(0), make_step(config).trained
    save_adapter(
        directory, jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype("float32"), trained), config, str(base)
    )
    return directory


def source_of(directory):
    return ModelSource(str(directory), model_config(directory), None, directory, hf_weights=directory)


def check(adapter, model, **flags):
    check_base(TrainConfig(adapter=str(adapter), **flags), source_of(model))


def test_the_weights_are_compared(adapter, base, tmp_path, capsys):
    """With our file beside the adapter, or with the base model that PEFT's file names, where it still is."""
    mine, other, moved = tmp_path / "mine", tmp_path / "other", tmp_path / "moved"
    shutil.copytree(base, moved)
    shutil.copytree(adapter, mine)
    Base(str(base), identity(source_of(base), 0)["hash"]).write(mine)
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).save_pretrained(other)
    escapes = {adapter: "write --model's name into .*adapter_config.json", mine: "remove .*base.json"}
    for directory, escape in escapes.items():
        check(directory, base), check(directory, moved)
        with pytest.raises(
            UserError,
            match=f"trained with the base model {base}, and the weights of --model {other} differ; .*{escape}",
        ):
            check(directory, other)
    assert "is not on this machine" not in capsys.readouterr().err
    named = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "hub/name"}
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(adapter, elsewhere)
    (elsewhere / "adapter_config.json").write_text(json.dumps(named))
    check(elsewhere, other)
    assert (
        "its base model hub/name is not on this machine and cannot be compared with --model" in capsys.readouterr().err
    )
    (mine / "base.json").write_text("[")
    with pytest.raises(UserError, match="base.json is not what a run with adapters writes"):
        check(mine, base)


@pytest.mark.parametrize(
    "flags", [dict(rope_scaling="yarn", rope_factor=4.0), dict(rope_theta=8e4)], ids=["yarn", "theta"]
)
def test_a_merged_model_has_the_positions_of_the_run(flags, adapter, base, tmp_path):
    """Beyond the old length transformers computes the logits of PEFT beside the base model with the run's config."""
    mine, stretched, merged = tmp_path / "mine", tmp_path / "stretched", tmp_path / "merged"
    shutil.copytree(adapter, mine)
    config = TrainConfig(**flags, seq_len=NEW)
    Base(str(base), identity(source_of(base), 0)["hash"], rope_flags(config)).write(mine)
    shutil.copytree(base, stretched)
    record_extension(stretched, config)
    merge_adapter(mine, base, merged)

    tokens = torch.arange(3, 3 + NEW)[None] % 250
    of = lambda directory: AutoModelForCausalLM.from_pretrained(directory, dtype="float32").eval()
    with torch.no_grad():
        beside = peft.PeftModel.from_pretrained(of(stretched), mine)(tokens).logits
        alone = of(merged)(tokens).logits
        torch.testing.assert_close(alone, beside, rtol=1e-4, atol=1e-4)
        without = peft.PeftModel.from_pretrained(of(base), mine)(tokens).logits
    assert (without - beside)[:, OLD:].abs().max() > 0.01
    assert AutoConfig.from_pretrained(merged).max_position_embeddings == NEW
    assert read_base(mine).rope == rope_flags(config)
    check(mine, base, **flags, seq_len=NEW)
    with pytest.raises(UserError, match="was trained with --rope-.*, and this run has the model's own positions"):
        check(mine, base)


def test_fused_projections_are_refused_by_name(tmp_path):
    """Phi-3's files hold q, k, v and gate, up as one tensor each, and so do PEFT's adapters of them."""
    phi3 = dataclasses.replace(model_config(make_hf(tmp_path / "llama")), family="phi3")
    source = ModelSource("phi3", phi3, None, None)
    with pytest.raises(UserError, match="q_proj, .*up_proj are parts of qkv_proj, gate_up_proj, whose adapters are"):
        with_lora(TrainConfig(lora_rank=2), source)
    assert with_lora(TrainConfig(lora_rank=2, lora_targets="o_proj,down_proj"), source).lora.targets == (
        "o_proj",
        "down_proj",
    )
