"""Orthogonal maps of R^d applied before scalar quantisation.

A scalar quantiser for N(0, 1/d) reaches its distortion only on vectors whose coordinates look
Gaussian; the rotation makes them so. All maps here take exactly d elements to d elements, are
fixed by a seed, and are applied as a d x d matrix: one small product per token, which BLAS and
tensor cores do faster than the layers one by one.

- `RotorLayers`: layers of random Cl(3,0) rotors on triples of coordinates. One layer is the
  RotorQuant reference: it mixes only 3 coordinates, so outliers stay.
- `RotorCascade`: the balanced rotor cascade, this project's default. Mixes all d coordinates
  evenly in about log3(d) layers.
- `HaarRotation`: a uniformly random rotation (TurboQuant, Zandieh et al., arXiv:2504.19874).
- `HadamardRotation`: random signs and a Walsh-Hadamard transform (QuaRot, arXiv:2404.00456).
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn

from rotorquant_hf.quant.clifford import (
    embed_vectors_as_multivectors,
    exp_bivector,
    extract_vectors_from_multivectors,
    make_random_rotor,
    rotor_sandwich,
)

MIN_DIM, MAX_DIM = 8, 576


class Rotation(nn.Module):
    """An orthogonal map T of R^d.

    Args:
        matrix: (d, d), orthogonal; T(x) = matrix @ x.
    """

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.d = matrix.shape[0]
        self._matrix: Tensor
        matrix = matrix.to(torch.float32).contiguous()  # kernels read it by rows
        self.register_buffer("_matrix", matrix, persistent=False)

    def matrix(self) -> Tensor:
        """T as a (d, d) float32 matrix: rotate(x) = x @ matrix().T."""
        return self._matrix

    def rotate(self, x: Tensor) -> Tensor:
        """T(x) of vectors (..., d), in their dtype (at least float32)."""
        return self._product(x, self._matrix.T)

    def unrotate(self, y: Tensor) -> Tensor:
        """T^-1(y) of vectors (..., d), in their dtype (at least float32)."""
        return self._product(y, self._matrix)

    @staticmethod
    def _product(x: Tensor, matrix: Tensor) -> Tensor:
        x = x if x.dtype == torch.float64 else x.float()
        with torch.autocast(x.device.type, enabled=False):  # which would multiply in 16 bits
            return x @ matrix.to(x.dtype)

    def extra_repr(self) -> str:
        return f"d={self.d}"


def _apply_rotors(rotors: Tensor, signs: Tensor, x: Tensor) -> Tensor:
    """Sandwich the triples of the sign-flipped rows of `x`.

    Args:
        rotors: (ceil(d / 3), 8). The last acts on a full triple, or, for a tail of two elements,
            in the plane e12 alone, so that the padded third coordinate stays zero; for a tail
            of one element it is 1.
        signs: (d,) of +-1: with an even number of minuses in a triple a rotor, with an odd
            number a reflection; either way a versor of the algebra.
        x: (..., d).
    """
    rotated = rotor_sandwich(rotors, embed_vectors_as_multivectors(x * signs))
    return extract_vectors_from_multivectors(rotated, x.shape[-1])


def _stride_permutation(d: int) -> Tensor:
    """[0::3, 1::3, 2::3], rolled by one so that the tail of an incomplete triple moves."""
    index = torch.arange(d)
    return torch.cat((index[0::3], index[1::3], index[2::3])).roll(1)


def _random_signs(d: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2, (d,), generator=generator).double() * 2 - 1


def _plane_rotor(angle: float) -> Tensor:
    """The rotor (8,) that turns the plane e12 by `angle` (radians)."""
    bivector = torch.zeros(8, dtype=torch.float64)
    bivector[4] = -angle / 2
    return exp_bivector(bivector)


class RotorLayers(Rotation):
    """Layers of random rotors on consecutive triples, a stride permutation between layers.

    `layers=1` is the rotation of the RotorQuant reference: one rotor per triple, seeded
    seed, seed + 1, ... A tail of two elements takes a random plane rotor, of one a random sign,
    so that d elements stay d elements.

    Args:
        d: vector dimension.
        layers: number of layers.
        seed: seed of the rotors.
    """

    def __init__(self, d: int, layers: int = 1, seed: int = 42) -> None:
        generator = torch.Generator().manual_seed(seed)
        groups, tail = (d + 2) // 3, d % 3
        basis = torch.eye(d, dtype=torch.float64)
        for layer in range(layers):
            first = seed + layer * groups
            rotors = [make_random_rotor(seed=first + i, dtype=torch.float64) for i in range(groups)]
            signs = torch.ones(d, dtype=torch.float64)
            if tail == 2:
                turn = torch.rand((), generator=generator, dtype=torch.float64)
                rotors[-1] = _plane_rotor(2 * math.pi * float(turn))
            elif tail == 1:
                rotors[-1] = _plane_rotor(0.0)
                signs[-1] = _random_signs(1, generator)[0]
            if layer > 0:
                basis = basis[:, _stride_permutation(d)]
            basis = _apply_rotors(torch.stack(rotors), signs, basis)
        super().__init__(basis.T)


class RotorCascade(Rotation):
    """The balanced rotor cascade.

    Per layer: random signs, then on every triple the rotor of the half-turn about
    (1, 1, 1)/sqrt(3), whose matrix 2 n n^T - 1 has the entries -1/3 and 2/3 and is the most even
    mixing of three coordinates there is; a turn by 45 degrees on a tail of two. Between layers
    a stride permutation.

    Args:
        d: vector dimension.
        layers: number of layers; by default `balanced_layers(d)`.
        seed: seed of the signs.
    """

    def __init__(self, d: int, layers: int | None = None, seed: int = 42) -> None:
        generator = torch.Generator().manual_seed(seed)
        # exp(-B/2) with |B| = pi in the plane dual to n: n* = (e23 - e13 + e12) / sqrt(3).
        half_turn = torch.zeros(8, dtype=torch.float64)
        # Rounded to float32, as it is in the codes of all caches saved so far.
        axis = torch.tensor([-1.0, 1.0, -1.0], dtype=torch.float32)
        half_turn[4:7] = axis * (math.pi / 2) / math.sqrt(3)
        rotors = exp_bivector(half_turn).repeat((d + 2) // 3, 1)
        if d % 3:
            rotors[-1] = _plane_rotor(math.pi / 4 if d % 3 == 2 else 0.0)
        basis = torch.eye(d, dtype=torch.float64)
        for layer in range(balanced_layers(d) if layers is None else layers):
            if layer > 0:
                basis = basis[:, _stride_permutation(d)]
            basis = _apply_rotors(rotors, _random_signs(d, generator), basis)
        super().__init__(basis.T)


def balanced_layers(d: int) -> int:
    """Layers of a cascade that mix all d coordinates evenly: ceil(log3 d) + 1.

    With ceil(log3 d) layers every coordinate can reach every other; one more evens out the
    incomplete triples: without it, one-hot vectors of d = 80 cost 1.4 times the Gaussian
    distortion at 3 bits, with it 0.8 to 1.05 times at every d from 64 to 576. (For d = 1 modulo 3
    up to four of the d^2 entries of T stay zero, which costs nothing measurable.)
    """
    reach, layers = 1, 1
    while reach < d:
        reach, layers = reach * 3, layers + 1
    return layers


class HaarRotation(Rotation):
    """A rotation drawn uniformly from O(d) (Mezzadri 2007: QR of a Gaussian, signs fixed)."""

    def __init__(self, d: int, seed: int = 42) -> None:
        super().__init__(haar_matrix(d, torch.Generator().manual_seed(seed)))


class HadamardRotation(Rotation):
    """Random signs, then the orthonormal Walsh-Hadamard transform.

    For d = 2^k m with odd m > 1 the transform is the Kronecker product of the one of order 2^k
    and a Haar matrix of order m, as no Walsh-Hadamard matrix of order d exists.
    """

    def __init__(self, d: int, seed: int = 42) -> None:
        generator = torch.Generator().manual_seed(seed)
        signs = _random_signs(d, generator)
        power = d & -d
        transform = torch.ones(1, 1, dtype=torch.float64)
        butterfly = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / math.sqrt(2)
        for _ in range(power.bit_length() - 1):
            transform = torch.kron(transform, butterfly)
        if d > power:
            transform = torch.kron(transform, haar_matrix(d // power, generator))
        super().__init__(transform * signs)


def haar_matrix(d: int, generator: torch.Generator) -> Tensor:
    """A Haar-distributed orthogonal (d, d) float64 matrix."""
    gaussian = torch.randn(d, d, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).contiguous()


ROTATIONS = ("cascade", "rotors", "haar", "hadamard")
"""Names that `make_rotation` takes."""


def can_be_rotated(d: int) -> bool:
    """Whether there are rotations of vectors of d elements."""
    return MIN_DIM <= d <= MAX_DIM


def make_rotation(
    d: int, kind: str = "cascade", layers: int | None = None, seed: int = 42
) -> Rotation:
    """A rotation by name.

    Args:
        d: vector dimension, 8 to 576.
        kind: "cascade", "rotors", "haar" or "hadamard".
        layers: layers of "cascade" (default: `balanced_layers(d)`) or "rotors" (default: 1, the
            RotorQuant reference).
        seed: seed of the draw; the same everywhere.

    Raises:
        ValueError: naming the value that is not possible.
    """
    if not can_be_rotated(d):
        raise ValueError(f"d is {d}; vectors of {MIN_DIM} to {MAX_DIM} elements can be rotated")
    if layers is not None and layers < 1:
        raise ValueError(f"layers is {layers}; choose at least 1, or None for the default")
    if layers is not None and kind in ("haar", "hadamard"):
        raise ValueError(f"layers is {layers}, but a {kind!r} rotation has no layers; leave it out")
    if kind not in ROTATIONS:
        raise ValueError(f"rotation is {kind!r}; choose one of {', '.join(ROTATIONS)}")
    with torch.device("cpu"):  # drawn there, whatever torch.set_default_device says
        if kind == "cascade":
            return RotorCascade(d, layers, seed)
        if kind == "rotors":
            return RotorLayers(d, layers or 1, seed)
        return HaarRotation(d, seed) if kind == "haar" else HadamardRotation(d, seed)


@lru_cache(maxsize=64)
def shared_rotation(
    d: int, kind: str, layers: int | None, seed: int, device: torch.device
) -> Rotation:
    """`make_rotation` on a device, the same for quantisers of any bits: none may change it."""
    return make_rotation(d, kind, layers, seed).to(device)
