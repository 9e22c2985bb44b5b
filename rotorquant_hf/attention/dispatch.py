"""Attention over cached states: checks what is asked for, then computes it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rotorquant_hf.attention.native_attention import attend_native, native_takes
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.states import KVStates, RingStates, are_of_one_step
from rotorquant_hf.attention.torch_attention import attend_tiled
from rotorquant_hf.backend import is_capturing, kernels_take, uses_native, uses_triton


def attend(query: Tensor, keys: KVStates, values: KVStates, options: AttentionOptions) -> Tensor:
    """Attention that reads the packed codes and never holds the dequantised history.

    Args:
        query: (batch, query heads, n, key dim), floating; query heads are a multiple of the
            states' heads, and heads g k ... g k + g - 1 read kv head k.
        keys: (batch, heads, tokens, key dim).
        values: (batch, heads, tokens, value dim), of the same tokens.
        options: the settings.

    Returns:
        (batch, query heads, n, value dim) in the query's dtype, computed in float32; zeros for a
        query that sees no token.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
        RuntimeError: if a gradient is needed, which packed codes do not give.
    """
    problem = why_unsupported(query, keys, values, options)
    if problem is not None:
        raise ValueError(problem)
    if needs_gradient(query, keys, values, options):
        raise RuntimeError(
            "attention over packed codes has no gradient; call it under torch.no_grad(), or use "
            "the materialised keys and values"
        )
    return compute(query, keys, values, options)


def compute(query: Tensor, keys: KVStates, values: KVStates, options: AttentionOptions) -> Tensor:
    """`attend` without its checks, for callers that have made them.

    Raises:
        ValueError: for a mask while a CUDA graph is being captured.
    """
    mask = _mask_by_place(keys, options.mask)
    if mask is not options.mask:
        options = replace(options, mask=mask)
    if _by_kernels(query, keys, values):
        from rotorquant_hf.attention.triton_attention import attend_packed

        return attend_packed(query, keys, values, options)
    if uses_native(query.device) and native_takes(query, keys, values):
        return attend_native(query, keys, values, options)
    return attend_tiled(query, keys, values, options)


def _mask_by_place(keys: KVStates, mask: Tensor | None) -> Tensor | None:
    """The mask of the tokens where the states have them: of padding, if attention gets none."""
    if mask is None:
        return keys.padding if isinstance(keys, RingStates) else None
    if is_capturing(mask.device):
        raise ValueError(
            "this attention has a mask, whose length a CUDA graph would freeze; give the graph the "
            "attention_mask of padded rows, and call model.set_attn_implementation('rotorquant')"
        )
    return mask if keys.stand_ins is None else keys.stand_ins.masked(mask, keys.shape[2])


def _by_kernels(query: Tensor, keys: KVStates, values: KVStates) -> bool:
    if isinstance(keys, RingStates) and query.dtype != torch.float32:
        # The kernels have made them, so that nothing else has to be looked at in a decode step.
        return uses_triton(query.device)
    return kernels_take(query.device, query.dtype, keys.packed.quantizer, values.packed.quantizer)


def needs_gradient(
    query: Tensor, keys: KVStates, values: KVStates, options: AttentionOptions
) -> bool:
    """Whether autograd would record this call."""
    if not torch.is_grad_enabled():
        return False
    stored = (keys.sinks, keys.recent, values.sinks, values.recent)
    inputs = (query, *stored, options.mask, options.sink_logits)
    return any(x is not None and x.requires_grad for x in inputs)


def why_unsupported(
    query: Tensor, keys: KVStates, values: KVStates, options: AttentionOptions
) -> str | None:
    """Why `attend` would not take these, and what to pass instead; None if it takes them."""
    problem = _why_apart(keys, values)
    if problem is not None:
        return problem
    batch, heads, tokens, d = keys.shape
    shape = query.shape
    if len(shape) != 4 or shape[0] != batch or shape[3] != d or shape[1] % heads:
        return f"query has shape {tuple(shape)}; pass ({batch}, a multiple of {heads}, n, {d})"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"query is {query.dtype}; pass float32, bfloat16 or float16"
    if query.device != keys.sinks.device:
        return f"query is on {query.device}, the keys are on {keys.sinks.device}; move one"
    return _why_options_unsupported(options, (*shape[:3], tokens))


def _why_apart(keys: KVStates, values: KVStates) -> str | None:
    """Why keys and values are not those of one update; None if they may be."""
    if are_of_one_step(keys, values):
        return None  # as in every decode step: what follows takes its time
    for part, ours, theirs in (
        ("sinks", keys.sinks, values.sinks),
        ("packed tokens", keys.packed, values.packed),
        ("tokens", keys, values),
    ):
        if ours.shape[:3] != theirs.shape[:3]:
            return (
                f"the {part} of the keys are {tuple(ours.shape[:3])} (batch, heads, tokens), of "
                f"the values {tuple(theirs.shape[:3])}; pass the two of one update"
            )
    return None


def _why_options_unsupported(options: AttentionOptions, scores: tuple[int, ...]) -> str | None:
    mask, sink_logits, softcap = options.mask, options.sink_logits, options.softcap
    if mask is not None and mask.dtype != torch.bool and not mask.is_floating_point():
        return f"mask is {mask.dtype}; pass a boolean or a floating one"
    if mask is not None and not _broadcasts(mask.shape, scores):
        return f"mask has shape {tuple(mask.shape)}; pass one that broadcasts to {scores}"
    if sink_logits is not None and sink_logits.shape != scores[1:2]:
        return (
            f"sink_logits have shape {tuple(sink_logits.shape)}; pass one per query head, "
            f"({scores[1]},)"
        )
    if softcap is not None and softcap <= 0:
        return f"softcap is {softcap}; pass a positive number, or None"
    return None


def _broadcasts(shape: torch.Size, target: tuple[int, ...]) -> bool:
    sizes = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(a in (1, b) for a, b in sizes)
