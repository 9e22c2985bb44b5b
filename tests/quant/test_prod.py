"""RotorQuantProd: unbiased inner products, their variance, and the packed codes."""

import functools

import pytest
import torch
from torch.nn.functional import normalize

from rotorquant_hf.quant import PROJECTIONS, RotorQuantMSE, RotorQuantProd, make_rotation
from rotorquant_hf.quant.packing import unpack
from tests.helpers.vectors import gaussian, log_normal_channels

D = 16
SEEDS = range(1000)
STANDARD_ERRORS = 4.5
TURBOQUANT_ERROR = {2: 0.56, 3: 0.18, 4: 0.047}
"""Squared error of <q, x> for unit vectors, times d; arXiv:2504.19874, Theorem 2."""

make_rotation_once = functools.cache(make_rotation)

projections = pytest.mark.parametrize("projection", PROJECTIONS)


def quantizer(d=D, bits=2, qjl_dim=None, seed=42, **options):
    options.setdefault("rotation", make_rotation_once(d))
    return RotorQuantProd(d, bits, qjl_dim, seed, **options)


def residual_of(x, bits=2):
    q = quantizer(bits=bits)
    return x - q.dequantize(q.quantize(x))


def pairs():
    """Fixed (q, x), the parallel and the sparse among them, by name: two (pairs, D)."""
    x, q = gaussian(2, D, seed=1), gaussian(2, D, seed=2)
    uneven = log_normal_channels(1, D)[0]
    hot = torch.eye(D)[3]
    cases = {
        "gaussian": (q[0], x[0]),
        "parallel": (x[1], x[1]),
        "opposite": (-2 * x[1], x[1]),
        "along-the-residual": (residual_of(x[0]), x[0]),
        "one-hot": (q[0], hot),
        "one-hot-parallel": (hot, hot),
        "uneven": (q[1], uneven),
        "uneven-parallel": (uneven, uneven),
    }
    return list(cases), *(torch.stack(side) for side in zip(*cases.values(), strict=True))


def biases(estimates, truth):
    """The mean error of every pair in its standard errors; estimates (seeds, pairs)."""
    error = estimates.double() - truth.double()
    spread = error.std(dim=0) / len(error) ** 0.5
    # Where every seed gives the same estimate, what is left is the rounding of float32.
    return error.mean(dim=0) / spread.clamp(min=1e-6 * truth.abs().double())


# --- no bias ---


