"""Rotations: orthogonal, fixed by their seed, and, but for the reference's, mixing everything."""

import functools

import pytest
import torch

from rotorquant_hf.quant.clifford import make_random_rotor, rotor_sandwich
from rotorquant_hf.quant.rotations import ROTATIONS, balanced_layers, make_rotation

DIMENSIONS = (8, 9, 10, 11, 16, 31, 64, 80, 96, 100, 112, 128, 192, 256, 576)
FEW_DIMENSIONS = (8, 31, 96, 128)

make_rotation_once = functools.cache(make_rotation)  # d = 576 takes most of a second

kinds = pytest.mark.parametrize("kind", ROTATIONS)
dimensions = pytest.mark.parametrize("d", DIMENSIONS)
few_dimensions = pytest.mark.parametrize("d", FEW_DIMENSIONS)


def vectors(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# --- every kind ---


@kinds
@dimensions
def test_the_matrix_is_orthogonal(kind, d):
    matrix = make_rotation_once(d, kind).matrix()
    assert matrix.shape == (d, d)
    assert matrix.dtype == torch.float32
    matrix = matrix.double()
    eye = torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-5)
    assert not torch.equal(matrix, eye)


@kinds
@dimensions
def test_unrotate_undoes_rotate_and_rotate_is_the_matrix(kind, d):
    rotation, x = make_rotation_once(d, kind), vectors(2, 5, d)
    y = rotation.rotate(x)
    assert y.shape == x.shape
    torch.testing.assert_close(rotation.unrotate(y), x, rtol=1e-4, atol=1e-5)
    expected = torch.einsum("ij,btj->bti", rotation.matrix().double(), x.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-5)


@kinds
@dimensions
def test_norms_and_inner_products_are_kept(kind, d):
    rotation = make_rotation_once(d, kind)
    x, y = vectors(20, d, seed=1), vectors(20, d, seed=2)
    both = rotation.rotate(x), rotation.rotate(y)
    torch.testing.assert_close(both[0].norm(dim=-1), x.norm(dim=-1), rtol=1e-5, atol=0)
    torch.testing.assert_close(both[0] @ both[1].T, x @ y.T, rtol=0, atol=1e-4)


@kinds
@few_dimensions
def test_the_seed_decides(kind, d):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = make_rotation(d, kind, seed=1).matrix()
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone
    torch.manual_seed(99)
    assert torch.equal(make_rotation(d, kind, seed=1).matrix(), first)
    assert not torch.equal(make_rotation(d, kind, seed=2).matrix(), first)


@kinds
def test_a_single_vector_and_no_vectors_keep_their_shape(kind):
    rotation = make_rotation(16, kind)
    x = vectors(3, 16)
    torch.testing.assert_close(rotation.rotate(x[1]), rotation.rotate(x)[1])
    assert rotation.rotate(x[:0]).shape == (0, 16)


@pytest.mark.parametrize(
    ("dtype", "result", "tolerance"),
    [
        (torch.float64, torch.float64, 1e-14),
        (torch.float32, torch.float32, 1e-5),
        (torch.bfloat16, torch.float32, 1e-5),
        (torch.float16, torch.float32, 1e-5),
    ],
    ids=str,
)
def test_vectors_are_turned_in_their_dtype_but_at_least_float32(dtype, result, tolerance):
    rotation, x = make_rotation(64), vectors(10, 64, dtype=dtype)
    y = rotation.rotate(x)
    assert y.dtype == rotation.unrotate(x).dtype == result
    exact = x.double() @ rotation.matrix().double().T
    assert (y.double() - exact).abs().max() <= tolerance


# --- rotor layers ---


def blocks_of(d):
    return [slice(i, min(i + 3, d)) for i in range(0, d, 3)]


@pytest.mark.parametrize("d", [9, 64, 128], ids=["no-tail", "tail-of-1", "tail-of-2"])
@pytest.mark.parametrize("seed", [0, 42])
def test_one_rotor_layer_is_the_seeded_rotors_on_the_triples(d, seed):
    matrix = make_rotation(d, "rotors", seed=seed).matrix().double()
    rest = matrix.clone()
    basis = torch.eye(8, dtype=torch.float64)[1:4]
    for i, block in enumerate(blocks_of(d)):
        size = len(range(*block.indices(d)))
        inside = matrix[block, block]
        if size == 3:
            rotor = make_random_rotor(seed=seed + i, dtype=torch.float64)
            expected = rotor_sandwich(rotor, basis)[:, 1:4].T
            torch.testing.assert_close(inside, expected, rtol=0, atol=1e-6)
        if size > 1:
            assert torch.linalg.det(inside) == pytest.approx(1, abs=1e-5)
        else:
            assert abs(float(inside)) == 1
        rest[block, block] = 0
    assert not rest.any()


@pytest.mark.parametrize("d", [10, 11], ids=["a-sign", "a-turn"])
def test_the_tail_of_a_rotor_layer_is_drawn_from_the_seed(d):
    tail = slice(9, d)
    tails = {
        float(make_rotation(d, "rotors", seed=s).matrix()[tail, tail][0, 0]) for s in range(20)
    }
    assert tails == {-1.0, 1.0} if d == 10 else len(tails) == 20


