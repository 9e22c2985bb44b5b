"""A calibration from text: what the command `calibrate` does."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rotorquant_hf import Calibration, calibrate

from .errors import InputError
from .options import option
from .subjects.models import LoadedModel
from .subjects.texts import TextOptions, cut


@dataclass(frozen=True)
class CalibrateOptions(TextOptions):
    """Text to calibrate on: some thousand tokens of the kind that the model will read."""

    window: int = option(1024, "maximum tokens of a window, each read on its own", min=64)
    max_tokens: int = option(4096, "tokens in all", min=256)


def make_calibration(loaded: LoadedModel, options: CalibrateOptions, preset: str) -> Calibration:
    """The calibration of a model for caches of a preset.

    Raises:
        InputError: if there is too little text, or the model's attention hides its queries.
    """
    windows, _ = cut(loaded.tokenizer, options.documents(), options, loaded.context, 64)
    length = max(window.ids.shape[1] for window in windows)
    rows = [window.ids for window in windows if window.ids.shape[1] == length]
    try:
        return calibrate(loaded.model, torch.cat(rows), preset)
    except ValueError as error:
        raise InputError(f"calibrate: {error}") from error