@projections
@pytest.mark.parametrize("qjl_dim", [D // 2, D, 2 * D, 5])
def test_inner_products_are_unbiased_over_projections(projection, qjl_dim):
    names, queries, x = pairs()
    estimates = []
    for seed in SEEDS:
        q = quantizer(qjl_dim=qjl_dim, seed=seed, projection=projection)
        estimates.append(q.inner_product(queries, q.quantize(x)))
    bias = biases(torch.stack(estimates), (queries * x).sum(dim=-1))
    assert dict(zip(names, bias.tolist(), strict=True)) == pytest.approx(
        dict.fromkeys(names, 0), abs=STANDARD_ERRORS
    )


@projections
@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("scale", ["norm", "least_squares"])
def test_inner_products_are_unbiased_over_seeds_of_everything(projection, bits, scale):
    names, queries, x = pairs()
    estimates = []
    for seed in range(400):
        q = RotorQuantProd(D, bits, seed=seed, projection=projection, scale=scale)
        estimates.append(q.inner_product(queries, q.quantize(x)))
    bias = biases(torch.stack(estimates), (queries * x).sum(dim=-1))
    assert dict(zip(names, bias.tolist(), strict=True)) == pytest.approx(
        dict.fromkeys(names, 0), abs=STANDARD_ERRORS
    )


@pytest.mark.parametrize("bits", [1, 2])
def test_the_same_bound_finds_the_bias_of_the_first_stage_alone(bits):
    names, queries, x = pairs()
    estimates = []
    for seed in range(400):
        x_hat, _ = RotorQuantMSE(D, bits, seed=seed, scale="norm")(x)
        estimates.append((queries * x_hat).sum(dim=-1))
    bias = biases(torch.stack(estimates), (queries * x).sum(dim=-1))
    for name, value in zip(names, bias.tolist(), strict=True):
        if "parallel" in name:
            assert value < -2 * STANDARD_ERRORS


# --- variance ---


def squared_error(d, bits, projection, qjl_dim=None, seeds=24):
    """Mean squared error of <q, x> for random unit q and x, times d."""
    x, queries = normalize(gaussian(200, d, 1), dim=-1), normalize(gaussian(200, d, 2), dim=-1)
    truth, errors = (queries * x).sum(dim=-1), []
    for seed in range(seeds):
        q = quantizer(d, bits, qjl_dim, seed, projection=projection)
        errors.append((q.inner_product(queries, q.quantize(x)) - truth).square().mean())
    return d * float(torch.stack(errors).mean())


@pytest.mark.parametrize("bits", TURBOQUANT_ERROR)
def test_gaussian_projections_have_the_error_of_turboquant(bits):
    error = squared_error(128, bits, "gaussian")
    assert error == pytest.approx(TURBOQUANT_ERROR[bits], rel=0.35)


@pytest.mark.parametrize("bits", TURBOQUANT_ERROR)
def test_orthogonal_projections_have_less_than_half_of_it(bits):
    # pi/2 - 1 against pi/2, times the energy of the residual, at qjl_dim = d.
    error = squared_error(128, bits, "orthogonal")
    assert 0.3 < error / TURBOQUANT_ERROR[bits] < 0.5


@pytest.mark.parametrize("qjl_dim", [D // 2, D, 2 * D])
def test_orthogonal_projections_vary_no_more_than_gaussian_ones(qjl_dim):
    errors = {p: squared_error(D, 2, p, qjl_dim, seeds=100) for p in PROJECTIONS}
    assert errors["orthogonal"] < 1.02 * errors["gaussian"]


@projections
def test_more_projections_and_more_bits_lower_the_error(projection):
    by_dim = [squared_error(D, 2, projection, m) for m in (D // 2, D, 2 * D)]
    by_bits = [squared_error(D, bits, projection) for bits in range(2, 9)]
    assert by_dim == sorted(by_dim, reverse=True)
    assert by_bits == sorted(by_bits, reverse=True)
    assert by_bits[-1] < by_bits[0] / 500


# --- the parts ---


@projections
@pytest.mark.parametrize("qjl_dim", [None, 5, 40])
def test_the_estimate_is_an_inner_product_with_what_decode_gives(projection, qjl_dim):
    q = quantizer(bits=3, qjl_dim=qjl_dim, projection=projection)
    x, queries = gaussian(20, D, seed=1), gaussian(20, D, seed=2)
    codes = q.quantize(x)
    expected = (q.rotation.rotate(queries) * q.decode(codes)).sum(dim=-1)
    torch.testing.assert_close(q.inner_product(queries, codes), expected)


@projections
@pytest.mark.parametrize("qjl_dim", [D, 5, 40])
def test_the_estimate_is_the_published_formula(projection, qjl_dim):
    q = quantizer(bits=3, qjl_dim=qjl_dim, projection=projection)
    x, queries = gaussian(20, D, seed=1), gaussian(20, D, seed=2)
    codes = q.quantize(x)
    # <q, x_hat> + |r| sqrt(pi/2) / m <S q, sign(S r)>, S acting in the rotated space.
    turn = q.rotation.matrix().double()
    x_hat = q.mse(x)[0].double()
    r = (x.double() - x_hat) @ turn.T
    signs = torch.where(r @ q.S.double().T >= 0, 1.0, -1.0).double()
    projected = queries.double() @ turn.T @ q.S.double().T
    correction = r.norm(dim=-1) * (torch.pi / 2) ** 0.5 / qjl_dim * (projected * signs).sum(dim=-1)
    expected = (queries * x_hat).sum(dim=-1) + correction
    torch.testing.assert_close(
        q.inner_product(queries, codes).double(), expected, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(codes["residual_norm"].double(), r.norm(dim=-1), rtol=1e-4, atol=0)
    stored = unpack(codes["qjl_signs"], 1, qjl_dim).double() * 2 - 1
    assert (stored == signs).double().mean() > 0.99


@pytest.mark.parametrize("qjl_dim", [D // 2, D, 2 * D + 3])
def test_orthogonal_rows_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones(qjl_dim):
    S = quantizer(qjl_dim=qjl_dim).S.double()
    assert S.shape == (qjl_dim, D)
    expected = torch.randn(200_000, D, generator=torch.Generator().manual_seed(0)).norm(dim=-1)
    torch.testing.assert_close(
        S.norm(dim=-1), expected.mean().double().expand(qjl_dim), rtol=2e-3, atol=0
    )
    assert not torch.equal(S[:3], S[-3:])  # every block is a new draw
    for block in S.split(D):
        cosines = block @ block.T / S.norm(dim=-1).square().mean()
        assert (cosines - torch.eye(len(block))).abs().max() < 1e-5


def test_dequantize_is_the_first_stage_with_one_bit_less():
    q, x = quantizer(bits=4), gaussian(20, D)
    stage = RotorQuantMSE(D, 3, rotation=q.rotation)
    torch.testing.assert_close(q.dequantize(q.quantize(x)), stage(x)[0])


def test_the_options_reach_the_first_stage():
    rotation = make_rotation(D, "haar")
    q = RotorQuantProd(D, 3, rotation=rotation, scale="matched", scale_dtype=torch.float16)
    assert q.rotation is rotation
    assert (q.mse.scale, q.mse.scale_dtype) == ("matched", torch.float16)
    one_layer = RotorQuantProd(D, 3, seed=5, rotation="rotors", rotor_layers=2)
    expected = make_rotation(D, "rotors", 2, seed=5).matrix()
    assert torch.equal(one_layer.rotation.matrix(), expected)


def test_the_seed_decides():
    x = gaussian(20, D)
    first, again, other = (RotorQuantProd(D, 3, seed=s).quantize(x) for s in (1, 1, 2))
    assert torch.equal(first["qjl_signs"], again["qjl_signs"])
    assert not torch.equal(first["qjl_signs"], other["qjl_signs"])


def test_calling_it_quantises():
    q, x = quantizer(bits=3), gaussian(20, D)
    assert torch.equal(q(x)["qjl_signs"], q.quantize(x)["qjl_signs"])


# --- shapes and bytes ---


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5), (0,)], ids=str)
def test_leading_shapes_are_kept(shape):
    q = quantizer(bits=3, qjl_dim=20)
    x = torch.randn(*shape, D, generator=torch.Generator().manual_seed(1))
    codes = q.quantize(x)
    assert codes["mse_indices"]["codes"].shape == (*shape, 4)
    assert codes["mse_indices"]["scale"].shape == shape
    assert codes["qjl_signs"].shape == (*shape, 3)
    assert codes["residual_norm"].shape == shape
    assert q.decode(codes).shape == q.dequantize(codes).shape == x.shape
    assert q.inner_product(x, codes).shape == shape


def test_queries_broadcast_with_the_quantised_vectors():
    q = quantizer(bits=3)
    x, queries = gaussian(6, D, seed=1).reshape(2, 3, D), gaussian(4, D, seed=2)
    codes = q.quantize(x)
    scores = q.inner_product(queries[:, None, None], codes)
    assert scores.shape == (4, 2, 3)
    one = q.inner_product(queries[3], q.quantize(x[1, 2]))
    torch.testing.assert_close(scores[3, 1, 2], one)


@pytest.mark.parametrize("qjl_dim", [None, 1, 20, 64])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16], ids=str)
def test_bytes_per_vector_are_the_bytes_of_the_tensors(qjl_dim, scale_dtype):
    q = quantizer(bits=3, qjl_dim=qjl_dim, scale_dtype=scale_dtype)
    codes = q.quantize(gaussian(10, D))
    signs, norm = codes["qjl_signs"], codes["residual_norm"]
    assert signs.dtype == torch.uint8
    assert signs.nbytes == 10 * -(-q.qjl_dim // 8)
    assert norm.dtype == scale_dtype
    tensors = (signs, norm, *codes["mse_indices"].values())
    assert sum(t.untyped_storage().nbytes() for t in tensors) == 10 * q.bytes_per_vector


def test_three_bits_at_128_take_52_bytes():
    assert quantizer(128, 3, scale_dtype=torch.float16).bytes_per_vector == 32 + 2 + 16 + 2


# --- hostile inputs ---


@projections
def test_zeros_give_zero(projection):
    q = quantizer(bits=3, projection=projection)
    codes = q.quantize(torch.zeros(2, D))
    assert torch.equal(q.inner_product(gaussian(2, D), codes), torch.zeros(2))


@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
def test_magnitudes_far_from_one_keep_the_relative_error(magnitude):
    q, x, queries = quantizer(bits=2), gaussian(20, D, seed=1), gaussian(20, D, seed=2)
    near = q.inner_product(queries, q.quantize(x))
    far = q.inner_product(queries, q.quantize(x * magnitude)) / magnitude
    torch.testing.assert_close(far, near, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floating_dtypes_are_coded_like_float32(dtype):
    q, x = quantizer(bits=3), gaussian(20, D).to(dtype)
    codes, expected = q.quantize(x), q.quantize(x.float())
    assert torch.equal(codes["qjl_signs"], expected["qjl_signs"])
    score = q.inner_product(x, codes)
    assert score.dtype == torch.float32
    torch.testing.assert_close(score, q.inner_product(x.float(), expected))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.full((2, D), float("nan")), ValueError, r"NaN or infinite, the first at \(0, 0\)"),
        (torch.ones(2, D, dtype=torch.int32), TypeError, "x has dtype torch.int32"),
        (torch.ones(2, D - 1), ValueError, f"last axis must hold {D} elements"),
    ],
    ids=["nan", "integers", "another-d"],
)
def test_impossible_vectors_are_refused(x, error, message):
    with pytest.raises(error, match=message):
        quantizer(bits=3).quantize(x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits is 1"),
        ({"bits": 9}, "bits is 9"),
        ({"bits": 2.5}, "bits is 2.5"),
        ({"qjl_dim": 0}, "qjl_dim is 0"),
        ({"qjl_dim": -3}, "qjl_dim is -3"),
        ({"projection": "sparse"}, "projection is 'sparse'; choose one of orthogonal"),
        ({"scale": "max"}, "scale is 'max'"),
        ({"d": 7}, "d is 7"),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if type(value) is dict else "",
)
def test_impossible_settings_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        RotorQuantProd(**{"d": D, "bits": 3, **options})
