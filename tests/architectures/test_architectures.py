"""Every architecture is exact or refused; a sample of them always, all of them where there is time."""

import json
import os

import pytest
from sweep import CHECKS, ROWS, TABLE, configurations, cut_of, row_of, state, table

SAMPLE = (
    "bamba", "bart", "deepseek_v3", "falcon_h1", "gemma3n_text", "gemma4_text", "gpt_oss", "hy_v4", "inkling2_text",
    "lfm2_moe", "llama4_text", "qwen3_moe", "qwen3_next", "zamba2", "zaya",
)  # fmt: skip
KNOWN = json.loads(ROWS.read_text())


def summary(row: dict) -> list[str]:
    """What a row says, without words that a release may change."""
    return [row["built"][:20], *map(state, row.get("cut", [])), *(state(row.get(check, "")) for check in CHECKS)]


def require_right(row: dict) -> None:
    outcomes = [*row.get("cut", []), *(row[check] for check in CHECKS if check in row)]
    assert [outcome for outcome in outcomes if state(outcome) not in ("exact", "refused")] == []


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_is_exact_or_refused_as_the_table_says(name):
    row = row_of(name)
    require_right(row)
    assert summary(row) == summary(KNOWN[name])


@pytest.mark.slow
@pytest.mark.skipif("EVERY_ARCHITECTURE" not in os.environ, reason="takes 15 minutes: set EVERY_ARCHITECTURE=1")
@pytest.mark.parametrize("name", sorted(set(KNOWN) - set(SAMPLE)))
def test_every_architecture_is_exact_or_refused_as_the_table_says(name):
    row = row_of(name)
    require_right(row)
    assert summary(row) == summary(KNOWN[name])


def test_the_table_is_that_of_the_rows_and_names_every_architecture():
    assert TABLE.read_text(encoding="utf-8") == table(KNOWN)
    assert sorted(KNOWN) == sorted(configurations())


def test_nothing_is_wrong_and_most_is_exact():
    built = [row for row in KNOWN.values() if not row["built"]]
    for row in built:
        require_right(row)
    assert sum(cut_of(row) == "exact" for row in built) >= 135
    assert len(built) >= 178
