"""A generation never stops to compile: kernels have one variant, however long the text is.

The variants are Triton's own keys of the launches; see `tests.helpers.launches`.
"""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from rotorquant_hf import RotorQuantConfig, warm_up
from rotorquant_hf.cache import RotorQuantCache
from rotorquant_hf.graph import DecodeGraph
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer
from rotorquant_hf.quant.rope import Rope
from rotorquant_hf.warming import _variants
from tests.helpers import cuda_graph
from tests.helpers.launches import Variant, differences, recorded, variant_of
from tests.helpers.models import build, prompt

# Of keys and of values, which differ in whether RoPE turns them.
FIRST = ("moment_kernel", "block_kernel", "channels_kernel", "hessian_kernel", "feedback_kernel")
STEP = ("push_kernel", "prepare_kernel", "attend_kernel", "combine_kernel", "append_kernel")


class Reader:
    """One layer, fed as a model would feed it."""

    def __init__(self, batch=1, heads=2, group=4, d=128, dtype=torch.bfloat16, window=0, **options):
        config = RotorQuantConfig(**options)
        rope = Rope(torch.logspace(0, -4, d // 2).view(1, 1, 1, -1), "half")
        if window:
            self.layer = RotorQuantSlidingLayer(config, window, rope=rope)
        else:
            self.layer = RotorQuantLayer(config, rope=rope)
        self.shape, self.group, self.dtype = (batch, heads, d), group, dtype

    @torch.no_grad()
    def read(self, n, mask=None):
        batch, heads, d = self.shape
        states = [
            torch.randn(batch, n, h, d, dtype=self.dtype).transpose(1, 2)
            for h in (heads, heads, heads * self.group)
        ]
        keys, values = self.layer.update(*states[:2])
        tokens = keys.shape[2]
        seen = torch.ones(batch, 1, n, tokens, dtype=torch.bool).tril(tokens - n)
        if mask is not None:
            seen[0, :, :, :3] = False
        options = {"attn_mask": seen if n > 1 or mask is not None else None}
        if mask == "added":
            options["attn_mask"] = torch.where(seen, 0.0, -1e9).to(self.dtype)
        scaled_dot_product_attention(states[2], keys, values, **options, enable_gqa=True)


def counts(variants: list[Variant]) -> dict[str, int]:
    return dict(Counter(kernel for kernel, _ in set(variants)))


CASES = {
    "one row": {},
    "two rows": {"batch": 2},
    "a mask": {"batch": 2, "mask": "boolean"},
    "an added mask": {"batch": 3, "mask": "added"},
    "signs": {"key_quantizer": "prod"},
    "nearest": {"query_aware": False},
    "sliding": {"window": 333},
    "float32": {"dtype": torch.float32},
    "one head": {"heads": 1, "group": 1, "d": 64},
    "head dim 80": {"d": 80, "heads": 3, "group": 1},
    "odd lengths": {"block_length": 7, "residual_length": 33, "num_sink_tokens": 3},
    "eight heads": {"heads": 8, "key_bits": 3, "value_bits": 2},
}


@pytest.mark.parametrize("prompt_tokens", [300, 1301])
@pytest.mark.parametrize("case", CASES)
def test_300_steps_have_one_variant_of_each_kernel(case, prompt_tokens, monkeypatch):
    """Through splits even and odd, blocks that leave the ring, rows that grow, a crop."""
    options = dict(CASES[case])
    mask = options.pop("mask", None)
    reader = Reader(**options)
    with recorded(monkeypatch) as variants:
        reader.read(prompt_tokens, mask)
        del variants[:]
        for step in range(300):
            reader.read(1, mask)
            if step == 150 and not options.get("window"):
                reader.layer.crop(-37)
    wanted = STEP if case == "nearest" else (*STEP, "feedback_kernel")
    assert counts(variants) == dict.fromkeys(wanted, 1), differences(variants)
    assert len(variants) > 4 * 300


@pytest.mark.parametrize("case", CASES)
def test_prompts_of_all_lengths_have_one_variant_of_each_kernel(case, monkeypatch):
    """Of the kernels of a first packing, whose samples of long prompts are of 1024 and 2048."""
    options = dict(CASES[case])
    mask = options.pop("mask", None)
    with recorded(monkeypatch) as variants:
        for tokens in (300, 313, 1301, 2064, 3001):
            Reader(**options).read(tokens, mask)
    kernels = FIRST[1:3] if case == "nearest" else FIRST
    found = [x for x in variants if x[0] in FIRST]
    sides = {"moment_kernel": 1, "block_kernel": 2, "channels_kernel": 2}
    assert counts(found) == {x: sides.get(x, 1) for x in kernels}, differences(found)


@pytest.mark.parametrize("window", [0, 333], ids=["full", "sliding"])
def test_prompts_over_a_past_differ_by_their_tiles_alone(window, monkeypatch):
    reader = Reader(window=window)
    with recorded(monkeypatch) as variants:
        reader.read(500)
        for n in range(33, 150, 9):  # of 33 and more tokens
            reader.read(n)
    kernels = ("prepare_kernel", "attend_kernel", "append_kernel")
    assert counts([x for x in variants if x[0] in kernels]) == dict.fromkeys(kernels, 1)


def test_what_is_recorded_is_what_triton_compiles():
    """1, multiples of 16 and others are three kinds, and so are dtypes; but for `rows`."""
    from rotorquant_hf.kernels.combine import combine_kernel

    def variant(heads, rows=3, dtype=torch.float32):
        x = torch.empty(16, dtype=dtype)
        numbers = dict.fromkeys(("stride_ob", "stride_oh", "stride_on", "stride_od"), 64)
        numbers |= {"group": 4, "d": 64, "splits": 2, "exact_splits": 1, "stride_stats": 12}
        constants = dict.fromkeys(
            ("MEAN", "SINKS", "ROWS", "PAD_D", "COLUMNS", "SPLITS", "EXACT", "TENSOR_CORES"), 1
        )
        pointers = ("p_sums", "p_stats", "p_channel_scale", "p_mean", "p_rotation")
        arguments = dict.fromkeys((*pointers, "p_sink_logits", "p_out"), x) | numbers | constants
        arguments |= {"stride_channel_scale": 1, "centroid_unit": 0.5, "STATS": 1}
        sizes = {"heads": heads, "rows": rows, "total": heads * rows}
        return variant_of(combine_kernel, (), arguments | sizes)

    kinds = [variant(1), variant(16), variant(3), variant(3, dtype=torch.float16)]
    assert len(set(kinds)) == 4
    assert variant(5) == variant(3)
    assert variant(32) == variant(16)
    assert variant(3, rows=1) == variant(3, rows=16) == variant(3)


def generate(model, settings, batch, padding):
    """A chat of two rounds, by the model's own calls; sliding windows of 300 are soon full."""
    cache = RotorQuantCache(settings, config=model.config)
    total = 0
    with torch.no_grad():
        for n in (280, *[1] * 70, 2, *[1] * 40, 37, 1):
            total += n
            mask = torch.ones(batch, total, dtype=torch.long, device=model.device)
            mask[0, 0] = 1 - padding
            options = {"attention_mask": mask} if padding else {}
            model(prompt(batch, n).to(model.device), past_key_values=cache, **options)


@pytest.mark.parametrize(
    ("name", "attention", "batch", "padding"),
    [
        ("llama", "sdpa", 1, False),
        ("llama", "sdpa", 2, True),
        ("llama", "rotorquant", 3, False),
        ("mistral", "sdpa", 1, False),
        ("gpt_oss", "rotorquant", 1, False),
    ],
)
@pytest.mark.parametrize("settings", ["k4v4", "k3v2"])
def test_after_a_warm_up_nothing_is_compiled(
    name, attention, batch, padding, settings, monkeypatch
):
    model = build(name, attention)
    if name != "llama":
        model = build_with(name, attention, sliding_window=300)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with recorded(monkeypatch) as variants:
        found = warm_up(model, settings, batch=batch, padding=padding)
        warm = list(variants)
        generate(model, settings, batch, padding)
        assert warm_up(model, settings, batch=batch, padding=padding) == {}
    assert torch.equal(torch.rand(3), expected)  # nothing was drawn
    assert found == counts(warm)
    assert set(found) == {*FIRST, *STEP}
    new = set(variants) - set(warm)
    assert not new, differences(variants)
    assert len(variants) > len(warm) + 500


def build_with(name, attention, **changed):
    """A model with some numbers of its config changed."""
    plain = build(name, attention)
    # Rows of codes are multiples of 16 bytes.
    config = type(plain.config)(**plain.config.to_dict() | {"head_dim": 128} | changed)
    config._attn_implementation = attention
    return type(plain)(config).eval()


@pytest.mark.parametrize("warmed", [False, True], ids=["by its own steps", "by a warm-up"])
@pytest.mark.parametrize(
    ("name", "attention", "padding"),
    [
        ("llama", "sdpa", True),
        ("llama", "rotorquant", True),
        ("mistral", "sdpa", False),
        ("mistral", "rotorquant", False),
    ],
)
@torch.no_grad()
def test_a_capture_compiles_nothing(name, attention, padding, warmed, monkeypatch):
    """Loading a kernel is forbidden in a capture. After a warm-up no step compiles anything."""
    # A single token then has 8 rows of a kv head, a tile that no other step of a warm-up has.
    heads = {"num_attention_heads": 16, "num_key_value_heads": 2}
    window = {} if name == "llama" else {"sliding_window": 200}
    model = build_with(name, attention, **heads, **window).to(torch.bfloat16)
    mask = torch.ones(2, 280, dtype=torch.long)
    mask[0, 0] = 1 - padding
    with recorded(monkeypatch) as variants, cuda_graph.emulated(monkeypatch, lambda: []):
        if warmed:
            warm_up(model, batch=2, padding=padding)
        warm = set(variants)
        cache = RotorQuantCache(config=model.config)
        model(prompt(2, 280), past_key_values=cache, attention_mask=mask if padding else None)
        graph = DecodeGraph(cuda_graph.OnGPU(model), cache, attention_mask=mask)
        while graph._graph is None:
            ready = set(variants)
            graph(torch.ones(2, 1, dtype=torch.long))
        assert set(variants) == ready, differences(variants)
        assert not warmed or set(variants) == warm, differences(variants)


def test_on_the_device_itself():
    """Triton's own count on a GPU; on a CPU there is nothing to compile."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = copy.deepcopy(build("llama")).to(device)
    first, ready = warm_up(model, "k3v3"), _variants()
    assert bool(first) == (device == "cuda")
    assert sum(ready.values()) >= sum(first.values())
    generate(model, "k3v3", 1, False)
    assert _variants() == ready
    assert warm_up(model, "k3v3") == {}


def test_a_batch_of_no_rows():
    with pytest.raises(ValueError, match="batch is 0; choose at least 1"):
        warm_up(build("llama"), batch=0)
