"""The attention implementation "rotorquant" of Transformers.

    model.set_attn_implementation("rotorquant")

Over a `RotorQuantCache` it reads the packed codes; over plain keys and values it computes the same
from them. Besides what "sdpa" computes it knows soft-capping (gemma2) and learned sinks (gpt_oss).

A mask that is merely causal is not built: without a mask, query i of n sees the
tokens up to its own, tokens - n + i. With "sdpa" that is so for a prompt and for single tokens
only; several tokens over a past have a mask of n x tokens there.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask

from rotorquant_hf.attention.dispatch import attend, needs_gradient
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.reference import attention_reference
from rotorquant_hf.attention.tensor import CompressedTensor, show_queries

NAME = "rotorquant"

_MAX_SCORES = 1 << 22
"""Scores held at a time where torch has no kernel: 16 MiB in float32."""

_NOT_COMPUTED = ("output_attentions", "sinks", "indices", "block_indices")
"""Arguments that ask for more: weights as output, a sink per query (inkling2), tokens or blocks
that an indexer has chosen (deepseek_v32, minimax_m3_vl)."""

_changing_masks = threading.Lock()


def register() -> None:
    """Make "rotorquant" known to Transformers: the attention and its masks."""
    AttentionInterface.register(NAME, rotorquant_attention)
    AttentionMaskInterface.register(NAME, rotorquant_mask)


def rotorquant_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """softmax(scaling q k^T + mask) v, in Transformers' interface.

    Args:
        module: the layer's attention; its `is_causal` counts where the argument is None.
        query: (batch, query heads, n, key dim); heads g k ... g k + g - 1 read kv head k.
        key, value: (batch, heads, tokens, dim), compressed or plain.
        attention_mask: (batch or 1, query heads or 1, n or 1, tokens), boolean (True is seen) or
            floating (added); sliding windows are in it. None: causal, see above.
        scaling: factor of the inner products; key dim^-1/2 if None.
        dropout: of the attention weights.
        softcap: scores become softcap * tanh(scores / softcap).
        s_aux: (query heads,), learned logits that take part in the softmax.
        is_causal: whether no mask means a causal one.
        position_bias: (batch or 1, query heads, n, tokens), added to the scaled scores (T5).
        **kwargs: settings that only other implementations need.

    Returns:
        (batch, n, query heads, value dim), and None: weights are never formed.

    Raises:
        ValueError: for arguments that only another implementation computes.
    """
    for name in _NOT_COMPUTED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(
                f"attention implementation {NAME!r} does not compute {name}; use "
                "model.set_attn_implementation('eager')"
            )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    mask, causal = attention_mask, bool(is_causal) and attention_mask is None
    if position_bias is not None:
        mask, causal = _with_bias(position_bias, mask, causal), False
    options = AttentionOptions(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=mask,
        causal=causal and query.shape[2] > 1,
        softcap=softcap,
        sink_logits=s_aux,
    )
    out = None if dropout else _attend_packed(query, key, value, options)
    if out is None:
        out = _attend_plain(module, query, _plain(key), _plain(value), options, dropout)
    show_queries(key, query, mask, options.scale)
    return out.transpose(1, 2).contiguous(), None


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """An additive mask of a bias (batch or 1, query heads, n, tokens) and of what is seen."""
    if causal:
        n, tokens = bias.shape[-2:]
        mask = torch.ones(n, tokens, dtype=torch.bool, device=bias.device).tril(tokens - n)
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


def _attend_packed(
    query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions
) -> Tensor | None:
    """Attention over packed codes, (batch, query heads, n, value dim); None if not possible."""
    if not (isinstance(key, CompressedTensor) and isinstance(value, CompressedTensor)):
        return None
    keys, values = key.packed_states, value.packed_states
    if keys is None or values is None or query.dtype == torch.float64:
        return None
    if needs_gradient(query, keys, values, options):
        return None
    return attend(query, keys, values, options)


def _plain(x: Tensor) -> Tensor:
    return x.materialize() if isinstance(x, CompressedTensor) else x


def _attend_plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    options: AttentionOptions,
    dropout: float,
) -> Tensor:
    """Attention over plain tensors, (batch, query heads, n, value dim)."""
    if options.softcap is not None or options.sink_logits is not None:
        if dropout:
            raise ValueError(
                f"attention implementation {NAME!r} has no dropout with soft-capping or sink "
                "logits; train with model.set_attn_implementation('eager')"
            )
        return _attend_by_rows(query, key, value, options)
    n, tokens = query.shape[2], key.shape[2]
    if options.causal and n < tokens:
        return nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=causal_lower_right(n, tokens),
            dropout_p=dropout,
            scale=options.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    out, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        options.mask,
        dropout=dropout,
        scaling=options.scale,
        is_causal=options.causal,
    )
    return out.transpose(1, 2)


def _attend_by_rows(query: Tensor, key: Tensor, value: Tensor, options: AttentionOptions) -> Tensor:
    """`attention_reference`, some queries at a time."""
    batch, heads, n, _ = query.shape
    tokens = key.shape[2]
    mask = None if options.mask is None else options.mask.expand(batch, heads, n, tokens)
    size = max(1, _MAX_SCORES // (batch * heads * tokens))
    parts = []
    for start in range(0, n, size):
        stop = min(start + size, n)
        end = tokens - n + stop if options.causal else tokens
        seen = None if mask is None else mask[:, :, start:stop, :end]
        some = query[:, :, start:stop], key[:, :, :end], value[:, :, :end]
        parts.append(attention_reference(*some, replace(options, mask=seen)))
    return torch.cat(parts, dim=2)


def rotorquant_mask(
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: PreTrainedConfig | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask (batch, 1, n, tokens) of the layers of one kind: boolean, or None if merely causal.

    Args:
        q_length: n. kv_length: tokens.
        q_offset, kv_offset: positions of the first query and of the first key.
        attention_mask: (batch, positions), False at padding.
        local_size: tokens of a sliding window, or of a chunk.
        allow_is_causal_skip: whether the mask is causal, but for `local_size` and padding.
        config: the model's. Models that do not use `AttentionInterface` get an additive mask,
            since they compute as in "eager".
        **kwargs: besides these, of `sdpa_mask`.
    """
    wanted: dict[str, Any] = {
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "attention_mask": attention_mask,
        "local_size": local_size,
        **kwargs,
    }
    if config is not None and not _uses_interface(type(config)):
        return eager_mask(**wanted)
    if (
        allow_is_causal_skip
        and not isinstance(q_offset, Tensor)
        and q_offset + q_length == kv_offset + kv_length
        and _all_in_reach(q_offset + q_length - 1, kv_offset, local_size, config)
        and _none_padded(attention_mask, kv_offset, kv_length)
    ):
        return None
    return sdpa_mask(**wanted, allow_is_causal_skip=False)


