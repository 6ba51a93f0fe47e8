"""What makes the same tokens of training repair more: one change to the recipe at a time, judged on validation text.

    python benchmarks/recovery_levers.py FOLDER --results results/laptop [--levers base,rate_1e-3] [--seeds 0,1,2]

Every row has had the same number of token passes at the same k, from the layers that section 5 repaired. A seed
draws the calibration text, its order, and the closed form's text; a lever is compared with ``base`` of its seed. Runs
go on where they were killed; ``levers.csv`` in the folder has a row a run. Nothing here reads test text.
``tables/levers`` holds what it found, docs/recovery.md says what that means.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch.nn import functional

from paper_src import distillation, fidelity, models, recovery
from paper_src.baselines.depth import stepwise
from paper_src.compaction import compact
from paper_src.data import DOMAINS
from paper_src.layers import LayerRunner
from paper_src.sections.judge import Judge, calibration
from paper_src.selection import evenly_spaced, kept_tuple
from paper_src.support.packages import TEXTS

KINDS = ["wikitext-2", *DOMAINS]
HALF_FIRST = [*KINDS[:1] * 4, *KINDS[1:]]
BASE = distillation.Distillation(epochs=3, learning_rate=6e-4, patience=1000)
LEVERS = {
    "base": {},
    "rate_3e-4": {"learning_rate": 3e-4},
    "rate_1e-3": {"learning_rate": 1e-3},
    "rate_1.5e-3": {"learning_rate": 1.5e-3},
    "rate_2.5e-3": {"learning_rate": 2.5e-3},
    "half_the_batch": {"batch_size": 4},
    "half_the_batch_1e-3": {"batch_size": 4, "learning_rate": 1e-3},
    "quarter_of_the_batch": {"batch_size": 2},
    "windows_of_256": {"length": 256, "batch_size": 4},
    "windows_of_512": {"length": 512, "batch_size": 2},
    "one_pass": {"epochs": 1},
    "beta2_0.99": {"more": {"adam_beta2": 0.99}},
    "beta2_0.95": {"more": {"adam_beta2": 0.95}},
    "to_zero_in_a_line": {"more": {"lr_scheduler_type": "linear"}},
    "no_clipping": {"more": {"max_grad_norm": 0.0}},
    "weight_decay": {"more": {"weight_decay": 0.1}},
    "embeddings_and_head": {"embeddings": True},
    "divergence_alone": {"hidden": 0.0},
    "hidden_3": {"hidden": 3.0},
    "every_token_in_the_divergence": {"kl_every": 1},
    "an_eighth_in_the_divergence": {"kl_every": 8},
    "states": {"states": 0.3},
    "local_first": {"local": 1 / 3},
    "averaged": {"averaged": 0.9},
    "muon": {"muon": 2e-3},
    "muon_4096_tokens": {"muon": 4e-3, "batch_size": 32},
    "in_rounds": {"stages": 3},
    "cut_only": {"form": "none"},
    "linear_start": {"form": "mlp_map"},
    "refit_of_every_layer": {"reach": "all"},
    "four_times_the_closed_form": {"form_blocks": 512},
    "wikitext_alone": {"texts": KINDS[:1]},
    "kinds_alike": {"texts": KINDS},
    "with_packages": {"texts": [*KINDS[:1] * 3, *KINDS[1:], *TEXTS]},
    "packages_for_domains": {"texts": [*KINDS[:1] * 2, "c4", "multilingual", *TEXTS]},
    "evenly_spaced": {"kept": "even"},
}


class Varied(distillation.Distiller):
    """With the levers that transformers' Trainer has no argument for."""

    local, averaged, muon, states = 0.0, 0.0, 0.0, 0.0
    kept: tuple[int, ...] = ()
    average: dict | None = None

    def create_optimizer(self, *arguments):
        if self.muon and self.optimizer is None:
            matrices = [value for value in self.model.parameters() if value.requires_grad and value.ndim == 2]
            for value in self.model.parameters():
                value.requires_grad_(value.requires_grad and value.ndim == 2)
            self.optimizer = torch.optim.Muon(matrices, lr=self.muon, weight_decay=0.0,
                                              adjust_lr_fn="match_rms_adamw")  # fmt: skip
        return super().create_optimizer(*arguments)

    def _loss(self, model, inputs):
        """At first each kept layer alone: from the full model's states before it to those before the next one."""
        if self.state.global_step >= self.local * self.args.max_steps:
            return super()._loss(model, inputs) + (self.states and self.states * self._states(model, inputs))
        ids, depth = inputs["input_ids"], self.teacher.config.num_hidden_layers
        with torch.no_grad():
            known = self.teacher.base_model(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
        bounds, errors = [*self.kept, depth], []
        if not hasattr(self, "runner"):
            self.runner = LayerRunner(model)

        def job(index, layer, states):
            before, after = known[bounds[index]].float(), known[bounds[index + 1]].float()
            own = layer(before)
            if bounds[index + 1] == depth:  # the last known states are those behind the norm
                own = model.base_model.norm(own)
            error = (own - after).square().sum(-1) / after.square().sum(-1)
            turned = 1 - functional.cosine_similarity(own - before, after - before, dim=-1)
            errors.append((error + turned).mean())
            return states

        self.runner.drive(ids, job, gradients=True)
        return sum(errors) / len(errors)

    def _states(self, model, inputs):
        """The relative squared error |h - h'|^2 / |h|^2 of the states before each kept layer but the first."""
        wanted = {"input_ids": inputs["input_ids"], "use_cache": False, "output_hidden_states": True}
        with torch.no_grad():
            known = self.teacher.base_model(**wanted).hidden_states
        own, errors = model.base_model(**wanted).hidden_states, []
        for place, layer in enumerate(self.kept):
            if place:
                before = known[layer].float()
                errors.append((before - own[place].float()).square().sum(-1) / before.square().sum(-1))
        return sum(error.mean() for error in errors) / len(errors)

    def training_step(self, *arguments, **named):
        found = super().training_step(*arguments, **named)
        if self.averaged:
            own = self.model.state_dict()
            if self.average is None:
                self.average = {name: value.clone() for name, value in own.items()}
            for name, value in own.items():
                self.average[name].lerp_(value, 1 - self.averaged)
        return found

    def measure(self):
        if not self.average:
            return super().measure()
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        found = super().measure()
        if self.state.global_step < self.args.max_steps:  # the last state is what stays
            self.model.load_state_dict(own)
        return found


STARTS = {}


def begun(full, tokenizer, kept, how):
    """The compact model after its closed form, made once."""
    form, reach, count, texts, seed = how
    if form == "none":
        return compact(full, kept)
    if (kept, how) not in STARTS:
        blocks = calibration(tokenizer, texts, count, 128, 200 + seed)
        STARTS[kept, how] = recovery.closed_form(full, kept, blocks, form, reach).model
    return STARTS[kept, how]


def run(full, tokenizer, kept, change, seed, use, valid):
    """The model that a lever gives."""
    change = dict(change)
    length, texts = change.pop("length", 128), change.pop("texts", HALF_FIRST)
    form, reach = change.pop("form", "down_proj"), change.pop("reach", "gaps")
    form_blocks, stages = change.pop("form_blocks", 128), change.pop("stages", 1)
    special = {name: change.pop(name, 0.0) for name in ("local", "averaged", "muon", "states")}
    if change.pop("kept", None):
        kept = evenly_spaced(full.config.num_hidden_layers, len(kept))
    how = replace(BASE, seed=seed, **change)
    count = use.tokens // how.epochs // length
    how.evaluate_every = max(1, count // how.batch_size * how.epochs // use.looks)
    blocks = calibration(tokenizer, texts, count, length, 100 + seed)
    for name, value in (special | {"kept": tuple(kept)}).items():
        setattr(Varied, name, value)
    folder = use.folder / "runs"

    def train(small, blocks, stage=0):
        # the answers of a run's own text are those of all runs on that text
        return distillation.distil(full, small, blocks, valid.first, folder / f"{stage}{special}", how, print,
                                   folder / "answers")  # fmt: skip

    if stages > 1:
        parts = blocks[: count // how.batch_size * how.batch_size].split(
            how.batch_size * (count // how.batch_size // stages)
        )
        looks = []

        def one(small, part, stage):
            looks.append(train(small, part, stage))
            return looks[-1].model

        model = stepwise(full, kept, parts, one)
        return model, {name: sum(found.history[-1][name] for found in looks) for name in ("tokens", "seconds")}
    start = begun(full, tokenizer, tuple(kept), (form, reach, form_blocks, tuple(texts), seed))
    found = train(start, blocks)
    return found.model, {name: found.history[-1][name] for name in ("tokens", "seconds")}


def main():
    """Run what is missing; print and write the table after each run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--results", type=Path, default=Path("results/laptop"), help="with models/mean_state")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--kept", default="0 1 11 21 24 27 28 29")
    parser.add_argument("--tokens", type=int, default=98304, help="token passes of each run")
    parser.add_argument("--levers", default=",".join(LEVERS))
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--looks", type=int, default=2)
    use = parser.parse_args()
    use.folder.mkdir(parents=True, exist_ok=True)
    loaded = models.load_model(use.model)
    full, tokenizer, kept = loaded.model, loaded.tokenizer, kept_tuple(use.kept)
    mean = fidelity.load_mean(use.results / "models" / "mean_state.safetensors", loaded.digest)
    valid = Judge(full, tokenizer, KINDS, "valid", (16, 256), mean, 0, others=8)
    distillation.Distiller = Varied
    file = use.folder / "levers.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    for seed in map(int, use.seeds.split(",")):
        for name in use.levers.split(","):
            if any((row["lever"], row["seed"], row["budget"]) == (name, seed, use.tokens) for row in rows):
                continue
            model, spent = run(full, tokenizer, kept, LEVERS[name], seed, use, valid)
            row = valid.row(model)
            row = {"lever": name, "seed": seed, "budget": use.tokens, **spent, **row}
            rows.append(row)
            with file.open("a") as out:
                out.write(json.dumps({key: float(value) if hasattr(value, "item") else value
                                      for key, value in row.items()}) + "\n")  # fmt: skip
            table = pd.DataFrame(rows)
            table.to_csv(use.folder / "levers.csv", index=False)
            print(table[["lever", "seed", "ppl_ratio_mean", "ppl_ratio", "cosine", "kl_nats", "seconds"]].to_string(),
                  flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
