"""Files and folders that appear whole or not at all, and never in place of what this package did not write."""

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from paper_src import InputError

MARK = ".paper_src.json"  # in a folder that this package wrote: its files and their sizes


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` to write to; it takes the name ``path`` only when all went well."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-", suffix=path.suffix)
    os.close(handle)
    part = Path(name)
    try:
        with _one_line(path):
            yield part
            part.chmod(0o644)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: str | Path, apart_from: Iterable[str | Path] = ()) -> Iterator[Path]:
    """A temporary folder to write to; it takes the name ``folder`` only when all went well.

    Raises:
        InputError: see :func:`writable_folder`, or it cannot be written; what was there is as before.
    """
    target = writable_folder(folder, apart_from)
    with _one_line(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
            part = Path(scratch) / "part"
            part.mkdir()
            yield part
            (part / MARK).write_text(json.dumps({"files": _sizes(part)}, indent=1) + "\n", encoding="utf-8")
            _exchange(part, target, Path(scratch) / "old")


@contextmanager
def _one_line(place: str | Path) -> Iterator[None]:
    """What fails inside because the disk does, as one line with its ``place``; safetensors has an error of its own."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot write {place} ({reason}): free space or choose another folder") from error


def writable_folder(folder: str | Path, apart_from: Iterable[str | Path] = ()) -> Path:
    """``folder`` as an absolute path, if it may be replaced.

    It must be new, empty, or written by :func:`replacing_folder` and not added to since; and none of the paths
    ``apart_from``, which are read, nor hold one, nor lie in one.
    """
    name = str(folder)
    if name.strip("/ ") in ("", ".", "..") or Path(name).name == "..":
        raise InputError(f"folder {name!r}: give the folder a name of its own, such as models/compact")
    target = Path(folder).expanduser().resolve()
    above = next(path for path in (target, *target.parents) if path.exists())
    if not above.is_dir():
        raise InputError(f"{target} is or lies below the file {above}: give another folder")
    for other in (Path(other).expanduser().resolve() for other in apart_from if Path(other).expanduser().exists()):
        if target == other or target in other.parents or other in target.parents:
            raise InputError(f"{target} is, holds or lies in {other}, which is read: give a folder elsewhere")
    if above == target and (strange := _strangers(target)):
        raise InputError(f"{target} holds {strange}, which this package did not write: give a new or empty folder")
    return target


def _sizes(folder: Path) -> dict[str, int]:
    """File -> bytes, below ``folder``."""
    files = sorted(path for path in folder.rglob("*") if not path.is_dir())
    return {str(path.relative_to(folder)): path.lstat().st_size for path in files}


def complete(folder: Path) -> bool:
    """Whether ``folder`` holds what :func:`replacing_folder` wrote: all files in their sizes, and no others."""
    known = _known(folder)
    return bool(known) and {name: size for name, size in _sizes(folder).items() if name != MARK} == known


def _known(folder: Path) -> dict[str, int]:
    """File -> bytes, by the mark in ``folder``."""
    try:
        return json.loads((folder / MARK).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError):
        return {}


def _strangers(folder: Path) -> str:
    """The first file in ``folder`` that its mark does not list as it is; empty where there is none."""
    known = _known(folder)
    files = {name: size for name, size in _sizes(folder).items() if not known or name != MARK}
    strange = [name for name, size in files.items() if known.get(name) != size]
    strange += [path.name for path in folder.iterdir() if path.is_dir() and not any(path.iterdir())]
    return next(iter(strange), "")


def _exchange(part: Path, target: Path, old: Path) -> None:
    """``part`` takes the name ``target``; what had it is moved to ``old``, and put back if that fails."""
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(part, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
