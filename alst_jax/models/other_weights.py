"""The weights beside the language model in a checkpoint of text and images. They are copied unchanged.

A run directory keeps them in model/, in one file, which also says how the checkpoint names the language model's
tensors.
"""

import functools
import pathlib
import shutil
from collections.abc import Iterable, Iterator

from safetensors import safe_open

from alst_jax.config import UserError
from alst_jax.models.hf_config import read_config
from alst_jax.models.text_config import is_wrapped
from alst_jax.models.weight_files import Tensor, Unwritten, find_tensors, read_stored, write_file

FILE = "other_weights.safetensors"
# Name of a form -> starts of names in the checkpoint, and of those in a language model alone.
FORMS = {
    "outside": (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head.")),
    "inside": (("model.language_model.", "model."), ("lm_head.", "lm_head.")),
}


def has_others(model_dir: str | pathlib.Path) -> bool:
    """Whether the config.json of this directory, if it has one, is of a model that holds more than a language model."""
    return (pathlib.Path(model_dir) / "config.json").is_file() and is_wrapped(read_config(model_dir))


def auto_class(model_dir: str | pathlib.Path) -> str:
    """transformers' class that loads this directory."""
    return "AutoModelForImageTextToText" if has_others(model_dir) else "AutoModelForCausalLM"


def text_tensors(tensors: dict[str, Tensor], hf_dir: str | pathlib.Path) -> dict[str, Tensor]:
    """The tensors of the language model under the names that they have in a language model alone."""
    if not has_others(hf_dir):
        return tensors
    form = _form(tensors, hf_dir)
    return {alone: tensor for name, tensor in tensors.items() if (alone := _renamed(name, FORMS[form])) is not None}


def keep_others(source: str | pathlib.Path, model_dir: str | pathlib.Path) -> tuple[int, int]:
    """Write the other weights of `source`, a Hugging Face directory or the model/ of a run, into the model/ of a run.
    Returns their number and their bytes."""
    if not has_others(source):
        return 0, 0
    kept, file = pathlib.Path(source) / FILE, pathlib.Path(model_dir) / FILE
    if kept.is_file():
        shutil.copyfile(kept, file)
        return other_sizes(model_dir)
    tensors = find_tensors(source)
    form = _form(tensors, source)
    others = [_unwritten(name, tensor) for name, tensor in tensors.items() if _renamed(name, FORMS[form]) is None]
    partial = file.with_name(f".{FILE}")
    write_file(partial, others, metadata={"form": form})
    partial.replace(file)
    return other_sizes(model_dir)


def with_others(text: Iterable[Unwritten], model_dir: str | pathlib.Path | None) -> Iterator[Unwritten]:
    """The tensors of the language model under their names in the checkpoint, then the other weights.

    model_dir: the model/ of a run; None: no others.
    """
    if model_dir is None or not has_others(model_dir):
        yield from text
        return
    others, form = _kept(pathlib.Path(model_dir) / FILE)
    back = tuple((alone, start) for start, alone in FORMS[form])
    for tensor in text:
        yield tensor._replace(name=_renamed(tensor.name, back))
    yield from others


def other_sizes(model_dir: str | pathlib.Path) -> tuple[int, int]:
    """The number of the other weights that a run keeps, and their bytes."""
    kept = _kept(pathlib.Path(model_dir) / FILE)[0] if has_others(model_dir) else []
    return len(kept), sum(tensor.nbytes for tensor in kept)


def _kept(file: pathlib.Path) -> tuple[list[Unwritten], str]:
    """The other weights of a run, and the form of the language model's names."""
    if not file.is_file():
        raise UserError(
            f"{file} is missing: it holds the weights beside the language model, without which the whole "
            "model cannot be written. Runs with --random-weights have none; others get it from --model"
        )
    with safe_open(file, "numpy") as handle:
        form = (handle.metadata() or {}).get("form")
    if form not in FORMS:
        raise UserError(f"{file}: form {form!r} of names is none of {', '.join(FORMS)}; convert the model again")
    return [_unwritten(name, tensor) for name, tensor in find_tensors(file.parent, [file]).items()], form


def _unwritten(name: str, tensor: Tensor) -> Unwritten:
    return Unwritten(name, tensor.shape, tensor.dtype, functools.partial(read_stored, tensor))


def _form(tensors: dict[str, Tensor], where: str | pathlib.Path) -> str:
    """In which of FORMS the names are."""
    for form, starts in FORMS.items():
        if any(name.startswith(starts[0][0]) for name in tensors):
            return form
    starts = " or ".join(starts[0][0] for starts in FORMS.values())
    raise UserError(
        f"{where}: config.json has a text_config, but no tensor's name begins with {starts}: the weights "
        "of the language model are not found"
    )


def _renamed(name: str, starts: tuple[tuple[str, str], ...]) -> str | None:
    """The name with another start; None if it has none of these."""
    return next((new + name.removeprefix(old) for old, new in starts if name.startswith(old)), None)
