"""Rows of the comparison: every way to a smaller or faster model on the same text, clock and budget."""

import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from paper_src import InputError, NotSupported, baselines, distillation, fidelity, recovery, timing, zeroshot
from paper_src.checkpoints import claim
from paper_src.compaction import compact
from paper_src.files import replacing
from paper_src.layers import LayerRunner
from paper_src.models import count_parameters, decoder_layers
from paper_src.repairs import Judge, refit, saved
from paper_src.sources import sha256

Model = PreTrainedModel


@dataclass(frozen=True)
class Entry:
    """One method: how its model is made, and how it is trained in the second block of rows.

    Attributes:
        method: its name.
        family: quantization, sparsity, width, low_rank, depth or combination.
        k: the number of layers whose parameter count it was given; 0 where size is not free.
        make: gives the model.
        training: ``none`` where its weights cannot be trained, ``plain``, ``masked`` where zeros stay zeros, or
            ``refit``: cut layers, first repaired in closed form.
        kept: layers of a ``refit``.
        uses: parts of the bench that are made once for several methods; their seconds count for each.
        source: folder of the checkpoint that it starts from, if any.
    """

    method: str
    family: str
    k: int
    make: Callable[[], Model]
    training: str = "none"
    kept: Sequence[int] = ()
    uses: Sequence[str] = ()
    source: Path | None = None


@dataclass
class Bench:
    """What all methods share.

    Args:
        full: the full model.
        tokenizer: its tokenizer.
        blocks: (N, T) calibration text of every method, and of the recovery in the second block of rows.
        judge: on test text.
        validation: for the recovery's early stop.
        items: of zero-shot tasks.
        workloads: what is timed; the first is the prefill.
        rounds: timed rounds.
        folder: of recovery's checkpoints and of finished rows, from which a killed run goes on.
        settings: of the recovery.
        zero_shot_k: sizes whose zero-shot accuracy is taken; 0 are methods without a size.
    """

    full: Model
    tokenizer: PreTrainedTokenizerBase
    blocks: Tensor
    judge: Judge
    validation: fidelity.Reference
    items: Sequence[zeroshot.Items]
    workloads: Sequence[timing.Workload]
    rounds: int
    folder: Path
    settings: distillation.Settings
    zero_shot_k: Sequence[int] = ()
    spent: dict[str, float] = field(default_factory=dict)

    @cached_property
    def moments(self) -> baselines.Moments:
        """Of the inputs of all linear maps, on ``blocks``."""
        return self._timed("moments", lambda: baselines.input_moments(self.full, self.blocks))

    @cached_property
    def plain_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of the weights."""
        return self._timed("plain_factors", lambda: baselines.factors(self.full))

    @cached_property
    def aware_factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of the weights, for the inputs of ``blocks``."""
        moments = self.moments
        return self._timed("aware_factors", lambda: baselines.factors(self.full, moments))

    def prepare(self, uses: Sequence[str]) -> float:
        """Seconds that it took to make the parts ``uses``; makes them if they are not there."""
        for name in uses:
            getattr(self, name)
        return sum(self.spent[name] for name in uses)

    def _timed(self, name: str, make: Callable):
        start = time.perf_counter()
        made = make()
        self.spent[name] = time.perf_counter() - start
        return made


def entries(
    bench: Bench, kept: dict[int, Sequence[int]], blocks_cut: dict[int, Sequence[int]], recovered: Path
) -> list[Entry]:
    """All methods at the sizes of ``kept``.

    Args:
        bench: shared.
        kept: k -> the layers that notebook 5 repaired.
        blocks_cut: k -> the layers that are left when the block of least angular distance goes (ReplaceMe's choice).
        recovered: folder of the checkpoints of notebook 5, ``recovered_<k>``.
    """
    full = bench.full
    other = torch.float32 if full.dtype == torch.bfloat16 else torch.bfloat16
    sizes = {k: count_parameters(compact(full, layers)) for k, layers in kept.items()}
    found = [
        Entry(str(other).removeprefix("torch."), "quantization", 0, lambda: baselines.cast(full, other)),
        Entry("int8, torch.ao dynamic", "quantization", 0, lambda: baselines.dynamic_quantized(full)),
    ]
    for kind, name in TORCHAO.items():
        found.append(Entry(name, "quantization", 0, partial(baselines.torchao_quantized, full, kind)))
    for share in (0.5, 0.75):
        make = partial(baselines.magnitude_pruned, full, share)
        found.append(Entry(f"magnitude {share:.0%}", "sparsity", 0, make, "masked"))
    for name, shape in {"Wanda 50%": (0.5, 0), "Wanda 75%": (0.75, 0), "Wanda 2:4": (0.5, 4)}.items():
        found.append(Entry(name, "sparsity", 0, lambda shape=shape: baselines.wanda(full, bench.moments, *shape),
                           "masked", uses=["moments"]))  # fmt: skip
    for k, size in sizes.items():
        found += _at_one_size(bench, k, size, kept[k], blocks_cut[k], recovered / f"recovered_{k}")
    return found


