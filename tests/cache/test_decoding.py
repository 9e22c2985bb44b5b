"""`decode_with_graph` in `generate`: the tokens of plain `generate`, or a clear refusal."""

import copy

import pytest
import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    StoppingCriteria,
    StopStringCriteria,
    T5Config,
    T5ForConditionalGeneration,
)

from rotorquant_hf import RotorQuantCache, decode_with_graph, decoding
from rotorquant_hf.backend import backend
from rotorquant_hf.passing import CACHE_NAME
from tests.helpers import cuda_graph
from tests.helpers.models import build, left_padded, narrow, prompt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"residual_length": 8, "statistics_length": 0, "block_length": 4, "num_sink_tokens": 2}
SMALL |= {"query_aware": False}  # a sweep takes seconds in the interpreter
ON_GPU = cuda_graph.on_gpu(decode_with_graph)
CUSTOM = decode_with_graph if DEVICE == "cuda" else ON_GPU


def small(name="llama", attention=None):
    return narrow(name, attention).to(DEVICE)


class Streamer:
    def __init__(self):
        self.got, self.ended = [], 0

    def put(self, ids):
        self.got.append(ids.tolist())

    def end(self):
        self.ended += 1


class Steps:
    """A `generate` with and without the graph, on the kernels, and how many steps it took."""

    def __init__(self, monkeypatch):
        self.caches, self.taken, self.captures = [], [], 0
        steps = self.taken

        class Counted(decoding.DecodeGraph):
            def __call__(self, *args):
                steps.append(args[0].shape)
                return super().__call__(*args)

        monkeypatch.setattr(decoding, "DecodeGraph", Counted)

    def cache(self, model, **options):
        self.caches.append(RotorQuantCache(**SMALL, config=model.config, **options))
        return self.caches[-1]

    def both(self, model, ids, seed=0, **options):
        """What `generate` gives without and with the graph, each with its own cache."""
        found = []
        for custom in ({}, {"custom_generate": CUSTOM}):
            assert not self.taken
            torch.manual_seed(seed)
            cache, streamer = self.cache(model), Streamer()
            out = model.generate(
                ids,
                past_key_values=cache,
                streamer=streamer,
                return_dict_in_generate=True,
                output_scores=True,
                output_logits=True,
                **options,
                **custom,
            )
            found.append((out, cache, streamer))
        return found


@pytest.fixture
def steps(monkeypatch):
    found = Steps(monkeypatch)
    with cuda_graph.decoding(monkeypatch, lambda: found.caches):
        yield found


def assert_same(plain, graphed):
    (a, cache_a, streamer_a), (b, cache_b, streamer_b) = plain, graphed
    assert torch.equal(a.sequences, b.sequences)
    assert type(a) is type(b)
    for name in ("scores", "logits"):
        for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert b.past_key_values is cache_b
    assert cache_a.get_seq_length() == cache_b.get_seq_length() == a.sequences.shape[1] - 1
    for x, y in zip(cache_a.layers, cache_b.layers, strict=True):
        assert y.ring is None or not y.ring.captured  # the graph is closed
        torch.testing.assert_close(x.keys, y.keys, rtol=1e-4, atol=1e-4)
    assert streamer_a.got == streamer_b.got
    assert streamer_a.ended == streamer_b.ended == 1


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 0.8, "top_k": 20, "prefill_chunk_size": 7},
    ],
    ids=["greedy", "sampled"],
)
def test_tokens_are_those_of_plain_generate(steps, options, rows):
    model = small()
    ids = prompt(rows, 16).to(DEVICE)
    plain, graphed = steps.both(model, ids, max_new_tokens=10, **options)
    assert_same(plain, graphed)
    assert graphed[0].sequences.shape == (rows, 26)
    assert steps.taken == [(rows, 1)] * 9
    if DEVICE == "cpu":
        assert cuda_graph.EmulatedGraph.captures == 1


