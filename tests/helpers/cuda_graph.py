"""CUDA graphs, emulated on the CPU: what a capture records is run again by `replay`.

During a capture every torch operator and every Triton launch is recorded with its very tensors;
`replay` runs them again in order and writes each result into the tensor that the capture got.
Python does not run again, as on a GPU: what the host computes anew in each step is frozen. An
operator that would ask the device for a value fails the capture, as on a GPU.

A real capture does not compute. Here it does, so the tensors given as `memory` are put back to
what they held before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import masking_utils
from triton import knobs
from triton.runtime.interpreter import GridExecutor

from rotorquant_hf import RotorQuantCache
from rotorquant_hf.backend import backend

_SYNCHRONISING = {"_local_scalar_dense", "item", "nonzero", "equal", "is_nonzero"}


class EmulatedGraph:
    """Stands for `torch.cuda.CUDAGraph`."""

    captures = 0

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        """Run what was recorded."""
        for call in self.calls:
            call()


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: EmulatedGraph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func._overloadpacket.__name__ not in _SYNCHRONISING, f"{func} waits for the device"
        out = func(*args, **kwargs)
        aliases = [x.alias_info for x in func._schema.returns]
        if all(a is None for a in aliases):
            results = [x for x in tree_leaves(out) if isinstance(x, Tensor)]

            def again() -> None:
                new = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, Tensor)]
                for old, value in zip(results, new, strict=True):
                    old.copy_(value)

            self.graph.calls.append(again)
        elif any(a is not None and a.is_write for a in aliases):
            self.graph.calls.append(lambda: func(*args, **kwargs))
        return out


def _launcher() -> type:
    """What runs a launch: Triton's interpreter, or the emulator of compiled kernels."""
    if knobs.runtime.interpret:
        return GridExecutor
    from tests.emulator.launch import Launcher

    return Launcher


@contextmanager
def emulated(monkeypatch: Any, memory: Callable[[], list[Tensor]]) -> Iterator[None]:
    """Put the emulation in the place of torch's CUDA graphs.

    Args:
        memory: gives the tensors that the captured step changes and later steps read.
    """
    launcher = _launcher()
    launch = launcher.__call__
    recording: list[EmulatedGraph] = []

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if recording:
            recording[-1].calls.append(lambda: launch(self, *args, **kwargs))
            with torch.utils._python_dispatch._disable_current_modes():
                return launch(self, *args, **kwargs)
        return launch(self, *args, **kwargs)

    @contextmanager
    def capture(
        graph: EmulatedGraph, stream: None = None, capture_error_mode: str = "global"
    ) -> Iterator[None]:
        EmulatedGraph.captures += 1
        before = [(x, x.clone()) for x in memory()]
        recording.append(graph)
        try:
            with _Recorder(graph):
                yield
        finally:
            recording.pop()
        for tensor, value in before:
            tensor.copy_(value)

    with monkeypatch.context() as patch:
        patch.setattr(launcher, "__call__", recorded)
        patch.setattr(torch.cuda, "CUDAGraph", EmulatedGraph)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(recording))
        for module in ("attention.states", "attention.dispatch", "cache"):
            patch.setattr(f"rotorquant_hf.{module}.is_capturing", lambda _: bool(recording))
        # Transformers 5.17 builds every mask of "sdpa" while a graph is being captured.
        skips = masking_utils._ignore_causal_mask_sdpa
        patch.setattr(
            masking_utils,
            "_ignore_causal_mask_sdpa",
            lambda *args, **kwargs: not recording and skips(*args, **kwargs),
        )
        yield


class OnGPU:
    """A model that says it is on a GPU, so that the emulation gets to run.

    Args:
        said: other attributes that it is to have.
    """

    def __init__(self, model: Any, **said: Any) -> None:
        self.model = model
        self.__dict__.update({"device": torch.device("cuda")} | said)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)


def on_gpu(custom_generate: Callable[..., Any]) -> Callable[..., Any]:
    """The same for a model that `generate` hands to a `custom_generate`."""

    @functools.wraps(custom_generate)
    def with_model_on_gpu(model: Any, *args: Any, **kwargs: Any) -> Any:
        return custom_generate(OnGPU(model), *args, **kwargs)

    return with_model_on_gpu


@contextmanager
def decoding(monkeypatch: Any, caches: Callable[[], list[RotorQuantCache]]) -> Iterator[None]:
    """Decode on the kernels, with CUDA graphs: real ones on a GPU, emulated ones elsewhere.

    Args:
        caches: gives the caches whose steps may be captured.
    """

    def memory() -> list[Tensor]:
        layers = [x for cache in caches() for x in cache.layers if x.ring is not None]
        return [
            tensor
            for layer in layers
            for tensor in (
                layer.ring.lengths,
                *layer.ring.rings,
                *layer.store.keys.buffers.tensors.values(),
                *layer.store.values.buffers.tensors.values(),
            )
        ]

    EmulatedGraph.captures = 0
    with ExitStack() as stack:
        stack.enter_context(backend("triton"))
        if not torch.cuda.is_available():
            stack.enter_context(emulated(monkeypatch, memory))
            # On the CPU entries are checked for NaN, which waits for the answer.
            monkeypatch.setattr("rotorquant_hf.layers.full.check_finite", lambda *a, **k: None)
        yield
