"""What this package does with one architecture: exact, refused with a reason, or wrong.

python tests/architectures/checks.py gemma3_text     # one row, as JSON
"""

import contextlib
import copy
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent))
from tiny import VOCAB, configurations, tiny_model

from paper_src import InputError, NotSupported
from paper_src.coalitions import Evaluator
from paper_src.compaction import compact, save
from paper_src.models import StandIn, decoder_layers, locate_layers
from paper_src.recovery import closed_form
from paper_src.scoring import score_layers

TOKENS, NEW = 12, 4
LAST_BIT = 2e-6  # of float32: sums of the same numbers elsewhere in memory
KEPT = [
    (0, 1, 2, 3, 4, 5, 6, 7), (0, 1, 2, 3, 4, 6, 7), (0, 1, 2), (1, 3, 4), (0, 2, 4, 6), (1, 3, 5, 7), (0, 7), (3,),
]  # fmt: skip


class Wrong(Exception):
    """Something was done, and it is not what it should be."""


class Bypassed(StandIn):
    """A layer that hands its input on, in the form in which the layer hands on its output."""

    def forward(self, *args, **kwargs) -> Tensor | tuple:
        if not args and "hidden_states" not in kwargs:
            raise NotSupported("layers without hidden states: nothing to compare with")
        hidden = args[0] if args else kwargs["hidden_states"]
        before = [value for name, value in kwargs.items() if name.startswith("prev")]  # what is handed on beside it
        before = before or list(args[1:2])
        rest = self.rest if not self.rest or len(before) != 1 else [*self.rest[:-1], before[0]]
        return (hidden, *rest) if self.rest is not None else hidden


def blocks_of(count: int, length: int = TOKENS, seed: int = 0) -> Tensor:
    """(count, length) token ids without the special ones."""
    return torch.randint(3, VOCAB - 6, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, blocks: Tensor) -> Tensor:
    """(N, T, V) of token ids (N, T)."""
    return model(input_ids=blocks, use_cache=False).logits


def bypassed(model: PreTrainedModel, kept: Sequence[int], blocks: Tensor) -> Tensor:
    """Logits of the whole model in which the other layers hand on what they get."""
    whole, outputs = copy.deepcopy(model), {}
    path, layers = locate_layers(whole)
    hooks = [layer.register_forward_hook(lambda module, args, out, n=n: outputs.setdefault(n, out))
             for n, layer in enumerate(layers)]  # fmt: skip
    logits(whole, blocks)
    for hook in hooks:
        hook.remove()
    for n, layer in enumerate(layers):
        if n not in kept:
            stand_in = Bypassed(layer)
            stand_in.rest = list(outputs[n][1:]) if isinstance(outputs.get(n), tuple | list) else None
            whole.set_submodule(f"{path}.{n}", stand_in)
    return logits(whole, blocks)


def same(a: Tensor, b: Tensor, what: str, limit: float = 0.0) -> None:
    """Raise Wrong unless two tensors differ by at most ``limit`` of the largest value."""
    if a.shape != b.shape or not torch.isfinite(a).all():
        raise Wrong(f"{what}: shapes {tuple(a.shape)}, {tuple(b.shape)}, or not finite")
    if (gap := float((a - b).abs().max() / b.abs().max())) > limit:
        raise Wrong(f"{what} off by {gap:.2g} of the largest value")


def check_cut(model: PreTrainedModel, kept: Sequence[int]) -> None:
    """A cut model is the full one with layers bypassed, also saved and loaded, and generates with its cache."""
    blocks = blocks_of(2)
    small = compact(model, kept)
    expected = bypassed(model, kept, blocks)
    same(logits(small, blocks), expected, "logits", LAST_BIT)
    with tempfile.TemporaryDirectory() as folder:
        save(small, None, Path(folder) / "out", "tiny", kept, len(decoder_layers(model)))
        again = type(model).from_pretrained(Path(folder) / "out", dtype=torch.float32).eval()
    loaded(again, small)
    if (trouble := outcome(check_cache, again)) != "exact" == outcome(check_cache, model):
        raise Wrong(f"unlike the full model's, {trouble.removeprefix('wrong: ')}")


def loaded(again: PreTrainedModel, small: PreTrainedModel) -> None:
    """The same weights, and the same logits: where they lie in memory may change their last bit."""
    old, new = small.state_dict(), again.state_dict()
    if old.keys() != new.keys() or any(not torch.equal(old[name], new[name]) for name in old):
        raise Wrong("weights after loading differ")
    blocks = blocks_of(2)
    same(logits(again, blocks), logits(small, blocks), "logits after loading", LAST_BIT)


