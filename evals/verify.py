"""Which preset is safe on this model? What a user runs before trusting one.

Every preset reads the same text through its cache and is compared with the uncompressed cache.
Of those that pass all limits the one that takes the fewest bits is recommended.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .caches.registry import CacheSpec
from .failures import failure_of
from .measurements.perplexity import PerplexityMeasurement, PerplexityOptions
from .options import option
from .subjects.models import LoadedModel
from .tables import markdown

PRESETS = ("k8v8", "k4v4", "k4v3", "k3v3", "k3v2", "k2v2")
SAMPLES = Path(__file__).parent.parent / "examples" / "sampled"


@dataclass(frozen=True)
class VerifyOptions(PerplexityOptions):
    """How `verify` measures, and what it takes for safe."""

    max_tokens: int = option(8192, "tokens to read in all", min=2)
    place: str = option(
        "spread",
        "'start': the first windows of each text; 'spread': evenly over it",
        choices=("start", "spread"),
    )
    presets: tuple[str, ...] = option(PRESETS, "presets to measure", choices=PRESETS)
    most_kl: float = option(0.005, "largest mean KL divergence, nats per token", min=0)
    most_kl_p99: float = option(0.05, "largest 99th percentile of it", min=0)
    least_top1: float = option(0.98, "smallest share of tokens with the same likeliest successor")
    most_delta: float = option(
        0.01, "largest rise of perplexity, as a part of it, at the upper end of its 95% interval"
    )
    least_packed: float = option(
        0.3, "smallest share of what is read that must be read quantised", min=0, max=1
    )


@dataclass(frozen=True)
class Verdict:
    """A preset's figures, and why it is not safe (empty if it is)."""

    preset: str
    figures: dict[str, Any]
    reasons: list[str]


def verdicts(subject: LoadedModel, options: VerifyOptions) -> Iterator[Verdict]:
    """Measure the presets, one after the other."""
    measurement = PerplexityMeasurement(subject, options)
    for preset in options.presets:
        try:
            figures = measurement.run(CacheSpec.of(preset))
        except Exception as error:
            yield Verdict(preset, {}, [f"not measured: {failure_of(error).reason}"])
            continue
        yield Verdict(preset, figures, reasons(figures, options))


def reasons(figures: dict[str, Any], options: VerifyOptions) -> list[str]:
    """Why a preset with these figures is not safe; empty if it is."""
    found = list(figures["warnings"])
    rise = relative_rise(figures)
    numbers = [figures["kl_mean"], figures["kl_p99"], figures["top1_agreement"], rise]
    if not all(math.isfinite(x) for x in numbers):
        return [*found, "its figures are not finite"]
    if figures["kl_mean"] > options.most_kl:
        found.append(f"mean KL {figures['kl_mean']:.3g} is over {options.most_kl:g}")
    if figures["kl_p99"] > options.most_kl_p99:
        found.append(f"KL p99 {figures['kl_p99']:.3g} is over {options.most_kl_p99:g}")
    if figures["top1_agreement"] < options.least_top1:
        found.append(f"top-1 {figures['top1_agreement']:.2%} is under {options.least_top1:.2%}")
    if rise > options.most_delta:
        found.append(f"perplexity may rise by {rise:.2%}, over {options.most_delta:.2%}")
    if figures["compressed_share"] < options.least_packed:
        found.append(
            f"only {figures['compressed_share']:.0%} of what was read was read quantised: "
            "measure longer windows"
        )
    return found


def relative_rise(figures: dict[str, Any]) -> float:
    """The upper end of the interval of the rise of perplexity (the rise itself for one window)."""
    interval = figures["delta_ci95"]
    return (interval[1] if interval else figures["delta"]) / figures["baseline_perplexity"]


def recommended(found: list[Verdict]) -> Verdict | None:
    """The safe preset that takes the fewest bits, or None."""
    safe = [verdict for verdict in found if not verdict.reasons]
    return min(safe, key=lambda verdict: verdict.figures["bits_per_number_16bit"], default=None)


def table(found: list[Verdict]) -> str:
    """A Markdown table, a row per preset."""
    header = ("preset", "KL mean", "KL p99", "top-1", "perplexity change", "95% interval")
    header = (*header, "bits/number", "on long texts", "read packed", "verdict")
    return markdown(header, [_cells(verdict) for verdict in found])


def _cells(verdict: Verdict) -> list[str]:
    f = verdict.figures
    if not f:
        return [verdict.preset, *["–"] * 8, "; ".join(verdict.reasons)]
    interval, base = f["delta_ci95"], f["baseline_perplexity"]
    long = f["packed_bits_per_number_16bit"]
    return [
        verdict.preset,
        f"{f['kl_mean']:.2e}",
        f"{f['kl_p99']:.2e}",
        f"{f['top1_agreement']:.2%}",
        f"{f['delta'] / base:+.3%}",
        f"{interval[0] / base:+.3%} to {interval[1] / base:+.3%}" if interval else "one window",
        f"{f['bits_per_number_16bit']:.2f}",
        "unknown" if long is None else f"{long:.2f}",
        f"{f['compressed_share']:.0%}",
        "; ".join(verdict.reasons) or "safe",
    ]


def conclusion(found: list[Verdict], subject: LoadedModel) -> str:
    """What to use, with the line of code; or that nothing is safe."""
    best = recommended(found)
    if best is None:
        closest = min(found, key=lambda verdict: verdict.figures.get("kl_mean", math.inf))
        return (
            "WARNING: no preset is safe on this model with this text. "
            f"The closest, {closest.preset}: {'; '.join(closest.reasons)}.\n"
            "Do not compress its cache, or look at what differs about it: `attention`, "
            "`rope_layout`, large key biases, `exact_layers`."
        )
    bits = best.figures["bits_per_number_16bit"]
    line = f'model.generate(**inputs, past_key_values=RotorQuantCache("{best.preset}"'
    line += ", config=model.config))"
    note, caveat = "", ""
    if best.figures["delta_ci95"] is None:
        caveat = (
            f"\n\nThis rests on one window of {best.figures['window']} tokens, so there is no "
            "interval: give more text, or a smaller --window, before you rely on it."
        )
    if subject.model.config._attn_implementation not in ("sdpa", "rotorquant"):
        note = '    model.set_attn_implementation("rotorquant")\n'
    return (
        f"Recommended: {best.preset}, {bits:.2f} bits per number in a 16-bit model on "
        f"windows of {best.figures['window']} tokens (fewer on longer texts)\n\n"
        f"    from rotorquant_hf import RotorQuantCache\n{note}    {line}{caveat}"
    )
