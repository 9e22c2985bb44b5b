"""Settings: presets, options, and what is refused."""

from __future__ import annotations

import dataclasses
import pydoc

import pytest

from rotorquant_hf import PRESETS, RotorQuantCache, RotorQuantConfig


def test_preset_names_say_the_bits() -> None:
    for name, settings in PRESETS.items():
        if name[0] == "k" and name[2] == "v":
            assert (settings.key_bits, settings.value_bits) == (int(name[1]), int(name[3]))
    assert PRESETS["k4v4"] == RotorQuantConfig()


@pytest.mark.parametrize("name", ["turboquant", "rotorquant-reference"])
def test_published_methods_take_no_statistics_and_see_no_queries(name) -> None:
    settings = PRESETS[name]
    assert (settings.equalize_keys, settings.equalize_values, settings.center_keys) == (0, 0, False)
    assert (settings.statistics_length, settings.query_aware) == (0, False)
    assert (settings.key_scale, settings.value_scale) == ("norm", "norm")


def test_nothing_is_quantised_before_there_are_statistics() -> None:
    """4 sinks and 256 tokens; a longer window takes more by itself, a block of 32 included."""
    assert RotorQuantConfig().tokens_before_packing == 260
    assert RotorQuantConfig(residual_length=300).tokens_before_packing == 336
    assert RotorQuantConfig(statistics_length=0).tokens_before_packing == 164


def test_options_replace_those_of_the_preset() -> None:
    cache = RotorQuantCache("k3v2", residual_length=64, statistics_length=0)
    assert cache.settings == dataclasses.replace(
        PRESETS["k3v2"], residual_length=64, statistics_length=0
    )
    given = RotorQuantConfig(key_bits=5)
    assert RotorQuantCache(given).settings is not None
    assert RotorQuantCache(given, value_bits=2).settings.key_bits == 5


def test_settings_are_plain_hashable_values() -> None:
    settings = RotorQuantConfig(exact_layers=[0, 1])  # type: ignore[arg-type]
    assert settings.exact_layers == (0, 1)
    assert hash(settings) == hash(RotorQuantConfig(exact_layers=(0, 1)))
    assert RotorQuantConfig(**settings.to_dict()) == settings


def test_every_option_is_described() -> None:
    text = RotorQuantConfig.describe()
    for field in dataclasses.fields(RotorQuantConfig):
        assert f"{field.name} = {field.default!r}: " in text


def test_help_of_the_cache_names_every_option() -> None:
    text = pydoc.render_doc(RotorQuantCache, renderer=pydoc.plaintext)
    for field in dataclasses.fields(RotorQuantConfig):
        assert f"`{field.name}`" in text
    assert "RotorQuantConfig.describe()" in text


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"key_bits": 0}, "key_bits is 0.*1 to 8"),
        ({"key_bits": 9}, "key_bits is 9"),
        ({"value_bits": 2.5}, "value_bits is 2.5"),
        ({"value_bits": True}, "value_bits is True"),
        ({"value_bits": "4"}, "value_bits is '4'"),
        ({"key_bits": 1, "key_quantizer": "prod"}, "key_bits is 1.*2 to 8"),
        ({"key_quantizer": "qjl"}, "key_quantizer is 'qjl'.*mse, prod"),
        ({"rotation": "fourier"}, "rotation is 'fourier'.*cascade"),
        ({"rotor_layers": 0}, "rotor_layers is 0"),
        ({"rotor_layers": 2, "rotation": "haar"}, "rotor_layers is 2.*no layers"),
        ({"key_scale": "max"}, "key_scale is 'max'.*unbiased"),
        ({"value_scale": "max"}, "value_scale is 'max'"),
        ({"equalize_keys": 1.5}, "equalize_keys is 1.5.*0.*1"),
        ({"equalize_values": True}, "equalize_values is True"),
        ({"center_keys": "maybe"}, "center_keys is 'maybe'.*auto"),
        ({"rope_layout": "spiral"}, "rope_layout is 'spiral'.*interleaved"),
        ({"qjl_dim": 0}, "qjl_dim is 0"),
        ({"qjl_dim": 64}, "qjl_dim is 64.*'mse' have no QJL signs; leave qjl_dim out"),
        ({"qjl_projection": "gaussian"}, "qjl_projection is 'gaussian', but keys of the .*'mse'"),
        ({"qjl_projection": "sparse"}, "qjl_projection is 'sparse'"),
        ({"residual_length": -1}, "residual_length is -1"),
        ({"block_length": 0}, "block_length is 0"),
        ({"num_sink_tokens": 1.0}, "num_sink_tokens is 1.0"),
        ({"exact_layers": (0, 1.5)}, "exact_layers is"),
        ({"exact_layers": "first"}, "exact_layers is 'first'"),
        ({"exact_layers": 3}, "exact_layers is 3"),
        ({"seed": -3}, "seed is -3"),
        ({"check_finite": 1}, "check_finite is 1"),
        ({"bits": 3}, "unknown option bits.*key_bits"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refused(options: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        RotorQuantCache(**options)


def test_unknown_preset_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"preset is 'K4V4' \(did you mean k4v4\?\); choose one"):
        RotorQuantConfig.from_options("K4V4")
    with pytest.raises(ValueError, match=r"preset is 'k9v9'.*k4v4.*turboquant.*set key_bits"):
        RotorQuantCache("k9v9")
