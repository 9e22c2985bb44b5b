"""The same model with keys that are harder to quantise.

- Outlier channels: large models have a few key channels that are ten times the others. Some RoPE
  pairs of key channels are multiplied by a factor and the query channels that meet them are
  divided by it, which leaves every score as it was.
- Offset channels: a constant added to every key after RoPE adds the same to all scores of a
  query, and softmax drops it. This is what a key bias does to the slowest channels of RoPE.
- Key biases (Qwen2) come before RoPE, which turns them: a constant only for as long as the pair of
  channels takes to turn noticeably.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from rotorquant_hf.placement import input_device

from ..errors import InputError


@torch.no_grad()
def scale_key_channels(
    model: PreTrainedModel, factor: float, pairs: int = 2, seed: int = 0
) -> None:
    """Make a Llama-like model its outlier twin, in place.

    Args:
        model: with `q_proj` and `k_proj` in its attention modules and RoPE on halves.
        factor: what the key channels are multiplied by.
        pairs: RoPE pairs per kv head.
        seed: which pairs.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = torch.arange(8, device=input_device(model)).unsqueeze(0)
    before = model(ids, use_cache=False).logits
    for module in _attention(model):
        d = module.head_dim
        key = module.k_proj.weight.unflatten(0, (-1, d))
        query = module.q_proj.weight.unflatten(0, (key.shape[0], -1, d))
        for head in range(key.shape[0]):
            chosen = torch.randperm(d // 2, generator=generator)[:pairs]
            channels = torch.cat((chosen, chosen + d // 2))
            key[head, channels] *= factor
            query[head, :, channels] /= factor
    after = model(ids, use_cache=False).logits
    # Scaling by 10 rounds a little in 16 bits; another function is another thing.
    if (after - before).abs().max() > 0.1 * before.std():
        raise InputError(
            f"{type(model).__name__} has no outlier twin: with key channels scaled it is another "
            "function, as its keys are normalised, or RoPE turns other channels together"
        )


def _attention(model: PreTrainedModel) -> list[Any]:
    """The attention modules of a Llama-like model.

    Raises:
        InputError: if there are none.
    """
    modules = [module for module in model.modules() if hasattr(module, "k_proj")]
    if not modules or not all(hasattr(m, "q_proj") and hasattr(m, "head_dim") for m in modules):
        raise InputError(f"{type(model).__name__} is not built like Llama: it has no twins")
    if any(weight.device.type == "meta" for module in modules for weight in module.parameters()):
        raise InputError(
            "weights of this model are offloaded, and a twin has others: load it with "
            "--device cpu, or where there is room for all of it"
        )
    return modules


@torch.no_grad()
def add_key_bias(model: PreTrainedModel, bias: float, pair: int) -> None:
    """Give a Llama-like model a key bias on one channel per head, in place.

    Another function (its reference is its own), kept sane by dividing the query channels that
    meet the bias by its size.

    Args:
        model: with `q_proj` and `k_proj` without biases in its attention modules.
        bias: the bias, before RoPE.
        pair: the RoPE pair, from 0, the fastest, to head_dim / 2 - 1, the slowest.
    """
    for module in _attention(model):
        d = module.head_dim
        if module.k_proj.bias is not None or hasattr(module, "k_norm"):
            raise InputError(f"{type(model).__name__} has key biases or normalised keys already")
        if not bias or not 0 <= pair < d // 2:
            raise InputError(
                f"key_bias is {bias}, bias_pair {pair}: choose a bias, and 0 to {d // 2 - 1}"
            )
        added = torch.zeros(module.k_proj.out_features, device=module.k_proj.weight.device)
        added[pair::d] = bias
        module.k_proj.bias = torch.nn.Parameter(added.to(module.k_proj.weight.dtype))
        module.q_proj.weight.unflatten(0, (-1, d))[:, [pair, pair + d // 2]] /= abs(bias)


def offset_keys(cache: Cache, offset: float) -> Cache:
    """Make a cache, of any kind, add a constant to four channels per head of the keys it gets.

    The channels are the slowest turning of RoPE on halves. Its class becomes a subclass of what
    it was, so that everything else about it stays.
    """
    base = type(cache)

    class KeyOffset(base):  # type: ignore[misc, valid-type]
        def update(
            self,
            key_states: Tensor,
            value_states: Tensor,
            layer_idx: int,
            *args: Any,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            half = key_states.shape[-1] // 2
            keys = key_states.clone()
            keys[..., half - 4 : half] += offset
            return super().update(keys, value_states, layer_idx, *args, **kwargs)

    cache.__class__ = KeyOffset
    return cache
