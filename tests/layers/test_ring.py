"""Decoding steps on the device (ring, lengths, block appends) against the torch path."""

import copy
import pickle

import pytest
import torch

from rotorquant_hf import RotorQuantCache, RotorQuantConfig
from rotorquant_hf.attention.options import AttentionOptions
from rotorquant_hf.attention.reference import attention_reference
from rotorquant_hf.attention.states import RingStates
from rotorquant_hf.attention.tensor import CompressedTensor
from rotorquant_hf.attention.triton_attention import attend_packed
from rotorquant_hf.backend import backend
from rotorquant_hf.layers.full import RotorQuantLayer
from rotorquant_hf.layers.sliding import RotorQuantSlidingLayer
from tests.helpers.models import narrow, prompt

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
B, HEADS, GROUP, D = 2, 2, 2, 32
SMALL = {
    "residual_length": 8,
    "statistics_length": 0,
    "query_aware": False,
    "block_length": 4,
    "num_sink_tokens": 2,
}


def layer(sliding=0, **options):
    config = RotorQuantConfig(**SMALL | options)
    return RotorQuantSlidingLayer(config, sliding) if sliding else RotorQuantLayer(config)


def tokens(n, seed=0, heads=HEADS):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, B, heads, n, D, generator=generator).to(DEVICE)


def dense(x):
    return x.materialize() if isinstance(x, CompressedTensor) else x


def feed(target, states, sizes, name):
    """Update in pieces; yields what each update returns."""
    start = 0
    for n in sizes:
        with backend(name):  # closed before the next feed of a `zip` goes on
            updated = target.update(*states[:, :, :, start : start + n])
        yield updated
        start += n


# Steps, and the heads that take them: in the interpreter every head is a program of its own.
STEPS = {
    "one by one": ((20, *[1] * 26), 1),
    "few at a time": ((20, *[1, 3, 2] * 5), HEADS),
    "from the first token": ((3, *[1] * 26), 1),
    "blocks and more": ((20, *[4, 1, 5, 1, 13, 2] * 2), 1),
}


@pytest.mark.parametrize("sliding", [0, 24, 16, 10])
@pytest.mark.parametrize(("sizes", "heads"), STEPS.values(), ids=STEPS)
def test_steps_hold_what_the_torch_path_holds(sizes, heads, sliding):
    """The same tokens, exact where exact there, coded where coded there; attention over them."""
    states = tokens(sum(sizes), heads=heads)
    on_torch, on_kernels = layer(sliding), layer(sliding)
    pairs = zip(
        feed(on_torch, states, sizes, "torch"),
        feed(on_kernels, states, sizes, "triton"),
        sizes,
        strict=True,
    )
    live, wrapped = 0, False
    for (k, v), (live_k, live_v), n in pairs:
        assert k.shape == live_k.shape
        # A coordinate near a boundary may be coded differently: few numbers, by one step.
        for a, b in ((k, live_k), (v, live_v)):
            off = (dense(a) - dense(b)).abs().amax(dim=-1) > 1e-4
            assert off.float().mean() < 0.02
        assert on_torch.get_seq_length() == on_kernels.get_seq_length()
        assert on_torch.get_mask_sizes(1) == on_kernels.get_mask_sizes(1)
        if isinstance(live_k, CompressedTensor):
            if isinstance(live_k.states, RingStates):
                live, ring = live + 1, on_kernels.ring
                wrapped |= ring.begin + ring.count > ring.rings[0].shape[2]
            q = torch.randn(B, heads * GROUP, n, D, device=DEVICE)
            options = AttentionOptions(scale=D**-0.5, causal=True)
            out = attend_packed(q, live_k.states, live_v.states, options)
            wanted = attention_reference(
                q.double(), dense(live_k).double(), dense(live_v).double(), options
            )
            torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    small = [n for n in sizes if n <= SMALL["block_length"]]
    assert live > 0.5 * len(small) or sliding == 10  # there, all is within the exact window
    assert wrapped or sliding == 10 or len(small) < len(sizes) - 1  # longer ones begin a new ring


@pytest.mark.parametrize("sliding", [0, 24])
def test_lengths_on_the_device_follow_without_uploads(sliding, monkeypatch):
    """Once uploaded, the lengths move on by the kernels alone, through flushes and growth."""
    states = tokens(110, heads=1)
    target = layer(sliding)
    for _ in feed(target, states, (40, 1), "triton"):
        pass
    ring, memory = target.ring, target.store.keys.buffers.tensors["codes"]
    uploads = []
    real = torch.Tensor.copy_
    monkeypatch.setattr(
        torch.Tensor, "copy_", lambda self, *a, **k: uploads.append(a) or real(self, *a, **k)
    )
    for i in range(41, 110):
        with backend("triton"):
            target.update(*states[:, :, :, i : i + 1])
        # The device counts the block of a flush with the next push.
        found = ring.lengths.tolist()
        flushed = found[6]
        on_device = (found[0], found[1], found[2] + flushed, found[3] + flushed, found[4] - flushed)
        on_device = (*on_device[:3], on_device[3] % ring.rings[0].shape[2], on_device[4])
        assert on_device == ring._lengths()
    # Only compaction, which moves the first row, has to be told.
    assert len(uploads) == 0 if not sliding else 0 < len(uploads) <= 69 // 16
    assert target.store.keys.buffers.tensors["codes"] is not memory  # it has grown, or was moved


