"""Saving and loading: exact, and clear about files that are not right."""

from __future__ import annotations

import resource
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3NextConfig,
)

from rotorquant_hf import RotorQuantCache, files
from tests.helpers.models import build
from tests.helpers.saved_files import rewrite

NOW = {"statistics_length": 0, "num_sink_tokens": 1}
SMALL_WINDOW = {"residual_length": 16, "statistics_length": 0, "block_length": 8}


def continue_from(model, cache, ids: torch.Tensor, steps: int) -> list[int]:
    """Greedy tokens after the first token of `ids` that the cache has not seen."""
    tokens, step = [], ids
    for _ in range(steps):
        with torch.no_grad():
            logits = model(step, past_key_values=cache).logits
        step = logits[:, -1:].argmax(-1)
        tokens.append(int(step))
    return tokens


@pytest.mark.parametrize(
    "options",
    [{}, {"key_quantizer": "prod"}, {"exact_layers": (0, 3)}, {"center_keys": True}],
    ids=["default", "prod", "exact layers", "centred"],
)
def test_saved_prompt_continues_to_the_same_tokens(model, sampled, tmp_path, options) -> None:
    prompt = sampled[:, :300]
    cache = RotorQuantCache("k3v3", **SMALL_WINDOW, **options)
    with torch.no_grad():
        model(prompt[:, :-1], past_key_values=cache)
    path = tmp_path / "prompt.safetensors"
    cache.save(path)
    loaded = RotorQuantCache.load(path)
    assert loaded.settings == cache.settings
    assert loaded.get_seq_length() == 299
    assert loaded.memory().packed_bytes == cache.memory().packed_bytes
    expected = continue_from(model, cache, prompt[:, -1:], 60)
    assert continue_from(model, loaded, prompt[:, -1:], 60) == expected
    assert path.stat().st_size < 1.1 * cache.memory().total_bytes


def test_loaded_tensors_are_bit_identical(model, sampled, tmp_path) -> None:
    cache = RotorQuantCache("k4v3", **SMALL_WINDOW)
    with torch.no_grad():
        model(sampled[:, :200], past_key_values=cache)
    cache.save(tmp_path / "a")
    loaded = RotorQuantCache.load(tmp_path / "a", device="cpu")
    for ours, theirs in zip(cache.layers, loaded.layers, strict=True):
        assert torch.equal(ours.keys.materialize(), theirs.keys.materialize())
        assert torch.equal(ours.values.materialize(), theirs.values.materialize())
    loaded.save(tmp_path / "b")
    first, second = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def sliding_config() -> Gemma3TextConfig:
    return Gemma3TextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=24,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )


def hybrid_config() -> Qwen3NextConfig:
    return Qwen3NextConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        linear_num_value_heads=2,
        linear_num_key_heads=1,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        layer_types=["linear_attention", "full_attention"],
    )


@pytest.mark.parametrize("make_config", [sliding_config, hybrid_config], ids=["sliding", "hybrid"])
def test_mixed_layers(make_config, tmp_path) -> None:
    config = make_config()
    torch.manual_seed(0)
    tiny = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 100, (1, 60))
    cache = RotorQuantCache(
        "k4v4", config=config, residual_length=8, statistics_length=0, block_length=4
    )
    with torch.no_grad():
        tiny(ids[:, :-1], past_key_values=cache)
    cache.save(tmp_path / "mixed")
    loaded = RotorQuantCache.load(tmp_path / "mixed", config=config)
    expected = continue_from(tiny, cache, ids[:, -1:], 30)
    assert continue_from(tiny, loaded, ids[:, -1:], 30) == expected
    with pytest.raises(ValueError, match=r"pass config=model\.config"):
        RotorQuantCache.load(tmp_path / "mixed")


@pytest.fixture
def saved(tmp_path) -> Path:
    cache = RotorQuantCache(**SMALL_WINDOW)
    x = torch.randn(1, 2, 50, 16)
    for layer in range(2):
        cache.update(x, x, layer)
    cache.save(tmp_path / "cache.safetensors")
    return tmp_path / "cache.safetensors"


def test_truncated_file(saved) -> None:
    data = saved.read_bytes()
    for size in (0, 5, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:size])
        with pytest.raises(ValueError, match="truncated"):
            RotorQuantCache.load(saved)