TORCHAO = {
    "int8_dynamic": "int8, torchao dynamic",
    "int8_weight": "int8 weights, torchao",
    "int4_weight": "int4 weights, torchao",
    "int4_unpacked": "int4 weights, kept in 8 bits",
}


def _at_one_size(
    bench: Bench, k: int, size: int, kept: Sequence[int], block_cut: Sequence[int], recovered: Path
) -> list[Entry]:
    full, blocks = bench.full, bench.blocks
    return [
        Entry("width", "width", k, lambda: baselines.width_pruned(full, bench.moments, size), "plain",
              uses=["moments"]),
        Entry("SVD", "low rank", k, lambda: baselines.low_rank(full, bench.plain_factors, size), "plain",
              uses=["plain_factors"]),
        Entry("SVD, activation-aware", "low rank", k,
              lambda: baselines.low_rank(full, bench.aware_factors, size), "plain", uses=["moments", "aware_factors"]),
        Entry("early exit", "depth", k, lambda: compact(full, range(k)), "plain"),
        Entry("LaCo", "depth", k, lambda: baselines.laco(full, k, blocks[:4]), "plain"),
        Entry("ReplaceMe", "depth", k, lambda: recovery.closed_form(full, block_cut, blocks, "mlp_map").model, "plain"),
        Entry("layers cut", "depth", k, lambda: compact(full, kept), "refit", kept),
        Entry("layers cut, section 5", "depth", k, lambda: saved(full, recovered), source=recovered),
        Entry("cut + int8", "combination", k,
              lambda: baselines.torchao_quantized(compact(full, kept), "int8_weight")),
        Entry("cut, section 5, + int8", "combination", k,
              lambda: baselines.torchao_quantized(saved(full, recovered), "int8_weight"), source=recovered),
    ]  # fmt: skip


def table(bench: Bench, methods: Sequence[Entry], recover_k: Sequence[int], progress: Callable = iter) -> pd.DataFrame:
    """t7_baselines: the full model, each method as it is, then each that can be trained, after the same recovery.

    ``status`` is empty, or says why a row has no numbers. Ratios are to the full model in its own dtype,
    ``*_share`` of the full model in float32. A killed run goes on from the rows in the bench's folder.

    Args:
        bench: shared.
        methods: of :func:`entries`.
        recover_k: sizes that are recovered; 0 are methods without a size.
        progress: wraps the iterable of jobs.
    """
    later = [entry for entry in methods if entry.training != "none" and entry.k in recover_k]
    jobs = [(entry, False) for entry in methods] + [(entry, True) for entry in later]
    context = {**asdict(bench.settings), "rounds": bench.rounds, "zero_shot_k": list(bench.zero_shot_k),
               "items": [[part.task, part.rows] for part in bench.items],
               "workloads": [str(work) for work in bench.workloads],
               "methods": [[entry.method, entry.k, list(entry.kept), _digest(entry.source)]
                           for entry in methods]}  # fmt: skip
    texts = [bench.blocks, bench.judge.first.blocks, bench.validation.blocks]
    kept_rows = claim(bench.folder, [*texts, *bench.full.parameters()], context) / "rows.jsonl"
    rows = [json.loads(line) for line in kept_rows.read_text().splitlines()] if kept_rows.is_file() else []
    if not rows:
        rows = [{"method": "full model", "family": "full", "k": len(decoder_layers(bench.full)), "recovered": False,
                 **measured(bench, bench.full, True)}]  # fmt: skip
    done = {(row["method"], row["k"], row["recovered"]) for row in rows}
    made: dict[tuple[str, int], tuple[Model, float]] = {}
    for entry, trained in progress([job for job in jobs if (job[0].method, job[0].k, job[1]) not in done]):
        row = {"method": entry.method, "family": entry.family, "k": entry.k, "recovered": trained}
        try:
            model, row["calibration_s"] = made.pop((entry.method, entry.k), None) or _make(bench, entry)
            if entry in later and not trained:
                made[entry.method, entry.k] = model, row["calibration_s"]
            if trained:
                model, row["recovery_s"] = recovered(bench, entry, model)
            row |= measured(bench, model, entry.k in bench.zero_shot_k)
        except NotSupported as error:
            row["status"] = f"not supported: {error}"
        rows.append(row)
        with replacing(kept_rows) as part:
            part.write_text("".join(json.dumps(each) + "\n" for each in rows))
    frame = pd.DataFrame(rows)
    single = 4 * count_parameters(bench.full)
    frame["status"] = frame["status"].fillna("") if "status" in frame else ""
    return frame.assign(memory_share=frame["memory_bytes"] / single, disk_share=frame["disk_bytes"] / single)


