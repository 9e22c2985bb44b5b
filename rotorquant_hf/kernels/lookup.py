"""From packed bytes to centroids inside a kernel.

A row of codes is read as tiles of bytes, one per bit plane, with a column for every byte of the
widest plane (see `quant.packing`: slot k of byte j holds element j + k S). Element j + k S of a
narrower plane lies in another byte and slot; its byte is loaded at column j as well, so that
every slot k of a tile yields the codes of the contiguous elements [k S, (k + 1) S).

Centroids are those of N(0, 1) divided by `table_unit`, the same for every d; the factor
`table_unit` / sqrt(d) goes into the scores and the output. Up to 4 bits they are integers of 8 bits
divided by 64, which float16 holds exactly.

Two ways from code to centroid:

- portable: shift, mask, and a load from a table in memory (any width; also the interpreter).
- PTX, for 2, 3 and 4 bits: `prmt.b32` picks 4 bytes of an 8-byte table by the 4 nibbles of a
  word. Codes of four bytes are brought into nibble positions by shifts and masks of whole words.
  One `prmt` then finds four integers (`ptx_integers`: 0.8 instructions an element at 3 bits, 1.3
  at 4), or two find the upper and lower bytes of four float16 (`ptx_centroids`: 1.6 and 2.8), in
  place of about ten.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from rotorquant_hf.quant.lloyd_max import LloydMaxCodebook

NOTHING = tl.constexpr("and.b32 $0, $1, 0;")
PER_THREAD = tl.constexpr(
    "{.reg .b32 t; mov.u32 t, %lanemask_eq; popc.b32 t, t; add.u32 t, t, $1; sub.u32 $0, t, 1;}"
)
_CENTROID_OPERANDS = tl.constexpr("=r,=r" + ",r" * 19)
_INTEGER_OPERANDS = tl.constexpr("=r" + ",r" * 19)
_PAIR_OPERANDS = tl.constexpr("=r" + ",r" * 13)


@triton.constexpr_function
def plane_width(bits, i):
    """Width of plane `i` of a code, 0 where the code has fewer planes: `packing.planes`."""
    widths = ((1,), (2,), (2, 1), (4,), (4, 1), (4, 2), (4, 2, 1), (8,))[int(bits) - 1]
    return widths[int(i)] if int(i) < len(widths) else 0


@triton.constexpr_function
def slots(bits):
    """Slots of the widest plane: pieces that a tile of bytes yields."""
    return (8, 4, 4, 2, 2, 2, 2, 1)[int(bits) - 1]


def integers_of(d: int, bits: int) -> int:
    """Columns of a tile of codes, if their centroids can be looked up as integers; else 0."""
    return d // int(slots(bits)) if bits in (2, 3, 4) and d % 16 == 0 else 0


@triton.jit
def integer_column(o_e, S: tl.constexpr, BITS: tl.constexpr):
    """Where element `o_e` of a key is among all columns of `slot_integers`, slot by slot."""
    byte, slot = o_e % S, o_e // S
    # Which of the slots that are looked up together, and the first of them.
    other, pair = (slot, slot * 0) if BITS == 4 else (slot // 2, slot % 2)
    tile = 2 * pair + byte % 4 // 2
    return tile * S + byte // 4 * 4 + 2 * (byte % 2) + other


def pairs_of(d: int, bits: int) -> int:
    """Pairs of bytes of the widest plane of a row, where they can be looked up as such; else 0."""
    return d // (4 if bits == 4 else 8) if bits in (2, 3, 4) and d % 16 == 0 else 0


@functools.lru_cache(maxsize=8)
def table_unit(bits: int) -> float:
    """What centroids are divided by: 64 of the codebook's units, for less than 2; or else 2."""
    unit = LloydMaxCodebook.of_integers(1, bits).unit
    return 2.0 if unit is None else 64 * unit


def integer_unit(bits: int) -> float:
    """What centroids are divided by where they are integers, of 2, 3 or 4 bits."""
    return table_unit(bits) / 64


