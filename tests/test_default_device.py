"""Nothing is made on torch's default device or in its dtype, which scripts set before a model.

On the device "meta" whatever is made there, and should not be, has no data. In float64 it has more
bytes than it is read by.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rotorquant_hf import RotorQuantCache, RotorQuantMSE, RotorQuantProd
from rotorquant_hf.backend import on_device
from rotorquant_hf.kernels.lookup import centroid_table, ptx_words
from rotorquant_hf.model_rope import ropes_of
from rotorquant_hf.quant import clifford
from tests.helpers.models import build, feed, prompt, same, snapshot

SMALL = {"residual_length": 8, "block_length": 4, "num_sink_tokens": 2, "statistics_length": 16}


@pytest.fixture(autouse=True)
def no_tables_are_left():
    """Tables are kept: those of a test that fails would be taken for right by others."""
    yield
    forget_tables()


def forget_tables() -> None:
    """Empty all that functions of the package have kept, so that it is made anew."""
    for name in [name for name in sys.modules if name.startswith("rotorquant_hf")]:
        for value in vars(sys.modules[name]).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def check(made: Callable[[], Any]) -> None:
    """Whether the same comes out with another default device, and with another dtype."""
    forget_tables()
    expected = snapshot(made())
    forget_tables()
    with torch.device("meta"):
        found = made()
    assert same(snapshot(found), expected)
    forget_tables()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = made()
    finally:
        torch.set_default_dtype(before)
    assert same(snapshot(found), expected)


@pytest.mark.parametrize("attention", ["sdpa", "rotorquant"])
@pytest.mark.parametrize(
    "options",
    [{}, {"key_quantizer": "prod"}, {"rotation": "haar"}, {"rotation": "hadamard"}],
    ids=str,
)
def test_a_cache_reads_and_writes_the_same(options, attention, tmp_path) -> None:
    model, ids = build("gemma3"), prompt(2, 60)
    model.set_attn_implementation(attention)

    def read() -> Any:
        cache = RotorQuantCache("k4v4", config=model.config, **SMALL | options)
        logits = feed(model, cache, ids, (40, 1, 1))
        cache.reorder_cache(torch.tensor([1, 0], device="cpu"))
        cache.save(tmp_path / "cache")
        cache = RotorQuantCache.load(tmp_path / "cache", config=model.config)
        logits = torch.cat((logits, feed(model, cache, ids[:, 42:], (1, 5, 12))), dim=1)
        return logits, [layer.store.state() for layer in cache.layers]

    try:
        check(read)
    finally:
        model.set_attn_implementation("sdpa")


def test_so_are_the_tables_of_the_kernels() -> None:
    def tables() -> Any:
        cpu = torch.device("cpu")
        return [
            *(centroid_table(bits, torch.float16, cpu) for bits in range(1, 9)),
            *(ptx_words(bits, cpu) for bits in (2, 3, 4)),
            on_device([[1, 2], [3, 4]], cpu),
        ]

    check(tables)


def test_so_do_many_vectors_at_once_and_the_algebra() -> None:
    x = torch.randn(2, 2, 600, 64)

    def coded() -> Any:
        rotor = clifford.make_random_rotor((3,), seed=5)
        turned = clifford.rotor_sandwich(
            rotor, clifford.embed_vectors_as_multivectors(x[0, 0, :3, :9])
        )
        gaussian = RotorQuantProd(64, bits=3, projection="gaussian")
        return [*RotorQuantMSE(64, bits=2)(x)[1].values(), turned, gaussian.sign_matrix]

    check(coded)


@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_so_does_rope(kind) -> None:
    config = build("llama").config.__class__(**build("llama").config.to_dict())
    more = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    more |= {"original_max_position_embeddings": 64} if kind == "llama3" else {}
    more |= {} if kind == "default" else {"factor": 4.0}
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, **more}

    def frequencies() -> Any:
        (rope,) = {*ropes_of(config, ["full_attention"] * 2, "half")}
        return rope.frequencies

    check(frequencies)
