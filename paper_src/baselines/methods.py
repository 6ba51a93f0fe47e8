"""The methods of section 7, each a function and an entry in ``METHODS``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from paper_src import recovery, selection
from paper_src.baselines import control, depth, low_rank, quantization, sparsity, width
from paper_src.baselines.replace_me import replace_me
from paper_src.baselines.setting import Setting
from paper_src.compaction import compact


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        title: as it stands in tables and figures.
        family: full, quantization, sparsity, width, low rank, depth or combination.
        source: paper or library.
        function: (setting, k) -> model; k is 0 where its size is not free.
        sized: whether it is given the parameter count of the compact model of k layers.
        bits: of a weight in the layers; None are those of the full model.
        training: ``none`` where its weights cannot be trained, ``plain``, ``masked`` where zeros stay zeros, or
            ``whole``, embedding and head as well; or, of the compact model that another method has as it is, ``tail``,
            its last layers alone, and ``stepwise``, a few layers cut at a time.
        needs: parts of the setting that it uses; the seconds of those made once count for each method.
        repair: what its model has had when it is made: none, closed_form or distilled.
        refit: (setting, k) -> the same model fitted in closed form, from which its training starts; None where its
            algebra has none, or where ``function`` has done it.
        start: what its training starts from: as_it_is, closed_form or random.
        control: whether it is there to be beaten.
    """

    title: str
    family: str
    source: str
    function: Callable[[Setting, int], PreTrainedModel]
    sized: bool = False
    bits: int | None = None
    training: str = "none"
    needs: tuple[str, ...] = ()
    repair: str = "none"
    refit: Callable[[Setting, int], PreTrainedModel] | None = None
    start: str = "as_it_is"
    control: bool = False

    def make(self, on: Setting, k: int, seed: int = 0, refit: bool = False) -> tuple[PreTrainedModel, float]:
        """The model at k layers' size, or what its training starts from, and its seconds.

        What it shares with other methods counts as well; ``seed`` is that of random weights.
        """
        on.seed, function = seed, self.refit if refit and self.refit else self.function
        return on.make((self.title, k, seed, function), self.needs, lambda on: function(on, k))


def _torchao(title: str, kind: str, bits: int) -> Method:
    return Method(title, "quantization", TORCHAO,
                  lambda on, k: quantization.torchao_quantized(on.full, kind), bits=bits)  # fmt: skip


def _int4(title: str, source: str, function: Callable[[Setting], PreTrainedModel], **others) -> Method:
    return Method(title, "quantization", source, lambda on, k: function(on), bits=4, **others)


def _magnitude(share: float) -> Method:
    return Method(f"magnitude {share:.0%}", "sparsity", "torch.nn.utils.prune",
                  lambda on, k: sparsity.magnitude_pruned(on.full, share), training="masked")  # fmt: skip


def _wanda(title: str, share: float, group: int = 0) -> Method:
    return Method(title, "sparsity", "Wanda (arXiv:2306.11695)",
                  lambda on, k: sparsity.wanda(on.full, on.moments, share, group),
                  training="masked", needs=("moments",))  # fmt: skip


def _at_size(title: str, family: str, source: str, function: Callable, training: str = "plain", **others) -> Method:
    return Method(title, family, source, function, sized=True, training=training, **others)


def _control(title: str, kept: Callable[[Setting, int], Sequence[int]]) -> Method:
    """Other layers than the chosen ones, repaired and trained like those."""
    return _at_size(title, "depth", "control", lambda on, k: compact(on.full, kept(on, k)), refit=_refitted(kept),
                    control=True)  # fmt: skip


def _refitted(kept: Callable[[Setting, int], Sequence[int]]) -> Callable[[Setting, int], PreTrainedModel]:
    return lambda on, k: recovery.closed_form(on.full, kept(on, k), on.blocks).model


