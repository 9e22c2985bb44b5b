"""Every kernel as layers and models use it, against float64 or plain torch.

On a GPU at sizes of real use; in Triton's interpreter the same cases at small ones.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

pytest.importorskip("triton")

from evals.bench.common import random_states
from evals.bench.decode_step import WrongResult, in_double, require_close, ring_states
from rotorquant_hf import PRESETS, RotorQuantCache, RotorQuantConfig, RotorQuantKVCache
from rotorquant_hf.attention import triton_attention
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.reference import attention_reference
from rotorquant_hf.backend import backend
from rotorquant_hf.kernels.append import append_segments
from rotorquant_hf.layers import RotorQuantLayer, RotorQuantSlidingLayer
from tests.cache.test_graph import decode_eagerly, graphs  # noqa: F401 (a fixture)
from tests.helpers import offloading

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
WINDOW: dict[str, Any] = {"statistics_length": 0, "query_aware": False}
WINDOW |= {} if GPU else {"residual_length": 16, "block_length": 8}
BLOCK = RotorQuantConfig(**WINDOW).block_length


def sized(gpu: int, interpreter: int) -> int:
    """A size for the device."""
    return gpu if GPU else interpreter


@pytest.fixture(autouse=True)
def _on_kernels() -> Iterator[None]:
    with backend("triton"):
        yield


def bits(count: int, quantizer: str = "mse") -> dict[str, Any]:
    return {"key_bits": count, "value_bits": count, "key_quantizer": quantizer}


# Attention


@dataclass(frozen=True)
class Attend:
    """Tokens in a layer, new ones, and what their attention is asked for.

    Attributes:
        options: of the layer's config.
        d, d_v: head dims; d_v is d unless given. group: query heads per kv head.
        n: new tokens. context: tokens before them.
        mask: "bool", "added" or "". causal, softcap, sink_logits: of `AttentionOptions`.
        offset: added to four key channels, which are then centred.
        tiling: what is other than by default.
    """

    options: dict[str, Any]
    d: int = 128
    d_v: int = 0
    group: int = 4
    n: int = 1
    context: int = sized(700, 70)
    dtype: torch.dtype = torch.bfloat16
    mask: str = ""
    causal: bool = False
    softcap: float | None = None
    sink_logits: bool = False
    offset: float = 0.0
    heads: int = sized(2, 1)
    batch: int = sized(2, 1)
    tiling: dict[str, Any] = field(default_factory=dict)

    def states(self, tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Keys and values with channels of different size."""
        sizes = (self.batch, self.heads, tokens, max(self.d, self.d_v))
        keys, values = random_states(sizes, torch.float32, generator)
        channels = torch.arange(sizes[3], device=keys.device) % 7 / 3 + 0.5
        keys, values = keys * channels, values * channels.flip(0)
        keys[..., :4] += self.offset
        return keys[..., : self.d].to(self.dtype), values[..., : self.d_v or self.d].to(self.dtype)

    def asked(self, generator: torch.Generator) -> AttentionOptions:
        scores = (self.batch, 1, self.n, self.context + self.n)
        draw = partial(torch.rand, device=generator.device, generator=generator)
        mask = None
        if self.mask == "bool":
            mask = draw(scores) < 0.7
            mask[0, :, 0] = False  # a query that sees nothing
        elif self.mask == "added":
            mask = (4 * draw(scores) - 2).to(self.dtype)
            mask = mask.masked_fill(draw(scores) < 0.3, float("-inf"))
        logits = 3 * draw(self.heads * self.group) if self.sink_logits else None
        return AttentionOptions(self.d**-0.5, mask, self.causal, self.softcap, logits)

    def check(self) -> None:
        generator = torch.Generator(DEVICE).manual_seed(1)
        layer = RotorQuantLayer(RotorQuantConfig(**WINDOW | self.options))
        with torch.no_grad():
            layer.update(*self.states(self.context, generator))
            keys, values = layer.update(*self.states(self.n, generator))
        if self.n <= BLOCK:
            assert ring_states(keys), "it is a step of the ring"
        plain = in_double(keys.states), in_double(values.states)
        asked = self.asked(generator)
        check_attention(keys, values, plain, asked, self.group, self.n, tiling=self.tiling)


