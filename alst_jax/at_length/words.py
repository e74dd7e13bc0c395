"""The results of an evaluation at length as lines of text. Results: the JSON object of OUT/long/step-N.json."""

from typing import Any

from alst_jax.at_length.tasks import TASKS


def short(tokens: int) -> str:
    """`32Ki` for 32,768, as --seq-len takes it; other numbers unchanged."""
    return f"{tokens // 1024}Ki" if tokens and tokens % 1024 == 0 else f"{tokens:,}"


def table(results: dict[str, Any], before: dict[str, Any] | None, context: int) -> str:
    """Loss by position, LongPPL and the tasks. before: the run's first evaluation, shown beside."""
    head = f"   step {before['step']}" if before else ""
    lines = [
        f"long    step {results['step']}: judged at {short(results['bands'][-1]['stop'])} tokens in "
        f"{results['seconds']:.0f} s",
        f"        position        loss{head}",
    ]
    old = {band["start"]: band["loss"] for band in before["bands"]} if before else {}
    for band in results["bands"]:
        where = f"{short(band['start'])} to {short(band['stop'])}"
        lines.append(f"        {where:14}{_number(band['loss'])}{_number(old.get(band['start'])) if before else ''}")
    lines.append(
        f"        {_long_ppl(results, context)}"
        + (f"; step {before['step']}: {_long_ppl(before, context)}" if before else "")
    )
    for task in TASKS:
        cells = [cell for cell in results["cells"] if cell["task"] == task]
        lines += [f"        {line}" for line in _grid(task, cells)]
    return "\n".join(line.rstrip() for line in lines)


def _number(value: float | None) -> str:
    return f"{'-' if value is None else f'{value:.4f}':>8}  "


def _long_ppl(results: dict[str, Any], context: int) -> str:
    found = results["long_ppl"]
    if found is None:
        return f"LongPPL: none, since sequences are not longer than its short context of {context:,} tokens"
    value = "none" if found["long_ppl"] is None else f"{found['long_ppl']:.4g}"
    return (
        f"LongPPL {value} over {found['keys']:,} key tokens of {found['judged']:,}, whose perplexity is "
        f"{found['perplexity']:.4g}"
    )


def _grid(task: str, cells: list[dict[str, Any]]) -> list[str]:
    """One line a depth, one column a length: exact match, and the loss of the answer."""
    if not cells:
        return []
    lengths, depths = sorted({c["length"] for c in cells}), list(dict.fromkeys(c["depth"] for c in cells))
    at = {(c["length"], c["depth"]): c for c in cells}
    lines = [f"{task:10} exact match, nats a token" + "".join(f"{short(n):>13}" for n in lengths)]
    for depth in depths:
        row = [at.get((length, depth)) for length in lengths]
        name = "" if depth is None else f"depth {depth:.0%}"
        lines.append(f"{name:37}" + "".join(f"{c['exact']:6.0%} {c['loss']:6.2f}" if c else " " * 13 for c in row))
    return lines
