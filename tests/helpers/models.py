"""Tiny models of many architectures, drawn at random from their configs: nothing is downloaded.

`MODELS` has one entry per architecture; every test of models iterates it.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.passing import cache_argument
from rotorquant_hf.store.buffers import TokenBuffers

VOCAB = 97
SLIDING_WINDOW = 24
"""Of every sliding layer, in tokens: longer than the exact windows of the tests."""

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.06,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 512,
    "initializer_range": 0.06,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SLIDING_AND_FULL = {
    "sliding_window": SLIDING_WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
_SHARED_KV = {
    "sliding_window": SLIDING_WINDOW,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}
# All experts are taken: the choice of some is a discontinuity, which would hide small errors.
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
_MAMBA = {"mamba_n_heads": 4, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}


@dataclass(frozen=True)
class Tiny:
    """How to build one architecture.

    Attributes:
        prefix: of the class names, `<prefix>Config` and `<prefix>ForCausalLM`.
        options: of the config, besides those of `base`.
        base: options that many configs share.
        model: the model's class, where it does not have the usual name.
        layers: what a cache holds for each layer: "full" and "sliding" attention are
            compressed, "hybrid" and "hybrid_sliding" have states beside it, "own" is kept by
            Transformers' own layer. Layers without a cache are left out.
        attention: attention implementations of the CPU that compute the same; the first is used.
    """

    prefix: str
    options: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=lambda: _LLAMA)
    model: str | None = None
    layers: tuple[str, ...] = ("full", "full")
    attention: tuple[str, ...] = ("sdpa", "eager")

    @property
    def sliding(self) -> bool:
        """Whether there is a layer of sliding-window attention."""
        return any(kind.endswith("sliding") for kind in self.layers)

    @property
    def stateful(self) -> bool:
        """Whether there is a layer with recurrent or convolution states."""
        return not {"own", "hybrid", "hybrid_sliding"}.isdisjoint(self.layers)

    @property
    def uniform(self) -> bool:
        """Whether all layers have full attention, so that a cache needs no config."""
        return set(self.layers) == {"full"}


_HALF = ("sliding", "full")

MODELS: dict[str, Tiny] = {
    # Full attention in all layers
    "llama": Tiny("Llama"),
    "qwen2": Tiny("Qwen2"),
    "qwen3": Tiny("Qwen3", {"head_dim": 16}),
    "qwen3_moe": Tiny("Qwen3Moe", {"head_dim": 16, "num_experts": 2, **_EXPERTS}),
    "mixtral": Tiny("Mixtral", {"num_local_experts": 2, "sliding_window": None}),
    "gemma": Tiny("Gemma", {"head_dim": 16}),
    "phi": Tiny("Phi"),
    "phi3": Tiny("Phi3", {"hidden_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "gpt2": Tiny("GPT2", base=_GPT2, model="GPT2LMHeadModel"),
    "gpt_bigcode": Tiny("GPTBigCode", base=_GPT2),
    "gptj": Tiny("GPTJ", {"rotary_dim": 8}, _GPT2, attention=("eager",)),
    "codegen": Tiny("CodeGen", {"rotary_dim": 8}, _GPT2, attention=("eager",)),
    "gpt_neox": Tiny("GPTNeoX"),
    "gpt_neo": Tiny(
        "GPTNeo",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4},
        attention=("eager",),
    ),
    "opt": Tiny("OPT", {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.06}),
    "bloom": Tiny("Bloom", {"n_layer": 2, "n_head": 4}, attention=("eager",)),
    "mpt": Tiny(
        "Mpt",
        {"vocab_size": VOCAB, "d_model": 64, "n_heads": 4, "n_layers": 2, "use_cache": True},
        {"initializer_range": 0.06, "bos_token_id": None, "eos_token_id": None},
        attention=("eager",),
    ),
    "falcon": Tiny("Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon_multi_query": Tiny("Falcon", {"multi_query": True}),
    "stablelm": Tiny("StableLm"),
    "persimmon": Tiny("Persimmon"),
    "nemotron": Tiny("Nemotron"),
    "olmo2": Tiny("Olmo2"),
    "glm4": Tiny("Glm4", {"head_dim": 16}),
    "granite": Tiny("Granite"),
    "smollm3": Tiny("SmolLM3"),
    # Keys are the latent vectors (16), values the part that RoPE turns (8)
    "deepseek_v3": Tiny(
        "DeepseekV3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "n_routed_experts": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            **_EXPERTS,
        },
    ),
    # Sliding windows
    "mistral": Tiny("Mistral", {"sliding_window": SLIDING_WINDOW}, layers=("sliding", "sliding")),
    "starcoder2": Tiny(
        "Starcoder2", {"sliding_window": SLIDING_WINDOW}, layers=("sliding", "sliding")
    ),
    "ministral": Tiny("Ministral", {"head_dim": 16, **_SLIDING_AND_FULL}, layers=_HALF),
    "cohere2": Tiny("Cohere2", _SLIDING_AND_FULL, layers=_HALF),
    "exaone4": Tiny("Exaone4", {"sliding_window_pattern": 2, **_SLIDING_AND_FULL}, layers=_HALF),
    # Soft-capping, which sdpa leaves out
    "gemma2": Tiny(
        "Gemma2",
        {"head_dim": 16, "query_pre_attn_scalar": 16, **_SLIDING_AND_FULL}
        | {"attn_logit_softcapping": 2.0},
        layers=_HALF,
        attention=("eager",),
    ),
    "gemma3": Tiny(
        "Gemma3Text",
        {
            "num_hidden_layers": 3,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        model="Gemma3ForCausalLM",
        layers=("sliding", "full", "sliding"),
    ),
    # Learned sinks
    "gpt_oss": Tiny(
        "GptOss",
        {
            "head_dim": 16,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            **_SLIDING_AND_FULL,
        },
        layers=_HALF,
        attention=("eager",),
    ),
    # Chunked attention
    "llama4": Tiny(
        "Llama4Text",
        {
            "head_dim": 16,
            "attention_chunk_size": SLIDING_WINDOW,
            "no_rope_layers": [1, 0],
            "moe_layers": [1],
            "num_local_experts": 1,
            "intermediate_size_mlp": 96,
        },
        model="Llama4ForCausalLM",
        layers=_HALF,
    ),
    # The last two layers read the keys and values of the first two
    "gemma3n": Tiny(
        "Gemma3nText",
        {"head_dim": 16, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 4, **_SHARED_KV},
        model="Gemma3nForCausalLM",
        layers=_HALF,
    ),
    "gemma4": Tiny(
        "Gemma4Text",
        {"head_dim": 16, "global_head_dim": 32, **_SHARED_KV},
        model="Gemma4ForCausalLM",
        layers=_HALF,
    ),
    # Linear attention, convolutions and state spaces beside attention
    "qwen3_next": Tiny(
        "Qwen3Next",
        {
            "num_hidden_layers": 4,
            "head_dim": 16,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "num_experts": 2,
            "shared_expert_intermediate_size": 32,
            **_EXPERTS,
        },
        layers=("own", "own", "own", "full"),
    ),
    "lfm2": Tiny(
        "Lfm2",
        {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
        layers=("own", "full", "own"),
    ),
    "granitemoehybrid": Tiny(
        "GraniteMoeHybrid",
        {
            "num_hidden_layers": 3,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_d_head": 32,
            "num_local_experts": 0,
            "shared_intermediate_size": 64,
            **_MAMBA,
        },
        layers=("own", "full", "own"),
    ),
    "jamba": Tiny(
        "Jamba",
        {
            "num_hidden_layers": 3,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "num_experts": 2,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
        },
        layers=("own", "full", "own"),
    ),
    # Attention and states in one layer
    "falcon_h1": Tiny(
        "FalconH1",
        {"mamba_d_ssm": 64, "mamba_d_head": 16, **_MAMBA},
        layers=("hybrid", "hybrid"),
    ),
    "zamba2": Tiny(
        "Zamba2",
        {
            "num_hidden_layers": 3,
            "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
            "num_key_value_heads": 4,
            "mamba_d_state": 16,
            "n_mamba_heads": 4,
            "chunk_size": 8,
            "adapter_rank": 8,
            "use_mem_rope": True,
        },
        layers=("own", "hybrid", "hybrid"),
    ),
    "zaya": Tiny(
        "Zaya",
        {
            "head_dim": 16,
            "sliding_window": SLIDING_WINDOW,
            "layer_types": ["hybrid_sliding", "hybrid"],
            "num_experts": 2,
            "moe_intermediate_size": 32,
            "router_hidden_size": 16,
        },
        layers=("hybrid_sliding", "hybrid"),
    ),
    # Scores with a bias for the distance
    "inkling": Tiny(
        "InklingText",
        {
            "head_dim": 16,
            "swa_head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "sliding_window_size": SLIDING_WINDOW,
            "layer_types": ["hybrid_sliding", "hybrid"],
            "mlp_layer_types": ["dense", "dense"],
            "d_rel": 8,
            "rel_extent": 32,
            "logits_mup_width_multiplier": 1.0,
        },
        model="InklingForCausalLM",
        layers=("hybrid_sliding", "hybrid"),
    ),
}


COMMON = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox"),
    *("gpt_oss", "falcon", "deepseek_v3"),
)
"""Those of `MODELS` that stand for the kinds of attention there are."""


@functools.cache
def build(name: str, attention: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    """The model `name`, the same weights every time. Skips where Transformers lacks it."""
    tiny = MODELS[name]
    names = f"{tiny.prefix}Config", tiny.model or f"{tiny.prefix}ForCausalLM"
    if not all(hasattr(transformers, n) for n in names):
        pytest.skip(f"transformers {transformers.__version__} has no {names[1]}")
    config_class, model_class = (getattr(transformers, n) for n in names)
    config = config_class(**tiny.base | tiny.options)
    config._attn_implementation = attention or tiny.attention[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config)
    return model.to(dtype).eval()


def biased(name: str = "qwen2", layer: int = 1, bias: float = 300.0) -> Any:
    """A model that has, in one layer, key biases far larger than what differs between keys."""
    model = copy.deepcopy(build(name))
    draw_key_biases(model, layer, bias)
    return model


def draw_key_biases(model: Any, layer: int, bias: float = 300.0) -> None:
    """Give a layer of a model, which has key biases, others at random, of such a size."""
    projection = model.model.layers[layer].self_attn.k_proj
    drawn = torch.randn(projection.out_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        projection.bias.copy_(bias * drawn)


@functools.cache
def narrow(name: str, attention: str | None = None, layers: int = 1) -> Any:
    """The model `name` with one kv head, read by two: steps are slow in Triton's interpreter."""
    model = build(name, attention)
    config = copy.deepcopy(model.config)
    config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads = layers, 2, 1
    config.head_dim = 16
    if name == "mistral":
        config.sliding_window = 20
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return type(model)(config).eval()


