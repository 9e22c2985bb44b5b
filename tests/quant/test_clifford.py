"""Cl(3,0): the axioms, rotors, and agreement with the independent library `clifford`."""

from types import SimpleNamespace

import pytest
import torch

from rotorquant_hf.quant.clifford import (
    GRADES,
    MV_DIM,
    embed_vectors_as_multivectors,
    exp_bivector,
    extract_vectors_from_multivectors,
    geometric_product,
    grade_projection,
    make_random_rotor,
    multivector_norm_sq,
    reverse,
    rotor_sandwich,
)

NAMES = ("", "e1", "e2", "e3", "e12", "e13", "e23", "e123")


def multivectors(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, MV_DIM, generator=generator, dtype=torch.float64).to(dtype)


def blade(name):
    return torch.eye(MV_DIM, dtype=torch.float64)[NAMES.index(name)]


def vectors(*shape, seed=0):
    return grade_projection(multivectors(*shape, seed=seed), 1)


def rotation_matrices(rotors):
    """(..., 3, 3): column j is the sandwich of e_(j+1)."""
    basis = torch.stack([blade(name) for name in ("e1", "e2", "e3")]).to(rotors.dtype)
    return rotor_sandwich(rotors.unsqueeze(-2), basis)[..., 1:4].transpose(-1, -2)


# --- the product ---


@pytest.mark.parametrize("i", [1, 2, 3])
@pytest.mark.parametrize("j", [1, 2, 3])
def test_basis_vectors_square_to_one_and_anticommute(i, j):
    ab = geometric_product(blade(f"e{i}"), blade(f"e{j}"))
    ba = geometric_product(blade(f"e{j}"), blade(f"e{i}"))
    if i == j:
        assert torch.equal(ab, blade(""))
    else:
        assert torch.equal(ab, -ba)
        assert torch.equal(ab if i < j else ba, blade(f"e{min(i, j)}{max(i, j)}"))


def test_the_trivector_is_the_product_of_the_three_basis_vectors():
    e12 = geometric_product(blade("e1"), blade("e2"))
    assert torch.equal(geometric_product(e12, blade("e3")), blade("e123"))


def test_the_product_is_associative():
    a, b, c = (multivectors(50, seed=seed) for seed in range(3))
    left = geometric_product(geometric_product(a, b), c)
    right = geometric_product(a, geometric_product(b, c))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_the_product_is_distributive():
    a, b, c = (multivectors(50, seed=seed) for seed in range(3))
    left = geometric_product(a, 2 * b - c)
    right = 2 * geometric_product(a, b) - geometric_product(a, c)
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_one_is_neutral():
    a = multivectors(50)
    assert torch.equal(geometric_product(a, blade("")), a)
    assert torch.equal(geometric_product(blade(""), a), a)


def test_reverse_turns_products_round_and_undoes_itself():
    a, b = multivectors(50, seed=1), multivectors(50, seed=2)
    left = reverse(geometric_product(a, b))
    torch.testing.assert_close(left, geometric_product(reverse(b), reverse(a)))
    assert torch.equal(reverse(reverse(a)), a)


def test_grade_projections_sum_to_the_identity_and_do_not_overlap():
    a = multivectors(50)
    parts = [grade_projection(a, grade) for grade in range(4)]
    assert torch.equal(sum(parts), a)
    for grade, part in enumerate(parts):
        assert torch.equal(grade_projection(part, grade), part)
        assert [bool(p) for p in part.any(dim=0)] == [g == grade for g in GRADES]


@pytest.mark.parametrize("grade", [-1, 4])
def test_an_unknown_grade_is_refused(grade):
    with pytest.raises(ValueError, match=f"grade is {grade}"):
        grade_projection(multivectors(), grade)


