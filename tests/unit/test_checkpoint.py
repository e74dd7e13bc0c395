# pytest tests/unit/test_checkpoint.py
"""Checkpoints come back bit for bit, on any mesh, or are refused by name; what was cut off or damaged is never used."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from flax import nnx
from jax.sharding import SingleDeviceSharding

from alst_jax import run as setup
from alst_jax.config import TrainConfig, UserError
from alst_jax.data.batches import TrainingBatches
from alst_jax.data.documents import Sequence
from alst_jax.data.tokenizer import byte_tokenizer, load_tokenizer
from alst_jax.models.hf_config import hf_config_dict
from alst_jax.models.hf_weights import save_params
from alst_jax.models.tree import as_dict, names
from alst_jax.profile import Profile
from alst_jax.storage import checkpoint as ckpt
from alst_jax.storage import run_directory
from alst_jax.xla import arrays as loading
from tests.helpers import PLAIN, TINY, initial, leaf, make_step, tiny, to_numpy

ON_HOST = Profile(offload_activations=True, offload_weights=True, offload_optimizer=True)
LOOP = {"step": 3, "data": {"next_index": 2**40 - 1, "nested": [1, None, "é"]}, "seed": 0, "geometry": {"rows": 2}}


def filled(abstract, seed=0):
    """Arrays in the places `abstract` names, with the bit patterns that sloppy copies lose."""
    rng = np.random.default_rng(seed)

    def leaf(a):
        if a.dtype == jnp.int32:
            return jax.device_put(np.full(a.shape, 12345 + seed, np.int32), a.sharding)
        values = rng.standard_normal(a.shape).astype(a.dtype)
        values.reshape(-1)[:4] = [np.nan, -0.0, 1e-40, np.inf]
        return jax.device_put(values, a.sharding)

    return jax.tree.map(leaf, abstract)


def assert_identical(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), jax.tree_util.keystr(path)


def assert_placed(tree, abstract):
    for x, a in zip(jax.tree.leaves(tree), jax.tree.leaves(abstract), strict=True):
        assert x.sharding == a.sharding and x.dtype == a.dtype


def saved(run_dir, *steps, keep=None, made=None):
    """A run directory with checkpoints of the same weights at `steps`."""
    made = made or make_step(dp=2, sp=2)
    run_directory.write_run_file(run_dir, "training", {"flags": {}})
    params, optimizer = filled(made.params), filled(made.optimizer_state, seed=1)
    checkpoints = ckpt.Checkpoints(run_dir, keep)
    for step in steps:
        checkpoints.save(step, params, optimizer, LOOP | {"step": step})
    checkpoints.close()
    return params, optimizer


# ------------------------------------------------------------------------------------------------------------ contents


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_bit_survives_meshes_and_memory_kinds(tmp_path, dtype):
    steps = [make_step(dp=8, dtype=dtype), make_step(dp=2, sp=4, dtype=dtype, profile=ON_HOST), make_step(dtype=dtype)]
    params, optimizer = filled(steps[0].params), filled(steps[0].optimizer_state, seed=1)
    assert ("master" in optimizer) == (dtype == "bfloat16")
    original = to_numpy((params, optimizer))
    for i in range(len(steps)):
        checkpoints = ckpt.Checkpoints(tmp_path / str(i))
        checkpoints.save(3, params, optimizer, LOOP)
        checkpoints.close()
        checkpoints = ckpt.Checkpoints(tmp_path / str(i))
        assert checkpoints.restore_loop(3) == LOOP
        onto = steps[min(i + 1, 2)]
        params = checkpoints.restore_params(3, onto.params)
        optimizer = checkpoints.restore_optimizer(3, onto.optimizer_state)
        assert_identical((params, optimizer), original)
        assert_placed((params, optimizer), (onto.params, onto.optimizer_state))
        checkpoints.close()


def test_weights_come_in_the_dtype_asked_for(tmp_path):
    params, _ = saved(tmp_path, 1)
    step = make_step(dtype="bfloat16")
    narrow = ckpt.Checkpoints(tmp_path).restore_params(1, step.params)
    assert_placed(narrow, step.params)
    for x, y in zip(jax.tree.leaves(narrow), jax.tree.leaves(params), strict=True):
        rounded = np.asarray(y).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(np.asarray(x).astype(np.float32), rounded.astype(np.float32))


@pytest.mark.parametrize("profile", [PLAIN, ON_HOST], ids=["device", "host"])
def test_large_arrays_are_restored_some_rows_at_a_time(tmp_path, monkeypatch, profile):
    """There is no room for a second copy of a stack beside the pinned memory of a long run."""
    params, optimizer = saved(tmp_path, 1, made=make_step(dp=2, sp=2, dtype="bfloat16"))
    reads, original = [], ckpt._read
    monkeypatch.setattr(ckpt, "_read", lambda *where: reads.append(original(*where)) or reads[-1])
    onto = make_step(sp=2, dtype="bfloat16", profile=profile)
    back = lambda: (ckpt.Checkpoints(tmp_path).restore_params(1, onto.params),
                    ckpt.Checkpoints(tmp_path).restore_optimizer(1, onto.optimizer_state))
    back()
    whole, number = max(x.nbytes for x in reads), len(reads)
    reads.clear()
    monkeypatch.setattr(loading, "AT_ONCE", 1000)
    assert_identical(back(), (params, optimizer))
    a_layer = whole // TINY.num_layers
    assert max(x.nbytes for x in reads) == a_layer > 1000 and len(reads) > 2 * number


def test_an_optimizer_of_another_kind_is_refused(tmp_path):
    saved(tmp_path, 1, made=make_step(dtype="bfloat16"))
    wanted = make_step(dtype="bfloat16").optimizer_state
    less = {name: part for name, part in wanted.items() if name != "master"}
    with pytest.raises(UserError, match=r"checkpoints/1 has the optimizer of another model or optimizer: "
                       r"master\.\S+ is \(.*\) floats there and none here.*\. Use the model and the flags it was made with$"):
        ckpt.Checkpoints(tmp_path).restore_optimizer(1, less)
    with pytest.raises(UserError, match=r"low\.\S+ is none there and \(.*\) floats here"):
        ckpt.Checkpoints(tmp_path).restore_optimizer(1, wanted | {"low": wanted["master"]})
    as_bits = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.uint16, sharding=x.sharding), wanted["master"])
    with pytest.raises(UserError, match=r"master\.\S+ is \(.*\) floats there and \(.*\) uint16 here"):  # low bits
        ckpt.Checkpoints(tmp_path).restore_optimizer(1, wanted | {"master": as_bits})


def test_weights_read_one_by_one(tmp_path):
    params, _ = saved(tmp_path, 1, made=make_step(dp=2, sp=2, dtype="bfloat16"))
    read = dict(ckpt.Checkpoints(tmp_path).read_params(1))
    expected = {names(path): array for path, array in jax.tree_util.tree_leaves_with_path(params)}
    assert read.keys() == expected.keys()
    for path, array in read.items():
        assert isinstance(array, np.ndarray)
        assert_identical(array, expected[path])


def test_a_conversion_has_no_optimizer(tmp_path):
    step = make_step()
    params = filled(step.params)
    checkpoints = ckpt.Checkpoints(tmp_path)
    checkpoints.save(0, params, None, {})
    assert_identical(checkpoints.restore_params(0, step.params), params)
    with pytest.raises(UserError, match=f"checkpoint {tmp_path}/checkpoints/0 cannot be read: optimizer.*not found"):
        checkpoints.restore_optimizer(0, step.optimizer_state)


def test_the_position_in_the_data_is_restored(tmp_path):
    sequences = [Sequence(np.full(4, i, np.int32), np.full(4, i, np.int32)) for i in range(7)]
    make = lambda: TrainingBatches(sequences, 4, 2, 1, seed=0, pad_token=0)
    data = make()
    for _ in range(5):
        next(data)
    checkpoints = ckpt.Checkpoints(tmp_path)
    checkpoints.save(5, filled(make_step().params), None, {"data": data.get_state()})
    expected = [next(data)["tokens"].tolist() for _ in range(6)]
    resumed = make()
    resumed.set_state(checkpoints.restore_loop(5)["data"])
    assert [next(resumed)["tokens"].tolist() for _ in range(6)] == expected


@pytest.mark.parametrize("profile", [PLAIN, ON_HOST], ids=["device", "host"])
def test_a_save_is_not_reached_by_the_updates_that_follow(tmp_path, profile):
    """The next update reuses the very buffers that were saved."""
    model = tiny(vocab_size=4096, hidden_size=128, intermediate_size=1024)
    step = make_step(model, dp=2, sp=4, profile=profile)
    params = initial(step)
    state = step.init_optimizer(params)
    gradients = jax.device_put(jax.tree.map(lambda p: p + 0.01, params), step.param_shardings)
    update = lambda params, state: step.update(params, gradients, state, jnp.float32(1), jnp.float32(1e-2))
    first = params
    params, state = update(params, state)  # now it is compiled, and the moments are not zero
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    before = jax.tree.map(lambda x: np.array(x, copy=True), (params, state))
    checkpoints = ckpt.Checkpoints(tmp_path)
    checkpoints.save(1, params, state, LOOP)
    for _ in range(3):
        params, state = update(params, state)
    jax.block_until_ready((params, state))
    restored = checkpoints.restore_params(1, step.params), checkpoints.restore_optimizer(1, step.optimizer_state)
    assert_identical(restored, before)
    assert not np.array_equal(np.asarray(leaf(params, "norm.scale")), leaf(before[0], "norm.scale"))


# --------------------------------------------------------------------------------------------------- several, cut off


@pytest.mark.parametrize("keep, left", [(1, [9]), (2, [5, 9]), (None, [1, 3, 5, 9])])
def test_old_checkpoints_make_room(tmp_path, keep, left):
    saved(tmp_path, 1, 3, 5, 9, keep=keep)
    assert sorted(int(p.name) for p in (tmp_path / run_directory.CHECKPOINTS).iterdir()) == left
    assert ckpt.Checkpoints(tmp_path, keep).steps() == left
    assert run_directory.find_checkpoint(tmp_path) == (tmp_path, 9)
    step = make_step()
    for at in left:
        assert ckpt.Checkpoints(tmp_path).restore_loop(at)["step"] == at
        ckpt.Checkpoints(tmp_path).restore_params(at, step.params)


CUT_OFF = """
import os, sys, threading
import jax, jax.numpy as jnp
from alst_jax.storage.checkpoint import Checkpoints
checkpoints = Checkpoints(sys.argv[1])
checkpoints.save(1, {"a": {"kernel": jnp.ones(4)}}, None, {"step": 1})
large = jax.random.normal(jax.random.key(0), (6000, 6000))

