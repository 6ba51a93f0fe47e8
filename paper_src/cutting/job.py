"""The steps from a checkpoint to a smaller one, each within its share of the minutes, each resumable."""

import gc
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from paper_src import InputError, NotSupported, compaction, data, distillation, fidelity, models, recovery, timing
from paper_src.coalitions import Evaluator, leave_one_out
from paper_src.compaction import shown
from paper_src.cutting.report import report_files, strategy_title, task_title
from paper_src.cutting.request import Progress, Request
from paper_src.scale.store import Store
from paper_src.scoring import score_layers, weight_taylor
from paper_src.selection import (
    STRATEGIES,
    KeptLayers,
    Search,
    drop_block,
    evenly_spaced,
    kept_text,
    kept_tuple,
    sleb,
    top_k,
)
from paper_src.support.files import replacing
from paper_src.support.generation import generated

LENGTH = 128  # tokens of calibration blocks
KINDS = ("wikitext-2", "c4", "code", "technical", "multilingual")  # of text on which every result is tested
SEARCH, WRITTEN, REFIT, TEST = 0.2, 0.06, 0.08, 0.12  # shares of the minutes
HOPELESS = 5.0  # times the perplexity of the best candidate: no refit makes up for that
RATES = {0.7: 3e-4, 0.4: 4e-4, 0.0: 6e-4}  # learning rate from this share of the layers on
LEAST = 0.05  # of the minutes: less is not worth a training
SAVE = 0.03  # of the minutes: for the checkpoint and its report
LOOKS = 0.1  # of a training's time: for its looks at validation text, two to six of them
FEW = 8  # test windows that are too few for an interval
PASSES = 3  # over the blocks of the distillation: the full model answers each once
# tokens of test windows, too; shorter where the model reads no more
READ, WRITE = timing.Workload("prefill_hidden", 1, 512), timing.Workload("decode", 1, 128, 16)


