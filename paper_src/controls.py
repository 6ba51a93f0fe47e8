"""The earlier report's table of wrong against right practice, each row an experiment.

Nothing here is a method: these are the mistakes, made on purpose, beside what should have been done.
"""

import copy
import difflib
import json
import math
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from paper_src import InputError, fidelity, timing
from paper_src.coalitions import Evaluator, leave_one_out
from paper_src.compaction import compact
from paper_src.layers import StandIn, with_module
from paper_src.models import decoder_layers, last_hidden, locate_layers
from paper_src.report import kept_text
from paper_src.scoring import score_layers
from paper_src.selection import KeptLayers, top_k


def made_up_scores(depth: int, k: int, draws: int, seed: int) -> list[KeptLayers]:
    """What Top-K keeps when scores come from a normal distribution: ``draws`` selections of k of ``depth`` layers."""
    generator = np.random.default_rng(seed)
    return [top_k(generator.normal(size=depth), k) for _ in range(draws)]


def with_idle_layers(model: PreTrainedModel, places: Sequence[int], depth: int) -> PreTrainedModel:
    """A model of ``depth`` layers that computes what ``model`` does, with its layers at ``places`` and the others idle.

    An idle layer is a copy of a real one whose last linear map in each part (attention, MLP) is zero, so
    that it passes its input on unchanged. For families whose configuration has no per-layer lists.

    Args:
        model: L layers; it is not changed.
        places: L increasing positions in [0, depth).
        depth: number of layers of the new model.

    Raises:
        InputError: the new model does not compute what the old one does.
    """
    path, layers = locate_layers(model)
    if len(places) != len(layers) or sorted(set(places)) != list(places) or max(places) >= depth:
        raise InputError(f"places {tuple(places)}: give {len(layers)} increasing positions below {depth}")
    config = copy.deepcopy(model.config)
    config.get_text_config().num_hidden_layers = depth
    new = AutoModelForCausalLM.from_config(config, dtype=model.dtype).to(model.device).eval()
    rest = {name: value for name, value in model.state_dict().items() if not name.startswith(f"{path}.")}
    new.load_state_dict(rest, strict=False)
    for place, layer in enumerate(decoder_layers(new)):
        real = sum(other <= place for other in places) - 1 if place in places else place % len(layers)
        layer.load_state_dict(layers[real].state_dict())
        if place not in places:
            _silence_(layer)
    ids = torch.arange(8, device=model.device)[None] % config.get_text_config().vocab_size
    with torch.no_grad():
        if not torch.allclose(last_hidden(new, ids), last_hidden(model, ids), rtol=1e-3, atol=1e-4):
            raise InputError(f"{type(model).__name__} with idle layers computes something else: use a Llama-like model")
    return new


def _silence_(layer: nn.Module) -> None:
    """Zero the last linear map of each part of ``layer``."""
    for part in layer.children():
        linear = [module for module in part.modules() if isinstance(module, nn.Linear)]
        for parameter in linear[-1].parameters() if linear else ():
            nn.init.zeros_(parameter)


class _Masked(StandIn):
    """Computes a layer and multiplies what it adds by zero."""

    def forward(self, hidden: Tensor, *args, **kwargs) -> Tensor | tuple:
        output = self.layer(hidden, *args, **kwargs)
        if isinstance(output, tuple):
            return (hidden + 0 * (output[0] - hidden), *output[1:])
        return hidden + 0 * (output - hidden)


