"""The look-up of centroids in kernels: PTX by emulation, the portable way by the interpreter."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from rotorquant_hf.kernels import lookup
from rotorquant_hf.quant import LloydMaxCodebook
from rotorquant_hf.quant.packing import pack, packed_bytes, planes
from tests.emulator import inline
from tests.helpers.integer_columns import integer_columns

CPU = torch.device("cpu")


def test_plane_widths_are_those_of_the_packing():
    for bits in range(1, 9):
        widths = tuple(int(lookup.plane_width(bits, i)) for i in range(3))
        assert tuple(w for w in widths if w) == planes(bits)
        assert int(lookup.slots(bits)) == 8 // planes(bits)[0]


@pytest.mark.parametrize("bits", range(1, 9))
def test_tables_hold_the_codebook(bits):
    unit = lookup.table_unit(bits)
    exact = LloydMaxCodebook.of_integers(1, bits).centroids
    table = lookup.centroid_table(bits, torch.float32, CPU)
    torch.testing.assert_close(table.double() * unit, exact, rtol=1e-7, atol=0)
    half = lookup.centroid_table(bits, torch.float16, CPU).double()
    # Up to 4 bits exact; then to nearest, half a unit of the 11th bit.
    rounding = 1e-15 if bits <= 4 else 2.0**-11
    torch.testing.assert_close(half * unit, exact, rtol=rounding, atol=0)
    assert torch.equal(half, -half.flip(0))
    if bits <= 4:
        assert half.abs().max() < 2  # bit 14 is free for the sign at 4 bits


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_integers_are_the_centroids(bits):
    words = lookup.integer_words(bits, 0, CPU)
    integers = words[:4].view(torch.int8)[: 2**bits].double()
    exact = LloydMaxCodebook.of_integers(1, bits).centroids
    torch.testing.assert_close(integers * lookup.integer_unit(bits), exact, rtol=1e-15, atol=0)
    biased = lookup.integer_words(bits, 128, CPU)[:4].view(torch.uint8)[: 2**bits]
    assert torch.equal(biased.double(), integers + 128)


def _halves(words: list[int]) -> list[float]:
    return np.array(words, dtype=np.uint32).view(np.float16).tolist()


def _four_bytes(packed: list[int], column: int, size: int, bits: int) -> tuple[int, int, int]:
    """Words of four columns: of the first plane, of the second, and of its upper half."""
    columns = range(column, column + 4)
    first = sum(packed[j] << (8 * i) for i, j in enumerate(columns))
    if bits != 3:
        return first, first, first
    narrow = [packed[size + j % (size // 2)] for j in columns]
    second = sum(b << (8 * i) for i, b in enumerate(narrow))
    upper = sum((255 * (j >= size // 2)) << (8 * i) for i, j in enumerate(columns))
    return first, second, upper


@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ptx_finds_the_centroids_of_packed_codes(bits, d):
    """Every slot of every column, on codes packed by `packing.pack`."""
    generator = torch.Generator().manual_seed(bits * d)
    table = lookup.centroid_table(bits, torch.float16, CPU)
    words = [int(w) for w in lookup.ptx_words(bits, CPU)]
    tables = [w for w in words for _ in range(4)]
    slots = 8 // planes(bits)[0]
    size = d // slots
    seen = set()
    for _ in range(8):
        codes = torch.randint(0, 2**bits, (d,), generator=generator)
        packed = pack(codes, bits).tolist()
        for column in range(0, size, 4):
            operands = [*_four_bytes(packed, column, size, bits), *tables]
            for k in range(slots):
                assembly = str(lookup.ptx_centroids(bits, k))
                found = _halves(inline.run(assembly, operands, 2))
                wanted = codes[k * size + column :][:4]
                assert found == table[wanted].tolist()
                seen.update((k, int(code)) for code in wanted)
    assert len(seen) == slots * 2**bits


@pytest.mark.parametrize("d", [32, 64, 96, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ptx_finds_the_integers_of_packed_codes(bits, d):
    """Each element's at the column where the queries have the element."""
    generator = torch.Generator().manual_seed(bits * d)
    words = lookup.integer_words(bits, 0, CPU)
    integers = words[:4].view(torch.int8)
    tables = [int(w) for w in words for _ in range(4)]
    slots = 8 // planes(bits)[0]
    size = d // slots
    assert lookup.integers_of(d, bits) == size
    place = integer_columns(d, bits)
    assert place.sort().values.tolist() == list(range(d))
    for _ in range(8):
        codes = torch.randint(0, 2**bits, (d,), generator=generator)
        packed = pack(codes, bits).tolist()
        found = torch.zeros(d, dtype=torch.int8)
        for column in range(0, size, 4):
            operands = [*_four_bytes(packed, column, size, bits), *tables]
            for k in range(slots):
                assembly = str(lookup.ptx_integers(bits, k // 2, k % 2))
                (word,) = inline.run(assembly, operands, 1)
                found[k * size + column :][:4] = torch.from_numpy(np.uint32([word]).view(np.int8))
        assert torch.equal(found[place], integers[codes])


@pytest.mark.parametrize("d", [32, 64, 96, 128])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ptx_finds_the_centroids_of_pairs(bits, d):
    """Two tokens' codes of an element, wherever in a row it is."""
    generator = torch.Generator().manual_seed(bits * d)
    table = lookup.centroid_table(bits, torch.float16, CPU)
    words = lookup.integer_words(bits, 128, CPU)
    tables = [int(w) for w in (*words[:4], words[6]) for _ in range(2)]
    slots = 8 // planes(bits)[0]
    size = d // slots
    codes = torch.randint(0, 2**bits, (2, d), generator=generator)
    rows = pack(codes, bits).tolist()

    def pair(at):
        """Two bytes of one token below the same of the other."""
        return sum(row[at + i] << (8 * i + 16 * t) for t, row in enumerate(rows) for i in range(2))

    assert lookup.pairs_of(d, bits) == size // 2
    for column in range(size // 2):
        narrow = pair(size + 2 * column % (size // 2)) if bits == 3 else 0
        upper = 0xFFFFFFFF * (2 * column >= size // 2)
        for k in range(slots):
            for second in range(2):
                assembly = str(lookup.ptx_pairs(bits, k, second))
                found = _halves(inline.run(assembly, [pair(2 * column), narrow, upper, *tables], 1))
                assert found == table[codes[:, k * size + 2 * column + second]].tolist()


@pytest.mark.parametrize(("d", "bits"), [(128, 1), (128, 5), (128, 8), (88, 3), (8, 2)])
def test_what_is_not_looked_up_in_pairs(d, bits):
    assert lookup.pairs_of(d, bits) == 0


def test_ptx_signs():
    for word in (0, 0xFFFFFFFF, 0x12345678, 0x80FF01A5):
        for k in range(8):
            found = _halves(inline.run(str(lookup.ptx_signs(k)), [word], 2))
            assert found == [1.0 if word >> (8 * i + k) & 1 else -1.0 for i in range(4)]


def test_ptx_per_thread_is_the_identity():
    for word in (0, 1, 0x7FFFFFFF, 0xFFFFFFFF):
        for lane in range(32):
            assembly = lookup.PER_THREAD.value
            assert inline.run(assembly, [word], 1, lanemask_eq=1 << lane) == [word]


@triton.jit
def _unpack_kernel(p_codes, p_table, p_out, D: tl.constexpr, PAD: tl.constexpr, BITS: tl.constexpr):
    S: tl.constexpr = D // lookup.slots(BITS)
    o_s = tl.arange(0, PAD)
    i = tl.program_id(0)
    p_row = p_codes + i * (D * BITS // 8) + tl.zeros([1, 1], tl.int32)
    tiles = lookup.load_planes(p_row, o_s, tl.full([1, 1], 1, tl.int1), 0, S, BITS)
    table = lookup.load_table(p_table, p_table, o_s, S, BITS, False)
    for k in tl.static_range(lookup.slots(BITS)):
        b_c = lookup.slot_centroids(tiles, o_s, table, S, BITS, k, False)
        tl.store(p_out + i * D + k * S + o_s[None, :], b_c, mask=(o_s < S)[None, :])


@pytest.mark.parametrize("d", [8, 64, 80, 96, 128, 576])
@pytest.mark.parametrize("bits", range(1, 9))
def test_portable_look_up(bits, d):
    codes = torch.randint(0, 2**bits, (3, d))
    packed = pack(codes, bits)
    assert packed.shape[1] == packed_bytes(d, bits)
    table = lookup.centroid_table(bits, torch.float32, CPU)
    out = torch.full((3, d), torch.nan)
    size = d * planes(bits)[0] // 8
    _unpack_kernel[(3,)](packed, table, out, d, max(16, triton.next_power_of_2(size)), bits)
    assert torch.equal(out, table[codes])