def test_a_view_of_an_earlier_step_is_refused():
    states = tokens(60)
    target = layer()
    views = list(feed(target, states, (40, 1, 1), "triton"))
    (old, _), (new, _) = views[1], views[2]
    with pytest.raises(RuntimeError, match="earlier update"):
        old.materialize()
    assert new.materialize().shape == (B, HEADS, 42, D)


def test_everything_else_finds_the_window():
    """crop, batch selection, copies, saving and long updates after steps on the device."""
    states = tokens(80)

    def stepped(name):
        target = layer()
        for _ in feed(target, states, (40, *[1] * 9), name):
            pass
        return target

    changes = {
        "crop a little": lambda x: x.crop(-3),
        "crop into the packed": lambda x: x.crop(-20),
        "reorder": lambda x: x.reorder_cache(torch.tensor([1, 0], device=DEVICE)),
        "repeat": lambda x: x.batch_repeat_interleave(2),
        "select": lambda x: x.batch_select_indices(torch.tensor([1], device=DEVICE)),
        "offload": lambda x: (x.offload(), x.prefetch()),
    }
    for name, change in changes.items():
        on_torch, on_kernels = stepped("torch"), stepped("triton")
        assert on_kernels.ring is not None
        change(on_torch)
        change(on_kernels)
        for part in ("keys", "values"):
            a, b = dense(getattr(on_torch, part)), dense(getattr(on_kernels, part))
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)
        rows = on_torch.batch_size
        more = states[:, :1, :, 60:61].expand(-1, rows, -1, -1, -1)
        for target, by in ((on_torch, "torch"), (on_kernels, "triton")):
            with backend(by):
                for _ in range(6):
                    target.update(*more)
        a, b = dense(on_torch.keys), dense(on_kernels.keys)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=name)


def test_copies_are_independent():
    states = tokens(80)
    target = layer()
    for _ in feed(target, states, (40, 1, 1), "triton"):
        pass
    for twin in (copy.deepcopy(target), pickle.loads(pickle.dumps(target))):
        before = dense(twin.keys).clone()
        with backend("triton"):
            target.update(*states[:, :, :, 42:43])
        assert torch.equal(dense(twin.keys), before)
        with backend("triton"):
            twin.update(*states[:, :, :, 42:43])
        assert twin.get_seq_length() == 43


def test_a_fork_goes_its_own_way():
    states, twin_states = tokens(80), tokens(80, seed=1)
    target = layer()
    for _ in feed(target, states, (40, 1, 1), "triton"):
        pass
    fork, before = copy.copy(target), dense(target.keys).clone()
    with backend("triton"):
        for i in range(42, 60):
            fork.update(*twin_states[:, :, :, i : i + 1])
        assert torch.equal(dense(target.keys), before)
        alone = copy.deepcopy(target)
        for i in range(42, 60):
            target.update(*states[:, :, :, i : i + 1])
            alone.update(*states[:, :, :, i : i + 1])
    assert torch.equal(dense(target.keys), dense(alone.keys))
    same = target.sinks[0].shape[2] + 8  # of what was packed in both
    assert torch.equal(dense(fork.keys)[:, :, :same], before[:, :, :same])
    assert not torch.equal(dense(fork.keys), dense(target.keys))


def test_the_ring_is_counted():
    states = tokens(60)
    target = layer()
    for _ in feed(target, states, (40, 1), "triton"):
        pass
    ring = target.ring
    assert target.nbytes()["window"] == sum(x.nbytes for x in ring.rings) + 4 * len(ring.lengths)
    slots = SMALL["residual_length"] + 2 * SMALL["block_length"]
    assert ring.rings[0].shape == (B, HEADS, slots, D)


def test_gradients_do_not_go_through_the_ring():
    states = tokens(60)
    target = layer()
    for _ in feed(target, states, (40,), "triton"):
        pass
    new = states[:, :, :, 40:41].clone().requires_grad_()
    with backend("triton"):
        keys, _ = target.update(*new)
    assert target.ring is None
    keys.sum().backward()
    assert torch.equal(new.grad[0], torch.ones_like(new.grad[0]))


