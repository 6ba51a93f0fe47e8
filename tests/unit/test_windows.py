"""The losses of windows: written, read back, tested against each other, refused where they are of something else."""

import numpy as np
import pandas as pd
import pytest
import torch

from paper_src import InputError, stats
from paper_src.sections import windows

BLOCKS = torch.arange(12).reshape(3, 4)
MODEL = "ab" * 32


@pytest.fixture
def table():
    rows = {"full": [1.0, 2.0, 3.0], "0 1": [2.0, 4.0, 6.0]}
    parts = [
        windows.window_rows(row, "wikitext-2", BLOCKS, MODEL, {"nll_nats": np.array(nll)}) for row, nll in rows.items()
    ]
    return pd.concat(parts, ignore_index=True)


def test_two_rows_are_tested_against_each_other(table, tmp_path):
    table.to_csv(tmp_path / "t4_windows.csv", index=False)
    read = pd.read_csv(tmp_path / "t4_windows.csv")
    found = stats.paired(windows.losses(read, "0 1"), windows.losses(read, "full"))
    assert (found.difference, found.n) == (2.0, 3)


def test_cosines_are_tested_like_losses():
    cosines = {"full": [1.0, 1.0, 1.0], "0 1": [0.5, 0.25, 0.75]}
    table = pd.concat([
        windows.window_rows(row, "a", BLOCKS, MODEL, {"nll_nats": np.zeros(3), "cosine": np.array(values)})
        for row, values in cosines.items()
    ])  # fmt: skip
    pair = [windows.losses(table, row, metric="cosine") for row in cosines]
    assert stats.paired(*pair).difference == 0.5


def test_losses_are_in_the_order_of_the_windows_whatever_that_of_the_rows(table):
    assert windows.losses(table.sample(frac=1, random_state=0), "0 1").values.tolist() == [2.0, 4.0, 6.0]


def test_rows_on_different_windows_are_no_pair(table):
    other = windows.window_rows("0 2", "wikitext-2", BLOCKS + 1, MODEL, {"nll_nats": np.ones(3)})
    both = pd.concat([table, other])
    with pytest.raises(InputError, match="the same windows"):
        stats.paired(windows.losses(both, "0 2"), windows.losses(both, "full"))


def test_rows_beside_another_full_model_are_no_pair(table):
    other = windows.window_rows("0 2", "wikitext-2", BLOCKS, "cd" * 32, {"nll_nats": np.ones(3)})
    with pytest.raises(InputError, match="the same windows"):
        stats.paired(windows.losses(pd.concat([table, other]), "0 2"), windows.losses(table, "full"))


def test_a_missing_row_or_window_is_an_error(table):
    with pytest.raises(InputError, match="no windows of 'nobody'"):
        windows.losses(table, "nobody")
    with pytest.raises(InputError, match="not 0 to 1"):
        windows.losses(table[table["window"] != 1], "full")


def test_the_digest_is_of_the_shape_as_well():
    assert windows.digest(BLOCKS) != windows.digest(BLOCKS.reshape(4, 3))