def kill():
    while sum("2" in name for name in os.listdir(checkpoints.directory)) == 0:
        pass
    os._exit(9)  # as a kill would, while the files are being written

threading.Thread(target=kill).start()
checkpoints.save(2, {"a": {"kernel": large}}, None, {"step": 2})
"""


def test_a_save_that_was_cut_off_is_never_found(tmp_path):
    run_directory.write_run_file(tmp_path, "training", {})
    killed = subprocess.run([sys.executable, "-c", CUT_OFF, str(tmp_path)], cwd=pathlib.Path(__file__).parents[2],
                            env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert killed.returncode == 9, killed.stderr
    left = [p.name for p in (tmp_path / run_directory.CHECKPOINTS).iterdir()]
    assert len(left) == 2 and "2" not in left, left  # the remains of the second are there, under another name
    assert run_directory.find_checkpoint(tmp_path) == (tmp_path, 1)
    checkpoints = ckpt.Checkpoints(tmp_path)
    assert checkpoints.steps() == [1] and checkpoints.restore_loop(1) == {"step": 1}
    checkpoints.save(2, {"a": {"kernel": jnp.zeros(4)}}, None, {"step": 2})  # the resumed run gets there again
    checkpoints.close()
    assert run_directory.find_checkpoint(tmp_path) == (tmp_path, 2)


# ------------------------------------------------------------------------------------------------------------- damaged


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


def overwrite(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 4 : len(content) // 2] = b"\xa5" * (len(content) // 2 - len(content) // 4)
    file.write_bytes(content)


def drop_a_chunk(item):
    """Of one array, which then has no data there: zarr's readers would make zeros of it."""
    database = ts.KvStore.open({"driver": "ocdbt", "base": item.as_uri()}).result()
    chunks = [key for key in database.list().result() if re.search(rb"mlp.up_proj.kernel/[\d.]+$", key)]
    database.write(chunks[-1], None).result()


