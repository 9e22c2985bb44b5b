"""`offloading=True`: layers are elsewhere between their uses."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import Cache

from rotorquant_hf import RotorQuantCache, calibrate
from rotorquant_hf.backend import backend
from tests.helpers import offloading
from tests.helpers.models import build, feed, narrow, prompt

# With offloading no queries are seen: a layer is moved before attention reads it.
SMALL = {"residual_length": 8, "block_length": 4, "num_sink_tokens": 2, "statistics_length": 16}
NEAREST = SMALL | {"query_aware": False}
CHUNKS = (40, 1, 1, 1, 1, 1, 7)
MODELS = ("llama", "gemma3", "falcon_h1", "qwen3_next")


@pytest.fixture
def offloaded(monkeypatch) -> Any:
    return offloading.emulated(monkeypatch)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "rotorquant"])
@pytest.mark.parametrize("sliding", [False, True], ids=["sliding too", "sliding stays"])
def test_the_same_is_read(offloaded, name, attention, sliding) -> None:
    model, ids = build(name, attention), prompt(2, sum(CHUNKS))
    expected = feed(model, RotorQuantCache("k4v4", config=model.config, **NEAREST), ids, CHUNKS)
    cache = offloaded("k4v4", config=model.config, offload_only_non_sliding=sliding, **NEAREST)
    assert torch.equal(feed(model, cache, ids, CHUNKS), expected)
    assert cache.memory().packed_numbers > 0
    compressed = [x for x in cache.layers if hasattr(x, "store")]
    stays = [x for x in compressed if sliding and x.is_sliding]
    moved = [x for x in compressed if x not in stays]
    # The last layer has brought the first of them for the next pass.
    here = [not offloading.is_away(x) for x in moved]
    assert here == [moved[0] is not cache.layers[-1]] + [False] * (len(moved) - 1)
    assert not any(map(offloading.is_away, stays))


@pytest.mark.parametrize("name", ["llama", "mistral", "falcon_h1"])
def test_the_kernels_read_the_same(offloaded, name, monkeypatch) -> None:
    """What attention was given stays readable when its layer is moved away before."""
    model, chunks = narrow(name, layers=2), (30, 1, 1, 1)
    ids = prompt(2, sum(chunks))
    # On the CPU entries are checked for NaN, which tensors that are away cannot be.
    monkeypatch.setattr("rotorquant_hf.layers.full.check_finite", lambda *a, **k: None)
    with backend("triton"):
        plain = RotorQuantCache("k4v4", config=model.config, **NEAREST)
        expected = feed(model, plain, ids, chunks)
        assert all(x.ring is not None for x in plain.layers)
        options = {"offload_only_non_sliding": False, **NEAREST}
        cache = offloaded("k4v4", config=model.config, **options)
        assert torch.equal(feed(model, cache, ids, chunks), expected)
    assert offloading.is_away(cache.layers[1])


@pytest.mark.parametrize("read", [copy.copy, copy.deepcopy, pickle.dumps, lambda layer: layer.keys])
def test_the_host_waits_for_the_copy_that_it_reads(read, monkeypatch) -> None:
    """Copies to the CPU are queued, and only that of the layer itself is waited for."""
    layer, waited = RotorQuantCache("k4v4", **NEAREST).layers.make(), []
    layer.update(torch.ones(1, 2, 40, 16), torch.ones(1, 2, 40, 16))
    layer.device = torch.device("cuda")

    class Stream:
        def record_event(self) -> Any:
            return self

        def synchronize(self) -> None:
            waited.append(True)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    layer.offload()
    assert not waited
    read(layer)
    read(layer)
    assert waited == [True]
    layer.offload()
    layer.reset()
    layer.settle()
    assert waited == [True]


def test_the_stream_waits_for_a_layer_on_its_way_back(monkeypatch) -> None:
    """A prefetch is on a stream of its own, and others are waited for by the next update alone."""
    layer, events = RotorQuantCache("k4v4", **NEAREST).layers.make(), []
    layer.update(torch.ones(1, 2, 40, 16), torch.ones(1, 2, 40, 16))

    class Stream:
        def record_event(self) -> str:
            events.append("recorded")
            return "arrived"

        def wait_event(self, event: str) -> None:
            events.append(event)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    # As if the layer were of a GPU, and its tensors here.
    layer.device = torch.device("cuda")
    layer.rope = None
    monkeypatch.setattr(layer, "_move", lambda device: layer._map(lambda x: _OnGPU.of(x)))
    layer.prefetch()
    assert events == ["recorded"]
    for _ in range(2):
        assert layer.keys is not None
    assert events == ["recorded", "arrived"]


class _OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @staticmethod
    def of(x: torch.Tensor) -> torch.Tensor:
        return x.as_subclass(_OnGPU)

    @property
    def device(self) -> torch.device:
        return torch.device("cuda")


def test_a_prefetch_waits_for_what_is_queued(offloaded, monkeypatch) -> None:
    """For the copy of its layer to the CPU, and for attention that still reads what it frees."""
    model, ids, events = build("llama"), prompt(2, 60), []
    cache = offloaded("k4v4", config=model.config, **NEAREST)
    fetch = cache.prefetch

    def prefetch(*args: Any) -> None:
        events.append("prefetch")
        fetch(*args)

    update = Cache.update

    def updated(*args: Any, **kwargs: Any) -> Any:
        events.append("update")
        return update(*args, **kwargs)

    monkeypatch.setattr(Cache, "update", updated)
    monkeypatch.setattr(cache, "prefetch", prefetch)
    monkeypatch.setattr(cache.prefetch_stream, "wait_stream", lambda _: events.append("wait"))
    feed(model, cache, ids, (50, 1, 1))
    assert events.count("prefetch") == 3 * len(cache.layers)
    # By Transformers' own waiting, or (5.17) by that before the update which prefetches.
    assert all(a in ("wait", "update") for a, b in pairwise(events) if b == "prefetch")
    assert all(a == "wait" for a, b in pairwise(events) if b == "update")


def test_without_a_config_and_with_a_calibration(offloaded) -> None:
    model, ids = build("llama"), prompt(2, sum(CHUNKS))
    made = {"calibration": calibrate(model, prompt(3, 100)), "config": model.config, **SMALL}
    for options in (NEAREST, made):
        expected = feed(model, RotorQuantCache("k3v3", **options), ids, CHUNKS)
        assert torch.equal(feed(model, offloaded("k3v3", **options), ids, CHUNKS), expected)


def test_a_text_is_generated(offloaded) -> None:
    model, ids = build("gemma3"), prompt(2, 40)
    mask = torch.ones_like(ids)

    def generated(cache: RotorQuantCache, **options: Any) -> Any:
        options |= {"max_new_tokens": 30, "do_sample": False, "attention_mask": mask}
        return model.generate(ids, past_key_values=cache, **options)

    for options in ({}, {"num_beams": 2}):
        plain = RotorQuantCache("k4v4", config=model.config, **NEAREST)
        cache = offloaded("k4v4", config=model.config, **NEAREST)
        assert torch.equal(generated(cache, **options), generated(plain, **options))


def test_a_pass_that_failed_can_be_repeated(offloaded, monkeypatch) -> None:
    """It has left the first layer offloaded, which nothing but the last one brings back."""
    model, ids, chunks = build("gemma3"), prompt(2, 40), (20, 1, 1, 18)
    options = {"config": model.config, **NEAREST}
    expected = feed(model, RotorQuantCache("k4v4", **options), ids, chunks)
    cache = offloaded("k4v4", offload_only_non_sliding=False, **options)
    read = [feed(model, cache, ids[:, :20], (20,))]
    with monkeypatch.context() as full:
        full.setattr(cache.layers[1], "_advance", _out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            feed(model, cache, ids[:, 20:], (1,))
    assert [layer.get_seq_length() for layer in cache.layers] == [20, 20, 20]
    assert offloading.is_away(cache.layers[0])
    read.append(feed(model, cache, ids[:, 20:], chunks[1:]))
    assert torch.equal(torch.cat(read, dim=1), expected)


def _out_of_memory(*_: Any) -> Any:
    raise torch.OutOfMemoryError("no room")


def test_it_is_refused_without_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="and torch sees none here: leave it out"):
        RotorQuantCache(offloading=True)
