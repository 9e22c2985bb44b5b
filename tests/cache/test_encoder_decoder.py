"""Encoder-decoder models: the cache of their self-attention, and nothing else."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from rotorquant_hf import RotorQuantCache

SMALL = {"residual_length": 8, "statistics_length": 0, "block_length": 4, "num_sink_tokens": 2}
T5_SIZES = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
SIZES = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
TOKENS = {
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def build(name):
    torch.manual_seed(0)
    if name == "t5":
        return T5ForConditionalGeneration(T5Config(**T5_SIZES, **TOKENS)).eval()
    if name == "umt5":
        return UMT5ForConditionalGeneration(UMT5Config(**T5_SIZES, **TOKENS)).eval()
    if name == "bart":
        config = BartConfig(**SIZES, **TOKENS, max_position_embeddings=100)
        return BartForConditionalGeneration(config).eval()
    config = WhisperConfig(
        **SIZES, **TOKENS, num_mel_bins=8, max_source_positions=15, max_target_positions=100
    )
    return WhisperForConditionalGeneration(config).eval()


def inputs(name):
    """What the encoder reads, and forty tokens of the decoder's."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 99, (2, 40), generator=generator)
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 30, generator=generator)}, ids
    return {"input_ids": torch.randint(3, 99, (2, 15), generator=generator)}, ids


NAMES = ["t5", "umt5", "bart", "whisper"]


@pytest.mark.parametrize("with_config", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_plain_cache_is_refused(name, with_config):
    """Both attentions of a decoder layer would write into one; a DynamicCache lets them."""
    model, (encoded, ids) = build(name), inputs(name)
    cache = RotorQuantCache(config=model.config if with_config else None)
    for _ in range(2):
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"EncoderDecoderCache\(RotorQuantCache\(config"),
        ):
            model(**encoded, decoder_input_ids=ids[:, :15], past_key_values=cache)
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_that_is_named_works(name):
    model, (encoded, ids) = build(name), inputs(name)

    def logits(settings):
        cache = DynamicCache(config=model.config)
        if settings is not None:
            cache = RotorQuantCache(config=model.config, key_bits=8, value_bits=8, **settings)
        both = EncoderDecoderCache(cache, DynamicCache(config=model.config))
        with torch.no_grad():
            found = [
                model(**encoded, decoder_input_ids=ids[:, a:b], past_key_values=both).logits
                for a, b in ((0, 30), (30, 31), (31, 40))
            ]
        return torch.cat(found, dim=1), cache

    exact, _ = logits(None)
    same, _ = logits({"residual_length": 100})
    torch.testing.assert_close(same, exact)
    near, cache = logits(SMALL)
    assert cache.memory().packed_numbers > 0
    assert 0 < (near - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_generation(name, beams):
    model, (encoded, _) = build(name), inputs(name)
    options = {"max_new_tokens": 30, "min_new_tokens": 30, "do_sample": False, "num_beams": beams}
    own = RotorQuantCache(config=model.config, **SMALL | {"residual_length": 100})
    both = EncoderDecoderCache(own, DynamicCache(config=model.config))
    assert torch.equal(
        model.generate(**encoded, past_key_values=both, **options),
        model.generate(**encoded, **options),
    )


def test_one_layer_that_is_updated_again_and_again_is_not_taken_for_two_attentions():
    config = GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=99)
    model, ids = GPT2LMHeadModel(config).eval(), inputs("t5")[1]
    for cache in (RotorQuantCache(**SMALL), RotorQuantCache(config=config, **SMALL)):
        with torch.no_grad():
            for a, b in ((0, 30), (30, 31), (31, 40)):
                model(ids[:, a:b], past_key_values=cache)
        assert cache.get_seq_length() == 40
