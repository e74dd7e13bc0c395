# pytest tests/unit/test_models_page.py
"""docs/models.md says what the families are now."""

import pathlib
import sys

from alst_jax.models.families import FAMILIES

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "docs"))
import write_models  # noqa: E402


def test_the_table_is_current():
    text = write_models.PAGE.read_text(encoding="utf-8")
    assert write_models.page(text) == text, "run: python docs/write_models.py"
    assert all(f"| {family} |" in text for family in FAMILIES)


def test_rows_follow_the_families():
    rows = {name: write_models.row(name) for name in FAMILIES}
    assert rows["mistral"][4] == "12 of 12 layers, 4,096" and rows["mistral"][-1] == "xla, flash"
    assert rows["smollm3"][5] == "not in 3 of 12 layers" and rows["olmo2"][2] == "all heads"
    assert rows["gemma3_text"][3] == "both (1 + w)" and "soft cap of logits" in rows["gemma3_text"][6]
    assert rows["llama"][2:5] == ["-", "before", "-"] and "cudnn" in rows["llama"][-1]