def check_cache(model: PreTrainedModel) -> None:
    """It writes the same with and without its cache."""
    written = [model.generate(blocks_of(1), attention_mask=torch.ones(1, TOKENS, dtype=torch.long), do_sample=False,
                              max_new_tokens=NEW, min_new_tokens=NEW, use_cache=cache, pad_token_id=0,
                              return_dict_in_generate=True, output_logits=True) for cache in (False, True)]  # fmt: skip
    same(torch.stack(written[1].logits), torch.stack(written[0].logits), "generation with the cache", 1e-3)


def check_evaluator(model: PreTrainedModel) -> None:
    """Losses of subsets are those of the cut models, on every block."""
    blocks = blocks_of(3)
    depth = len(decoder_layers(model))
    for kept in (layers for layers in KEPT[:5] if layers[-1] < depth and outcome(compact, model, layers) == "exact"):
        expected = bypassed(model, kept, blocks)[:, :-1]
        nll = functional.cross_entropy(expected.flatten(0, 1).float(), blocks[:, 1:].flatten())
        same(torch.tensor(Evaluator(model, blocks)(kept)), nll, f"loss of {kept}", 1e-4)


def check_scores(model: PreTrainedModel) -> None:
    """Fisher and Taylor scores of each sequence and layer are autograd's."""
    blocks, layers = blocks_of(3), decoder_layers(model)
    found = score_layers(model, blocks, batch_size=2).per_sequence
    fisher, taylor = torch.zeros(3, len(layers)), torch.zeros(3, len(layers))
    for row, block in enumerate(blocks):
        model.zero_grad(set_to_none=True)
        out = model(input_ids=block[None], use_cache=False).logits.float()
        functional.cross_entropy(out[0, :-1], block[1:]).backward()
        for column, layer in enumerate(layers):
            pairs = [(p.grad, p.detach()) for p in layer.parameters() if p.grad is not None]
            fisher[row, column] = sum(float(g.square().sum()) for g, _ in pairs)
            taylor[row, column] = abs(sum(float((g * p).sum()) for g, p in pairs))
    model.zero_grad(set_to_none=True)
    same(found["fisher"].float(), fisher, "Fisher", 1e-3)
    same(found["taylor"].float(), taylor, "Taylor", 1e-3)


def check_closed_form(model: PreTrainedModel) -> None:
    """The refitted model loads as it is, and its states are nearer than those of the cut one."""
    depth, blocks = len(decoder_layers(model)), blocks_of(24, 32)
    kept = [layer for layer in range(depth) if layer not in (1, 4, depth - 2)]
    found = closed_form(model, kept, blocks, batch_size=4)
    for row in found.refits:
        if not row["error_after"] <= row["error_before"]:
            raise Wrong(f"layer {row['layer']} is refitted to a larger error")
    with tempfile.TemporaryDirectory() as folder:
        save(found.model, None, Path(folder) / "out", "tiny", kept, len(decoder_layers(model)), trained=True)
        again = type(model).from_pretrained(Path(folder) / "out", dtype=torch.float32).eval()
    loaded(again, found.model)


def outcome(check: Callable, *args: object) -> str:
    """``exact``, ``refused: why``, ``wrong: how`` or ``error: what``."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            check(*args)
    except InputError as error:
        return f"refused: {error}"
    except Wrong as error:
        return f"wrong: {error}"
    except Exception as error:
        return f"error: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    return "exact"


def examined(name: str) -> dict[str, object]:
    """The row of one model type."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    try:
        model = tiny_model(configurations()[name])
        logits(model, blocks_of(2))
    except Exception as error:
        return {"architecture": name, "built": f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"}
    row: dict[str, object] = {"architecture": name, "built": ""}
    try:
        depth = len(decoder_layers(model))
        kept = [layers for layers in KEPT if layers[-1] < depth]
    except InputError as error:
        return row | {"cut": [f"refused: {error}"]}
    row["cut"] = [outcome(check_cut, model, layers) for layers in kept]
    row["evaluator"] = outcome(check_evaluator, model)
    row["scores"] = outcome(check_scores, model)
    row["closed_form"] = outcome(check_closed_form, model)
    return row


if __name__ == "__main__":
    for architecture in sys.argv[1:]:
        print(json.dumps(examined(architecture)), flush=True)
