"""Makes the zero-shot items of the tiny profile from the stories: python tests/data/make_tasks.py (a second)."""

import json
from pathlib import Path

HERE = Path(__file__).parent
COUNT = 40


def stories() -> list[list[str]]:
    """Sentences of each paragraph of the test text that has three or more."""
    paragraphs = (HERE / "tiny-text" / "test.txt").read_text(encoding="utf-8").splitlines()
    parts = [[f"{part}." for part in paragraph.strip(".").split(". ")] for paragraph in paragraphs]
    return [part for part in parts if len(part) >= 3][:COUNT]


def lambada() -> list[dict]:
    """A paragraph up to its last word, which is to be said."""
    return [{"text": " ".join(part).rstrip(".")} for part in stories()]


def piqa() -> list[dict]:
    """The sentence that follows, beside one of another paragraph; the right one stands first and second in turn."""
    parts = stories()
    rows = []
    for index, part in enumerate(parts):
        pair = [part[2], parts[(index + 7) % len(parts)][2]]
        label = index % 2
        rows.append({"goal": " ".join(part[:2]), "sol1": pair[label], "sol2": pair[1 - label], "label": label})
    return rows


if __name__ == "__main__":
    folder = HERE / "tiny-tasks"
    folder.mkdir(exist_ok=True)
    for name, rows in (("lambada_openai", lambada()), ("piqa", piqa())):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
