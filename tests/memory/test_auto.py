# pytest tests/memory/test_auto.py
"""Choosing a profile: the fastest that fits; the compiler has the last word; what is typed stays."""

import dataclasses
import functools
import itertools

import pytest

from alst_jax.config import TrainConfig, UserError
from alst_jax.hardware.machines import GIB, parse_cluster
from alst_jax.planning import search as auto
from alst_jax.planning.candidates import CONFIRMED, Search, kind_of, segments_within
from alst_jax.planning.estimate import estimate
from alst_jax.planning.job import Job
from alst_jax.planning.search import choose, confirm, fits_somehow, longest
from alst_jax.profile import Profile
from benchmarks.shapes import LLAMA_70B, llama_8b
from train import parse

PLAIN = Profile(attention="cudnn", compute_dtype="bfloat16")
MODEL = llama_8b(8)
H100 = parse_cluster("H100-80", 67)


def job(length=262144, model=MODEL, sp=1, **changes) -> Job:
    return Job(model, dataclasses.replace(PLAIN, **changes), 1, length, 1, sp)


@pytest.mark.parametrize(
    "length,search",
    [
        (65536, Search(H100)),
        (524288, Search(H100)),
        (786432, Search(H100, narrow=True)),
        (524288, Search(parse_cluster("H200-141"))),
    ],
)
def test_the_choice_fits_and_the_next_faster_does_not(length, search):
    choice = choose(job(length), search)
    assert not choice.plan.missing(search.margin)
    if choice.next_faster is not None:
        _, plan, missing = choice.next_faster
        assert missing and plan.step_seconds < choice.plan.step_seconds
        assert "lacks" in choice.explain() and "GiB of" in choice.explain()
    simple = [
        estimate(dataclasses.replace(job(length), profile=dataclasses.replace(PLAIN, **changes)), search.cluster)
        for changes in (
            {},
            dict(offload_activations=True),
            dict(offload_activations=True, offload_optimizer=True),
            dict(offload_activations=True, offload_optimizer=True, offload_weights=True),
        )
    ]
    for plan in simple:
        assert plan.missing(search.margin) or plan.step_seconds >= choice.plan.step_seconds


def test_all_stays_on_the_device_where_there_is_room():
    choice = choose(job(65536, sp=8), Search(parse_cluster("8xH200")))
    profile = choice.job.profile
    assert choice.plan.host_bytes == choice.plan.host["saving"]
    assert profile.keep_attention_on_device + profile.keep_attention_on_host == 8


def test_segments_get_shorter_towards_the_last_layer():
    """What is kept on the device is freed on the way back, so that earlier segments have more room."""
    long = job(
        524288,
        llama_8b(32),
        offload_activations=True,
        offload_weights=True,
        offload_optimizer=True,
        head_chunks=8,
        keep_attention_on_device=10,
        keep_attention_on_host=12,
    )
    lengths = segments_within(long, Search(H100), 1.0)
    assert (
        sum(lengths) == 32 and lengths[-1] < max(lengths) and list(lengths[-4:]) == sorted(lengths[-4:], reverse=True)
    )
    fitted = dataclasses.replace(long, profile=dataclasses.replace(long.profile, segment_layers=lengths))
    assert "device" not in estimate(fitted, H100).lacks
    too_much = dataclasses.replace(long, profile=dataclasses.replace(long.profile, keep_attention_on_device=20))
    assert segments_within(too_much, Search(H100), 1.0) is None


def test_a_first_layer_is_no_segment_by_itself():
    """Its input would stay on the device to the end, where that of several layers is looked up again."""
    streamed = dict(offload_activations=True, offload_weights=True, offload_optimizer=True, head_chunks=8)
    found = []
    for kept, layers, length, part in itertools.product(range(10), range(24, 33), (425984, 524288), (0.25, 0.5, 1.0)):
        long = job(length, llama_8b(layers), keep_attention_on_device=kept, keep_attention_on_host=4, **streamed)
        found.append(segments_within(long, Search(H100), part) or ())
    # Where the next have two layers each and three are too many, it stays.
    assert all(len(lengths) < 2 or lengths[0] > 1 or lengths[1] <= 2 for lengths in found)
    assert sum(len(lengths) > 1 for lengths in found) > 100


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5])
def test_segments_of_a_model_of_few_layers_hold_each_layer_once(layers):
    """At a length where one or two inputs fit beside the rest: the first segment may have one layer."""
    for length, part in itertools.product((589824, 1048576, 1572864, 2097152), (0.25, 0.5, 0.75, 1.0)):
        long = job(length, llama_8b(layers), offload_activations=True, head_chunks=8)
        lengths = segments_within(long, Search(H100), part)
        assert lengths is None or sum(lengths) == layers or len(lengths) == 1 and layers % lengths[0] == 0, (
            length,
            part,
        )