def masked(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """``model`` with what all layers but ``kept`` add multiplied by zero: it answers as the compact model does."""
    path, layers = locate_layers(model)
    return with_module(
        model, path, nn.ModuleList(layer if i in kept else _Masked(layer) for i, layer in enumerate(layers))
    )


def sharpened(model: PreTrainedModel, factor: float) -> PreTrainedModel:
    """``model`` with its logits multiplied by ``factor``: the same greedy text and states, another distribution."""
    head = model.get_output_embeddings()
    path = next(name for name, module in model.named_modules() if module is head)
    return with_module(model, path, _Scaled(head, factor))


class _Scaled(nn.Module):
    def __init__(self, head: nn.Module, factor: float):
        super().__init__()
        self.head, self.factor = head, factor

    def forward(self, hidden: Tensor) -> Tensor:
        return self.factor * self.head(hidden)


@contextmanager
def served(models: dict[str, PreTrainedModel]) -> Iterator[int]:
    """Serves each model's last hidden states as JSON over HTTP on the loopback interface; gives the port.

    ``POST /<name>`` with a JSON list of token ids. Any other name is answered at once, with no model run.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            ids = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            model = models.get(self.path.strip("/"))
            with torch.no_grad():
                states = last_hidden(model, torch.tensor([ids]))[0].float().tolist() if model else []
            body = json.dumps(states).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def request_seconds(port: int, name: str, ids: Sequence[int]) -> float:
    """Seconds from sending a request for ``/name`` to the end of its answer."""
    start = time.perf_counter()
    connection = HTTPConnection("127.0.0.1", port, timeout=300)
    connection.request("POST", f"/{name}", json.dumps(list(ids)))
    answer = connection.getresponse()
    answer.read()
    connection.close()
    if answer.status != 200:
        raise InputError(f"the request for /{name} was answered with status {answer.status}")
    return time.perf_counter() - start


def time_requests(
    full: PreTrainedModel, compact: PreTrainedModel, tokens: int, rounds: int, seed: int
) -> dict[str, np.ndarray]:
    """Seconds of each of ``rounds`` interleaved rounds: ``full`` and ``compact`` forward passes, and requests.

    Keys: ``full``, ``compact`` (device synchronized), ``request_full``, ``request_compact``, and
    ``request_a``, ``request_b``, two series of requests behind which there is no model.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(full.config.get_text_config().vocab_size, (1, tokens), generator=generator)
    workload = timing.Workload("prefill_hidden", 1, tokens)
    models = {"full": full, "compact": compact}
    forward = {
        name: partial(timing.run_seconds, model, workload, ids.to(full.device)) for name, model in models.items()
    }
    seconds: dict[str, list[float]] = {}
    with served(models) as port:
        behind = {"request_full": "full", "request_compact": "compact", "request_a": "none", "request_b": "none"}
        work = forward | {name: partial(request_seconds, port, path, ids[0].tolist()) for name, path in behind.items()}
        for index in range(rounds + 1):
            for name in list(work)[:: -1 if index % 2 else 1]:  # each comes before and after the others
                seconds.setdefault(name, []).append(work[name]())
    return {name: np.array(values[1:]) for name, values in seconds.items()}  # the first round warms up


@torch.no_grad()
def greedy_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Tensor, new_tokens: int
) -> list[str]:
    """The ``new_tokens`` tokens that greedy decoding puts after each of ``prompts`` (B, T), as text."""
    prompts = prompts.to(model.device)
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=pad, **settings)
    return tokenizer.batch_decode(ids[:, prompts.shape[1] :])


def text_similarity(texts: Sequence[str], others: Sequence[str]) -> float:
    """Mean over pairs of texts of difflib's ratio: 2 * matching characters / all characters, in [0, 1]."""
    pairs = zip(texts, others, strict=True)
    return float(np.mean([difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in pairs]))


def text_against_metrics(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Tensor,
    new_tokens: int,
    full: fidelity.Reference,
) -> pd.DataFrame:
    """t8_text: similarity of each model's greedy text to that of the first, beside its metrics on test text.

    The last row, ``another prompt``, compares the first model's own texts for different prompts: what
    unrelated text scores.

    Args:
        models: name -> model, the full one first.
        tokenizer: of all of them.
        prompts: (B, T) token ids.
        new_tokens: length of the continuations.
        full: reference for the metrics.
    """
    texts = {name: greedy_texts(model, tokenizer, prompts, new_tokens) for name, model in models.items()}
    own = next(iter(texts.values()))
    rows = []
    for name, model in models.items():
        means = {metric: float(values.mean()) for metric, values in fidelity.compare(model, full).items()}
        rows.append({"model": name, "text_similarity": text_similarity(texts[name], own), **means})
    rows.append({"model": "another prompt", "text_similarity": text_similarity(own, own[1:] + own[:1])})
    return pd.DataFrame(rows).assign(n_prompts=len(prompts))


