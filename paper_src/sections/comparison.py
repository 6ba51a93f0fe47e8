"""The rows of section 7: every method made, trained and measured in the same way, kept so that a killed run goes on."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import NotSupported, timing
from paper_src.baselines import sparsity, zero_shot
from paper_src.baselines.methods import METHODS, Method
from paper_src.baselines.setting import Recovered, Setting
from paper_src.baselines.size import bytes_of, count_of, require_alive
from paper_src.baselines.training import TRAININGS
from paper_src.compaction import compact
from paper_src.sections.judge import Judge
from paper_src.sections.recovery import start_of
from paper_src.support.checkpoints import run_folder
from paper_src.support.files import replacing
from paper_src.support.sources import sha256

Row = dict[str, object]
LOSSLESS = "the weights come from a file of fewer bits: next to lossless by construction"


class Job(NamedTuple):
    """One row: a method, its size, whether it is trained here, and the seed of that."""

    name: str
    k: int
    recovered: bool = False
    seed: int = 0

    @property
    def row(self) -> str:
        """Its name in t7_baselines and t7_windows: ``cut k=8 trained s0``."""
        size, training = f" k={self.k}" if self.k else "", f" trained s{self.seed}" if self.recovered else ""
        return self.name + size + training


@dataclass
class Measurement:
    """How every model is measured.

    Attributes:
        judge: on test text.
        valid: on validation text, to choose by.
        tokenizer: of the full model.
        items: of zero-shot tasks.
        asked: names of the methods that answer them, as they are.
        workloads: what is timed; the first is the prefill.
        rounds: timed rounds.
    """

    judge: Judge
    valid: Judge
    tokenizer: PreTrainedTokenizerBase
    items: Sequence[zero_shot.Items]
    asked: Sequence[str]
    workloads: Sequence[timing.Workload]
    rounds: int


def repaired(recovered: pd.DataFrame, folder: Path) -> dict[int, Recovered]:
    """k -> the checkpoint of section 5, with its budget from t5_recovery."""
    rows = recovered[(recovered["selection"] == "selected") & (recovered["recovery"] == "distilled")]
    return {
        row.k: Recovered(folder / f"recovered_{row.k}", row.tokens, start_of(row.form)) for row in rows.itertuples()
    }


def best_cut(full: PreTrainedModel, draws: Sequence[Sequence[int]], valid: Judge) -> Sequence[int]:
    """The layers of lowest perplexity on validation text among ``draws``."""
    return min(draws, key=lambda kept: valid.ppl_ratio(compact(full, kept)))


class Rows:
    """Finished rows of one setting, measurement and state of section 5, in a file from which a killed run goes on."""

    def __init__(self, on: Setting, by: Measurement):
        weights = {k: [sha256(part) for part in sorted(found.folder.glob("*.safetensors"))]
                   for k, found in on.repaired.items()}  # fmt: skip
        context = {
            "training": asdict(on.training), "rates": list(on.rates), "repaired": weights,
            "layers": [sorted(which.items()) for which in (on.kept, on.block_cut, on.random_cut)],
            "items": [[part.task, part.rows] for part in by.items], "asked": list(by.asked),
            "workloads": [str(work) for work in by.workloads], "rounds": by.rounds, "device": on.full.device.type,
            "code": [sha256(module) for module in sorted(Path(__file__).parents[1].rglob("*.py"))],
            "versions": [version(package) for package in ("torch", "transformers")],
        }  # fmt: skip
        data = [on.blocks, *by.judge.blocks.values(), on.validation.blocks, *by.valid.blocks.values()]
        self.on, self.file = on, run_folder(on.folder, [*data, *on.full.parameters()], context) / "rows.jsonl"
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    def missing(self, jobs: Sequence[Job]) -> list[Job]:
        """Those of ``jobs`` that have no row yet."""
        done = {row["row"] for row in self.rows}
        return [job for job in jobs if job.row not in done]

    @contextmanager
    def row(self, job: Job) -> Iterator[Row]:
        """The row of a method, to be filled inside and written behind; ``status`` says why one has no numbers."""
        row = described(self.on, job)
        try:
            yield row
        except NotSupported as error:
            row |= {"status": f"not supported: {error}", "tokens": 0, "search_tokens": 0}
        self.rows.append(row)
        with replacing(self.file) as part:
            part.write_text("".join(json.dumps(each) + "\n" for each in self.rows))
        shutil.rmtree(_folder(self.on, job), ignore_errors=True)  # its trainings: each holds a model


def _folder(on: Setting, job: Job) -> Path:
    return on.folder / job.row.replace(" ", "_")


def described(on: Setting, job: Job) -> Row:
    """What a row of t7_baselines says of its method and of the repair that its model has had.

    ``repaired_by`` is the section whose budget the repair took, ``start`` what the training started from, ``tokens``
    are those of calibration and training; the choice of layers is not counted.
    """
    method, k = METHODS[job.name], job.k
    repair = "distilled" if job.recovered else method.repair
    earlier = "repaired" in method.needs
    start = on.repaired[k].start if earlier else _start(method)
    return {
        "row": job.row, "method": method.title, "name": job.name, "family": method.family, "k": k,
        "recovered": job.recovered, "trained": repair == "distilled", "seed": job.seed, "control": method.control,
        "bits": method.bits or on.bits, "repair": repair,
        "repaired_by": "none" if repair == "none" else "section 5" if earlier else "section 7",
        "start": start if repair == "distilled" else "none", "tokens": on.tokens(method.needs, k),
        "search_tokens": on.tokens(method.needs, k),
    }  # fmt: skip


def _start(method: Method) -> str:
    return "closed_form" if method.refit or method.repair == "closed_form" else method.start


def trained(on: Setting, job: Job, done: Sequence[Row] = ()) -> tuple[PreTrainedModel, Row]:
    """The model after the short distillation that every method gets, and what that adds to its row.

    It starts where the method's algebra allows, once for each of ``on.rates``; validation text decides among them. If
    that is decided, in a row of another seed among ``done``, it takes that rate. ``tokens`` are what this model has
    seen, ``search_tokens`` what all of them have.
    """
    method, start = METHODS[job.name], _start(METHODS[job.name])
    try:
        model, seconds = method.make(on, job.k, job.seed, refit=True)
    except NotSupported:
        if not method.refit:
            raise
        (model, seconds), start = method.make(on, job.k, job.seed), "as_it_is"
    seen = on.tokens((*method.needs, *(["blocks"] if method.refit and start == "closed_form" else [])), job.k)
    row: Row = {"start": start, "search_tokens": seen, "recovery_s": seconds, "valid_kl_nats": float("inf")}
    best = model
    for rate in decided(job, done) or on.rates:
        how = replace(on.training, learning_rate=rate, seed=job.seed)
        found = TRAININGS[method.training](on, model, job.k, _folder(on, job), how)
        tokens, loss = int(found.history[-1]["tokens"]), min(look["kl_nats"] for look in found.history)
        row["search_tokens"] += tokens
        row["recovery_s"] += found.history[-1]["seconds"]
        if loss < row["valid_kl_nats"]:
            best = found.model
            row |= {"valid_kl_nats": loss, "learning_rate": rate, "tokens": seen + tokens}
    return best, row


def decided(job: Job, done: Sequence[Row]) -> list[float]:
    """The learning rate that the search of another seed of ``job`` has found among the rows ``done``; or nothing."""
    same = [row for row in done if (row["name"], row["k"], row["recovered"]) == (job.name, job.k, True)]
    return [row["learning_rate"] for row in same if "learning_rate" in row][:1]


def measured(on: Setting, by: Measurement, model: PreTrainedModel, row: Row, done: Sequence[Row]) -> Row:
    """Fidelity, perplexity, accuracy, bytes and speed of one model, with the losses of its ``windows``.

    Raises:
        InputError: a layer is lost or does nothing.
    """
    require_alive(model, on.blocks[:1, :8])
    found = by.judge.compare(model)
    sizes = {"parameters": count_of(model), "zeros": sparsity.zeros(model), **bytes_of(model, row["bits"])}
    kept = by.judge.windows(row["row"], found).to_dict("list")
    quality = {**by.judge.summary(found), "valid_ppl_ratio": by.valid.ppl_ratio(model), "windows": kept}
    asked = by.items and row["name"] in by.asked and not row["recovered"]
    answers = zero_shot.zero_shot(model, by.tokenizer, by.items) if asked else {}
    return sizes | quality | speeds(on.full, by, model, row["row"], done) | answers


def speeds(full: PreTrainedModel, by: Measurement, model: PreTrainedModel, name: str, done: Sequence[Row]) -> Row:
    """``<task>_speedup`` over the full model with what says how far to trust it, and the seconds of all ``rounds``.

    Models of one shape take the same time: it is measured once, for the row ``timed_as``.
    """
    if model is full:
        one = {f"speedup{end}": 1.0 for end in ("", "_lo", "_hi")}
        return {f"{work.task}_{key}": value for work in by.workloads for key, value in one.items()}
    shape = _shape(model)
    for other in done:
        if other.get("shape") == shape:
            columns = [key for key in other if key.startswith(tuple(f"{work.task}_" for work in by.workloads))]
            return {key: other[key] for key in ("shape", "timed_as", *columns)}
    row: Row = {"shape": shape, "timed_as": name, "rounds": []}
    for work in by.workloads:
        speed, seconds = timing.compare_pair(full, model, work, by.rounds, by.judge.seed)
        row |= {f"{work.task}_{key}": value for key, value in speed.items()}
        row["rounds"] += [(name, work.task, number, *pair) for number, pair in enumerate(seconds)]
    return row


def _shape(model: PreTrainedModel) -> str:
    """Digest of names, shapes, dtypes and kinds of all tensors."""
    traits = []
    for name, value in model.state_dict().items():
        is_tensor = isinstance(value, Tensor)
        traits.append((name, type(value).__name__, *((tuple(value.shape), str(value.dtype)) if is_tensor else ())))
    return hashlib.sha256(repr(traits).encode()).hexdigest()[:12]


def t7_windows(rows: Sequence[Row]) -> pd.DataFrame:
    """t7_windows: the losses of every row on every window of test text."""
    return pd.concat([pd.DataFrame(row["windows"]) for row in rows if "windows" in row], ignore_index=True)


def t7_rounds(rows: Sequence[Row]) -> pd.DataFrame:
    """t7_rounds: seconds of the full model and of a row's in every timed round; rows of one shape share them."""
    found = [part for row in rows for part in row.get("rounds", [])]
    return pd.DataFrame(found, columns=["row", "task", "round", "full_s", "small_s"])


