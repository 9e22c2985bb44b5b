"""A launch goes past Triton's binder only where Triton would find the same compiled kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rotorquant_hf.kernels.launch import FUSED, Launch

TENSOR = torch.zeros(64)


class Kernel:
    """Stands in for a function of `triton.jit`; it "compiles" at every call."""

    arg_names = ("p_x", "stride", "n", "p_y", "BLOCK")

    def __init__(self, interpreted: bool = False) -> None:
        self.interpreted = interpreted
        self.bound: list[tuple[Any, ...]] = []
        self.direct: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args, **rest: self._compile((grid, *args, rest))

    def _compile(self, call: tuple[Any, ...]) -> Any:
        self.bound.append(call)
        return None if self.interpreted else Compiled(self)


class Compiled:
    """What the kernel hands back."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *args: self.kernel.direct.append((grid, *args))


def launch(kernel: Kernel) -> Launch:
    return Launch(kernel, BLOCK=16, p_y=TENSOR, num_warps=4)


def test_the_second_launch_of_a_kind_is_direct() -> None:
    kernel = Kernel()
    bound = launch(kernel)
    bound((1, 2, 3), TENSOR, 48, 5)
    bound((4, 5, 6), TENSOR[16:], 32, 7)
    assert kernel.bound == [
        ((1, 2, 3), TENSOR, 48, 5, {"BLOCK": 16, "p_y": TENSOR, "num_warps": 4, **FUSED})
    ]
    # In the kernel's order, whatever the order in which the others were given.
    ((grid, x, *others),) = kernel.direct
    assert (grid, others) == ((4, 5, 6), [32, 7, TENSOR, 16])
    assert x.data_ptr() == TENSOR[16:].data_ptr()


@pytest.mark.parametrize(
    ("x", "stride", "n"),
    [
        (TENSOR[1:], 32, 3),  # an address that 16 does not divide
        (TENSOR, 1, 3),
        (TENSOR, 33, 3),
        (TENSOR, 32, 16),
        (TENSOR, 32, 1),
        (TENSOR, 32, 3 + (1 << 31)),  # 64 bits
    ],
)
def test_what_triton_compiles_anew_goes_through_it(x: torch.Tensor, stride: int, n: int) -> None:
    kernel = Kernel()
    bound = launch(kernel)
    bound((1, 1, 1), TENSOR, 32, 3)
    bound((1, 1, 1), x, stride, n)
    assert (len(kernel.bound), len(kernel.direct)) == (2, 0)
    bound((1, 1, 1), x, stride, n)
    assert (len(kernel.bound), len(kernel.direct)) == (2, 1)


def test_parts_of_tuples_count() -> None:
    """Tensors with their strides, and what is not there."""
    kernel = Kernel()
    bound = launch(kernel)
    bound((1, 1, 1), (TENSOR, 64, 1), None, 3)
    bound((1, 1, 1), (TENSOR[16:], 32, 1), None, 5)
    assert (len(kernel.bound), len(kernel.direct)) == (1, 1)
    others = [((TENSOR, 64, 2), None, 3), ((TENSOR[1:], 64, 1), None, 3), (None, None, 3)]
    for changing in (*others, ((TENSOR, 64, 1), (TENSOR, 1), 3)):
        bound((1, 1, 1), *changing)
    assert (len(kernel.bound), len(kernel.direct)) == (5, 1)


def test_the_interpreter_always_goes_through_it() -> None:
    kernel = Kernel(interpreted=True)
    bound = launch(kernel)
    for _ in range(2):
        bound((1, 1, 1), TENSOR, 32, 3)
    assert (len(kernel.bound), len(kernel.direct)) == (2, 0)


def test_a_missing_argument_is_found_at_once() -> None:
    with pytest.raises(KeyError, match="BLOCK"):
        Launch(Kernel(), p_y=TENSOR)
