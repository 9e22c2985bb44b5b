"""DecodeGraph, with real CUDA graphs on a GPU and emulated ones elsewhere."""

import copy
from functools import partial

import pytest
import torch
from transformers import DynamicCache

from rotorquant_hf import RotorQuantCache
from rotorquant_hf.backend import backend
from rotorquant_hf.graph import DecodeGraph
from tests.helpers import cuda_graph
from tests.helpers.models import build, left_padded, narrow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"residual_length": 8, "statistics_length": 0, "block_length": 4, "num_sink_tokens": 2}
SMALL |= {"query_aware": False}  # a sweep takes seconds in the interpreter


@pytest.fixture
def graphs(monkeypatch):
    """Makes a DecodeGraph; all that runs after it is on the kernels."""
    caches = []

    def make(model, cache, **options):
        caches.append(cache)
        return DecodeGraph(model if DEVICE == "cuda" else cuda_graph.OnGPU(model), cache, **options)

    with cuda_graph.decoding(monkeypatch, lambda: caches):
        yield make


def prompt(model, batch, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.config.vocab_size - 1, (batch, length), generator=generator)
    return ids.to(model.device)


def decode_eagerly(model, ids, cache, first, sizes=None):
    """Logits of the steps after the first tokens, of one token each or of so many as in `sizes`."""
    with torch.no_grad():
        model(ids[:, :first], past_key_values=cache)
        steps = torch.split(ids[:, first:], sizes or 1, dim=1)
        return [model(step, past_key_values=cache).logits for step in steps]


def _kinds(rope_type):
    return rope_type.values() if isinstance(rope_type, dict) else [rope_type]


def assert_same_steps(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [{}, {"key_quantizer": "prod"}, {"query_aware": True}],
    ids=["mse", "prod", "query-aware"],
)
def test_replayed_steps_are_eager_steps(options, graphs, monkeypatch):
    """Through several flushes of the ring, growth of the rows, turns, and captures anew."""
    for module in ("quant.channels", "store.side", "layers.ring"):
        monkeypatch.setattr(f"rotorquant_hf.{module}.SEGMENT", 4)
    model = narrow("llama", layers=1 if "query_aware" in options else 2).to(DEVICE)
    ids = prompt(model, 1, 48)
    settings = SMALL | options
    eager = RotorQuantCache(**settings, config=model.config)
    wanted = decode_eagerly(model, ids, eager, 36)
    cache = RotorQuantCache(**settings, config=model.config)
    with torch.no_grad():
        model(ids[:, :36], past_key_values=cache)
    graph = graphs(model, cache, room=2)
    found = [graph(ids[:, i : i + 1]) for i in range(36, 48)]
    assert_same_steps(found, wanted)
    assert cache.get_seq_length() == 48
    if DEVICE == "cpu":
        assert cuda_graph.EmulatedGraph.captures >= 2  # room for a few tokens at a time
    for ours, theirs in zip(cache.layers, eager.layers, strict=True):
        assert torch.equal(ours.store.state()["key_codes"], theirs.store.state()["key_codes"])
        assert (ours.ring._feedback is not None) == ("query_aware" in options)
        turned = zip(ours.ring._feedback or (), theirs.ring._feedback or (), strict=True)
        for found_now, wanted_now in turned:
            torch.testing.assert_close(found_now, wanted_now)


