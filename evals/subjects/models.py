"""Models to measure: loading, and the twins of a model whose keys are harder to quantise."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rotorquant_hf.placement import input_device

from ..caches.registry import CacheSpec
from ..errors import InputError, first_line, require
from ..options import option
from ..places import shipped
from . import gguf
from .twins import add_key_bias, offset_keys, scale_key_channels

DTYPES = ("auto", "float32", "bfloat16", "float16")

_TOKENIZERS = ("tokenizer*", "tekken.json", "*vocab*", "*.model", "*.tiktoken")
"""Names of files of which a folder with a tokenizer has one at least."""


@dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is run."""

    model: str = option("examples/books-7m", "a folder, a GGUF file, or a name on the Hub")
    dtype: str = option(
        "auto", "its arithmetic; auto: its own on an accelerator, float32 on a CPU", choices=DTYPES
    )
    device: str | None = option(
        None, "cpu, cuda, cuda:1, ..., or auto to spread it (default: the accelerator, if any)"
    )
    attention: str | None = option(
        None, "attn_implementation, such as sdpa or rotorquant (default: the model's)"
    )
    tokenizer: str | None = option(
        None, "folder, GGUF file or name of the tokenizer (default: the model's)"
    )
    revision: str | None = option(None, "revision on the Hub")
    trust_remote_code: bool = option(False, "run code that comes with the model")
    outliers: float | None = option(None, "twin: factor on two key channel pairs per head", min=1)
    key_bias: float | None = option(None, "twin: bias on one key channel per head, before RoPE")
    bias_pair: int = option(0, "twin: RoPE pair of that bias", min=0)
    key_offset: float = option(0.0, "twin: constant on four key channels, after RoPE")

    def __post_init__(self) -> None:
        gguf.refuse_revision(self.model, self.revision)

    @property
    def packages(self) -> tuple[str, ...]:
        """What it takes beyond the base install."""
        spread = ("accelerate",) if self.device == "auto" else ()
        read = any(gguf.is_gguf(name) for name in (self.model, self.tokenizer or self.model))
        return (*spread, *(gguf.PACKAGES if read else ()))

    @property
    def label(self) -> str:
        """A short name for tables and plots."""
        twins = {
            "outliers": self.outliers,
            "key bias": self.key_bias,
            "key offset": self.key_offset or None,
        }
        name = self.model.rstrip("/").split("/")[-1]
        name = Path(name).stem if gguf.is_gguf(self.model) else name
        notes = [f"{key} {value:g}" for key, value in twins.items() if value is not None]
        return ", ".join([name, *notes, *([self.attention] if self.attention else [])])


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model.

    Attributes:
        model: in evaluation mode.
        tokenizer: its tokenizer.
        options: what it was loaded by.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    options: ModelOptions

    @property
    def context(self) -> int | None:
        """The maximum tokens of the model, if its config says."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    @property
    def dtype(self) -> torch.dtype:
        """Of its arithmetic."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """Where token ids go."""
        return input_device(self.model)

    @property
    def devices(self) -> set[torch.device]:
        """All devices that hold a part of the model."""
        return {parameter.device for parameter in self.model.parameters()}

    def new_cache(self, spec: CacheSpec) -> Cache:
        """An empty cache for this model (with the twin's key offset, if it has one)."""
        cache = spec.make(self.model.config)
        return offset_keys(cache, self.options.key_offset) if self.options.key_offset else cache

    def to_dict(self) -> dict[str, Any]:
        """The options, with the values that were chosen for those left open."""
        return asdict(self.options) | {
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "attention": self.model.config._attn_implementation,
            "label": self.options.label,
        }


def load(options: ModelOptions) -> LoadedModel:
    """Load a model with its tokenizer.

    Raises:
        InputError: if the device cannot be used, or the model or tokenizer does not load.
    """
    spread = options.device == "auto"
    device = pick_device(None if spread else options.device)
    if options.dtype != "auto":
        dtype: Any = getattr(torch, options.dtype)
    else:
        dtype = torch.float32 if device.type == "cpu" else "auto"
    name = shipped(options.model)
    require(
        not Path(name).is_dir() or Path(name, "config.json").is_file(),
        f"{name} has no config.json: name a folder with a model",
    )
    tokenizer = load_tokenizer(shipped(options.tokenizer or options.model), options)
    model = load_model(
        name,
        device,
        dtype,
        **_hub(options),
        **({"attn_implementation": options.attention} if options.attention else {}),
        **({"device_map": "auto"} if spread else {}),
    )
    if options.outliers is not None:
        scale_key_channels(model, options.outliers)
    if options.key_bias is not None:
        add_key_bias(model, options.key_bias, options.bias_pair)
    return LoadedModel(model, tokenizer, options)


def load_model(
    name: str, device: torch.device, dtype: torch.dtype | str = torch.float32, **options: Any
) -> PreTrainedModel:
    """A causal language model, ready to be measured.

    Raises:
        InputError: if the model does not exist or does not load.
    """
    read = gguf.read_model if gguf.is_gguf(name) else _read_model
    model: Any = read(name, dtype=dtype, **options)
    if "device_map" not in options:
        model = model.to(device)
    return model.eval().requires_grad_(False)


def _read_model(name: str, **options: Any) -> PreTrainedModel:
    attention = options.get("attn_implementation")
    try:
        return AutoModelForCausalLM.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        if attention is not None and not isinstance(error, OSError) and "ttention" in str(error):
            raise InputError(
                f"attention {attention!r} cannot be used here: choose sdpa, rotorquant or eager "
                f"({first_line(error)})"
            ) from error
        raise InputError(_unreadable("model", name, error)) from error


def load_tokenizer(name: str, options: ModelOptions | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder or the GGUF file of a model.

    Raises:
        InputError: if it does not exist or does not load.
    """
    if gguf.is_gguf(name):
        return gguf.read_tokenizer(name)
    try:
        return AutoTokenizer.from_pretrained(name, **(_hub(options) if options else {}))
    except (OSError, ValueError, ImportError) as error:
        folder = Path(name)
        if folder.is_dir() and not any(any(folder.glob(files)) for files in _TOKENIZERS):
            said = f"{name} has no tokenizer: put its files there, or name one with --tokenizer"
            raise InputError(said) from error
        raise InputError(_unreadable("tokenizer", name, error)) from error


def _unreadable(what: str, name: str, error: Exception) -> str:
    """Why a model, or its tokenizer, does not load: is it not there, or not readable?"""
    here = Path(name).exists()
    if not here:
        try:
            here = isinstance(try_to_load_from_cache(name, "config.json"), str)
        except HFValidationError:  # no name on the Hub looks like this
            return f"no folder or file {name}: name a folder with a model, or a model on the Hub"
    if here:
        return f"could not load {what} {name}: name another ({first_line(error)})"
    hub = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"the Hub: {first_line(error)}"
    return f"no folder or file {name}, and no such model in the Hub's cache ({hub})"


def _hub(options: ModelOptions) -> dict[str, Any]:
    revision = {} if options.revision is None else {"revision": options.revision}
    return {"trust_remote_code": options.trust_remote_code, **revision}


def pick_device(name: str | None) -> torch.device:
    """The named device, or the accelerator where there is one, else the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = accelerator or torch.device("cpu")
    if name is None:
        return found
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        choices = " or ".join(dict.fromkeys([found.type, "cpu"]))
        raise InputError(f"--device {name} cannot be used here: choose {choices}") from error
    return device
