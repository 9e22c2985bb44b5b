"""The attention implementation "rotorquant", with "eager" as the oracle."""

from __future__ import annotations

import copy
import itertools
import math
import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    EncoderDecoderCache,
    Gemma4AudioConfig,
    Gemma4AudioModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
    WhisperConfig,
    WhisperModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from rotorquant_hf import RotorQuantCache, RotorQuantConfig
from rotorquant_hf.attention import registered
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.reference import attention_reference
from rotorquant_hf.attention.registered import rotorquant_attention, rotorquant_mask
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.quant.packed import PackedSpan
from tests.conftest import MODEL
from tests.helpers.models import COMMON, MODELS, SLIDING_WINDOW, build, feed, prompt, relative_error

SMALL = {"residual_length": 8, "statistics_length": 0, "query_aware": False, "block_length": 4}

OWN_ATTENTION = ["bloom", "mpt", "codegen", "gptj", "gpt_neo", "falcon", "falcon_multi_query"]
"""Models that do not use the attention implementation that is set; codegen and gptj do from
Transformers 5.24 on."""
FOLLOWING = [
    name
    for name, tiny in MODELS.items()
    if name not in OWN_ATTENTION and set(tiny.layers) != {"own"}
]
MAIN = [name for name in COMMON if name not in OWN_ATTENTION]
LATENT = ["deepseek_v3"]
"""Models that compute keys and values from what they cached."""

PADDED = pytest.mark.parametrize("padded", [False, True], ids=["full", "left padded"])


def attention_mask(ids: Tensor) -> Tensor:
    """With 11 and 3 tokens of left padding in the first and the last row."""
    mask = torch.ones_like(ids)
    mask[0, :11] = mask[-1, :3] = 0
    return mask