@pytest.mark.parametrize(
    ("options", "first", "attention"),
    # With the second ones several sinks of a row are padding, whose places its own first tokens
    # take; with the third, nothing is packed at first.
    [
        ({}, 36, "sdpa"),
        ({"query_aware": True, "num_sink_tokens": 4}, 30, "rotorquant"),
        ({}, 6, "sdpa"),
    ],
    ids=["captured anew", "stand-ins", "packed later"],
)
def test_padded_rows(options, first, attention, graphs):
    """As single steps with the mask, which grows."""
    model = narrow("llama", attention, layers=1).to(DEVICE)
    ids = prompt(model, 3, first + 12)
    mask, positions = left_padded(ids, (0, 3, 5))
    wanted, caches = [], [RotorQuantCache(**SMALL | options, config=model.config) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            some = {"attention_mask": mask[:, :first], "position_ids": positions[:, :first]}
            model(ids[:, :first], past_key_values=cache, **some)
        for i in range(first, ids.shape[1]):
            now = {"attention_mask": mask[:, : i + 1], "position_ids": positions[:, i : i + 1]}
            wanted.append(model(ids[:, i : i + 1], past_key_values=caches[0], **now).logits)
    stand_ins = [x.stand_ins for x in caches[1].layers]
    assert all(x is not None for x in stand_ins) == ("query_aware" in options)
    graph = graphs(model, caches[1], room=2, attention_mask=mask[:, :first])
    found = [graph(ids[:, i : i + 1]) for i in range(first, ids.shape[1])]
    assert_same_steps(found, wanted)
    assert graph._graph is not None
    assert all(x.ring.padding is None for x in caches[1].layers)
    (kept,) = graph._paddings  # as long as the graph, which reads it
    assert kept.shape == (3, 1, 1, caches[1].layers[0].ring.columns)
    graph.close()
    assert not graph._paddings
    if DEVICE == "cpu" and first == 36:
        assert cuda_graph.EmulatedGraph.captures >= 2  # room for a few tokens at a time


def test_a_mask_of_a_whole_text_may_be_cropped(graphs):
    """Of padding at its end nothing is left then; tokens that come in its place are seen by all."""
    model = narrow("llama").to(DEVICE)
    ids = prompt(model, 2, 40)
    mask, positions = left_padded(ids, (0, 4))
    padded = mask[:, :34].clone()
    padded[0, 32:] = 0
    cache, other = (RotorQuantCache(**SMALL, config=model.config) for _ in range(2))
    with torch.no_grad():
        model(ids[:, :34], past_key_values=cache, attention_mask=padded)
        model(ids[:, :32], past_key_values=other, attention_mask=mask[:, :32])
    graph = graphs(model, cache, attention_mask=padded)
    cache.crop(-2)
    for i in range(32, 38):
        now = {"attention_mask": mask[:, : i + 1], "position_ids": positions[:, i : i + 1]}
        with torch.no_grad():
            wanted = model(ids[:, i : i + 1], past_key_values=other, **now).logits
        found = graph(ids[:, i : i + 1])
    assert graph._graph is not None
    # The caches have packed other tokens, coded with 4 bits.
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_sliding_layers(graphs):
    model = narrow("mistral", "rotorquant").to(DEVICE)
    ids = prompt(model, 1, 46)
    wanted = decode_eagerly(model, ids, RotorQuantCache(config=model.config, **SMALL), 15)
    cache = RotorQuantCache(config=model.config, **SMALL)
    with torch.no_grad():
        model(ids[:, :15], past_key_values=cache)
    graph = graphs(model, cache)
    found = [graph(ids[:, i : i + 1]) for i in range(15, 46)]
    assert_same_steps(found, wanted)
    assert graph._graph is not None


def test_the_cache_can_be_used_otherwise_in_between(graphs):
    model = narrow("llama").to(DEVICE)
    ids = prompt(model, 1, 60)
    cache = RotorQuantCache(**SMALL)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        graph = graphs(model, cache)
        for i in range(30, 36):
            graph(ids[:, i : i + 1])
        model(ids[:, 36:45], past_key_values=cache)  # a chunk
        cache.crop(-2)
        for i in range(43, 50):
            last = graph(ids[:, i : i + 1])
        assert graph._graph is not None
        exact = DynamicCache()
        model(ids[:, :49], past_key_values=exact)
        near = model(ids[:, 49:50], past_key_values=exact).logits
    assert cache.get_seq_length() == 50
    # The cache is coded with 4 bits: near the uncompressed logits, far from others.
    assert (last - near).abs().max() < 0.1 * near.abs().max()


def test_eager_steps_until_there_is_something_packed(graphs):
    model = narrow("llama").to(DEVICE)
    ids = prompt(model, 1, 26)
    wanted = decode_eagerly(model, ids, RotorQuantCache(**SMALL), 8)
    cache = RotorQuantCache(**SMALL)
    with torch.no_grad():
        model(ids[:, :8], past_key_values=cache)
    graph = graphs(model, cache)
    found = [graph(ids[:, i : i + 1]) for i in range(8, 26)]
    assert_same_steps(found, wanted)


def test_ordinary_steps_in_between_may_move_the_memory(graphs):
    """They outgrow the room of the graph, which has to be captured anew."""
    model = narrow("llama").to(DEVICE)
    ids = prompt(model, 1, 74)
    sizes = [*[1] * 4, *[4] * 9, *[1] * 4]
    wanted = decode_eagerly(model, ids, RotorQuantCache(**SMALL), 30, sizes)
    cache = RotorQuantCache(**SMALL)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        graph = graphs(model, cache, room=6)
        found = [graph(ids[:, i : i + 1]) for i in range(30, 34)]
        before = cache.layers[0].store.keys.buffers.tensors["codes"]
        for i in range(34, 70, 4):
            found.append(model(ids[:, i : i + 4], past_key_values=cache).logits)
        assert cache.layers[0].store.keys.buffers.tensors["codes"] is not before
        found += [graph(ids[:, i : i + 1]) for i in range(70, 74)]
    assert_same_steps(found, wanted)


def out_of_memory(*_):
    raise torch.OutOfMemoryError("no room")


@pytest.mark.parametrize(
    ("first", "where"),
    [(30, "after the layers"), (31, "after the layers"), (31, "in the second layer")],
    ids=["a block leaves", "no block leaves", "in a layer"],
)
def test_a_failed_capture_counts_nothing(first, where, graphs, monkeypatch):
    model = narrow("llama", layers=2).to(DEVICE)
    ids = prompt(model, 1, first + 7)
    wanted = decode_eagerly(model, ids, RotorQuantCache(**SMALL), first)
    cache = RotorQuantCache(**SMALL)
    with torch.no_grad():
        model(ids[:, :first], past_key_values=cache)
    graph = graphs(model, cache)
    found = [graph(ids[:, i : i + 1]) for i in range(first, first + 3)]
    captured = []

    def fail(*_):
        captured.append(torch.cuda.is_current_stream_capturing())
        out_of_memory()

    rings = [x.ring for x in cache.layers]
    with monkeypatch.context() as patch:
        if where == "after the layers":
            patch.setattr(model.lm_head, "forward", fail)
        else:
            patch.setattr(rings[1], "_append", fail)
        with pytest.raises(torch.OutOfMemoryError):
            graph(ids[:, first + 3 : first + 4])
    assert captured == [True]
    # On a GPU nothing has run, so what a layer would copy out of its ring is not there.
    assert [x.ring for x in cache.layers] == rings
    assert cache.get_seq_length() == first + 3
    assert DEVICE != "cuda" or torch.cuda.current_stream() == torch.cuda.default_stream()
    found += [graph(ids[:, i : i + 1]) for i in range(first + 3, first + 7)]
    assert_same_steps(found, wanted)


@pytest.mark.parametrize(
    "where", ["an ordinary step", "the turn of a later layer", "the count of a later layer"]
)
def test_a_step_that_fails_between_replays(where, graphs, monkeypatch):
    """The device hears of what the host has undone, and all layers stay in step."""
    model = narrow("llama", layers=2).to(DEVICE)
    ids = prompt(model, 1, 46)
    wanted = decode_eagerly(model, ids, RotorQuantCache(**SMALL), 30)
    cache = RotorQuantCache(**SMALL)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
    graph = graphs(model, cache)
    found = [graph(ids[:, i : i + 1]) for i in range(30, 35)]
    assert graph._graph is not None
    with monkeypatch.context() as patch, torch.no_grad():
        if where == "an ordinary step":
            patch.setattr(cache.layers[0].ring, "_append", out_of_memory)
            step = partial(model, past_key_values=cache)
        else:
            method = "turn_for" if "turn" in where else "replayed"
            patch.setattr(cache.layers[1].ring, method, out_of_memory)
            step = graph
        with pytest.raises(torch.OutOfMemoryError):
            step(ids[:, 35:36])
    assert cache.get_seq_length() == 35
    found += [graph(ids[:, i : i + 1]) for i in range(35, 46)]
    assert_same_steps(found, wanted)


@pytest.mark.usefixtures("graphs")  # on the kernels
def test_a_turn_that_failed_is_made_up_for(monkeypatch):
    for module in ("quant.channels", "store.side", "layers.ring"):
        monkeypatch.setattr(f"rotorquant_hf.{module}.SEGMENT", 4)
    model = narrow("llama").to(DEVICE)
    ids, feedbacks = prompt(model, 1, 44), []
    for fails in (False, True):
        cache = RotorQuantCache(**SMALL | {"query_aware": True}, config=model.config)
        decode_eagerly(model, ids[:, :37], cache, 36)
        ring, failed = cache.layers[0].ring, 0
        with torch.no_grad(), monkeypatch.context() as patch:
            if fails:
                patch.setattr(ring.store.keys, "feedback", out_of_memory)
            for i in range(37, 44):
                try:
                    model(ids[:, i : i + 1], past_key_values=cache)
                except torch.OutOfMemoryError:
                    failed += 1
                    patch.undo()
                    model(ids[:, i : i + 1], past_key_values=cache)
        assert failed == fails
        assert cache.layers[0].ring is ring
        feedbacks.append(ring._feedback)
    for found, wanted in zip(*feedbacks, strict=True):
        torch.testing.assert_close(found, wanted)


def test_weights_that_autocast_has_cast_are_not_captured(graphs):
    """They are freed when it is left."""
    model = narrow("llama", layers=1).to(DEVICE)
    ids, cached, head = prompt(model, 1, 34), [], model.lm_head.forward
    cache = RotorQuantCache(**SMALL)

    def noting(x):
        cached.append((torch.cuda.is_current_stream_capturing(), torch.is_autocast_cache_enabled()))
        return head(x)

    with torch.no_grad(), torch.autocast(DEVICE, dtype=torch.bfloat16):
        model(ids[:, :30], past_key_values=cache)
        graph = graphs(model, cache)
        model.lm_head.forward = noting
        for i in range(30, 34):
            graph(ids[:, i : i + 1])
        assert torch.is_autocast_cache_enabled()
    assert cached == [*[(False, True)] * 3, (True, False)]


def test_closing_gives_memory_back(graphs):
    model = narrow("llama").to(DEVICE)
    ids = prompt(model, 1, 40)
    cache = RotorQuantCache(**SMALL)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
    with graphs(model, cache, room=500) as graph:
        for i in range(30, 36):
            graph(ids[:, i : i + 1])
        assert cache.layers[0].store.room > 400
    cache.crop(-10)
    assert cache.layers[0].store.room < 100


def test_attention_that_dequantises_is_refused_when_it_is_captured(graphs):
    """Multi-head latent attention says that it is "sdpa"."""
    model = build("deepseek_v3").to(DEVICE)
    ids = prompt(model, 1, 40)
    cache = RotorQuantCache(**SMALL)
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
    graph = graphs(model, cache)
    for i in range(30, 33):
        graph(ids[:, i : i + 1])
    with pytest.raises(ValueError, match="dequantises keys and values, whose number a CUDA graph"):
        graph(ids[:, 33:34])
    assert cache.get_seq_length() == 33


def test_a_mask_is_refused_when_it_is_captured(monkeypatch):
    """A graph would read as many columns in every step as in the first."""
    model = narrow("llama").to(DEVICE)
    ids = prompt(model, 2, 32)
    mask, _ = left_padded(ids, (0, 3))
    cache = RotorQuantCache(**SMALL)
    with torch.no_grad(), backend("triton"):
        model(ids[:, :30], past_key_values=cache, attention_mask=mask[:, :30])
        monkeypatch.setattr("rotorquant_hf.attention.dispatch.is_capturing", lambda _: True)
        model(ids[:, 30:31], past_key_values=cache)
        with pytest.raises(ValueError, match="has a mask, whose length a CUDA graph would freeze"):
            model(ids[:, 31:], past_key_values=cache, attention_mask=mask)


class TestRefused:
    @pytest.fixture(autouse=True)
    def _on_kernels(self):
        with backend("triton"):
            yield

    def test_on_the_cpu(self, model):
        with pytest.raises(ValueError, match="on cpu; CUDA graphs need a CUDA device"):
            DecodeGraph(model, RotorQuantCache())

    def test_an_empty_cache(self, model):
        with pytest.raises(ValueError, match="cache is empty; feed the prompt"):
            DecodeGraph(cuda_graph.OnGPU(model), RotorQuantCache())

    @pytest.mark.parametrize(
        ("cache", "graph", "message"),
        [
            ({}, {"room": 0}, "room is 0"),
            ({"exact_layers": (1,)}, {}, "layer 1 of the cache is a DynamicLayer"),
            ({"check_finite": True}, {}, "check_finite is on"),
            ({"offloading": True}, {}, "the cache is offloaded"),
        ],
        ids=["no room", "uncompressed layers", "checks that wait for the device", "offloading"],
    )
    def test_settings(self, model, cache, graph, message):
        offloading = cache.pop("offloading", False)
        cache = RotorQuantCache(config=model.config, **cache)
        model(torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
        cache.offloading = offloading  # its streams need a GPU
        with pytest.raises(ValueError, match=message):
            DecodeGraph(cuda_graph.OnGPU(model), cache, **graph)

    @pytest.mark.parametrize(
        ("said", "message"),
        [
            ({"hf_device_map": {"model": 0, "lm_head": 1}}, "on cuda:0, cuda:1; a CUDA graph"),
            ({"hf_device_map": {"model": "cuda:0", "lm_head": "cpu"}}, "on cpu, cuda:0"),
            ({"parameters": "some on meta"}, "the model is on cpu, meta; .* device_map="),
            ({"_tp_size": 2}, "divided among 2 devices"),
        ],
        ids=["two GPUs", "offloaded to the CPU", "parameters", "tensor parallel"],
    )
    def test_models_over_several_devices(self, model, said, message):
        if "parameters" in said:
            elsewhere = torch.nn.Parameter(torch.empty(1, device="meta"))
            said = {"parameters": lambda: [*model.parameters(), elsewhere]}
        with pytest.raises(ValueError, match=message):
            DecodeGraph(cuda_graph.OnGPU(model, **said), RotorQuantCache())

    def test_one_entry_for_the_whole_model_is_one_device(self, model):
        on_gpu = cuda_graph.OnGPU(model, hf_device_map={"": 0})
        with pytest.raises(ValueError, match="cache is empty"):
            DecodeGraph(on_gpu, RotorQuantCache())

    def test_layers_on_another_device(self, model):
        cache = RotorQuantCache()
        model(torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
        cache.layers[1].device = torch.device("cuda:1")
        with pytest.raises(ValueError, match="layer 1 of the cache is on cuda:1, the model on cpu"):
            DecodeGraph(cuda_graph.OnGPU(model), cache)

    @pytest.mark.parametrize("kind", ["dynamic", "longrope"])
    @pytest.mark.parametrize("by_layer_type", [False, True], ids=["one", "by layer type"])
    def test_rope_that_changes_with_the_length(self, kind, by_layer_type):
        rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
        if kind == "longrope":
            rope |= {"long_factor": [2.0] * 8, "short_factor": [1.0] * 8}
            rope |= {"original_max_position_embeddings": 32}
        name = "gemma3" if by_layer_type else "llama"
        config = copy.deepcopy(build(name).config)
        if by_layer_type:
            config.rope_parameters["full_attention"] = rope
        else:
            config.rope_parameters = rope
        model = type(build(name))(config)
        kinds = {x for m in model.modules() for x in _kinds(getattr(m, "rope_type", None))}
        assert kind in kinds  # what the model itself goes by
        with pytest.raises(ValueError, match=f"RoPE is of type '{kind}', whose frequencies change"):
            DecodeGraph(cuda_graph.OnGPU(model), RotorQuantCache())

    @pytest.mark.parametrize("attention", ["eager", "flex_attention"])
    def test_other_attention(self, model, attention):
        config = copy.deepcopy(model.config)
        config._attn_implementation = attention
        with pytest.raises(ValueError, match=f"the model's attention is '{attention}', which"):
            DecodeGraph(cuda_graph.OnGPU(model, config=config), RotorQuantCache())

    def test_chunked_attention(self):
        with pytest.raises(ValueError, match="chunked attention, whose mask changes"):
            DecodeGraph(cuda_graph.OnGPU(build("llama4")), RotorQuantCache())

    def test_sliding_windows_that_the_cache_does_not_know(self):
        """A graph captured before the text outgrows the window would go on without it."""
        model = narrow("mistral")
        cache = RotorQuantCache(**SMALL)
        with torch.no_grad():
            model(prompt(model, 1, 12), past_key_values=cache)
        with pytest.raises(ValueError, match=r"windows, and the cache no .*config=model.config"):
            DecodeGraph(cuda_graph.OnGPU(model), cache)

    @pytest.mark.parametrize("shape", [(1, 20), (2, 19), (2, 20, 1)])
    def test_masks_of_another_text(self, shape):
        model = narrow("llama")
        cache = RotorQuantCache(**SMALL, config=model.config)
        with torch.no_grad():
            model(prompt(model, 2, 20), past_key_values=cache)
        mask = torch.zeros(shape)
        with pytest.raises(ValueError, match=r"attention_mask has shape .*; pass \(2, 20\)"):
            DecodeGraph(cuda_graph.OnGPU(model), cache, attention_mask=mask)

    def test_padding_under_a_sliding_window(self):
        model = narrow("mistral")
        cache = RotorQuantCache(**SMALL, config=model.config)
        ids = prompt(model, 2, 12)
        mask, _ = left_padded(ids, (0, 3))
        with torch.no_grad():
            model(ids, past_key_values=cache, attention_mask=mask)
        with pytest.raises(ValueError, match="attention_mask has zeros, and layer 0 has a sliding"):
            DecodeGraph(cuda_graph.OnGPU(model), cache, attention_mask=mask)

    def test_short_sliding_windows(self):
        model = copy.deepcopy(build("mistral"))
        model.config.sliding_window = 16
        cache = RotorQuantCache(config=model.config, **SMALL)
        model(torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
        with pytest.raises(ValueError, match=r"sliding window of 16 tokens, of which up to 16"):
            DecodeGraph(cuda_graph.OnGPU(model), cache)

    def test_torch_backend(self, model):
        cache = RotorQuantCache()
        model(torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
        with backend("torch"), pytest.raises(ValueError, match="layer 0 does not decode through"):
            DecodeGraph(cuda_graph.OnGPU(model), cache)

    @pytest.mark.parametrize("shape", [(1, 3), (2, 1), (1,)], ids=str)
    def test_other_shapes(self, model, shape):
        cache = RotorQuantCache()
        one = torch.ones(1, 1, dtype=torch.long)
        model(one.expand(1, 3), past_key_values=cache)
        graph = DecodeGraph(cuda_graph.OnGPU(model), cache)
        with pytest.raises(ValueError, match=r"input_ids has shape .*; pass \(1, 1\)"):
            graph(torch.ones(shape, dtype=torch.long), one)
        with pytest.raises(ValueError, match=r"position_ids has shape .*; pass \(1, 1\)"):
            graph(one, torch.ones(shape, dtype=torch.long))
        assert cache.get_seq_length() == 3
