"""Makes the synthetic interactions of the tiny profile: python tests/data/make_interactions.py (a second).

Users walk along a ring of items, with a random jump now and then, so that the next item can be learned.
"""

import gzip
import json
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
COLOURS = ["red", "blue", "green", "old", "small", "happy"]
THINGS = ["ball", "dog", "boat", "tree", "house", "cake", "hat"]
ITEMS, USERS = 42, 120


def walks(seed: int) -> list[list[int]]:
    """Items of each user in time order, none twice."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in range(USERS):
        row = [int(generator.integers(ITEMS))]
        while len(row) < int(generator.integers(7, 13)):
            step = 1 if generator.random() < 0.8 else int(generator.integers(2, ITEMS))
            if (item := (row[-1] + step) % ITEMS) not in row:
                row.append(item)
        rows.append(row)
    return rows


def title(item: int) -> str:
    """Two words that no other item has together."""
    return f"{COLOURS[item % len(COLOURS)]} {THINGS[item // len(COLOURS)]}"


def movielens(folder: Path) -> None:
    """Like MovieLens-1M: fields between ``::``, Latin-1."""
    folder.mkdir(exist_ok=True)
    ratings = [f"{user}::{item}::5::{time}" for user, row in enumerate(walks(0)) for time, item in enumerate(row)]
    movies = [f"{item}::The {title(item)} (19{40 + item})::Drama|Children's" for item in range(ITEMS)]
    (folder / "ratings.dat").write_text("\n".join(ratings) + "\n", encoding="latin-1")
    (folder / "movies.dat").write_text("\n".join(movies) + "\n", encoding="latin-1")


def amazon(folder: Path) -> None:
    """Like the Amazon review corpus of 2014: one JSON object a line, compressed."""
    folder.mkdir(exist_ok=True)
    reviews = [
        {"reviewerID": f"U{user}", "asin": f"B{item:03}", "overall": 5.0, "unixReviewTime": time}
        for user, row in enumerate(walks(1))
        for time, item in enumerate(row)
    ]
    items = [{"asin": f"B{item:03}", "title": f"{title(item)}, n° {item}"} for item in range(ITEMS)]
    for name, rows in (("reviews_Beauty_5", reviews), ("meta_Beauty", items)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    movielens(HERE / "tiny-movielens")
    amazon(HERE / "tiny-amazon")