DAMAGES = {
    "a chunk of weights missing": ("params", drop_a_chunk),
    "weights cut short": ("params", lambda item: halve(largest_file(item))),
    "weights overwritten": ("params", lambda item: overwrite(largest_file(item))),
    "weights' data missing": ("params", lambda item: largest_file(item).unlink()),
    "weights' manifest missing": ("params", lambda item: (item / "manifest.ocdbt").unlink()),
    "weights' metadata emptied": ("params", lambda item: os.truncate(item / "_METADATA", 0)),
    "weights missing": ("params", shutil.rmtree),
    "optimizer cut short": ("optimizer", lambda item: halve(largest_file(item))),
    "optimizer missing": ("optimizer", shutil.rmtree),
    "loop cut short": ("loop", lambda item: halve(item / "metadata")),
    "loop missing": ("loop", shutil.rmtree),
}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("intact")
    saved(run_dir, 3)
    return run_dir


def restore(run_dir, step, item):
    made, checkpoints = make_step(dp=2, sp=2), ckpt.Checkpoints(run_dir)
    if item == "loop":
        return checkpoints.restore_loop(step)
    if item == "params":
        return checkpoints.restore_params(step, made.params)
    return checkpoints.restore_optimizer(step, made.optimizer_state)


@pytest.mark.parametrize("item, damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, intact, item, damage):
    run_dir = tmp_path / "run"
    shutil.copytree(intact, run_dir)
    at = run_dir / run_directory.CHECKPOINTS / "3"
    damage(at / item)
    with pytest.raises(UserError, match=f"^checkpoint {at} cannot be read: .+; there is no other step in this dir"):
        restore(run_dir, 3, item)
    if item == "params":
        with pytest.raises(UserError, match=f"^checkpoint {at} cannot be read: "):
            list(ckpt.Checkpoints(run_dir).read_params(3))
    for other in {"loop", "params", "optimizer"} - {item}:
        restore(run_dir, 3, other)


def test_the_refusal_says_how_to_go_on(tmp_path):
    saved(tmp_path, 2, 4, 6)
    halve(largest_file(tmp_path / run_directory.CHECKPOINTS / "6" / "params"))
    halve(largest_file(tmp_path / run_directory.CHECKPOINTS / "4" / "optimizer"))
    with pytest.raises(UserError, match="cannot be read: params/.* bytes and was written with .*; step 2 was verified. To "
                                        "go on from it: mv .* && python train.py --resume --out ") as refusal:
        restore(tmp_path, 6, "params")
    subprocess.run(re.search("mv (.*?) &&", str(refusal.value))[0].removesuffix(" &&"), shell=True, check=True)
    shutil.rmtree(tmp_path / run_directory.CHECKPOINTS / "4")
    assert run_directory.find_checkpoint(tmp_path) == (tmp_path, 2)
    restore(tmp_path, 2, "params")


def test_a_checkpoint_is_not_to_blame_for_a_lack_of_memory(intact, monkeypatch):
    """Or a user is told to delete it."""
    def too_large(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(ckpt, "load_array", too_large)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        restore(intact, 3, "params")


@pytest.mark.parametrize("changes", [dict(num_layers=2), dict(vocab_size=104), dict(mlp_bias=False),
                                     dict(tie_word_embeddings=True)])
def test_weights_of_another_model_are_refused(intact, changes):
    with pytest.raises(UserError, match=f"^checkpoint {intact}/checkpoints/3 has the params of another model"):
        ckpt.Checkpoints(intact).restore_params(3, make_step(tiny(**changes)).params)


# -------------------------------------------------------------------------------------------------------------- finding


@pytest.fixture
def run(tmp_path):
    """A run directory with steps 7 and 10, which only their names make checkpoints."""
    run_directory.write_run_file(tmp_path / "run", "training", {"flags": {"steps": 10}})
    for name in ("7", "10", "11.orbax-checkpoint-tmp"):
        (tmp_path / "run" / run_directory.CHECKPOINTS / name).mkdir(parents=True)
    return tmp_path / "run"


def test_the_forms_of_a_checkpoints_name(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    newest = ("run", "run/", "run/checkpoints", "run/checkpoints/10")
    for form, step in [(form, 10) for form in newest] + [("run/checkpoints/7", 7)]:
        for given in (form, pathlib.Path(form), run.parent / form):
            assert run_directory.find_checkpoint(given) == (run, step)
            assert run_directory.is_checkpoint(given)


def test_a_run_directory_may_have_any_name(run):
    for name in ("checkpoints", "checkpoints/5"):
        moved = run.parent / "elsewhere" / name
        moved.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(run, moved)
        assert run_directory.find_checkpoint(moved) == (moved, 10)


def test_what_is_no_checkpoint_is_said(run):
    other = run.parent / "other"
    other.mkdir()
    for path in (other, run.parent / "nowhere", run / run_directory.CHECKPOINTS / "7" / "params", run / run_directory.MODEL):
        with pytest.raises(UserError, match=f"^{path}: no checkpoint there; it is a directory with run.json, model/"):
            run_directory.find_checkpoint(path)
    with pytest.raises(UserError, match=f"^{run}/checkpoints/8: no such step; there are 7, 10$"):
        run_directory.find_checkpoint(run / run_directory.CHECKPOINTS / "8")
    shutil.rmtree(run / run_directory.CHECKPOINTS)
    with pytest.raises(UserError, match=f"^{run}: the run has saved no checkpoint yet$"):
        run_directory.find_checkpoint(run)
    assert not run_directory.is_checkpoint(other)


def test_the_export_inside_a_run_is_a_model_and_no_checkpoint(run):
    """OUT/hf is what a run leaves behind for others, --model among them."""
    export = run / run_directory.EXPORT
    params = filled(make_step().params)
    save_params(jax.tree_util.tree_leaves_with_path(params), TINY, export)
    (export / "config.json").write_text(json.dumps(hf_config_dict(TINY)))
    byte_tokenizer().save_pretrained(export)
    assert not run_directory.is_checkpoint(export)
    source = setup.find_model(TrainConfig(model=str(export), data=("any",)))
    assert source.hf_weights == export and source.config == TINY


# ------------------------------------------------------------------------------------------------------------ run files


def test_run_file(run):
    record = run_directory.read_run_file(run)
    assert record["kind"] == "training" and record["flags"] == {"steps": 10}
    assert record["versions"]["jax"] == jax.__version__
    assert run_directory.is_run_directory(run) and not run_directory.is_run_directory(run.parent)
    with pytest.raises(UserError, match="no run to resume there: it has no run.json; leave out --resume to start one"):
        run_directory.read_run_file(run.parent)
    (run / run_directory.RUN_FILE).write_text('{"kind": ')
    with pytest.raises(UserError, match=f"^{run}/run.json is not valid JSON: "):
        run_directory.read_run_file(run)


def test_a_changed_model_is_refused_field_by_field():
    run_directory.check_same_model(TINY, tiny())
    with pytest.raises(UserError, match="^--resume: the model has changed since the checkpoint "
                       r"\(num_layers 3 -> 4; mlp_bias True -> False\); start a new run in another --out"):
        run_directory.check_same_model(TINY, tiny(num_layers=4, mlp_bias=False))
    with pytest.raises(UserError, match="rope .*theta.*10000.0.* -> .*500000.0"):
        run_directory.check_same_model(TINY, tiny(rope=TINY.rope.__class__(theta=5e5)))


def test_model_files_are_copied_without_weights(tmp_path):
    source = tmp_path / "hf"
    (source / "original").mkdir(parents=True)
    copied = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja",
              "vocab.json")
    left = ("model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
            "pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.gguf", ".gitattributes",
            "original/params.json")
    for name in copied + left:
        (source / name).write_text(name)
    run_directory.copy_model_files(source, tmp_path / "run" / run_directory.MODEL)
    there = {p.name: p.read_text() for p in (tmp_path / "run" / run_directory.MODEL).iterdir()}
    assert there == {name: name for name in copied}


def test_named_chat_templates_are_copied_and_replaced_by_ones_own(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    tokenizer.save_pretrained(tmp_path / "hf")
    run_directory.copy_model_files(tmp_path / "hf", tmp_path / "model")
    run_directory.copy_model_files(tmp_path / "model", tmp_path / "export")
    assert load_tokenizer(tmp_path / "export").chat_template == {"default": "a", "tool_use": "b"}
    settings = tmp_path / "model" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "old"}))
    run_directory.write_template("own", tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").chat_template == "own"
    tokenizer.chat_template = "typed"
    (tmp_path / "hf/config.json").write_text(json.dumps(hf_config_dict(TINY)))
    for given, expected in ((None, {"default": "a", "tool_use": "b"}), ("own.jinja", "typed")):
        out, config = tmp_path / f"run-{given}", TrainConfig(chat_template=given)
        run_directory.start_run_directory(out, config, TINY, tokenizer, tmp_path / "hf")
        assert load_tokenizer(out / "model").chat_template == expected


# --------------------------------------------------------------------------------------------- trees with Flax modules


class Linear(nnx.Module):
    def __init__(self, shape):
        self.kernel = nnx.Param(jnp.zeros(shape))


class Block(nnx.Module):
    def __init__(self):
        self.q_proj, self.o_proj, self.heads = Linear((3, 8, 4)), Linear((3, 4, 8)), 2


def dicts_and_modules():
    """The same abstract weights, as nested dicts and with a module for the layers."""
    place = lambda tree: jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SingleDeviceSharding(jax.devices()[0])), tree)
    shapes = {"q_proj": {"kernel": jnp.zeros((3, 8, 4))}, "o_proj": {"kernel": jnp.zeros((3, 4, 8))}}
    table = {"embedding": jnp.zeros((16, 8))}
    return place({"embed_tokens": table, "layers": shapes}), place({"embed_tokens": table, "layers": Block()})


