"""From flags to data: the documents of --data and --eval-data, their labels, the batches of a run."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import numpy as np

from alst_jax.config import TrainConfig, UserError
from alst_jax.data.batches import Layout, TrainingBatches, content_hash, evaluation_batches, fingerprint
from alst_jax.data.cache import Cache, default_directory
from alst_jax.data.documents import Cutting, Stats, check_length, check_targets
from alst_jax.data.files import Selection
from alst_jax.data.labels import Labels
from alst_jax.data.named import parse_sources
from alst_jax.data.order import Stages
from alst_jax.data.pieces import Joined, Pieces
from alst_jax.data.prepare import BySource, cut_sources, read_sources
from alst_jax.data.records import Fields
from alst_jax.data.report import print_samples, warn_without_end
from alst_jax.data.sources import Reading
from alst_jax.ops.attention import find_kernel
from alst_jax.parallel.mesh import own_rows
from alst_jax.parallel.sequence import padded_length
from alst_jax.planning.job import Job
from alst_jax.preflight.check import check_numerics
from alst_jax.run_packs import packed, packing_of
from alst_jax.step import TrainStep
from alst_jax.storage import run_directory
from alst_jax.storage.checkpoint import Checkpoints
from alst_jax.storage.source import ModelSource, find_model
from alst_jax.trainer import Data


def reading_of(config: TrainConfig, held_out: bool = False) -> Reading:
    """The flags that say how files and records are read. UserError for flags of directories, if none is given."""
    _check_directories(config)
    selection = Selection(
        config.eval_split if held_out else config.split, config.include, config.exclude, config.document_per
    )
    fields = Fields(config.text_field, config.messages_field, config.ignore_fields)
    return Reading(fields, selection, config.skip_bad_records)


def _check_directories(config: TrainConfig) -> None:
    """UserError for a flag that selects files of directories, if no directory is given."""
    data = parse_sources(config.data, "--data") + parse_sources(config.add_data, "--add-data")
    held_out = parse_sources(config.eval_data, "--eval-data", held_out=True)
    flags = {"split": data, "eval_split": held_out} | dict.fromkeys(
        ("include", "exclude", "document_per"), data + held_out
    )
    for flag, sources in flags.items():
        if getattr(config, flag) and sources and all(pathlib.Path(source.path).is_file() for source in sources):
            names = ", ".join(source.path for source in sources)
            raise UserError(
                f"--{flag.replace('_', '-')} selects files of a directory, and {names} is no "
                "directory; leave it out, or name the directory"
            )


def labels_of(config: TrainConfig) -> Labels:
    """The flags of the learned parts of a chat."""
    return Labels(config.learn, config.template_date)


def cache_of(config: TrainConfig) -> Cache | None:
    """The cache of --data-cache; None if it is off, or not given and no home directory exists."""
    if config.data_cache == "off":
        return None
    if config.data_cache:
        return Cache(pathlib.Path(config.data_cache).expanduser())
    try:
        return Cache(default_directory(), chosen=False)
    except RuntimeError as error:  # as in containers whose user has no name
        warn_once(f"cache   tokenised in memory: {error} --data-cache names a directory")
        return None


@functools.lru_cache
def warn_once(line: str) -> None:
    """Print a line, unless it was printed before."""
    print(line, flush=True)


def show_samples(config: TrainConfig) -> None:
    """Print --show-samples documents with their learned tokens marked, and the counts of each source."""
    tokenizer = find_model(config).tokenizer
    sources = read_sources(config.data, reading_of(config), "--data")
    print_samples(sources, tokenizer, labels_of(config), config.show_samples, config.skip_bad_records)


def read_sequences(
    config: TrainConfig, source: ModelSource, held_out: bool = False, added: tuple[str, ...] = ()
) -> BySource:
    """The documents of each training (or --eval-data) source, tokenised and cut; by the names of the sources.

    added: paths of --add-data, which are read instead of --data.
    """
    flag, paths = ("--eval-data", config.eval_data) if held_out else ("--data", config.data)
    if added:
        flag, paths = "--add-data", added
    cutting = Cutting(
        source.tokenizer,
        config.seq_len,
        source.config.vocab_size,
        labels_of(config),
        config.skip_bad_records,
        config.long_documents == "drop",
    )
    return cut_sources(paths, reading_of(config, held_out), flag, cutting, cache_of(config))


def known_hash(config: TrainConfig, sequences: Any, parts: list[Pieces]) -> str | None:
    """The `content_hash` of the sequences of a run, which the cache remembers; None if no source is in the cache.

    parts: the pieces of each source.
    """
    cache = cache_of(config)
    if cache is None or not any(part.source.key for part in parts):
        return None
    flags = [config.seq_len, config.long_documents, config.pack, config.pack_attention, config.seed]
    file = cache.fingerprint_file([[part.source.key or content_hash(part) for part in parts], flags])
    if (known := cache.remembered(file)) is not None:
        return known
    known = content_hash(sequences)
    cache.remember(file, known)
    return known


@dataclasses.dataclass(frozen=True)
class Part:
    """Training sequences of a run: those of --data, or those that --add-data added later. hash: of the sequences."""

    sequences: Any
    stats: Stats
    mixture: list[tuple[int, float]] | None
    hash: str


def read_part(config: TrainConfig, source: ModelSource, added: tuple[str, ...] = ()) -> Part:
    """The sequences of --data, or of --add-data: `added`."""
    sources = read_sequences(config, source, added=added)
    sequences, stats = packed(config, sources)
    if added:  # few and short documents are all right beside the run's
        check_targets(stats, "--add-data")
    else:
        check_length(stats, config.seq_len, "--data", config.pack)
    mixture = None
    if any(report.weight is not None for report in stats.sources):
        mixture = [(report.sequences, report.weight) for report in stats.sources]
    known = known_hash(config, sequences, [pieces for pieces, _ in sources.values()])
    return Part(sequences, stats, mixture, fingerprint(sequences, mixture, known))


def read_data(config: TrainConfig, source: ModelSource, job: Job) -> tuple[Data, Stats, str]:
    """The batches of a run, the training documents' statistics and a hash of the sequences that it began with.

    UserError if one step would contain a sequence twice.
    """
    part, pad = read_part(config, source), pad_token(source.tokenizer)
    mine = own_rows(job.rows, job.dp, job.sp)
    per_step = job.rows * job.grad_accum
    for count, weight in part.mixture or [(len(part.sequences), 1.0)]:
        if count < math.ceil(per_step * weight - 1e-9):
            of = f" and its weight {weight:.3g}" if part.mixture else ""
            raise UserError(
                f"--data gives {count} sequences, fewer than the {per_step} of one step (--dp x "
                f"--batch-size x --grad-accum, or --samples-per-step){of}: a step would "
                "contain a sequence twice. Use more data or smaller steps"
            )
    sequences, stats, order, added = extended(config, source, part, per_step)
    lengths, stats.packing = lengths_of(config, job), packing_of(config, stats, job)
    stats.lengths = words_of(sequences, lengths) if config.lengths else None
    training = TrainingBatches(
        sequences, lengths, job.rows, job.grad_accum, config.seed, pad, order, Layout(stats.packing, mine)
    )
    evaluation = {}
    # Held-out documents are never read across borders. Kernels that allow `across` may not keep packed documents apart.
    across = config.pack_attention == "across"
    alone = dataclasses.replace(config, pack=False, pack_attention="documents") if across else config
    if config.eval_data or config.model is None and not config.data:
        for name, (held_out, of_source) in read_sequences(config, source, held_out=True).items():
            check_targets(of_source, f"--eval-data {name}")
            stats.held_out += of_source.sources
            held_out, counts = packed(alone, {name: (held_out, of_source)})
            evaluation[name] = functools.partial(
                evaluation_batches, held_out, lengths, job.rows, pad, packing_of(alone, counts, job), mine
            )
    warn_without_end(source.tokenizer, stats.sources)
    return Data(training, evaluation, added), stats, part.hash


def extended(
    config: TrainConfig, source: ModelSource, first: Part, per_step: int
) -> tuple[Any, Stats, Any, tuple[dict[str, Any], ...]]:
    """(all sequences, their statistics, their order, the additions) of a run with --add-data."""
    added, parts, stats = additions(config), [first], first.stats
    if not added:
        return first.sequences, stats, first.mixture, ()
    for addition in added:
        part = read_part(config, source, tuple(addition["data"]))
        if "hash" not in addition and part.hash in [earlier.hash for earlier in parts]:
            raise UserError(
                f"--add-data {', '.join(addition['data'])}: the run has a copy of these data, so they would be read "
                "twice as often; leave them out"
            )
        if addition.setdefault("hash", part.hash) != part.hash:
            raise UserError(
                f"--resume: the data that were added at step {addition['step']} have changed "
                f"({', '.join(addition['data'])}), or are read with other flags; restore them, type the "
                "same --include, --text-field and other flags as with --add-data, or start a new "
                "run with --model on this run's directory"
            )
        parts.append(part)
        stats.add(part.stats)
        if stats.fullness is not None:
            stats.fullness = stats.fullness.plus(part.stats.fullness)
    if any(part.mixture for part in parts):
        raise UserError(
            "--add-data and weights of sources (PATH:0.3): the weights say how often each source is read, "
            "and an addition would change them; leave the weights out, or start a new run with --model on "
            "this run's directory"
        )
    stages = Stages(
        tuple(len(part.sequences) for part in parts), (0, *(per_step * addition["batches"] for addition in added))
    )
    return Joined([part.sequences for part in parts]), stats, stages, tuple(added)


def additions(config: TrainConfig) -> list[dict[str, Any]]:
    """The additions to the data of the run in --out, in the form of run_directory.record_added. The flag --add-data
    gives the last one."""
    if not config.resume:
        return []
    out = pathlib.Path(config.out)
    added = [dict(addition) for addition in run_directory.read_added(out)]
    if not config.add_data:
        return added
    paths_of = lambda given: {pathlib.Path(source.path).resolve() for source in parse_sources(given, "--add-data")}
    for when, paths in [("the beginning", config.data), *((f"step {old['step']}", old["data"]) for old in added)]:
        known = paths_of(paths)
        within = lambda path: any(path == old or old in path.parents or path in old.parents for old in known)
        if twice := [path for path in paths_of(config.add_data) if within(path)]:
            raise UserError(
                f"--add-data {', '.join(map(str, sorted(twice)))}: the run has these data since {when}, so "
                "they would be read twice as often; leave them out"
            )
    step = run_directory.find_checkpoint(out)[1]
    checkpoints = Checkpoints(out)
    batches = checkpoints.restore_run(step)["data"]["next_index"]  # more than the steps where batches were left out
    checkpoints.close()
    if added and added[-1]["batches"] > batches:
        raise UserError(
            f"--add-data: data were added at step {added[-1]['step']} already, and the newest checkpoint "
            f"is of step {step}; resume without --add-data to there, then add"
        )
    return [*added, {"data": [str(path) for path in config.add_data], "step": step, "batches": batches}]


def lengths_of(config: TrainConfig, job: Job) -> tuple[int, ...]:
    """The padded lengths of sequences, ascending; the last is the job's."""
    shorter = {padded_length(length, job.sp, job.profile) for length in config.lengths}
    return (*sorted(length for length in shorter if length < job.length), job.length)