def test_every_flipped_bit_is_noticed(saved) -> None:
    """Of the header in all bytes, of the tensors in some."""
    data = saved.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for place in [*range(header), *range(header, len(data), 97), len(data) - 1]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        saved.write_bytes(damaged)
        with pytest.raises(ValueError, match=saved.name):
            RotorQuantCache.load(saved)
    saved.write_bytes(data)
    assert RotorQuantCache.load(saved).get_seq_length() == 50


def test_tensors_of_more_than_a_chunk_are_read_to_the_end(saved, monkeypatch) -> None:
    from rotorquant_hf import files

    monkeypatch.setattr(files, "_CHUNK", 1000)
    data = saved.read_bytes()
    assert len(data) > 5000
    RotorQuantCache.load(saved)
    saved.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(ValueError, match="its checksum is not right; save the cache again"):
        RotorQuantCache.load(saved)


def test_a_device_that_is_not_here(saved) -> None:
    for device in ("cuda:9", "nonsense"):
        with pytest.raises(ValueError, match=f"device '{device}' cannot be used here .*load on 'c"):
            RotorQuantCache.load(saved, device=device)


def test_foreign_file(tmp_path) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"not written by RotorQuantCache\.save"):
        RotorQuantCache.load(tmp_path / "model.safetensors")
    (tmp_path / "notes.txt").write_text("not a cache, but long enough to have a header " * 9)
    with pytest.raises(ValueError, match="not a safetensors file"):
        RotorQuantCache.load(tmp_path / "notes.txt")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        RotorQuantCache.load(tmp_path / "absent.safetensors")


@pytest.mark.parametrize("version", [1, 99])
def test_other_version(saved, version) -> None:
    rewrite(saved, lambda header, _: header.update(version=version))
    with pytest.raises(ValueError, match=f"format version {version} .*save the cache again"):
        RotorQuantCache.load(saved)


@pytest.mark.parametrize("name", ["1.window.keys", "0.store.key_codes", "1.drawn.key_rotation"])
def test_missing_tensor(saved, name) -> None:
    rewrite(saved, lambda _, tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=name.partition(".")[2].removeprefix("store.")):
        RotorQuantCache.load(saved)


def test_other_rotation(saved) -> None:
    rewrite(saved, lambda header, _: header["settings"].update(seed=43))
    with pytest.raises(ValueError, match="key_rotation"):
        RotorQuantCache.load(saved)


def test_other_model(saved) -> None:
    with pytest.raises(ValueError, match="2 layers, the model has 5"):
        RotorQuantCache.load(saved, config=LlamaConfig(num_hidden_layers=5))
    with pytest.raises(ValueError, match="another model's"):
        RotorQuantCache.load(saved, config=LlamaConfig(num_hidden_layers=2, sliding_window=8))