@pytest.fixture
def dequantised(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the packed tokens that were dequantised, in order."""
    shapes, materialize = [], PackedSpan.materialize

    def remembering(self, out):
        shapes.append(self.shape)
        return materialize(self, out)

    monkeypatch.setattr(PackedSpan, "materialize", remembering)
    return shapes


# --- registration ---


def test_importing_the_package_registers_attention_and_masks():
    assert AttentionInterface()["rotorquant"] is rotorquant_attention
    assert AttentionMaskInterface()["rotorquant"] is rotorquant_mask


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_it_is_set_in_one_call(name, dequantised):
    model, ids = copy.deepcopy(build(name)), prompt(2, 60)
    cache = RotorQuantCache(config=model.config, **SMALL)
    feed(model, cache, ids, (40,))
    model.set_attn_implementation("rotorquant")
    logits = feed(model, copy.deepcopy(cache), ids[:, 40:], (1,))
    assert not dequantised
    assert torch.equal(logits, feed(build(name, "rotorquant"), cache, ids[:, 40:], (1,)))


def test_it_is_set_while_loading(sampled, dequantised):
    model = AutoModelForCausalLM.from_pretrained(MODEL, attn_implementation="rotorquant")
    assert model.config._attn_implementation == "rotorquant"
    cache = RotorQuantCache(**SMALL)
    feed(model, cache, sampled[:, :50], (40, 1, 9))
    assert cache.memory().packed_numbers > 0
    assert not dequantised


# --- the same numbers as eager ---


@PADDED
@pytest.mark.parametrize("name", MAIN)
def test_over_plain_tensors_logits_are_those_of_eager(name, padded):
    ids, chunks = prompt(3, 60), (30, 1, 1, 7, 12, 1, 8)
    mask = attention_mask(ids) if padded else None
    seen = attention_mask(ids).bool() if padded else torch.ones_like(ids, dtype=torch.bool)
    eager, model = build(name, "eager"), build(name, "rotorquant")
    expected = feed(eager, DynamicCache(config=eager.config), ids, chunks, mask)
    for cache in (
        DynamicCache(config=model.config),
        RotorQuantCache(
            config=model.config, residual_length=1000, statistics_length=0, query_aware=False
        ),
    ):
        logits = feed(model, cache, ids, chunks, mask)
        torch.testing.assert_close(logits[seen], expected[seen], rtol=0, atol=1e-5)


@PADDED
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("name", FOLLOWING)
def test_over_packed_tokens_logits_are_those_of_eager(name, tokens, padded, dequantised):
    """All read the same cache: none of them quantised a number otherwise than the others."""
    ids = prompt(3, 60)
    mask = attention_mask(ids) if padded else None
    filled = RotorQuantCache(config=build(name).config, **SMALL)
    feed(build(name, "eager"), filled, ids, (30, 11), mask)
    assert filled.memory().packed_numbers > 0
    logits, count = {}, {}
    for attention in ("eager", "rotorquant", *MODELS[name].attention):
        dequantised.clear()
        seen = None if mask is None else mask[:, : 41 + tokens]
        with torch.no_grad():
            logits[attention] = build(name, attention)(
                ids[:, 41 : 41 + tokens], attention_mask=seen, past_key_values=copy.deepcopy(filled)
            ).logits
        count[attention] = len(dequantised)
    for attention, found in logits.items():
        torch.testing.assert_close(found, logits["eager"], rtol=0, atol=3e-5, msg=attention)
    assert count["eager"] > 0
    if name not in LATENT:
        assert count["rotorquant"] == 0
        assert count.get("sdpa", 0) == 0


@pytest.mark.parametrize("name", [name for name in MAIN if name not in LATENT])
def test_nothing_is_dequantised_from_prompt_to_end(name, dequantised):
    """Sliding layers move far beyond their window."""
    ids, chunks = prompt(2, 90), (30, *(1,) * 20, 7, 9, *(1,) * 15, 9)
    logits = {}
    for attention in ("rotorquant", "eager"):
        model = build(name, attention)
        cache = RotorQuantCache("k4v4", config=model.config, **SMALL)
        logits[attention] = feed(model, cache, ids, chunks)
        assert cache.memory().packed_numbers > 0
        assert bool(dequantised) == (attention == "eager")
    # Not equal: rounding may move a number into the next bin.
    assert relative_error(logits["rotorquant"], logits["eager"]) < 2e-3


def test_latent_attention_dequantises_the_latents_that_it_expands(dequantised):
    """DeepSeek's attention projects what it cached to the keys of all heads, with any cache."""
    model, ids = build("deepseek_v3", "rotorquant"), prompt(2, 60)
    cache = RotorQuantCache(config=model.config, **SMALL)
    feed(model, cache, ids, (40,))
    assert not dequantised
    feed(model, cache, ids[:, 40:], (1,))
    assert {shape[1] for shape in dequantised} == {1}
    assert len(dequantised) == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models(name, dtype, dequantised):
    ids, chunks = prompt(2, 60), (40, 1, 7, 1)
    model = build(name, "rotorquant", dtype)
    cache = RotorQuantCache("k8v8", config=model.config, **SMALL)
    logits = feed(model, cache, ids, chunks)
    assert logits.dtype == dtype
    assert not dequantised
    eager = build(name, "eager")
    reference = feed(eager, DynamicCache(config=eager.config), ids, chunks)
    assert relative_error(logits.float(), reference) < 0.03


# --- towers beside a language model, which know nothing of caches ---


def audio_tower() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """One that computes by itself, in a file of models that use the interface."""
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    channels = {"subsampling_conv_channels": [8, 4], "output_proj_dims": 16}
    heard = torch.ones(2, 64, dtype=torch.bool)
    heard[1, 40:] = False
    inputs = {"input_features": torch.randn(2, 64, 8), "attention_mask": heard}
    return Gemma4AudioModel(Gemma4AudioConfig(**tiny, **channels)), inputs


def speech_encoder() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_layers=1,
        decoder_attention_heads=2,
        max_source_positions=32,
        num_mel_bins=8,
    )
    return WhisperModel(config).encoder, {"input_features": torch.randn(2, 8, 64)}


def vision_tower() -> tuple[PreTrainedModel, dict[str, Tensor]]:
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes = {"intermediate_size": 64, "image_size": 32, "patch_size": 8}
    model = SiglipVisionModel(SiglipVisionConfig(**tiny, **sizes))
    return model, {"pixel_values": torch.randn(2, 3, 32, 32)}


