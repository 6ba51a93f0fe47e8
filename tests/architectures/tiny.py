"""A tiny random model of every causal architecture that this release of transformers knows."""

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

DEPTH, VOCAB, LONGEST = 8, 96, 64
# attributes of configurations -> their value in a tiny model
SIZES = [
    (VOCAB, "vocab_size vocab_size_per_layer_input unpadded_vocab_size"),
    (LONGEST, "max_position_embeddings n_positions n_ctx max_seq_len block_size"),
    (DEPTH, "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers"),
    (32, "hidden_size d_model n_embd embed_dim word_embed_proj_dim embedding_size attention_hidden_size lru_width "
        "cross_attention_hidden_size mm_hidden_size out_hidden_size output_dim"),
    (48, "intermediate_size ffn_dim d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim mlp_hidden_size "
        "dense_intermediate_size shared_intermediate_size"),
    (16, "moe_intermediate_size shared_expert_intermediate_size q_lora_rank moe_shared_expert_intermediate_size "
        "intermediate_size_mlp projection_dim image_size expert_ffn_hidden_size moe_latent_size"),
    (8, "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_lora_rank global_head_dim swa_head_dim rotary_dim "
       "kv_channels linear_key_head_dim linear_value_head_dim mamba_d_state state_size ssm_state_size mamba_d_head "
       "mamba_head_dim hidden_size_per_layer_input index_head_dim patch_size d_kv "
       "mamba_chunk_size chunk_size attention_chunk_size query_pre_attn_scalar time_step_rank mamba_dt_rank"),
    (5, "sliding_window attention_window_size local_window"),
    (4, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts "
       "n_routed_experts num_local_experts moe_num_experts linear_num_value_heads index_n_heads "
       "num_encoder_attention_heads num_decoder_attention_heads"),
    (2, "num_key_value_heads num_kv_heads multi_query_group_num num_experts_per_tok moe_top_k moe_k "
        "linear_num_key_heads "
       "num_global_key_value_heads mamba_expand expand linear_conv_kernel_dim mamba_d_conv conv_kernel "
       "encoder_layers num_encoder_layers index_topk"),
    (1, "n_group topk_group n_groups mamba_n_groups n_shared_experts num_shared_experts moe_num_shared_experts"),
]  # fmt: skip
SMALL = {name: size for size, names in SIZES for name in names.split()}
_MLA = {"num_key_value_heads": 4}
_QSA = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_DECODER = {"is_decoder": True}
_SLIDING = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "d_rel": 4, "rel_extent": 16}
_SHARED = {"attention_hidden_size": 64, "attention_head_dim": 16}
SPECIAL = {  # what a family needs beyond SIZES
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
                     "minicpm3", "youtu"), _MLA),
    "bailing_hybrid": _MLA | {"num_expert_group": 1, "num_experts_per_token": 2, "linear_head_dim": 8,
                              "linear_num_heads": 4},
    **{name: _DECODER for name in (
        "bert", "bert-generation", "camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta",
        "xlm-roberta-xl", "electra", "ernie", "megatron-bert", "rembert", "big_bird")},
    "bamba": _MAMBA | {"attn_layer_indices": [2, 5]},
    "cohere_compass_text": {"rope_parameters": {name: {"rope_type": "default", "rope_theta": 1e4}
                                               for name in ("full_attention", "sliding_attention")}},
    "cpmant": {"dim_head": 8, "dim_ff": 48},
    "ctrl": {"dff": 48},
    "deepseek_v2": _MLA | {"num_experts_per_tok": 2},
    "dots3_note_text": _MLA | {"num_attention_heads": 4, "head_dim": 16},
    "deepseek_v4": {"o_groups": 2, "o_lora_rank": 8},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": {"laurel_rank": 8, "num_kv_shared_layers": 3, "intermediate_size": 48,
                     "activation_sparsity_pattern": [0.0] * DEPTH},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "gpt_neo": {"attention_types": [[["global", "local"], 4]]},
    "granitemoehybrid": _MAMBA | {"layer_types": ["linear_attention", "full_attention"] * 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "inkling_text": _SLIDING | {"sliding_window_size": 5},
    "inkling2_text": _SLIDING | {"sliding_window_size": 5},
    "kimi_linear": _MLA | {"linear_head_dim": 8, "linear_num_heads": 4, "num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 4},
    "longcat_flash": _MLA | {"moe_topk": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _QSA},
    "qwen4_exp_text": _QSA,
    "reformer": _DECODER | {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 8),
                             "attn_layers": ["local", "lsh"] * 4},
    "roc_bert": _DECODER | {"pronunciation_vocab_size": 20, "shape_vocab_size": 20, "pronunciation_embed_dim": 8,
                             "shape_embed_dim": 8},
    "xlm": {"n_words": VOCAB, "emb_dim": 32},
    "xlnet": {"d_inner": 48},
    "xmod": {"is_decoder": True, "default_language": "en_XX"},
    "zamba": _SHARED,
    "zamba2": _SHARED | {"num_mem_blocks": 1,
                         "layers_block_type": [*["linear_attention"] * 2, "hybrid", "linear_attention"] * 2},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}  # fmt: skip


def configurations() -> dict[str, type[PreTrainedConfig]]:
    """Model type -> configuration class of every causal architecture."""
    return {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}


def tiny_config(kind: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The smallest configuration of that class that still has every kind of layer."""
    settings = _settings(kind())
    for name, value in SPECIAL.get(kind.model_type, {}).items():
        settings[name] = settings.get(name, {}) | value if isinstance(value, dict) else value
    return kind(**settings)


def _settings(config: PreTrainedConfig) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in config.to_dict().items():
        inner = value if name in SMALL else getattr(config, name, None)  # some attributes cannot be asked for
        if isinstance(inner, PreTrainedConfig):
            found[name] = _settings(inner)
        elif name in SMALL and isinstance(value, int) and not isinstance(value, bool):
            found[name] = SMALL[name]
        elif name.endswith("token_id") and isinstance(value, int):
            found[name] = {"bos_token_id": 1, "eos_token_id": 2}.get(name, 0)
    return found


def tiny_model(kind: type[PreTrainedConfig], seed: int = 0) -> PreTrainedModel:
    """A random float32 model in eval mode; norms and biases are random too, so that none hides an error.

    Raises:
        RuntimeError: it is not tiny.
    """
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(tiny_config(kind))
    size = sum(parameter.numel() for parameter in empty.parameters())
    if size > 8e6:
        raise RuntimeError(f"{size:,} parameters")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model