def t7_baselines(rows: Sequence[Row], full: PreTrainedModel, judge: Judge, original: Mapping | None) -> pd.DataFrame:
    """t7_baselines: the full model, each method as it is, then those that were trained here.

    Ratios are to the full model in its own dtype, ``*_share`` to the full model in float32. Losses and cosines are of
    all windows, the other metrics of the first 8,192 tokens.

    Args:
        original: the row of :func:`original_row`, if the weights come from a packed file.
    """
    depth, single = full.config.get_text_config().num_hidden_layers, 4 * count_of(full)
    rows = [{key: value for key, value in row.items() if key not in ("windows", "rounds", "shape")} for row in rows]
    frame = pd.DataFrame([*rows, *([original] if original else [])])
    frame = frame.sort_values("recovered", kind="stable", ignore_index=True)
    frame.loc[frame["family"] == "full", "k"] = depth
    frame["status"] = frame["status"].fillna("") if "status" in frame else ""
    frame["note"] = ""
    if original:
        frame.loc[frame["name"] == "int8_weight", "note"] = LOSSLESS
    shares = {f"{kind}_share": frame[f"{kind}_bytes"] / single for kind in ("packed", "memory", "disk")}
    return frame.assign(**shares, n_tokens=judge.n_tokens, n_windows=len(next(iter(judge.blocks.values()))))


def original_row(path: Path | None, full: PreTrainedModel) -> Row | None:
    """The packed file that the weights of the full model come from, as a row of its own: it has no speed of ours."""
    if path is None:
        return None
    size, count = path.stat().st_size, count_of(full)
    none = dict.fromkeys(("k", "seed", "tokens", "search_tokens"), 0) | dict.fromkeys(
        ("repair", "repaired_by", "start"), "none"
    )
    no = dict.fromkeys(("recovered", "trained", "control"), False)
    one = dict.fromkeys(("ppl_ratio", "ppl_ratio_lo", "ppl_ratio_hi", "valid_ppl_ratio"), 1.0)
    return {"row": "original_file", "method": f"original file, {path.stem.rsplit('.', 1)[-1]}", "name": "original_file",
            "family": "full", "bits": round(8 * size / count), "parameters": count, "packed_bytes": size,
            "disk_bytes": size, **none, **no, **one}  # fmt: skip