def left_padded(ids: Tensor, padding: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """A mask (batch, n), and the positions of the tokens, of rows with so many of padding."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(padding):
        mask[row, :count] = 0
    return mask, (mask.cumsum(dim=1) - 1).clamp(min=0)


def prompt(rows: int, tokens: int, vocab: int = VOCAB, seed: int = 0) -> Tensor:
    """Random token ids (rows, tokens), none of them padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, vocab, (rows, tokens), generator=generator)


@torch.no_grad()
def feed(
    model: Any, cache: Any, ids: Tensor, chunks: tuple[int, ...], mask: Tensor | None = None
) -> Tensor:
    """Logits (rows, sum(chunks), vocab) of `ids`, read through the cache chunk by chunk.

    `mask` (rows, tokens) is 0 at padding.
    """
    logits, start = [], 0
    given = cache_argument(model, cache)
    for count in chunks:
        end = start + count
        seen = None if mask is None else mask[:, :end]
        out = model(ids[:, start:end], attention_mask=seen, use_cache=True, **given)
        logits.append(out.logits)
        start = end
    return torch.cat(logits, dim=1)


def relative_error(logits: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference, in standard deviations of the reference."""
    return float((logits - reference).square().mean().sqrt() / reference.std())


def storages(root: Any) -> dict[int, int]:
    """Bytes of every tensor storage that can be reached from an object, by address."""
    found: dict[int, int] = {}
    seen: set[int] = set()
    stack = [root]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if type(item) is Tensor:
            storage = item.untyped_storage()
            if storage.nbytes():
                found[storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple | set):
            stack.extend(item)
        elif type(item).__module__.startswith(("rotorquant_hf", "transformers")):
            stack.extend(vars(item).values() if hasattr(item, "__dict__") else ())
    return found


def snapshot(root: Any) -> Any:
    """A copy of everything that an object holds, as plain values, to be compared with `same`.

    Of buffers only the rows in use: the spare ones are not initialised. Recent tokens are the same
    wherever they lie.
    """
    if isinstance(root, TokenBuffers):
        return snapshot(root.rows(0, len(root)))
    if isinstance(root, Tensor):
        return root.detach().clone()
    if isinstance(root, list | tuple):
        return [snapshot(item) for item in root]
    if isinstance(root, dict):
        return {key: snapshot(value) for key, value in root.items()}
    if isinstance(root, RotorQuantLayer) and root.buffer is not None:
        held = vars(root) | {"_recent": root.buffer.recent(), "buffer": None}
        return {"class": type(root).__name__} | snapshot(held)
    if type(root).__module__.startswith("rotorquant_hf") and hasattr(root, "__dict__"):
        return {"class": type(root).__name__} | snapshot(vars(root))
    return root


def same(a: Any, b: Any) -> bool:
    """Whether two snapshots are equal, tensors bit by bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return (
            isinstance(a, Tensor)
            and isinstance(b, Tensor)
            and a.dtype == b.dtype
            and (torch.equal(a, b))
        )
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return bool(a == b)
