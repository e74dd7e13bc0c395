"""Draws docs/sample.svg: what `--show-samples 1` prints on a terminal. Run it from the repository's root."""

import io
import pathlib

from rich.console import Console
from rich.terminal_theme import MONOKAI

from alst_jax.data.labels import tokenize
from alst_jax.data.records import Fields, to_document
from alst_jax.data.report import print_sample
from alst_jax.data.tokenizer import byte_tokenizer

RECORD = {
    "messages": [
        {"role": "system", "content": "Answer in one line."},
        {"role": "user", "content": "How tall is the Eiffel Tower?"},
        {"role": "assistant", "content": "About 200 metres.", "weight": 0},
        {"role": "user", "content": "Are you sure?"},
        {"role": "assistant", "content": "No: it is 330 metres tall."},
    ]
}


def main() -> None:
    tokenizer = byte_tokenizer()
    console = Console(record=True, force_terminal=True, width=76, highlight=False, file=io.StringIO())
    tokens, learned = tokenize(to_document(RECORD, "chats.jsonl:1", Fields()), tokenizer)
    print_sample("chats.jsonl:1", tokens, learned, tokenizer, console)
    svg = console.export_svg(
        title="python train.py --data chats.jsonl --show-samples 1", theme=MONOKAI, unique_id="sample"
    )
    # Without the fonts that rich names: a page with a picture should load nothing from elsewhere.
    before, _, rest = svg.partition("@font-face")
    after = rest[rest.rindex("@font-face") :].partition("}")[2]
    pathlib.Path("docs/sample.svg").write_text(before + after, encoding="utf-8")


if __name__ == "__main__":
    main()
