"""Scores of every layer as one table, from one process or many.

python -m paper_src.measure owner/name scores.csv
torchrun --nproc-per-node 8 -m paper_src.measure owner/name scores.csv --sequences 4096 --leave-one-out 64
"""

import argparse
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel

from paper_src import InputError, coalitions, data, models, scoring
from paper_src.files import replacing
from paper_src.processes import ALONE, Processes
from paper_src.scale import launch

ENDED = "another process of this run has ended: no table was written"


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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="registry name, local folder or .gguf, or hub id")
    parser.add_argument("table", type=Path, help="CSV to write")
    parser.add_argument("--text", default="wikitext-2")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--leave-one-out", type=int, default=0, metavar="WINDOWS")
    parser.add_argument("--shapley", type=float, default=0.0, metavar="ERROR", help="needs --leave-one-out")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto", help="cpu, cuda, disk (weights are read when needed), spread")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *ignored: _stop(ENDED))  # the launcher ends all when one has died
    try:
        with launch.started() as shared:
            _run(arguments, shared)
    except InputError as error:
        _stop(str(error))
    except RuntimeError as error:
        if "WORLD_SIZE" not in os.environ:
            raise
        _stop(f"{ENDED} ({str(error).splitlines()[0][:120]})")


def _run(arguments: argparse.Namespace, shared: Processes) -> None:
    if arguments.shapley and not arguments.leave_one_out:
        raise InputError("--shapley needs the windows of --leave-one-out: give their number")
    loaded = models.load_model(arguments.model, arguments.dtype, arguments.device)
    text, _ = data.load_text(arguments.text, "train")
    blocks = data.token_blocks(loaded.tokenizer, text, arguments.sequences, arguments.length, arguments.seed)
    if shared.rank == 0:
        print(f"{len(blocks)} sequences, {shared.world} processes: scoring", file=sys.stderr, flush=True)
    table = layer_scores(loaded.model, blocks, arguments.batch_size, shared)
    if windows := arguments.leave_one_out:
        more = data.token_blocks(loaded.tokenizer, text, windows, arguments.length, arguments.seed + 1)
        table = table.merge(causal_scores(loaded.model, more, arguments.shapley, shared), on="layer")
    if shared.rank == 0:
        with replacing(arguments.table) as part:
            table.to_csv(part, index=False)
        print(f"{len(table)} layers of {loaded.name}: {arguments.table}", flush=True)


def _stop(reason: str) -> None:
    print(f"error: {reason}", file=sys.stderr, flush=True)
    os._exit(1)  # other threads may wait for the dead process


if __name__ == "__main__":
    main()
