"""train.py with a SIGKILL at a stage, or at a time, in forked processes: the imports are paid once.

Nothing in the program knows of this: the functions of a stage are replaced in the process that is to be killed.
"""

import dataclasses
import json
import os
import pathlib
import signal
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kill:
    """SIGKILL at call `number` of the functions of a stage, counted from 1, or after `seconds`. hang: stay there for
    ever instead; limit: the seconds in which the parts of the run must end."""

    stage: str | None = None
    number: int = 1
    seconds: float | None = None
    hang: bool = False
    limit: float = 0.0

    def __str__(self) -> str:
        return f"{self.stage} {self.number}" if self.stage else f"after {self.seconds:.2f} s"


def stages() -> dict[str, list[tuple[Any, str]]]:
    """The functions of each stage: (module or class, name). A call is killed before it runs and after it ran."""
    from orbax.checkpoint import path as orbax_path

    from alst_jax import run_state, trainer
    from alst_jax.data.cache import Cache
    from alst_jax.data.cache_files import Output
    from alst_jax.metrics import MetricsLog
    from alst_jax.models import hf_saving, hf_weights
    from alst_jax.storage import checkpoint, checksums, orbax_limits, run_directory

    return {
        "starting": [(run_directory, "write_run_file"), (run_directory, "copy_model_files")],
        "loading": [(hf_weights, "load_leaf")],
        "resuming": [(checkpoint, "read_part"), (checksums, "compare")],
        "caching": [(Output, "write"), (Cache, "publish"), (Cache, "remember")],
        "stepping": [(trainer, "optimizer_step")],
        "logging": [(MetricsLog, "write")],
        "saving": [(orbax_limits.CopyWhenWritten, "key_priority"), (orbax_limits.Pieces, "to_fragments")],
        "committing": [
            (checksums, "hash_files"),
            (checksums, "write_record"),
            (orbax_path.atomicity.AtomicRenameTemporaryPath, "finalize"),
        ],
        "rotating": [(os, "unlink")],
        "exporting": [
            (hf_saving, "fetch"),
            (run_state, "record_dtype"),
            (checksums, "seal_weights"),
            (run_state, "save_params"),
        ],
    }


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def stay() -> None:
    while True:
        time.sleep(60)


def plant(kill: Kill) -> None:
    """Make this process kill itself there."""
    if kill.stage is None:
        return
    end = stay if kill.hang else die
    left = [kill.number]

    def counted(function: Callable) -> Callable:
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                end()
            result = function(*args, **kwargs)
            left[0] -= 1
            if left[0] == 0:
                end()
            return result

        return call

    for owner, name in stages()[kill.stage]:
        if name == "finalize":  # a coroutine: its beginning is that of `hash_files`, its end is the final name
            original = owner.finalize

            async def finalize(self, original=original):
                await original(self)
                left[0] -= 1
                if left[0] == 0:
                    end()

            owner.finalize = finalize
        elif kill.stage == "rotating":
            original = os.unlink

            def unlink(path, *args, dir_fd=None):
                where = os.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else str(path)
                _, inside, file = where.partition("/checkpoints/")
                if inside and "tmp" not in file:  # orbax names unfinished checkpoints so
                    left[0] -= 1
                    if left[0] == 0:
                        end()
                return original(path, *args, dir_fd=dir_fd)

            os.unlink = unlink
        else:
            setattr(owner, name, counted(getattr(owner, name)))


def preload() -> None:
    """Import what train.py imports. The backend of jax must not start before a fork."""
    import orbax.checkpoint  # noqa: F401
    import tensorboard.summary  # noqa: F401
    import torch  # noqa: F401  transformers imports it for a tokenizer
    import transformers  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import alst_jax.run  # noqa: F401
    import alst_jax.run_data  # noqa: F401
    import alst_jax.trainer  # noqa: F401
    import train  # noqa: F401


def run(arguments: list[str], log: pathlib.Path, kill: Kill | None = None) -> tuple[int, float]:
    """(exit code, seconds) of train.py in a forked process; -9 if it was killed. log: gets its output."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        in_child(arguments, log, kill)
    if kill is not None and kill.seconds is not None:
        while time.monotonic() - started < kill.seconds:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), time.monotonic() - started
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), time.monotonic() - started


def in_fork(function: Callable[[], Any]) -> Any:
    """The JSON value that a function returns in a forked process; ValueError with its traceback if it fails."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as stream:
                try:
                    json.dump({"value": function()}, stream)
                    code = 0
                except Exception:
                    json.dump({"error": traceback.format_exc()}, stream)
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    found = json.loads(answer) if answer else {"error": "the process died"}
    if "value" not in found:
        raise ValueError(found["error"])
    return found["value"]


def in_child(arguments: list[str], log: pathlib.Path, kill: Kill | None) -> None:
    code = 70
    try:
        os.setsid()
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        import train
        from alst_jax import run_data

        cache_of = run_data.cache_of  # of files of any size
        run_data.cache_of = lambda config: (cache := cache_of(config)) and dataclasses.replace(cache, small=0)
        if kill is not None:
            plant(kill)
        sys.argv = ["train.py", *arguments]
        code = train.main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
