"""Scores of every layer as one table, from one process or many."""

import argparse
import sys

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from paper_src import InputError, coalitions, data, models, scoring
from paper_src.support.processes import ALONE, Processes


def scores(use: argparse.Namespace) -> pd.DataFrame:
    """Score every layer of a model: a row a layer."""
    if use.shapley and not use.leave_one_out:
        raise InputError("--shapley needs the windows of --leave-one-out: give their number")
    loaded = models.load_model(use.model, use.dtype, use.device)
    text, _ = data.load_text(use.text, "train")
    blocks = data.token_blocks(loaded.tokenizer, text, use.sequences, use.length, use.seed)
    if use.processes.rank == 0:
        print(f"{len(blocks)} sequences, {use.processes.world} processes: scoring", file=sys.stderr, flush=True)
    table = layer_scores(loaded.model, blocks, use.batch_size, use.processes)
    if not use.leave_one_out:
        return table
    more = data.token_blocks(loaded.tokenizer, text, use.leave_one_out, use.length, use.seed + 1)
    return table.merge(causal_scores(loaded.model, more, use.shapley, use.processes), on="layer")


def layer_scores(
    model: PreTrainedModel, blocks: Tensor, batch_size: int = 8, processes: Processes = ALONE
) -> pd.DataFrame:
    """Rows ``layer``, each score of :func:`scoring.score_layers` and its standard error ``<score>_se``.

    Args:
        model: the full model, on every rank.
        blocks: (N, T) token ids, the same on every rank.
        batch_size: sequences a step.
        processes: who shares the work; the table is the same on each.
    """
    own = scoring.score_layers(model, processes.mine(blocks), batch_size)
    found = scoring.LayerScores({}, own.angular, own.parameters)
    for name, rows in own.per_sequence.items():
        found.per_sequence[name] = torch.stack(processes.woven(list(rows)))
    columns = {"layer": np.arange(len(own.parameters))}
    for name in found.per_sequence:
        columns |= {name: found.mean(name), f"{name}_se": found.standard_error(name)}
    return pd.DataFrame({name: np.asarray(values) for name, values in columns.items()})


def causal_scores(
    model: PreTrainedModel, blocks: Tensor, shapley_target: float = 0.0, processes: Processes = ALONE
) -> pd.DataFrame:
    """Rows ``layer``, ``leave_one_out`` (nats/token) with its standard error, and Shapley values if they are asked for.

    Args:
        model: the full model, on every rank.
        blocks: (N, T) token ids, the same on every rank; each block is a sample for the standard errors.
        shapley_target: standard error, as a share of the largest value, at which Shapley sampling stops; 0 skips it.
        processes: who shares the work; the table is the same on each.
    """
    own = [block[None] for block in processes.mine(blocks)]
    rows = np.stack(processes.woven(coalitions.leave_one_out(coalitions.on_each(model, own))))
    error = rows.std(axis=0, ddof=1) / len(rows) ** 0.5
    frame = pd.DataFrame({"layer": range(rows.shape[1]), "leave_one_out": rows.mean(axis=0), "leave_one_out_se": error})
    if shapley_target:
        evaluators = coalitions.on_each(model, own, metrics=["nll_capped_nats"])
        values = coalitions.shapley(evaluators, shapley_target, processes=processes)
        frame = frame.assign(shapley=values.mean[:, 0], shapley_se=values.standard_error[:, 0])
    return frame
