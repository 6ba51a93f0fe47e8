"""SUMMARY.md in two languages: prose from findings, verdicts from t9_claims, and a few rows of the tables."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from paper_src import InputError
from paper_src.reporting import reported
from paper_src.reporting.claims import VERDICTS
from paper_src.reporting.findings import NAN, Finding, Read, load, number

TEMPLATES = {"en": "summary.md.j2", "zh-CN": "summary.zh-CN.md.j2"}
FILES = {"en": "SUMMARY.md", "zh-CN": "SUMMARY.zh-CN.md"}
MOST_ROWS = 14  # of a table of the summary; all rows are in its CSV


class Known(dict):
    """Findings by name; one that this run lacks prints as a dash."""

    def __missing__(self, name: str) -> Finding:
        return Finding(name, NAN, NAN, NAN, "", NAN, "", "")


def summary(read: Read, claims: pd.DataFrame, language: str = "en") -> str:
    """The whole text of SUMMARY.md, or of SUMMARY.zh-CN.md.

    Args:
        read: name of a table -> the table.
        claims: t9_claims.
        language: ``en`` or ``zh-CN``.
    """
    return _template(language).render(**values(read, claims, language))


def parts(read: Read, claims: pd.DataFrame, language: str = "en") -> dict[str, str]:
    """The summary's ``abstract`` and ``advice`` alone, as Markdown: the first screen of the page, the README's head."""
    template, given = _template(language), values(read, claims, language)
    context = template.new_context(given)
    return {name: "".join(template.blocks[name](context)).strip() for name in ("abstract", "advice")}


def values(read: Read, claims: pd.DataFrame, language: str) -> dict[str, object]:
    """What the templates print."""
    own, larger = load(read), load(read, "long/")
    models, depths, differing = (_if_made(rows, read) for rows in (model_rows, depth_rows, differing_rows))
    suffix = "" if language == "en" else "_zh"
    rows = [{**row, **{name: row[f"{name}{suffix}"] for name in ("reported", "finding", "rule", "decides")}}
            for row in claims.fillna("").to_dict("records")]  # fmt: skip
    groups = {"report": [row for row in rows if row["group"] != "open"],
              "open": [row for row in rows if row["group"] == "open"]}  # fmt: skip
    reproduced = {row["name"] for row in groups["report"] if row["verdict"] == "reproduced"}
    return {
        "f": Known(own),
        "long": Known(larger),
        "best": Known(own | larger),
        "gpu": Known(load(read, "gpu/")),
        "reported": reported,
        "claims": rows,
        "counts": {name: counts(part) for name, part in groups.items()},
        "rounds": {
            "t3": fewest(read, "t3_speed", "rounds"),
            "t7": fewest(read, "t7_baselines", "prefill_hidden_rounds"),
        },
        "sizes": _if_made(size_rows, read),
        "fidelity": _if_made(fidelity_rows, read),
        "recovery": _if_made(recovery_rows, read),
        "gates": _if_made(lambda read: read("t6_gate").to_dict("records"), read),
        "titles": title_rows(read),
        "recommenders": recommender_rows(read),
        "methods": _if_made(method_rows, read),
        "controls": _if_made(lambda read: read("t8_controls").to_dict("records"), read),
        "larger_recovery": _if_made(recovery_rows, lambda name: read(f"long/{name}")),
        "gpu_recovery": _if_made(gpu_rows, read),
        "models": models,
        "depths": depths,
        "differing": differing,
        "held": len(reproduced - {row["name"] for row in differing}),  # on every model
        "across": across(models, depths),
    }


def counts(rows: Sequence[dict]) -> dict[str, int]:
    """How many claims there are, and how many of each verdict."""
    of = {verdict.replace(" ", "_"): sum(row["verdict"] == verdict for row in rows) for verdict in VERDICTS}
    return {"all": len(rows), **of}


def fewest(read: Read, table: str, column: str) -> float:
    """The smallest number in a column; NaN where the table was not made."""
    return next(iter(_if_made(lambda read: [read(table)[column].min()], read)), NAN)


def _template(language: str) -> Template:
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False,
                              loader=FileSystemLoader(Path(__file__).parent))  # fmt: skip
    environment.filters["n"] = lambda value, spec="": format(value, spec)
    environment.filters["x"] = number
    environment.filters["ci"] = lambda row, name, spec="times": format(
        Finding(name, row[name], row.get(f"{name}_lo", NAN), row.get(f"{name}_hi", NAN), "", NAN, "", ""), f"~{spec}"
    )
    return environment.get_template(TEMPLATES[language])


def _if_made(rows: Callable[[Read], list[dict]], read: Read) -> list[dict]:
    """The rows; none where their section was not run, or its data are not at hand."""
    try:
        return rows(read)[:MOST_ROWS]
    except (InputError, FileNotFoundError):
        return []


def size_rows(read: Read) -> list[dict]:
    """A row a k: size, and speed of each task at its largest workload."""
    speed, size = read("t3_speed"), read("t3_size").set_index("k")
    size["disk_share"] = size["disk_bytes"] / size["disk_bytes"].max()
    speed = speed.assign(tokens=speed["batch"] * speed["length"]).sort_values("tokens", kind="stable")
    largest = speed.groupby(["k", "task"])["speedup"].last().unstack("task").sort_index(ascending=False)
    return [{"k": k, **size.loc[k].to_dict(), **row.to_dict()} for k, row in largest.iterrows()]


def fidelity_rows(read: Read) -> list[dict]:
    """At each k what validation text chose, what the report's strategy does, and the mean of random selections."""
    table = read("t4_fidelity")
    wanted = [(table["strategy"] == "chosen"), (table["strategy"] == "distributed") & (table["score"] == "combined"),
              (table["strategy"] == "random")]  # fmt: skip
    rows = pd.concat([table[each] for each in wanted]).sort_values("k", ascending=False, kind="stable")
    return rows.to_dict("records")


