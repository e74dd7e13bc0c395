"""Machines by name: numbers of devices, hosts and the links between them. Pure Python, no jax.

Memory, cores, caches and clocks are from the compiler's own target descriptions (openxla/xla,
backends/gpu/target_config/specs) or the vendor's data sheet; peaks are dense bfloat16 from the data sheets. Links have
the rate that programs reach: measured on an H100 with PCIe 5 (docs/log.md), otherwise 85% of the data sheet's
one-way rate.
"""

import dataclasses
import difflib
import re

from alst_jax.config import UserError

GIB = 2**30
MEMORY_FRACTION = 0.95  # of a device's memory that jax is given: XLA_CLIENT_MEM_FRACTION, set by environment.py
# Of a host's memory, left to the operating system, the data and the program; beyond jax's pools 12 GiB were in use at
# the peak of a run of an 8B model on one H100, save included, 17 on two, and 21 in another before its first step
# (benchmarks/results). Of a host with less than four thirds of that, a fourth may be pinned all the same.
HOST_RESERVE = 0.13
LEAST_RESERVED, MOST_RESERVED = 13 * GIB, 16 * GIB
RESERVED_DEVICE = 8 * GIB  # more, for each device after the first
LARGEST_HOST = 8  # devices
MATMUL = 650 / 989  # the part of the peak that matrix products reach, measured on an H100 (docs/log.md)

_TARGET = """gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_memory}
  threads_per_core_limit: {threads}
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth}
  l2_cache_size: {l2}
  clock_rate_ghz: {clock}
  device_memory_size: {memory}
  shared_memory_per_block_optin: {shared_memory_optin}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 19 }}
runtime_version {{ major: 13 minor: 0 }}
device_description_str: "NVIDIA {kind}"
"""


@dataclasses.dataclass(frozen=True)
class Machine:
    """One kind of device in its usual host. Bytes; FLOP/s; bytes/s, one way, of one device."""

    name: str
    kind: str  # a part of jax's device_kind
    memory: int
    host_memory: int  # of a device's share of its usual host
    peak_flops: float  # dense bfloat16
    bandwidth: float  # of device memory
    host_link: float
    interconnect: float  # to the other devices of the host
    network: float  # to other hosts
    capability: tuple[int, int]
    cores: int
    l2: int
    clock: float
    fraction: float = MEMORY_FRACTION

    @property
    def usable(self) -> int:
        """Bytes that arrays and the kernels' workspaces can have."""
        return int(self.memory * self.fraction)

    def matmul_seconds(self, flops: float, width: int) -> float:
        """Seconds of matrix products of elements of `width` bytes. Those of float32 do not use the same units."""
        return flops * (1 if width == 2 else 16) / (MATMUL * self.peak_flops)

    @property
    def target_config(self) -> str:
        """The compiler's description of this device, for `jax.experimental.topologies`."""
        datacenter = self.capability in ((8, 0), (9, 0), (10, 0))
        shared_memory = {(8, 0): 167936, (8, 9): 102400}.get(self.capability, 233472)
        return _TARGET.format(
            shared_memory=shared_memory,
            shared_memory_optin=shared_memory - 1024,
            threads=2048 if datacenter else 1536,
            cores=self.cores,
            fpus=64 if self.capability == (8, 0) else 128,
            bandwidth=int(self.bandwidth),
            l2=self.l2,
            clock=self.clock,
            memory=self.memory,
            major=self.capability[0],
            minor=self.capability[1],
            kind=self.kind,
        )


