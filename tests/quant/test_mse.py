"""RotorQuantMSE: the table of errors, the scale rules, the packed codes, hostile inputs."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotorquant_hf.quant import SCALES, LloydMaxCodebook, RotorQuantMSE, make_rotation
from rotorquant_hf.quant.packing import packed_bytes, unpack
from tests.helpers.vectors import DISTRIBUTIONS, gaussian, relative_error

GAUSSIAN_ERROR = {2: 0.1175, 3: 0.0346, 4: 0.0095}
SEEDS = range(16)

make_rotation_once = functools.cache(make_rotation)

distributions = pytest.mark.parametrize("name", DISTRIBUTIONS)
scales = pytest.mark.parametrize("scale", SCALES)


def quantizer(d, bits, seed=42, **options):
    """A quantiser whose cascade is made once per (d, seed)."""
    options.setdefault("rotation", make_rotation_once(d, "cascade", None, seed))
    return RotorQuantMSE(d, bits, **options)


def mean_error(d, bits, name, *, vectors=256, **options):
    """The relative squared error, the mean over rotations and over which channels stand out."""
    errors = []
    for seed in SEEDS:
        x = DISTRIBUTIONS[name](vectors, d, seed)
        errors.append(relative_error(x, quantizer(d, bits, seed, **options)(x)[0]).mean())
    return float(torch.stack(errors).mean())


# --- the table of errors ---


@pytest.mark.parametrize("scale", ["norm", "least_squares"])
@pytest.mark.parametrize("bits", GAUSSIAN_ERROR)
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256])
@distributions
def test_the_cascade_is_as_good_on_every_input_as_on_gaussian_ones(name, d, bits, scale):
    error = mean_error(d, bits, name, scale=scale)
    assert 0.75 * GAUSSIAN_ERROR[bits] < error < 1.10 * GAUSSIAN_ERROR[bits]


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("gaussian", 0.033, 0.036),
        ("one_hot", 0.55, 0.64),
        ("two_outlier_channels", 0.25, 0.45),
        ("six_offset_channels", 0.12, 0.35),
        ("log_normal_channels", 0.25, 0.50),
    ],
)
def test_the_single_rotor_layer_of_the_reference_fails_on_all_but_gaussian_inputs(
    name, least, most
):
    errors = []
    for seed in SEEDS:
        # Seeds far apart: the rotors of one layer are seeded seed, seed + 1, ...
        reference = RotorQuantMSE(
            128, 3, seed=1000 * seed, rotation="rotors", rotor_layers=1, scale="norm"
        )
        x = DISTRIBUTIONS[name](256, 128, seed)
        errors.append(relative_error(x, reference(x)[0]).mean())
    error = float(torch.stack(errors).mean())
    print(f"one rotor layer, 3 bits, d = 128, {name}: {error:.3f}")
    assert least < error < most


@pytest.mark.parametrize("bits", range(1, 9))
def test_gaussian_error_is_the_distortion_of_the_codebook(bits):
    codebook = LloydMaxCodebook.for_dimension(256, bits)
    error = mean_error(256, bits, "gaussian", scale="norm")
    assert error == pytest.approx(codebook.distortion, rel=0.05)


# --- the rules for the scale ---


def all_scales(x, bits=3):
    """x_hat and scale under every rule."""
    results = {}
    for scale in SCALES:
        x_hat, codes = quantizer(x.shape[-1], bits, scale=scale)(x)
        results[scale] = x_hat, codes["scale"]
    return results


@distributions
def test_norm_stores_the_norm(name):
    x = DISTRIBUTIONS[name](200, 64)
    torch.testing.assert_close(all_scales(x)["norm"][1], x.norm(dim=-1), rtol=1e-5, atol=0)


@distributions
def test_matched_keeps_the_norm(name):
    x = DISTRIBUTIONS[name](200, 64)
    x_hat = all_scales(x)["matched"][0]
    torch.testing.assert_close(x_hat.norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)


@distributions
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_least_squares_has_the_least_error_of_every_vector(name, bits):
    x = DISTRIBUTIONS[name](200, 64)
    results = all_scales(x, bits)
    least = relative_error(x, results["least_squares"][0])
    for x_hat, _ in results.values():
        assert (least <= relative_error(x, x_hat) + 1e-6).all()
    assert (least < relative_error(x, results["norm"][0])).float().mean() > 0.9


@distributions
@pytest.mark.parametrize("bits", [1, 2, 3])
def test_unbiased_does_not_shrink(name, bits):
    x = DISTRIBUTIONS[name](200, 64)
    results = all_scales(x, bits)
    energy = x.square().sum(dim=-1)
    torch.testing.assert_close((x * results["unbiased"][0]).sum(dim=-1), energy, rtol=1e-5, atol=0)
    shrunk = (x * results["least_squares"][0]).sum(dim=-1)
    assert (shrunk < 0.9999 * energy).all()


def test_least_squares_is_the_default():
    x = gaussian(5, 64)
    assert quantizer(64, 3).scale == "least_squares"
    torch.testing.assert_close(quantizer(64, 3)(x)[0], all_scales(x)["least_squares"][0])


# --- the codes ---


@pytest.mark.parametrize("shape", [(64,), (7, 64), (2, 3, 5, 64), (0, 64), (2, 0, 64)], ids=str)
@scales
def test_leading_shapes_are_kept(shape, scale):
    q = quantizer(64, 3, scale=scale)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    x_hat, codes = q(x)
    assert x_hat.shape == x.shape
    assert x_hat.dtype == torch.float32
    assert codes["codes"].shape == (*shape[:-1], 24)
    assert codes["scale"].shape == shape[:-1]
    if x.numel():
        flat_hat, flat_codes = q(x.reshape(-1, 64))
        torch.testing.assert_close(flat_hat.reshape(shape), x_hat)
        assert torch.equal(flat_codes["codes"].reshape(codes["codes"].shape), codes["codes"])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("d", [9, 64, 100, 128])
def test_bytes_per_vector_are_the_bytes_of_the_tensors(d, bits, scale_dtype):
    q = quantizer(d, bits, scale_dtype=scale_dtype)
    _, codes = q(gaussian(10, d))
    assert set(codes) == {"codes", "scale"}
    assert codes["codes"].dtype == torch.uint8
    assert codes["scale"].dtype == scale_dtype
    assert codes["codes"].nbytes == 10 * packed_bytes(d, bits)
    assert sum(t.untyped_storage().nbytes() for t in codes.values()) == 10 * q.bytes_per_vector


@pytest.mark.parametrize(("bits", "ratio"), [(3, 5.1), (4, 3.87)])
def test_compression_against_bfloat16(bits, ratio):
    x = gaussian(100, 128).bfloat16()
    _, codes = quantizer(128, bits, scale_dtype=torch.float16)(x)
    assert x.nbytes / sum(t.untyped_storage().nbytes() for t in codes.values()) >= ratio


@scales
def test_the_parts_agree(scale):
    q, x = quantizer(64, 3, scale=scale), gaussian(20, 64)
    queries = gaussian(20, 64, seed=1)
    y_hat, codes = q.quantize(x)
    x_hat, _ = q(x)
    torch.testing.assert_close(q.decode(codes), y_hat)
    torch.testing.assert_close(q.dequantize(codes), x_hat)
    torch.testing.assert_close(q.rotation.rotate(x_hat), y_hat)
    scores = (q.rotation.rotate(queries) * y_hat).sum(dim=-1)
    torch.testing.assert_close(scores, (queries * x_hat).sum(dim=-1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_what_quantize_returns_has_the_rounding_of_the_stored_scale(scale_dtype):
    q, x = quantizer(64, 3, scale_dtype=scale_dtype), gaussian(20, 64)
    y_hat, codes = q.quantize(x)
    assert torch.equal(q.decode(codes), y_hat)


@distributions
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["cascade", "rotors"])
def test_codes_are_the_nearest_centroids_of_a_slow_reference(name, bits, kind):
    d = 31
    q, x = quantizer(d, bits, rotation=make_rotation_once(d, kind)), DISTRIBUTIONS[name](50, d)
    codebook = LloydMaxCodebook.of_integers(d, bits)
    x = x.double()
    unit = x / x.square().sum(dim=-1, keepdim=True).sqrt()
    y = torch.einsum("ij,nj->ni", q.rotation.matrix().double(), unit)
    nearest = (y.unsqueeze(-1) - codebook.centroids).abs().argmin(dim=-1)
    border = (y.unsqueeze(-1) - codebook.boundaries).abs().min(dim=-1).values

    index = unpack(q(x)[1]["codes"], bits, d).long()
    tie = border < 1e-6
    assert torch.equal(index[~tie], nearest[~tie])
    assert ((index - nearest).abs() <= 1).all()


def test_quantisers_of_one_seed_agree_and_of_two_seeds_differ():
    x = gaussian(20, 16)
    first, again, other = (RotorQuantMSE(16, 3, seed=s)(x)[1]["codes"] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("kind", ["cascade", "rotors"])
def test_the_kind_the_layers_and_the_seed_reach_the_rotation(kind):
    q = RotorQuantMSE(16, 3, seed=5, rotation=kind, rotor_layers=2)
    assert torch.equal(q.rotation.matrix(), make_rotation(16, kind, 2, seed=5).matrix())


def test_a_rotation_can_be_shared():
    rotation = make_rotation(16, seed=5)
    q = RotorQuantMSE(16, 3, rotation=rotation)
    assert q.rotation is rotation
    x = gaussian(20, 16)
    assert torch.equal(q(x)[0], RotorQuantMSE(16, 3, seed=5)(x)[0])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    power=st.integers(-40, 40),
    bits=st.integers(1, 8),
    scale=st.sampled_from(SCALES),
    name=st.sampled_from(sorted(DISTRIBUTIONS)),
    seed=st.integers(0, 1000),
)
def test_powers_of_two_change_the_scale_and_nothing_else(power, bits, scale, name, seed):
    q, x = quantizer(16, bits, scale=scale), DISTRIBUTIONS[name](8, 16, seed)
    _, codes = q(x)
    _, scaled = q(x * 2.0**power)
    assert torch.equal(scaled["codes"], codes["codes"])
    assert torch.equal(scaled["scale"], codes["scale"] * 2.0**power)


# --- bits per grade ---


def test_bits_of_the_vector_grade_are_the_bits():
    x = gaussian(20, 64)
    by_grade, plain = quantizer(64, 2, grade_bits={"vector": 4}), quantizer(64, 4)
    assert by_grade.bits == 4
    assert by_grade.bytes_per_vector == plain.bytes_per_vector
    assert torch.equal(by_grade(x)[0], plain(x)[0])


@pytest.mark.parametrize("grade", ["scalar", "bivector", "trivector"])
def test_bits_for_a_grade_that_is_zero_are_refused(grade):
    with pytest.raises(ValueError, match=f"{grade}, but a rotated vector has only"):
        quantizer(64, 3, grade_bits={"vector": 3, grade: 2})


@pytest.mark.parametrize("grade_bits", [{"quadvector": 2}, {}, {"vector": 3, "Vector": 3}], ids=str)
def test_an_unknown_grade_is_refused(grade_bits):
    with pytest.raises(ValueError, match="grade_bits is"):
        quantizer(64, 3, grade_bits=grade_bits)


# --- hostile inputs ---


@scales
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_zeros_stay_zeros(scale, bits):
    x = gaussian(3, 64)
    x[1] = 0
    x_hat, codes = quantizer(64, bits, scale=scale)(x)
    assert torch.equal(x_hat[1], torch.zeros(64))
    assert codes["scale"][1] == 0
    assert torch.isfinite(x_hat).all()
    assert (relative_error(x[::2], x_hat[::2]) < 0.8).all()  # the others are coded


@scales
@distributions
@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
def test_magnitudes_far_from_one_keep_the_relative_error(scale, name, magnitude):
    q, x = quantizer(64, 3, scale=scale), DISTRIBUTIONS[name](50, 64)
    error, far = relative_error(x, q(x)[0]), relative_error(x * magnitude, q(x * magnitude)[0])
    torch.testing.assert_close(far, error, rtol=0, atol=1e-4)


def test_vectors_of_all_magnitudes_share_a_batch():
    x = gaussian(5, 64)
    far = x * torch.tensor([1e-30, 1e-3, 1.0, 1e3, 1e30]).unsqueeze(-1)
    errors = [relative_error(v, quantizer(64, 3)(v)[0]) for v in (x, far)]
    torch.testing.assert_close(*errors, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floating_dtypes_are_coded_like_float32(dtype):
    q, x = quantizer(64, 3), gaussian(20, 64).to(dtype)
    x_hat, codes = q(x)
    expected_hat, expected = q(x.float())
    assert x_hat.dtype == torch.float32
    assert torch.equal(x_hat, expected_hat)
    assert torch.equal(codes["codes"], expected["codes"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_infinity_are_refused_with_their_position(value):
    x = gaussian(6, 64).reshape(2, 3, 64)
    x[1, 2, 5] = x[1, 2, 7] = value
    with pytest.raises(ValueError, match=r"2 entries .* \(1, 2, 5\) \(" + str(value)):
        quantizer(64, 3).quantize(x)


def test_float64_numbers_beyond_float32_are_refused():
    with pytest.raises(ValueError, match="x: 128 entries are"):
        quantizer(64, 3).quantize(gaussian(2, 64).double() * 1e300)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_integers_are_refused(dtype):
    with pytest.raises(TypeError, match=f"x has dtype {dtype}"):
        quantizer(64, 3).quantize(torch.ones(2, 64, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 63), (64, 1), (65,), ()], ids=str)
def test_another_last_axis_is_refused(shape):
    with pytest.raises(ValueError, match="last axis must hold 64 elements"):
        quantizer(64, 3).quantize(torch.ones(shape))


@scales
def test_a_norm_too_large_for_the_dtype_of_the_scale_is_refused(scale):
    q, x = quantizer(64, 3, scale=scale, scale_dtype=torch.float16), gaussian(3, 64)
    x[1] *= 1e5
    with pytest.raises(ValueError, match=r"too large for its scale in torch.float16"):
        q.quantize(x)
    x[1] /= 1e3
    assert torch.isfinite(q(x)[0]).all()


# --- what the constructor refuses ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits is 0"),
        ({"bits": 9}, "bits is 9"),
        ({"bits": 2.5}, "bits is 2.5"),
        ({"scale": "max"}, "scale is 'max'; choose one of norm"),
        ({"rotation": "none"}, "rotation is 'none'; choose one of cascade"),
        ({"d": 7}, "d is 7"),
        ({"d": 577}, "d is 577"),
        ({"rotor_layers": 0}, "layers is 0"),
        ({"rotation": "haar", "rotor_layers": 2}, "layers is 2"),
        ({"rotation": make_rotation(16)}, "vectors of 16 elements, not 64"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_impossible_settings_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        RotorQuantMSE(**{"d": 64, "bits": 3, **options})