def check_attention(
    keys: Tensor,
    values: Tensor,
    plain: tuple[Tensor, Tensor],
    options: AttentionOptions,
    group: int,
    n: int,
    bound: float | None = None,
    tiling: dict[str, Any] | None = None,
) -> None:
    """`attend_packed` on what an update returned, against attention on float64 tensors."""
    generator = torch.Generator(keys.device).manual_seed(2)
    batch, heads, _, d = keys.shape
    size = (batch, heads * group, n, d)
    query = torch.randn(size, device=keys.device, generator=generator).to(keys.dtype)
    wide = {
        name: value.double()
        for name, value in vars(options).items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    expected = attention_reference(query.double(), *plain, dataclasses.replace(options, **wide))
    states = keys.states, values.states
    chosen = dataclasses.replace(triton_attention.default_tiling(query, *states), **tiling or {})
    found = triton_attention.attend_packed(query, *states, options, chosen if tiling else None)
    require_close(found, expected, bound)


three = partial(Attend, bits(3), 64)
LONG = sized(20000, 700)
ATTEND = {f"k{b}v{b}": Attend(bits(b)) for b in (3, 4, 2, 1, 5, 6, 7, 8)}
ATTEND |= {
    f"k{b}v{b}-prod-d{d}": Attend(bits(b, "prod"), d)
    for b, d in ((3, 128), (2, 64), (4, 128), (5, 64))
}
for dtype in (torch.float16, torch.float32):
    name = str(dtype).removeprefix("torch.")
    ATTEND[f"k3v3-{name}"] = Attend(bits(3), dtype=dtype)
    ATTEND[f"k4v4-{name}"] = Attend(bits(4), 64, dtype=dtype)
    ATTEND[f"k3v3-prod-{name}"] = Attend(bits(3, "prod"), 64, dtype=dtype)
for d in (64, 80, 96, 256):
    ATTEND |= {f"k{b}v{b}-d{d}": Attend(bits(b), d) for b in (3, 4)}
ATTEND |= {
    "k4v3": Attend({"key_bits": 4, "value_bits": 3}),
    "k8v2": Attend({"key_bits": 8, "value_bits": 2}, 64),
    "k8v8-d256": Attend(bits(8), 256),  # one product from shared memory alone, on sm_90
    "d192-and-128": Attend(bits(4), 192, 128),
    "values-equalised": Attend(bits(3) | {"equalize_values": 0.5}, 64),
    "keys-centred": three(offset=30.0),
    "boolean-mask": three(mask="bool", batch=2),
    "added-mask": three(mask="added"),
    "softcap": three(softcap=5.0),
    "sink-logits": three(sink_logits=True),
    "softcap-sink-logits-added-mask": three(softcap=5.0, sink_logits=True, mask="added"),
    "4-causal-tokens": three(n=4, causal=True),
    "a-block-of-causal-tokens-boolean-mask": three(n=BLOCK, causal=True, mask="bool"),
    "more-causal-tokens-than-a-block": three(n=BLOCK + 8, causal=True),
    "one-query-head": three(group=1),
    "group-of-16": three(group=16),
    "long-batch-of-1": Attend(bits(3), context=LONG, batch=1, heads=sized(8, 1)),
    "long-batch-of-16": Attend(bits(4), context=LONG, batch=sized(16, 2), heads=1),
}


# Values read in pairs of bytes, by one warp and by warps that do the same.
alone = {"pairs": 1, "warps": 1, "block_n": 32, "exact_stages": 1}
for b, d in ((2, 128), (3, 128), (4, 128), (3, 96), (4, 64), (3, 80), (2, 64), (3, 64)):
    ATTEND[f"pairs-k{b}v{b}-d{d}"] = Attend(bits(b), d, tiling=alone)
ATTEND["pairs-k4v3"] = Attend({"key_bits": 4, "value_bits": 3}, tiling={"pairs": 1})
ATTEND["pairs-k3v4-group-of-16"] = Attend(
    {"key_bits": 3, "value_bits": 4}, group=16, tiling={"pairs": 1}
)


@pytest.mark.parametrize("case", ATTEND.values(), ids=ATTEND)
def test_attend(case: Attend) -> None:
    case.check()


# Coding


@dataclass(frozen=True)
class Append:
    """Blocks of tokens for the kernel that codes, and for `encode`."""

    options: dict[str, Any]
    d: int = 128
    dtype: torch.dtype = torch.bfloat16

    def check(self) -> None:
        """The reconstructions agree: few codes may differ."""
        case = Attend({}, self.d, dtype=self.dtype, offset=3.0)
        generator = torch.Generator(DEVICE).manual_seed(3)
        blocks = [case.states(n, generator) for n in (sized(300, 90), 32, 7)]
        stores = []
        for name in ("triton", "torch"):
            settings = RotorQuantConfig(**self.options)
            store = RotorQuantKVCache(self.d, self.d, device=DEVICE, config=settings)
            with backend(name), torch.no_grad():
                for block in blocks:
                    store.append(*block)
            stores.append((store.get_keys(), store.get_values()))
        for ours, theirs in zip(*stores, strict=True):
            require_close(ours, theirs.double(), 5e-3)


APPEND = {f"{b}-bits": Append(bits(b)) for b in range(1, 9)}
APPEND |= {f"3-bits-d{d}": Append(bits(3), d) for d in (64, 80, 256)}
for scale in ("norm", "least_squares", "unbiased"):
    APPEND[f"scale-{scale}"] = Append(bits(3) | {"key_scale": scale, "value_scale": "matched"}, 64)
APPEND |= {
    "prod": Append(bits(3, "prod")),
    "prod-float16": Append(bits(4, "prod"), 64, torch.float16),
    "3-bits-float32": Append(bits(3), 64, torch.float32),
}


@pytest.mark.parametrize("case", APPEND.values(), ids=APPEND)
def test_append(case: Append) -> None:
    case.check()


# Steps through ring, push and append


@dataclass(frozen=True)
class Ring:
    """Decode steps through the kernels, and of the layer in plain torch."""

    options: dict[str, Any]
    sliding: int = 0
    d: int = sized(64, 16)
    prompt: int = sized(250, 40)
    steps: int = sized(100, 20)
    every: int = 10

    def check(self) -> None:
        case = Attend({}, self.d, dtype=torch.float32, offset=1.0)
        generator = torch.Generator(DEVICE).manual_seed(4)
        settings = RotorQuantConfig(**WINDOW | self.options)
        kernels, reference = self._layer(settings), self._layer(settings)
        for i in range(self.steps + 1):
            new = case.states(1 if i else self.prompt, generator)
            with torch.no_grad():
                keys, values = kernels.update(*new)
                with backend("torch"):
                    dense = reference.update(*new)
            if i and i % self.every == 0:
                for ours, theirs in zip(kernels.recent, reference.recent, strict=True):
                    if not torch.equal(ours, theirs):
                        raise WrongResult("the recent windows differ")
                assert ring_states(keys)
                plain = in_double(dense[0].states), in_double(dense[1].states)
                options = AttentionOptions(self.d**-0.5)
                check_attention(keys, values, plain, options, 4, 1, bound=5e-3)

    def _layer(self, settings: RotorQuantConfig) -> RotorQuantLayer:
        if self.sliding:
            return RotorQuantSlidingLayer(settings, self.sliding)
        return RotorQuantLayer(settings)


RING = {
    "k4v4": Ring(bits(4)),
    "k3v3-prod": Ring(bits(3, "prod")),
    "blocks-of-1": Ring(bits(4) | {"block_length": 1, "residual_length": 16}),
    "no-sinks": Ring(bits(4) | {"num_sink_tokens": 0}),
    "sliding-window": Ring(bits(4), sliding=sized(230, 36)),
}


@pytest.mark.parametrize("case", RING.values(), ids=RING)
def test_ring(case: Ring) -> None:
    case.check()


# Models

PROMPT, STEPS = sized(250, 40), sized(80, 10)
SETTINGS = {name: dataclasses.replace(PRESETS[name], **WINDOW) for name in ("k4v4", "k3v3")}
SETTINGS["k3v3, query-aware"] = dataclasses.replace(SETTINGS["k3v3"], query_aware=True)


@pytest.fixture(scope="module")
def small_model() -> PreTrainedModel:
    """Two layers of random weights, attention by the interface that models use."""
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=sized(256, 32),
        num_attention_heads=sized(8, 2),
        num_key_value_heads=sized(2, 1),
        head_dim=sized(64, 16),
        intermediate_size=sized(256, 32),
        vocab_size=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        initializer_range=0.1,
    )
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
    return model.eval().requires_grad_(False)