def test_tiles_are_larger_where_there_is_room():
    usual, larger = (
        choose(job(131072, **tiles), Search(H100, frozenset(tiles)))
        for tiles in (dict(mlp_tile=4096, loss_tile=2048), {})
    )
    profile = larger.job.profile
    assert (profile.mlp_tile, profile.loss_tile) == (16384, 8192) and larger.plan.step_seconds < usual.plan.step_seconds
    assert (usual.job.profile.mlp_tile, usual.job.profile.loss_tile) == (4096, 2048)
    assert fits_somehow(job(131072), Search(H100)).profile.mlp_tile == 0
    untiled = choose(job(16384, loss_tile=None), Search(H100, frozenset({"loss_tile"}))).job.profile
    assert (untiled.mlp_tile, untiled.loss_tile) == (16384, None)


def test_tiles_are_as_usual_where_larger_ones_would_drive_something_out():
    # With these a layer more, or no offloading, would be the next faster choice.
    fixed = frozenset({"keep_qkv_on_device", "keep_mlp_on_device", "prefetch_activations"})
    choice = choose(job(32768, llama_8b(35), sp=4), Search(parse_cluster("4xL40S-48", 500), fixed))
    profile = choice.job.profile
    assert profile.mlp_tile == 0 and not (profile.offload_weights or profile.offload_optimizer)
    assert "The next faster choice, with --loss-tile 8192, --mlp-tile 16384" in choice.explain()


def test_reading_ahead_is_chosen_where_rows_are_read():
    """A choice with the flag and without an effect would be refused."""
    chosen = [choose(job(length), Search(H100)).job for length in (16384, 131072, 262144, 524288)]
    assert {one.profile.prefetch_activations for one in chosen} == {False, True}
    chosen.append(choose(job(128000, llama_8b(32)), Search(parse_cluster("H100-80", 125))).job)  # segments alone
    assert all(one.reads_ahead == one.profile.prefetch_activations for one in chosen)


def test_what_is_typed_stays():
    typed = dict(offload_weights=True, keep_attention_on_device=3, head_chunks=4)
    choice = choose(job(**typed), Search(H100, frozenset(typed)))
    assert all(getattr(choice.job.profile, name) == value for name, value in typed.items())
    free = choose(job(), Search(H100))
    assert choice.plan.step_seconds >= free.plan.step_seconds
    assert fits_somehow(job(2**20), Search(H100, narrow=True))
    assert fits_somehow(job(2**20), Search(H100, frozenset({"offload_activations"}), narrow=True)) is None  # it is off


def test_formats_of_the_optimizer_change_only_if_allowed():
    # 12 bytes a parameter and what is kept: too much for the host
    assert fits_somehow(job(2**20), Search(H100)) is None
    assert fits_somehow(job(2**20), Search(H100, narrow=True)).states != "float32"
    kept = choose(job(524288), Search(H100, frozenset({"master_weights"}), narrow=True)).job
    assert kept.master == "float32"
    typed = choose(job(524288), Search(H100, frozenset({"master_weights", "optimizer_states"}), narrow=True)).job
    assert (typed.states, typed.master) == ("float32", "float32")


def confirmed(compiler, say=lambda text: None):
    """The choice for 524,288 tokens that this compiler accepts."""
    search = Search(H100, margin=CONFIRMED)
    return confirm(search, functools.partial(choose, job(524288)), compiler, "none is left", say)