def test_norm_is_the_scalar_part_of_a_times_its_reverse():
    a = multivectors(50)
    scalar = geometric_product(a, reverse(a))[..., 0]
    torch.testing.assert_close(multivector_norm_sq(a), scalar)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes_are_kept(dtype):
    a, b = multivectors(20, seed=1, dtype=dtype), multivectors(20, seed=2, dtype=dtype)
    rotor = make_random_rotor((20,), seed=3, dtype=dtype)
    results = {
        "product": (geometric_product(a, b), geometric_product(a.double(), b.double())),
        "sandwich": (rotor_sandwich(rotor, a), rotor_sandwich(rotor.double(), a.double())),
        "exp": (exp_bivector(a), exp_bivector(a.double())),
    }
    for result, exact in results.values():
        assert result.dtype == dtype
        # A few rounding errors of numbers of the size of the largest term.
        bound = 8 * torch.finfo(dtype).eps * exact.abs().max()
        assert (result.double() - exact).abs().max() <= bound


def test_leading_shapes_broadcast():
    a, b = multivectors(4, 1, seed=1), multivectors(5, seed=2)
    product = geometric_product(a, b)
    assert product.shape == (4, 5, MV_DIM)
    for i in range(4):
        for j in range(5):
            torch.testing.assert_close(product[i, j], geometric_product(a[i, 0], b[j]))


# --- rotors ---


def test_exp_of_a_bivector_is_a_unit_rotor_and_equals_its_power_series():
    bivector = grade_projection(multivectors(50), 2)
    rotor = exp_bivector(bivector)
    series = term = blade("").expand(50, -1)
    for k in range(1, 60):
        term = geometric_product(term, bivector) / k
        series = series + term
    torch.testing.assert_close(rotor, series, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        geometric_product(rotor, reverse(rotor)), blade("").expand(50, -1), rtol=0, atol=1e-12
    )


def test_exp_reads_only_the_bivector_part_and_is_one_at_zero():
    a = multivectors(50)
    assert torch.equal(exp_bivector(a), exp_bivector(grade_projection(a, 2)))
    assert torch.equal(exp_bivector(torch.zeros(MV_DIM, dtype=torch.float64)), blade(""))


