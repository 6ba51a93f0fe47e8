"""Tiny random models of many families, a byte-level tokenizer and token blocks. Nothing here needs a network."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB, HIDDEN, DEPTH, HEADS = 96, 32, 4, 4
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = SHAPE | {"intermediate_size": 48}
GROUPED = WIDE | {"num_key_value_heads": 2}
# windows of 5 tokens are shorter than the test sequences, so that they act
CONFIGS = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 5},
    "qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma2": GROUPED | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "gemma3_text": GROUPED | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8},
    "phi": WIDE,
    "gpt2": SHAPE,
    "gpt_neox": WIDE,
    "opt": SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": HIDDEN},
    "falcon": SHAPE | {"alibi": False},
    "olmo2": GROUPED,
    "cohere": GROUPED,
}
MIXTRAL = GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2}
BERT = WIDE


def build_model(family: str, seed: int = 0, **settings) -> transformers.PreTrainedModel:
    """A random model in float32 and eval mode; norms and biases are random too, so that none hides an error."""
    shape = {"mixtral": MIXTRAL, "bert": BERT}.get(family) or CONFIGS[family]
    config = AutoConfig.for_model(family, **(shape | settings))
    torch.manual_seed(seed)
    auto = AutoModel if family == "bert" else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_blocks(count: int, length: int, seed: int = 0) -> torch.Tensor:
    """Token ids (count, length) without the special tokens 0, 1 and 2."""
    return torch.randint(3, VOCAB, (count, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Keep every library off the network, in this process and in those it starts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(params=CONFIGS)
def family(request) -> str:
    return request.param


@pytest.fixture
def full(family) -> transformers.PreTrainedModel:
    return build_model(family)


@pytest.fixture
def llama() -> transformers.PreTrainedModel:
    return build_model("llama")
