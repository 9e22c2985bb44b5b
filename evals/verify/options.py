"""How `verify` measures, and its limits."""

from __future__ import annotations

from dataclasses import dataclass

from ..caches.registry import CacheSpec
from ..errors import require
from ..measurements.perplexity import PerplexityOptions
from ..options import inherited, option

PRESETS = ("k8v8", "k4v4", "k4v3", "k3v3", "k3v2", "k2v2")
SAMPLES = "examples/sampled"

OLD_FLAGS = {
    "--most-kl": "--max-kl",
    "--most-kl-p99": "--max-kl-p99",
    "--least-top1": "--min-top1",
    "--most-delta": "--max-delta",
    "--least-packed": "--min-packed",
}
"""How limits were spelt one release ago, and are now; the old go with the next release."""


@dataclass(frozen=True)
class VerifyOptions(PerplexityOptions):
    """How `verify` measures, and its limits."""

    max_tokens: int = option(8192, "tokens to read in all; fewer where they tell", min=2)
    window: int = inherited(PerplexityOptions, "window", 1024)
    place: str = inherited(PerplexityOptions, "place", "spread")
    presets: tuple[str, ...] | None = option(
        None, f"presets to measure (default: {' '.join(PRESETS)}, or none beside --cache)",
        choices=PRESETS,
    )  # fmt: skip
    cache: tuple[str, ...] | None = option(
        None,
        "caches with settings of your own, NAME:OPTION=VALUE,..., such as "
        "k3v3:residual_length=32 (see the command caches)",
    )
    max_kl: float = option(0.005, "limit of the mean KL divergence, nats per token", min=0)
    max_kl_p99: float = option(0.05, "limit of its 99th percentile over the tokens", min=0)
    min_top1: float = option(0.98, "share of tokens whose likeliest successor must stay the same")
    max_delta: float = option(0.01, "limit of the rise of perplexity, as a fraction")
    min_packed: float = option(
        0.3, "share of the keys and values read that must be read quantised", min=0, max=1
    )

    def caches(self) -> list[CacheSpec]:
        """The caches to measure, each once: presets by bits, then settings of one's own.

        Raises:
            InputError: naming a cache or setting that there is not.
        """
        named = self.presets or (() if self.cache else PRESETS)
        presets = [CacheSpec.of(name) for name in PRESETS if name in named]
        own = [CacheSpec.named(text, "--cache") for text in self.cache or ()]
        for spec in own:
            require(
                not spec.is_baseline, f"--cache {spec.label} is what the others are compared with"
            )
        every = presets + own
        return [spec for i, spec in enumerate(every) if spec not in every[:i]]
