"""The start of a run in several processes: they find each other, compare their flags, and start jax together."""

import dataclasses
import importlib.metadata
import os
import platform
import socket
import sys
from collections.abc import Callable
from typing import Any

from alst_jax.declare import UserError, flag
from alst_jax.process_flags import OF_A_PROCESS
from alst_jax.processes.hang import seconds_for, within
from alst_jax.processes.link import Link, link, use
from alst_jax.processes.place import find_place
from alst_jax.processes.service import Service

PACKAGES = ("alst-jax", "jax", "jaxlib", "flax", "numpy", "orbax-checkpoint", "transformers", "tokenizers", "grain")
PATIENCE = 10**5  # seconds: the link notices a death before jax's service does, and names it


def join(config: Any, place_of=find_place) -> None:
    """Find the other processes of the run, if there are any. UserError if they do not come, or have other flags or
    versions."""
    if config.planning or config.explain_run is not None or config.show_samples is not None:
        return
    place = place_of(config, os.environ)
    if place is None:
        return
    flags = {name: value for name, value in dataclasses.asdict(config).items() if name not in OF_A_PROCESS}
    use(
        Link(
            place,
            {"flags": flags, "versions": versions(), "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")},
            config.start_timeout,
        )
    )
    if not link().first:  # process 0 logs; errors of the others go to it
        sys.stdout = sys.stderr = open(os.devnull, "w")
        os.dup2(sys.stdout.fileno(), 1)  # for what is printed from C++
    check_same(link().facts)


def versions() -> dict[str, str]:
    """The versions of the programs on which the numbers of a run depend."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a source tree
            continue
    return found


def check_same(facts: list[dict[str, Any]]) -> None:
    """UserError that names the first flag or version in which two processes differ."""
    for kind, named in (("flags", flag), ("versions", lambda name: f"version of {name}:")):
        first = facts[0][kind]
        for rank, fact in enumerate(facts):
            other = fact[kind]
            for name in {**first, **other}:
                if first.get(name) != other.get(name):
                    link().disagree(
                        f"{named(name)} {_word(other.get(name))} on process {rank} ({fact['host']}), and "
                        f"{_word(first.get(name))} on process 0 ({facts[0]['host']}): start all processes with "
                        f"the same {kind}"
                    )


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def start_jax(config: Any, visible_gpus: Callable[[], int]) -> None:
    """Start jax in all processes together. visible_gpus: how many jax will see in this one."""
    current = link()
    if not current.several:
        return
    import jax
    from jax._src import distributed  # jax has no option for a service in another process

    distributed._jax.get_distributed_runtime_service = Service
    port = current.told("jax's port", _free_port)
    ids = list(config.local_devices) or local_devices(current, 0 if config.simulate_devices else visible_gpus())
    host = f"[{current.place.host}]" if ":" in current.place.host else current.place.host
    jax.distributed.initialize(
        f"{host}:{port}",
        current.count,
        current.rank,
        ids,
        cluster_detection_method="deactivate",
        initialization_timeout=config.start_timeout,
        heartbeat_timeout_seconds=PATIENCE,
    )


def local_devices(current: Link, gpus: int) -> list[int] | None:
    """The GPUs of this process: the host's, divided by its processes; None for all that it sees, where it is alone or
    the launcher has divided them."""
    here = current.local_ranks
    if len(here) == 1 or not gpus or sharing() > 1:
        return None
    if gpus % len(here):
        raise UserError(
            f"{len(here)} processes on {current.host} do not divide its {gpus} GPUs; name those of each with "
            "--local-devices, or start one process a host or a GPU"
        )
    each, at = gpus // len(here), here.index(current.rank)
    return list(range(at * each, (at + 1) * each))


def sharing() -> int:
    """The processes of this host, where the launcher has given each other GPUs to see; otherwise 1."""
    current = link()
    if not current.several:
        return 1
    here = current.local_ranks
    return len(here) if len({current.facts[rank]["gpus"] for rank in here}) == len(here) else 1


def _free_port() -> int:
    with socket.create_server(("", 0)) as found:
        return found.getsockname()[1]


def finish() -> None:
    """End a run that went well: all processes wait for each other."""
    if not link().several:
        return
    import jax
    from jax._src import distributed

    # jax aborts a process that loses the service before it has left it, and process 0 would end the service first.
    service, distributed.global_state.service = distributed.global_state.service, None
    with within("the end", seconds_for(0)):
        link().finish(jax.distributed.shutdown, service.shutdown if service else lambda: None)