def test_a_row_that_ends_is_padded(steps):
    """Its last tokens are those of the pad; the batch ends when all rows have ended."""
    model = small()
    ids = prompt(2, 16).to(DEVICE)
    with backend("torch"):
        free = model.generate(ids, past_key_values=RotorQuantCache(**SMALL), max_new_tokens=10)
    eos = int(free[0, 20])
    assert eos not in free[1, 16:22]
    plain, graphed = steps.both(
        model, ids, max_new_tokens=10, eos_token_id=eos, pad_token_id=0, do_sample=False
    )
    assert_same(plain, graphed)
    assert graphed[0].sequences[0, -1] == 0
    assert eos in graphed[0].sequences[0]


class AfterFive(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= 21, device=input_ids.device)


def test_stopping_criteria(steps):
    model = small()
    ids = prompt(1, 16).to(DEVICE)
    plain, graphed = steps.both(model, ids, max_new_tokens=50, stopping_criteria=[AfterFive()])
    assert_same(plain, graphed)
    assert graphed[0].sequences.shape == (1, 21)
    assert len(steps.taken) == 4


def test_stop_strings(steps, tokenizer):
    model = small()
    ids = prompt(1, 16).to(DEVICE)
    with backend("torch"):
        free = model.generate(ids, past_key_values=RotorQuantCache(**SMALL), max_new_tokens=6)
    written = [tokenizer.decode(i) for i in free[0, 17:]]
    string = next(x for x in written if x.isascii())
    stop = [StopStringCriteria(tokenizer, [string])]
    plain, graphed = steps.both(model, ids, max_new_tokens=12, stopping_criteria=stop)
    assert_same(plain, graphed)
    assert 16 < graphed[0].sequences.shape[1] <= 22


def test_sliding_layers(steps):
    model = small("mistral", "rotorquant")
    plain, graphed = steps.both(model, prompt(1, 18).to(DEVICE), max_new_tokens=12)
    assert torch.equal(plain[0].sequences, graphed[0].sequences)
    assert plain[2].got == graphed[2].got
    assert len(steps.taken) == 11


def test_a_second_round_on_the_same_cache(steps):
    """The whole text so far and a new question, as a chat has it; then plain again."""
    model = small()
    found = []
    for custom in ({}, {"custom_generate": CUSTOM}):
        cache, ids = steps.cache(model), prompt(1, 16).to(DEVICE)
        for turn, how in enumerate((custom, custom, {})):
            ids = torch.cat([ids, prompt(1, 5, seed=turn + 1).to(DEVICE)], dim=1)
            ids = model.generate(ids, past_key_values=cache, max_new_tokens=6, **how)
        found.append((ids, cache.get_seq_length()))
    (plain, a), (graphed, b) = found
    assert torch.equal(plain, graphed)
    assert a == b == plain.shape[1] - 1
    assert len(steps.taken) == 10


def test_a_mask_of_ones_is_no_padding(steps):
    """Transformers 5.17 hands it on."""
    model = small()
    ids = prompt(1, 16).to(DEVICE)
    mask = torch.ones_like(ids)
    plain, graphed = steps.both(model, ids, max_new_tokens=6, attention_mask=mask)
    assert_same(plain, graphed)


def test_padded_rows(steps):
    model = small()
    ids = prompt(2, 16).to(DEVICE)
    mask, _ = left_padded(ids, (0, 3))
    options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 8}
    plain, graphed = steps.both(model, ids, **options)
    assert_same(plain, graphed)
    assert steps.taken == [(2, 1)] * 7
    if DEVICE == "cpu":
        assert cuda_graph.EmulatedGraph.captures == 1
    steps.taken.clear()
    # In a second round the mask is of the whole text.
    found = []
    for (out, cache, _), how in ((plain, {}), (graphed, {"custom_generate": CUSTOM})):
        text = torch.cat((out.sequences, prompt(2, 3, seed=1).to(DEVICE)), dim=1)
        more = options | {"attention_mask": left_padded(text, (0, 3))[0]} | how
        found.append(model.generate(text, past_key_values=cache, **more))
    assert torch.equal(*found)
    assert steps.taken


def test_one_token_needs_no_graph(steps):
    model = small()
    plain, graphed = steps.both(model, prompt(1, 16).to(DEVICE), max_new_tokens=1)
    assert_same(plain, graphed)
    assert not steps.taken