class Job:
    """A model that is being cut; its methods are the steps, in their order.

    Args:
        request: what is asked for.
        say: called with a line of text whenever there is something to tell.
    """

    def __init__(self, request: Request, say: Callable[[str], None] = print):
        self.request, self._say = request.checked(), say
        self.progress = Progress(self.request)
        self.warnings: list[str] = list(self.progress.get("warnings") or [])
        self.own_text = 0  # tokens of calibration text that the model wrote itself
        self._measured = 0.0

    def say(self, line: str) -> None:
        """Tell a line, with the time that is left."""
        minutes, seconds = divmod(round(self.progress.left), 60)
        self._say(f"{line} (about {minutes}:{seconds:02d} left)")

    # --- the model and the text --------------------------------------------------------------------------

    def load(self) -> models.Loaded:
        """The full model; how many of its layers are to be kept is known then, too."""
        use = self.request
        self.loaded = models.load_model(use.model, use.dtype, use.device)
        self.full, self.tokenizer = self.loaded.model, self.loaded.tokenizer
        self._require_same("digest", self.loaded.digest, "weights")
        _require_causal(self.full)
        self.depth = len(models.decoder_layers(self.full))
        longest = getattr(self.full.config.get_text_config(), "max_position_embeddings", None) or READ.length
        if longest < LENGTH + WRITE.new_tokens:
            raise InputError(f"{use.model} reads {longest} tokens at most: {LENGTH + WRITE.new_tokens} are needed")
        self.read_length = min(READ.length, longest)
        self.works = (
            replace(READ, length=self.read_length),
            replace(WRITE, length=min(WRITE.length, longest - WRITE.new_tokens)),
        )
        self.k = self._number()
        self.say(f"{use.model}: {models.count_parameters(self.full):,} parameters, {self.k} of {self.depth} layers are "
                 "to be kept")  # fmt: skip
        if (Path(use.out).expanduser() / "report.html").is_file():
            self.say(f"{use.out} is there already: it is made anew, and replaced at the end")
        return self.loaded

    def _require_same(self, name: str, value: object, what: str) -> None:
        if self.progress.get(name) not in (None, value):
            raise InputError(f"{self.progress.folder} is of other {what}: delete it, or give another --out")
        self.progress.put(name, value)

    def _number(self) -> int:
        """k: from the share, the number or the speed that is asked for."""
        use = self.request
        if use.layers:
            return len(use.layers)
        if use.keep:
            return models.layer_counts([use.keep if use.keep < 1 else int(use.keep)], self.depth)[0]
        work, prompt = self.works[0], timing.random_prompt(self.full, self.works[0], 0)
        flops = {k: timing.count_flops(compaction.compact(self.full, evenly_spaced(self.depth, k)), work, prompt)
                 for k in (self.depth, self.depth // 2)}  # fmt: skip
        layer = (flops[self.depth] - flops[self.depth // 2]) / (self.depth - self.depth // 2)
        fixed = flops[self.depth] - self.depth * layer
        k = int((flops[self.depth] / use.speed - fixed) / layer)
        if k < 1:
            most = flops[self.depth] / (fixed + layer)
            raise InputError(f"speed {use.speed}: with a single layer this model is {most:.2f} times as fast, by its "
                             "operations")  # fmt: skip
        return min(k, self.depth - 1)

    def read(self) -> dict[str, int]:
        """Text -> characters to calibrate on; a text that is missing or too short is an error."""
        self.names = list(self.request.texts) or ["wikitext-2"]
        found, digests = {}, {}
        for name in self.names:
            for split in ("train", "valid", "test"):
                text, digests[f"{name} {split}"] = data.load_text(name, split)
                if split == "train":
                    found[name] = len(text)
                _as_many(self.tokenizer, text, 2, LENGTH, 0, name)
        self._require_same("texts", digests, "texts")
        return found

    def blocks(self, split: str, count: int, seed: int) -> Tensor:
        """(n, LENGTH) token ids, n at most ``count``, of all texts alike, shuffled; fewer where they are short."""
        each = max(2, -(-count // len(self.names)))
        texts = {name: data.load_text(name, split)[0] for name in self.names}
        parts = [_as_many(self.tokenizer, text, each, LENGTH, seed, name) for name, text in texts.items()]
        mixed = torch.cat(parts)
        return mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(seed))][:count]

    def calibration(self, count: int) -> Tensor:
        """Calibration blocks; without a text of the reader's, a share of them is written by the model itself."""
        blocks = self.blocks("train", count, self.request.seed + 1)
        if self.request.texts or not len(own := self._written()[: count // 4]):
            return blocks
        self.own_text = max(self.own_text, own.numel())
        mixed = torch.cat([blocks[: count - len(own)], own])
        return mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(self.request.seed))]

    def _written(self, at_once: int = 16) -> Tensor:
        """Blocks that the model writes within their share of the minutes; none where that is too short."""
        prompts, share = self.blocks("train", 64, self.request.seed + 2)[:, :8], WRITTEN * self.progress.limit
        folder = self.progress.folder / "written"

        def write(count: int) -> Tensor:
            return generated(self.full, prompts, count, LENGTH, self.request.seed, folder, at_once)

        if (count := self.progress.get("written")) is None:
            count = 0
            a_token = _seconds(lambda: self._passed(prompts[:at_once, :1]))
            if self.progress.limit >= 600 and LENGTH * a_token < 2 * share:
                count = at_once * min(16, max(1, int(share / _seconds(lambda: write(at_once)))))
                self.say(f"the model writes {count * LENGTH:,} tokens of calibration text")
            self.progress.put("written", count)
        return write(int(count))

    # --- which layers ------------------------------------------------------------------------------------

    def search(self) -> list[dict[str, object]]:
        """A row for each candidate, best first: name, kept layers, ``ppl_ratio`` on validation text after a refit."""
        self.valid = self._watched()
        self.valid_nll = fidelity.compare_states(self.full, self.valid, self.valid.hidden, ["nll_nats"])["nll_nats"]
        if (known := self.progress.get("candidates")) is None:
            rows, blocks = [], self.blocks("train", 16, self.request.seed + 1)
            candidates = self._candidates().items()
            cut = {(name, kept): self._ratio(compaction.compact(self.full, kept)) for name, kept in candidates}
            for (name, kept), before in cut.items():
                near = len(cut) > 1 and before < HOPELESS * min(cut.values())
                after = self._ratio(self._refitted(kept, blocks)) if near else before
                row = {"name": name, "kept": kept_text(kept), "cut": before, "ppl_ratio": after, "refitted": near}
                rows.append(row)
                then = f"{after:.2f} refitted" if near else "not refitted"
                self.say(f"{strategy_title(name)}: {before:.2f} times the full perplexity, {then}")
            self.progress.put("warnings", self.warnings)
            known = self.progress.put("candidates", sorted(rows, key=lambda row: row["ppl_ratio"]))
        self.kept = kept_tuple(known[0]["kept"])
        self.say(f"kept layers: {known[0]['kept']}")
        return known

    def _candidates(self) -> dict[str, KeptLayers]:
        """Strategy -> kept layers: the one that is asked for, or those there is time for."""
        wanted, k = self.request.strategy, self.k
        if self.request.layers:
            return {"given": tuple(self.request.layers)}
        if k == self.depth:
            return {"evenly_spaced": tuple(range(k))}
        tokens = self._search_tokens()
        if wanted:
            return {wanted: self._one(wanted, max(tokens, LENGTH))}
        scores = score_layers(self.full, self.blocks("train", 16, self.request.seed + 1), batch_size=4)
        found = {"shortgpt": top_k(scores.mean("block_influence"), k), "drop_block": drop_block(scores.angular, k)}
        if tokens >= LENGTH:
            try:
                found |= {"sleb": self._one("sleb", tokens)}
            except NotSupported as error:
                self.warn(f"no search, layers are chosen by scores alone: {error}")
        else:
            self.warn("too little time to search: layers are chosen by scores alone")
        by_layers = {kept: name for name, kept in found.items()}  # of the same layers the last name stays
        return {name: kept for kept, name in by_layers.items()}

    def _search_tokens(self) -> int:
        """Tokens of text on which greedy removal ends within its share of the minutes, a multiple of ``LENGTH``."""
        # candidates share half of their layers, and the head costs as much again
        passes = sum(n * n for n in range(self.k + 1, self.depth + 1)) / self.depth
        return min(4096, int(SEARCH * self.progress.limit / (passes * self._a_token())) // LENGTH * LENGTH)

    def _one(self, name: str, tokens: int) -> KeptLayers:
        """The layers that one strategy keeps, on so many tokens of calibration text."""
        strategy, blocks = STRATEGIES[name], self.blocks("train", max(1, tokens // LENGTH), self.request.seed + 3)
        store = Store(self.progress.folder / "evaluations.sqlite", self.full)
        match strategy.needs:
            case "depth":
                return strategy.function(self.depth, self.k)
            case "search":
                self.say(f"{strategy.title}: searches on {blocks.numel():,} tokens")
                whole = Evaluator(self.full, blocks, store=store)
                looks = [Evaluator(self.full, blocks[: -(-len(blocks) // 4)], store=store), whole, whole]
                evolution = {"generations": 15, "offspring": 16, "initial": 32, "seed": self.request.seed}
                greedy = {"sleb": sleb(looks[1], self.k)} if strategy.builds_on else {}
                return strategy.function(Search(looks, evolution=evolution, found=greedy), self.k)
            case "angular":
                return strategy.function(score_layers(self.full, blocks, batch_size=4).angular, self.k)
            case "leave_one_out":
                (losses,) = leave_one_out([Evaluator(self.full, blocks, store=store)])
                return strategy.function(losses, self.k)
            case "weight_taylor":
                return strategy.function(weight_taylor(self.full, blocks[:16]), self.k)
            case score:
                return strategy.function(score_layers(self.full, blocks, batch_size=4).mean(score), self.k)

    @torch.no_grad()
    def _passed(self, blocks: Tensor) -> None:
        self.full(input_ids=blocks.to(self.full.device), use_cache=False)

    # --- repair ------------------------------------------------------------------------------------------

    def refit(self) -> PreTrainedModel:
        """The compact model after the closed form, or as it was cut where this family has none."""
        if (count := self.progress.get("refit_blocks")) is None:
            count = max(16, min(192, int(REFIT * self.progress.limit / (1.5 * self._a_token())) // LENGTH))
        blocks, path = self.calibration(int(count)), self.progress.folder / "refitted.safetensors"
        if self.progress.get("refit_blocks"):
            self.small = _changed_(compaction.compact(self.full, self.kept), load_file(path))
        else:
            self.small = self._refitted(self.kept, blocks, warn=True)
            weights = {name: self.small.get_parameter(name) for name in _changed_names(self.small, self.full)}
            with replacing(path) as part:
                save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, part)
            self.progress.put("warnings", self.warnings)
            self.progress.put("refit_blocks", count)
        self.tokens = {"refit": blocks.numel() if _changed_names(self.small, self.full) else 0, "distilled": 0}
        done = f"refitted on {blocks.numel():,} tokens" if self.tokens["refit"] else "cut"
        self.say(f"{done}: perplexity {self._ratio(self.small):.2f} times the full model's")
        return self.small

    def _refitted(self, kept: Sequence[int], blocks: Tensor, warn: bool = False) -> PreTrainedModel:
        try:
            return recovery.closed_form(self.full, kept, blocks, batch_size=min(8, len(blocks) // 2)).model
        except NotSupported as error:
            if warn:
                self.warn(f"no closed form: {error}")
            return compaction.compact(self.full, kept)

    def distil(self) -> list[dict[str, float]]:
        """Trains with what is left of the minutes; rows of the looks at validation text, none without a training."""
        self.recovered, settings = self.small, self._settings()
        if settings is None:
            return []
        folder = self.progress.folder / "distillation"
        blocks = self.calibration(int(self.progress.get("distil_blocks")))
        settings = settings.with_looks(int(self.progress.get("looks")), len(blocks))
        found = distillation.distil(self.full, self.small, blocks, self.valid, folder, settings, progress=self._look)
        self.recovered, last = found.model, found.history[-1]
        self.tokens["distilled"] = int(last["tokens"])
        if self.recovered is self.small:
            self.warn("the distillation did not help: the refitted model is kept")
        return found.history

    def _settings(self) -> distillation.Distillation | None:
        """How to distil in the time that is left when what follows is taken off; None where that is too little."""
        share = self.k / self.depth
        rate = next(rate for least, rate in RATES.items() if share >= least)
        settings = distillation.Distillation(epochs=PASSES, learning_rate=rate, seed=self.request.seed)
        if (count := self.progress.get("distil_blocks")) is None:
            if (needed := self._training_bytes()) > (free := _free_bytes(self.full)):
                self.warn(f"no distillation: it needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free")
                return None
            count = self.progress.put("distil_blocks", self._affordable(settings))
        if not count:
            self.warn("no distillation: too few minutes are left")
            return None
        self.say(f"distils on {count * LENGTH:,} tokens, {PASSES} times")
        return settings

    def _affordable(self, settings: distillation.Distillation) -> int:
        """Blocks on which there is time to distil; 0 if that is not worth the while."""
        if self.progress.left - self._reserve() < LEAST * self.progress.limit:
            return 0
        steps, folder = 4, self.progress.folder / "trial"
        trial = distillation.Distillation(batch_size=settings.batch_size, learning_rate=1e-12, evaluate_every=steps)
        blocks = self.blocks("train", steps * trial.batch_size, self.request.seed + 4)
        if len(blocks) < trial.batch_size:
            return 0
        last = distillation.distil(self.full, self.small, blocks, self.valid.head(1), folder, trial).history[-1]
        shutil.rmtree(folder, ignore_errors=True)
        rest = self.progress.left - self._reserve()
        a_look = _seconds(lambda: fidelity.compare(self.small, self.valid))
        looks = self.progress.put("looks", max(2, min(6, int(LOOKS * rest / a_look))))
        rest -= (looks + 2) * a_look
        # where answers are known, steps are shorter
        count = int(rest / (last["seconds"] / last["step"]) * settings.batch_size / PASSES * 1.15)
        return count if count >= 4 * settings.batch_size else 0

    def _reserve(self) -> float:
        """Seconds that testing, timing and saving take, about."""
        own, others = self._windows()
        count = own * len(self.names) + others * len(set(KINDS) - set(self.names))
        runs = 30 * READ.length + 40 * (WRITE.length + 20 * WRITE.new_tokens)  # rounds of both models, a warm-up
        return self._a_token() * (5 * count * self.read_length + runs) + SAVE * self.progress.limit

    def _training_bytes(self) -> int:
        trained = models.count_parameters(self.small)
        parts = {self.small.get_input_embeddings(), self.small.get_output_embeddings()} - {None}
        frozen = models.count_parameters(nn.ModuleList(parts))
        return 4 * trained + 12 * (trained - frozen)

    def _look(self, line: str) -> None:
        self.progress.put("looked", line)  # and with it the time that a killed run has used
        self.say(line)

    # --- what came of it ---------------------------------------------------------------------------------

    def test(self) -> list[dict[str, object]]:
        """A row for each kind of text and model: perplexity, ratio to the full model's with its interval, cosine."""
        cut = compaction.compact(self.full, self.kept)
        models_ = {"cut": cut, "refitted": self.small, "recovered": self.recovered}
        rows = []
        for kind in dict.fromkeys([*self.names, *KINDS]):
            try:
                text, _ = data.load_text(kind, "test")
                count = self._windows()[kind not in self.names]
                blocks = _as_many(self.tokenizer, text, count, self.read_length, self.request.seed, kind)
            except InputError as error:
                self.warn(f"not tested on {kind}: {error}")
                continue
            full = fidelity.reference(self.full, blocks, batch_size=4, metrics=("cosine", "nll_nats"))
            own = fidelity.compare_states(self.full, full, full.hidden, ["nll_nats"])["nll_nats"]
            rows.append({"text": kind, "model": "full", "n_windows": len(blocks), **_quality(own, own), "cosine": 1.0})
            for name, model in models_.items():
                found = fidelity.compare(model, full, 4, ("cosine", "nll_nats"))
                rows.append({"text": kind, "model": name, "n_windows": len(blocks), **_quality(found["nll_nats"], own),
                             "cosine": float(found["cosine"].mean())})  # fmt: skip
            self.say(f"{kind}: recovered {rows[-1]['ppl_ratio']:.2f} times the full model's perplexity")
        self._warn_of_quality(rows)
        if rows and (least := min(row["n_windows"] for row in rows)) < FEW:
            self.warn(f"as few as {least} test windows: intervals are rough, more minutes give more windows")
        return rows

    def _warn_of_quality(self, rows: Sequence[dict[str, object]]) -> None:
        """Notes on texts where the repair did harm, or the full model knows nothing."""
        by = {(row["text"], row["model"]): row for row in rows}
        kinds, guess = dict.fromkeys(kind for kind, _ in by), self.full.config.get_text_config().vocab_size
        harmed = [shown(kind) for kind in kinds if by[kind, "recovered"]["ppl"] > by[kind, "cut"]["ppl"]]
        unknown = [shown(kind) for kind in kinds if by[kind, "full"]["ppl"] > guess]
        if harmed:
            self.warn(f"on {', '.join(harmed)} the repaired model is worse than the cut one")
        if unknown:
            self.warn(f"on {', '.join(unknown)} the full model itself is worse than a uniform guess")

    def time(self) -> list[dict[str, object]]:
        """A row for reading a prompt and one for writing: seconds of full over recovered, with their interval.

        The cut model before its repair has the recovered one's shapes, and so its speed.
        """
        rows = []
        for work in self.works:
            try:
                (row,) = timing.compare_speed(self.full, {self.k: self.recovered}, work, 9, self.request.seed)
            except NotSupported as error:
                self.warn(str(error))
                continue
            del row["seconds"]
            if not row["quiet"]:
                self.warn(f"timed while other programs were at work, or rounds differ by much: {task_title(row)}")
            rows.append(row)
            self.say(f"{task_title(row)}: {row['speedup']:.2f} times as fast as the full model")
        return rows

    def save(self, tested: list[dict[str, object]], timed: list[dict[str, object]]) -> Path:
        """Writes the checkpoint, its card and its report, loads it once, and compares; returns its folder.

        Raises:
            InputError: it does not load as the model that was saved; then there is no folder.
        """
        use, out = self.request, Path(self.request.out).expanduser()
        if self.k < self.depth / 2:
            self.warn("below half of the layers, multiple-choice tasks are near chance: test yours")
        if use.texts:
            self.warn("calibrated on the given text only: other kinds are what the table says")
        if (spent := self.progress.spent / 60) > 1.25 * use.minutes:
            self.warn(f"it took {spent:.1f} minutes, not {use.minutes:g}: loading, testing and timing take theirs")
        final = self._as_stored()
        files, card = report_files(self, final, tested, timed)
        new = bool(_changed_names(self.recovered, self.full))
        compaction.save(final, self.tokenizer, out, use.model, self.kept, self.depth, self.chosen_by, new, card, files)
        self._require_reload(out, final)
        shutil.rmtree(self.progress.folder, ignore_errors=True)
        self._say(f"saved: {out} (open {out / 'report.html'})")
        return out

    @property
    def chosen_by(self) -> str:
        """The strategy whose layers are kept, and its source."""
        name = self.progress.get("candidates")[0]["name"]
        return f"{STRATEGIES[name].title} ({STRATEGIES[name].source})" if name in STRATEGIES else "the reader"

    def _as_stored(self) -> PreTrainedModel:
        """The recovered model in the checkpoint's own dtype: what no repair has changed, bit for bit."""
        stored = self.loaded.stored
        if stored in (None, self.recovered.dtype) or stored not in (torch.float32, torch.float16, torch.bfloat16):
            return self.recovered
        original = models.load_model(self.request.model, str(stored).removeprefix("torch."), self.request.device)
        final = compaction.compact(original.model, self.kept)
        repaired = dict(self.recovered.named_parameters())
        changed = {name: repaired[name].detach().to(stored) for name, parameter in final.named_parameters()
                   if not torch.equal(parameter.to(repaired[name].dtype), repaired[name])}  # fmt: skip
        return _changed_(final, changed)

    def _require_reload(self, out: Path, final: PreTrainedModel) -> None:
        again = models.load_model(str(out), str(final.dtype).removeprefix("torch."), self.request.device).model
        blocks = self.blocks("valid", 2, 0).to(final.device)
        with torch.no_grad():
            own, other = (model(input_ids=blocks, use_cache=False).logits.float() for model in (final, again))
        if not (own - other).norm() <= 0.01 * own.norm():
            shutil.rmtree(out, ignore_errors=True)
            raise InputError(f"{type(final).__name__} loads as another model than was saved: nothing is kept")

    def warn(self, line: str) -> None:
        """Keep a line for the report, and tell it."""
        if line not in self.warnings:
            self.warnings.append(line)
            self.say(f"note: {line}")

    # --- helpers -----------------------------------------------------------------------------------------

    def _watched(self) -> fidelity.Reference:
        """The full model's answers to validation text; a gigabyte of probabilities at most."""
        vocabulary = self.full.config.get_text_config().vocab_size
        count = max(4, min(16, int(1e9 / (4 * LENGTH * vocabulary))))
        mean = fidelity.mean_state(self.full, self.blocks("train", 16, self.request.seed + 1))
        return fidelity.reference(self.full, self.blocks("valid", count, self.request.seed), mean)

    def _ratio(self, model: PreTrainedModel) -> float:
        """Perplexity over the full model's, on validation text."""
        nll = fidelity.compare(model, self.valid, metrics=["nll_nats"])["nll_nats"]
        return fidelity.ppl_ratio(nll, self.valid_nll)["ppl_ratio"]

    def _windows(self) -> tuple[int, int]:
        """Test windows of each own text, and of each other kind, for their share of the minutes."""
        if (known := self.progress.get("windows")) is None:
            window = 3.5 * self.read_length * self._a_token()  # through the full model and three smaller ones
            half = TEST / 2 * self.progress.limit / window
            others = max(1, len(set(KINDS) - set(self.names)))
            known = [max(4, min(16, int(half / len(self.names)))), max(2, min(16, int(half / others)))]
            self.progress.put("windows", known)
        return tuple(known)

    def _a_token(self) -> float:
        """Seconds of the full model for a token that is read, its logits with it."""
        if not self._measured:
            blocks = self.blocks("valid", 4, 0)
            self._passed(blocks[:1])  # warms up
            self._measured = _seconds(lambda: self._passed(blocks)) / blocks.numel()
        return self._measured


def cut(model: str, out: str | Path, keep: float = 0.0, say: Callable[[str], None] = print, **settings: object) -> Path:
    """Cuts a model: loads, chooses layers, cuts, repairs, tests, times and saves; returns the checkpoint's folder.

    Args:
        model: registry name, local folder or ``.gguf`` file, or hub id.
        out: folder of the new checkpoint, with its report.
        keep: layers to keep: their number, or a share below 1. Or give ``speed`` instead.
        say: called with a line of text whenever there is something to tell.
        settings: the other fields of :class:`Request`: speed, layers, minutes, texts, strategy, dtype, device, seed.

    Raises:
        InputError: something that was given cannot be used; one line says what.
    """
    job = Job(Request(str(model), str(out), keep, **settings), say)
    job.load()
    job.read()
    job.search()
    job.refit()
    job.distil()
    return job.save(job.test(), job.time())


def _as_many(tokenizer: object, text: str, count: int, length: int, seed: int, name: str) -> Tensor:
    """:func:`data.as_many`; the error names the text."""
    try:
        return data.as_many(tokenizer, text, count, length, seed)
    except InputError as error:
        reason = f"a part of it (of training, validation or test) holds no {length} tokens"
        raise InputError(f"{name} is too short: {reason}") from error


@torch.no_grad()
def _require_causal(model: PreTrainedModel) -> None:
    """Raise where a token's state depends on the tokens behind it: such a model writes no text."""
    ids = torch.arange(4, device=model.device)[None]
    before, after = (models.last_hidden(model, text)[:, :-1] for text in (ids, ids.where(ids < 3, 4)))
    if not models.same_states(model, after, before):
        raise InputError(f"{type(model).__name__} reads tokens that come later (an encoder?): give a model that writes")


def _changed_names(small: PreTrainedModel, full: PreTrainedModel) -> list[str]:
    """Weights that a repair has changed: a compact model shares all others with the full one."""
    own = {parameter.data_ptr() for parameter in full.parameters()}
    return [name for name, parameter in small.named_parameters() if parameter.data_ptr() not in own]


def _changed_(small: PreTrainedModel, weights: dict[str, Tensor]) -> PreTrainedModel:
    """``small`` with new weights; the old ones are left alone, for they are another model's as well."""
    for name, weight in weights.items():
        path, _, last = name.rpartition(".")
        setattr(small.get_submodule(path), last, nn.Parameter(weight.to(small.device)))
    return small


def _quality(nll: np.ndarray, full: np.ndarray) -> dict[str, float]:
    return {"ppl": math.exp(nll.mean()), **fidelity.ppl_ratio(nll, full)}


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _free_bytes(model: PreTrainedModel) -> int:
    """Memory that is free where the model is."""
    gc.collect()
    on_gpu = model.device.type == "cuda"
    return torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
