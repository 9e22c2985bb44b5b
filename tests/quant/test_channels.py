"""Channel statistics: scales against a slow reference, round trips, dead and extreme channels."""

import math

import pytest
import torch

from rotorquant_hf.quant.channels import SEGMENT, ChannelStatistics
from rotorquant_hf.quant.hessian import RIDGE
from rotorquant_hf.quant.moments import QueryMoment
from rotorquant_hf.quant.rope import Rope
from tests.helpers.vectors import log_normal_channels

LEAST_SHARE = 0.02

powers = pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
layouts = pytest.mark.parametrize("layout", ["none", "half", "interleaved"])
centering = pytest.mark.parametrize("center", [False, True], ids=["as-is", "centred"])


def block(batch=2, heads=3, tokens=20, d=12, seed=0):
    """Keys whose channels differ in size, differently in every head, and have a mean."""
    rows = [log_normal_channels(tokens, d, seed + i) for i in range(batch * heads)]
    x = torch.stack(rows).reshape(batch, heads, tokens, d)
    return x + torch.linspace(-3, 3, d)


def partner(c, d, layout):
    """The other channel of the RoPE pair of channel c."""
    if layout == "none" or d % 2:
        return c
    return (c + d // 2) % d if layout == "half" else c ^ 1


def reference_scales(x, power, layout):
    """Weights of one head's vectors (tokens, d), in plain Python; centring does not change them."""
    tokens, d = x.shape
    energy = [sum(v**2 for v in column) / tokens for column in x.double().T.tolist()]
    floor = LEAST_SHARE**2 * sum(energy) / d
    shared = [(energy[c] + energy[partner(c, d, layout)]) / 2 for c in range(d)]
    raw = [max(e, floor) ** (power / 2) for e in shared]
    size = math.sqrt(sum(e / w**2 for e, w in zip(energy, raw, strict=True)))
    return [w * size for w in raw]


@powers
@layouts
@centering
@pytest.mark.parametrize("d", [12, 11], ids=["even", "odd"])
def test_scales_are_those_of_a_slow_reference(power, layout, center, d):
    x = block(d=d)
    statistics = ChannelStatistics.of_block(x, power, center, layout)
    assert statistics.scale.shape == (2, 3, 1, 1 if power == 0 else d)
    assert statistics.scale.dtype == torch.float32
    expected = [[reference_scales(head, power, layout) for head in row] for row in x]
    scale = statistics.scale.expand(2, 3, 1, d).squeeze(2).double()
    torch.testing.assert_close(scale, torch.tensor(expected).double(), rtol=1e-4, atol=0)


@powers
@layouts
@centering
def test_the_first_block_has_norm_one_in_the_quadratic_mean(power, layout, center):
    x = block()
    statistics = ChannelStatistics.of_block(x, power, center, layout)
    energy = (x / statistics.scale).square().sum(dim=-1).mean(dim=-1)
    torch.testing.assert_close(energy, torch.ones(2, 3), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("layout", "pairs"), [("half", (2, 6)), ("interleaved", (6, 2))])
def test_the_channels_of_a_rope_pair_share_their_scale(layout, pairs):
    scale = ChannelStatistics.of_block(block(), 0.5, rope_layout=layout).scale
    paired = scale.unflatten(-1, pairs)
    axis = -2 if layout == "half" else -1
    first, second = paired.unbind(axis)
    torch.testing.assert_close(first, second)
    assert scale.unique().numel() >= 2 * 3 * 5  # and only they


def test_without_a_rope_layout_each_channel_has_its_own_scale():
    scale = ChannelStatistics.of_block(block(), 0.5).scale
    ratio = scale.max() / scale.min()
    assert scale.unique().numel() > 2 * 3 * 10
    assert ratio > 5


def test_full_power_makes_the_channels_even():
    x = block() - torch.linspace(-3, 3, 12)  # log-normal channels, none below the least share
    x = x / x.square().mean(dim=2, keepdim=True).sqrt() * torch.logspace(-0.5, 0.5, 12)
    u = ChannelStatistics.of_block(x, 1.0).normalize(x)
    torch.testing.assert_close(u.square().mean(dim=2), torch.full((2, 3, 12), 1 / 12))


def test_heads_and_batch_rows_have_their_own_statistics():
    x = block()
    together = ChannelStatistics.of_block(x, 0.5, center=True)
    alone = ChannelStatistics.of_block(x[1:, 2:], 0.5, center=True)
    torch.testing.assert_close(together.scale[1:, 2:], alone.scale)
    torch.testing.assert_close(together.mean[1:, 2:], alone.mean)


@centering
def test_a_block_of_several_tiles_counts_all_its_tokens(center):
    tokens, d = 2048, 256
    x = torch.randn(2, 4, tokens, d, generator=torch.Generator().manual_seed(0))
    x[:, :, -1] *= 1000
    statistics = ChannelStatistics.of_block(x, 0, center)
    rms = x.double().square().mean(dim=2).sum(dim=-1).sqrt().float()
    torch.testing.assert_close(statistics.scale[:, :, 0, 0], rms, rtol=1e-4, atol=0)
    if center:
        torch.testing.assert_close(
            statistics.mean, x.double().mean(dim=2, keepdim=True).float(), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("period", [2, 7, 8, 100])
def test_of_a_longer_block_a_spread_sample_counts(period):
    """Every part of a text that repeats itself is in it, and so are its beginning and its end."""
    tokens, d = 20000, 16
    x = torch.randn(1, 1, tokens, d, generator=torch.Generator().manual_seed(0))
    x[:, :, ::period] += 3
    x[:, :, : tokens // 10, 0] += 50
    x[:, :, -tokens // 10 :, 1] += 50
    statistics = ChannelStatistics.of_block(x, 0.5, True)
    assert (statistics.mean - x.mean(dim=2, keepdim=True)).abs().max() < 0.3
    rms = x.square().mean(dim=2).sqrt()
    share = statistics.scale[:, :, 0] / rms.sqrt()
    torch.testing.assert_close(share, share.mean().expand_as(share), rtol=0.05, atol=0)


# --- centring only where it pays ---


def block_with_offsets(channels, d=12):
    """Keys of unit channels, but 100 added to the given ones of the last head."""
    x = torch.randn(2, 3, 40, d, generator=torch.Generator().manual_seed(3))
    x[:, 2, :, channels] += 100
    return x


@pytest.mark.parametrize(
    ("layout", "expected"),
    [("none", {1, 4}), ("half", {1, 4, 7, 10}), ("interleaved", {0, 1, 4, 5})],
)
@powers
def test_auto_centres_offset_channels_with_their_rope_partners(layout, expected, power):
    x = block_with_offsets([1, 4])
    statistics = ChannelStatistics.of_block(x, power, "auto", layout)
    assert not statistics.mean[:, :2].any()
    for b in range(2):
        assert set(statistics.mean[b, 2, 0].nonzero().flatten().tolist()) == expected
        scale = reference_scales(x[b, 2], power, layout)
        torch.testing.assert_close(
            statistics.scale[b, 2, 0].expand(12), torch.tensor(scale), rtol=1e-4, atol=0
        )
    centred = sorted(expected)
    torch.testing.assert_close(
        statistics.mean[:, 2, 0, centred], x[:, 2].mean(dim=1)[:, centred], rtol=1e-5, atol=1e-4
    )


@pytest.mark.parametrize("case", ["ordinary", "large but not constant", "constant but not large"])
@layouts
def test_auto_centres_no_other_channels(case, layout):
    x = block_with_offsets([])
    if case == "large but not constant":
        x[..., 1] = 20 * x[..., 1] + 100
    elif case == "constant but not large":
        x[..., 1] = 3
    statistics = ChannelStatistics.of_block(x, 0.5, "auto", layout)
    assert not statistics.mean.any()
    plain = ChannelStatistics.of_block(x, 0.5, False, layout)
    assert torch.equal(statistics.scale, plain.scale)


# --- normalise and back ---


@powers
@layouts
@centering
def test_denormalize_undoes_normalize(power, layout, center):
    x, later = block(), block(tokens=7, seed=50)
    statistics = ChannelStatistics.of_block(x, power, center, layout)
    for vectors in (x, later):
        back = statistics.denormalize(statistics.normalize(vectors))
        torch.testing.assert_close(back, vectors, rtol=1e-5, atol=1e-5)


def test_normalize_subtracts_the_mean_and_divides_by_the_scale():
    x, later = block(), block(tokens=7, seed=50)
    statistics = ChannelStatistics.of_block(x, 0.5, center=True)
    torch.testing.assert_close(statistics.mean, x.mean(dim=2, keepdim=True))
    expected = (later - x.mean(dim=2, keepdim=True)) / statistics.scale
    torch.testing.assert_close(statistics.normalize(later), expected)
    assert statistics.normalize(later.bfloat16()).dtype == torch.float32


def test_the_mean_is_taken_only_when_asked_for():
    assert ChannelStatistics.of_block(block(), 0.5).mean is None


def test_scores_and_weighted_sums_need_no_denormalised_vectors():
    x, queries = block(), block(tokens=1, seed=50)
    statistics = ChannelStatistics.of_block(x, 0.5, center=True)
    u, p = statistics.normalize(x), torch.softmax(torch.randn(2, 3, 1, 20), dim=-1)
    scores = (queries * statistics.scale) @ u.mT + queries @ statistics.mean.mT
    torch.testing.assert_close(scores, queries @ x.mT, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(statistics.denormalize(p @ u), p @ x, rtol=1e-4, atol=1e-4)


# --- hostile inputs ---


@powers
@layouts
@centering
def test_dead_channels_have_a_scale(power, layout, center):
    x = block()
    x[..., [0, 5]] = 0
    statistics = ChannelStatistics.of_block(x, power, center, layout)
    assert (statistics.scale > 0).all()
    assert torch.isfinite(statistics.scale).all()
    assert torch.isfinite(statistics.normalize(x)).all()
    # A channel that wakes up is not blown up: its scale is that of a channel of 2% of the rms.
    shares = [reference_scales(head, power, layout) for head in x[0]]
    scale = statistics.scale[0, :, 0].expand(3, 12)
    torch.testing.assert_close(scale, torch.tensor(shares), rtol=1e-4, atol=0)


@powers
@layouts
@centering
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_block_of_zeros_has_finite_statistics(power, layout, center, tokens):
    x = torch.zeros(2, 3, tokens, 12)
    statistics = ChannelStatistics.of_block(x, power, center, layout)
    assert (statistics.scale > 0).all()
    assert torch.isfinite(statistics.scale).all()
    assert torch.equal(statistics.normalize(x), x)
    assert torch.equal(statistics.denormalize(x), x)
    later = statistics.normalize(block())
    assert torch.isfinite(later).all()


@powers
@layouts
@centering
@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
def test_magnitudes_far_from_one_change_only_the_unit(power, layout, center, magnitude):
    x = block()
    near = ChannelStatistics.of_block(x, power, center, layout)
    far = ChannelStatistics.of_block(x * magnitude, power, center, layout)
    assert torch.isfinite(far.scale).all()
    torch.testing.assert_close(far.scale / magnitude, near.scale, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        far.normalize(x * magnitude), near.normalize(x), rtol=1e-3, atol=1e-4
    )
    back = far.denormalize(far.normalize(x * magnitude))
    torch.testing.assert_close(back / magnitude, x, rtol=1e-4, atol=1e-4)


# --- RoPE ---

FREQUENCIES = 5000.0 ** (-torch.arange(6) / 6)


def rope(layout="half"):
    return Rope(FREQUENCIES.view(1, 1, 1, -1), layout)


def turned(tokens=300, first=0, layout="half", seed=0):
    """Keys with a mean before RoPE, as they are at positions from `first` on; and the mean."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(2, 3, 1, 12, generator=generator)
    x = mean + 0.3 * torch.randn(2, 3, tokens, 12, generator=generator)
    return rope(layout).turn(x, torch.arange(first, first + tokens)), mean


def taken(x, first=0, layout="half", center=True):
    positions = torch.arange(first, first + x.shape[2])
    return ChannelStatistics.of_block(x, 0.5, center, layout, rope(layout), positions)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("first", [0, 5000])
def test_the_mean_is_that_of_the_positions_to_come(layout, first):
    """It fits keys of the next thousands of tokens, which that of the block does not."""
    x, mean = turned(first=first, layout=layout)
    statistics = taken(x, first, layout)
    assert statistics.rope.turns.flatten().tolist() == [True, True]
    horizon = max(2048, first + 299)
    torch.testing.assert_close(
        statistics.mean, rope(layout).spread(mean, (horizon,)), rtol=0, atol=0.1
    )
    later = rope(layout).turn(mean.expand(2, 3, 400, 12), torch.arange(0, 2000, 5))
    distance = [(later - m).square().mean() for m in (statistics.mean, taken_as_is(x).mean)]
    assert distance[0] < (0.9 if first == 0 else 1.01) * distance[1]


def taken_as_is(x):
    return ChannelStatistics.of_block(x, 0.5, True)


def test_scales_do_not_depend_on_it():
    x, _ = turned()
    assert torch.equal(taken(x).scale, ChannelStatistics.of_block(x, 0.5, True, "half").scale)


@pytest.mark.parametrize("center", [True, False])
def test_keys_that_do_not_turn_as_the_config_says(center):
    """Row by row: those with other pairs of channels, or without RoPE, are left as they are."""
    right, _ = turned()
    pairs, _ = turned(layout="interleaved")
    constant = block(tokens=300)
    for wrong in (pairs, constant):
        x = torch.cat((right[:1], wrong[1:]))
        statistics = taken(x, center=center)
        assert statistics.rope.turns.flatten().tolist() == [True, False]
        if center:
            assert torch.equal(statistics.mean[1:], taken_as_is(wrong).mean[1:])
            assert torch.equal(statistics.mean[:1], taken(right).mean[:1])


def test_offset_channels_are_those_of_the_block():
    """With center="auto" the mean is taken as it is, whatever turns."""
    x, _ = turned()
    plain = ChannelStatistics.of_block(x, 0.5, "auto", "half")
    assert torch.equal(taken(x, center="auto").mean, plain.mean)


@pytest.mark.parametrize("power", [0.0, 0.5])
def test_the_hessian_turns_with_the_keys(power):
    """What errors cost at a position, against queries that were turned there one by one."""
    x, _ = turned()
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(2, 3, 400, 12, generator=generator) * torch.logspace(0, -1.5, 12)
    seen = QueryMoment.of(
        rope().turn(query, torch.arange(400)), 3, rope(), positions=torch.arange(400)
    )
    statistics = ChannelStatistics.of_block(
        x, power, True, "none" if power else "half", rope(), torch.arange(300)
    ).read_by(seen)
    scale = statistics.scale.expand(2, 3, 1, 12)
    for position in (0, 1023, 70_000):
        middle = position // SEGMENT * SEGMENT + SEGMENT // 2
        later = [
            rope().turn(query, torch.tensor([middle + length * (i + 0.5) / 400]))
            for length in (512, 2048)
            for i in range(400)
        ]
        moment = torch.stack([q.mT @ q / 400 for q in later]).mean(dim=0)
        wanted = unit_mean(scale.mT * QueryMoment(moment, 400).shrunk(moment) * scale)
        wanted = unit_mean(wanted + RIDGE * torch.eye(12))
        found = unit_mean(statistics.hessian_at(position).matrix())
        elsewhere = unit_mean(statistics.hessian_at(position + SEGMENT).matrix())
        distance = torch.linalg.matrix_norm(found - wanted)
        assert (distance < 0.02 * torch.linalg.matrix_norm(wanted)).all()
        assert (distance < 0.4 * torch.linalg.matrix_norm(elsewhere - wanted)).all()
        strength = [
            h.factor.float().square().sum(dim=(-2, -1))
            for h in (statistics.hessian_at(position), statistics.hessian)
        ]
        torch.testing.assert_close(*strength, rtol=2e-3, atol=0)


def unit_mean(x):
    """x with a mean diagonal of 1."""
    return x / x.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]


def test_a_segment_has_one_hessian():
    x, _ = turned()
    seen = QueryMoment.of(x, 3, rope(), torch.arange(300))
    statistics = taken(x).read_by(seen)
    at = [statistics.hessian_at(p).factor for p in (0, SEGMENT - 1, SEGMENT)]
    assert torch.equal(at[0], at[1])
    assert not torch.allclose(at[1], at[2], atol=0.1)


def test_nothing_turns_where_rope_is_not_known():
    x, _ = turned()
    statistics = ChannelStatistics.of_block(x, 0.5, True, "half").read_by(QueryMoment.of(x, 3))
    assert statistics.rope is None
    assert statistics.hessian_at(70_000) is statistics.hessian


def test_names_of_tensors_and_back():
    x, _ = turned()
    for statistics in (
        taken(x).read_by(QueryMoment.of(x, 3, rope(), torch.arange(300))),
        taken(x, layout="interleaved"),
        ChannelStatistics.of_block(x, 0.5),
    ):
        named = statistics.tensors()
        layout = "half" if statistics.rope is None else statistics.rope.layout
        again = ChannelStatistics.of_tensors(named, layout)
        assert (again.rope is None) == (statistics.rope is None)
        assert again.rope is None or again.rope.layout == layout
        assert again.tensors().keys() == named.keys()
        assert all(torch.equal(again.tensors()[name], named[name]) for name in named)
        assert again.nbytes == sum(t.nbytes for t in named.values())


# --- moving ---


def test_map_reaches_what_turns():
    x, _ = turned()
    statistics = taken(x).read_by(QueryMoment.of(x, 3, rope(), torch.arange(300)))
    second = statistics.map(lambda t: t[1:])
    for name, tensor in second.tensors().items():
        assert torch.equal(tensor, statistics.tensors()[name][1:])


@centering
def test_map_reaches_every_tensor_and_leaves_the_original(center):
    statistics = ChannelStatistics.of_block(block(), 0.5, center)
    second = statistics.map(lambda t: t[1:])
    assert torch.equal(second.scale, statistics.scale[1:])
    assert (second.mean is None) == (not center)
    if center:
        assert torch.equal(second.mean, statistics.mean[1:])
    assert statistics.scale.shape[0] == 2


@pytest.mark.parametrize(
    ("power", "center", "numbers"), [(0, False, 1), (0, True, 13), (0.5, False, 12), (1, True, 24)]
)
def test_bytes_are_counted(power, center, numbers):
    assert ChannelStatistics.of_block(block(), power, center).nbytes == 2 * 3 * 4 * numbers
