"""What all tests of the harness share."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch
from torch import Tensor


class UnpackInTorch:
    """Quanto's extension for CPUs, in torch."""

    @staticmethod
    def unpack(packed: Tensor, bits: int) -> Tensor:
        """Numbers of 2 or 4 bits, those in the low bits of all bytes first."""
        return torch.cat([packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)])


@pytest.fixture(scope="session", autouse=True)
def quanto_compiles_nothing() -> None:
    """Quanto would compile its extension at first use: 45 seconds, and a C++ compiler."""
    if find_spec("optimum") and find_spec("optimum.quanto"):
        from optimum.quanto.library.extensions import get_extension

        get_extension("quanto_cpp")._lib = UnpackInTorch
