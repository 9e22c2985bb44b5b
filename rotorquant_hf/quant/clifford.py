"""The Clifford (geometric) algebra Cl(3,0), batched.

A multivector is a tensor whose last axis holds the 8 components, in the order

    1, e1, e2, e3, e12, e13, e23, e123        (grades 0, 1, 1, 1, 2, 2, 2, 3)

with e_i e_i = 1 and e_i e_j = -e_j e_i. Every function takes any leading shape, device and
floating dtype. A rotor R = exp(-B/2) of a bivector B has a scalar and three bivector components
(it is a unit quaternion); the sandwich v -> R v ~R of a vector is a 3-D rotation and stays a
vector: its trivector part is exactly zero.

Source: Dorst, Fontijne, Mann, "Geometric Algebra for Computer Science", chapters 6 and 7.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

MV_DIM = 8
"""Components of a multivector of Cl(3,0)."""

# Basis blades as bit masks (bit i set: e_{i+1} is a factor), in the order of the components.
_BLADES = (0b000, 0b001, 0b010, 0b100, 0b011, 0b101, 0b110, 0b111)
GRADES = tuple(blade.bit_count() for blade in _BLADES)
"""Grade of every component."""


def _reordering_sign(a: int, b: int) -> int:
    """Sign that sorting the factors of blade `a` followed by those of blade `b` brings."""
    swaps = sum(((a >> shift) & b).bit_count() for shift in range(1, 3))
    return -1 if swaps % 2 else 1


@functools.cache
def _product_table() -> tuple[Tensor, Tensor]:
    """`partner[i, k]`, `sign[i, k]`: blade_i * blade_partner = sign * blade_k. Both (8, 8)."""
    position = {blade: i for i, blade in enumerate(_BLADES)}
    partner = [[position[a ^ out] for out in _BLADES] for a in _BLADES]
    sign = [[_reordering_sign(a, a ^ out) for out in _BLADES] for a in _BLADES]
    with torch.device("cpu"):  # whatever torch.set_default_device says
        return torch.tensor(partner), torch.tensor(sign, dtype=torch.float64)


def geometric_product(a: Tensor, b: Tensor) -> Tensor:
    """The geometric product a b.

    Args:
        a, b: multivectors (..., 8); leading shapes broadcast.

    Returns:
        (..., 8).
    """
    partner, sign = _product_table()
    terms = b[..., partner.to(b.device)] * sign.to(device=b.device, dtype=b.dtype)
    return (a.unsqueeze(-1) * terms).sum(dim=-2)


def reverse(a: Tensor) -> Tensor:
    """The reverse ~a: the factors of every blade in opposite order (grades 2 and 3 change sign)."""
    sign = torch.tensor(
        [1 if grade < 2 else -1 for grade in GRADES], device=a.device, dtype=a.dtype
    )
    return a * sign


def grade_projection(a: Tensor, grade: int) -> Tensor:
    """The part of `a` of the given grade (0 scalar, 1 vector, 2 bivector, 3 trivector); (..., 8).

    Raises:
        ValueError: if `grade` is not 0, 1, 2 or 3.
    """
    if grade not in (0, 1, 2, 3):
        raise ValueError(f"grade is {grade!r}; Cl(3,0) has the grades 0, 1, 2 and 3")
    keep = torch.tensor([g == grade for g in GRADES], device=a.device)
    return torch.where(keep, a, torch.zeros_like(a))


def multivector_norm_sq(a: Tensor) -> Tensor:
    """Squared norm <a ~a>_0, which in Cl(3,0) is the sum of the squared components; (...,)."""
    return a.square().sum(dim=-1)


def exp_bivector(bivector: Tensor) -> Tensor:
    """exp(B) = cos|B| + B sin|B| / |B| of a bivector, since B B = -|B|^2.

    Args:
        bivector: multivectors (..., 8) of which only the grade-2 part is read.

    Returns:
        A rotor (..., 8): unit norm, even.
    """
    plane = grade_projection(bivector, 2)
    angle = multivector_norm_sq(plane).sqrt().unsqueeze(-1)
    # torch.sinc(x) is sin(pi x) / (pi x) and exact at 0, where the bivector has no direction.
    rotor = plane * torch.sinc(angle / math.pi)
    return torch.cat((torch.cos(angle), rotor[..., 1:]), dim=-1)


def make_random_rotor(
    shape: tuple[int, ...] = (),
    device: torch.device | str = "cpu",
    seed: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Random rotors whose rotations are uniform (Haar) on SO(3).

    Args:
        shape: leading shape.
        device: where the result lies. It is drawn on the CPU: one seed, one rotor, everywhere.
        seed: seed of the draw; None draws from torch's global generator.
        dtype: floating dtype of the result.

    Returns:
        (*shape, 8): a normalised Gaussian on the scalar and the three bivector components.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    even = torch.randn(*shape, 4, generator=generator, dtype=torch.float64, device="cpu")
    even = even / even.norm(dim=-1, keepdim=True)
    rotor = even.new_zeros(*shape, MV_DIM)
    rotor[..., [0, 4, 5, 6]] = even
    return rotor.to(device=device, dtype=dtype)


def rotor_sandwich(rotor: Tensor, x: Tensor) -> Tensor:
    """R x ~R for rotors (..., 8) and multivectors (..., 8); leading shapes broadcast."""
    return geometric_product(geometric_product(rotor, x), reverse(rotor))


def embed_vectors_as_multivectors(x: Tensor) -> Tensor:
    """Cut vectors into triples and make each the grade-1 part of a multivector.

    Args:
        x: (..., d). A last triple of one or two elements is filled up with zeros.

    Returns:
        (..., ceil(d / 3), 8).
    """
    d = x.shape[-1]
    groups = (d + 2) // 3
    triples = torch.nn.functional.pad(x, (0, 3 * groups - d)).unflatten(-1, (groups, 3))
    return torch.nn.functional.pad(triples, (1, MV_DIM - 4))


def extract_vectors_from_multivectors(mv: Tensor, d: int) -> Tensor:
    """The inverse of `embed_vectors_as_multivectors`: (..., ceil(d / 3), 8) -> (..., d).

    Raises:
        ValueError: if `mv` does not hold ceil(d / 3) multivectors.
    """
    if mv.shape[-2:] != ((d + 2) // 3, MV_DIM):
        raise ValueError(
            f"multivectors of shape {tuple(mv.shape)} do not hold vectors of {d} elements; "
            f"expected (..., {(d + 2) // 3}, {MV_DIM})"
        )
    return mv[..., 1:4].flatten(-2)[..., :d]
