"""Text of pinned packages: code without docstrings, prose without code, no file in two splits."""

from paper_src import data
from paper_src.support import packages

SOURCE = (
    '''"""Title.'''
    + " A long story." * 40
    + '''
"""

import os


def work(x):
    """Short."""
    return x  # said twice
'''
)


def test_docstrings_leave_the_code_and_long_ones_are_prose():
    code, prose = packages._parted(SOURCE)
    assert "story" not in code and "Short" not in code
    assert "import os" in code and "    return x  # said twice" in code
    assert prose.startswith("Title.") and "Short" not in prose and "import" not in prose


def test_no_file_is_in_two_splits():
    parts = {split: set(packages._sources(("pandas",), split)) for split in packages.SPLITS}
    assert all(parts.values())
    assert sum(map(len, parts.values())) == len(set.union(*parts.values()))


def test_they_are_texts_like_others(monkeypatch):
    monkeypatch.setattr(packages, "PACKAGES", ("matplotlib",))
    prose, digest = data.load_text("package-prose", "valid")
    code, other = data.load_text("package-code", "valid")
    assert len(prose) > 10_000 and len(code) > 10_000 and digest != other
    assert (prose, digest) == data.load_text("package-prose", "valid")


def test_a_package_that_is_missing_is_said(monkeypatch, refused):
    monkeypatch.setattr(packages, "PACKAGES", ("no-such-package",))
    with refused("no-such-package is not installed: install this project's requirements"):
        data.load_text("package-code", "train")
