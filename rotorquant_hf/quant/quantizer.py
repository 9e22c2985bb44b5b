"""What the cache asks of a quantiser: the interface of `RotorQuantMSE` and its like.

A new quantiser is a subclass of `Quantizer` in a file of its own and a line in `registry.py`.
Store, attention in torch, memory reports and files then work with it; the Triton kernels take
only the classes they know (`backend.kernels_take`).
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn

from rotorquant_hf.quant.hessian import LowRankHessian
from rotorquant_hf.quant.lloyd_max import MIN_BITS
from rotorquant_hf.quant.lookup import CodeTable


@dataclass(frozen=True)
class QuantizerSpec:
    """Which quantiser a cache wants. A quantiser reads the fields that concern it.

    Attributes:
        name: the quantiser's, a key of `registry.QUANTIZERS`.
        bits: bits per element.
        seed: seed of whatever is drawn at random.
        rotation, rotor_layers, scale: as in `RotorQuantMSE`.
        qjl_dim, qjl_projection: as `qjl_dim` and `projection` in `RotorQuantProd`.
    """

    name: str
    bits: int
    seed: int
    rotation: str = "cascade"
    rotor_layers: int | None = None
    scale: str = "least_squares"
    qjl_dim: int | None = None
    qjl_projection: str = "orthogonal"


@dataclass(frozen=True)
class Term:
    """One of the terms of which reconstructed vectors are sums: scale * (elements @ basis).

    Attributes:
        codes: name of the rows that hold the codes.
        scale: name of the rows that hold the scales.
        table: the elements that the codes stand for, and their order.
        basis: (size, d) float32.
    """

    codes: str
    scale: str
    table: CodeTable
    basis: Tensor

    @classmethod
    def of(cls, codes: str, scale: str, table: CodeTable, matrix: Tensor) -> Term:
        """The term scale * (elements @ matrix) for elements in their own order.

        Args:
            matrix: (table.d, d) float32; its rows are brought into the order of the table, with
                zeros for padding.
        """
        padded = torch.cat((matrix, torch.zeros_like(matrix[:1])))
        return cls(codes, scale, table, padded[table.order])


class RowKind(NamedTuple):
    """What `Quantizer.encode` makes of one vector under one name; a number has the shape ()."""

    shape: torch.Size
    dtype: torch.dtype


class Quantizer(nn.Module, abc.ABC):
    """A quantiser of vectors of R^d whose reconstructions are sums of `Term`s.

    Attributes:
        d: vector dimension.
        bits: bits per element.
        min_bits: the smallest `bits` that the class takes.
    """

    min_bits: ClassVar[int] = MIN_BITS
    d: int
    bits: int
    _row_kinds: dict[str, RowKind] | None = None

    @classmethod
    @abc.abstractmethod
    def from_spec(cls, spec: QuantizerSpec, d: int, device: torch.device) -> Self:
        """The quantiser of a cache, for vectors of R^d, its tables on `device`.

        Raises:
            ValueError: naming the value that is not possible.
        """

    @abc.abstractmethod
    def encode(self, u: Tensor, hessian: LowRankHessian | None = None) -> dict[str, Tensor]:
        """Quantise vectors whose entries are known to be finite.

        Args:
            u: (..., d) float32.
            hessian: for u (..., n, d), or None: errors e of the vectors matter as e' H e. A class
                may do without it.

        Returns:
            The rows that a store keeps, by name: tensors (...) or (..., bytes), always the same.
            The names "weight", "mean" and "hessian" are taken by the channel statistics.

        Raises:
            ValueError: on the CPU, for vectors that the rows cannot hold.
        """

    def row_kinds(self, device: torch.device) -> dict[str, RowKind]:
        """The rows of one vector by name, as `encode` makes them.

        Learned from coding none: some dozens of operations, and so done once.

        Args:
            device: where the tables are.
        """
        if self._row_kinds is None:
            rows = self.encode(torch.empty(0, self.d, dtype=torch.float32, device=device))
            self._row_kinds = {name: RowKind(x.shape[1:], x.dtype) for name, x in rows.items()}
        return self._row_kinds

    @abc.abstractmethod
    def terms(self) -> tuple[Term, ...]:
        """How rows are read back: the terms that add up to the reconstruction."""

    def drawn(self) -> dict[str, Tensor]:
        """What was drawn from the seed, a row of each matrix by name.

        A file keeps these, so that a torch that draws differently is noticed on loading.
        """
        return {}

    # The rest is for the Triton kernels; a class that they do not know leaves it as it is.

    @property
    def stage_one(self) -> Any:
        """The `RotorQuantMSE` whose codes and scales the rows hold; None if another class codes."""
        return None

    @property
    def sign_matrix(self) -> Tensor | None:
        """S, (m, d) float32, if the signs of S times the residual are stored; None without."""
        return None

    @property
    def num_signs(self) -> int:
        """How many signs a vector has: m, or 0."""
        return 0 if self.sign_matrix is None else self.sign_matrix.shape[0]
