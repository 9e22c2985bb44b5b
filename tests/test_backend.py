"""The one answer to "kernels or torch?"."""

from __future__ import annotations

import pytest
import torch

from rotorquant_hf import RotorQuantMSE, RotorQuantProd
from rotorquant_hf import backend as module
from rotorquant_hf.backend import backend, kernels_take, runs_ptx, uses_triton

CPU = torch.device("cpu")
HALF = {"scale_dtype": torch.float16}


class Subclass(RotorQuantMSE):
    """May code in a way of its own, which no kernel knows."""


@pytest.mark.parametrize(
    ("quantizer", "dtype", "taken"),
    [
        (RotorQuantMSE(64, 3, **HALF), torch.float32, True),
        (RotorQuantMSE(64, 3, **HALF), torch.bfloat16, True),
        (RotorQuantMSE(64, 3, **HALF), torch.float64, False),
        (RotorQuantProd(512, 8, **HALF), torch.float32, True),
        (RotorQuantProd(576, 8, **HALF), torch.float16, True),
        (RotorQuantProd(576, 8, **HALF), torch.float32, False),  # more shared memory than there is
        (RotorQuantMSE(20, 3, **HALF), torch.float32, False),  # planes that end within a byte
        (RotorQuantProd(20, 3, **HALF), torch.float32, False),
        (RotorQuantMSE(64, 3), torch.float32, False),  # scales in float32
        (Subclass(64, 3, **HALF), torch.float32, False),
    ],
    ids=lambda x: (
        f"{type(x).__name__} {x.d}" if isinstance(x, RotorQuantMSE | RotorQuantProd) else None
    ),
)
def test_what_the_kernels_take(quantizer, dtype, taken) -> None:
    known = RotorQuantMSE(64, 2, **HALF)
    with backend("triton"):
        assert kernels_take(CPU, dtype, quantizer) is taken
        assert kernels_take(CPU, dtype, known, quantizer) is taken  # all of them, or none
    with backend("torch"):
        assert not kernels_take(CPU, dtype, quantizer)
    assert not kernels_take(CPU, dtype, quantizer)


@pytest.mark.parametrize(
    ("capability", "hip", "triton", "uses"),
    [
        ((9, 0), None, True, True),
        ((8, 0), None, True, True),
        ((12, 0), None, True, True),
        ((7, 5), None, True, False),  # Turing: no cp.async, no bfloat16 products
        ((9, 4), "6.4", True, False),  # an AMD GPU
        ((9, 0), None, False, False),
        ((10, 0), None, True, False),  # B200: Triton 3.6 fails to compile for it
    ],
)
def test_which_gpus_run_the_kernels(monkeypatch, capability, hip, triton, uses) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "3.6.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    found = object() if triton else None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    module._runs_kernels.cache_clear()
    try:
        assert uses_triton(torch.device("cuda", 0)) is uses
        assert not uses_triton(CPU)
    finally:
        module._runs_kernels.cache_clear()


def test_newer_triton_compiles_for_blackwell(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for version, runs in (("3.9.0+git1", True), ("3.10.0", True), ("3.8.1", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, version=version: version)
        assert module._runs_kernels.__wrapped__(torch.device("cuda", 0)) is runs


def test_assembly_is_for_nvidia_alone(monkeypatch) -> None:
    assert not runs_ptx(torch.device("cpu"))
    monkeypatch.setattr(torch.version, "hip", None)
    assert runs_ptx(torch.device("cuda", 1))
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert not runs_ptx(torch.device("cuda", 1))