@pytest.mark.parametrize("tower", [audio_tower, speech_encoder, vision_tower])
def test_towers_compute_as_in_eager(tower):
    torch.manual_seed(0)
    model, inputs = tower()
    outputs = []
    for name in ("eager", "rotorquant"):
        model.eval().set_attn_implementation(name)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing of a cache is said where there is none
            outputs.append(model(**inputs).last_hidden_state)
    torch.testing.assert_close(*outputs)


# --- models that do not use the interface ---


@pytest.mark.parametrize("name", ["bloom", "mpt", "codegen"])
def test_other_models_compute_as_in_eager_and_say_so(name):
    ids, chunks = prompt(3, 60), (40, 1, 7, 1)
    mask = attention_mask(ids)
    model, eager = build(name, "rotorquant"), build(name, "eager")
    expected = feed(eager, RotorQuantCache(**SMALL), ids, chunks, mask)
    if hasattr(sys.modules[type(model).__module__], "ALL_ATTENTION_FUNCTIONS"):
        assert name == "codegen"  # from Transformers 5.24 on
        # Without padding, which every implementation fills with something else.
        first, second = (feed(x, RotorQuantCache(**SMALL), ids, chunks) for x in (model, eager))
        torch.testing.assert_close(first, second, rtol=0, atol=1e-5)
        return
    with pytest.warns(UserWarning, match=r"does not use transformers\.AttentionInterface"):
        logits = feed(model, RotorQuantCache(**SMALL), ids, chunks, mask)
    assert torch.equal(logits, expected)


def test_falcon_stays_with_sdpa_which_reads_packed_codes_too(dequantised):
    for name in ("falcon", "falcon_multi_query"):
        model, ids = copy.deepcopy(build(name, "sdpa")), prompt(2, 60)
        model.set_attn_implementation("rotorquant")
        assert model.config._attn_implementation == "sdpa"
        filled = RotorQuantCache(**SMALL)
        feed(model, filled, ids, (40,))
        logits = feed(model, copy.deepcopy(filled), ids[:, 40:], (1,))
        assert not dequantised
        expected = feed(build(name, "eager"), filled, ids[:, 40:], (1,))
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
        dequantised.clear()


def test_models_that_are_not_known_get_additive_masks():
    class OwnConfig(LlamaConfig):
        model_type = "own-llama"

    class OwnModel(LlamaForCausalLM):
        config_class = OwnConfig

    wanted: dict[str, Any] = {"batch_size": 2, "q_length": 3, "kv_length": 3}
    wanted |= {"mask_function": causal_mask_function, "config": OwnConfig(), "dtype": torch.float32}
    mask = rotorquant_mask(**wanted)
    assert torch.equal(mask == 0, torch.ones(2, 1, 3, 3).tril().bool())
    AutoModelForCausalLM.register(OwnConfig, OwnModel)  # as for code that comes with a model
    assert rotorquant_mask(**wanted) is None
    assert rotorquant_mask(**wanted | {"config": SiglipVisionConfig()}) is None


# --- soft-capping and learned sinks ---


@pytest.mark.parametrize("tokens", [20, 1, 7], ids=["prompt", "one token", "chunk"])
@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_soft_capping_and_sinks_have_an_effect(name, tokens):
    models = {a: copy.deepcopy(build(name, a)) for a in ("rotorquant", "eager")}
    ids, past = prompt(2, 60), 0 if tokens == 20 else 40
    filled = RotorQuantCache(config=models["eager"].config, **SMALL)
    if past:
        feed(models["eager"], filled, ids, (past,))
    logits: dict[tuple[str, bool], Tensor] = {}
    for attention, model in models.items():
        for removed in (False, True):
            if removed:
                _remove(model)
            cache = copy.deepcopy(filled)
            logits[attention, removed] = feed(model, cache, ids[:, past:], (tokens,))
    for removed in (False, True):
        torch.testing.assert_close(
            logits["rotorquant", removed], logits["eager", removed], rtol=0, atol=1e-5
        )
    assert relative_error(logits["rotorquant", True], logits["rotorquant", False]) > 1e-3