@pytest.mark.parametrize(
    ("residual", "block", "sliding", "total"),
    [(8, 80, 0, 300), (16, 16, 0, 150), (16, 96, 200, 420), (24, 8, 48, 200)],
)
def test_rows_are_there_before_they_are_written(residual, block, sliding, total):
    """Blocks and windows of sizes for which the rows shrink, grow and move all the time."""
    options = {
        "residual_length": residual,
        "statistics_length": 0,
        "query_aware": False,
        "block_length": block,
    }
    on_torch, on_kernels = layer(sliding, **options), layer(sliding, **options)
    sizes = [residual + block + 8] + [max(1, block // 2)] * (
        (total - residual) // max(1, block // 2)
    )
    states = tokens(sum(sizes))
    for (k, _), (live_k, _) in zip(
        feed(on_torch, states, sizes, "torch"),
        feed(on_kernels, states, sizes, "triton"),
        strict=True,
    ):
        rows = on_kernels.store.rows_in_use()
        assert 0 <= rows[0] <= rows[1] <= on_kernels.store.keys.buffers.tensors["codes"].shape[2]
        off = (dense(k) - dense(live_k)).abs().amax(dim=-1) > 1e-4
        assert off.float().mean() < 0.02
    assert on_kernels.ring is not None


def test_a_failed_step_is_no_step(monkeypatch):
    """Whatever fails, the layer holds what it held, and goes on rightly."""
    states = tokens(60)
    for sliding in (0, 24):
        for name in ("push.PushTokens.__call__", "append.append_segments"):
            target, twin = layer(sliding), layer(sliding)
            for one in (target, twin):
                for _ in feed(one, states, (40, *[1] * 3), "triton"):
                    pass

            def fail(*args, **kwargs):
                raise RuntimeError("out of memory")

            with monkeypatch.context() as patch, backend("triton"):
                patch.setattr(f"rotorquant_hf.kernels.{name}", fail)
                for i in range(43, 52):
                    length = target.get_seq_length()
                    try:
                        target.update(*states[:, :, :, i : i + 1])
                        twin.update(*states[:, :, :, i : i + 1])
                    except RuntimeError:
                        break
            assert target.get_seq_length() == length == twin.get_seq_length()
            start = length
            with backend("triton"):
                for i in range(start, start + 6):
                    a = target.update(*states[:, :, :, i : i + 1])
                    b = twin.update(*states[:, :, :, i : i + 1])
                    assert torch.equal(dense(a[0]), dense(b[0]))
                    assert torch.equal(dense(a[1]), dense(b[1]))
            lengths = target.ring.lengths[:5].tolist(), twin.ring.lengths[:5].tolist()
            assert lengths[0][2] + lengths[0][4] == lengths[1][2] + lengths[1][4]


def test_a_gradient_needed_later_leaves_the_ring():
    states = tokens(60)
    target = layer()
    for _ in feed(target, states, (40, 1), "triton"):
        pass
    assert target.ring is not None
    new = states[:, :, :, 41:42].clone().requires_grad_()
    with backend("triton"):
        keys, _ = target.update(*new)
    assert keys.requires_grad or keys.states.recent.requires_grad


def test_double_precision_stays_on_the_torch_path():
    states = tokens(60).double()
    target = layer()
    *_, (k, _) = feed(target, states, (40, 1), "triton")
    assert target.ring is None
    assert k.dtype == torch.float64


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"'cuda'.*triton, native, torch"), backend("cuda"):
        pass


def generate(model, cache=None, **options):
    """A text without sampling, and the logits that led to it, which tell more than few tokens."""
    return model.generate(
        prompt(1, 20).to(DEVICE),
        past_key_values=cache,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **{"max_new_tokens": 8} | options,
    )


@pytest.mark.parametrize("options", [{}, {"key_quantizer": "prod"}], ids=["mse", "prod"])
def test_greedy_text_through_the_kernels_is_that_of_materialising(options):
    """The same cache, read by the attention kernel and by eager attention."""
    texts = []
    for attention in ("sdpa", "eager"):
        cache = RotorQuantCache(**SMALL | options)
        with backend("triton"):
            model = narrow("llama", attention, layers=2).to(DEVICE)
            texts.append(generate(model, cache, max_new_tokens=14))
        assert all(x.ring is not None for x in cache.layers)
    found, wanted = texts
    assert torch.equal(found.sequences, wanted.sequences)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)


def test_assisted_decoding_and_beams_through_the_kernels():
    """Steps of several tokens, crops and reorderings; 8 bits leave the text as it is."""
    model = narrow("llama", layers=2).to(DEVICE)
    for options in ({"num_beams": 2}, {"prompt_lookup_num_tokens": 3}):
        wanted = generate(model, **options)
        with backend("triton"):
            found = generate(model, RotorQuantCache(**SMALL, key_bits=8, value_bits=8), **options)
        assert torch.equal(found.sequences, wanted.sequences)
        torch.testing.assert_close(found.logits, wanted.logits, rtol=0, atol=0.01)  # of 0.5


@torch.no_grad()
def test_a_backend_that_is_asked_for_reads_the_ring_too(monkeypatch):
    """In comparisons of torch with the kernels, over what the kernels have written."""
    states, target = tokens(60).bfloat16(), layer()
    *_, (keys, values) = feed(target, states, (40, 1), "triton")
    assert isinstance(keys.states, RingStates)
    query = torch.randn(*keys.shape[:2], 1, keys.shape[3], device=DEVICE).bfloat16()
    with backend("triton"):
        expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    monkeypatch.setattr("rotorquant_hf.attention.triton_attention.attend_packed", None)
    with backend("torch"):
        found = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-2)