def recovery_rows(read: Read) -> list[dict]:
    """Every stage of repair at every k, of the searched layers and those of the report's strategy."""
    table = read("t5_recovery")
    table = table[~table["selection"].isin(["full", "trivial"])]
    return table.sort_values(["k", "selection"], ascending=[False, False], kind="stable").to_dict("records")


def gpu_rows(read: Read) -> list[dict]:
    """A row a start of the run on a GPU: the first kind of text, with the mean over all kinds beside it and, as
    ``searched``, the row of the searched layers after as many tokens.
    """
    table, keys = read("gpu/t5_recovery"), ["selection", "tokens"]
    mean = table[table["text"] == "mean of all"].set_index(keys)["ppl_ratio"].rename("ppl_ratio_mean")
    rows = table.drop_duplicates(keys).join(mean, on=keys).to_dict("records")
    searched = {row["tokens"]: row for row in rows if row["selection"] == "selected"}
    return [{**row, "searched": searched.get(row["tokens"])} for row in rows]


def title_rows(read: Read) -> list[dict]:
    """Rankings of candidates by title: what needs no layers, full and compact models, random layers."""
    wanted = ["item_knn", "mean_embedding", "full", "compact", "recovered", "random_layers"]
    return _if_made(lambda read: [row for row in read("t6_titles").to_dict("records") if row["model"] in wanted], read)


def recommender_rows(read: Read) -> list[dict]:
    """For each data set what needs no language model, and the full and compact models where the gate passes."""
    wanted = [("most_popular", "none"), ("item_knn", "none"), ("sasrec", "sasrec"), ("trained", "full"),
              ("trained", "recovered"), ("no_layers", "full")]  # fmt: skip

    def rows(name: str) -> Callable[[Read], list[dict]]:
        return lambda read: [row for key in wanted for row in read(name).to_dict("records")
                             if (row["method"], row["body"]) == key]  # fmt: skip

    return [row for name in ("t6_movielens", "t6_amazon") for row in _if_made(rows(name), read)]


def method_rows(read: Read) -> list[dict]:
    """What has no size, and at the smallest k what was trained, of the first seed: alike, or by section 5."""
    table = read("t7_baselines")
    table = table[table["ppl_ratio"].notna() & (table["seed"] == 0)]
    k = table.loc[table["family"].isin(["depth", "width"]), "k"].min()
    free = table["name"].isin(["original_file", "int8_weight", "int4_groups"]) & ~table["recovered"]
    rows = table[free | ((table["k"] == k) & table["trained"])].sort_values(["tokens", "ppl_ratio"], kind="stable")
    return rows.to_dict("records")


def model_rows(read: Read) -> list[dict]:
    """A row a model, with those of two of its scores; none where there is one model alone."""
    models, scores = read("t9_models").to_dict("records"), read("t9_model_scores").set_index(["model", "score"])
    shown = ("fisher", "combined")
    return [{**row, **{score: scores.loc[row["model"], score].to_dict() for score in shown}} for row in models
            if len(models) > 1]  # fmt: skip


def depth_rows(read: Read) -> list[dict]:
    """A row for each model and k, with a part for each stage of its recovery."""
    parts = read("t9_model_depths").groupby(["model", "k"], sort=False)
    return [{**part.iloc[0].to_dict(), **{row["stage"].replace(" ", "_"): row for row in part.to_dict("records")}}
            for _, part in parts]  # fmt: skip


def differing_rows(read: Read) -> list[dict]:
    """The claims whose verdict differs between models, with the verdict on each."""
    table = read("t9_model_claims")
    rows = table[table["differs"]].drop(columns="differs").to_dict("records")
    return [{"name": row.pop("name"), "verdicts": row} for row in rows]


def across(models: Sequence[dict], rows: Sequence[dict]) -> dict[str, object]:
    """What holds on all models: least and most perplexity ratios after distillation at the largest and smallest k,
    on the first kind of text and over all, and whether the layers chosen beat the report's strategy on each; empty
    where there is one model alone.
    """
    if not models:
        return {}
    found: dict[str, object] = {"models": len(models)}
    for end, pick in (("largest", max), ("smallest", min)):
        at = [pick((row for row in rows if row["model"] == model["model"]), key=lambda row: row["k"])
              for model in models]  # fmt: skip
        for name, column in (("", "ppl_ratio"), ("mean_", "ppl_ratio_mean")):
            repaired = [row["distilled"][column] for row in at]
            found |= {f"least_{name}{end}": min(repaired), f"most_{name}{end}": max(repaired)}
    found["closed_form_helps"] = all(row["closed_form"]["ppl_ratio"] < row["cut"]["ppl_ratio"] for row in rows)
    found["chosen_wins"] = all(row["ppl_ratio_chosen"] < row["ppl_ratio_distributed"] for row in models)
    return found