def _remove(model: Any) -> None:
    for layer in model.model.layers:
        if hasattr(layer.self_attn, "sinks"):
            layer.self_attn.sinks.data.fill_(-1e4)
        else:
            layer.self_attn.attn_logit_softcapping = None


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_prompts_are_read_some_queries_at_a_time(name, monkeypatch):
    model, ids = build(name, "rotorquant"), prompt(2, 45)
    at_once = feed(model, DynamicCache(config=model.config), ids, (30, 15))
    sizes, reference = [], registered.attention_reference

    def remembering(query, key, value, options):
        sizes.append(query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2])
        return reference(query, key, value, options)

    monkeypatch.setattr(registered, "attention_reference", remembering)
    monkeypatch.setattr(registered, "_MAX_SCORES", 2000)
    torch.testing.assert_close(
        feed(model, DynamicCache(config=model.config), ids, (30, 15)), at_once, rtol=0, atol=1e-6
    )
    assert max(sizes) <= 2000
    assert len(sizes) > 4


# --- masks ---


def _cases() -> list[dict[str, Any]]:
    """Queries and keys as caches without, with sliding and with static layers place them.

    `more`: how many tokens longer the padding mask is than the text.
    """
    cases = []
    padding_masks = (None, (0, 0), (2, 0), (0, 3), (0, -1))
    for past, n, padding in itertools.product((0, 1, 3, 9, 20), (1, 2, 5), padding_masks):
        for first, spare in itertools.product({0, min(past, 2), max(0, past - 5)}, (0, 4)):
            mask = None
            if padding is not None:
                hidden, more = padding
                mask = torch.ones(2, past + n + more, dtype=torch.bool)
                mask[0, :hidden] = False
                mask[:, past + n :] = False
            cases.append(
                {
                    "batch_size": 2,
                    "q_length": n,
                    "kv_length": past + n - first + spare,
                    "q_offset": past,
                    "kv_offset": first,
                    "attention_mask": mask,
                }
            )
    return cases


@pytest.mark.parametrize("kind", ["full", "sliding", "chunked"])
def test_what_masks_let_see_is_what_they_should(kind):
    size = 6
    config, plain = build("llama4" if kind == "chunked" else "llama").config, 0
    for case in _cases():
        options: dict[str, Any] = {"mask_function": causal_mask_function}
        if kind == "sliding":
            function = sliding_window_causal_mask_function(size)
            options = {"mask_function": function, "local_size": size}
        if kind == "chunked":
            mask = case["attention_mask"]
            padding = torch.zeros(2) if mask is None else (mask.cumsum(dim=1) == 0).sum(dim=1)
            options = {"mask_function": chunked_causal_mask_function(size, padding)}
            options["local_size"] = size
        expected = sdpa_mask(**case, **options, allow_is_causal_skip=False)
        found = rotorquant_mask(**case, **options, config=config)
        if found is None:
            plain += 1
            n, tokens = case["q_length"], case["kv_length"]
            found = torch.ones(n, tokens, dtype=torch.bool).tril(tokens - n).expand_as(expected)
        assert torch.equal(found, expected), (case, options)
    assert plain > 20


def test_other_masks_than_causal_ones_are_built():
    wanted: dict[str, Any] = {"batch_size": 1, "q_length": 3, "kv_length": 3}
    wanted["mask_function"] = bidirectional_mask_function
    config = build("llama").config
    built = rotorquant_mask(**wanted, allow_is_causal_skip=False, config=config)
    assert built is not None
    assert built.all()
    skipped = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": True}
    assert rotorquant_mask(**wanted, **skipped, config=config) is None
    assert rotorquant_mask(**wanted, **skipped, config=config, local_size=2) is not None
    on_device = {"q_offset": torch.tensor(0), "config": config}
    assert rotorquant_mask(**wanted, **on_device) is not None


def test_padding_masks_are_not_read_while_compiling(monkeypatch):
    config, ones = build("llama").config, torch.ones(1, 3, dtype=torch.bool)
    wanted: dict[str, Any] = {"batch_size": 1, "q_length": 3, "kv_length": 3, "config": config}
    wanted["mask_function"] = causal_mask_function
    assert rotorquant_mask(**wanted, attention_mask=ones) is None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert rotorquant_mask(**wanted) is None
    assert rotorquant_mask(**wanted, attention_mask=ones) is not None


