"""What --memory auto may choose, and the memory that its choice must fit."""

import dataclasses

from alst_jax.hardware.machines import GIB, Cluster
from alst_jax.planning.estimate import estimate
from alst_jax.planning.job import Job
from alst_jax.planning.plan import Plan
from alst_jax.profile import Profile

UNCONFIRMED = 0.05  # of the memory, left free where no compiler confirms: the model's error (plan_accuracy.py)
CONFIRMED = 0.01
UNUSUAL = 0.1  # of the device: a larger error concerns one kind of profile, not all


@dataclasses.dataclass(frozen=True)
class Search:
    """The free choices, and the memory that a choice must fit.

    fixed: fields of the profile that the user typed. narrow: whether the optimizer's formats may be chosen too. margin:
    the part of each memory to leave free. Corrections: bytes that the compiler needed beyond the estimate, of the
    device, of the host, and (of_kinds) of the device for profiles of one kind.
    """

    cluster: Cluster
    fixed: frozenset[str] = frozenset()
    narrow: bool = False
    margin: float = UNCONFIRMED
    device_correction: int = 0
    host_correction: int = 0
    of_kinds: tuple[tuple[tuple[int, int], int], ...] = ()

    def plan(self, job: Job) -> Plan:
        return estimate(job, self.cluster, self.correction(kind_of(job.profile)))

    def correction(self, kind: tuple[int, int]) -> int:
        """Bytes to add to the estimate on the device, for profiles of a kind."""
        return self.device_correction + dict(self.of_kinds).get(kind, 0)

    def missing(self, plan: Plan) -> dict[str, int]:
        """Bytes that a plan lacks of "device" and "host" memory, with the margin left free."""
        spare = {
            "device": int(plan.device_limit * (1 - self.margin)) - plan.device_bytes,
            "host": int(plan.host_limit * (1 - self.margin)) - plan.host_bytes - self.host_correction}
        return {place: -bytes for place, bytes in spare.items() if bytes < 0}

    def corrected(self, profile: Profile, estimated: Plan, compiled: Plan) -> tuple["Search", dict[str, int]]:
        """The search after the compiler refused a profile; and the compiler's excess over the estimate, by memory that
        does not suffice. A correction is a tenth larger than the excess, at least 0.1 GiB, so that the same choice does
        not come back."""
        more = {"device": compiled.device_bytes - estimated.device_bytes,
                "host": compiled.host_bytes - estimated.host_bytes - self.host_correction}
        more = {place: more[place] for place in compiled.lacks}
        add = lambda place: max(GIB // 10, int(1.1 * more[place])) if place in more else 0
        search = dataclasses.replace(self, host_correction=self.host_correction + add("host"))
        everywhere, kind, of_kinds = add("device"), kind_of(profile), dict(self.of_kinds)
        if more.get("device", 0) > UNUSUAL * compiled.device_limit:
            # An excess that a second kind shares is corrected for all kinds.
            others = [bytes for other, bytes in of_kinds.items() if other != kind]
            everywhere = min(everywhere, max(others, default=0))
            of_kinds = {other: max(0, bytes - everywhere) for other, bytes in of_kinds.items()}
            of_kinds[kind] = of_kinds.get(kind, 0) + add("device") - everywhere
        return dataclasses.replace(search, device_correction=self.device_correction + everywhere,
                                   of_kinds=tuple(of_kinds.items())), more


def kind_of(profile: Profile) -> tuple[int, int]:
    """The kind of a profile: head chunks, and segments of one layer, two or more. Profiles of a kind have similar programs."""
    return profile.head_chunks, min(3, max(profile.segment_layers))