@contextmanager
def single_tokens_without_masks() -> Iterator[None]:
    """Let "sdpa" leave out the masks of single tokens that see all, as "rotorquant" does.

    It leaves them out anyway, except (Transformers 5.17) while a CUDA graph is being captured. One
    thread at a time: what is changed is the process's.
    """
    with _changing_masks:
        usual = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

        def mask(q_length: int, *args: Any, **kwargs: Any) -> Tensor | None:
            return (rotorquant_mask if q_length == 1 else usual)(q_length, *args, **kwargs)

        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = mask
        try:
            yield
        finally:
            ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = usual


def _all_in_reach(
    last: int, first: int, local_size: int | None, config: PreTrainedConfig | None
) -> bool:
    """Whether the query at position `last` reaches back to `first`, through windows and chunks."""
    if local_size is None:
        return True
    chunked = getattr(config, "attention_chunk_size", None) is not None  # chunks start at 0
    return last - (0 if chunked else first) < local_size


def _none_padded(attention_mask: Tensor | None, first: int, tokens: int) -> bool:
    if attention_mask is None:
        return True
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # its values cannot be asked for
        return False
    seen = attention_mask[:, first : first + tokens]
    return seen.shape[1] == tokens and bool(seen.all())


def _uses_interface(config_class: type[PreTrainedConfig]) -> bool:
    """Whether the models of a config leave attention to the implementation chosen.

    If not known, no: the additive masks are right for all.
    """
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        model = mapping.get(config_class, None)
        if not isinstance(model, type):
            continue
        if model._can_set_attn_implementation():
            # Transformers looks at the whole file: an audio tower beside a language model may
            # compute by itself, and knows one kind of attention then.
            return model._supports_sdpa or model._supports_attention_backend
        if mapping is MODEL_FOR_CAUSAL_LM_MAPPING:
            warnings.warn(
                f"{model.__name__} does not use transformers.AttentionInterface: its own "
                f"attention computes instead of {NAME!r}, and dequantises the cache; load it "
                "without attn_implementation",
                stacklevel=2,
            )
        return False
    return False
