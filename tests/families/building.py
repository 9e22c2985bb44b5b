"""Tiny models of all families: a config's sizes made small, whatever the family calls them."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.families.exceptions import NOT_BUILT, OPTIONS
from tests.helpers.models import MODELS, SLIDING_WINDOW, VOCAB

_SIZES: dict[int, str] = {
    2: """num_key_value_heads num_kv_heads num_experts num_local_experts n_routed_experts
        num_experts_per_tok num_experts_per_token moe_topk moe_k moe_num_experts num_hidden_layers
        n_layer n_layers num_layers decoder_layers encoder_layers swa_num_key_value_heads
        linear_num_key_heads index_n_heads type_vocab_size mamba_n_groups n_groups
        num_key_value_groups""",
    1: "n_group topk_group n_shared_experts num_shared_experts first_k_dense_replace",
    4: """num_attention_heads n_head n_heads num_heads decoder_attention_heads mamba_n_heads
        encoder_attention_heads attention_heads swa_num_attention_heads linear_num_value_heads
        n_mamba_heads""",
    8: """qk_rope_head_dim rotary_dim mamba_chunk_size chunk_size hidden_size_per_layer_input
        laurel_rank adapter_rank d_rel""",
    16: """head_dim v_head_dim qk_nope_head_dim kv_lora_rank swa_head_dim mamba_d_state state_size
        linear_key_head_dim linear_value_head_dim query_pre_attn_scalar router_hidden_size
        index_head_dim kv_channels""",
    24: "q_lora_rank",
    32: """moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size rel_extent
        mamba_d_head global_head_dim""",
    64: """hidden_size n_embd d_model embedding_size word_embed_proj_dim attention_hidden_size
        lru_width mamba_d_ssm shared_intermediate_size""",
    96: """intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size n_inner
        intermediate_size_mlp dff dim_ff d_inner""",
    512: """index_topk max_position_embeddings n_positions n_ctx max_seq_len max_sequence_length
        max_target_positions""",
    VOCAB: "vocab_size vocab_size_per_layer_input",
    SLIDING_WINDOW: "sliding_window attention_chunk_size sliding_window_size",
}
_VALUES: dict[str, Any] = {name: size for size, names in _SIZES.items() for name in names.split()}
_VALUES |= {
    "initializer_range": 0.06,
    "init_std": 0.06,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "is_decoder": True,
    "use_cache": True,
}
_KINDS = ("layer_types", "layers_block_type")
_MAX_LAYERS = 4


class NotBuiltError(Exception):
    """A family that has no tiny model, and why."""


@functools.cache
def families() -> dict[str, tuple[Any, Any]]:
    """Config and model class of every family by its name."""
    return {
        name: (CONFIG_MAPPING[name], MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]])
        for name in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    }


def _fields(config_class: Any) -> set[str]:
    """The options of a config."""
    found: set[str] = set()
    for base in config_class.__mro__:
        found |= set(getattr(base, "__annotations__", {}))
        init = vars(base).get("__init__")
        if init is not None and hasattr(init, "__code__"):
            found |= set(init.__code__.co_varnames[: init.__code__.co_argcount])
    return found


def tiny_config(name: str) -> Any:
    """The config of a family's tiny model.

    Raises:
        NotBuiltError: with the reason.
    """
    if name in NOT_BUILT:
        raise NotBuiltError(NOT_BUILT[name])
    config_class, model_class = families()[name]
    if model_class.__name__.endswith("ForConditionalGeneration"):
        raise NotBuiltError("reads more than text; its language model is another family")
    if (
        model_class.config_class.model_type != name
        and model_class.config_class.model_type in families()
    ):
        raise NotBuiltError(f"its language model is that of {model_class.config_class.model_type}")
    config_class = model_class.config_class
    for tiny in MODELS.values():
        if getattr(transformers, f"{tiny.prefix}Config", None) is config_class:
            return config_class(**tiny.base | tiny.options)
    return _shrunk(config_class, OPTIONS.get(name, {}))


def _shrunk(config_class: Any, exceptions: dict[str, Any]) -> Any:
    """A config of small sizes, of the configs that are parts of it too."""
    fields = _fields(config_class)
    options = {field: value for field, value in _VALUES.items() if field in fields}
    whole = config_class()
    for field in [field for field in options if _is_off(whole, field)]:
        del options[field]
    if "kv_lora_rank" in options and "num_key_value_heads" in options:  # latent attention
        options["num_key_value_heads"] = options["num_attention_heads"]
    options |= _some_layers(whole, fields)
    for part, part_class in config_class.sub_configs.items():
        if hasattr(part_class, "sub_configs"):
            small = _shrunk(part_class, exceptions.get(part, {}))
            options[part] = small if part_class.model_type else small.to_dict()
    rest = {k: v for k, v in exceptions.items() if k not in config_class.sub_configs}
    return config_class(**options | rest)


def _is_off(whole: Any, field: str) -> bool:
    return isinstance(_VALUES[field], int) and vars(whole).get(field, 0) is None


def _some_layers(whole: Any, fields: set[str]) -> dict[str, Any]:
    """One layer of every kind, two at least: what the config says of each, and their number."""
    count = getattr(whole, "num_hidden_layers", None)
    if not isinstance(count, int):
        return {}
    lists = {
        field: list(value)
        for field in fields
        if isinstance(value := vars(whole).get(field), list | tuple) and len(value) == count
    }
    kinds = list(zip(*(lists[name] for name in _KINDS if name in lists), strict=True))
    first = [i for i in range(len(kinds)) if kinds[i] not in kinds[:i]]
    chosen = first[:_MAX_LAYERS] if len(first) > 1 else list(range(min(2, count)))
    return {field: [value[i] for i in chosen] for field, value in lists.items()} | {
        "num_hidden_layers": len(chosen)
    }


@functools.lru_cache(maxsize=4)
def build(name: str, attention: str) -> Any:
    """The tiny model of a family, the same weights every time.

    Raises:
        NotBuiltError: with the reason.
    """
    config = tiny_config(name)
    _, model_class = families()[name]
    config._attn_implementation = attention
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
    model.generation_config.eos_token_id = model.generation_config.bos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.float().eval()