def words_of(sequences: Any, lengths: tuple[int, ...]) -> str:
    """How many sequences go in each length, and the padding if each has its own."""
    sizes = sequences.lengths
    number = np.searchsorted(lengths, sizes)
    counts = ", ".join(f"{np.count_nonzero(number == i):,} of {length:,}" for i, length in enumerate(lengths))
    padding = 1 - sizes.sum() / np.asarray(lengths)[number].sum()
    return f"{counts} tokens: {padding:.1%} padding, {1 - sizes.mean() / lengths[-1]:.1%} if all had the longest"


def pad_token(tokenizer: Any) -> int:
    """The token of padding. It has no label, so any token will do if the tokenizer names none."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def preflight(config: TrainConfig, step: TrainStep, job: Job, data: Data) -> None:
    """The checks of --check-numerics, on devices that hold nothing else. UserError if one fails."""
    position = data.training.get_state()
    batches = next(data.training)
    if isinstance(batches, list):  # of several lengths: the first of them
        batches = {name: array[None] for name, array in batches[0].items()}
    data.training.set_state(position)
    across = config.pack and config.pack_attention == "across"  # a document's last label is not the next one's first
    multiple = math.lcm(job.sp, find_kernel(job.profile.attention).multiple)
    check_numerics(step, job, multiple, None if across else batches, config.seq_len)
