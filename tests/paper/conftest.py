"""Reads the committed tables."""

from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def read():
    """Function: name of a committed table -> DataFrame."""
    return lambda name: pd.read_csv(ROOT / "tables" / f"{name}.csv")