@pytest.mark.parametrize("ones", [False, True], ids=["no mask", "mask of ones"])
def test_chunked_prefill_and_full_windows_build_no_mask(ones):
    model, ids = build("gemma2", "rotorquant"), prompt(2, 60)
    cache = RotorQuantCache(config=model.config, **SMALL)
    feed(model, cache, ids, (40,))
    makers = {"full": create_causal_mask, "sliding": create_sliding_window_causal_mask}
    built = {}
    for kind, n in itertools.product(makers, (1, 7)):
        built[kind, n] = makers[kind](
            config=model.config,
            inputs_embeds=torch.zeros(2, n, 64),
            attention_mask=torch.ones(2, 40 + n) if ones else None,
            past_key_values=cache,
        )
    assert built["full", 1] is None
    assert built["full", 7] is None
    assert built["sliding", 1] is None
    assert built["sliding", 7].shape == (2, 1, 7, SLIDING_WINDOW - 1 + 7)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "past"), [("llama", 0), ("llama", 40), ("gemma2", 0), ("gpt_oss", 0)]
)
def test_custom_masks_of_four_axes(name, past, kind):
    models = {a: build(name, a) for a in ("rotorquant", "eager")}
    ids, n = prompt(2, 60), 9
    filled = RotorQuantCache(config=models["eager"].config, **SMALL)
    if past:
        feed(models["eager"], filled, ids, (past,))
    seen = torch.rand(2, 1, n, past + n, generator=torch.Generator().manual_seed(0)) < 0.7
    seen[..., -n:] |= torch.eye(n, dtype=torch.bool)
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    logits = {}
    for attention, mask in (
        ("eager", added),
        ("rotorquant", seen if kind == torch.bool else added),
    ):
        with torch.no_grad():
            logits[attention] = models[attention](
                ids[:, past : past + n], attention_mask=mask, past_key_values=copy.deepcopy(filled)
            ).logits
    torch.testing.assert_close(logits["rotorquant"], logits["eager"], rtol=0, atol=1e-5)
    plain = feed(models["eager"], filled, ids[:, past:], (n,))
    assert relative_error(logits["rotorquant"], plain) > 1e-3


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_packed_sequences_do_not_see_each_other(name):
    model, ids = build(name, "rotorquant"), prompt(1, 30)
    positions = torch.cat((torch.arange(12), torch.arange(18)))[None]
    with torch.no_grad():
        together = model(ids, position_ids=positions, use_cache=False).logits
        parts = [model(part, use_cache=False).logits for part in ids.split((12, 18), dim=1)]
    torch.testing.assert_close(together, torch.cat(parts, dim=1), rtol=0, atol=1e-5)


def test_static_caches_have_room_that_is_not_seen():
    model, eager, ids = build("llama", "rotorquant"), build("llama", "eager"), prompt(2, 60)
    chunks = (20, 1, 7, 1)
    logits = feed(model, StaticCache(config=model.config, max_cache_len=64), ids, chunks)
    expected = feed(eager, DynamicCache(config=model.config), ids, chunks)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_shared_layers_read_the_last_queries_only(name):
    model, eager, ids = build(name, "rotorquant"), build(name, "eager"), prompt(2, 40)
    with torch.no_grad():
        for keep in (1, 3):
            logits = model(ids, logits_to_keep=keep).logits
            expected = eager(ids).logits[:, -keep:]
            torch.testing.assert_close(logits, expected, rtol=0, atol=2e-5)


# --- generation ---


@pytest.mark.parametrize("name", MAIN)
def test_greedy_text_is_that_of_eager(name):
    ids = prompt(2, 30)
    texts = []
    for attention in ("eager", "rotorquant"):
        model = build(name, attention)
        cache = RotorQuantCache(
            config=model.config, residual_length=1000, statistics_length=0, query_aware=False
        )
        options = {"max_new_tokens": 40, "do_sample": False}
        texts.append(model.generate(ids, past_key_values=cache, **options))
    assert texts[0].shape == (2, 70)
    assert torch.equal(*texts)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"prefill_chunk_size": 50}], ids=str)
