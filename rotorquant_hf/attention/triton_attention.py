"""Attention over cached states through the kernels: prepare, attend, combine."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.states import KVStates, unit_stride
from rotorquant_hf.backend import runs_ptx
from rotorquant_hf.kernels.attend import ADDED_MASK, BOOL_MASK, NO_MASK, attend_kernel
from rotorquant_hf.kernels.combine import MAX_EXACT_SPLITS, Combine
from rotorquant_hf.kernels.launch import Launch
from rotorquant_hf.kernels.lookup import (
    centroid_table,
    integer_unit,
    integer_words,
    integers_of,
    pairs_of,
    ptx_words,
    table_unit,
)
from rotorquant_hf.kernels.queries import PrepareQueries
from rotorquant_hf.kernels.sizes import padded, pieces, power_of_2

# A split of fewer tokens is not worth its partial result.
_MIN_SPLIT = 256
# Where this is the limit of registers, eight programs of two warps fit onto a processor.
_REGISTERS = 128
_REGISTERS_PER_PROCESSOR = 1 << 16
_NO_STRIDES: tuple[int, ...] = (0, 0, 0, 0)
# Elements of the float32 partial results: 256 MiB.
_MAX_SUMS = 1 << 26


@dataclass(frozen=True)
class Tiling:
    """How the attention kernel is cut up.

    Attributes:
        block_m: query rows of a program. block_n: packed tokens of a step.
        exact_n: full-precision tokens of a step.
        splits: programs that share the packed tokens. warps, stages: of Triton.
        exact_splits: programs that share the tokens in full precision.
        direct: keys are looked up in the registers that the product takes; see `slot_centroids`.
        registers: limit of a thread's; None for none.
        pairs: values of 2, 3 or 4 bits are too, if not 0; see `load_pairs`. By so many parts of a
            step's tokens, each of which has sums of its own.
        integers: scores are products of integers; see `slot_integers`. With `direct`.
        exact_stages: of the loop over tokens in full precision; None for `stages`.
    """

    block_m: int
    block_n: int
    exact_n: int
    splits: int
    warps: int
    stages: int
    direct: bool = False
    registers: int | None = None
    exact_splits: int = 1
    pairs: int = 0
    integers: bool = False
    exact_stages: int | None = None


@dataclass(frozen=True)
class Device:
    """What of a GPU the tiling depends on.

    Attributes:
        processors: their number. shared: bytes of shared memory of each.
        integers: whether it multiplies integers of 8 bits faster than float16.
    """

    processors: int
    shared: int
    integers: bool = True

    @classmethod
    @functools.lru_cache(maxsize=16)
    def of(cls, device: torch.device) -> Device:
        """That of a CUDA device; elsewhere (in the interpreter) one processor."""
        if device.type != "cuda":
            return cls(1, 1 << 17)
        found = torch.cuda.get_device_properties(device)
        # B300 has a small fraction of these products; nobody has measured it, or B200.
        integers = found.major != 10
        return cls(found.multi_processor_count, found.shared_memory_per_multiprocessor, integers)


@functools.lru_cache(maxsize=1024)
def choose_tiling(
    rows: int,
    programs: int,
    tokens: int,
    d: tuple[int, int],
    bits: tuple[int, int],
    device: Device,
    dtype: torch.dtype,
    signs: bool = False,
) -> Tiling:
    """A tiling of attention.

    Args:
        rows: query rows of a kv head. programs: batch * kv heads. tokens: packed ones.
        d, bits: head dim, and bits an element, of keys and of values.
        device: what runs it. dtype: of the operands. signs: whether keys have them.
    """
    half = dtype == torch.float16
    larger, code_bits = max(d), sum(bits)
    wide = larger > 256 or not half  # tiles of float32 take twice the shared memory
    # With 64 rows, d over 128 and a mask, a program would take more shared memory than sm_86, 89
    # and 120 have.
    most = 16 if wide else 32 if larger > 128 else 64
    block_m = min(max(power_of_2(rows), 8 if half else 16), most)
    narrow = half and larger <= 128 and block_m < 32
    block_n = (64 if half else 32) if larger <= 128 or (half and larger <= 256) else 16
    warps = 2 if narrow else 4
    registers = _REGISTERS if narrow and not signs else None
    if registers and power_of_2(larger) * code_bits <= 512:
        block_n = 128  # what a step costs beside its look-ups is then shared by as many codes
    resident = _REGISTERS_PER_PROCESSOR // (32 * warps * (registers or 255))
    # Centroids on their way to the operands, and codes of a step ahead. Of a processor's shared
    # memory a program takes 1 KiB more than its own.
    shared = block_n * (2 * larger + code_bits * larger // 8) + 3072
    resident = max(1, min(resident, device.shared // shared))
    programs *= pieces(rows, block_m)
    return Tiling(
        block_m=block_m,
        block_n=block_n,
        exact_n=16,
        splits=_splits(programs, tokens, block_n, resident * device.processors),
        warps=warps,
        stages=1 if wide else 3,
        direct=half and larger <= 128,
        registers=registers,
        # A processor takes a program's tokens in full precision one step after the other. Where
        # programs are few, all wait for it.
        exact_splits=MAX_EXACT_SPLITS if 8 * programs <= device.processors else 1,
        pairs=_pairs(pairs_of(d[1], bits[1]), warps, block_n) if half and block_m < 32 else 0,
        # A product of integers takes 32 columns.
        integers=narrow and device.integers and padded(integers_of(d[0], bits[0])) >= 32,
    )


def _pairs(columns: int, warps: int, tokens: int) -> int:
    """Parts of a step's tokens, if values are looked up in `columns` pairs of bytes; else 0.

    A product takes its rows, a pair each, and its tokens by the sixteen. Where there are fewer rows
    than sixteen for every warp, warps share the tokens. Up to eight pairs are columns instead; with
    four or less, half the look-ups would be in vain.
    """
    parts = warps if columns <= 8 else max(1, 16 * warps // padded(columns))
    return parts if columns > 4 and tokens >= 16 * parts else 0


def _splits(programs: int, tokens: int, block_n: int, resident: int) -> int:
    """How many programs share the packed tokens, so that the last to begin ends early.

    Programs run in waves of `resident`; each split takes its steps, and about four more to begin,
    to end and to be added up. What begins together does not end together: a fifth of a program's
    time is lost at the end. One program more, for tokens in full precision, is among those of every
    kv head.
    """

    def time(splits: int) -> float:
        waves = pieces(programs * (splits + 1), resident)
        return (waves + 0.2) * (pieces(pieces(tokens, splits), block_n) + 4)

    most = max(1, min(pieces(tokens, _MIN_SPLIT), 4 * pieces(resident, programs)))
    return min(range(1, most + 1), key=time)


def default_tiling(query: Tensor, keys: KVStates, values: KVStates) -> Tiling:
    """The tiling of attention of queries (batch, query heads, n, key dim) over cached states."""
    return _default_tilings(query, keys, values)(tokens=values.max_packed)


def _default_tilings(query: Tensor, keys: KVStates, values: KVStates) -> Callable[..., Tiling]:
    """`default_tiling` for other numbers of packed `tokens`."""
    batch, query_heads, n, d_k = query.shape
    heads, d_v = values.shape[1], values.shape[3]
    key_quantizer, value_quantizer = keys.packed.quantizer, values.packed.quantizer
    return functools.partial(
        choose_tiling,
        rows=n * query_heads // heads,
        programs=batch * heads,
        d=(d_k, d_v),
        bits=(key_quantizer.stage_one.bits, value_quantizer.stage_one.bits),
        device=Device.of(query.device),
        dtype=_operands(query),
        signs=key_quantizer.num_signs > 0,
    )


def _operands(query: Tensor) -> torch.dtype:
    """The dtype of the operands of matrix products."""
    return torch.float32 if query.dtype == torch.float32 else torch.float16


def attend_packed(
    query: Tensor,
    keys: KVStates,
    values: KVStates,
    options: AttentionOptions,
    tiling: Tiling | None = None,
) -> Tensor:
    """Attention of queries (batch, query heads, n, key dim) over cached keys and values.

    Many queries are split up, so that their partial results stay within `_MAX_SUMS` elements.
    Float16 and bfloat16 queries compute with float16 operands and float32 sums, float32 queries
    with float32 throughout. Returns (batch, query heads, n, value dim) in the query's dtype.
    """
    with torch.cuda.device_of(query):  # Triton launches on the current device
        return _attend_all(query, keys, values, options, tiling)


def _attend_all(
    query: Tensor,
    keys: KVStates,
    values: KVStates,
    options: AttentionOptions,
    tiling: Tiling | None,
) -> Tensor:
    batch, query_heads, n, _ = query.shape
    max_n = _queries_at_once(query, keys, values, tiling)
    if n <= max_n:
        return _attend_some(query, keys, values, options, n, tiling)
    out = query.new_empty(batch, query_heads, n, values.shape[3])
    for start in range(0, n, max_n):
        some = slice(start, min(start + max_n, n))
        mask = options.mask
        if mask is not None and mask.dim() > 1 and mask.shape[-2] > 1:
            mask = mask[..., some, :]
        out[:, :, some] = _attend_some(
            query[:, :, some], keys, values, replace(options, mask=mask), n - start, tiling
        )
    return out


def _queries_at_once(query: Tensor, keys: KVStates, values: KVStates, tiling: Tiling | None) -> int:
    """Of how many queries the partial results, one of every split, stay within `_MAX_SUMS`."""
    batch, query_heads, n, _ = query.shape
    while n > 1:
        cut = tiling or default_tiling(query[:, :, :n], keys, values)
        partial = (cut.splits + cut.exact_splits) * batch * query_heads * values.shape[3]
        most = max(1, _MAX_SUMS // partial)
        if n <= most:
            break
        n = most  # which may be cut into more splits
    return n


def _attend_some(
    query: Tensor,
    keys: KVStates,
    values: KVStates,
    options: AttentionOptions,
    from_end: int,
    tiling: Tiling | None,
) -> Tensor:
    """Attention of queries of which the first is the `from_end`-th from the last token."""
    kind = (query.shape, query.dtype, _kind_of(options), tiling)
    plan = keys.plans.get(kind)
    if plan is None:
        plan = keys.plans[kind] = _Plan(query, keys, values, options, tiling)
    return plan(query, keys, options, from_end)


def _kind_of(options: AttentionOptions) -> tuple[object, ...]:
    """What of the options the kernels are compiled for, or bound to."""
    mask = None if options.mask is None else options.mask.dtype
    sinks = None if options.sink_logits is None else options.sink_logits.dtype
    return options.scale, options.causal, options.softcap, mask, sinks


class _Plan:
    """Attention over states that stay in the same memory: what stays from step to step.

    Args:
        query: of the shape and dtype of those to come. options: likewise.
        tiling: None for the default, whose number of splits goes with the packed tokens.
    """

    def __init__(
        self,
        query: Tensor,
        keys: KVStates,
        values: KVStates,
        options: AttentionOptions,
        tiling: Tiling | None,
    ) -> None:
        self._tilings = _default_tilings(query, keys, values)
        self._tiling = tiling
        tiling = tiling or self._tilings(tokens=values.max_packed)
        batch, query_heads, n, d_k = query.shape
        heads, d_v = values.shape[1], values.shape[3]
        group, total = query_heads // heads, batch * heads
        rows, device, dtype = n * group, query.device, _operands(query)
        (k_rows, k_recent), (v_rows, v_recent) = keys.device_view(), values.device_view()
        k_sinks, v_sinks = unit_stride(keys.sinks), unit_stride(values.sinks)
        packed_keys, packed_values = keys.packed, values.packed
        k_bits = packed_keys.quantizer.stage_one.bits
        v_bits = packed_values.quantizer.stage_one.bits
        signs = packed_keys.quantizer.num_signs
        mask = NO_MASK
        if options.mask is not None:
            mask = BOOL_MASK if options.mask.dtype == torch.bool else ADDED_MASK
        # The kernel takes pointers that it does not read: without signs, those of others.
        k_signs = k_rows["signs"] if signs else k_rows["codes"]
        k_norm = k_rows["residual_norm"] if signs else k_rows["scale"]
        self._mask, self._total, self._rows, self._d_v = mask, total, rows, d_v
        self._tiles = pieces(rows, tiling.block_m)
        self._out = (batch, query_heads, n, d_v)
        ptx = dtype == torch.float16 and runs_ptx(device)
        integers = ptx and tiling.direct and tiling.integers
        pairs = tiling.pairs if ptx and pairs_of(d_v, v_bits) > 0 else 0
        self._prepare = PrepareQueries(packed_keys, batch, query_heads, n, dtype, integers)
        # From the table's centroids to those of N(0, 1/d).
        key_unit = (integer_unit if integers else table_unit)(k_bits) / math.sqrt(d_k)
        k_words = integer_words(k_bits, 0, device) if integers else ptx_words(k_bits, device)
        v_words = integer_words(v_bits, 128, device) if pairs else ptx_words(v_bits, device)
        sinks = options.sink_logits is not None
        self._combine = Combine(packed_values, batch, query_heads, n, sinks)
        self._attend = Launch(
            attend_kernel,
            p_kcodes=k_rows["codes"],
            **_strides("stride_kc", "bh", k_rows["codes"]),
            p_kscale=k_rows["scale"],
            **_strides("stride_ks", "bh", k_rows["scale"]),
            p_ksigns=k_signs,
            **_strides("stride_kg", "bh", k_signs),
            p_knorm=k_norm,
            **_strides("stride_kn", "bh", k_norm),
            p_vcodes=v_rows["codes"],
            **_strides("stride_vc", "bh", v_rows["codes"]),
            p_vscale=v_rows["scale"],
            **_strides("stride_vs", "bh", v_rows["scale"]),
            p_sink_k=k_sinks,
            **_strides("stride_sk", "bht", k_sinks),
            p_sink_v=v_sinks,
            **_strides("stride_sv", "bht", v_sinks),
            p_recent_k=k_recent,
            **_strides("stride_rk", "bht", k_recent),
            p_recent_v=v_recent,
            **_strides("stride_rv", "bht", v_recent),
            recent_slots=k_recent.shape[2],
            p_lengths=keys.lengths(),
            stride_f=total * rows,
            scale=options.scale,
            softcap=options.softcap or 1.0,
            stride_digit=total * rows * d_k if integers else 0,
            key_unit=key_unit,
            # Of the QJL estimate; see `RotorQuantProd`.
            sign_unit=math.sqrt(math.pi / 2) / max(signs, 1),
            heads=heads,
            group=group,
            rows=rows,
            p_ktable=centroid_table(k_bits, dtype, device),
            p_kwords=k_words,
            p_vtable=centroid_table(v_bits, dtype, device),
            p_vwords=v_words,
            D_K=d_k,
            D_V=d_v,
            K_BITS=k_bits,
            V_BITS=v_bits,
            SIGNS=signs,
            MASK=mask,
            CAUSAL=options.causal,
            SOFTCAP=options.softcap is not None,
            PTX=ptx,
            DIRECT=tiling.direct,
            INTEGERS=integers,
            PAIRS=pairs,
            BLOCK_M=tiling.block_m,
            BLOCK_N=tiling.block_n,
            EXACT_N=tiling.exact_n,
            EXACT_STAGES=tiling.exact_stages or tiling.stages,
            num_warps=tiling.warps,
            num_stages=tiling.stages,
            **({} if tiling.registers is None else {"maxnreg": tiling.registers}),
        )

    def __call__(
        self, query: Tensor, keys: KVStates, options: AttentionOptions, from_end: int
    ) -> Tensor:
        rotated, projected, factors = self._prepare(query)
        tiling = self._tiling or self._tilings(tokens=keys.max_packed)
        exact_splits = tiling.exact_splits
        splits = tiling.splits + exact_splits
        sums = query.new_empty(self._total, splits, self._rows, self._d_v, dtype=torch.float32)
        stats = query.new_empty(2, self._total, splits, self._rows, dtype=torch.float32)
        out = query.new_empty(self._out)
        mask, mask_strides = query, _NO_STRIDES  # not read
        if options.mask is not None:
            mask = options.mask.expand(*self._out[:3], keys.shape[2])
            mask = mask.view(torch.uint8) if self._mask == BOOL_MASK else mask
            mask_strides = mask.stride()
        self._attend(
            (self._tiles * splits * self._total, 1, 1),
            rotated,
            projected,
            factors,
            query,
            *query.stride(),
            from_end,
            mask,
            *mask_strides,
            sums,
            stats,
            stats.stride(0),
            splits,
            exact_splits,
        )
        logits = None if options.sink_logits is None else options.sink_logits.contiguous()
        self._combine(sums, stats, out, logits, exact_splits)
        return out


def _strides(name: str, axes: str, x: Tensor) -> dict[str, int]:
    """The first strides of a tensor, by the names of the kernel's arguments."""
    return {name + axis: stride for axis, stride in zip(axes, x.stride(), strict=False)}
