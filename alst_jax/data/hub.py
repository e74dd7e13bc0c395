"""Data sets by their names on the Hugging Face hub."""

import pathlib
import re

from alst_jax.config import UserError
from alst_jax.data.formats import COMPRESSED, RECORD_KINDS, TEXT_KINDS, kind_of

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_name(path: str) -> bool:
    """Whether `owner/name` is a name on the hub: no such path exists, and `owner` is no existing directory."""
    return bool(
        HUB_NAME.fullmatch(path)
        and not pathlib.Path(path).exists()
        and not pathlib.Path(path).parent.exists()
        and kind_of(path) not in (*RECORD_KINDS, *TEXT_KINDS)
    )


def download(name: str, flag: str, include: tuple[str, ...] = ()) -> pathlib.Path:
    """The local directory with the data files of a hub data set: files that `include` matches, or all of known kinds.

    UserError if the hub is not reached or has no such data set.
    """
    from huggingface_hub import snapshot_download

    kinds = (*RECORD_KINDS, *TEXT_KINDS)
    wanted = include or tuple(f"*{kind}{packed}" for kind in kinds for packed in ("", *COMPRESSED))
    patterns = [pattern for glob in wanted for pattern in (glob, f"*/{glob}")]
    try:
        return pathlib.Path(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))
    except Exception as error:  # the hub's client raises many kinds; all mean: not available
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{flag} {name}: no such file or directory, and no data set of this name could be fetched from "
            f"the hub ({reason})"
        ) from error
