"""Torch's modes and forward passes that fail: inference mode, autocast, an error in mid-model."""

from __future__ import annotations

import copy
import stat

import pytest
import torch
from transformers import DynamicCache

from rotorquant_hf import RotorQuantCache, RotorQuantConfig, RotorQuantMSE

SMALL = {"residual_length": 16, "statistics_length": 0, "block_length": 4}


def step(model, ids: torch.Tensor, cache) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, past_key_values=cache).logits


OPERATIONS = {
    "beams": lambda cache, path: cache.reorder_cache(torch.tensor([0])),
    "repeat and select": lambda cache, path: (
        cache.batch_repeat_interleave(2),
        cache.batch_select_indices(torch.tensor([1])),
    ),
    "deepcopy": lambda cache, path: copy.deepcopy(cache),
    "save and load": lambda cache, path: (cache.save(path), RotorQuantCache.load(path))[1],
    "crop": lambda cache, path: cache.crop(0),
}


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
def test_a_cache_may_pass_in_and_out_of_inference_mode(model, sampled, operation, tmp_path):
    expected = RotorQuantCache(**SMALL)
    cache = RotorQuantCache(**SMALL)
    with torch.inference_mode():
        model(sampled[:, :100], past_key_values=cache)
        changed = operation(cache, tmp_path / "cache")
        cache = changed if isinstance(changed, RotorQuantCache) else cache
        model(sampled[:, 100:140], past_key_values=cache)
    actual = step(model, sampled[:, 140:180], cache)
    for start, end in ((0, 100), (100, 140)):
        step(model, sampled[:, start:end], expected)
    torch.testing.assert_close(actual, step(model, sampled[:, 140:180], expected))


def test_beam_search_in_inference_mode(model, sampled):
    def generate(cache) -> torch.Tensor:
        return model.generate(
            sampled[:, :40],
            attention_mask=torch.ones_like(sampled[:, :40]),
            past_key_values=cache,
            num_beams=3,
            max_new_tokens=30,
        )

    eight = {"key_bits": 8, "value_bits": 8, **SMALL}
    with torch.inference_mode():
        actual = generate(RotorQuantCache(**eight))
    assert torch.equal(actual, generate(DynamicCache()))


def test_autocast(model, sampled):
    """Keys are float32 after RoPE and values bfloat16 there; codes are made in float32 anyway."""
    ids = sampled[:, :200]
    cache, oracle = RotorQuantCache(key_bits=8, value_bits=8, **SMALL), DynamicCache()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for start in range(0, 200, 20):
            actual = step(model, ids[:, start : start + 20], cache)
            expected = step(model, ids[:, start : start + 20], oracle)
    assert cache.memory().packed_numbers > 0
    assert (actual - expected).abs().mean() < 0.03 * expected.float().std()


def test_quantizers_compute_in_float32_under_autocast():
    quantizer = RotorQuantMSE(64, 8)
    x = torch.randn(50, 64)
    x_hat, codes = quantizer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, codes_again = quantizer(x)
    assert again.dtype == torch.float32
    assert torch.equal(again, x_hat)
    assert torch.equal(codes_again["codes"], codes["codes"])


@pytest.mark.parametrize("layer", [0, 5, 7])
def test_a_forward_that_fails_can_be_repeated(model, sampled, layer):
    """NaN in one layer's keys: the layers before it give the new tokens up again."""
    cache, expected = RotorQuantCache(**SMALL), RotorQuantCache(**SMALL)
    for c in (cache, expected):
        step(model, sampled[:, :100], c)

    def spoil(module, args, output):
        return torch.full_like(output, torch.nan)

    handle = model.model.layers[layer].self_attn.k_proj.register_forward_hook(spoil)
    with pytest.raises(ValueError, match="NaN or infinite"):
        step(model, sampled[:, 100:103], cache)
    handle.remove()
    assert {x.get_seq_length() for x in cache.layers} == {100}
    torch.testing.assert_close(
        step(model, sampled[:, 100:103], cache), step(model, sampled[:, 100:103], expected)
    )


def test_a_forward_that_cannot_be_taken_back_says_so():
    from tests.cache.test_serialization import sliding_config

    config = sliding_config()
    cache = RotorQuantCache(config=config, **SMALL)
    good = torch.randn(1, 1, 60, 16)
    for layer in range(3):
        cache.update(good, good, layer)
    for layer in range(2):
        cache.update(good, good, layer)
    with pytest.raises(ValueError, match="NaN") as caught:
        cache.update(good * torch.nan, good, 2)
    assert "cache.reset()" in caught.value.__notes__[0]


@pytest.mark.parametrize("config", ["k4v4", RotorQuantConfig(), {}], ids=["name", "settings", "{}"])
def test_config_must_be_a_models(config):
    with pytest.raises(TypeError, match=r"config is of type .*model\.config"):
        RotorQuantCache(config=config)


def test_a_prompt_that_the_cache_already_holds_is_named(model, sampled):
    cache = RotorQuantCache()
    step(model, sampled[:, :50], cache)
    with pytest.raises(ValueError, match="the prompt is empty; pass one token at least"):
        RotorQuantCache(config=model.config).get_mask_sizes(0, 0)
    with pytest.raises(ValueError, match=r"already holds 50; .*cache\.reset\(\)"):
        model.generate(sampled[:, :20], past_key_values=cache, max_new_tokens=3)


def test_a_saved_file_has_ordinary_permissions(tmp_path):
    cache = RotorQuantCache()
    x = torch.randn(1, 2, 5, 16)
    cache.update(x, x, 0)
    (tmp_path / "plain").touch()
    cache.save(tmp_path / "cache")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "cache")}
    assert len(modes) == 1
    with pytest.raises(FileNotFoundError, match=r"folder .*absent does not exist"):
        cache.save(tmp_path / "absent" / "cache")


def test_torch_compile_gives_the_same(model):
    """It breaks the graph at the cache and at attention over it, and is right."""
    ids = torch.tensor([list(range(5, 45))])
    settings = {
        "residual_length": 8,
        "statistics_length": 0,
        "block_length": 4,
        "num_sink_tokens": 2,
    }
    logits = []
    for run in (model, torch.compile(model, backend="eager")):
        cache = RotorQuantCache(**settings)
        with torch.no_grad():
            run(ids[:, :30], past_key_values=cache)
            steps = [run(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
        logits.append(torch.cat(steps, dim=1))
    assert torch.equal(*logits)
