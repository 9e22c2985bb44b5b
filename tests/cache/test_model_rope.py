"""RoPE's frequencies from configs, against the buffers of Transformers' own models."""

import pytest
import torch
import transformers

from rotorquant_hf.model_rope import ropes_of

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}

SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}


def llama(**options):
    return transformers.LlamaConfig(**SMALL, **options)


def buffers(config):
    """All `inv_freq` of a model, by name."""
    model = transformers.AutoModelForCausalLM.from_config(config)
    return {name: x for name, x in model.named_buffers() if "original" not in name}


@pytest.mark.parametrize("kind", ["default", *SCALED])
def test_frequencies_are_those_of_the_model(kind):
    parameters = {"rope_theta": 5e4} | SCALED.get(kind, {"rope_type": "default"})
    config = llama(rope_parameters=parameters, max_position_embeddings=256)
    found, again = ropes_of(config, ["full_attention"] * 2, "half")
    assert found is again
    assert found.layout == "half"
    assert found.frequencies.shape == (1, 1, 1, 8)
    (expected,) = (x for name, x in buffers(config).items() if name.endswith("inv_freq"))
    torch.testing.assert_close(found.frequencies.flatten(), expected)


def test_the_turned_part_of_a_head():
    config = transformers.GPTNeoXConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=64,
    )
    found = ropes_of(config, ["full_attention"], "half")[0].frequencies.flatten()
    (expected,) = (x for name, x in buffers(config).items() if name.endswith("inv_freq"))
    assert len(found) < 8
    torch.testing.assert_close(found, expected)


def test_layer_types_have_frequencies_of_their_own():
    config = transformers.Gemma3TextConfig(**SMALL | {"num_hidden_layers": 6}, head_dim=16)
    ropes = ropes_of(config, config.layer_types, "half")
    assert len(ropes) == 6
    assert len(set(ropes)) == 2
    found = dict(zip(config.layer_types, ropes, strict=True))
    assert set(found) == {"sliding_attention", "full_attention"}
    named = buffers(config)
    for kind, rope in found.items():
        (expected,) = (x for name, x in named.items() if name.endswith(f"{kind}_inv_freq"))
        torch.testing.assert_close(rope.frequencies.flatten(), expected)


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(n_embd=64, n_head=4, n_layer=2),
        transformers.BloomConfig(hidden_size=64, n_head=4, n_layer=2),
        llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        transformers.DeepseekV3Config(),
    ],
    ids=["learned positions", "ALiBi", "changes with the text", "latent attention"],
)
def test_no_frequencies_that_hold_for_the_whole_key(config):
    assert ropes_of(config, ["full_attention"] * 2, "half") == [None, None]


def test_no_layout_no_turning():
    assert ropes_of(llama(), ["full_attention"], "none") == [None]
    assert ropes_of(llama(), ["full_attention"], "interleaved")[0].layout == "interleaved"
