"""The mistakes of the earlier practice, made on purpose: made-up scores, masks, requests, text similarity."""

import copy
import difflib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from random import Random

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from paper_src import InputError, timing
from paper_src.layers import StandIn, with_module
from paper_src.models import decoder_layers, last_hidden, locate_layers
from paper_src.selection import KeptLayers, top_k


def made_up_scores(depth: int, k: int, draws: int, seed: int) -> list[KeptLayers]:
    """What Top-K keeps when scores come from a normal distribution: ``draws`` selections of k of ``depth`` layers."""
    generator = np.random.default_rng(seed)
    return [top_k(generator.normal(size=depth), k) for _ in range(draws)]


def random_places(names: Sequence[str], count: int, depth: int, seed: int) -> dict[str, KeptLayers]:
    """name -> ``count`` places in [0, depth), increasing, drawn anew for each."""
    generator = Random(seed)
    return {name: tuple(sorted(generator.sample(range(depth), count))) for name in names}


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
