"""Runs every notebook once with the tiny profile, in order, into one folder."""

import os

import pytest
from harness import NOTEBOOKS


def pytest_generate_tests(metafunc):
    if "notebook" in metafunc.fixturenames:
        metafunc.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem, scope="session")


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """Folder that the notebooks of this session write to."""
    os.environ["TQDM_DISABLE"] = "1"  # progress bars hold times, which are no result
    return tmp_path_factory.mktemp("results")
