"""`warm_up`: compile the kernels that a model's cache will use, before its first text."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rotorquant_hf.backend import uses_triton
from rotorquant_hf.cache import RotorQuantCache
from rotorquant_hf.calibrating import fill
from rotorquant_hf.calibration import Calibration
from rotorquant_hf.config import RotorQuantConfig
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.maskless import without_mask
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer
from rotorquant_hf.placement import input_device

# Lengths are nothing that kernels are compiled for, so a short window does.
_RECENT, _BLOCK, _PROMPT = 32, 16, 128
# Tiles of query rows are powers of two up to 64; so is the length of what is read at once.
_CHUNKS = (2, 4, 8, 16, 32, 64)


@torch.no_grad()
def warm_up(
    model: PreTrainedModel,
    settings: RotorQuantConfig | str | None = None,
    *,
    batch: int = 1,
    padding: bool = False,
    calibration: Calibration | str | os.PathLike[str] | None = None,
) -> dict[str, int]:
    """Compile the kernels of a model's cache, by reading and writing some tokens.

    Triton compiles a kernel when it is launched for the first time, and keeps it on the disk for
    the next process. Without this, the first text waits: at its first quantised token, its first
    step, and its first block. Afterwards no length of a text compiles anything where the head dim
    is a multiple of 16, but for prompts over a full sliding window where a row of codes is not a
    multiple of 16 bytes.

    Args:
        model: as it will be used: on its device, in its dtype, with its attention.
        settings: of the caches to come, as `RotorQuantCache` takes them.
        batch: rows of the texts to come.
        padding: whether rows will have padding, which takes a mask into attention.
        calibration: of the caches to come.

    Returns:
        How many variants of each kernel were made ready, by the kernel's name; none where torch
        computes instead of kernels (on a CPU, without Triton), and a second time.

    Raises:
        ValueError: if `batch` is less than 1.
    """
    if batch < 1:
        raise ValueError(f"batch is {batch}; choose at least 1")
    settings = RotorQuantConfig.from_options(settings)
    if not uses_triton(input_device(model)):
        return {}
    short = dataclasses.replace(
        settings, residual_length=_RECENT, block_length=_BLOCK, statistics_length=0
    )
    before = _variants()
    layers = RotorQuantCache(short, config=model.config).layers
    # A full sliding window takes a mask, as padding does.
    sliding = any(isinstance(x, RotorQuantSlidingLayer) for x in layers)
    for padded in {padding, padding or sliding}:
        cache = RotorQuantCache(short, config=model.config, calibration=calibration)
        # A prompt, single tokens until a block has left the ring, more tokens over a past.
        for length in (_PROMPT, *[1] * (_BLOCK + 1)):
            _feed(model, cache, batch, length, padded)
        if padded and all(map(_hides_padding, cache.layers)):
            mask = _mask(batch, cache.get_seq_length(), input_device(model)).bool()
            with without_mask(cast(list[RotorQuantLayer], cache.layers), mask):
                _feed(model, cache, batch, 1, padding=False)
        for length in _CHUNKS:
            _feed(model, cache, batch, length, padded)
    return dict(_variants() - before)


def _hides_padding(layer: Any) -> bool:
    """Whether a layer can be captured in a `DecodeGraph` of padded rows."""
    return isinstance(layer, RotorQuantLayer) and not layer.is_sliding and layer.ring is not None


def _mask(batch: int, tokens: int, device: torch.device) -> Tensor:
    """That of rows of which the first has padding."""
    mask = torch.ones(batch, tokens, dtype=torch.long, device=device)
    mask[0, 0] = 0
    return mask


def _feed(
    model: PreTrainedModel, cache: RotorQuantCache, batch: int, length: int, padding: bool
) -> None:
    past = cache.get_seq_length()
    # Any tokens: not random ones, so that what is drawn later does not depend on a warm-up.
    device = input_device(model)
    ids = torch.arange(past, past + length, device=device)
    ids = (ids % model.config.get_text_config(decoder=True).vocab_size).expand(batch, -1)
    options: dict[str, Any] = {}
    if padding:
        options["attention_mask"] = _mask(batch, past + length, device)
    fill(model, ids, cache, **options)


def _kernels() -> tuple[Any, ...]:
    """All kernels."""
    from rotorquant_hf.kernels.append import append_kernel
    from rotorquant_hf.kernels.attend import attend_kernel
    from rotorquant_hf.kernels.block import block_kernel
    from rotorquant_hf.kernels.channels import channels_kernel
    from rotorquant_hf.kernels.combine import combine_kernel
    from rotorquant_hf.kernels.feedback import feedback_kernel
    from rotorquant_hf.kernels.hessian import hessian_kernel
    from rotorquant_hf.kernels.moment import moment_kernel
    from rotorquant_hf.kernels.push import push_kernel
    from rotorquant_hf.kernels.queries import prepare_kernel

    return (
        *(moment_kernel, block_kernel, channels_kernel, hessian_kernel, feedback_kernel),
        *(append_kernel, push_kernel, prepare_kernel, attend_kernel, combine_kernel),
    )


def _variants() -> Counter[str]:
    """How many variants of each kernel this process has ready."""
    found: Counter[str] = Counter()
    for kernel in _kernels():
        # By device, the first entry of each by variant; Triton's interpreter compiles nothing.
        caches = getattr(kernel, "device_caches", {})
        found[kernel.__name__] = sum(len(entries[0]) for entries in caches.values())
    return found
