"""`RotorQuantCache` with a calibration: `calibrated:preset=k3v3,file=CALIBRATION`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import Cache, PreTrainedConfig

from rotorquant_hf import Calibration, RotorQuantCache, RotorQuantConfig

from ..errors import InputError, require
from ..places import called
from .rotorquant import RotorQuant


@dataclass(frozen=True)
class CalibratedConfig(RotorQuantConfig):
    """The settings of a cache, and the file of its calibration."""

    file: str = field(default="", metadata={"help": "of the calibration, made by calibrate"})

    @property
    def settings(self) -> RotorQuantConfig:
        """The cache's own settings."""
        return RotorQuantConfig(**{x.name: getattr(self, x.name) for x in fields(RotorQuantConfig)})


class Calibrated(RotorQuant):
    """The kind whose options are a `CalibratedConfig`."""

    def parse(self, given: Mapping[str, Any], where: str) -> CalibratedConfig:
        """As `Kind.parse`."""
        options = dict(given)
        file, base = options.pop("file", None), options.pop("preset", None)
        if not isinstance(file, str) or not file:
            raise InputError(f"{where}: file is {file!r}; name a file that calibrate has written")
        settings = RotorQuantConfig.from_options(base, **options)
        return CalibratedConfig(**settings.to_dict(), file=file)

    def make(self, options: Any, config: PreTrainedConfig) -> Cache:
        """As `Kind.make`."""
        require(
            Path(options.file).is_file(),
            f"no calibration {options.file}: make it with {called()} calibrate --model MODEL "
            f"--text FILE --out {options.file}",
        )
        calibration = Calibration.load(options.file)
        return RotorQuantCache(options.settings, config=config, calibration=calibration)

    def code(self, options: Any) -> tuple[str, str]:
        """As `Kind.code`."""
        line, call = super().code(options.settings)
        return line, f'{call.removesuffix(")")}, calibration="{options.file}")'


CALIBRATED = Calibrated(
    "calibrated", "the same with statistics from a calibration", CalibratedConfig()
)