class Compiler:
    """A compiler that needs `excess` bytes more of the device, and `host` of the host, than the model says."""

    def __init__(self, cluster, excess=0, host=0):
        self.cluster, self.excess, self.host, self.seen = cluster, excess, host, []

    def __call__(self, job):
        plan = estimate(job, self.cluster)
        plan = dataclasses.replace(
            plan,
            source="compiled",
            device=plan.device | {"excess": self.excess},
            host=plan.host | {"excess": self.host},
        )
        self.seen.append(plan)
        return plan


@pytest.mark.parametrize(
    "excess,host", [(0, 0), (6 * GIB, 0), (15 * GIB, 0), (20 * GIB, 0), (0, 20 * GIB), (6 * GIB, 17 * GIB), (-GIB, 0)]
)
def test_a_choice_that_the_compiler_contradicts_is_corrected(excess, host):
    compiler, said = Compiler(H100, excess, host), []
    choice = confirmed(compiler, said.append)
    assert choice.plan is compiler.seen[-1] and not choice.plan.lacks
    assert all(plan.lacks for plan in compiler.seen[:-1]) and len(said) == len(compiler.seen) - 1
    if excess > 0:
        assert len(compiler.seen) > 1  # the compiler did contradict


def test_a_kind_of_profile_that_is_misjudged_does_not_condemn_the_others():
    first = choose(job(524288), Search(H100, margin=CONFIRMED)).job
    misjudged, excess = kind_of(first.profile), 40 * GIB

    class OneKind(Compiler):
        def __call__(self, job):
            self.excess = excess * (kind_of(job.profile) == misjudged)
            return super().__call__(job)

    choice = confirmed(OneKind(H100))
    assert kind_of(choice.job.profile) != misjudged
    assert (
        choice.plan.device_bytes + excess > choice.plan.device_limit
    )  # corrected for all, it would have been left out


def test_nothing_is_chosen_that_no_compiler_accepts():
    with pytest.raises(UserError, match="none is left"):
        confirmed(Compiler(H100, 500 * GIB))


def test_the_longest_length():
    search = Search(H100, narrow=True)
    found = longest(job(), search, 2**24)
    assert found % auto.LENGTH_STEP == 0 and found > 500_000
    assert fits_somehow(job(found), search) and not fits_somehow(job(found + auto.LENGTH_STEP), search)
    assert longest(job(), search, 100_000) == 100_000 // 1024 * 1024  # no longer than is asked for
    assert longest(job(model=LLAMA_70B), search, 2**24) == 0


@pytest.mark.slow
def test_the_longest_length_grows_with_host_memory_and_devices():
    found = longest(job(), Search(H100, narrow=True), 2**24)
    more_host = longest(job(), Search(parse_cluster("H100-80", 300), narrow=True), 2**24)
    eight = longest(job(sp=8), Search(parse_cluster("8xH100"), narrow=True), 2**24)
    assert found < more_host < eight


def test_what_was_typed_is_known():
    typed = lambda *arguments: parse(["--model", "m", "--data", "d", *arguments]).typed
    assert typed() == ()
    # a default typed counts
    assert typed("--offload-weights", "--segment-layers", "1") == ("offload_weights", "segment_layers")
    assert typed("--no-offload-weights", "--head-chunks", "2", "--optimizer-states", "float32") == (
        "offload_weights",
        "head_chunks",
        "optimizer_states",
    )
    assert parse(["--steps", "3", "--out", "o"]).typed == ()


@pytest.mark.parametrize(
    "flags,message",
    [
        (dict(plan_for="H100"), "--plan-for is for --plan-only"),
        (dict(plan_picture="x.png"), "--plan-picture is for --plan-only"),
        (dict(json=True), "--json is for --plan-only"),
        (dict(host_memory=0.0), "--host-memory 0.0"),
        (dict(host_memory=-1.0, plan_for="H100", plan_only=True), "--host-memory -1.0: must be a positive number"),
        (dict(plan_for="H100", plan_only=True, simulate_devices=2), "leave one of them out"),
        (dict(find_max_seq_len=True, seq_len=5), "--find-max-seq-len looks for what --seq-len 5 says"),
        (dict(memory="manual", allow_narrow_optimizer=True), "--allow-narrow-optimizer is for --memory auto"),
    ],
)
def test_flags_that_contradict_each_other(flags, message):
    from alst_jax.flag_checks import check_run

    with pytest.raises(UserError) as error:
        check_run(TrainConfig(**flags))
    assert message in str(error.value)
