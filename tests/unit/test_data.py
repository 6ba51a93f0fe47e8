"""Token blocks: where they start, that they never overlap, and what is refused."""

import gzip
from itertools import pairwise

import pytest
import torch

from paper_src import data
from paper_src.data import load_text, token_blocks
from paper_src.sections import judge
from paper_src.support.sources import sha256

TEXT = " ".join(str(number) for number in range(1000, 3000))  # every place in it is known by its numbers


def places(tokenizer, blocks):
    """First character of each block in ``TEXT``: behind <s>, one token is one character."""
    return [TEXT.index(tokenizer.decode(block[1:])) for block in blocks]


def test_blocks_have_the_asked_shape(tokenizer):
    blocks = token_blocks(tokenizer, TEXT, count=6, length=20, seed=0)
    assert blocks.shape == (6, 20)
    assert blocks.dtype == torch.int64


@pytest.mark.parametrize("seed", range(5))
def test_blocks_do_not_overlap_and_spread_over_the_text(tokenizer, seed):
    starts = places(tokenizer, token_blocks(tokenizer, TEXT, count=40, length=20, seed=seed))
    assert all(later - earlier >= 19 for earlier, later in pairwise(starts))
    stretch = len(TEXT) // 40
    assert [start // stretch for start in starts] == list(range(40))


def test_blocks_start_with_a_word(tokenizer):
    starts = places(tokenizer, token_blocks(tokenizer, TEXT, count=6, length=20, seed=0))
    assert all(TEXT[start - 1] == " " for start in starts)


def test_blocks_begin_as_the_tokenizer_begins_a_text(tokenizer):
    bos = tokenizer.bos_token_id
    assert tokenizer("1000")["input_ids"][0] == bos
    blocks = token_blocks(tokenizer, TEXT, 6, 20, seed=0)
    assert (blocks[:, 0] == bos).all()
    assert not (blocks[:, 1:] == bos).any()
    tokenizer.backend_tokenizer.post_processor = None
    plain = token_blocks(tokenizer, TEXT, 6, 19, seed=0)
    assert torch.equal(plain, blocks[:, 1:])


def test_blocks_follow_their_seed(tokenizer):
    first = token_blocks(tokenizer, TEXT, 6, 20, seed=1)
    torch.rand(3)  # the global generator plays no part
    assert torch.equal(first, token_blocks(tokenizer, TEXT, 6, 20, seed=1))
    assert not torch.equal(first, token_blocks(tokenizer, TEXT, 6, 20, seed=2))


def test_blocks_may_use_the_text_to_its_last_token(tokenizer):
    text = TEXT[:100]
    blocks = token_blocks(tokenizer, text, count=5, length=21, seed=0)
    assert "".join(tokenizer.decode(block[1:]) for block in blocks) == text


@pytest.mark.parametrize("text", ["", TEXT[:94]])
def test_text_that_is_too_short_is_refused(tokenizer, text, refused):
    with refused("5 of 5 stretches of the text .* are shorter than 20 tokens"):
        token_blocks(tokenizer, text, count=5, length=20, seed=0)


@pytest.mark.parametrize(("count", "length"), [(0, 20), (5, 0)])
def test_no_blocks_and_no_tokens_are_refused(tokenizer, count, length, refused):
    with refused("at least 1"):
        token_blocks(tokenizer, TEXT, count, length, seed=0)


def test_windows_of_the_whole_text_cover_every_token_once(tokenizer):
    text = TEXT[: 19 * 12 + 7]  # behind <s>, one token is one character: twelve windows, and a rest of 7
    found = data.windows(tokenizer, text, count=0, length=20, seed=3)
    assert found.shape == (12, 20) and found.dtype == torch.int64
    assert (found[:, 0] == tokenizer.bos_token_id).all()
    assert "".join(tokenizer.decode(window[1:]) for window in found) == text[: 19 * 12]
    tokenizer.backend_tokenizer.post_processor = None
    plain = data.windows(tokenizer, text, count=0, length=5, seed=3)
    assert plain.flatten().tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_some_windows_are_token_blocks(tokenizer):
    assert torch.equal(data.windows(tokenizer, TEXT, 6, 20, seed=1), token_blocks(tokenizer, TEXT, 6, 20, seed=1))


@pytest.mark.parametrize("length", [1, 42])
def test_windows_that_no_text_fills_are_refused(tokenizer, refused, length):
    with refused(f"windows of {length} tokens of a text of 40: give a length it holds, of 2 or more"):
        data.windows(tokenizer, TEXT[:40], count=0, length=length, seed=0)


def test_text_of_a_folder_comes_with_its_digest(tmp_path):
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text(f"the {split} größe", encoding="utf-8")
    assert load_text(str(tmp_path), "valid") == ("the valid größe", sha256(tmp_path / "valid.txt"))


def test_wikitext_is_unpacked_from_the_pinned_file_of_its_split(tmp_path, monkeypatch):
    packed = tmp_path / "test.raw.gz"
    packed.write_bytes(gzip.compress("= Größe =\n".encode()))
    assets = []
    monkeypatch.setattr(data, "fetch", lambda asset, *others: assets.append(asset) or packed)
    assert load_text("wikitext-2", "test") == ("= Größe =\n", sha256(packed))
    assert assets == [data.WIKITEXT2["test"]]


def test_each_split_is_another_file():
    assert len({(asset.member, asset.sha256) for asset in data.WIKITEXT2.values()}) == 3


def test_unknown_split_is_refused(tmp_path, refused):
    with refused(r"split 'dev': use one of \['test', 'train', 'valid'\]"):
        load_text(str(tmp_path), "dev")


def test_missing_text_is_refused_by_its_path(tmp_path, refused):
    with refused(f"no text {tmp_path / 'test.txt'}: give"):
        load_text(str(tmp_path), "test")


def test_text_in_another_encoding_is_refused(tmp_path, refused):
    (tmp_path / "test.txt").write_bytes("größe".encode("latin-1"))
    with refused("UTF-8"):
        load_text(str(tmp_path), "test")


def test_a_text_file_is_cut_into_splits_that_share_nothing(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text(" ".join(f"{number:05d}" for number in range(5000)))
    words = {split: set(load_text(str(path), split)[0].split()) for split in ("train", "valid", "test")}
    whole = {split: {word for word in found if len(word) == 5} for split, found in words.items()}  # not cut in two
    assert not whole["train"] & whole["test"] and not whole["train"] & whole["valid"]
    assert len(set.union(*whole.values())) > 4900


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"\xef\xbb\xbfone two", "one two"),  # byte-order mark
        (b"one\r\ntwo\rthree", "one\ntwo\nthree"),
        (b"one\x00 two", "one two"),
    ],
)
def test_marks_of_other_systems_are_no_text(tmp_path, raw, expected):
    (tmp_path / "test.txt").write_bytes(raw)
    assert load_text(str(tmp_path), "test")[0] == expected


