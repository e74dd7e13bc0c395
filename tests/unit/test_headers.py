# pytest tests/unit/test_headers.py
"""Headers of safetensors that lie are refused with the name of their file."""

import json

import numpy as np
import pytest

from alst_jax.config import UserError
from alst_jax.models.weight_files import find_tensors


def header(entries: dict | str, length: int | None = None, data: bytes = b"\0" * 40) -> bytes:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(start, stop, shape=(5,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


LIES = {
    "outside": header({"a": entry(0, 20), "b": entry(20, 4000, (995,))}),
    "far-outside": header({"a": entry(2**63, 2**63 + 20)}),
    "overlap": header({"a": entry(0, 20), "b": entry(10, 30)}, data=b"\0" * 30),
    "hole": header({"a": entry(0, 20), "b": entry(24, 40, (4,))}),
    "backwards": header({"a": entry(20, 0)}),
    "negative": header({"a": entry(-20, 0)}),
    "shape-and-bytes": header({"a": entry(0, 40, (5,))}),
    "absurd-shape": header({"a": entry(0, 40, (2**62, 2**62, 2**62))}),
    "absurd-length": header({"a": entry(0, 40, (10,))}, length=2**63),
    "length-beyond-file": header({"a": entry(0, 40, (10,))}, length=5000),
    "no-json": header("{"),
    "a-list": header("[]"),
    "deep": header("[" * 100_000),
    "no-offsets": header({"a": {"dtype": "F32", "shape": [5]}}),
    "unknown-dtype": header({"a": entry(0, 40, (10,), "F33")}),
    "data-after-the-last": header({"a": entry(0, 20)}),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused_with_the_name_of_its_file(tmp_path, lie):
    (tmp_path / "model.safetensors").write_bytes(LIES[lie])
    with pytest.raises(UserError, match=r"model.safetensors is corrupt or cut short: .+"):
        find_tensors(tmp_path)


def test_an_honest_header_is_read(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(header({"a": entry(0, 20), "b": entry(20, 40)}))
    assert {name: (t.shape, t.dtype) for name, t in find_tensors(tmp_path).items()} == {
        "a": ((5,), np.float32),
        "b": ((5,), np.float32),
    }


def mutate(rng: np.random.Generator, text: bytes) -> bytes:
    """A file whose header has one to three changes: a byte, a JSON character, digits, a cut; its length true or not."""
    new, data = bytearray(text), b"\0" * int(rng.choice([40, 40, 39, 44, 0]))
    for _ in range(rng.integers(1, 4)):
        place = int(rng.integers(len(new)))
        match rng.integers(4):
            case 0:
                new[place] = rng.integers(256)
            case 1:
                new[place] = rng.choice(list(b'0123456789[]{},:"-. eE'))
            case 2:  # a longer number, where there is one
                digits = [i for i, byte in enumerate(new) if chr(byte).isdigit()] or [place]
                new[(at := int(rng.choice(digits))) : at] = b"9" * int(rng.integers(1, 30))
            case 3:
                del new[place : place + int(rng.integers(1, 10))]
                new = new or bytearray(b"{")
    length = len(new) if rng.integers(4) else int(rng.integers(2**63)) >> int(rng.integers(63))
    return length.to_bytes(8, "little") + bytes(new) + data


def test_no_header_gets_past_with_another_error(tmp_path):
    honest = json.dumps(
        {"__metadata__": {"format": "pt"}, "a.weight": entry(0, 20), "b": entry(20, 40, (5, 2), "BF16")}
    )
    file, rng, refused = tmp_path / "model.safetensors", np.random.default_rng(0), 0
    for _ in range(4000):
        file.write_bytes(mutate(rng, honest.encode()))
        try:
            for tensor in find_tensors(tmp_path).values():
                assert tensor.dtype.itemsize * np.prod(tensor.shape, dtype=float) <= file.stat().st_size
        except UserError as error:
            refused += 1
            assert str(file) in str(error)
    assert 3000 < refused < 4000
