"""From packs to the job: sequences of packed documents, and their numbers for the plan."""

import dataclasses
import sys
from typing import Any

import numpy as np

from alst_jax.config import TrainConfig
from alst_jax.data.batches import Packing
from alst_jax.data.documents import Stats
from alst_jax.data.packing import Fullness, Groups, Packs, pack, room_for
from alst_jax.data.pieces import Joined
from alst_jax.data.prepare import BySource
from alst_jax.ops.attention import buckets
from alst_jax.planning.job import Job

SHORT_DOCUMENT = 1024  # tokens
SLICES_WARNED = 0.5  # part of whole sequences' attention that cuDNN's slices may compute without a word


def packed(config: TrainConfig, sources: BySource) -> tuple[Any, Stats]:
    """The sequences of all sources, one source behind the other, in packs with --pack; and their counts."""
    packs, shifts, stats, pieces = [], [], Stats(), Joined([sequences for sequences, _ in sources.values()])
    before = 0
    for sequences, of_source in sources.values():
        if config.pack and sequences:
            packs.append(pack(sequences.lengths, config.seq_len, config.seed))
            shifts.append(before)
            of_source.sequences = of_source.sources[0].sequences = len(packs[-1])
        before += len(sequences)
        stats.add(of_source)
    if not packs:
        return pieces, stats
    groups = Groups.joined(packs, shifts)
    stats.fullness = Fullness.of(config.seq_len, pieces.lengths, groups)
    return Packs(pieces, groups, together=config.pack_attention == "across"), stats


def packing_of(config: TrainConfig, stats: Stats, job: Job) -> Packing | None:
    """(data-parallel replicas, documents of a replica at most); None without packs. Packs that are one text: (replicas,
    None)."""
    if not config.pack:
        return None
    if config.pack_attention == "across":
        return job.dp, None
    return job.dp, room_for(stats.fullness.most_documents(job.length), job.rows // job.dp)


def with_packs(job: Job, stats: Stats) -> Job:
    """The job, with the numbers of the packs: room for documents, and their padding and parts of attention."""
    if stats.packing is None:
        return job
    packs, model, length = stats.fullness.packs, job.model, job.length

    def pairs(lengths: np.ndarray) -> float:
        sizes, counts = np.unique(lengths, return_counts=True)
        return sum(n * model.causal_pairs(size) for size, n in zip(sizes.tolist(), counts.tolist()))

    spaces, whole = length - stats.fullness.tokens, packs * model.causal_pairs(length)
    job = dataclasses.replace(job, padding=float(spaces.sum()) / (packs * length))
    if stats.packing[1] is None:  # a pack is one text, with its padding behind it
        return dataclasses.replace(job, padding_share=1 - pairs(stats.fullness.tokens) / whole)
    if job.profile.attention == "cudnn":
        warn_of_slices(np.concatenate([stats.fullness.lengths, spaces]).tolist(), packs, length)
    inside, padded = pairs(stats.fullness.lengths) / whole, pairs(spaces) / whole  # the padding is one document more
    return dataclasses.replace(job, documents=stats.packing[1], attention_share=inside + padded, padding_share=padded)


def warn_of_slices(lengths: list[int], packs: int, length: int) -> None:
    """Print a warning where cuDNN's slices compute more than half of the attention of whole sequences.

    lengths: of all documents, and of the padding of each pack of `length` tokens.
    """
    pairs = lambda n: n * (n + 1) // 2
    part = buckets.computed_pairs(lengths, length) / (packs * pairs(length))
    if part > SLICES_WARNED:
        needed = sum(map(pairs, lengths)) / (packs * pairs(length))
        print(
            f"warning: --attention cudnn computes each packed document in a slice of {buckets.SMALLEST} tokens or "
            f"more: here {part:.0%} of the attention of whole sequences of {length:,} tokens, where documents have "
            f"{needed:.0%}. --attention flash (Hopper) and xla skip other documents exactly; a longer --seq-len "
            "makes the part smaller",
            file=sys.stderr,
            flush=True,
        )


def of_short_documents(job: Job) -> Job:
    """The job of a plan that reads no data: packed documents of 1,024 tokens. A run counts its own."""
    length = min(SHORT_DOCUMENT, job.length)
    count = job.length // length
    share = count * job.model.causal_pairs(length) / job.model.causal_pairs(job.length)
    print(f"--pack: planned for documents of {length:,} tokens; a run counts its own", file=sys.stderr)
    return dataclasses.replace(job, documents=room_for(count, job.rows // job.dp), attention_share=share)
