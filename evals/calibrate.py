"""A calibration, or bits layer by layer, from text: what `calibrate` and `allocate` do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rotorquant_hf import Calibration, RotorQuantConfig, allocate_bits, calibrate

from .errors import InputError
from .options import inherited, option
from .progress import task
from .subjects.models import LoadedModel
from .subjects.texts import TextOptions, cut


@dataclass(frozen=True)
class CalibrateOptions(TextOptions):
    """Text to calibrate on: some thousand tokens of the kind that the model will read."""

    window: int = option(1024, "maximum tokens of a window, each read on its own", min=64)
    max_tokens: int = option(4096, "tokens in all", min=256)


@dataclass(frozen=True)
class AllocateOptions(CalibrateOptions):
    """Text to allocate bits by: some thousand tokens of the kind that the model will read."""

    place: str = inherited(CalibrateOptions, "place", "spread")


def make_calibration(loaded: LoadedModel, options: CalibrateOptions, preset: str) -> Calibration:
    """The calibration of a model for caches of a preset.

    Raises:
        InputError: if there is too little text, or the model's attention hides its queries.
    """
    try:
        return calibrate(loaded.model, _rows(loaded, options), preset)
    except ValueError as error:
        raise InputError(f"calibrate: {error}") from error


def make_allocation(
    loaded: LoadedModel, options: AllocateOptions, settings: RotorQuantConfig
) -> RotorQuantConfig:
    """The settings with their bits divided among the layers of a model.

    Raises:
        InputError: if the windows of text are too short.
    """
    try:
        with task("allocate") as shown:
            return allocate_bits(
                loaded.model,
                _rows(loaded, options),
                settings,
                lambda done, total: shown.at(done / total, f"allocate: pass {done} of {total}"),
            )
    except ValueError as error:
        raise InputError(f"allocate: {error}") from error


def _rows(loaded: LoadedModel, options: CalibrateOptions) -> Tensor:
    """Token ids (windows, tokens) of the windows of the greatest length."""
    windows, _ = cut(loaded.tokenizer, options.documents(), options, loaded.context, 64)
    length = max(window.ids.shape[1] for window in windows)
    return torch.cat([window.ids for window in windows if window.ids.shape[1] == length])
