"""Verdicts in words: a table, and what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..caches.registry import CacheSpec
from ..subjects.models import LoadedModel
from ..tables import markdown
from .judge import NOT_ENOUGH, NOT_SAFE, counted, window_for
from .options import PRESETS, VerifyOptions
from .run import Verdict, bits_of, recommended

_HEADER = (
    *("cache", "KL mean", "KL p99", "top-1", "perplexity change", "bits/element"),
    *("on long texts", "tokens counted", "they read quantised", "verdict"),
)


def table(found: list[Verdict]) -> str:
    """A Markdown table, a row per cache; intervals in brackets."""
    return markdown(_HEADER, [_cells(verdict) for verdict in found])


def _cells(verdict: Verdict) -> list[str]:
    if not verdict.figures:
        return [verdict.label, *["–"] * (len(_HEADER) - 2), str(verdict)]
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
        str(verdict),
    ]


def _cell(figures: Mapping[str, Any], name: str, shown: str, unit: float = 1.0) -> str:
    values = [x / unit for x in (figures[name], *(figures[f"{name}_ci95"] or ()))]
    found, *ends = [f"{x:{shown}}" for x in values]
    return f"{found} ({' to '.join(ends)})" if ends else found


def conclusion(found: list[Verdict], loaded: LoadedModel) -> str:
    """What to use, with the line of code; or why no cache can be recommended."""
    best = recommended(found)
    absent = [f"{x.label} {_was(x)}: {x.why}" for x in found if x.failure]
    undecided = [x for x in found if x.outcome == NOT_ENOUGH]
    refused = [x for x in found if x.outcome == NOT_SAFE]
    if best is not None:
        fewer = [x for x in undecided if x.figures and bits_of(x) < bits_of(best)]
        more = [f"{x.label} would take fewer bits; {NOT_ENOUGH}: {x.why}" for x in fewer]
        return "\n\n".join([_recommendation(best, loaded), *more, *absent])
    if undecided:
        first = undecided[0]  # of those measured, the one with the most bits
        said = [f"Not enough evidence that a preset is safe. {first.label}: {first.why}."]
    else:
        said = [_refusal(refused, complete=not absent)] if refused else []
    return "\n\n".join([*said, *absent]) or "Nothing was measured."


def _was(verdict: Verdict) -> str:
    return "failed" if verdict.outcome == "failed" else "was not measured"


def _refusal(found: list[Verdict], complete: bool) -> str:
    """Of caches that are all not safe.

    Args:
        found: one or more.
        complete: whether none failed beside them.
    """
    closest = min(found, key=lambda verdict: counted(verdict.figures)["kl_mean"])
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
        f"    {source}\n{note}    model.generate(**inputs, past_key_values={made})\n\n"
        f"Measured on {loaded.options.model}: {best.basis}, of "
        f"{', '.join(best.figures['documents'])}. Contexts over {window:,} tokens were not."
    )


def too_short(error: Exception, options: VerifyOptions) -> str:
    """What to say of a text that is shorter than one chunk."""
    tokens = 2 * window_for({"compressed_share": 0.0, "window": 0}, options)
    return f"Not enough evidence: {error}. Give at least {tokens:,} tokens of text."
