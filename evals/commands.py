"""What the commands share: the arguments of a model and a cache, and how a result is printed."""

from __future__ import annotations

import argparse
import json
from typing import Any

import yaml

from rotorquant_hf import PRESETS

from .caches.registry import KINDS, CacheSpec, option_texts, split_name
from .options import add_arguments, flag
from .subjects.models import ModelOptions
from .sweep.rows import finite
from .tables import markdown


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments of `ModelOptions`."""
    add_arguments(parser, ModelOptions, "model")


def add_cache(parser: argparse.ArgumentParser) -> None:
    """`--cache`, and an argument for every option of every cache."""
    group = parser.add_argument_group("cache")
    names = ", ".join(KINDS)
    group.add_argument(
        "--cache",
        default="rotorquant",
        metavar="NAME",
        help=f"{names}, or a preset: {', '.join(PRESETS)} (default rotorquant); with settings: "
        "k3v3:residual_length=32,seed=1",
    )
    group.add_argument("--preset", default=argparse.SUPPRESS, help="of rotorquant", metavar="NAME")
    for name, text in option_texts().items():
        many: dict[str, Any] = {"nargs": "+"} if name == "exact_layers" else {}
        group.add_argument(
            flag(name),
            dest=f"cache.{name}",
            type=_value,
            default=argparse.SUPPRESS,
            help=text.replace("%", "%%"),
            metavar="VALUE",
            **many,
        )


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a YAML value") from error


def cache_of(args: argparse.Namespace) -> CacheSpec:
    """The cache that the arguments name."""
    name, options = split_name(args.cache, "--cache")
    options |= {
        name.removeprefix("cache."): value
        for name, value in vars(args).items()
        if name.startswith("cache.")
    }
    if "preset" in args:
        options["preset"] = args.preset
    return CacheSpec.of(name, options, "--cache")


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result: one name and value per line, or all in one line of JSON."""
    if as_json:
        print(json.dumps(finite(result)))
        return
    for name, value in result.items():
        if name == "points":
            print(_table(value))
        else:
            print(f"{name:<30}{_shown(value, name)}")


def _table(points: list[dict[str, Any]]) -> str:
    """Points as a table, one row each; nested values are shown in JSON alone."""
    names = list(dict.fromkeys(name for point in points for name in point))
    plain = [n for n in names if not any(isinstance(p.get(n), dict | list) for p in points)]
    rows = [[_shown(point[n]) if n in point else "" for n in plain] for point in points]
    return f"\n{markdown(plain, rows, left=0)}\n"


def _shown(value: Any, name: str = "") -> str:
    if value is None:
        return "- (one window)" if name.endswith("_ci95") else "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) if value else "none"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(x, key)}" for key, x in value.items())
    return str(value)