TORCHAO = "TorchAO (arXiv:2507.16099)"
METHODS: dict[str, Method] = {
    "full": Method("full model", "full", "", lambda on, k: on.full),
    "float32": Method("float32", "quantization", "PyTorch", lambda on, k: quantization.cast(on.full, torch.float32),
                      bits=32),
    "bfloat16": Method("bfloat16", "quantization", "PyTorch", lambda on, k: quantization.cast(on.full, torch.bfloat16),
                       bits=16),
    "int8_torch_ao": Method("int8, torch.ao dynamic", "quantization", "torch.ao",
                            lambda on, k: quantization.dynamic_quantized(on.full), bits=8),
    "int8_dynamic": _torchao("int8, torchao dynamic", "int8_dynamic", 8),
    "int8_weight": _torchao("int8 weights, torchao", "int8_weight", 8),
    "int4_weight": _torchao("int4 weights, torchao", "int4_weight", 4),
    "int4_unpacked": _torchao("int4 weights, kept in 8 bits", "int4_unpacked", 4),
    "int4_groups": _int4("int4 in groups, nearest", TORCHAO, lambda on: quantization.int4_groups(on.full)),
    "int4_hqq": _int4("int4 in groups, HQQ", f"HQQ's scales, {TORCHAO}",
                      lambda on: quantization.int4_groups(on.full, hqq=True)),
    "int4_gptq": _int4("int4 in groups, GPTQ", "GPTQ (arXiv:2210.17323)",
                       lambda on: quantization.gptq(on.full, on.moments), needs=("moments",)),
    "magnitude_50": _magnitude(0.5),
    "magnitude_75": _magnitude(0.75),
    "wanda_50": _wanda("Wanda 50%", 0.5),
    "wanda_75": _wanda("Wanda 75%", 0.75),
    "wanda_2_4": _wanda("Wanda 2:4", 0.5, group=4),
    "sparse_gpt_50": Method("SparseGPT 50%", "sparsity", "SparseGPT (arXiv:2301.00774)",
                            lambda on, k: sparsity.sparse_gpt(on.full, on.moments, 0.5), training="masked",
                            needs=("moments",)),
    "width": _at_size("width", "width", "Minitron's axes (arXiv:2407.14679), Wanda's norms",
                      lambda on, k: width.width_pruned(on.full, on.moments, on.size(k)), needs=("moments",),
                      refit=lambda on, k: width.width_pruned(on.full, on.moments, on.size(k), repair="refit")),
    "width_refit": _at_size("width, closed form", "width", "least squares on the kept inputs",
                            lambda on, k: width.width_pruned(on.full, on.moments, on.size(k), repair="refit"), "none",
                            needs=("moments",), repair="closed_form"),
    "flap": _at_size("FLAP", "width", "FLAP (arXiv:2312.11983), the same widths everywhere",
                     lambda on, k: width.width_pruned(on.full, on.moments, on.size(k), "fluctuation", "bias"),
                     needs=("moments",), repair="closed_form"),
    "svd": _at_size("SVD", "low rank", "Eckart and Young, 1936",
                    lambda on, k: low_rank.low_rank(on.full, on.plain_factors, on.size(k)), needs=("plain_factors",),
                    control=True),
    "svd_aware": _at_size("SVD, activation-aware", "low rank", "SVD-LLM (arXiv:2403.07378)",
                          lambda on, k: low_rank.low_rank(on.full, on.aware_factors, on.size(k)),
                          needs=("moments", "aware_factors"), start="closed_form"),  # its own least squares
    "early_exit": _control("first layers", lambda on, k: range(k)),
    "evenly_spaced": _control("evenly spaced layers", lambda on, k: selection.evenly_spaced(on.depth, k)),
    "best_random": _control("best random layers", lambda on, k: on.random_cut[k]),
    "random_layers": _at_size("random layers, own head", "control", "embedding and head of the full model",
                              lambda on, k: control.random_layers(on.full, on.kept[k], on.seed), start="random",
                              control=True),
    "random_weights": _at_size("random weights", "control", "nothing of the full model",
                               lambda on, k: control.random_weights(on.full, on.kept[k], on.seed), "whole",
                               start="random", control=True),
    "laco_paper": _at_size("LaCo, the paper's formula", "depth", "LaCo (arXiv:2402.11187)",
                           lambda on, k: depth.laco(on.full, k, on.few_blocks), needs=("few_blocks",)),
    "laco_released": _at_size("LaCo, as released", "depth", "LaCo (arXiv:2402.11187): its code removes, not merges",
                              lambda on, k: depth.laco(on.full, k, on.few_blocks, released=True), "none",
                              needs=("few_blocks",)),
    "replace_me": _at_size("ReplaceMe, least squares", "depth", "ReplaceMe (arXiv:2505.02819)",
                           lambda on, k: replace_me(on.full, on.block_cut[k], on.blocks),
                           needs=("blocks",), repair="closed_form"),
    "replace_me_cosine": _at_size("ReplaceMe, cosine as released", "depth", "ReplaceMe (arXiv:2505.02819)",
                                  lambda on, k: replace_me(on.full, on.block_cut[k], on.blocks, cosine=True),
                                  "none", needs=("blocks",), repair="closed_form"),
    "last_layers_off": _at_size("last layers off, tail trained", "depth", "Lu et al. (arXiv:2411.15558)",
                                lambda on, k: compact(on.full, range(k)), "tail"),
    "cut_stepwise": _at_size("layers cut in steps", "depth", "arXiv:2511.05085, section 5's layers",
                             lambda on, k: compact(on.full, on.kept[k]), "stepwise"),
    "cut_magnitude": _at_size("layers cut, magnitudes", "depth", "Prune&Comp (arXiv:2507.18212), section 5's layers",
                              lambda on, k: depth.magnitude_compensated(on.full, on.kept[k], on.blocks), "none",
                              needs=("blocks",), repair="closed_form"),
    "cut": _at_size("layers cut", "depth", "section 5's layers", lambda on, k: compact(on.full, on.kept[k]),
                    refit=_refitted(lambda on, k: on.kept[k])),
    "cut_refit": _at_size("layers cut, closed form", "depth", "section 5's layers", _refitted(lambda on, k: on.kept[k]),
                          "none", needs=("blocks",), repair="closed_form"),
    "cut_repaired": _at_size("layers cut, section 5", "depth", "section 5",
                             lambda on, k: depth.repaired(on.full, on.repaired[k].folder), "none",
                             needs=("repaired",), repair="distilled"),
    "cut_int8": _at_size("cut + int8", "combination", f"section 5's layers, {TORCHAO}",
                         lambda on, k: quantization.torchao_quantized(compact(on.full, on.kept[k]), "int8_weight"),
                         "none", bits=8),
    "cut_repaired_int8": _at_size("cut, section 5, + int8", "combination", f"section 5, {TORCHAO}",
                                  lambda on, k: quantization.torchao_quantized(
                                      depth.repaired(on.full, on.repaired[k].folder), "int8_weight"),
                                  "none", bits=8, needs=("repaired",), repair="distilled"),
}  # fmt: skip