def test_text_over_packed_tokens_is_that_of_eager(options, model, sampled, dequantised):
    texts = {}
    for attention in ("eager", "rotorquant"):
        dequantised.clear()
        copied = copy.deepcopy(model)
        copied.set_attn_implementation(attention)
        cache = RotorQuantCache(
            "k8v8", residual_length=32, statistics_length=0, query_aware=False, block_length=8
        )
        settings = {"max_new_tokens": 40, "do_sample": False} | options
        texts[attention] = copied.generate(sampled[:, :120], past_key_values=cache, **settings)
        assert cache.memory().packed_numbers > 0
        assert bool(dequantised) == (attention == "eager")
    assert texts["eager"].shape == (1, 160)
    assert torch.equal(texts["rotorquant"], texts["eager"])


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "mistral"])
def test_beam_search_is_that_of_eager(name):
    ids, options = prompt(2, 30), {"max_new_tokens": 10, "num_beams": 3, "do_sample": False}
    beams = []
    for attention in ("eager", "rotorquant"):
        model = build(name, attention)
        cache = RotorQuantCache(
            config=model.config, residual_length=1000, statistics_length=0, query_aware=False
        )
        beams.append(model.generate(ids, past_key_values=cache, **options))
    assert torch.equal(*beams)


# --- training ---