def tokens() -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(5)
    size = (sized(2, 1), PROMPT + STEPS)
    return torch.randint(0, 512, size, device=DEVICE, generator=generator)


def check_steps(found: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        require_close(ours, theirs.double(), bound)


@pytest.mark.parametrize("preset", SETTINGS)
def test_model_against_torch(preset: str, small_model: PreTrainedModel) -> None:
    ids = tokens()
    steps = {}
    for name in ("triton", "torch"):
        cache = RotorQuantCache(SETTINGS[preset], config=small_model.config)
        with backend(name):
            steps[name] = decode_eagerly(small_model, ids, cache, PROMPT)
    # An element may be coded differently, and after it, rounded for the queries, a whole key.
    check_steps(steps["triton"], steps["torch"], 3e-2)


@pytest.mark.parametrize("preset", SETTINGS)
def test_graph_against_eager(preset: str, small_model: PreTrainedModel, graphs: Any) -> None:  # noqa: F811
    ids = tokens()
    cache, other = (RotorQuantCache(SETTINGS[preset], config=small_model.config) for _ in "ab")
    expected = decode_eagerly(small_model, ids, other, PROMPT)
    with torch.no_grad():
        small_model(ids[:, :PROMPT], past_key_values=cache)
        step = graphs(small_model, cache, room=STEPS)
        found = [step(ids[:, i : i + 1]).clone() for i in range(PROMPT, PROMPT + STEPS)]
    check_steps(found, expected, 1e-4)


def test_offloaded_against_resident(
    small_model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers are on the CPU between their uses; without a GPU they are marked as if they were."""
    ids, settings = tokens(), SETTINGS["k4v4"]
    make = partial(RotorQuantCache, offloading=True) if GPU else offloading.emulated(monkeypatch)
    # On the CPU entries are checked for NaN, which tensors that are away cannot be.
    monkeypatch.setattr("rotorquant_hf.layers.full.check_finite", lambda *a, **k: None)
    steps = []
    for cache in (
        RotorQuantCache(settings, config=small_model.config),
        make(settings, config=small_model.config),
    ):
        steps.append(decode_eagerly(small_model, ids, cache, PROMPT))
    if not GPU:
        assert offloading.is_away(cache.layers[1])
        check_steps(steps[1], steps[0], 1e-6)
        return
    # One layer is on its way back, the other to the CPU: what is read of them has arrived.
    torch.cuda._sleep(1 << 28)
    with torch.no_grad():
        small_model(ids[:, -1:], past_key_values=cache)
    early = [copy.deepcopy(layer.store.state()) for layer in cache.layers]
    torch.cuda.synchronize()
    assert [layer.sinks[0].device.type for layer in cache.layers] == ["cuda", "cpu"]
    for layer, state in zip(cache.layers, early, strict=True):
        for name, tensor in layer.store.state().items():
            assert torch.equal(state[name], tensor), name
    check_steps(steps[1], steps[0], 1e-6)


# Faults that are planted are found


@pytest.mark.parametrize("factor", [1 + 3e-5, float("nan")], ids=["a-little-off", "nan"])
def test_wrong_attention_is_found(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    case = three(mask="added", sink_logits=True, softcap=5.0, dtype=torch.float32)
    case.check()
    attend = triton_attention.attend_packed
    monkeypatch.setattr(triton_attention, "attend_packed", lambda *args: factor * attend(*args))
    with pytest.raises(WrongResult, match=r"error (2\.9.e|3\.0.e|nan)"):
        case.check()


def test_wrong_codes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(bounds: Tensor, count: int, keys: Any, values: Any) -> None:
        append_segments(bounds, count, dataclasses.replace(keys, x=1.01 * keys.x), values)

    monkeypatch.setattr("rotorquant_hf.kernels.append.append_segments", wrong)
    with pytest.raises(WrongResult):
        Append({"key_bits": 3, "value_bits": 2}, 16, torch.float32).check()


def test_a_ring_that_takes_nothing_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rotorquant_hf.kernels.push.PushTokens.__call__", lambda *args: None)
    with pytest.raises(WrongResult):
        RING["k4v4"].check()
