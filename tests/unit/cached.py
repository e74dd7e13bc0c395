"""Data read through the cache of tokens."""

import json

from alst_jax.data.cache import Cache
from alst_jax.data.documents import Cutting
from alst_jax.data.labels import Labels
from alst_jax.data.prepare import cut_sources
from alst_jax.data.sources import Reading
from alst_jax.data.tokenizer import byte_tokenizer

TEXTS = [{"text": "abcdefghij"}, {"text": "xy"}, {"text": "äöü"}, {"text": "0123456789" * 3}]
CHATS = [
    {"id": 7, "messages": [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": f"{i} is it."}]}
    for i in range(5)
]


def write(file, records):
    file.write_text("".join(record if isinstance(record, str) else json.dumps(record) + "\n" for record in records))
    return file


def sources_of(top, paths, seq_len=8, tokenizer=None, drop=False, reading=Reading(), labels=Labels(), vocab=261):
    """The sources, with the cache in `top`; None: in memory."""
    cutting = Cutting(tokenizer or byte_tokenizer(), seq_len, vocab, labels, reading.skip_bad, drop)
    cache = None if top is None else Cache(top, small=0)
    return cut_sources([str(path) for path in paths], reading, "--data", cutting, cache)


def stores(top):
    return sorted(path.name for path in top.iterdir()) if top.exists() else []


def plain(sources):
    """Everything of sources that can be compared."""
    return {
        name: (
            [(p.tokens.tolist(), p.labels.tolist()) for p in pieces],
            vars(stats) | {"sources": None},
            [vars(report) for report in stats.sources],
            list(stats.sources[0].lines()),
        )
        for name, (pieces, stats) in sources.items()
    }
