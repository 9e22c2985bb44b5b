"""What a layer asks of torch when it first packs: on a GPU each operation costs the host time."""

from collections import Counter

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import LlamaConfig

from rotorquant_hf import RotorQuantCache
from tests.helpers.launches import recorded
from tests.helpers.operations import Operations

HEADS, D = 2, 128
LLAMA = LlamaConfig(
    hidden_size=4 * HEADS * D,
    num_hidden_layers=4,
    num_attention_heads=4 * HEADS,
    num_key_value_heads=HEADS,
    head_dim=D,
)


def operations_of(layers, tokens, device="cpu", **options):
    """Of a prompt that so many layers store, without those of attention itself."""
    cache = RotorQuantCache(config=LLAMA, key_bits=3, value_bits=3, **options)
    x = torch.randn(6, tokens, D, generator=torch.Generator().manual_seed(0)).bfloat16().to(device)
    keys, values, queries = x[None, :2], x[None, 2:4], x[None].repeat(1, 2, 1, 1)[:, : 4 * HEADS]
    with torch.no_grad(), Operations() as attention:
        for _ in range(layers):
            sdpa(queries, keys, values, is_causal=True, enable_gqa=True)
    with torch.no_grad(), Operations() as seen:
        for layer in range(layers):
            sdpa(queries, *cache.update(keys, values, layer), is_causal=True, enable_gqa=True)
    for name in attention.names:
        seen.names.remove(name)
    return seen


@pytest.mark.parametrize("tokens", [1024, 2560])
@pytest.mark.parametrize(("query_aware", "at_most", "launches"), [(True, 13, 7), (False, 8, 4)])
def test_a_layer_takes_few_operations(tokens, query_aware, at_most, launches, monkeypatch):
    """Operations of torch, and launches of the statistics' kernels.

    What layers share is done in the first.
    """
    for module in ("channels", "rope"):  # which ask a CPU for other ones
        monkeypatch.setattr(f"rotorquant_hf.quant.{module}.on_cpu", lambda x: False)
    with recorded(monkeypatch) as variants:
        operations_of(1, tokens, query_aware=query_aware)  # what is done once in a process
        del variants[:]
        one, two, three = (
            operations_of(layers, tokens, query_aware=query_aware) for layers in (1, 2, 3)
        )
    coded = Counter(kernel for kernel, _ in variants).pop("append_kernel")
    assert len(variants) - coded == launches * (1 + 2 + 3)
    of_a_layer = len(two.names) - len(one.names)
    assert len(three.names) - len(two.names) == of_a_layer <= at_most
    assert len(one.names) - of_a_layer <= 42
    assert not three.empty
    assert len(three.brought) == 3  # where the segments' rows are


def test_rope_goes_to_a_device_once():
    """whatever the number of layers. (The first pass makes tables.)"""
    for _ in range(2):
        seen = operations_of(4, 100, "meta", query_aware=False)
    assert seen.brought == ["_to_copy"]