# name, kind, memory, host memory, peak, and bandwidths; then capability, cores, L2 cache, GHz
MACHINES = {
    machine.name: machine
    for machine in (
        Machine(
            "H100-80", "H100", 84929347584, 221 * GIB, 989e12, 3.352e12, 53e9, 380e9, 42e9, (9, 0), 132, 52428800, 1.98
        ),
        Machine(
            "H200-141", "H200", 150754820096, 221 * GIB, 989e12, 4.8e12, 53e9, 380e9, 42e9, (9, 0), 132, 52428800, 1.98
        ),
        Machine(
            "GH200-96",
            "GH200",
            101468602368,
            480 * GIB,
            989e12,
            4.0e12,
            300e9,
            380e9,
            42e9,
            (9, 0),
            132,
            52428800,
            1.98,
        ),
        Machine(
            "A100-80", "A100", 85100068864, 144 * GIB, 312e12, 2.039e12, 26e9, 255e9, 21e9, (8, 0), 108, 41943040, 1.41
        ),
        Machine(
            "L40S-48", "L40S", 47697362944, 192 * GIB, 362e12, 0.864e12, 26e9, 26e9, 10e9, (8, 9), 142, 100663296, 2.52
        ),
        Machine(
            "RTX-4090-24",
            "RTX 4090",
            25756696576,
            64 * GIB,
            165e12,
            1.008e12,
            26e9,
            20e9,
            10e9,
            (8, 9),
            128,
            75497472,
            2.52,
        ),
        Machine(
            "B200",
            "B200",
            191514411008,
            256 * GIB,
            2250e12,
            7.672e12,
            53e9,
            765e9,
            42e9,
            (10, 0),
            148,
            132644864,
            1.965,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Some hosts with the same number of the same devices. host_memory: bytes of one host; pinned: the bytes that
    jax may pin for each device, None for the usual share; used: the devices that a run takes, None for all; processes:
    of a run on each host."""

    machine: Machine
    hosts: int
    per_host: int
    host_memory: int
    pinned: int | None = None
    used: int | None = None
    processes: int = 1

    @property
    def devices(self) -> int:
        return self.hosts * self.per_host

    @property
    def host_share(self) -> int:
        """Bytes of host memory that plans may give to one device."""
        return pinned_share(self.host_memory, self.sharing) if self.pinned is None else self.pinned

    @property
    def sharing(self) -> int:
        """Devices of a host that a run takes."""
        return min(self.per_host, self.used or self.per_host)

    @property
    def topology(self) -> str:
        """As `jax.experimental.topologies` names it."""
        return f"{self.hosts}x1x{self.per_host}"

    def __str__(self) -> str:
        some = f"{self.used} of " if self.sharing < self.per_host else ""
        hosts = f"{self.hosts} hosts of " if self.hosts > 1 else some
        return f"{hosts}{self.per_host} x {self.machine.name}, {self.host_memory / GIB:.0f} GiB of host memory" + (
            " each" if self.hosts > 1 else ""
        )


def pinned_share(total: int, devices: int) -> int:
    """Bytes of a host's memory that jax may pin for each of its `devices`."""
    reserved = max(LEAST_RESERVED, min(int(total * HOST_RESERVE), MOST_RESERVED)) + (devices - 1) * RESERVED_DEVICE
    return max(total - reserved, total // 4) // devices


def parse_cluster(text: str, host_memory_gib: float | int | None = None) -> Cluster:
    """`H100-80`, `8xH100` (any unique beginning of a name), `4x8xH100` (four hosts of eight) -> the cluster.

    host_memory_gib: of one host; None: the usual share a device, times the devices. UserError on an unknown name.
    """
    match = re.fullmatch(r"(?:(?:(\d+)x)?(\d+)x)?(.*)", text.strip())
    hosts, per_host, machine = int(match[1] or 1), int(match[2] or 1), find_machine(match[3])
    if hosts < 1 or per_host < 1:
        raise UserError(f"--plan-for {text}: must be at least one host of one device, as in 8xH100-80 or 4x8xH100-80")
    if per_host > LARGEST_HOST:
        raise UserError(
            f"--plan-for {text}: a host has at most {LARGEST_HOST} devices; for several hosts write "
            f"HOSTSxDEVICESxNAME, as in {-(-per_host // LARGEST_HOST)}x{LARGEST_HOST}x{machine.name}"
        )
    memory = machine.host_memory * per_host if host_memory_gib is None else int(host_memory_gib * GIB)
    return Cluster(machine, hosts, per_host, memory)


def find_machine(name: str) -> Machine:
    """The machine of this name or of the only name that begins so. UserError, with the list and the closest,
    otherwise."""
    found = [machine for key, machine in MACHINES.items() if name and key.lower().startswith(name.lower())]
    if len(found) == 1:
        return found[0]
    lower = {key.lower(): key for key in MACHINES}
    closest = difflib.get_close_matches(name.lower(), lower, 1, 0.0)
    why = "several machines begin so" if found else "no such machine"
    raise UserError(
        f"--plan-for {name or '(nothing)'}: {why}; known are {', '.join(MACHINES)}; the closest is "
        f"{lower[closest[0]] if closest else next(iter(MACHINES))}"
    )


def machine_of_kind(device_kind: str) -> Machine | None:
    """The machine that jax calls so, or None (CPU, or a device that is not in the list)."""
    found = [machine for machine in MACHINES.values() if machine.kind in device_kind]
    return max(found, key=lambda machine: len(machine.kind)) if found else None
