"""Attention over packed codes, against attention spelt out on the vectors they stand for."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.gemma2.modeling_gemma2 import eager_attention_forward as gemma2_attention
from transformers.models.gpt_oss.modeling_gpt_oss import (
    eager_attention_forward as gpt_oss_attention,
)

from rotorquant_hf import RotorQuantConfig
from rotorquant_hf.attention import torch_attention
from rotorquant_hf.attention.dispatch import attend
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.reference import attention_reference
from rotorquant_hf.attention.states import CachedStates
from rotorquant_hf.quant import RotorQuantMSE
from rotorquant_hf.quant.lookup import CodeTable
from rotorquant_hf.quant.packed import PackedSpan
from rotorquant_hf.quant.packing import pack
from rotorquant_hf.store.kv_store import RotorQuantKVCache

BATCH, HEADS = 2, 2
SINKS, PACKED, TAIL = 3, 61, 9


@pytest.fixture(params=["one tile", "many tiles"])
def tiles(request, monkeypatch) -> None:
    """Both with everything in one tile and with ends of tiles everywhere."""
    if request.param == "many tiles":
        monkeypatch.setattr(torch_attention, "_MIN_TILE", 7)
        monkeypatch.setattr(torch_attention, "_TILE_ELEMENTS", 1)
        monkeypatch.setattr(torch_attention, "_MAX_SCORES", 7 * BATCH * HEADS * 4 * 5)


@dataclass(frozen=True)
class Call:
    """An attention call.

    Attributes:
        query: (batch, heads * groups, n, key dim).
        keys, values: what it reads.
    """

    query: Tensor
    keys: CachedStates
    values: CachedStates

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """(batch, query heads, n, tokens)."""
        return (*self.query.shape[:3], self.keys.shape[2])

    def error(self, **options: Any) -> float:
        """Relative error of `attend` beyond the rounding of its output, in the Frobenius norm."""
        options.setdefault("scale", self.query.shape[3] ** -0.5)
        actual = attend(self.query, self.keys, self.values, AttentionOptions(**options))
        assert actual.dtype == self.query.dtype
        expected = attention_reference(
            self.query.double(),
            exactly(self.keys),
            exactly(self.values),
            AttentionOptions(**options),
        )
        assert actual.shape == expected.shape
        assert bool(actual.isfinite().all())
        assert torch.equal(actual == 0, expected == 0)
        rounding = (expected.to(actual.dtype).double() - expected).norm()
        return float(((actual.double() - expected).norm() - rounding) / expected.norm())


def exactly(states: CachedStates) -> Tensor:
    """What the states stand for, (batch, heads, tokens, d) float64, with no table look-up."""
    return torch.cat(
        (states.sinks.double(), reconstructed(states.packed), states.recent.double()), 2
    )


def reconstructed(span: PackedSpan) -> Tensor:
    """The vectors of a span, float64, by its quantiser and statistics."""
    codes: Any = {"codes": span.rows["codes"], "scale": span.rows["scale"]}
    if not isinstance(span.quantizer, RotorQuantMSE):
        codes = {
            "mse_indices": codes,
            "qjl_signs": span.rows["signs"],
            "residual_norm": span.rows["residual_norm"],
        }
    u = span.quantizer.decode(codes).double()
    return span.statistics.denormalize(span.quantizer.rotation.unrotate(u))


def call(
    d: int = 32,
    value_dim: int | None = None,
    n: int = 3,
    groups: int = 2,
    *,
    sinks: int = SINKS,
    packed: int = PACKED,
    tail: int = TAIL,
    dtype: torch.dtype = torch.float32,
    hostile: Any = None,
    seed: int = 0,
    **config: Any,
) -> Call:
    """A call on random states; `hostile(x)` makes keys and values of Gaussian ones."""
    value_dim = d if value_dim is None else value_dim
    generator = torch.Generator().manual_seed(seed)
    counts = (sinks, packed, tail)

    def states(size: int) -> tuple[Tensor, ...]:
        x = torch.randn(BATCH, HEADS, sum(counts), size, generator=generator)
        return (x if hostile is None else hostile(x)).to(dtype).split(counts, dim=2)

    keys, values = states(d), states(value_dim)
    store = RotorQuantKVCache(d, value_dim, config=RotorQuantConfig(**config))
    # More than is read, and not from the start: the rows read are strided.
    padding = [torch.cat((x[1][:, :, :2], x[1], x[1][:, :, :5]), dim=2) for x in (keys, values)]
    if packed:
        store.append(*padding)
        spans = store.keys.span(2, 2 + packed), store.values.span(2, 2 + packed)
    else:
        store.append(keys[2], values[2])
        spans = store.keys.span(0, 0), store.values.span(0, 0)
    query = torch.randn(BATCH, HEADS * groups, n, d, generator=generator).to(dtype)
    return Call(
        query,
        CachedStates(keys[0], spans[0], keys[2]),
        CachedStates(values[0], spans[1], values[2]),
    )


# --- the reference ---


def _plain(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Query (2, 6, 5, 8), key and value (2, 2, tokens, 8), float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 5), (2, tokens), (2, tokens)
    query, key, value = (torch.randn(2, *s, 8, generator=generator).double() for s in shapes)
    return query, key, value


def test_reference_is_that_of_torch():
    query, key, value = _plain(5)
    options = AttentionOptions(0.3)
    expected = F.scaled_dot_product_attention(query, key, value, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(attention_reference(query, key, value, options), expected)

    causal = AttentionOptions(0.3, causal=True)
    expected = F.scaled_dot_product_attention(
        query, key, value, scale=0.3, enable_gqa=True, is_causal=True
    )
    torch.testing.assert_close(attention_reference(query, key, value, causal), expected)
    last = attention_reference(query[:, :, -2:], key, value, causal)
    torch.testing.assert_close(last, expected[:, :, -2:])

    mask = _plain(5)[0][:, :1, :, :5] > 0
    mask[1, :, 3] = False
    actual = attention_reference(query, key, value, AttentionOptions(0.3, mask))
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(actual, expected)
    assert not bool(actual[1, :, 3].any())


def test_reference_is_that_of_the_models_with_softcap_and_with_sinks():
    """Whose softmax is in float32."""
    query, key, value = _plain(8)
    mask = query[:, :1]
    sinks = query[0, :, 0, 0]
    module = SimpleNamespace(num_key_value_groups=3, training=False, sinks=sinks)
    expected, _ = gemma2_attention(module, query, key, value, mask, scaling=0.3, softcap=0.7)
    options = AttentionOptions(0.3, mask, softcap=0.7)
    actual = attention_reference(query, key, value, options).transpose(1, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

    expected, _ = gpt_oss_attention(module, query, key, value, mask, scaling=0.3)
    options = AttentionOptions(0.3, mask, sink_logits=sinks)
    actual = attention_reference(query, key, value, options).transpose(1, 2)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


# --- look-up ---


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("d", [1, 7, 8, 19, 20, 24, 64, 80, 100, 128, 576])
def test_table_finds_the_centroid_of_every_code(d, bits):
    generator = torch.Generator().manual_seed(bits)
    centroids = torch.randn(2**bits, generator=generator)
    codes = torch.randint(2**bits, (2, 3, 5, d), generator=generator)
    table = CodeTable.of(centroids, bits, d)
    numbers = torch.full((2, 3, 3, d + 1), math.nan)  # the last takes the padding
    numbers[..., table.order] = table.look_up(pack(codes, bits)[:, :, 1:4])
    assert torch.equal(numbers[..., :d], centroids[codes[:, :, 1:4]])


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_look_up_yields_several_numbers_where_bytes_allow_it(bits):
    table = CodeTable.of(torch.zeros(2**bits), bits, 128)
    assert table.entries.shape[1] == {2: 4, 3: 4, 4: 2}[bits]
    assert table.entries.nbytes < 2**19


@pytest.mark.parametrize("quantizer", ["mse", "prod"])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_spans_materialise_what_their_quantiser_reconstructs(quantizer, bits):
    states = call(20, key_bits=bits, key_quantizer=quantizer, center_keys=True).keys
    out = torch.empty(states.packed.shape, dtype=torch.float64)
    states.packed.materialize(out)
    torch.testing.assert_close(out, reconstructed(states.packed), rtol=1e-5, atol=1e-5)


# --- attention: every coding ---

CODINGS = [("mse", bits) for bits in range(1, 9)] + [("prod", bits) for bits in range(2, 9)]


@pytest.mark.parametrize(("quantizer", "bits"), CODINGS)
@pytest.mark.parametrize("d", [8, 20, 64, 100])
def test_every_width_and_quantiser(d, quantizer, bits, tiles):
    made = call(d, n=3, key_bits=bits, value_bits=bits, key_quantizer=quantizer)
    assert made.error() < 1e-5


@pytest.mark.parametrize(
    ("d", "value_dim"), [(8, 128), (16, 8), (19, 64), (80, 80), (96, 24), (192, 128), (256, 256)]
)
@pytest.mark.parametrize("quantizer", ["mse", "prod"])
def test_key_and_value_dims(d, value_dim, quantizer, tiles):
    assert call(d, value_dim, key_quantizer=quantizer, value_bits=3).error() < 1e-5


@pytest.mark.parametrize("qjl_dim", [5, 16, 77])
@pytest.mark.parametrize("projection", ["orthogonal", "gaussian"])
def test_any_number_of_projections(qjl_dim, projection):
    options = {"qjl_dim": qjl_dim, "qjl_projection": projection}
    assert call(24, key_quantizer="prod", **options).error() < 1e-5


@pytest.mark.parametrize("rotation", ["cascade", "rotors", "haar", "hadamard"])
@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("equalize", [0.0, 0.5, 1.0])
def test_rotations_and_statistics_fold(rotation, center, equalize):
    options = {"center_keys": center, "equalize_keys": equalize, "equalize_values": equalize}
    assert call(32, rotation=rotation, **options).error() < 1e-5


# --- attention: shapes ---


@pytest.mark.parametrize("n", [1, 3, 33])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
def test_query_lengths_groups_and_dtypes(n, groups, dtype, tiles):
    """Of half-precision queries too nothing is lost but the rounding of the output."""
    made = call(32, n=n, groups=groups, dtype=dtype)
    assert made.error() < 1e-5
    assert made.error(causal=True) < 1e-5


def test_rounding_of_the_output_is_the_whole_error_of_bfloat16():
    made = call(64, n=33, dtype=torch.bfloat16)
    options = AttentionOptions(64**-0.5)
    actual = attend(made.query, made.keys, made.values, options)
    expected = attention_reference(
        made.query.double(), exactly(made.keys), exactly(made.values), options
    )
    error = (actual.double() - expected).norm() / expected.norm()
    assert error < 2e-3  # a rounding error is 2^-9 at most and about 2^-9.6 in the quadratic mean
    assert (actual == expected.bfloat16()).double().mean() > 0.999


PARTS = [part for part in itertools.product((0, SINKS), (0, PACKED), (0, TAIL)) if any(part[1:])]


@pytest.mark.parametrize(("sinks", "packed", "tail"), PARTS)
@pytest.mark.parametrize("n", [1, 5])
def test_parts_may_be_empty(sinks, packed, tail, n, tiles):
    made = call(16, n=n, sinks=sinks, packed=packed, tail=tail)
    assert made.error() < 1e-5
    assert made.error(causal=True) < 1e-5


def test_long_tails_and_long_queries():
    assert call(8, n=700, packed=300, tail=1500).error(causal=True) < 1e-5


def test_no_query_tokens_give_no_output():
    made = call(16, n=0)
    options = AttentionOptions(0.25, causal=True)
    assert attend(made.query, made.keys, made.values, options).shape == made.query.shape


# --- attention: what is seen ---

QUERIES = BATCH, 4, 5, SINKS + PACKED + TAIL  # of the masks: batch, query heads, n, tokens

MASK_SHAPES = {
    "by query and token": QUERIES[2:],
    "by token": (1, QUERIES[3]),
    "3-D": (1, *QUERIES[2:]),
    "of all rows": (1, 1, *QUERIES[2:]),
    "by row": (BATCH, 1, *QUERIES[2:]),
    "by head": (1, *QUERIES[1:]),
    "by row and head": QUERIES,
    "of all queries": (BATCH, 1, 1, QUERIES[3]),
    "of all tokens": (BATCH, 4, 5, 1),
}


@pytest.mark.parametrize("kind", ["boolean", "additive", "minus infinity", "bfloat16"])
@pytest.mark.parametrize("shape", MASK_SHAPES.values(), ids=MASK_SHAPES)
def test_masks(shape, kind, tiles):
    generator = torch.Generator().manual_seed(5)
    mask = torch.randn(shape, generator=generator) * 3
    if kind == "boolean":
        mask = mask > 0
    elif kind == "minus infinity":
        mask = mask.masked_fill(mask < 0, -math.inf)
    elif kind == "bfloat16":
        mask = mask.bfloat16()
    made = call(16, n=5)
    assert made.scores == QUERIES
    assert made.error(mask=mask) < 1e-5
    assert made.error(mask=mask, causal=True) < 1e-5


@pytest.mark.parametrize(
    "padding", [1, SINKS, SINKS + 20, SINKS + PACKED, SINKS + PACKED + TAIL - 1]
)
@pytest.mark.parametrize("kind", ["boolean", "lowest number"])
def test_left_padding(padding, kind, tiles):
    """Of one row only: up to the last token of all, in the middle of every part."""
    made = call(16, n=5)
    mask = torch.ones(BATCH, 1, 5, made.scores[3], dtype=torch.bool)
    mask[1, ..., :padding] = False
    if kind == "lowest number":
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert made.error(mask=mask) < 1e-5


@pytest.mark.parametrize("seen_before", [False, True])
def test_a_query_that_sees_nothing_gives_zeros(seen_before, tiles):
    made = call(16, n=5)
    mask = torch.ones(BATCH, 1, 5, made.scores[3], dtype=torch.bool)
    mask[0, :, 2] = mask[1, :, :4] = False
    added = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    for each in (mask, added):
        options = AttentionOptions(0.25, each, sink_logits=torch.ones(4) if seen_before else None)
        out = attend(made.query, made.keys, made.values, options)
        assert not bool(out[0, :, 2].any())
        assert not bool(out[1, :, :4].any())
        assert bool((out[1, :, 4] != 0).all())
        assert made.error(mask=each, sink_logits=options.sink_logits) < 1e-5


def test_all_tokens_at_the_lowest_number_are_seen_alike(tiles):
    """As softmax has it, and torch: such rows are padding, but they must not become NaN."""
    made = call(16, n=2)
    mask = torch.full((BATCH, 1, 2, made.scores[3]), torch.finfo(torch.float32).min)
    assert made.error(mask=mask) < 1e-5


@pytest.mark.parametrize("n", [1, 8, TAIL, TAIL + 20, SINKS + PACKED + TAIL])
def test_causal(n, tiles):
    """The new tokens may be in the tail alone, or everywhere."""
    assert call(16, n=n).error(causal=True) < 1e-5


def test_first_queries_see_nothing_if_there_are_fewer_tokens(tiles):
    made = call(16, n=SINKS + PACKED + TAIL + 6)
    assert made.error(causal=True) < 1e-5


@pytest.mark.parametrize("softcap", [0.3, 5.0, 50.0])
def test_softcap(softcap, tiles):
    made = call(16, n=5)
    assert made.error(softcap=softcap, scale=2.0) < 1e-5
    mask = made.query[0, 0, :, :1] > torch.linspace(-1, 1, made.scores[3])
    assert made.error(softcap=softcap, scale=2.0, mask=mask, causal=True) < 1e-5


@pytest.mark.parametrize("height", [-30.0, 0.0, 30.0])
def test_learned_sinks(height, tiles):
    made = call(16, n=5, groups=3)
    sinks = height + made.query[0, :, 0, 0]
    assert made.error(sink_logits=sinks) < 1e-5
    assert made.error(sink_logits=sinks, causal=True, softcap=3.0) < 1e-5


def test_everything_at_once(tiles):
    made = call(20, 24, n=7, groups=3, key_quantizer="prod", center_keys=True)
    mask = torch.randn(BATCH, 6, 7, made.scores[3], generator=torch.Generator().manual_seed(5))
    sinks = mask[0, :, 0, 0]
    options = {"mask": mask, "causal": True, "softcap": 4.0, "sink_logits": sinks, "scale": 0.9}
    assert made.error(**options) < 1e-5


# --- hostile numbers ---


def _outliers(x: Tensor) -> Tensor:
    x = x.clone()
    x[..., 3] *= 1000
    x[..., 7] = 300 + x[..., 7]
    return x


def _zeros(x: Tensor) -> Tensor:
    x = x.clone()
    x[:, :, ::3] = 0
    x[:, 1] = 0
    return x


HOSTILE = {
    "outlier channels": _outliers,
    "zero vectors": _zeros,
    "huge": lambda x: x * 1e15,
    "tiny": lambda x: x * 1e-15,
    "norms of all sizes": lambda x: x * torch.logspace(-4, 4, x.shape[2]).unsqueeze(-1),
    "norms of all sizes, falling": lambda x: x * torch.logspace(4, -4, x.shape[2]).unsqueeze(-1),
    "one direction": lambda x: torch.ones_like(x) + 1e-3 * x,
}


@pytest.mark.parametrize("quantizer", ["mse", "prod"])
@pytest.mark.parametrize("hostile", HOSTILE.values(), ids=HOSTILE)
def test_hostile_states(hostile, quantizer, tiles):
    """With scores of some size: where they are huge, their own rounding is the error."""
    made = call(32, hostile=hostile, key_quantizer=quantizer)
    scores = made.query.double() @ exactly(made.keys).repeat_interleave(2, dim=1).mT
    assert made.error(scale=float(5 / scores.abs().amax())) < 1e-5


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_scores_far_from_zero(offset):
    """Their exponentials leave float32; only differences count."""
    made = call(16, n=5)
    assert made.error(mask=torch.full((5, made.scores[3]), offset)) < 1e-3
    sharp = made.query * 1000
    assert Call(sharp, made.keys, made.values).error() < 1e-3


# --- refusals ---


def test_what_does_not_fit_is_refused_with_a_remedy():
    made, other = call(16, n=5), call(16, tail=TAIL + 1)
    plain = AttentionOptions(0.25)

    def refused(match: str, options: AttentionOptions = plain, **changed: Any) -> None:
        arguments = {"query": made.query, "keys": made.keys, "values": made.values} | changed
        with pytest.raises(ValueError, match=match):
            attend(**arguments, options=options)

    query = made.query
    expected = r"pass \(2, a multiple of 2, n, 16\)"
    refused(rf"shape \(2, 4, 16\); {expected}", query=query[:, :, 0])
    refused(rf"shape \(1, 4, 5, 16\); {expected}", query=query[:1])
    refused(rf"shape \(2, 3, 5, 16\); {expected}", query=query[:, :3])
    refused(rf"shape \(2, 4, 5, 15\); {expected}", query=query[..., 1:])
    refused("torch.float64; pass float32, bfloat16 or float16", query=query.double())
    refused("query is on meta, the keys are on cpu; move one", query=query.to("meta"))
    refused(
        r"the tokens of the keys are \(2, 2, 73\) .*, of the values \(2, 2, 74\); pass the two of",
        values=other.values,
    )
    fewer = CachedStates(made.values.sinks[:, :, 1:], made.values.packed, other.values.recent)
    refused(r"the sinks of the keys are \(2, 2, 3\)", values=fewer)
    refused(
        r"mask has shape \(5, 72\); pass one that broadcasts to \(2, 4, 5, 73\)",
        AttentionOptions(0.25, torch.ones(5, 72, dtype=torch.bool)),
    )
    refused("broadcasts to", AttentionOptions(0.25, torch.ones(1, 2, 4, 5, 73)))
    refused(
        "mask is torch.int64; pass a boolean or a floating one",
        AttentionOptions(0.25, torch.ones(5, 73, dtype=torch.int64)),
    )
    refused(
        r"sink_logits have shape \(2,\); pass one per query head, \(4,\)",
        AttentionOptions(0.25, sink_logits=torch.ones(2)),
    )
    refused("softcap is 0.0; pass a positive number, or None", AttentionOptions(0.25, softcap=0.0))


def test_a_gradient_is_refused_not_lost():
    made, plain = call(16), AttentionOptions(0.25)
    made.query.requires_grad_()
    with pytest.raises(RuntimeError, match=r"no gradient; call it under torch.no_grad\(\)"):
        attend(made.query, made.keys, made.values, plain)
    with torch.no_grad():
        assert made.error() < 1e-5
