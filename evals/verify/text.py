"""Verdicts in words: a table, what to do, and why of each cache that is not safe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rotorquant_hf.passing import CACHE_NAME

from ..caches.registry import CacheSpec
from ..subjects.models import LoadedModel
from ..subjects.texts import TooShortError
from ..tables import markdown
from .judge import NOT_ENOUGH, NOT_SAFE, counted, window_for
from .options import PRESETS, SAMPLES, VerifyOptions
from .run import FAILED, Verdict, bits_of, recommended

_HEADER = (
    *("cache", "KL mean", "KL p99", "top-1", "perplexity change", "bits/element"),
    *("on long texts", "tokens counted", "they read quantised", "verdict"),
)


def table(found: list[Verdict]) -> str:
    """A Markdown table, a row per cache; intervals in brackets."""
    return markdown(_HEADER, [_cells(verdict) for verdict in found])


def _cells(verdict: Verdict) -> list[str]:
    if not verdict.figures:
        return [verdict.label, *["–"] * (len(_HEADER) - 2), verdict.outcome]
    long, short = bits_of(verdict)
    of = counted(verdict.figures)
    return [
        verdict.label,
        _cell(of, "kl_mean", ".1e"),
        _cell(of, "kl_p99", ".1e"),
        _cell(of, "top1_agreement", ".1%"),
        _cell(of, "delta", "+.2%", of["baseline_perplexity"]),
        f"{short:.2f}",
        "unknown" if long is None else f"{long:.2f}",
        f"{of['tokens']:,}",
        f"{of['compressed_share']:.0%}",
        verdict.outcome,
    ]


def _cell(figures: Mapping[str, Any], name: str, shown: str, unit: float = 1.0) -> str:
    values = [x / unit for x in (figures[name], *(figures[f"{name}_ci95"] or ()))]
    found, *ends = [f"{x:{shown}}" for x in values]
    return f"{found} ({' to '.join(ends)})" if ends else found


def conclusion(found: list[Verdict], loaded: LoadedModel) -> str:
    """What to use, with the line of code, or that no cache can be recommended; then the reasons.

    The reason for each verdict is said once.
    """
    best = recommended(found)
    absent = [x for x in found if x.failure]
    undecided = [x for x in found if x.outcome == NOT_ENOUGH]
    refused = [x for x in found if x.outcome == NOT_SAFE]
    told, said = best, list[str]()
    if best is not None:
        said = [_recommendation(best, loaded)]
    elif undecided:
        told = undecided[0]  # of those measured, the one with the most bits
        said = [f"Not enough evidence that a preset is safe. {told.label}: {told.why}."]
    elif refused:
        told = min(refused, key=lambda verdict: counted(verdict.figures)["kl_mean"])
        said = [_refusal(refused, told, complete=not absent)]
    others = [_reason(x, best) for x in found if x is not told and x.why]
    return "\n\n".join([*said, "\n".join(others)]).strip() or "Nothing was measured."


def _reason(verdict: Verdict, best: Verdict | None) -> str:
    """Why a cache is not shown to be safe, in a line."""
    name = verdict.label
    if verdict.failure:
        was = "failed" if verdict.outcome == FAILED else "was not measured"
        return f"{name} {was}: {verdict.why}"
    if verdict.outcome == NOT_SAFE:
        return f"{name} is not safe: {verdict.why}."
    bits = bits_of(verdict)  # unknown where nothing was quantised
    if best is not None and None not in bits and bits < bits_of(best):
        return f"{name} uses fewer bits, but there is {NOT_ENOUGH}: {verdict.why}."
    return f"{name}: {NOT_ENOUGH}: {verdict.why}."


def _refusal(found: list[Verdict], closest: Verdict, complete: bool) -> str:
    """Of caches that are all not safe.

    Args:
        found: one or more.
        closest: the one of them that is nearest to the uncompressed cache.
        complete: whether none failed beside them.
    """
    measured = [verdict.label for verdict in found]
    presets = [PRESETS.index(name) for name in measured if name in PRESETS]
    # Fewer bits than those that failed are no help.
    left = [x for x in PRESETS[: min(presets, default=len(PRESETS))] if x not in measured]
    advice = (
        f"Not measured here, and of more bits: {', '.join(left)}; add them to --presets."
        if left and complete
        else "Do not compress its cache, or look at what differs about it: `attention`, "
        "`rope_layout`, large key biases, `exact_layers`."
    )
    if len(found) == 1:
        names = f"{closest.label} is not safe on this model with this text: {closest.why}"
        return f"WARNING: {names}.\n{advice}"
    every = complete and set(PRESETS) <= set(measured)
    names = "no preset" if every else "none of " + ", ".join(measured)
    return (
        f"WARNING: {names} is safe on this model with this text. The closest, {closest.label}: "
        f"{closest.why}.\n{advice}"
    )


def _recommendation(best: Verdict, loaded: LoadedModel) -> str:
    spec = best.spec or CacheSpec.of(best.label)
    source, made = spec.code
    note = ""
    if loaded.model.config._attn_implementation not in ("sdpa", "rotorquant"):
        note = '    model.set_attn_implementation("rotorquant")\n'
    long, short = bits_of(best)
    window = best.figures["window"]
    return (
        f"Recommended: {best.label}, {long:.2f} bits per element in a 16-bit model on long texts, "
        f"{short:.2f} with windows of {window:,} tokens\n\n"
        f"    {source}\n{note}    model.generate(**inputs, {CACHE_NAME}={made})\n\n"
        f"Measured on {loaded.options.model}: {best.basis}, of "
        f"{', '.join(best.figures['documents'])}. Contexts over {window:,} tokens were not "
        "measured."
    )


def too_short(error: TooShortError, options: VerifyOptions) -> str:
    """What is lacking where not even one chunk can be read: there must be two windows."""
    window = window_for({"compressed_share": 0.0, "window": 0}, options)
    return error.asking(window if error.one_window else 2 * window)


def demonstration(model: str, own_model: bool, own_text: bool) -> str:
    """What `verify` says first where the user names no model, or no text; else empty.

    Args:
        model: that is read.
        own_model, own_text: whether the user named them.
    """
    if own_model and own_text:
        return ""
    shown = [f"the model {model}" if own_model else f"the shipped 7M model ({model})"]
    shown.append("your text" if own_text else f"the shipped samples ({SAMPLES})")
    own = [] if own_model else ["--model NAME_OR_PATH"]
    own += [] if own_text else ["--text FILE"]
    return f"A demonstration on {' and '.join(shown)}; for your own give {' '.join(own)}."
