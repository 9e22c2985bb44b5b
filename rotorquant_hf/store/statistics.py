"""What queries, keys and values are like, found by the kernels, the native library or torch.

`QueryMoment.of`, `ChannelStatistics.of_block` and `read_by` are the references, and serve where
neither of the others does.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from rotorquant_hf.backend import MAX_FLOAT32_DIM, uses_native, uses_triton
from rotorquant_hf.native.library import FLOATS, MAX_SIZE
from rotorquant_hf.quant.channels import ChannelStatistics, Measured
from rotorquant_hf.quant.hessian import RANK
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.rope import Rope
from rotorquant_hf.quant.wide import needs_wide, product_shift
from rotorquant_hf.store.native_statistics import native_block, native_hessian, native_moment


def query_moment(
    query: Tensor,
    heads: int,
    rope: Rope | None = None,
    positions: range | Tensor | None = None,
) -> QueryMoment:
    """`QueryMoment.of`."""
    if _kernels_take(query):
        from rotorquant_hf.store.kernel_statistics import kernel_moment

        return kernel_moment(query, heads, rope, positions)
    if _native_takes(query):
        return native_moment(query, heads, rope, positions)
    return QueryMoment.of(query, heads, rope, positions)


def measured_together(keys: Tensor, values: Tensor) -> tuple[Tensor | Measured, Tensor | Measured]:
    """Keys and values as `block_statistics` takes them: measured, where torch is to do that."""
    if all(_kernels_take(x) or _native_takes(x) for x in (keys, values)):
        return keys, values
    return Measured.of_both(keys, values)


def block_statistics(
    x: Tensor | Measured,
    power: float,
    center: bool | str = False,
    rope_layout: str = "none",
    rope: Rope | None = None,
    positions: range | Tensor | None = None,
) -> ChannelStatistics:
    """`ChannelStatistics.of_block`."""
    if isinstance(x, Tensor) and _kernels_take(x) and center != "auto":
        from rotorquant_hf.store.kernel_statistics import kernel_block

        return kernel_block(x, power, bool(center), rope_layout, rope, positions)
    if isinstance(x, Tensor) and _native_takes(x):
        return native_block(x, power, center, rope_layout, rope, positions)
    return ChannelStatistics.of_block(x, power, center, rope_layout, rope, positions)


def read_by(
    statistics: ChannelStatistics,
    queries: QueryMoment,
    rope: Rope | None = None,
    widens: bool = False,
) -> ChannelStatistics:
    """`statistics.read_by(queries, rope)`.

    Args:
        statistics, queries, rope: as there.
        widens: whether to find out if the vectors take WIDE_BITS; then the host waits for a GPU.
    """
    device, d = statistics.scale.device, queries.mean.shape[-1]
    shift = None
    if queries.mean.device == device and d >= RANK and uses_triton(device) and _suits_kernels(d):
        from rotorquant_hf.store.kernel_statistics import kernel_hessian

        hessian, shift = kernel_hessian(statistics, queries, rope)
        found = replace(statistics, hessian=hessian)
    else:
        found = _read_on_a_cpu(statistics, queries, rope) or statistics.read_by(queries, rope)
    if not widens:
        return found
    shift = product_shift(statistics, queries) if shift is None else shift
    return replace(found, needs_wide=needs_wide(shift, queries.score_scale))


def _read_on_a_cpu(
    statistics: ChannelStatistics, queries: QueryMoment, rope: Rope | None
) -> ChannelStatistics | None:
    """`read_by` by the native library; None if it does not take them."""
    device, d = statistics.scale.device, queries.mean.shape[-1]
    if queries.mean.device != device or not uses_native(device) or not RANK <= d <= MAX_SIZE:
        return None
    hessian = native_hessian(statistics, queries, rope)
    # Of a moment that is none, torch says why.
    return None if hessian is None else replace(statistics, hessian=hessian)


def _kernels_take(x: Tensor) -> bool:
    takes = uses_triton(x.device) and _suits_kernels(x.shape[3])
    return takes and x.dtype in FLOATS and x.shape[2] > 0


def _suits_kernels(d: int) -> bool:
    """Whether the kernels take a head dim: many GPUs have no shared memory for larger ones."""
    return d % 8 == 0 and d <= MAX_FLOAT32_DIM


def _native_takes(x: Tensor) -> bool:
    return uses_native(x.device) and x.dtype in FLOATS and x.shape[2] > 0 and x.shape[3] <= MAX_SIZE
