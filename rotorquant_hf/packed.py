"""What attention reads of the packed store: a frozen span of quantised keys and values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from rotorquant_hf.quant import MSECodes, ProdCodes, RotorQuantMSE, RotorQuantProd
from rotorquant_hf.statistics import ChannelStatistics
from rotorquant_hf.tiles import token_tiles

Quantizer = RotorQuantMSE | RotorQuantProd


@dataclass(frozen=True)
class PackedSpan:
    """A run of `tokens` quantised keys or values, sharing the store's memory.

    Attributes:
        rows: views (batch, heads, tokens, ...) of the store's tensors: "codes", "scale" and for
            `RotorQuantProd` also "signs" and "residual_norm".
        statistics: equalisation and centring of these vectors.
        quantizer: what coded them.
    """

    rows: dict[str, Tensor]
    statistics: ChannelStatistics
    quantizer: Quantizer

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(batch, heads, tokens, d)."""
        batch, heads, tokens = self.rows["scale"].shape
        return batch, heads, tokens, self.quantizer.d

    def decode(self, tokens: slice) -> Tensor:
        """Rotated, equalised coordinates of some tokens: (batch, heads, n, d) float32.

        <rotate(q * weight), decode> + <q, mean> is the estimate of <q, x>.
        """
        return decode(self.quantizer, {k: v[:, :, tokens] for k, v in self.rows.items()})

    def _tiles(self) -> Iterator[slice]:
        batch, heads, tokens, d = self.shape
        return token_tiles(tokens, batch * heads * d)

    def materialize(self, out: Tensor) -> None:
        """Write the reconstructed vectors into `out`, (batch, heads, tokens, d) of any dtype."""
        for tile in self._tiles():
            u = self.quantizer.rotation.unrotate(self.decode(tile))
            out[:, :, tile] = self.statistics.denormalize(u)

    def scores(self, queries: Tensor) -> Tensor:
        """Inner products of queries (batch, query heads, n, d) with the vectors: (.., n, tokens).

        Query heads are grouped: heads g k ... g k + g - 1 read kv head k. Float32, not divided
        by sqrt(d). Equalisation, centring and the rotation are folded into the query.
        """
        batch, heads, tokens, _ = self.shape
        q = queries.float().unflatten(1, (heads, -1)).flatten(2, 3)
        rotated = self.quantizer.rotation.rotate(q * self.statistics.weight)
        scores = q.new_empty(batch, heads, q.shape[2], tokens)
        with torch.autocast(q.device.type, enabled=False):
            for tile in self._tiles():
                scores[..., tile] = rotated @ self.decode(tile).mT
            if self.statistics.mean is not None:
                scores += q @ self.statistics.mean.mT
        return scores.unflatten(2, (-1, queries.shape[2])).flatten(1, 2)


def encode(quantizer: Quantizer, u: Tensor) -> dict[str, Tensor]:
    """Quantise vectors to the rows that the store keeps."""
    if isinstance(quantizer, RotorQuantMSE):
        _, codes = quantizer.quantize(u)
        return dict(cast(dict[str, Tensor], codes))
    prod = quantizer.quantize(u)
    return {
        **cast(dict[str, Tensor], prod["mse_indices"]),
        "signs": prod["qjl_signs"],
        "residual_norm": prod["residual_norm"],
    }


def decode(quantizer: Quantizer, rows: dict[str, Tensor]) -> Tensor:
    """The inverse of `encode`, in the rotated space."""
    mse: MSECodes = {"codes": rows["codes"], "scale": rows["scale"]}
    if isinstance(quantizer, RotorQuantMSE):
        return quantizer.decode(mse)
    prod: ProdCodes = {
        "mse_indices": mse,
        "qjl_signs": rows["signs"],
        "residual_norm": rows["residual_norm"],
    }
    return quantizer.decode(prod)
