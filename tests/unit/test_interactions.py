"""Interactions: formats, cleaning, the split, and files that are broken."""

import gzip
import json
import zipfile

import numpy as np
import pandas as pd
import pytest

from paper_src.recommendation import interactions
from paper_src.recommendation.interactions import UNTITLED, k_core, leave_last_out, load_interactions, sequences_of

RATINGS = [(user, item, 3 + (user + item) % 3, 100 * user + item) for user in range(1, 7) for item in range(1, 7)]
TITLES = {item: f"Film {item} (19{90 + item})" for item in range(1, 7)} | {2: "Amélie (2001)", 3: "七人の侍 (1954)"}


def frame(rows):
    return pd.DataFrame(rows, columns=["user", "item", "rating", "time"])


def write_1m(folder):
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["::".join(map(str, row)) for row in RATINGS]
    (folder / "ratings.dat").write_bytes("\n".join(lines).encode("latin-1"))
    movies = [f"{item}::{title}::Drama|War" for item, title in TITLES.items() if item != 3]
    (folder / "movies.dat").write_bytes("\n".join(movies).encode("latin-1"))
    return folder


def write_amazon(folder, reviews=None, meta=None):
    folder.mkdir(parents=True, exist_ok=True)
    reviews = reviews or [
        {"reviewerID": f"u{user}", "asin": f"A{item}", "overall": rating, "unixReviewTime": time}
        for user, item, rating, time in RATINGS
    ]
    meta = meta or [{"asin": f"A{item}", "title": title} for item, title in TITLES.items() if item != 4]
    for name, rows in (("reviews_Beauty_5", reviews), ("meta_Beauty", meta)):
        with gzip.open(folder / f"{name}.json.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    return folder


class TestFormats:
    def test_grouplens_1m_as_folder_and_as_zip(self, tmp_path):
        folder = write_1m(tmp_path / "ml-1m")
        with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
            for file in folder.iterdir():
                archive.write(file, f"ml-1m/{file.name}")
        for place in (folder, tmp_path / "ml-1m.zip"):
            found = load_interactions(str(place))
            assert [row.tolist() for row in found.sequences] == [[0, 1, 2, 3, 4, 5]] * 6
            assert found.texts[1] == "Amélie (2001), Drama, War"  # latin-1
            assert found.texts[2] == UNTITLED
            assert len(found.digests) >= 1

    def test_grouplens_100k(self, tmp_path):
        (tmp_path / "u.data").write_text("\n".join("\t".join(map(str, row)) for row in RATINGS))
        movies = [f"{item}|{title}|01-Jan-1995||" for item, title in TITLES.items() if item != 3]
        (tmp_path / "u.item").write_text("\n".join(movies), encoding="latin-1")
        assert load_interactions(str(tmp_path)).texts[0] == "Film 1 (1991)"

    def test_registry_files_of_recbole(self, tmp_path, monkeypatch):
        ratings, items = tmp_path / "x.inter", tmp_path / "x.item"
        lines = [
            "user_id:token\titem_id:token\trating:float\ttimestamp:float",
            *("\t".join(map(str, r)) for r in RATINGS),
        ]
        ratings.write_text("\n".join(lines))
        header = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq"
        items.write_text("\n".join([header, *(f'{item}\tFilm "{item}\t199{item}\tDrama War' for item in TITLES)]))
        monkeypatch.setattr(
            interactions, "fetch", lambda asset, *others: ratings if asset.member.endswith(".inter") else items
        )
        found = load_interactions("movielens-100k")
        assert found.texts[0] == 'Film "1 (1991), Drama, War'  # a quote character is no quote
        assert len(found.sequences) == 6

    def test_amazon_official(self, tmp_path):
        found = load_interactions("amazon-beauty", str(write_amazon(tmp_path)))
        assert found.texts[2] == "七人の侍 (1954)"
        assert found.texts[3] == UNTITLED
        assert found.sequences[0].tolist() == [0, 1, 2, 3, 4, 5]

    def test_amazon_official_with_python_literals(self, tmp_path):
        write_amazon(tmp_path)
        with gzip.open(tmp_path / "meta_Beauty.json.gz", "wt", encoding="utf-8") as file:
            file.write("\n".join(str({"asin": f"A{item}", "title": title}) for item, title in TITLES.items()))
        assert UNTITLED not in load_interactions("amazon-beauty", str(tmp_path)).texts

    def test_amazon_derived(self, tmp_path):
        (tmp_path / "user_sequence.txt").write_text("\n".join(f"u{n} " + " ".join("FEDCBA") for n in range(6)))
        (tmp_path / "item_id_to_int.json").write_text(json.dumps({letter: n for n, letter in enumerate("ABCDEF")}))
        (tmp_path / "products_lookup.csv").write_text(',global_product_id,name\n0,0,"Soap, with\nbreak"\n1,1,Œil\n')
        found = load_interactions("amazon-beauty", str(tmp_path))
        assert found.sequences[0].tolist() == [5, 4, 3, 2, 1, 0]  # as written, not by name
        assert found.texts[:3] == ["Soap, with break", "Œil", UNTITLED]


class TestCleaning:
    def test_core_is_repeated_until_it_holds(self):
        rows = [(u, i) for u in "abc" for i in "xyz"] + [("d", "x"), ("d", "w"), ("e", "w")]
        events = pd.DataFrame(rows, columns=["user", "item"])
        left = k_core(events, 2)  # e goes first, then w, then d
        assert set(left["user"]) == set("abc")
        assert len(left) == 9

    def test_repeated_pairs_count_once_and_at_the_first_time(self):
        rows = [(u, i, 5, i) for u in (1, 2) for i in (1, 2, 3)] + [(1, 1, 5, 99), (2, 1, 5, 99)]
        found = sequences_of("x", frame(rows), {}, {}, core=2)
        assert found.sequences[0].tolist() == [0, 1, 2]

    def test_order_is_by_time_and_ties_stay_as_they_stand(self):
        rows = [(u, i, 5, t) for u in (1, 2) for i, t in ((3, 7), (1, 7), (2, 1))]
        assert sequences_of("x", frame(rows), {}, {}, core=2).sequences[0].tolist() == [1, 2, 0]

    def test_ties_of_long_histories_stay_as_they_stand(self):
        items = np.random.default_rng(0).permutation(200)
        events = pd.DataFrame({"user": 0, "item": items, "time": 1.0 * (np.arange(200) % 2)})
        found = sequences_of("x", events, {}, {}, core=1).sequences[0]
        assert found.tolist() == [*items[::2], *items[1::2]]


class TestSplit:
    def test_last_is_test_and_the_one_before_validation(self):
        split = leave_last_out([np.array([4, 2, 7, 1])])
        assert (split.train[0].tolist(), split.valid.tolist(), split.test.tolist()) == ([4, 2], [7], [1])
        assert split.history("valid")[0].tolist() == [4, 2]
        assert split.history("test")[0].tolist() == [4, 2, 7]

    def test_no_test_item_of_a_user_is_in_what_is_learned_from(self, tmp_path):
        split = leave_last_out(load_interactions("amazon-beauty", str(write_amazon(tmp_path))).sequences)
        for part in ("valid", "test"):
            for history, target in zip(split.history(part), getattr(split, part), strict=True):
                assert target not in history
        for items, test in zip(split.train, split.test, strict=True):
            assert test not in items

    def test_too_short(self, refused):
        with refused("user 1 has 2 interactions: at least 3"):
            leave_last_out([np.array([1, 2, 3]), np.array([1, 2])])


class TestBadInput:
    def test_unknown_name(self, refused):
        with refused("no data 'netflix'"):
            load_interactions("netflix")

    def test_absent_amazon_says_how_to_get_it(self, refused, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for folder in ("", str(tmp_path)):
            with refused("no reviews_Beauty_5.json.gz and meta_Beauty.json.gz .* --data-dir FOLDER"):
                load_interactions("amazon-beauty", folder)

    def test_missing_column(self, refused, tmp_path):
        write_amazon(tmp_path, reviews=[{"reviewerID": "u", "asin": "A", "overall": 5}] * 9)
        with refused("no column 'unixReviewTime'"):
            load_interactions("amazon-beauty", str(tmp_path))

    def test_truncated_archive(self, refused, tmp_path):
        write_amazon(tmp_path)
        path = tmp_path / "reviews_Beauty_5.json.gz"
        path.write_bytes(path.read_bytes()[:-20])
        with refused("is broken after line .* get it again"):
            load_interactions("amazon-beauty", str(tmp_path))

    def test_truncated_line(self, refused, tmp_path):
        folder = write_1m(tmp_path)
        path = folder / "ratings.dat"
        path.write_text(path.read_text() + "\n6::5")
        with refused("incomplete from row 37"):
            load_interactions(str(folder))

    def test_no_whole_zip(self, refused, tmp_path):
        (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 cut off")
        with refused("no whole .zip"):
            load_interactions(str(tmp_path / "x.zip"))
        (tmp_path / "empty").mkdir()
        with refused("holds no ratings.dat"):
            load_interactions(str(tmp_path / "empty"))

    def test_nothing_left(self, refused):
        with refused("no user and item with 5 interactions"):
            sequences_of("x", frame([(1, 1, 5, 1)]), {}, {})

    @pytest.mark.parametrize("text", [None, "", "  ", float("nan")])
    def test_an_item_without_text_gets_one(self, text):
        rows = [(u, i, 5, i) for u in (1, 2) for i in (1, 2)]
        found = sequences_of("x", frame(rows), {1: "a  b", 2: text}, {}, core=2)
        assert found.texts == ["a b", UNTITLED]