def test_modules_and_dicts_are_the_same_on_disk(tmp_path):
    dicts, modules = dicts_and_modules()
    for number, (written, read) in enumerate(((modules, dicts), (dicts, modules), (modules, modules))):
        params, optimizer = filled(written), {"mu": filled(written, seed=1), "count": jnp.int32(3)}
        checkpoints = ckpt.Checkpoints(tmp_path / str(number))
        checkpoints.save(1, params, optimizer, LOOP)
        abstract = {"mu": read, "count": jax.tree.leaves(read)[0].update(shape=(), dtype=jnp.int32)}
        back = checkpoints.restore_params(1, read), checkpoints.restore_optimizer(1, abstract)
        assert jax.tree.structure(back[0]) == jax.tree.structure(read)
        assert_identical(as_dict(back), as_dict((params, optimizer)))
        assert_placed(back[0], read)
        stored = dict(checkpoints.read_params(1))
        assert stored.keys() == {("embed_tokens", "embedding"), ("layers", "q_proj", "kernel"), ("layers", "o_proj", "kernel")}
        assert_identical(stored["layers", "q_proj", "kernel"], as_dict(params)["layers"]["q_proj"]["kernel"])
        tree = json.loads((tmp_path / str(number) / "checkpoints/1/params/_METADATA").read_text())["tree_metadata"]
        assert "('layers', 'q_proj', 'kernel')" in tree and not any("value" in name for name in tree)
        checkpoints.close()