def test_two_rotor_layers_are_two_single_ones_with_a_stride_permutation_between():
    first, second = (make_rotation(9, "rotors", seed=seed) for seed in (5, 5 + 3))
    x = vectors(4, 9)
    expected = second.rotate(first.rotate(x)[:, [8, 0, 3, 6, 1, 4, 7, 2, 5]])
    torch.testing.assert_close(make_rotation(9, "rotors", 2, seed=5).rotate(x), expected)


@pytest.mark.parametrize("kind", ["cascade", "rotors"])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_each_layer_triples_the_reach_of_a_coordinate(kind, layers):
    matrix = make_rotation(128, kind, layers).matrix()
    reach = (matrix.abs() > 1e-7).sum(dim=1)
    assert reach.max() == 3**layers
    if layers > 1:
        assert reach.float().mean() > 3 ** (layers - 1)


@pytest.mark.parametrize("kind", ["cascade", "rotors"])
def test_rotor_layers_default_to_balanced_for_the_cascade_and_to_one_for_the_reference(kind):
    default = 6 if kind == "cascade" else 1
    matrix = make_rotation(128, kind).matrix()
    assert torch.equal(matrix, make_rotation(128, kind, default).matrix())
    assert not torch.equal(matrix, make_rotation(128, kind, default + 1).matrix())


@pytest.mark.parametrize(
    ("d", "layers"),
    [(8, 3), (9, 3), (10, 4), (27, 4), (28, 5), (64, 5), (80, 5), (128, 6), (256, 7), (576, 7)],
)
def test_balanced_layers_are_the_logarithm_and_one(d, layers):
    assert balanced_layers(d) == layers


# --- mixing ---


def test_one_cascade_layer_mixes_a_triple_as_evenly_as_possible():
    entries = make_rotation(9, "cascade", 1).matrix().abs()
    for block in blocks_of(9):
        expected = 2 / 3 * torch.ones(3, 3) - torch.eye(3) / 3
        torch.testing.assert_close(entries[block, block], expected)


@pytest.mark.parametrize(("d", "entry"), [(8, 0.5**0.5), (10, 1.0)], ids=["of-2", "of-1"])
def test_one_cascade_layer_mixes_a_tail_as_evenly_as_possible(d, entry):
    tail = blocks_of(d)[-1]
    entries = make_rotation(d, "cascade", 1).matrix().abs()[tail, tail]
    torch.testing.assert_close(entries, torch.full_like(entries, entry))


@pytest.mark.parametrize("d", [d for d in DIMENSIONS if d <= 128])
def test_every_coordinate_reaches_every_other_in_the_cascade(d):
    # An entry may cancel to 0 for one draw of the signs; one that is 0 for all is out of reach.
    entries = sum(make_rotation(d, seed=seed).matrix().abs() for seed in range(16)) / 16
    out_of_reach = int((entries < 0.05 / d**0.5).sum())
    # A tail of one number waits for a layer, which may leave it short of one last triple.
    assert out_of_reach <= (4 if d % 3 == 1 else 0)


@pytest.mark.parametrize("kind", ["cascade", "haar", "hadamard"])
@pytest.mark.parametrize("d", [64, 80, 96, 128, 256, 576])
def test_one_hot_energy_is_spread_over_all_coordinates(kind, d):
    matrix = make_rotation_once(d, kind).matrix()
    assert matrix.abs().max() < 5 / d**0.5
    # The share of coordinates that hold the energy: 1 if even, 1/3 for a Gaussian.
    participation = 1 / (d * matrix.pow(4).sum(dim=1))
    assert participation.min() > 0.15
    assert participation.mean() > 0.3


@pytest.mark.parametrize("d", [8, 64, 128, 256])
def test_hadamard_is_perfectly_even_at_powers_of_two(d):
    matrix = make_rotation(d, "hadamard").matrix()
    torch.testing.assert_close(matrix.abs(), torch.full((d, d), d**-0.5))


def test_haar_is_uniform():
    seeds, d = 400, 8
    matrices = torch.stack([make_rotation(d, "haar", seed=s).matrix() for s in range(seeds)])
    bound = 4.5 * (1 / d / seeds) ** 0.5  # an entry has mean 0 and variance 1/d
    assert matrices.mean(dim=0).abs().max() < bound
    assert abs(float(matrices.diagonal(dim1=-2, dim2=-1).mean())) < bound / d**0.5


# --- what is refused ---


@kinds
@pytest.mark.parametrize("d", [0, 7, 577])
def test_dimensions_out_of_range_are_refused(kind, d):
    with pytest.raises(ValueError, match=f"d is {d}"):
        make_rotation(d, kind)


@pytest.mark.parametrize("kind", ["identity", "", "Haar"])
def test_an_unknown_kind_is_refused(kind):
    with pytest.raises(ValueError, match=f"rotation is '{kind}'; choose one of cascade"):
        make_rotation(64, kind)


@pytest.mark.parametrize("kind", ["cascade", "rotors"])
@pytest.mark.parametrize("layers", [0, -1])
def test_fewer_than_one_layer_is_refused(kind, layers):
    with pytest.raises(ValueError, match=f"layers is {layers}"):
        make_rotation(64, kind, layers)


@pytest.mark.parametrize("kind", ["haar", "hadamard"])
def test_layers_of_a_rotation_without_layers_are_refused(kind):
    with pytest.raises(ValueError, match=f"layers is 2, but a '{kind}'"):
        make_rotation(64, kind, 2)
