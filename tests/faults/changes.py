"""Changes to the files of a directory."""

import json
import pathlib
import shutil


def edit(file: str, **changes):
    """Change fields of a JSON file; a value of ... removes the field."""

    def change(folder: pathlib.Path) -> None:
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))

    return change


def config(**changes):
    return edit("config.json", **changes)


def flags(**changes):
    """Change flags in run.json."""
    return lambda folder: edit("run.json", flags=json.loads((folder / "run.json").read_text())["flags"] | changes)(
        folder
    )


def write(file: str, content: str | bytes):
    def change(folder: pathlib.Path) -> None:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    return change


def remove(*files: str):
    def change(folder: pathlib.Path) -> None:
        for file in files:
            shutil.rmtree(folder / file) if (folder / file).is_dir() else (folder / file).unlink()

    return change


def cut(file: str, size: int = 100):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-size])


def header(name: str, **changes):
    """Change what the header of model.safetensors says of model.norm.weight, and its name."""

    def change(folder: pathlib.Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        tensors = json.loads(content[8:end])
        tensors[name] = tensors.pop("model.norm.weight") | changes
        text = json.dumps(tensors).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])

    return change


def several(*changes):
    return lambda folder: [change(folder) for change in changes]