def _digest(checkpoint: Path | None) -> str:
    """SHA-256 of each file of a checkpoint's weights; nothing where there are none."""
    return " ".join(sha256(part) for part in sorted(checkpoint.glob("*.safetensors"))) if checkpoint else ""


def _make(bench: Bench, entry: Entry) -> tuple[Model, float]:
    """The model of ``entry``, and the seconds that it took with what it shares."""
    shared, start = bench.prepare(entry.uses), time.perf_counter()
    model = entry.make()
    return model, shared + time.perf_counter() - start


def recovered(bench: Bench, entry: Entry, model: Model) -> tuple[Model, float]:
    """``model`` after the recovery that every method gets, and its seconds."""
    start = time.perf_counter()
    if entry.training == "refit":
        model = refit(bench.full, entry.kept, bench.blocks).model
    if entry.training == "masked":
        model = baselines.masked(model)
    name = f"{entry.method}_{entry.k}".replace(" ", "_").replace(":", "")
    folder = bench.folder / name
    found = distillation.distil(bench.full, model, bench.blocks, bench.validation, folder, bench.settings).model
    if entry.training == "masked":
        found = baselines.unmasked(found)
    return found, time.perf_counter() - start


def measured(bench: Bench, model: Model, zero_shot: bool) -> dict[str, float]:
    """Fidelity, perplexity, accuracy, bytes and speed of one model.

    Raises:
        InputError: a layer is lost or does nothing.
    """
    require_alive(model, bench.blocks[:1, :8])
    row = {"parameters": count_of(model), "zeros": _zeros(model), **bytes_of(model), **bench.judge.row(model)}
    row |= speeds(bench, model)
    return row | (zeroshot.zero_shot(model, bench.tokenizer, bench.items) if zero_shot and bench.items else {})


@torch.no_grad()
def require_alive(model: Model, blocks: Tensor) -> None:
    """Raise InputError where a layer of ``model`` is missing or hands on exactly what it was given."""
    depth = model.config.get_text_config().num_hidden_layers
    if (found := len(decoder_layers(model))) != depth:
        raise InputError(f"the model has {found} layers, its configuration {depth}: a layer was lost")

    def check(index: int, layer: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        state = layer(hidden)
        if torch.equal(state, hidden):
            raise InputError(f"layer {index} hands on what it is given: its weights are zero")
        return state

    LayerRunner(model).drive(blocks.to(model.device), check)


def _zeros(model: Model) -> float:
    try:
        return baselines.zeros(model)
    except (InputError, NotImplementedError, RuntimeError):  # quantized maps hold no plain weights
        return float("nan")


def count_of(model: Model) -> int:
    """Number of weights, quantized ones included; tied ones are counted once."""
    return sum(count for count, _ in _parts(model))


def bytes_of(model: Model) -> dict[str, int]:
    """``memory_bytes`` of all weights with their scales, and ``disk_bytes`` of a file with them.

    The file is what ``torch.save`` writes of the state, where tied weights stand once: every method can be saved so.
    """
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return {"memory_bytes": sum(size for _, size in _parts(model)), "disk_bytes": file.getbuffer().nbytes}


def _parts(model: Model) -> list[tuple[int, int]]:
    """(weights, bytes) of each tensor of the state, each storage once."""
    seen: set[int] = set()
    found = []

    def visit(value: object) -> None:
        if isinstance(value, tuple | list):  # torch.ao's packed weight and bias
            for part in value:
                visit(part)
        if not isinstance(value, Tensor) or not value.numel():
            return
        if hasattr(value, "__tensor_flatten__"):  # torchao's: codes and scales
            names, _ = value.__tensor_flatten__()
            inner = [getattr(value, name) for name in names]
            found.append((value.numel(), sum(part.numel() * part.element_size() for part in inner)))
        elif value.is_quantized:  # a float64 scale and an int64 zero point for each output
            found.append((value.numel(), value.numel() * value.element_size() + 16 * len(value)))
        elif value.data_ptr() not in seen:
            seen.add(value.data_ptr())
            found.append((value.numel(), value.numel() * value.element_size()))

    for value in model.state_dict().values():
        visit(value)
    return found


def speeds(bench: Bench, model: Model) -> dict[str, float]:
    """``<task>_speedup`` with its interval for each workload, interleaved with the full model."""
    row = {}
    for work in bench.workloads:
        if model is bench.full:
            row |= {f"{work.task}_speedup{side}": 1.0 for side in ("", "_lo", "_hi")}
            continue
        seconds = timing.pair_seconds(bench.full, model, work, bench.rounds)
        ratio = timing.ratio_interval(np.divide(*seconds), bench.judge.seed)
        row |= {f"{work.task}_{name}": value for name, value in ratio.items()}
    return row
