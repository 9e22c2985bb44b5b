"""Families that need more than small sizes, and those of which there is no tiny model."""

from __future__ import annotations

from typing import Any

from tests.helpers.models import MODELS, SLIDING_WINDOW, VOCAB

OPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 32},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_output_layers": 1,
    },
    "dots1": {"n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma4_unified_text": MODELS["gemma4"].options,
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling2_loop_text": {
        "num_hidden_layers": 4,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "unpadded_vocab_size": VOCAB,
    },
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "kimi_linear": {"linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention"],
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": SLIDING_WINDOW},
    "roc_bert": {
        "pronunciation_vocab_size": 97,
        "shape_vocab_size": 97,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
}
"""By family, and of a config that is a part of another by the name of the part."""

NOT_BUILT: dict[str, str] = {
    "blt": "several models in one, which divide a text of bytes into patches",
    "cpmant": "its own embedding of a prompt, longer than the text",
    "dots3_note_text": "layers with other numbers of heads than the config says",
    "fuyu": "reads pictures too; its language model is that of persimmon",
    "gemma4_assistant": "reads the cache of the model that it assists",
    "gemma4_unified_assistant": "reads the cache of the model that it assists",
    "minimax": "takes a cache of its own only",
    "musicgen": "writes several codes of sound at a time",
    "musicgen_melody": "writes several codes of sound at a time",
    "openai-gpt": "has no cache",
    "phi4_multimodal": "towers for pictures and sound in the same model",
    "prophetnet": "its number of layers cannot be set",
    "qwen4_exp_text": "most of its sizes have no defaults",
    "reformer": "takes a cache of its own only",
    "rwkv": "takes a cache of its own only",
    "xlm": "has no cache",
    "xlnet": "takes a cache of its own only",
    "xlstm": "takes a cache of its own only",
}
"""By family, the reason."""
