"""Every model type of transformers' causal-LM mapping, with random weights and small enough for a test.

The sizes are those of the configuration class, replaced by name. Layers of every kind stay: the first of each kind.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ENCODERS = ["bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta", "xlm-roberta-xl", "xmod"]
ASSISTANTS = ["gemma4_assistant", "gemma4_unified_assistant"]  # they draft for another model, whose states they need
ENCODER_DECODERS = ["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp", "pegasus", "plbart", "prophetnet"]
AUDIO_AND_VISION = ["fuyu", "git", "got_ocr2", "moshi", "moss_transcribe_diarize", "musicgen", "musicgen_melody", "trocr", "whisper"]
OTHERS = [*ENCODERS, *ENCODER_DECODERS, *AUDIO_AND_VISION, *ASSISTANTS]  # no text decoders
COMPOSITES = ["mistral3"]  # composite types whose text model alone is in the mapping
TYPES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in OTHERS] + COMPOSITES

WINDOW = 7  # tokens that layers with a sliding window see: fewer than a row of a test has
SIZES = {
    32: """hidden_size n_embd d_model emb_dim hidden_dim lru_width attention_hidden_size embedding_dim
        embedding_size ple_embed_dim router_hidden_size word_embed_proj_dim dim_model n_embed""",
    48: """intermediate_size ffn_dim dim_ff dff n_inner d_inner feed_forward_size shared_intermediate_size
        ffn_hidden_size block_ff_dim intermediate_size_mlp mlp_hidden_size feedforward_dim
        shared_expert_intermediate_size ffn_intermediate_size""",
    16: """moe_intermediate_size moe_shared_expert_intermediate_size dense_intermediate_size head_dim kv_lora_rank
        q_lora_rank d_kv adapter_rank d_head dim_head global_head_dim v_head_dim qk_nope_head_dim moe_latent_size
        hidden_size_per_layer_input o_lora_rank linear_head_dim kda_head_dim expert_ffn_hidden_size
        swa_head_dim swa_v_head_dim index_head_dim""",
    8: """qk_rope_head_dim linear_key_head_dim linear_value_head_dim mamba_d_state state_size ssm_state_size rotary_dim
        gated_norm_rank mamba_dt_rank time_step_rank hc_lowrank kv_channels""",
    4: """num_attention_heads n_head n_heads attention_heads num_heads num_experts num_local_experts n_routed_experts
        moe_num_experts mamba_num_heads index_n_heads linear_num_heads conv_kernel mamba_d_conv
        global_num_attention_heads swa_num_attention_heads encoder_attention_heads decoder_attention_heads""",
    2: """num_key_value_heads linear_num_key_heads num_experts_per_tok moe_topk top_k_experts
        linear_num_value_heads num_kv_heads swa_num_key_value_heads moe_k n_kv_heads num_experts_per_token
        num_global_key_value_heads top_k""",
    1: """n_group topk_group num_expert_group mamba_n_groups n_groups mamba_ngroups num_dense_layers
        n_shared_experts num_shared_experts first_k_dense_replace o_groups num_mem_blocks""",
    256: "max_position_embeddings n_positions n_ctx model_max_length max_seq_len context_length",
    WINDOW: "sliding_window attention_window_size local_window_size window_size attention_chunk_size",
    0: "num_nextn_predict_layers num_mtp_layers",
}  # fmt: skip
BY_NAME = {name: size for size, names in SIZES.items() for name in names.split()}
VOCABULARIES = ("vocab_size", "n_token", "n_words", "vocab_size_per_layer_input")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_blocks")


def make_config(model_type: str, vocab_size: int, **own: Any) -> PretrainedConfig:
    """Return a small configuration of the model type."""
    kind = CONFIG_MAPPING[model_type]
    values = shrink(kind, vocab_size)
    values.update(own)
    return kind(**values)


def shrink(kind: type[PretrainedConfig], vocab_size: int) -> dict[str, Any]:
    """Return the arguments of a small configuration of the class."""
    default = kind()
    aliases = {name: getattr(default, name, None) for name in kind.attribute_map.values()}
    present = {name: value for name, value in {**default.to_dict(), **aliases}.items() if value is not None}
    values: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    for name, value in present.items():
        if name in BY_NAME:
            values[name] = [BY_NAME[name]] * len(value) if isinstance(value, list) else BY_NAME[name]
        elif name in VOCABULARIES:
            values[name] = vocab_size
    if "qk_rope_head_dim" in present and present.get("head_dim") == present["qk_rope_head_dim"]:
        values["head_dim"] = 8
    if "kv_lora_rank" in present and "num_key_value_heads" in values:  # keys and values are made for every head
        values["num_key_value_heads"] = values["num_attention_heads"]
    _choose_layers(kind, present, values)
    own = SPECIAL.get(kind.model_type, {})
    for name in kind.sub_configs:
        sub = type(getattr(default, name, None))
        if name in present and hasattr(sub, "sub_configs") and name != "vq_config":
            inner = {**shrink(sub, vocab_size), "model_type": sub.model_type}
            inner |= VISION if name == "vision_config" else {}
            values[name] = {**inner, **own.get(name, {})} if isinstance(own.get(name), dict) else inner
    values.update({name: value for name, value in own.items() if not (isinstance(value, dict) and name in values)})
    return values


def _choose_layers(kind: type[PretrainedConfig], present: dict[str, Any], values: dict[str, Any]) -> None:
    """Keep the first layer of each kind, at least two layers."""
    layers = next((name for name in LAYERS if present.get(name)), None)
    if layers is None:
        return
    count = present[layers]
    lists = {
        name: values.get(name, value)
        for name, value in present.items()
        if isinstance(value, (list, tuple)) and len(value) == count and not isinstance(getattr(kind, name, None), property)
        and value != [*range(count)]
    }
    kinds = [*zip(*lists.values(), strict=True)]
    kept = [i for i in range(len(kinds)) if kinds[i] not in kinds[:i]]
    kept = kept if len(kept) > 1 else [0, 1][:count]
    values[layers] = len(kept)
    values.update({name: [value[i] for i in kept] for name, value in lists.items()})


MAMBA_2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_chunk_size": 8}
VISION = {"image_size": 28, "patch_size": 14, "depth": 2, "num_hidden_layers": 2, "out_hidden_size": 32, "num_position_embeddings": 16,
    "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}  # fmt: skip
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {**MAMBA_2, "num_hidden_layers": 3, "attn_layer_indices": [1]},
    "falcon_h1": {**MAMBA_2, "mamba_d_ssm": 64},
    "granitemoehybrid": {**MAMBA_2, "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "rope_parameters": {
            name: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]} for name in ("sliding_attention", "full_attention")}},
    "helium": {"head_dim": 8},
    "qwen4_exp_text": {
        "ngram_vocab_size_base": 100, "make_ngram_vocab_size_divisible_by": 1, "indexer_n_heads": 4, "indexer_kv_heads": 1,
        "indexer_head_dim": 16, "indexer_budget": 8, "indexer_compress_ratio": 4,
    },
    "dots3_note": {"vision_config": {"adapter_in_dim": 32}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_kv_shared_layers": 2, "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0], "laurel_rank": 8},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid", "linear_attention"], "attention_head_dim": 16, "attention_hidden_size": 64, "num_key_value_heads": 4, "hidden_size": 32},
    "zamba2": {
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "n_mamba_heads": 4, "mamba_headdim": 16,
        "chunk_size": 8, "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
    },
    "zaya": {"num_experts_per_tok": 1},
    "xlnet": {"d_head": 8},
    "reformer": {"is_decoder": True, "axial_pos_shape": [16, 16], "axial_pos_embds_dim": [16, 16], "attn_layers": ["local", "local"], "num_hidden_layers": 2, "local_attn_chunk_length": 8},
}


def make_model(config: PretrainedConfig, seed: int = 0, is_composite: bool = False) -> PreTrainedModel:
    """Return a model with random weights that are large enough for tokens to differ; of a composite one, the whole."""
    torch.manual_seed(seed)
    model = (AutoModelForMultimodalLM if is_composite else AutoModelForCausalLM).from_config(config).float()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() >= 2 and "embed" not in name:
                p.mul_(4)
    return model.eval()
