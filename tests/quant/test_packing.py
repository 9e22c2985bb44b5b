"""Bit packing: round trips, byte counts, and the layout against a slow reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotorquant_hf.quant.packing import pack, packed_bytes, plane_bytes, planes, unpack

ALL_BITS = range(1, 9)


def random_codes(*shape, bits, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, shape, generator=generator)


def reference_pack(codes, bits):
    """Pack one list of codes, element by element, as the docstring of the module says."""
    packed, shift = [], 0
    for width in (w for w in (8, 4, 2, 1) if bits & w):
        size = math.ceil(len(codes) * width / 8)
        plane = [0] * size
        for j, code in enumerate(codes):
            field = (code >> shift) % 2**width
            plane[j % size] += field << (width * (j // size))
        packed += plane
        shift += width
    return packed


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    bits=st.sampled_from(ALL_BITS),
    d=st.integers(1, 600),
    shape=st.lists(st.integers(0, 4), max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpack_is_the_inverse_of_pack(bits, d, shape, seed):
    codes = random_codes(*shape, d, bits=bits, seed=seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape, packed_bytes(d, bits))
    unpacked = unpack(packed, bits, d)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked.long(), codes)


@pytest.mark.parametrize("bits", ALL_BITS)
@pytest.mark.parametrize("d", [1, 7, 8, 13, 80, 100, 128])
def test_the_layout_is_the_documented_one(bits, d):
    codes = random_codes(3, d, bits=bits)
    expected = [reference_pack(row, bits) for row in codes.tolist()]
    assert pack(codes, bits).tolist() == expected


def test_a_slot_of_all_bytes_is_a_contiguous_slice():
    # d = 16, 2 bits: 4 bytes; byte j holds the elements j, j + 4, j + 8, j + 12.
    codes = torch.zeros(16, dtype=torch.long)
    codes[4:8] = torch.tensor([1, 2, 3, 1])
    assert pack(codes, 2).tolist() == [1 << 2, 2 << 2, 3 << 2, 1 << 2]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64, torch.bool], ids=str)
def test_codes_of_any_integer_dtype_pack_alike(dtype):
    codes = random_codes(5, 20, bits=1)
    assert torch.equal(pack(codes.to(dtype), 1), pack(codes, 1))


@pytest.mark.parametrize(
    ("d", "bits", "expected"),
    [
        (128, 1, 16),
        (128, 2, 32),
        (128, 3, 48),
        (128, 4, 64),
        (128, 5, 80),
        (128, 6, 96),
        (128, 7, 112),
        (128, 8, 128),
        (80, 3, 30),
        (100, 3, 25 + 13),
        (1, 7, 3),
    ],
)
def test_byte_counts_are_exact(d, bits, expected):
    assert packed_bytes(d, bits) == expected
    assert pack(random_codes(d, bits=bits), bits).nbytes == expected


@pytest.mark.parametrize("bits", ALL_BITS)
def test_planes_are_descending_powers_of_two_that_sum_to_the_bits(bits):
    widths = planes(bits)
    assert sum(widths) == bits
    assert set(widths) <= {1, 2, 4, 8}
    assert list(widths) == sorted(set(widths), reverse=True)
    assert packed_bytes(77, bits) == sum(plane_bytes(77, width) for width in widths)


@pytest.mark.parametrize("wrong", [-1, 1])
def test_the_wrong_number_of_bytes_is_refused(wrong):
    packed = torch.zeros(2, 48 + wrong, dtype=torch.uint8)
    with pytest.raises(ValueError, match=rf"{48 + wrong} bytes .* 128 codes of 3 .* 48"):
        unpack(packed, 3, 128)


@pytest.mark.parametrize("bits", [0, 9])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        pack(torch.zeros(8, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"bits is {bits}"):
        packed_bytes(128, bits)