def test_the_sandwich_turns_by_the_angle_of_the_bivector():
    # exp(-B/2) with B = (pi/2) e12 takes e1 to e2.
    rotor = exp_bivector(-blade("e12") * torch.pi / 4)
    torch.testing.assert_close(rotor_sandwich(rotor, blade("e1")), blade("e2"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_sandwich_of_a_vector_is_a_vector(dtype):
    rotors = make_random_rotor((200,), seed=1, dtype=dtype)
    turned = rotor_sandwich(rotors, vectors(200).to(dtype))
    others = turned - grade_projection(turned, 1)
    assert others.abs().max() < 20 * torch.finfo(dtype).eps  # the trivector part among them


def test_the_sandwich_keeps_norm_and_orientation():
    rotors = make_random_rotor((200,), seed=1, dtype=torch.float64)
    v = vectors(200)
    turned = rotor_sandwich(rotors, v)
    torch.testing.assert_close(multivector_norm_sq(turned), multivector_norm_sq(v))
    matrices = rotation_matrices(rotors)
    eye = torch.eye(3, dtype=torch.float64).expand(200, 3, 3)
    torch.testing.assert_close(matrices @ matrices.mT, eye)
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(200, dtype=torch.float64))
    torch.testing.assert_close((matrices @ v[:, 1:4, None]).squeeze(-1), turned[:, 1:4])


def test_the_reverse_undoes_the_sandwich():
    rotors, v = make_random_rotor((50,), seed=1, dtype=torch.float64), vectors(50)
    back = rotor_sandwich(reverse(rotors), rotor_sandwich(rotors, v))
    torch.testing.assert_close(back, v)


def test_rotors_compose():
    r, s = (make_random_rotor((50,), seed=seed, dtype=torch.float64) for seed in (1, 2))
    together = rotor_sandwich(geometric_product(s, r), vectors(50))
    torch.testing.assert_close(together, rotor_sandwich(s, rotor_sandwich(r, vectors(50))))


def test_one_rotor_per_group_broadcasts_over_the_batch():
    rotors, v = make_random_rotor((5,), seed=1, dtype=torch.float64), vectors(7, 5)
    turned = rotor_sandwich(rotors, v)
    assert turned.shape == (7, 5, MV_DIM)
    torch.testing.assert_close(turned[3, 2], rotor_sandwich(rotors[2], v[3, 2]))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_random_rotors_are_even_unit_and_fixed_by_the_seed(shape):
    rotor = make_random_rotor(shape, seed=7)
    assert rotor.shape == (*shape, MV_DIM)
    assert rotor.dtype == torch.float32
    torch.testing.assert_close(multivector_norm_sq(rotor), torch.ones(shape))
    assert not rotor[..., [0, 4, 5, 6]].eq(0).any()
    assert not rotor[..., [1, 2, 3, 7]].any()
    assert torch.equal(rotor, make_random_rotor(shape, seed=7))
    assert not torch.equal(rotor, make_random_rotor(shape, seed=8))


def test_a_seed_leaves_the_global_generator_alone_and_none_draws_from_it():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    make_random_rotor(seed=7)
    assert torch.equal(torch.get_rng_state(), state)
    first = make_random_rotor()
    assert not torch.equal(first, make_random_rotor())
    torch.set_rng_state(state)
    assert torch.equal(make_random_rotor(), first)


def test_random_rotors_are_haar_distributed():
    n = 20_000
    matrices = rotation_matrices(make_random_rotor((n,), seed=1, dtype=torch.float64))
    # Under Haar an entry has mean 0 and variance 1/3, and the trace mean 0 and variance 1.
    assert matrices.mean(dim=0).abs().max() < 4.5 * (1 / 3 / n) ** 0.5
    trace = matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    assert abs(float(trace.square().mean()) - 1) < 0.05


# --- vectors in and out ---


@pytest.mark.parametrize("d", range(1, 11))
def test_embed_and_extract_are_inverse(d):
    x = torch.randn(2, 5, d, generator=torch.Generator().manual_seed(d))
    mv = embed_vectors_as_multivectors(x)
    assert mv.shape == (2, 5, -(-d // 3), MV_DIM)
    assert torch.equal(mv, grade_projection(mv, 1))
    assert torch.equal(mv[..., 1:4].flatten(-2)[..., d:], torch.zeros(2, 5, -d % 3))
    assert torch.equal(extract_vectors_from_multivectors(mv, d), x)


@pytest.mark.parametrize("d", [3, 7, 10])
def test_extracting_another_dimension_is_refused(d):
    mv = embed_vectors_as_multivectors(torch.ones(5))
    with pytest.raises(ValueError, match=f"do not hold vectors of {d} elements"):
        extract_vectors_from_multivectors(mv, d)


# --- the library `clifford` ---


@pytest.fixture(scope="module")
def library():
    """Conversions to and from `clifford`, by the names of the blades. Slow to import (numba)."""
    clifford = pytest.importorskip("clifford")
    layout, blades = clifford.Cl(3)

    def theirs(a):
        return sum(float(value) * blades[name] for value, name in zip(a, NAMES, strict=True))

    def ours(multivector):
        values = dict(zip(layout.names, multivector.value, strict=True))
        return torch.tensor([values[name] for name in NAMES], dtype=torch.float64)

    return SimpleNamespace(theirs=theirs, ours=ours)


def test_the_product_agrees_with_the_library(library):
    a, b = multivectors(20, seed=1), multivectors(20, seed=2)
    expected = [library.theirs(x) * library.theirs(y) for x, y in zip(a, b, strict=True)]
    expected = torch.stack([library.ours(m) for m in expected])
    torch.testing.assert_close(geometric_product(a, b), expected)


def test_the_reverse_agrees_with_the_library(library):
    a = multivectors(20)
    expected = torch.stack([library.ours(~library.theirs(x)) for x in a])
    torch.testing.assert_close(reverse(a), expected)


def test_exp_agrees_with_the_library(library):
    a = grade_projection(multivectors(20), 2)
    expected = torch.stack([library.ours(library.theirs(x).exp()) for x in a])
    torch.testing.assert_close(exp_bivector(a), expected, rtol=1e-9, atol=1e-9)


def test_the_sandwich_agrees_with_the_library(library):
    rotors = make_random_rotor((20,), seed=1, dtype=torch.float64)
    x = multivectors(20)
    pairs = [(library.theirs(r), library.theirs(v)) for r, v in zip(rotors, x, strict=True)]
    expected = torch.stack([library.ours(r * v * ~r) for r, v in pairs])
    torch.testing.assert_close(rotor_sandwich(rotors, x), expected)