def test_parameters_without_an_optimizer_state_are_not_stored(tmp_path):
    """A frozen parameter has None in the optimizer's trees."""
    _, modules = dicts_and_modules()
    trained = {"mu": modules | {"embed_tokens": {"embedding": None}}}
    checkpoints = ckpt.Checkpoints(tmp_path)
    checkpoints.save(1, filled(modules), filled(trained), LOOP)
    back = checkpoints.restore_optimizer(1, trained)
    assert jax.tree.structure(back) == jax.tree.structure(trained)
    with pytest.raises(UserError, match=r"mu.embed_tokens.embedding is none there and \(16, 8\) floats here"):
        checkpoints.restore_optimizer(1, {"mu": modules})


# -------------------------------------------------------------------------------------------------------- orbax's patch

PATCH = """
import logging
from orbax.checkpoint._src.serialization import serialization
original, filters = serialization.async_serialize_from_host, list(logging.getLogger("absl").filters)
from alst_jax.storage import checkpoint, orbax_limits
assert serialization.async_serialize_from_host is original
assert logging.getLogger("absl").filters == filters
orbax_limits.install()
patched = serialization.async_serialize_from_host
assert patched is not original and patched.__wrapped__ is original
orbax_limits.install()
assert serialization.async_serialize_from_host is patched
assert len(logging.getLogger("absl").filters) == len(filters) + 1
serialization.async_serialize_from_host = original
import sys
checkpoint.Checkpoints(sys.argv[1])
assert serialization.async_serialize_from_host is not original
"""


def test_orbax_is_patched_by_install_and_not_by_an_import(tmp_path):
    done = subprocess.run([sys.executable, "-c", PATCH, str(tmp_path)], cwd=pathlib.Path(__file__).parents[2],
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
