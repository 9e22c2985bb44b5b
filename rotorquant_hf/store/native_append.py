"""Coding into the store's rows through the native library, for CPUs.

`quantizer.encode(statistics.normalize(x), statistics.hessian_at(position))` is the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rotorquant_hf.backend import is_known
from rotorquant_hf.native.library import FLOATS, MAX_SIZE, AppendArguments, library
from rotorquant_hf.quant.channels import ChannelStatistics, middle_of_segment
from rotorquant_hf.quant.hessian import RIDGE
from rotorquant_hf.quant.mse import SCALES
from rotorquant_hf.quant.quantizer import Quantizer


def native_takes(dtype: torch.dtype, quantizer: Quantizer) -> bool:
    """Whether the library, if there is one, codes vectors of a dtype: float64 is torch's.

    So are quantisers that are not known here (`backend.is_known`).
    """
    if dtype not in FLOATS or not is_known(quantizer):
        return False
    return max(quantizer.d, quantizer.num_signs) <= MAX_SIZE


def encode_native(
    x: Tensor,
    quantizer: Quantizer,
    statistics: ChannelStatistics,
    position: int,
    rows: dict[str, Tensor],
    level: str | None = None,
) -> bool:
    """Write the rows of vectors that `native_takes`.

    Codes are those of the reference, but where a coordinate lies on the boundary between two, to
    the rounding of float32 sums. They depend on nothing else than the vector: not on those beside
    it, nor on the threads.

    Args:
        x: (batch, heads, n, d), finite.
        quantizer: what codes them.
        statistics: equalisation, centring, and what errors cost.
        position: where in the text the vectors are: in one segment.
        rows: (batch, heads, n, ...), as `Quantizer.encode` names them. They are written to.
        level: one of `LEVELS`; None for the best.

    Returns:
        Whether every vector fits its scale. If not, `rows` are of no use.
    """
    loaded = library()
    assert loaded is not None
    mse = quantizer.stage_one
    x = x if x.stride(3) == 1 else x.contiguous()
    a = AppendArguments()
    a.batch, a.heads, a.tokens, a.d = x.shape
    a.bits, a.rule = mse.bits, SCALES.index(mse.scale)
    a.x.point(x)
    a.channels.point_channels(statistics.scale)
    if statistics.mean is not None:
        a.mean.point(statistics.mean)
    a.rotation = mse.rotation.matrix().data_ptr()
    a.boundaries, a.centroids = mse.boundaries.data_ptr(), mse.centroids.data_ptr()
    if statistics.hessian is not None:
        factor, a.ridge = statistics.hessian.factor.contiguous(), RIDGE
        a.factor.point(factor)
        if statistics.rope is not None:
            a.rope.point(statistics.rope.frequencies, statistics.rope.layout, a.batch)
            a.position = middle_of_segment(position)
    a.codes.point(rows["codes"])
    a.scale.point(rows["scale"])
    if quantizer.sign_matrix is not None:
        a.projections, a.projection = quantizer.num_signs, quantizer.sign_matrix.data_ptr()
        a.signs.point(rows["signs"])
        a.residual_norm.point(rows["residual_norm"])
    return loaded.append(a, level)
