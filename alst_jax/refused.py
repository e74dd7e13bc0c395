"""Steps that are not applied because of a number that is not finite or a spike, and the reactions by --on-nonfinite and
--on-spike."""

import dataclasses
from collections.abc import Callable
from typing import Any

from alst_jax.profile import Profile
from alst_jax.watch import Event
from alst_jax.watch_flags import WatchFlags

MOST_REFUSED = 5  # batches left out at one step, before the run ends


class NotFinite(Exception):
    """Loss or gradient is not a finite number. state: the state to go on from, None if the step was applied in part."""

    def __init__(self, reason: str, state: Any):
        super().__init__(reason)
        self.state = state


class Spike(Exception):
    """A step whose loss or gradient norm is a spike and is not to be applied. state: the state to go on from, None if
    the step was applied."""

    def __init__(self, cause: str, state: Any):
        super().__init__(cause)
        self.state = state


@dataclasses.dataclass(frozen=True)
class Saves:
    """write(state) saves a checkpoint. read(state) -> the state of the last one, or None: it frees the
    arrays of `state` first and puts the data back to where they were."""

    write: Callable[[Any], None]
    read: Callable[[Any], Any]

    def __call__(self, state: Any) -> None:
        self.write(state)


class Refused:
    """The reactions of --on-nonfinite and --on-spike to steps that are not applied. left_out: positions of batches that
    the run skips after it returned to a checkpoint."""

    def __init__(self, config: WatchFlags, save: Callable[[Any], None], tell: Callable[[Event], None]):
        self.config, self._save, self._tell = config, save, tell
        self.left_out, self._at, self._count = [], -1, 0

    def go_on(self, problem: NotFinite | Spike, state: Any, position: Any) -> Any:
        """The state to go on from; None to stop. state: before the step. position: of its batch."""
        kind, policy = "nonfinite", self.config.on_nonfinite
        if isinstance(problem, Spike):
            kind, policy = "spike", self.config.on_spike
        words = f"--on-{kind} {policy}"
        at = state.step
        self._count = self._count + 1 if at <= self._at else 1
        self._at = max(at, self._at)
        if policy == "stop" or self._count > MOST_REFUSED:
            self._tell(
                Event(
                    kind,
                    at + 1,
                    str(problem),
                    "the run ends"
                    if policy == "stop"
                    else f"{MOST_REFUSED} batches were left out here already: the run ends",
                )
            )
            return None
        if policy == "skip":
            self._tell(Event(kind, at + 1, str(problem), f"its batch is left out ({words})"))
            return problem.state
        # An update in the backward pass gave a new state: `state` has no arrays any more.
        back = self._save.read(problem.state or state) if isinstance(self._save, Saves) else None
        if back is None:
            self._tell(Event(kind, at + 1, str(problem), "no checkpoint was saved to go back to: the run ends"))
            return None
        self.left_out.append(position)
        self._tell(
            Event(
                kind,
                at + 1,
                str(problem),
                f"back to the checkpoint of step {back.step}; its batch is left out ({words})",
            )
        )
        return back


def not_applied(profile: Profile, done: int, problem: NotFinite | Spike, saved: int) -> str:
    """The message of a step that was refused."""
    if problem.state is None:
        last = f"the last checkpoint, step {saved}, with --resume" if saved else "the beginning: none was saved"
        return (
            f"step {done + 1}: {problem}. Later layers were updated already (--update-in-backward), so nothing is "
            f"saved; go on from {last}. A smaller --learning-rate, --save-every, or a run without "
            "--update-in-backward, which would not apply such a step, may help"
        )
    kept = "is where the run began" if not done else "is saved" if saved == done else "is not saved"
    return (
        f"step {done + 1}: {problem}. The step was not applied; the state before it, step {done}, {kept}. A "
        f"smaller --learning-rate{'' if profile.update_in_backward else ' or --clip-norm'}, or --dtype "
        "float32, may help."
    )