@pytest.mark.parametrize("past", [0, 40])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_gradients_are_those_of_eager(name, past):
    ids = prompt(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    filled = RotorQuantCache(config=build(name).config, **SMALL)
    if past:
        feed(build(name, "eager"), filled, ids, (past,), mask)
    new = ids[:, past : past + 15]
    labels = torch.where(mask[:, past : past + 15].bool(), new, -100)
    labels[0, : 6 if past == 0 else 0] = -100  # what a padding token is followed by
    gradients = {}
    for attention in ("eager", "rotorquant"):
        model = copy.deepcopy(build(name, attention)).train()
        cache = copy.deepcopy(filled) if past else None
        output = model(
            new,
            attention_mask=mask[:, : past + 15],
            labels=labels,
            past_key_values=cache,
            use_cache=bool(past),
        )
        output.loss.backward()
        gradients[attention] = {
            key: x.grad for key, x in model.named_parameters() if x.grad is not None
        }
    assert gradients["rotorquant"].keys() == gradients["eager"].keys()
    for key, gradient in gradients["eager"].items():
        torch.testing.assert_close(gradients["rotorquant"][key], gradient, rtol=1e-4, atol=1e-6)
    if name == "gpt_oss":
        assert all(
            g.abs().max() > 0 for key, g in gradients["rotorquant"].items() if "sinks" in key
        )


# --- the function alone ---

HEADS, GROUPS, D = 2, 3, 16
MODULE: Any = SimpleNamespace(num_key_value_groups=GROUPS, is_causal=True)


def states(
    packed: bool, n: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """A query of n tokens, keys and values of 40."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, HEADS * GROUPS, n, D, generator=generator).to(dtype)
    keys, values = (torch.randn(2, HEADS, 40, D, generator=generator).to(dtype) for _ in range(2))
    if packed:
        layer = RotorQuantLayer(RotorQuantConfig(**SMALL))
        layer.update(keys[:, :, :-n], values[:, :, :-n])
        keys, values = layer.update(keys[:, :, -n:], values[:, :, -n:])
    return query, keys, values


def plain(x: Tensor) -> Tensor:
    return x.clone()


@pytest.mark.parametrize("is_causal", [True, False, None])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_without_a_mask_queries_see_up_to_themselves_unless_not_causal(packed, is_causal):
    query, keys, values = states(packed, n=5)
    out, weights = rotorquant_attention(MODULE, query, keys, values, None, is_causal=is_causal)
    options = AttentionOptions(D**-0.5, causal=is_causal is not False)
    expected = attention_reference(query, plain(keys), plain(values), options).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    assert out.is_contiguous()
    assert weights is None
    other = SimpleNamespace(num_key_value_groups=GROUPS, is_causal=False)
    same, _ = rotorquant_attention(other, query, keys, values, None, is_causal=is_causal)
    assert torch.allclose(same, out) == (is_causal is not None)


@pytest.mark.parametrize("scaling", [None, 0.7])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_scaling(packed, scaling):
    query, keys, values = states(packed, n=1)
    out, _ = rotorquant_attention(MODULE, query, keys, values, None, scaling=scaling)
    options = AttentionOptions(0.25 if scaling is None else scaling)
    expected = attention_reference(query, plain(keys), plain(values), options).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_double_precision_is_kept():
    query, keys, values = states(packed=True, n=1, dtype=torch.float64)
    out, _ = rotorquant_attention(MODULE, query, keys, values, None)
    options = AttentionOptions(D**-0.5)
    expected = attention_reference(query, plain(keys), plain(values), options).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("masked", [None, torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_position_biases_are_added(packed, masked):
    query, keys, values = states(packed, n=5)
    bias = torch.randn(1, HEADS * GROUPS, 5, 40, generator=torch.Generator().manual_seed(1))
    seen = torch.ones(5, 40, dtype=torch.bool).tril(35).expand(2, 1, 5, 40)
    mask = {None: None, torch.bool: seen}.get(masked, torch.where(seen, 0.0, -math.inf))
    out, _ = rotorquant_attention(MODULE, query, keys, values, mask, position_bias=bias)
    options = AttentionOptions(D**-0.5, bias, causal=True)
    expected = attention_reference(query, plain(keys), plain(values), options).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)

    bidirectional, _ = rotorquant_attention(
        MODULE, query, keys, values, None, position_bias=bias, is_causal=False
    )
    options = AttentionOptions(D**-0.5, bias)
    expected = attention_reference(query, plain(keys), plain(values), options).transpose(1, 2)
    torch.testing.assert_close(bidirectional, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_dropout_is_that_of_sdpa(packed, n):
    query, keys, values = states(packed, n)
    torch.manual_seed(0)
    out, _ = rotorquant_attention(MODULE, query, keys, values, None, dropout=0.5)
    torch.manual_seed(0)
    seen = torch.ones(n, 40, dtype=torch.bool).tril(40 - n)[None, None]
    expected, _ = sdpa_attention_forward(
        MODULE, query, plain(keys), plain(values), seen, dropout=0.5
    )
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)
    without, _ = rotorquant_attention(MODULE, query, keys, values, None)
    assert not torch.allclose(out, without, atol=1e-3)


def test_encoder_decoder_models_with_position_biases():
    options = {"vocab_size": 97, "d_model": 64, "d_kv": 16, "d_ff": 64, "num_layers": 2}
    options |= {"num_heads": 4, "decoder_start_token_id": 0, "pad_token_id": 0}
    source, ids = prompt(2, 20), prompt(2, 40, seed=1)
    mask = torch.ones_like(source)
    mask[0, 15:] = 0
    logits = []
    for attention in ("eager", "rotorquant"):
        config = T5Config(**options)
        config._attn_implementation = attention
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = T5ForConditionalGeneration(config).eval()
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with torch.no_grad():
            encoded = model.get_encoder()(source, attention_mask=mask)
            for part in ids.split((20, 1, 7, 1, 11), dim=1):
                out = model(
                    encoder_outputs=encoded,
                    attention_mask=mask,
                    decoder_input_ids=part,
                    past_key_values=cache,
                )
                logits.append(out.logits)
    eager, found = logits[:5], logits[5:]
    for a, b in zip(found, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# --- what is not computed ---


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_weights_are_refused(name):
    with pytest.raises(ValueError, match=r"output_attentions.*set_attn_implementation\('eager'\)"):
        build(name, "rotorquant")(prompt(1, 5), output_attentions=True)


@pytest.mark.parametrize("argument", ["indices", "block_indices", "sinks"])
def test_arguments_that_would_be_left_out_are_refused(argument):
    query, keys, values = states(packed=False, n=1)
    with pytest.raises(ValueError, match=f"does not compute {argument}; use .*'eager'"):
        rotorquant_attention(MODULE, query, keys, values, None, **{argument: torch.zeros(1)})
    rotorquant_attention(MODULE, query, keys, values, None, **{argument: None})
    rotorquant_attention(MODULE, query, keys, values, None, output_attentions=False)


@pytest.mark.parametrize("option", [{"softcap": 2.0}, {"s_aux": torch.zeros(6)}], ids=str)
def test_dropout_with_soft_capping_or_sinks_is_refused(option):
    query, keys, values = states(packed=False, n=1)
    with pytest.raises(ValueError, match=r"no dropout with soft-capping or sink logits.*'eager'"):
        rotorquant_attention(MODULE, query, keys, values, None, dropout=0.1, **option)