@pytest.mark.parametrize("raw", [b"", b" \n\t", b"\xef\xbb\xbf"])
def test_a_file_without_text_is_refused(tmp_path, refused, raw):
    (tmp_path / "test.txt").write_bytes(raw)
    with refused("test.txt holds no text"):
        load_text(str(tmp_path), "test")


def test_half_a_character_is_refused(tokenizer, refused):
    with refused("a lone surrogate at character 4: decode it"):
        token_blocks(tokenizer, "one \ud800 " * 40, 2, 8, 0)
    with refused("a lone surrogate at character 0"):
        data.windows(tokenizer, "\udfff", 0, 8, 0)


def test_one_line_of_ten_megabytes_gives_blocks(tokenizer):
    blocks = token_blocks(tokenizer, "word and more " * 750_000, 4, 32, 0)
    assert blocks.shape == (4, 32)
    assert len({tuple(block.tolist()) for block in blocks}) > 1


def test_splits_of_a_domain_share_no_piece_and_lose_none():
    text = "".join(chr(0x4E00 + index) for index in range(1003))
    parts = {split: data._pieces(text, pieces) for split, pieces in data.PIECES.items()}
    letters = {split: set(part) - {"\n"} for split, part in parts.items()}
    assert set.union(*letters.values()) == set(text)
    assert sum(len(part) for part in letters.values()) == len(text)
    assert len(letters["train"]) == pytest.approx(0.6 * len(text), abs=30)


@pytest.mark.parametrize("split", data.PIECES)
def test_each_split_of_a_domain_is_of_its_own_pieces(tmp_path, monkeypatch, split):
    path = tmp_path / "c4"
    path.write_text("".join(chr(97 + n) * 10 for n in range(10)) * 5)
    monkeypatch.setattr(data, "fetch", lambda *asset: path)
    assert load_text("c4", split)[0] == data._pieces(path.read_text(), data.PIECES[split])


def test_of_a_short_text_as_many_blocks_are_taken_as_it_holds(tokenizer):
    text = "word " * 36  # 180 bytes, a token each: 9 blocks of 19 and <s>, and no tenth
    assert len(data.as_many(tokenizer, text, 10, 20, seed=0)) == 9


def test_a_text_without_room_for_a_choice_is_taken_from_its_first_word(tokenizer):
    (block,) = token_blocks(tokenizer, "one two three", count=1, length=6, seed=0)
    assert tokenizer.decode(block[1:]) == "one t"


def test_mixed_blocks_take_texts_in_turn(tokenizer):
    found = judge.mixed_blocks(tokenizer, ["a " * 200, "b " * 200], 5, 8, seed=0)
    assert [("a" in tokenizer.decode(block), "b" in tokenizer.decode(block)) for block in found] == [
        (True, False), (False, True), (True, False), (False, True), (True, False)
    ]  # fmt: skip


def test_mixed_blocks_draw_other_windows_for_each_share(tokenizer):
    letters = " ".join(f"{n:04d}" for n in range(600))
    found = judge.mixed_blocks(tokenizer, [letters, "b " * 200, letters], 6, 8, seed=0)
    first = [tuple(block.tolist()) for block in found if "b" not in tokenizer.decode(block)]
    assert len(set(first)) == 4


def test_a_short_text_gives_what_it_has_and_the_first_the_rest(tokenizer, refused):
    found = judge.mixed_blocks(tokenizer, ["a " * 2000, "b " * 20], 20, 8, seed=0)  # b holds 5 windows
    short = sum("b" in tokenizer.decode(block) for block in found)
    assert found.shape == (20, 8)
    assert 2 <= short <= 5
    with refused("the texts hold .* of 40 blocks of 8 tokens"):
        judge.mixed_blocks(tokenizer, ["a " * 10, "b " * 40], 40, 8, seed=0)


def test_where_the_first_text_is_short_too_the_others_give_the_rest(tokenizer):
    texts = ["a " * 20, "b " * 20, "c " * 2000]
    found = judge.mixed_blocks(tokenizer, texts, 30, 8, seed=0)
    counts = [sum(letter in tokenizer.decode(block) for block in found) for letter in "abc"]
    assert sum(counts) == 30
    assert counts[0] <= 10
    assert counts[1] <= 5
    assert counts[2] > 15