def test_a_model_of_other_sizes_with_the_same_layers(tmp_path) -> None:
    """The keys and values have the same shapes."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2}
    config, other = (LlamaConfig(**sizes, vocab_size=n) for n in (50, 60))
    cache, x = RotorQuantCache(config=config, **SMALL_WINDOW), torch.randn(1, 2, 50, 16)
    for layer in range(2):
        cache.update(x, x, layer)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="another model: its vocab_size is 50, this model's is 60"):
        RotorQuantCache.load(tmp_path / "cache", config=other)
    again = RotorQuantCache.load(tmp_path / "cache", config=config)
    again.save(tmp_path / "again")
    with pytest.raises(ValueError, match="vocab_size"):
        RotorQuantCache.load(tmp_path / "again", config=other)
    assert RotorQuantCache.load(tmp_path / "cache").get_seq_length() == 50


def test_a_cache_that_has_yet_to_quantise_needs_its_config(tmp_path) -> None:
    """What it will quantise would not turn with the text."""
    config = LlamaConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=2)
    cache, x = RotorQuantCache(config=config), torch.randn(1, 2, 50, 16)
    cache.update(x, x, 0)
    cache.save(tmp_path / "cache")
    with pytest.raises(ValueError, match="has yet to quantise tokens by it; pass config=model"):
        RotorQuantCache.load(tmp_path / "cache")
    assert RotorQuantCache.load(tmp_path / "cache", config=config).layers[0].rope is not None


def test_a_recorded_past_is_loaded(tmp_path) -> None:
    config = MistralConfig(
        num_hidden_layers=1,
        hidden_size=32,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=10,
    )
    cache, x = RotorQuantCache(config=config, **SMALL_WINDOW), torch.randn(1, 2, 20, 16)
    cache.activate_past_recording()
    cache.update(x, x, 0)
    cache.save(tmp_path / "cache")
    loaded = RotorQuantCache.load(tmp_path / "cache", config=config)
    for each in (cache, loaded):
        each.crop(-3)
        assert each.get_seq_length() == 17
    assert torch.equal(cache.layers[0].keys + 0, loaded.layers[0].keys + 0)


def test_failed_save_keeps_the_old_file(saved, monkeypatch) -> None:
    before = saved.read_bytes()
    with pytest.raises(ValueError, match="empty"):
        RotorQuantCache().save(saved)
    from rotorquant_hf import files

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        RotorQuantCache.load(saved).save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_threads_that_save_to_one_path_leave_one_of_their_caches(tmp_path) -> None:
    path, lengths, errors = tmp_path / "cache", (300, 400), []
    caches = [RotorQuantCache() for _ in lengths]
    for cache, tokens in zip(caches, lengths, strict=True):
        cache.update(*torch.randn(2, 1, 2, tokens, 16), 0)

    def save(cache: RotorQuantCache) -> None:
        try:
            cache.save(path)
        except OSError as error:
            errors.append(error)

    for _ in range(20):
        threads = [threading.Thread(target=save, args=(cache,)) for cache in caches]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert RotorQuantCache.load(path).get_seq_length() in lengths
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert errors == []


def test_a_file_that_is_replaced_while_it_is_read_is_not_called_damaged(tmp_path, monkeypatch):
    path, lengths = tmp_path / "cache", (300, 400)
    for name, tokens in zip((path, tmp_path / "new"), lengths, strict=True):
        cache = RotorQuantCache()
        cache.update(*torch.randn(2, 1, 2, tokens, 16), 0)
        cache.save(name)

    checksum = files._checksum

    def late(of: Path) -> tuple[int | None, str]:
        if (tmp_path / "new").exists():
            (tmp_path / "new").replace(path)
        return checksum(of)

    monkeypatch.setattr(files, "_checksum", late)
    with pytest.raises(ValueError, match="was replaced while it was read; read it again"):
        RotorQuantCache.load(path)
    assert RotorQuantCache.load(path).get_seq_length() == 400


@pytest.mark.parametrize("name", ["gemma3n", "qwen3_next"])
def test_caches_without_text_are_empty_whatever_their_layers(name, tmp_path) -> None:
    cache = RotorQuantCache(config=build(name).config)
    with pytest.raises(ValueError, match="the cache is empty"):
        cache.save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []


def test_recurrent_states_alone_are_saved(tmp_path) -> None:
    config = Qwen3NextConfig(num_hidden_layers=1, layer_types=["linear_attention"])
    with pytest.warns(UserWarning, match="no layer of this model"):
        cache = RotorQuantCache(config=config)
    state = torch.randn(1, 2, 3, 4)
    cache.update_recurrent_state(state, 0)
    cache.layers[0].has_previous_state[0] = True
    cache.save(tmp_path / "cache")
    with pytest.warns(UserWarning, match="no layer of this model"):
        loaded = RotorQuantCache.load(tmp_path / "cache", config=config)
    assert torch.equal(loaded.layers[0].recurrent_states[0], state)


def test_a_save_that_stops_at_any_byte_keeps_the_old_file(tmp_path) -> None:
    """The disk is full after so many bytes."""
    old, new = (RotorQuantCache(residual_length=1, block_length=1, **NOW) for _ in range(2))
    for cache, tokens in ((old, 4), (new, 8)):
        cache.update(*torch.randn(2, 1, 1, tokens, 8), 0)
    path = tmp_path / "cache"
    new.save(path)
    size, before = path.stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    old.save(path)
    held = path.read_bytes()
    for limit in range(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises(OSError, match="File too large"):
                new.save(path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert path.read_bytes() == held
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
    new.save(path)
    assert path.stat().st_size == size
    assert RotorQuantCache.load(path).get_seq_length() == 8


def test_uncompressed_dynamic_layers_round_trip(tmp_path) -> None:
    cache = RotorQuantCache(exact_layers=(0,))
    oracle = DynamicCache()
    for _ in range(3):
        x = torch.randn(1, 2, 5, 16)
        cache.update(x, x, 0)
        oracle.update(x, x, 0)
    cache.save(tmp_path / "exact")
    loaded = RotorQuantCache.load(tmp_path / "exact")
    x = torch.randn(1, 2, 1, 16)
    assert torch.equal(loaded.update(x, x, 0)[0], oracle.update(x, x, 0)[0])
