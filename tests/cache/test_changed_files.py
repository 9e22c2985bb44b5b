"""Files that somebody changed, with a checksum that is right, are refused, or read."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rotorquant_hf import Calibration, RotorQuantCache, calibrate
from tests.helpers.models import build, feed, prompt
from tests.helpers.saved_files import rewrite

SMALL = {"residual_length": 8, "block_length": 4, "statistics_length": 0}
CACHES = {
    "queries and stand-ins": ("llama", SMALL),
    "signs, an exact layer": ("llama", SMALL | {"key_quantizer": "prod", "exact_layers": (1,)}),
    "nothing packed": ("llama", {}),
    "sliding": ("gemma3", SMALL),
    "hybrid": ("falcon_h1", SMALL),
    "linear": ("qwen3_next", SMALL),
}
VALUES = [
    *(None, True, False, -1, 0, 1, 2, 7, 10**9, 10**30, 1.5, 1e308, float("nan"), "x", "keys"),
    *("os.system", "__class__", [], {}, [[]], [1, 2], {"a": 1}),
    *({"dtype": "load"}, {"dtype": "float16"}, {"items": []}, {"items": [[1]]}, {"items": 3}),
]
NAMES = ["update", "store", "__dict__", "x", "keys", "sliding_window", "conv_states"]
CHANGES = {
    "none": lambda x: x.new_zeros(0),
    "flat": torch.flatten,
    "shorter": lambda x: x[..., :-1],
    "no rows": lambda x: x[:0],
    "turned": lambda x: x.transpose(0, -1),
    "float64": torch.Tensor.double,
    "int64": torch.Tensor.long,
    "bytes": lambda x: x.to(torch.uint8),
    "negative": lambda x: torch.full_like(x, -5) if x.dtype != torch.uint8 else x,
}


def places(node, path=()):
    """The paths of everything in a header."""
    yield path
    if isinstance(node, dict | list):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield from places(node[key], (*path, key))


def change_header(header, data) -> None:
    *path, last = data.draw(st.sampled_from([path for path in places(header) if path]))
    node = header
    for key in path:
        node = node[key]
    how = data.draw(st.sampled_from(["value", "value", "absent", "name", "twice"]))
    if how == "absent":
        del node[last]
    elif how == "twice" and isinstance(node, list):
        node.append(copy.deepcopy(node[last]))
    else:
        if how == "name" and isinstance(node, dict):
            last = data.draw(st.sampled_from(NAMES))
        node[last] = copy.deepcopy(data.draw(st.sampled_from(VALUES)))


def change_tensors(tensors, data) -> None:
    name = data.draw(st.sampled_from(sorted(tensors)))
    how = data.draw(st.sampled_from(["absent", "name", *CHANGES]))
    x = tensors.pop(name)
    if how == "name":
        tensors[f"{name}x"] = x
    elif how != "absent":
        tensors[name] = CHANGES[how](x).contiguous()


def change(original, path, data) -> None:
    def some(header, tensors) -> None:
        for of_tensors in data.draw(st.lists(st.booleans(), min_size=1, max_size=2)):
            if of_tensors and tensors:
                change_tensors(tensors, data)
            else:
                change_header(header, data)

    rewrite(original, some, path)


def refusal(action) -> str | None:
    """What a ValueError of it says; None if there is none."""
    try:
        action()
    except ValueError as error:
        return str(error)
    return None


def examples(number):
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=number, deadline=None, suppress_health_check=quiet)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Paths of the caches by name, and their models."""
    files = {}
    for name, (of, options) in CACHES.items():
        model = build(of)
        cache = RotorQuantCache("k3v3", config=model.config, **options)
        mask = torch.ones(2, 60)
        mask[0, :9] = 0
        feed(model, cache, prompt(2, 60), (40, 1, 1), mask)
        path = tmp_path_factory.mktemp("saved") / "cache"
        cache.save(path)
        files[name] = path, model
    return files


@pytest.mark.parametrize("name", CACHES)
@given(data=st.data())
@examples(100)
def test_a_changed_cache_is_refused_or_read(saved, name, data) -> None:
    original, model = saved[name]
    path = original.with_name("changed")
    change(original, path, data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = refusal(lambda: str(RotorQuantCache.load(path, config=model.config).memory()))
    assert message is None or str(path) in message or message.startswith("exact_layers has")


@pytest.mark.parametrize(
    ("tensor", "change"),
    [
        ("store.key_codes", "shorter"),
        ("store.key_scale", "float64"),
        ("store.value_codes", "no rows"),
        ("store.value_weight", "shorter"),
        ("store.key_mean", "flat"),
        ("store.key_hessian", "shorter"),
        ("store.key_frequencies", "no rows"),
        ("stand_ins", "negative"),
        ("sinks.values", "shorter"),
        ("window.keys", "no rows"),
    ],
)
def test_rows_that_kernels_would_read_beyond_are_refused(saved, tensor, change) -> None:
    original, model = saved["queries and stand-ins"]
    path = original.with_name("changed")

    def one(_, tensors) -> None:
        tensors[f"1.{tensor}"] = CHANGES[change](tensors[f"1.{tensor}"]).contiguous()

    rewrite(original, one, path)
    with pytest.raises(ValueError, match=rf"layer 1 of {path} "):
        RotorQuantCache.load(path, config=model.config)


@given(data=st.data())
@examples(150)
def test_a_changed_calibration_is_refused_or_read(tmp_path_factory, data) -> None:
    model, folder = build("llama"), tmp_path_factory.getbasetemp()
    original, path = folder / "calibration", folder / "changed"
    if not original.exists():
        calibrate(model, prompt(2, 200)).save(original)
    change(original, path, data)
    message = refusal(lambda: Calibration.load(path))
    assert message is None or str(path) in message
    if message is None:
        message = refusal(lambda: run_with(path, model))
        assert message is None or "calibration" in message


def run_with(path, model) -> None:
    cache = RotorQuantCache(config=model.config, calibration=path, **SMALL)
    feed(model, cache, prompt(2, 40), (30, 1))
