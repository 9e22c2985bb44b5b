"""Attention over cached states through the native library, for CPUs.

`torch_attention.attend_tiled` is the reference.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.states import KVStates, unit_stride
from rotorquant_hf.native.library import (
    FLOATS,
    MAX_SIZE,
    MAX_TERMS,
    Arguments,
    SideArgument,
    library,
)
from rotorquant_hf.quant.quantizer import Quantizer


class NativeTerm(NamedTuple):
    """A `Term` as the library reads it: its elements in their own order.

    Attributes:
        codes, scale: names of the rows.
        bits: of a code. size: codes of a vector.
        table: (2**bits,) float32 centroids. basis: (size, d) float32.
    """

    codes: str
    scale: str
    bits: int
    size: int
    table: Tensor
    basis: Tensor


class Plan:
    """What the library is told of keys and values that stay where they are.

    Args:
        keys, values: as of `attend_native`.
    """

    def __init__(self, keys: KVStates, values: KVStates) -> None:
        self._arguments = a = Arguments()
        a.batch, a.heads = values.shape[:2]
        # Tensors that must live as long as the arguments.
        self._kept = [*_fill(a.keys, keys), *_fill(a.values, values)]
        a.sinks, a.packed = keys.sinks.shape[2], keys.packed.shape[2]

    def arguments(self) -> Arguments:
        """A copy, to be completed by what changes from call to call."""
        return Arguments.from_buffer_copy(self._arguments)


def _plan_of(keys: KVStates, values: KVStates) -> Plan:
    """The plan of keys and values, kept with their memory if that is one of both."""
    plans = keys.plans
    if plans is not values.plans:
        return Plan(keys, values)
    plan: Plan | None = plans.get(Plan)
    if plan is None:
        plan = plans[Plan] = Plan(keys, values)
    return plan


def attend_native(
    query: Tensor,
    keys: KVStates,
    values: KVStates,
    options: AttentionOptions,
    level: str | None = None,
) -> Tensor:
    """As `attend_tiled`.

    Args:
        query, keys, values, options: as there, of numbers that `native_takes`.
        level: one of `LEVELS`; None for the best.
    """
    loaded = library()
    assert loaded is not None
    plan = _plan_of(keys, values)
    a = plan.arguments()
    batch, query_heads, n, _ = query.shape
    q = unit_stride(query.float())
    kept: list[Tensor] = []
    out = torch.empty(batch, query_heads, n, values.shape[3], dtype=torch.float32, device="cpu")
    a.group, a.n = query_heads // a.heads, n
    a.factor, a.softcap, a.causal = options.scale, options.softcap or 0.0, options.causal
    a.query.point(q)
    a.out = out.data_ptr()
    if options.sink_logits is not None:
        logits = options.sink_logits.float().contiguous()
        kept.append(logits)
        a.sink_logits = logits.data_ptr()
    if options.mask is not None:
        mask = options.mask
        mask = mask if mask.dtype == torch.bool else mask.float()
        mask = mask.expand(batch, query_heads, n, keys.shape[2])
        kept.append(mask)
        a.mask.point(mask)
        a.mask_stride_k = mask.stride(3)
    a.recent = keys.shape[2] - a.sinks - a.packed
    loaded.attend(a, level)
    return out.to(query.dtype)


def native_takes(query: Tensor, keys: KVStates, values: KVStates) -> bool:
    """Whether the library, if there is one, computes this attention: it has such numbers."""
    if query.dtype not in FLOATS:
        return False
    if Plan in keys.plans and keys.plans is values.plans:
        return True
    if not {keys.sinks.dtype, values.sinks.dtype} <= FLOATS:
        return False
    return all(_native_terms(x.packed.quantizer) is not None for x in (keys, values))


def _fill(side: SideArgument, states: KVStates) -> list[Tensor]:
    """Describe keys or values; the tensors that must live as long as the description."""
    packed, statistics = states.packed, states.packed.statistics
    terms = _native_terms(packed.quantizer)
    assert terms is not None
    sinks, recent = unit_stride(states.sinks), unit_stride(states.recent)
    side.d, side.terms = packed.quantizer.d, len(terms)
    side.sinks.point(sinks)
    side.recent.point(recent)
    # The arguments point to them; of the terms there is only a cache that forgets.
    kept = [sinks, recent]
    for argument, term in zip(side.term, terms, strict=False):
        codes, scale = unit_stride(packed.rows[term.codes]), packed.rows[term.scale]
        argument.codes.point(codes)
        argument.scale.point(scale)
        argument.bits, argument.size = term.bits, term.size
        argument.table, argument.basis = term.table.data_ptr(), term.basis.data_ptr()
        kept += [codes, term.table, term.basis]
    side.scale.point_channels(statistics.scale)
    if statistics.mean is not None:
        side.mean.point(statistics.mean)
    return kept


@functools.lru_cache(maxsize=64)
def _native_terms(quantizer: Quantizer) -> tuple[NativeTerm, ...] | None:
    """The terms of a quantiser; None if the library does not take them."""
    kinds, terms = quantizer.row_kinds(torch.device("cpu")), []
    with torch.inference_mode(False), torch.no_grad():
        for term in quantizer.terms():
            table, d = term.table, term.basis.shape[1]
            if kinds[term.scale].dtype not in (torch.float16, torch.float32):
                return None
            if len(table.centroids) != 2**table.bits:
                return None
            basis = term.basis.new_zeros(table.d + 1, d).index_copy_(0, table.order, term.basis)
            terms.append(
                NativeTerm(
                    term.codes, term.scale, table.bits, table.d, table.centroids, basis[: table.d]
                )
            )
    fits = len(terms) <= MAX_TERMS and max(term.size for term in terms) <= MAX_SIZE
    return tuple(terms) if fits else None
