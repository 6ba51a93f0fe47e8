"""Tiny random models of many families, a byte-level tokenizer and token blocks, all without a network."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from paper_src import InputError

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WIDE = SHAPE | {"intermediate_size": 48}
GROUPED = WIDE | {"num_key_value_heads": 2}
# windows of 5 tokens are shorter than the test sequences and caps of 1 near the logits, so that they act
GEMMA = GROUPED | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}
GEMMA |= {"final_logit_softcapping": 1.0}
CAUSAL = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": 5},
    "qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
    "qwen3": GROUPED | {"head_dim": 8},
    "gemma2": GEMMA | {"attn_logit_softcapping": 1.0},
    "gemma3_text": GEMMA,
    "phi": WIDE,
    "gpt2": SHAPE,
    "gpt_neox": WIDE,
    "opt": SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "falcon": SHAPE | {"alibi": False},
    "olmo2": GROUPED,
    "cohere": GROUPED,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
OTHERS = {
    "bert": WIDE,
    "mixtral": GROUPED | {"num_experts_per_tok": 2, "num_local_experts": 4},
    "qwen2_moe": GROUPED | EXPERTS | {"num_experts": 4},
    "llama4_text": GROUPED
    | {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 4, "num_experts_per_tok": 1},
    "smollm3": GROUPED,
    "granite": GROUPED,
    "t5": {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 4, "num_heads": 4},
}


def build_model(family: str, seed: int = 0, **settings):
    """A random model in float32 and eval mode; norms and biases are random too, so that none hides an error."""
    config = AutoConfig.for_model(family, **((CAUSAL | OTHERS)[family] | settings))
    torch.manual_seed(seed)
    auto = AutoModel if family in ("bert", "t5") else AutoModelForCausalLM
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Tiny models are faster on one thread, and their sums then have one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Keep every library off the network, in this process and in those it starts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def make_model():
    """``make_model(family, seed=0, **settings)``: see :func:`build_model`."""
    return build_model


@pytest.fixture(params=CAUSAL)
def family(request):
    """Each causal family in turn."""
    return request.param


@pytest.fixture
def full(family):
    """A model of each causal family in turn."""
    return build_model(family)


@pytest.fixture
def llama():
    """One model, where the family makes no difference."""
    return build_model("llama")


@pytest.fixture
def make_blocks():
    """``make_blocks(count, length, seed=0, vocab=96)``: token ids without the special tokens 0, 1 and 2."""

    def make(count: int, length: int, seed: int = 0, vocab: int = 96) -> torch.Tensor:
        return torch.randint(3, vocab, (count, length), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def words():
    """The tokenizer of the tiny model, 512 tokens."""
    return AutoTokenizer.from_pretrained(Path(__file__).parents[1] / "data" / "tiny-llama")


@pytest.fixture
def wide(monkeypatch):
    """Models of ``build_model`` with room for the vocabulary of ``words`` and for a prompt."""
    for family, shape in CAUSAL.items():
        monkeypatch.setitem(CAUSAL, family, shape | {"vocab_size": 512, "max_position_embeddings": 256})


@pytest.fixture
def tokenizer():
    """One token a byte; <s> (id 256) goes before a text unless special tokens are refused."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.add_special_tokens(["<s>"])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


@pytest.fixture
def texts(tmp_path):
    """Two folders of text, one all of a kind; the splits of each differ."""
    for name, words in (("plain", "the cat sat on the mat and the dog ran "), ("other", "zzz yyy xxx www vvv ")):
        (tmp_path / name).mkdir()
        for split in ("train", "valid", "test"):
            (tmp_path / name / f"{split}.txt").write_text(f"{split} {words}" * 60)
    return [str(tmp_path / "plain"), str(tmp_path / "other")]


@pytest.fixture
def refused():
    """``with refused(match):`` the body raises InputError, in one line that matches."""

    @contextmanager
    def check(match: str):
        with pytest.raises(InputError, match=match) as caught:
            yield
        assert "\n" not in str(caught.value)

    return check
