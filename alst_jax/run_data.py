"""From flags to data: the documents of --data and --eval-data, their labels, the batches of a run."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import numpy as np

from alst_jax.config import TrainConfig, UserError
from alst_jax.data.batches import TrainingBatches, content_hash, evaluation_batches, fingerprint
from alst_jax.data.cache import Cache, default_directory
from alst_jax.data.documents import Cutting, Stats, check_length, check_targets
from alst_jax.data.files import Selection
from alst_jax.data.labels import Labels
from alst_jax.data.named import parse_sources
from alst_jax.data.packing import Fullness, Packs, pack, room_for
from alst_jax.data.pieces import Joined, Pieces
from alst_jax.data.prepare import BySource, cut_sources, read_sources
from alst_jax.data.records import Fields
from alst_jax.data.report import print_samples, warn_without_end
from alst_jax.data.sources import Reading
from alst_jax.ops.attention import find_kernel
from alst_jax.planning.job import Job
from alst_jax.preflight.check import check_numerics
from alst_jax.step import TrainStep
from alst_jax.storage.source import ModelSource, find_model
from alst_jax.trainer import Data


def reading_of(config: TrainConfig, held_out: bool = False) -> Reading:
    """The flags that say how files and records are read. UserError for flags of directories, if none is given."""
    _check_directories(config)
    selection = Selection(config.eval_split if held_out else config.split, config.include, config.exclude,
                          config.document_per)
    fields = Fields(config.text_field, config.messages_field, config.ignore_fields)
    return Reading(fields, selection, config.skip_bad_records)


def _check_directories(config: TrainConfig) -> None:
    """UserError for a flag that chooses among the files of directories, if all that it could choose from are files."""
    data, held_out = parse_sources(config.data, "--data"), parse_sources(config.eval_data, "--eval-data", held_out=True)
    flags = {"split": data, "eval_split": held_out} | dict.fromkeys(
        ("include", "exclude", "document_per"), data + held_out)
    for flag, sources in flags.items():
        if getattr(config, flag) and sources and all(pathlib.Path(source.path).is_file() for source in sources):
            names = ", ".join(source.path for source in sources)
            raise UserError(f"--{flag.replace('_', '-')} says what is read of a directory, and {names} is no "
                            "directory; leave it out, or name the directory")


def labels_of(config: TrainConfig) -> Labels:
    """The flags that say what is learned of a chat."""
    return Labels(config.learn, config.template_date)


def cache_of(config: TrainConfig) -> Cache | None:
    """The cache of --data-cache; None if it is off, or not given and there is no home directory."""
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


def read_sequences(config: TrainConfig, source: ModelSource, held_out: bool = False) -> BySource:
    """The documents of each training (or --eval-data) source, tokenised and cut; by the names of the sources."""
    flag, paths = ("--eval-data", config.eval_data) if held_out else ("--data", config.data)
    cutting = Cutting(source.tokenizer, config.seq_len, source.config.vocab_size, labels_of(config),
                      config.skip_bad_records, config.long_documents == "drop")
    return cut_sources(paths, reading_of(config, held_out), flag, cutting, cache_of(config))


def packed(config: TrainConfig, sources: BySource) -> tuple[Any, Stats]:
    """The sequences of all sources, one source behind the other, in packs with --pack; and their counts."""
    packs, stats, pieces = [], Stats(), Joined([sequences for sequences, _ in sources.values()])
    before = 0
    for sequences, of_source in sources.values():
        if config.pack and sequences:
            made = pack(sequences.lengths, config.seq_len, config.seed)
            packs += [[before + i for i in members] for members in made]
            of_source.sequences = of_source.sources[0].sequences = len(made)
        before += len(sequences)
        stats.add(of_source)
    if not packs:
        return pieces, stats
    stats.fullness = Fullness(len(packs), config.seq_len, pieces.lengths, max(map(len, packs)))
    return Packs(pieces, packs, together=config.pack_attention == "across"), stats


def packing_of(config: TrainConfig, sequences: Any, stats: Stats, job: Job) -> tuple[int, int] | None:
    """(data-parallel replicas, documents of a replica at most); None where sequences are single documents."""
    if not config.pack or config.pack_attention == "across":
        return None
    return job.dp, room_for(sequences.most_documents(job.length, stats.fullness.lengths), job.rows // job.dp)


def known_hash(config: TrainConfig, sequences: Any, parts: list[Pieces]) -> str | None:
    """The `content_hash` of the sequences of a run, which the cache remembers; None if no source is in the cache.

    parts: the pieces of each source.
    """
    cache = cache_of(config)
    if cache is None or not any(part.source.key for part in parts):
        return None
    flags = [config.seq_len, config.long_documents, config.pack, config.pack_attention, config.seed]
    file = cache.fingerprint_file([[part.source.key or content_hash(part) for part in parts], flags])
    if file.is_file():
        return file.read_text()
    known = content_hash(sequences)
    cache.remember(file, known)
    return known


def with_packs(job: Job, stats: Stats) -> Job:
    """The job, with what is known of the packs: room for documents, and the share of attention that they need."""
    if stats.packing is None:
        return job
    lengths, counts = np.unique(stats.fullness.lengths, return_counts=True)
    pairs = sum(n * job.model.causal_pairs(length) for length, n in zip(lengths.tolist(), counts.tolist()))
    share = pairs / (stats.fullness.packs * job.model.causal_pairs(job.length))
    return dataclasses.replace(job, documents=stats.packing[1], attention_share=share)


def read_data(config: TrainConfig, source: ModelSource, job: Job) -> tuple[Data, Stats, str]:
    """The batches of a run, the training documents' statistics and a hash of their sequences.

    UserError if one step would meet the same sequence twice.
    """
    sources = read_sequences(config, source)
    sequences, stats = packed(config, sources)
    check_length(stats, config.seq_len, "--data", config.pack)
    stats.packing = packing_of(config, sequences, stats, job)
    per_step, pad = job.rows * config.grad_accum, pad_token(source.tokenizer)
    mixture = None
    if any(report.weight is not None for report in stats.sources):
        mixture = [(report.sequences, report.weight) for report in stats.sources]
    for count, weight in mixture or [(len(sequences), 1.0)]:
        if count < math.ceil(per_step * weight - 1e-9):
            part = f" and its weight {weight:.3g}" if mixture else ""
            raise UserError(f"--data gives {count} sequences, fewer than the {per_step} of one step (--dp x "
                            f"--batch-size x --grad-accum){part}: the same would be repeated in it. Use more data or "
                            "smaller steps")
    training = TrainingBatches(
        sequences, job.length, job.rows, config.grad_accum, config.seed, pad, mixture, stats.packing)
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
                evaluation_batches, held_out, job.length, job.rows, pad, packing_of(alone, held_out, counts, job))
    warn_without_end(source.tokenizer, stats.sources)
    known = known_hash(config, sequences, [pieces for pieces, _ in sources.values()])
    return Data(training, evaluation), stats, fingerprint(sequences, mixture, known)


def pad_token(tokenizer: Any) -> int:
    """The token of padding. It has no label, so any token will do if the tokenizer names none."""
    return next((t for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def preflight(config: TrainConfig, step: TrainStep, job: Job, data: Data) -> None:
    """The checks of --check-numerics, on devices that hold nothing else. UserError if one fails."""
    position = data.training.get_state()
    batches = next(data.training)
    data.training.set_state(position)
    across = config.pack and config.pack_attention == "across"  # a document's last label is not the next one's first
    multiple = math.lcm(job.sp, find_kernel(job.profile.attention).multiple)
    check_numerics(step, job, multiple, None if across else batches, config.seq_len)