@functools.lru_cache(maxsize=64)
def centroid_table(bits: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(2**bits,) centroids in units of `table_unit`, float16 or float32."""
    codebook = LloydMaxCodebook.of_integers(1, bits)
    table = codebook.centroids / table_unit(bits)
    return (table if codebook.unit is None else (64 * table).round() / 64).to(dtype).to(device)


@functools.lru_cache(maxsize=64)
def ptx_words(bits: int, device: torch.device) -> Tensor:
    """(7,) int32: the bytes of the float16 table as `prmt.b32` wants them; see `ptx_centroids`.

    Then come 0 and 255, which are `upper_half` of a slot's first and second half, for `DIRECT`, and
    the upper bytes that `ptx_pairs` sets.
    """
    table = centroid_table(bits, torch.float16, torch.device("cpu"))
    halves = table.view(torch.int16).int() & 0xFFFF
    if bits == 4:  # magnitudes, shifted so that bit 14 is free for the sign
        halves = halves[8:] >> 1
    high, low = halves >> 8, halves & 0xFF
    return _table_words([_word(part[i : i + 4]) for part in (high, low) for i in (0, 4)], device)


@functools.lru_cache(maxsize=64)
def integer_words(bits: int, bias: int, device: torch.device) -> Tensor:
    """(7,) int32: the table of integers plus a bias for `ptx_integers`, of 2, 3 or 4 bits.

    The bias is 0 or 128. The last three words are those of `ptx_words`.
    """
    table = 64 * centroid_table(bits, torch.float64, torch.device("cpu"))
    entries = (table.int() + bias) & 0xFF
    return _table_words([_word(entries[i : i + 4]) for i in range(0, 16, 4)], device)


def _table_words(words: list[int], device: torch.device) -> Tensor:
    words = [*words, 0, 255, 0x64646464]
    return torch.tensor(words, dtype=torch.int64, device="cpu").to(torch.int32).to(device)


def _word(values: Tensor) -> int:
    word = sum(int(v) << (8 * i) for i, v in enumerate(values))
    return word - (1 << 32) if word >= 1 << 31 else word


@triton.jit
def load_planes(p_row, o_s, m_row, nothing, S: tl.constexpr, BITS: tl.constexpr):
    """The bytes of rows of codes, a tile (N, columns) per plane.

    Copies of 16 bytes, the widest, go past the first-level cache. Where the planes of two rows
    share a sector of 32 bytes, they would be fetched twice; and where a thread would get a whole
    row of a plane, the banks of shared memory conflict. There the compiler is not told that the
    rows are aligned to more than 8 bytes, and copies 8 at a time.

    Args:
        p_row: (N, 1) pointers to the rows. o_s: (columns,), S of them in use. m_row: (N, 1).
        nothing: 0, of which the compiler knows no more than that it is a number.
    """
    m = m_row & (o_s < S)[None, :]
    W0: tl.constexpr = plane_width(BITS, 0)
    p_plane = p_row + 8 * nothing if S <= 16 else p_row
    tiles = (tl.load(p_plane + o_s[None, :], mask=m, other=0),)  # [N, columns] of uint8
    W1: tl.constexpr = plane_width(BITS, 1)
    if W1 > 0:
        S1: tl.constexpr = S * W1 // W0
        p_plane = p_row + 8 * nothing if S * 8 // W0 * BITS // 8 % 32 != 0 else p_row
        tiles = tiles + (_narrow_plane(p_plane + S, o_s, m_row, S, S1),)  # noqa: RUF005
        W2: tl.constexpr = plane_width(BITS, 2)
        if W2 > 0:
            S2: tl.constexpr = S * W2 // W0
            tiles = tiles + (_narrow_plane(p_plane + S + S1, o_s, m_row, S, S2),)  # noqa: RUF005
    return tiles


@triton.jit
def _narrow_plane(p_plane, o_s, m_row, S: tl.constexpr, WIDTH: tl.constexpr):
    """A plane of WIDTH bytes a row, fewer than S: each byte at all columns that read it."""
    N: tl.constexpr = m_row.shape[0]
    if o_s.shape[0] == S:  # a power of 2, and so is WIDTH: each byte is loaded once
        tile = tl.load(p_plane + tl.arange(0, WIDTH)[None, :], mask=m_row, other=0)
        tile = tl.broadcast_to(tile[:, None, :], (N, S // WIDTH, WIDTH))
        return tl.reshape(tile, (N, S))
    else:
        m = m_row & (o_s < S)[None, :]
        return tl.load(p_plane + (o_s % WIDTH)[None, :], mask=m, other=0)


@triton.jit
def plane_field(
    tile, o_s, S: tl.constexpr, BITS: tl.constexpr, PLANE: tl.constexpr, k: tl.constexpr
):
    """The bits that `PLANE` gives to the codes of slot `k`, (N, columns) int32, from bit 0."""
    W0: tl.constexpr = plane_width(BITS, 0)
    W: tl.constexpr = plane_width(BITS, PLANE)
    shift = k * W0 + (o_s // (S * W // W0) * W)[None, :]
    return (tile.to(tl.int32) >> shift) & ((1 << W) - 1)


@triton.jit
def unpack_slot(tiles, o_s, S: tl.constexpr, BITS: tl.constexpr, k: tl.constexpr):
    """The codes of slot `k`, (N, columns) int32."""
    code = plane_field(tiles[0], o_s, S, BITS, 0, k)
    W0: tl.constexpr = plane_width(BITS, 0)
    W1: tl.constexpr = plane_width(BITS, 1)
    if W1 > 0:
        code |= plane_field(tiles[1], o_s, S, BITS, 1, k) << W0
        W2: tl.constexpr = plane_width(BITS, 2)
        if W2 > 0:
            code |= plane_field(tiles[2], o_s, S, BITS, 2, k) << (W0 + W1)
    return code


@triton.jit
def unknown_zero(x, PTX: tl.constexpr):
    """0, of which the compiler knows no more than that it is a number made of the number x."""
    if PTX:
        x = tl.inline_asm_elementwise(NOTHING, "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)
        return x
    else:
        return 0


@triton.jit
def load_table(
    p_table,
    p_words,
    o_s,
    S: tl.constexpr,
    BITS: tl.constexpr,
    PTX: tl.constexpr,
    DIRECT: tl.constexpr = False,
):
    """What `slot_centroids` looks up in: a pointer, or four words in registers and the columns.

    DIRECT: see there.
    """
    if PTX and (BITS == 2 or BITS == 3 or BITS == 4):
        o_w = tl.zeros([1, 1], tl.int32) if DIRECT else 0
        upper_half = p_words
        if BITS == 3:
            if DIRECT:
                upper_half = tl.load(p_words + 4 + o_s // (S // 2) % 2).to(tl.uint8)[None, :]
            else:
                upper_half = tl.where(o_s >= S // 2, 255, 0).to(tl.uint8)[None, :]
        table = (
            _per_thread(tl.load(p_words + o_w)),
            _per_thread(tl.load(p_words + o_w + 1)),
            _per_thread(tl.load(p_words + o_w + 2)),
            _per_thread(tl.load(p_words + o_w + 3)),
            upper_half,
        )
    else:
        table = (p_table, p_table, p_table, p_table, p_words)
    return table


@triton.jit
def _looked_up(tiles, table, BITS: tl.constexpr):
    """The operands of a look-up by PTX: bytes of both planes, `upper_half`, and four words."""
    if BITS == 3:
        return tiles[0], tiles[1], table[4], table[0], table[1], table[2], table[3]
    else:  # one plane: the second and `upper_half` are not read
        return tiles[0], tiles[0], tiles[0], table[0], table[1], table[2], table[3]


@triton.jit
def slot_centroids(
    tiles,
    o_s,
    table,
    S: tl.constexpr,
    BITS: tl.constexpr,
    k: tl.constexpr,
    PTX: tl.constexpr,
    DIRECT: tl.constexpr = False,
):
    """Centroids of the codes of slot `k`, (N, columns), in the dtype of the table.

    Columns beyond S hold the centroid of code 0: the operand they meet has zeros there, or they
    are not stored.

    DIRECT, the same as in `load_table`, is for the left operand of a product: the compiler may
    then look up in the registers in which the product wants it. It moves conversions of layout
    up to the loads, of which every input here must be one, and only through pure assembly.
    Without DIRECT the assembly is said to be impure, which stops the same search: what it finds
    behind the product's other operand are bytes, and it would order that operand for these.
    """
    if PTX and (BITS == 2 or BITS == 3 or BITS == 4):
        return tl.inline_asm_elementwise(
            ptx_centroids(BITS, k),
            _CENTROID_OPERANDS,
            _looked_up(tiles, table, BITS),
            dtype=tl.float16,
            is_pure=DIRECT,
            pack=4,
        )
    else:
        return tl.load(table[0] + unpack_slot(tiles, o_s, S, BITS, k))


@triton.jit
def slot_integers(tiles, table, BITS: tl.constexpr, pair: tl.constexpr, SECOND: tl.constexpr):
    """int8 centroids (N, columns) of slots `pair` and its other, each of half the columns.

    The other is two slots on, at 4 bits the next. The columns 4 c to 4 c + 3 hold the elements of
    bytes 4 c and 4 c + 1, with SECOND of 4 c + 2 and 4 c + 3: of each both slots' (see
    `integer_column`). Pure, as with `DIRECT` in `slot_centroids`.
    """
    return tl.inline_asm_elementwise(
        ptx_integers(BITS, pair, SECOND),
        _INTEGER_OPERANDS,
        _looked_up(tiles, table, BITS),
        dtype=tl.int8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def load_pairs(p_row, o_c, m_row, nothing, S: tl.constexpr, BITS: tl.constexpr):
    """The bytes of rows of codes by twos, a tile (columns, N) of uint16 per plane.

    Two or three planes; what is said of copies in `load_planes` holds here too. The shapes may
    be others that broadcast: those of parts of the tokens, (parts, columns, N), also turned,
    (parts, N, columns).

    Args:
        p_row: (1, N) pointers to the rows. o_c: (columns, 1), S / 2 of them in use. m_row: (1, N).
        nothing: as in `load_planes`.
    """
    W0: tl.constexpr = plane_width(BITS, 0)
    W1: tl.constexpr = plane_width(BITS, 1)
    p_pairs = p_row.to(tl.pointer_type(tl.uint16), bitcast=True)
    m = m_row & (o_c < S // 2)
    p_plane = p_pairs + 4 * nothing if S <= 16 else p_pairs
    tiles = (tl.load(p_plane + o_c, mask=m, other=0),)  # [columns, N]
    if W1 > 0:
        S1: tl.constexpr = S * W1 // W0 // 2
        p_plane = p_pairs + 4 * nothing if S * 8 // W0 * BITS // 8 % 32 != 0 else p_pairs
        narrow = tl.load(p_plane + S // 2 + o_c % S1, mask=m, other=0)
        tiles = tiles + (narrow,)  # noqa: RUF005
    return tiles


@triton.jit
def load_pair_table(p_words, o_c, S: tl.constexpr, BITS: tl.constexpr):
    """What `pair_centroids` looks up in: words in registers, and the columns of a slot.

    o_c: as in `load_pairs`.
    """
    o_w = tl.zeros([1, 1, 1] if len(o_c.shape) == 3 else [1, 1], tl.int32)
    upper_half = p_words
    if BITS == 3:
        upper_half = (tl.load(p_words + 4 + o_c // (S // 4) % 2) * 0x101).to(tl.uint16)
    return (
        _per_thread(tl.load(p_words + o_w)),
        _per_thread(tl.load(p_words + o_w + 1)),
        _per_thread(tl.load(p_words + o_w + 2)),
        _per_thread(tl.load(p_words + o_w + 3)),
        upper_half,
        _per_thread(tl.load(p_words + o_w + 6)),
    )


@triton.jit
def pair_centroids(tiles, table, BITS: tl.constexpr, k: tl.constexpr, SECOND: tl.constexpr):
    """Centroids of the codes of slot `k` in the first bytes of pairs, or in the second.

    Of 2, 3 and 4 bits, by PTX. float16 in the shape of the tiles: column c holds element
    2 c + SECOND of the slot. Pure, as with `DIRECT` in `slot_centroids`.
    """
    return tl.inline_asm_elementwise(
        ptx_pairs(BITS, k, SECOND),
        _PAIR_OPERANDS,
        _looked_up(tiles, table, BITS) + (table[5],),  # noqa: RUF005
        dtype=tl.float16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def slot_signs(tile, k: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """+1 or -1 by bit `k` of every byte of a tile."""
    if PTX:
        return tl.inline_asm_elementwise(
            ptx_signs(k), "=r,=r,r", [tile], dtype=tl.float16, is_pure=True, pack=4
        )
    else:
        return (((tile.to(tl.int32) >> k) & 1) * 2 - 1).to(DTYPE)


@triton.jit
def _per_thread(word):
    """`word`, in a register of every thread: a uniform register would be copied at every use."""
    return tl.inline_asm_elementwise(
        PER_THREAD,
        "=r,r",
        [word],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.constexpr_function
def ptx_centroids(bits, k):
    """PTX from four bytes of codes to their four float16 centroids of slot `k`.

    Operands: $0, $1 the results, two float16 each; $2 the bytes of the first plane; $3 of the
    second (3 bits) at their column modulo S / 2; $4 0xFF in the columns from S / 2 on; $5 and $9
    the upper bytes of the table's entries 0-3 and 4-7, $13 and $17 the lower bytes. (Scalars
    come once per element, hence the steps of four.)

    In each variant `n` first gets eight selectors, one per nibble: nibble 2 i + h belongs to byte
    i and to slot k of h = 0 or 1. The look-up of the low, then of the high 16 bits gives the
    bytes of four elements each, of which the wanted slot's two are put together.
    """
    bits, k = int(bits), int(k)
    if bits == 4:
        # Slot h is nibble h. The top bit says positive; the codebook is symmetric, so a negative
        # code counts magnitudes downwards: complement its low bits. In nibbles, t is 7 for
        # positive codes and 0 for negative ones, and lop3 0x82 is ~(code ^ t) & 7.
        select = """
            and.b32 t, $2, 0x88888888;
            shr.b32 n, t, 3;
            sub.u32 t, t, n;
            lop3.b32 n, $2, t, 0x77777777, 0x82;"""
        h, upper_code = k, "shr.b32 c, $2, 16;"
        # The sign. With the top bit of a selector set, `prmt` fills the byte with the sign bit
        # of the entry 0x80: 0xFF for positive codes; else it is the entry, 0x80. lop3 0xF2 is
        # a | (~t & 0x40): bit 14 of negative numbers, which the table keeps free. The last shift
        # brings it to bit 15, and the magnitudes, stored shifted down, to their place.
        sign = "prmt.b32 t, 0x80808080, 0x80808080, c; lop3.b32 a, a, t, 0x40404040, 0xF2;"
        first, last = "mov.b32 c, $2;", "shl.b32 OUT, OUT, 1;"
    else:
        h = k // 2
        select = _select_with_two_bits(bits, k % 2, "$2", "$3", "$4")
        upper_code, sign, first, last = "", "", "", ""
    # b has the lower bytes of four numbers and a (bytes 4 to 7 for `prmt`) their upper ones; the
    # wanted two are numbers 0 and 2 (h = 0), or 1 and 3.
    order = "0x7351" if h else "0x6240"
    look_up = f"""
            prmt.b32 a, $5, $9, n;
            prmt.b32 b, $13, $17, n;
            {sign}
            prmt.b32 OUT, b, a, {order};
            {last}"""
    return f"""{{
            .reg .b32 n, t, a, b, c;
            {first}{select}{look_up.replace("OUT", "$0")}
            shr.b32 n, n, 16;
            {upper_code}{look_up.replace("OUT", "$1")}
        }}"""


@triton.constexpr_function
def _select_with_two_bits(bits, odd, wide, narrow, upper_half):
    """PTX from the bytes of codes of 2 or 3 bits to `n`, the selectors of slots `odd` and two on.

    Slots k and k + 2 of the plane of 2 bits are nibbles 0 and 1 after a shift by 2 (k % 2).
    """
    move = f"shr.b32 n, {wide}, 2; and.b32 n, n, 0x33333333;"
    select = move if odd else f"and.b32 n, {wide}, 0x33333333;"
    if bits == 2:
        return select
    # The plane of 1 bit: columns from S / 2 on are one bit further up in their byte. lop3 0xD8 is
    # upper_half ? t : narrow, and 0xF8 is n | (t & 4): bit 2 of each selector.
    shift = "" if odd else "shl.b32 t, t, 2;"
    return f"""{select}
            shr.b32 t, {narrow}, 1;
            lop3.b32 t, {narrow}, t, {upper_half}, 0xD8;
            {shift}
            lop3.b32 n, n, t, 0x44444444, 0xF8;"""


@triton.constexpr_function
def ptx_integers(bits, pair, second):
    """PTX from four bytes of codes to four integers: of two bytes, slots `pair` and its other.

    Operands: $0 the result: its bytes are those of the first byte's two slots and of the second
    byte's, or with `second` of the third and the fourth. $1 to $3 as $2 to $4 in `ptx_centroids`;
    $4, $8, $12 and $16 the table's entries by fours.

    The selectors `n` are eight, as there, of which `prmt` takes the lower four.
    """
    bits, pair = int(bits), int(pair)
    down = "shr.b32 n, n, 16;" if second else ""
    if bits == 4:
        # Look up in both halves of the table, and choose by the code's top bit: `prmt` with the
        # top bit of a selector set fills a byte with a byte's sign, and the signs of `t` (slot 0)
        # and of the codes (slot 1) alternate. lop3 0xE4 is t ? b : a.
        signs = "0xFBEA" if second else "0xD9C8"
        return f"""{{
            .reg .b32 n, t, a, b;
            and.b32 n, $1, 0x77777777;
            {down}
            prmt.b32 a, $4, $8, n;
            prmt.b32 b, $12, $16, n;
            shl.b32 t, $1, 4;
            prmt.b32 t, t, $1, {signs};
            lop3.b32 $0, b, a, t, 0xE4;
        }}"""
    select = _select_with_two_bits(bits, pair, "$1", "$2", "$3")
    return f"""{{
            .reg .b32 n, t;
            {select}
            {down}
            prmt.b32 $0, $4, $8, n;
        }}"""


@triton.constexpr_function
def ptx_pairs(bits, k, second):
    """PTX from two pairs of bytes to the two float16 centroids of their first or second bytes.

    Operands: $0 the result; $1 and $2 the pairs of the first and the second plane, $3 0xFFFF in the
    columns of the upper half, $4, $6, $8 and $10 the table: otherwise as in `ptx_integers`, which
    gets the first bytes of both pairs below their second bytes, as `x` and `y`. The table has a
    bias of 128: 0x64 above a byte u is the float16 1024 + u, which times 1 / 64 and less 18 is the
    centroid. $12 is 0x64646464, from memory: with two constants in an instruction the assembler
    copies one into a register every time. The assembler drops what is not asked for, and finds what
    several slots have in common.
    """
    bits, k = int(bits), int(k)
    stride = 1 if bits == 4 else 2  # of the two slots that are looked up
    look_up = ptx_integers(bits, k % stride, second)
    names = {"$16": "#10", "$12": "#8", "$8": "#6", "$4": "#4", "$3": "#3", "$2": "y", "$1": "x"}
    for old, new in (names | {"$0": "z", "#": "$"}).items():  # `#` until all are replaced
        look_up = look_up.replace(old, new)
    narrow = "prmt.b32 y, $2, $2, 0x3120;" if bits == 3 else ""
    order = "0x4341" if k // stride else "0x4240"
    return f"""{{
            .reg .b32 x, y, z;
            prmt.b32 x, $1, $1, 0x3120;
            {narrow}
            {look_up}
            prmt.b32 z, z, $12, {order};
            mov.b32 x, 0x24002400;
            mov.b32 y, 0xCC80CC80;
            fma.rn.f16x2 $0, z, x, y;
        }}"""


@triton.constexpr_function
def ptx_signs(k):
    """PTX from four bytes to four float16 of +1 (bit `k` set: 0x3C00) or -1 (0xBC00)."""
    # The shift brings bit k to the top of its byte; lop3 0x6A is (t & 0x80) ^ 0xBC, the upper byte
    # of the float16; `prmt` puts a zero byte (number 4) under each.
    return f"""{{
            .reg .b32 t;
            shl.b32 t, $2, {7 - int(k)};
            lop3.b32 t, t, 0x80808080, 0xBCBCBCBC, 0x6A;
            prmt.b32 $0, t, 0, 0x1404;
            prmt.b32 $1, t, 0, 0x3424;
        }}"""
