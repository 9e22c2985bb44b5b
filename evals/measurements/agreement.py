"""How long a text written with a compressed cache is the text written without."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from rotorquant_hf.passing import cache_argument

from ..caches.registry import BASELINE, CacheSpec
from ..errors import require
from ..options import option
from ..probes.footprint import elements_of
from ..probes.integrity import NOTHING_COMPRESSED
from ..progress import steps
from ..subjects.models import LoadedModel
from ..subjects.texts import TextOptions, cut
from .base import Measurement, one_by_one


@dataclass(frozen=True)
class AgreementOptions(TextOptions):
    """How `agreement` is measured."""

    max_tokens: int = option(4096, "tokens of all prompts together", min=2)
    window: int = option(512, "tokens of a prompt", min=2)
    new_tokens: int = option(100, "tokens to write after each prompt", min=1)
    sample: bool = option(
        False,
        "draw the tokens, from the same seed for every cache, instead of taking the likeliest: "
        "greedy small models soon repeat themselves, and any two caches agree on a loop",
    )


@torch.no_grad()
def continuation(
    model: PreTrainedModel,
    prompt: Tensor,
    cache: Cache,
    new_tokens: int,
    sample: bool,
    seed: int = 0,
) -> list[int]:
    """`new_tokens` token ids that a model writes after a prompt (1, tokens), end of text or not."""
    torch.manual_seed(seed)
    ids = model.generate(  # type: ignore[operator]  # of GenerationMixin, which causal models are
        prompt,
        attention_mask=torch.ones_like(prompt),
        **cache_argument(model, cache),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=sample,
        **({"top_k": 0, "top_p": 1.0, "temperature": 1.0} if sample else {}),
    )
    return ids[0, prompt.shape[1] :].tolist()


def agreement_length(a: list[int], b: list[int]) -> int:
    """How many tokens two texts share before they first differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))


class AgreementMeasurement:
    """Length of agreement with the baseline's text, over some prompts.

    Args:
        loaded: the model.
        options: prompts and length.
        seed: of the generator, where tokens are drawn.

    Raises:
        InputError: for a text that is missing or too short.
    """

    def __init__(self, loaded: LoadedModel, options: AgreementOptions, seed: int = 0) -> None:
        self.loaded, self.options, self.seed = loaded, options, seed
        room = None if loaded.context is None else loaded.context - options.new_tokens
        require(
            room is None or room > 1,
            f"new_tokens is {options.new_tokens}, but the model takes {loaded.context} in all",
        )
        windows, _ = cut(loaded.tokenizer, options.documents(), options, room, min_tokens=1)
        self.prompts = [window.ids.to(loaded.device) for window in windows]
        baseline = CacheSpec.of(BASELINE)
        self.expected = [tokens for tokens, _ in self._write_all(baseline)]

    def _write_all(self, spec: CacheSpec) -> list[tuple[list[int], float]]:
        shown = steps(self.prompts, f"{spec.label}: prompt {{}} of {{}}")
        return [self._write(spec, prompt) for prompt in shown]

    def _write(self, spec: CacheSpec, prompt: Tensor) -> tuple[list[int], float]:
        """The tokens, and the share of the cache that is quantised in the end."""
        options, cache = self.options, self.loaded.new_cache(spec)
        written = continuation(
            self.loaded.model, prompt, cache, options.new_tokens, options.sample, self.seed
        )
        held, quantised = elements_of(cache)
        return written, quantised / held

    def run(self, spec: CacheSpec) -> dict[str, Any]:
        """The figures of one cache, as plain values."""
        written = self._write_all(spec)
        lengths = [
            agreement_length(tokens, expected)
            for (tokens, _), expected in zip(written, self.expected, strict=True)
        ]
        share = statistics.mean(share for _, share in written)
        new = self.options.new_tokens
        return {
            "mean_length": statistics.mean(lengths),
            "median_length": statistics.median(lengths),
            "identical": sum(length == new for length in lengths),
            "prompts": len(lengths),
            "prompt_tokens": max(prompt.shape[1] for prompt in self.prompts),
            "new_tokens": new,
            "lengths": lengths,
            "compressed_share": share,
            "warnings": [] if share or spec.is_baseline else [NOTHING_COMPRESSED],
        }


AGREEMENT = Measurement(
    name="agreement",
    text="how many tokens of text agree with the uncompressed cache's",
    meaning="Tokens written before the text first differs from the uncompressed cache's.",
    options=AgreementOptions,
    prepare=lambda loaded, options, seed: one_by_one(
        AgreementMeasurement(loaded, options, seed).run
    ),
)
