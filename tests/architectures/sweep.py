"""Every causal architecture through :mod:`checks`, each in a process and within a time of its own; the table of it.

python tests/architectures/sweep.py        # rows.json, which is gone on with, and docs/architectures.md
"""

import json
import multiprocessing
import sys
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from checks import KEPT, configurations, examined

HERE = Path(__file__).parent
ROWS, TABLE = HERE / "rows.json", HERE.parents[1] / "docs" / "architectures.md"
SECONDS = 180
CHECKS = ("evaluator", "scores", "closed_form")


def _answer(name: str, pipe: Connection) -> None:
    pipe.send(examined(name))


def row_of(name: str, seconds: float = SECONDS) -> dict[str, object]:
    """The row of one architecture, also if its process dies or does not end."""
    context = multiprocessing.get_context("fork")  # what is imported is shared
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(name, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        if ours.poll(seconds):
            return ours.recv()
        return {"architecture": name, "built": f"no answer within {seconds} s"}
    except EOFError:
        return {"architecture": name, "built": "the process died"}
    finally:
        process.kill()
        process.join()


def state(outcome: str) -> str:
    """``exact``, ``refused``, ``wrong`` or ``error``."""
    return outcome.partition(":")[0]


def cut_of(row: dict) -> str:
    """All sets of layers in one word: exact in all, or in those that are not refused; or what is wrong."""
    states = Counter(map(state, row["cut"]))
    if bad := states["wrong"] + states["error"]:
        return f"WRONG in {bad}"
    return "exact" if states["exact"] == len(row["cut"]) else f"exact in {states['exact']} of {len(row['cut'])}"


def reasons(row: dict) -> str:
    """Why something is refused, each reason once, without the advice behind it."""
    found = [
        outcome for outcome in (*row["cut"], *(row.get(check, "") for check in CHECKS)) if state(outcome) != "exact"
    ]
    short = [outcome.partition(": ")[2].split(": ")[0].strip() for outcome in found if outcome]
    return "; ".join(dict.fromkeys(text[:160] for text in short))


def table(rows: dict[str, dict]) -> str:
    """docs/architectures.md."""
    built = [row for row in rows.values() if not row["built"]]
    ways = map(cut_of, built)
    cuts = Counter("refused" if way.startswith("exact in 0 of ") else way.split(" ")[0] for way in ways)
    every = sum(cut_of(row) == "exact" for row in built)
    lines = [
        "# Architectures",
        "",
        "What this package does with every causal architecture of Transformers, each as a tiny random model.",
        f"Written by `tests/architectures/sweep.py`: 8 layers, {len(KEPT)} sets of kept layers for each.",
        "",
        "- *cut*: the cut model has the logits of the full one with the other layers bypassed, to float32's last",
        "  bit; saved and loaded it has the same weights; with its cache it writes what it writes without.",
        "- *subsets*: losses of subsets of layers, from which searches and Shapley values are made, are those of the",
        "  cut models.",
        "- *scores*: Fisher and Taylor scores of each sequence are autograd's.",
        "- *closed form*: the refitted model loads as it is, and its states are no farther from the full model's.",
        "",
        f"Of {len(rows)} architectures {len(built)} could be built tiny. {every} are exact in every set, "
        f"{cuts['exact'] - every} in those that are not refused, {cuts['refused']} are refused, "
        f"{cuts['WRONG']} are wrong.",
        "A refusal is one line with its reason; nothing is written then.",
        "",
        "| architecture | cut | subsets | scores | closed form | why refused |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if row["built"]:
            lines.append(f"| {name} | not built | | | | {row['built'][:120].replace('|', '/')} |")
            continue
        cells = [state(row[check]) if check in row else "" for check in CHECKS]
        lines.append(f"| {name} | {cut_of(row)} | {' | '.join(cells)} | {reasons(row).replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Bring ``rows.json`` and the table up to date."""
    rows = json.loads(ROWS.read_text()) if ROWS.is_file() else {}
    for name in sorted(configurations()):
        if name not in rows:
            rows = dict(sorted({**rows, name: row_of(name)}.items()))
            ROWS.write_text(json.dumps(rows, indent=1) + "\n")
            print(name, rows[name]["built"] or cut_of(rows[name]), flush=True)
    TABLE.write_text(table(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
