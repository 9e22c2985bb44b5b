"""Which preset is safe on this model? What a user runs before trusting one.

Every preset reads the same text through its cache and is compared with the uncompressed cache. Of
the presets that pass all limits the one with the fewest bits is recommended. A preset that passes
on too little text is neither safe nor unsafe: the verdict says how much text would tell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rotorquant_hf import RotorQuantConfig

from .caches.registry import CacheSpec
from .failures import failure_of
from .measurements.perplexity import PerplexityMeasurement, PerplexityOptions
from .options import option
from .subjects.models import LoadedModel
from .tables import markdown

PRESETS = ("k8v8", "k4v4", "k4v3", "k3v3", "k3v2", "k2v2")
SAMPLES = "examples/sampled"
SAFE, NOT_SAFE, NOT_ENOUGH = "safe", "not safe", "not enough evidence"
STATUS = {SAFE: 0, NOT_SAFE: 1, NOT_ENOUGH: 3}
"""Exit status of the command by what it found; 2 is that of bad input and missing packages."""

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

    max_tokens: int = option(8192, "tokens to read in all", min=2)
    place: str = option(
        "spread",
        "'start': the first windows of each text; 'spread': evenly over it",
        choices=("start", "spread"),
    )
    presets: tuple[str, ...] = option(PRESETS, "presets to measure", choices=PRESETS)
    max_kl: float = option(0.005, "limit of the mean KL divergence, nats per token", min=0)
    max_kl_p99: float = option(0.05, "limit of its 99th percentile over the tokens", min=0)
    min_top1: float = option(0.98, "share of tokens whose likeliest successor must stay the same")
    max_delta: float = option(
        0.01, "limit of the rise of perplexity, as a fraction, at the upper end of its 95% interval"
    )
    min_packed: float = option(
        0.3, "share of the keys and values read that must be read quantised", min=0, max=1
    )


@dataclass(frozen=True)
class Verdict:
    """What was found about a preset.

    Attributes:
        preset: its name.
        figures: of `PerplexityMeasurement.run`; empty if it was not measured.
        reasons: why it is not safe: the figures that break a limit.
        missing: what evidence is missing, and how much text would give it.
    """

    preset: str
    figures: dict[str, Any]
    reasons: list[str]
    missing: list[str]

    @property
    def outcome(self) -> str:
        """`SAFE`, `NOT_SAFE` or `NOT_ENOUGH`."""
        if self.reasons:
            return NOT_SAFE
        return NOT_ENOUGH if self.missing else SAFE

    def __str__(self) -> str:
        """The outcome with its reasons, in one line."""
        why = "; ".join(self.reasons or self.missing)
        if not self.figures:
            return why
        return f"{self.outcome}: {why}" if why else self.outcome


def verdicts(loaded: LoadedModel, options: VerifyOptions) -> Iterator[Verdict]:
    """Measure the presets, one after the other.

    Raises:
        TooShortError: if the text is shorter than one chunk.
    """
    measurement = PerplexityMeasurement(loaded, options)
    for preset in options.presets:
        try:
            figures = measurement.run(CacheSpec.of(preset))
        except Exception as error:
            yield Verdict(preset, {}, [], [f"not measured: {failure_of(error).reason}"])
            continue
        yield Verdict(preset, figures, reasons(figures, options), missing(figures, options))


def reasons(figures: dict[str, Any], options: VerifyOptions) -> list[str]:
    """Why a preset with these figures is not safe; empty if nothing speaks against it."""
    if not figures["compressed_share"]:
        return []  # nothing was read quantised: what the figures lack is said by `missing`
    found = list(figures["warnings"])
    delta = figures["delta"] / figures["baseline_perplexity"]
    values = [figures[name] for name in ("kl_mean", "kl_p99", "top1_agreement")]
    if not all(map(math.isfinite, [*values, delta, relative_rise(figures)])):
        return [*found, "its figures are not finite"]
    kl, kl_p99, top1 = values
    if kl > options.max_kl:
        found.append(f"mean KL {kl:.3g} is over {options.max_kl:g}")
    if kl_p99 > options.max_kl_p99:
        found.append(f"KL p99 {kl_p99:.3g} is over {options.max_kl_p99:g}")
    if top1 < options.min_top1:
        found.append(f"top-1 {top1:.2%} is under {options.min_top1:.2%}")
    if delta > options.max_delta:
        found.append(f"perplexity rises by {delta:.2%}, over {options.max_delta:.2%}")
    return found


def missing(figures: dict[str, Any], options: VerifyOptions) -> list[str]:
    """What evidence these figures lack, and how much text would give it; empty if they suffice."""
    share, window = figures["compressed_share"], figures["window"]
    needed, found = _window_for(figures, options), []
    if not share and window >= needed:
        found += figures["warnings"]  # why nothing was, however long the text
    if share < options.min_packed or not share:
        more = f": give texts, and a --window, of at least {needed:,} tokens"
        read = f"{share:.0%} of what was read was read quantised, under {options.min_packed:.0%}"
        found.append(
            (read if share else "nothing was read quantised") + (more if window < needed else "")
        )
    if figures["delta_ci95"] is None:
        found.append(
            f"one window of {window:,} tokens gives no interval: give at least "
            f"{2 * max(window, needed):,} tokens (--text, --max-tokens)"
        )
    elif relative_rise(figures) > options.max_delta:
        found.append(
            f"perplexity may rise by {relative_rise(figures):.2%}, over {options.max_delta:.2%}"
            + _tokens_for(figures, options)
        )
    return found


def _window_for(figures: dict[str, Any], options: VerifyOptions) -> int:
    """Tokens of a window of which the share `min_packed` is read quantised, rounded up.

    Of a window of w tokens that keeps f in full precision, (1 - f / w)^2 is read quantised.
    """
    share, default = figures["compressed_share"], RotorQuantConfig()
    kept = default.num_sink_tokens + default.residual_length + default.block_length
    if share:
        kept = figures["window"] * (1 - math.sqrt(share))
    return _round_up(kept / max(1 - math.sqrt(options.min_packed), 1e-3))


def _tokens_for(figures: dict[str, Any], options: VerifyOptions) -> str:
    """How much text would bring the upper end of the interval of the rise under its limit."""
    from scipy.stats import t

    room = options.max_delta * figures["baseline_perplexity"] - figures["delta"]
    if room <= 0 or not math.isfinite(figures["delta_ci95"][1]):
        return ""  # no text would
    by_document = figures["interval_over"] == "documents"
    samples = len(figures["documents"]) if by_document else figures["windows"]
    # The interval shrinks with the square root of the tokens, and t comes near to 1.96.
    half = (figures["delta_ci95"][1] - figures["delta"]) * 1.96 / t.ppf(0.975, samples - 1)
    tokens = figures["tokens"] * max(2, (half / room) ** 2)
    return f": give about {_round_up(tokens):,} tokens of text (--text, --max-tokens)"


def _round_up(tokens: float) -> int:
    """To two significant digits, from 100 on."""
    step = 10 ** max(1, math.floor(math.log10(tokens)) - 1)
    return math.ceil(tokens / step) * step


def relative_rise(figures: dict[str, Any]) -> float:
    """The upper end of the interval of the rise of perplexity (the rise itself for one window)."""
    interval = figures["delta_ci95"]
    return (interval[1] if interval else figures["delta"]) / figures["baseline_perplexity"]


def recommended(found: list[Verdict]) -> Verdict | None:
    """The safe preset with the fewest bits, or None."""
    safe = [verdict for verdict in found if verdict.outcome == SAFE]
    return min(safe, key=lambda verdict: verdict.figures["bits_per_number_16bit"], default=None)


def outcome(found: list[Verdict]) -> str:
    """That of all presets: `SAFE` if one is, `NOT_SAFE` if every one is known not to be."""
    outcomes = {verdict.outcome for verdict in found}
    return next(name for name in (SAFE, NOT_ENOUGH, NOT_SAFE) if name in outcomes)


_HEADER = (
    *("preset", "KL mean", "KL p99", "top-1", "perplexity change", "95% interval"),
    *("bits/element", "on long texts", "read quantised", "verdict"),
)


def table(found: list[Verdict]) -> str:
    """A Markdown table, a row per preset."""
    return markdown(_HEADER, [_cells(verdict) for verdict in found])


def _cells(verdict: Verdict) -> list[str]:
    f = verdict.figures
    if not f:
        return [verdict.preset, *["–"] * 8, str(verdict)]
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
        str(verdict),
    ]


def conclusion(found: list[Verdict], loaded: LoadedModel) -> str:
    """What to use, with the line of code; or why no preset can be recommended."""
    best = recommended(found)
    if best is not None:
        return _recommendation(best, loaded)
    undecided = [verdict for verdict in found if verdict.outcome == NOT_ENOUGH]
    if undecided:
        first = undecided[0]  # of those measured, the one with the most bits
        return (
            f"Not enough evidence that a preset is safe. {first.preset}: "
            f"{'; '.join(first.missing)}."
        )
    return _refusal(found)


def _refusal(found: list[Verdict]) -> str:
    closest = min(found, key=lambda verdict: verdict.figures["kl_mean"])
    why = "; ".join(closest.reasons)
    measured = [verdict.preset for verdict in found]
    most_bits = min(map(PRESETS.index, measured))  # fewer bits than those that failed are no help
    left = [preset for preset in PRESETS[:most_bits] if preset not in measured]
    advice = (
        f"Not measured here, and of more bits: {', '.join(left)}; add them to --presets."
        if left
        else "Do not compress its cache, or look at what differs about it: `attention`, "
        "`rope_layout`, large key biases, `exact_layers`."
    )
    if len(found) == 1:
        names = f"{closest.preset} is not safe on this model with this text: {why}"
        return f"WARNING: {names}.\n{advice}"
    names = "none of " + ", ".join(measured) if set(PRESETS) - set(measured) else "no preset"
    return (
        f"WARNING: {names} is safe on this model with this text. The closest, {closest.preset}: "
        f"{why}.\n{advice}"
    )


def _recommendation(best: Verdict, loaded: LoadedModel) -> str:
    bits = best.figures["bits_per_number_16bit"]
    line = f'model.generate(**inputs, past_key_values=RotorQuantCache("{best.preset}"'
    line += ", config=model.config))"
    note = ""
    if loaded.model.config._attn_implementation not in ("sdpa", "rotorquant"):
        note = '    model.set_attn_implementation("rotorquant")\n'
    return (
        f"Recommended: {best.preset}, {bits:.2f} bits per element in a 16-bit model on "
        f"windows of {best.figures['window']} tokens (fewer on longer texts)\n\n"
        f"    from rotorquant_hf import RotorQuantCache\n{note}    {line}\n\n"
        f"Measured on {loaded.options.model}, {best.figures['tokens']:,} tokens of "
        f"{', '.join(best.figures['documents'])}; contexts over {best.figures['window']:,} tokens "
        "were not."
    )


def too_short(error: Exception, options: VerifyOptions) -> str:
    """What to say of a text that is shorter than one chunk."""
    nothing = {"compressed_share": 0.0, "window": 0}
    tokens = 2 * _window_for(nothing, options)
    return f"Not enough evidence: {error}. Give at least {tokens:,} tokens of text."