def candidates(importance: pd.DataFrame, scores: Sequence[str], k: int, draws: int, seed: int) -> pd.DataFrame:
    """Rows score, draw, kept: Top-K by each real score, and by ``draws`` made-up ones (score ``normal``)."""
    rows = [{"score": score, "kept": kept_text(top_k(importance[score], k))} for score in scores]
    drawn = made_up_scores(len(importance), k, draws, seed)
    rows += [{"score": "normal", "draw": draw, "kept": kept_text(kept)} for draw, kept in enumerate(drawn)]
    return pd.DataFrame(rows).assign(draw=lambda frame: frame["draw"].astype("Int64"))


def score_tests(table: pd.DataFrame, measured: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """t8_random, what each made-up score leads to, and t8_scores, each real score's p-value against them.

    Args:
        table: from :func:`candidates`.
        measured: kept -> metric -> (N,); the full model first.
    """
    full = float(next(iter(measured.values()))["nll_nats"].mean())
    nll = table["kept"].map(lambda kept: float(measured[kept]["nll_nats"].mean()))
    table = table.assign(nll_nats=nll, ppl_ratio=np.exp(nll - full))
    drawn, real = table[table["score"] == "normal"], table[table["score"] != "normal"].drop(columns="draw")
    control = drawn["nll_nats"]
    p_values = [fidelity.control_p_value(value, control, higher_is_better=False) for value in real["nll_nats"]]
    return drawn.reset_index(drop=True), real.assign(p_ppl=p_values, n_draws=len(drawn)).reset_index(drop=True)


def permuted(model: PreTrainedModel, calibration: Tensor, test: Tensor, seed: int) -> pd.DataFrame:
    """t8_permuted: two models that compute the same with their layers in different places, and three ways to choose.

    Both are ``model`` among as many idle layers (:func:`with_idle_layers`); to keep half the layers, the idle
    ones must go. ``fixed_list`` is the right answer for the first model, as an index list; ``fisher`` and
    ``leave_one_out`` are taken of the model at hand.

    Args:
        model: a small model of L layers.
        calibration: (N, T) token ids, for the scores.
        test: (M, T) token ids, for the perplexity.
        seed: of the places.
    """
    depth = 2 * len(decoder_layers(model))
    generator = Random(seed)
    first, second = (sorted(generator.sample(range(depth), depth // 2)) for _ in range(2))
    rows = []
    for order, places in (("first", first), ("second", second)):
        deep = with_idle_layers(model, places, depth)
        judge, asked = Evaluator(deep, test), Evaluator(deep, calibration)
        fisher = score_layers(deep, calibration).mean("fisher").tolist()
        ways = {
            "fixed_list": tuple(first),
            "fisher": top_k(fisher, depth // 2),
            "leave_one_out": top_k(leave_one_out([asked])[0].tolist(), depth // 2),
        }
        for way, kept in ways.items():
            ratio = math.exp(judge(kept) - judge(range(depth)))
            rows.append({"model": order, "chosen_by": way, "kept": kept_text(kept), "working_layers": kept_text(places),
                         "working_kept": len({*kept} & {*places}), "ppl_ratio": ratio})  # fmt: skip
    return pd.DataFrame(rows)


def speeds(
    model: PreTrainedModel, kept: KeptLayers, tokens: int, requested: int, rounds: int, seed: int
) -> pd.DataFrame:
    """t8_speed: what each way of timing says the speedup of the compact model is.

    ``compacted`` and ``masked`` are timed as everywhere in this paper. ``forward`` and ``request`` are the
    compact model again, by a synchronized pass and through loopback HTTP; ``request_no_model`` is the ratio of
    two series of requests behind which there is no model. Intervals are over rounds: 5% to 95% of the single
    ratios.

    Args:
        model: the full model.
        kept: layers of the compact model.
        tokens: of the workload of ``compacted`` and ``masked``.
        requested: tokens of a request.
        rounds: of each.
        seed: of the token ids.
    """
    small, veiled = compact(model, kept), masked(model, kept)
    workload = timing.Workload("prefill_hidden", 1, tokens)
    by_kind = {1: ("compacted", small), 2: ("masked", veiled)}
    timed = timing.compare_speed(model, {key: other for key, (_, other) in by_kind.items()}, workload, rounds, seed)
    rows = [
        {"timed": by_kind[row["k"]][0], "speedup": row["speedup"], "speedup_lo": row["speedup_lo"],
         "speedup_hi": row["speedup_hi"], "full_ms": row["full_ms"], "compact_ms": row["compact_ms"]}
        for row in timed
    ]  # fmt: skip
    seconds = time_requests(model, small, requested, rounds, seed)
    pairs = {"forward": ("full", "compact"), "request": ("request_full", "request_compact"),
             "request_no_model": ("request_a", "request_b")}  # fmt: skip
    for name, (a, b) in pairs.items():
        ratios = seconds[a] / seconds[b]
        low, middle, high = np.quantile(ratios, [0.05, 0.5, 0.95])
        rows.append({"timed": name, "speedup": middle, "speedup_lo": low, "speedup_hi": high,
                     "full_ms": 1e3 * np.median(seconds[a]), "compact_ms": 1e3 * np.median(seconds[b])})  # fmt: skip
    return pd.DataFrame(rows).assign(k=len(kept), rounds=rounds)


def verdicts(
    drawn: pd.DataFrame, scores: pd.DataFrame, moved: pd.DataFrame, speed: pd.DataFrame, text: pd.DataFrame
) -> pd.DataFrame:
    """t8_controls: a row a practice, with the number that shows how wrong it is.

    Args:
        drawn: t8_random.
        scores: t8_scores.
        moved: t8_permuted.
        speed: t8_speed.
        text: t8_text.
    """
    ratios = drawn["ppl_ratio"]
    by_way = moved.set_index(["model", "chosen_by"])["ppl_ratio"]
    timed = speed.set_index("timed")
    similar = text.set_index("model")
    models = text[text["kl_nats"].notna() & ~text["model"].isin(["full"])]
    sharp, loose = similar.loc["sharpened"], models.loc[models["kl_nats"].idxmin()]
    spread = timed.loc["request_no_model"]
    rows = [
        ("scores from np.random.normal", "scores from the model, tested against random ones",
         "perplexity / full, worst over best draw", ratios.max() / ratios.min(),
         f"{int((scores['p_ppl'] > 0.05).sum())} of {len(scores)} real scores are not better than made-up ones "
         "either (p > 0.05)"),
        ("hard-coded layers", "layers chosen on the model at hand",
         "perplexity / full on a model with the same layers in other places: list over leave-one-out",
         by_way["second", "fixed_list"] / by_way["second", "leave_one_out"],
         f"the list is right on the first model (ratio {by_way['first', 'fixed_list']:.2f})"),
        ("no compact model, layers masked", "layers really removed",
         "speedup of the compact over that of the masked model",
         timed.loc["compacted", "speedup"] / timed.loc["masked", "speedup"],
         f"masked {timed.loc['masked', 'speedup']:.2f}, compacted {timed.loc['compacted', 'speedup']:.2f} times"),
        ("time of a network request", "synchronized time of the forward pass",
         "speedup by forward passes over speedup by requests",
         timed.loc["forward", "speedup"] / timed.loc["request", "speedup"],
         f"requests without any model: single speedups of {spread['speedup_lo']:.2f} to {spread['speedup_hi']:.2f}"),
        ("text similarity of generations", "KL, MSE and cosine on held-out text",
         "KL of a model whose text is identical over KL of the nearest model by KL",
         sharp["kl_nats"] / loose["kl_nats"],
         f"similarity {sharp['text_similarity']:.2f} at KL {sharp['kl_nats']:.2f} nats, and "
         f"{loose['text_similarity']:.2f} at {loose['kl_nats']:.2f} nats; unrelated text has "
         f"{similar.loc['another prompt', 'text_similarity']:.2f}"),
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=["practice", "instead", "measure", "how_wrong", "seen"])
