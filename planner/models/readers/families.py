"""The families of Hugging Face configs that have a reader, and by what they are recognised."""

from __future__ import annotations

from dataclasses import dataclass

_LLAMA = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "rms_norm_eps", "hidden_act",
)  # fmt: skip
_GEMMA = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "head_dim", "hidden_activation", "query_pre_attn_scalar",
)  # fmt: skip
_LATENT = (
    *_LLAMA, "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "n_routed_experts", "n_shared_experts", "first_k_dense_replace", "moe_intermediate_size",
)  # fmt: skip
_ROUTED = (*_LLAMA, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
_INDEXED = (*_LATENT, "num_nextn_predict_layers", "index_topk", "index_n_heads", "index_head_dim")
_LINEAR = (
    "layer_types", "full_attention_interval", "attn_output_gate", "linear_num_key_heads",
    "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
)  # fmt: skip
_MAMBA = ("hidden_size", "num_hidden_layers", "vocab_size", "state_size", "conv_kernel", "expand")


@dataclass(frozen=True, slots=True)
class Family:
    """One architecture: its ``model_type``, where its reader is, and how to recognise it."""

    model_type: str
    module: str
    architecture: str
    keys: tuple[str, ...]
    """Keys by which the nearest family of an unknown config is found."""
    reader: str = ""
    """Name after ``read_``; empty: the ``model_type``."""


_FAMILIES = (
    Family("llama", "rotary", "LlamaForCausalLM", _LLAMA),
    Family("mistral", "rotary", "MistralForCausalLM", (*_LLAMA, "sliding_window")),
    Family("qwen2", "rotary", "Qwen2ForCausalLM", (*_LLAMA, "use_sliding_window")),
    Family("qwen3", "rotary", "Qwen3ForCausalLM", (*_LLAMA, "use_sliding_window", "head_dim")),
    Family("phi3", "rotary", "Phi3ForCausalLM", (*_LLAMA, "original_max_position_embeddings")),
    Family("gemma2", "rotary", "Gemma2ForCausalLM", (*_GEMMA, "attn_logit_softcapping")),
    Family(
        "gemma3_text", "rotary", "Gemma3ForCausalLM", (*_GEMMA, "sliding_window_pattern"), "gemma3"
    ),
    Family("qwen2_vl_text", "rotary", "Qwen2VLTextModel", _LLAMA, "qwen2"),
    Family("qwen3_vl_text", "rotary", "Qwen3VLTextModel", (*_LLAMA, "head_dim"), "qwen3"),
    Family(
        "mixtral", "sparse", "MixtralForCausalLM",
        (*_LLAMA, "num_local_experts", "num_experts_per_tok"),
    ),
    Family(
        "qwen3_moe", "sparse", "Qwen3MoeForCausalLM",
        (*_ROUTED, "decoder_sparse_step", "mlp_only_layers"),
    ),
    Family(
        "qwen3_vl_moe_text", "sparse", "Qwen3VLMoeTextModel",
        (*_ROUTED, "decoder_sparse_step", "mlp_only_layers"), "qwen3_moe",
    ),
    Family(
        "qwen2_moe", "sparse", "Qwen2MoeForCausalLM",
        (*_ROUTED, "decoder_sparse_step", "shared_expert_intermediate_size"),
    ),
    Family(
        "glm4_moe", "sparse", "Glm4MoeForCausalLM",
        (*_LLAMA, "n_routed_experts", "n_shared_experts", "first_k_dense_replace",
         "moe_intermediate_size", "use_qk_norm"),
    ),
    Family(
        "minimax_m2", "sparse", "MiniMaxM2ForCausalLM",
        (*_LLAMA, "num_local_experts", "num_experts_per_tok", "use_qk_norm"),
    ),
    Family(
        "gpt_oss", "sparse", "GptOssForCausalLM",
        (*_LLAMA, "num_local_experts", "num_experts_per_tok", "swiglu_limit"),
    ),
    Family(
        "llama4_text", "interleaved", "Llama4ForCausalLM",
        (*_LLAMA, "num_local_experts", "interleave_moe_layer_step", "intermediate_size_mlp",
         "attention_chunk_size"), "llama4",
    ),
    Family(
        "gemma4_text", "interleaved", "Gemma4ForCausalLM",
        (*_GEMMA, "enable_moe_block", "global_head_dim", "attention_k_eq_v", "layer_types"),
        "gemma4",
    ),
    Family(
        "qwen3_5_text", "hybrid", "Qwen3_5ForCausalLM", (*_LLAMA, "head_dim", *_LINEAR), "qwen3_5"
    ),
    Family(
        "qwen3_5_moe_text", "hybrid", "Qwen3_5MoeForCausalLM",
        (*_ROUTED, "shared_expert_intermediate_size", *_LINEAR), "qwen3_5_moe",
    ),
    Family(
        "qwen3_next", "hybrid", "Qwen3NextForCausalLM",
        (*_ROUTED, "shared_expert_intermediate_size", *_LINEAR),
    ),
    Family(
        "jamba", "hybrid", "JambaForCausalLM",
        (*_LLAMA, "attn_layer_period", "expert_layer_period", "mamba_d_state", "mamba_dt_rank"),
    ),
    Family(
        "nemotron_h", "hybrid", "NemotronHForCausalLM",
        (*_LLAMA, "hybrid_override_pattern", "ssm_state_size", "mamba_num_heads",
         "mamba_head_dim", "n_groups"),
    ),
    Family("mamba", "hybrid", "MambaForCausalLM", (*_MAMBA, "time_step_rank")),
    Family(
        "mamba2", "hybrid", "Mamba2ForCausalLM", (*_MAMBA, "n_groups", "num_heads", "chunk_size")
    ),
    Family("deepseek_v2", "deepseek", "DeepseekV2ForCausalLM", _LATENT),
    Family(
        "deepseek_v3", "deepseek", "DeepseekV3ForCausalLM", (*_LATENT, "num_nextn_predict_layers")
    ),
    Family("deepseek_v32", "deepseek", "DeepseekV32ForCausalLM", _INDEXED),
    Family("glm_moe_dsa", "deepseek", "GlmMoeDsaForCausalLM", (*_INDEXED, "qk_head_dim")),
    Family(
        "gpt2", "gpt", "GPT2LMHeadModel",
        ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size", "activation_function"),
    ),
    Family(
        "gpt_neox", "gpt", "GPTNeoXForCausalLM",
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "vocab_size", "rotary_pct", "use_parallel_residual", "layer_norm_eps"),
    ),
    Family(
        "opt", "gpt", "OPTForCausalLM",
        ("hidden_size", "ffn_dim", "num_hidden_layers", "num_attention_heads", "vocab_size",
         "word_embed_proj_dim", "do_layer_norm_before", "activation_function"),
    ),
    Family(
        "bloom", "gpt", "BloomForCausalLM",
        ("hidden_size", "n_layer", "n_head", "vocab_size", "layer_norm_epsilon",
         "apply_residual_connection_post_layernorm"),
    ),
    Family(
        "falcon", "gpt", "FalconForCausalLM",
        ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "multi_query",
         "parallel_attn", "new_decoder_architecture", "alibi", "bias"),
    ),
    Family(
        "phi", "gpt", "PhiForCausalLM",
        ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "vocab_size", "partial_rotary_factor", "layer_norm_eps", "qk_layernorm"),
    ),
)  # fmt: skip
FAMILIES = {family.model_type: family for family in _FAMILIES}

TOWERS = {
    "qwen2_vl": ("qwen2_vl_text", "qwen2_vl"),
    "qwen3_vl": ("qwen3_vl_text", "qwen3_vl"),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", "qwen3_vl"),
    "qwen3_5": ("qwen3_5_text", "qwen3_vl"),
    "qwen3_5_moe": ("qwen3_5_moe_text", "qwen3_vl"),
    "gemma4": ("gemma4_text", "gemma4"),
    "llama4": ("llama4_text", "llama4"),
}
"""Models with a vision tower: the ``model_type`` of the decoder, and the reader of the tower."""
OPTIONAL_TOWER = ("gemma4",)
"""Models whose config class has no tower where ``vision_config`` is absent."""