def test_memory_is_taken_for_what_is_left_to_write(steps, monkeypatch):
    rooms = []
    make = decoding.DecodeGraph

    def recorded(model, cache, room, mask):
        rooms.append(room)
        return make(model, cache, room, mask)

    monkeypatch.setattr(decoding, "DecodeGraph", recorded)
    model = small()
    for new in (4, 2000):
        model.generate(
            prompt(1, 16).to(DEVICE),
            past_key_values=steps.cache(model),
            max_new_tokens=new,
            stopping_criteria=[AfterFive()],
            custom_generate=CUSTOM,
        )
    assert rooms == [4, 1024]


class TestRefused:
    """Before the cache has changed."""

    @pytest.fixture(autouse=True)
    def _on_kernels(self):
        with backend("triton"):
            yield

    def refused(self, message, model=None, ids=None, cache=None, **options):
        model = build("llama") if model is None else model
        cache = RotorQuantCache(**SMALL) if cache is None else cache
        with pytest.raises(ValueError, match=message):
            model.generate(
                prompt(1, 16) if ids is None else ids,
                past_key_values=cache,
                max_new_tokens=4,
                custom_generate=ON_GPU,
                **options,
            )
        assert cache.get_seq_length() == 0

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_beams": 2}, "generation mode is 'beam_search', and a graph steps token"),
            ({"prompt_lookup_num_tokens": 3}, "generation mode is 'assisted_generation'"),
            ({"use_cache": False}, "use_cache is False; pass"),
            (
                {"output_hidden_states": True, "return_dict_in_generate": True},
                "output_hidden_states is on",
            ),
            (
                {"labels": torch.ones(1, 16)},
                "the model gets labels, which a captured step does not",
            ),
        ],
        ids=["beams", "prompt lookup", "no cache", "hidden states", "other inputs"],
    )
    def test_options(self, options, message):
        self.refused(message, **options)

    def test_an_assistant(self):
        """Transformers keeps it from a `custom_generate`."""
        self.refused("generation mode is 'assisted_generation'", assistant_model=build("llama"))

    def test_synced_gpus(self):
        with pytest.raises(ValueError, match="synced_gpus is on"):
            decode_with_graph(
                build("llama"), prompt(1, 4), [], [], build("llama").generation_config, True
            )

    def test_padding_under_a_sliding_window(self):
        model = narrow("mistral")
        cache = RotorQuantCache(**SMALL, config=model.config)
        ids = prompt(2, 16)
        mask, _ = left_padded(ids, (0, 3))
        message = "attention_mask has zeros, and layer 0"
        self.refused(message, model, ids, cache, attention_mask=mask)

    def test_positions_of_several_axes(self):
        positions = torch.arange(16).expand(3, 1, 16)
        self.refused(r"position_ids has shape \(3, 1, 16\)", position_ids=positions)

    def test_another_cache(self):
        self.refused(f"{CACHE_NAME} is of type DynamicCache", cache=DynamicCache())

    def test_cross_attention(self):
        config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=97)
        config.decoder_start_token_id = 0
        cache = EncoderDecoderCache(RotorQuantCache(**SMALL), DynamicCache())
        self.refused("is an encoder-decoder model", T5ForConditionalGeneration(config), cache=cache)

    def test_the_cpu(self):
        with pytest.raises(ValueError, match="on cpu; CUDA graphs need a CUDA device"):
            build("llama").generate(
                prompt(1, 4), past_key_values=RotorQuantCache(), custom_generate=decode_with_graph
            )

    def test_layers_that_are_not_compressed(self):
        config = build("llama").config
        for options in ({}, {"config": config}):
            cache = RotorQuantCache(exact_layers=(1,), **SMALL, **options)
            self.refused(r"exact_layers", cache=cache)

    def test_what_only_the_prompt_tells(self):
        """That the kernels do not take a model's states is known when there are some."""
        model = copy.deepcopy(build("llama")).double()
        cache = RotorQuantCache(**SMALL)
        self.refused("layer 0 does not decode through the Triton kernels", model, cache=cache)
        model.float().generate(prompt(1, 4), past_key_values=cache, max_new_tokens=2)
        assert cache.get_seq_length() == 5
