"""The name by which a model takes a cache, which Transformers changed with 5.24."""

import inspect
import warnings
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from rotorquant_hf import RotorQuantCache, allocate_bits, calibrate
from rotorquant_hf.passing import CACHE_NAME, cache_argument
from tests.helpers.models import MODELS, build, prompt


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "falcon_h1", "bloom", "falcon"])
def test_models_take_it(name: str) -> None:
    model, cache = build(name, MODELS[name].attention[0]), DynamicCache()
    given = cache_argument(model, cache)
    assert given == {CACHE_NAME: cache}
    assert CACHE_NAME in inspect.signature(model.forward).parameters


def test_code_that_comes_with_a_model_may_take_the_old_name_alone() -> None:
    class Own(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, past_key_values: Any = None) -> None: ...

    assert cache_argument(Own(), None) == {"past_key_values": None}


def test_a_model_within_another_takes_what_the_inner_one_does() -> None:
    class Wrapped(torch.nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> None: ...

    assert cache_argument(Wrapped(), None) == {CACHE_NAME: None}


def test_nothing_of_ours_uses_a_name_that_is_going() -> None:
    model, ids = build("llama"), prompt(1, 520)
    settings = {"residual_length": 16, "statistics_length": 64}
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        calibration = calibrate(model, ids, "k3v3")
        allocate_bits(model, ids, "k3v3")
        cache = RotorQuantCache("k3v3", config=model.config, calibration=calibration, **settings)
        model.generate(ids, **cache_argument(model, cache), max_new_tokens=3)
    assert cache.get_seq_length() == 522
