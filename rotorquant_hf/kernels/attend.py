"""The attention kernel: softmax(q K^T) V over packed and full-precision tokens, in splits.

One program holds a tile of query rows of one kv head (all query heads of its group, all query
tokens) and walks over its share of the tokens; `combine` puts the shares together. The first
splits take the packed tokens, the last `exact_splits` those in full precision (sinks and recent
tokens).

A packed key's score is q~ . c s + offset and a packed value's contribution p s c, with centroids
c read by `lookup` and everything else outside the loop over elements (see `queries`, `combine`).
Tokens lie along the rows of a tile, so that few query rows (8 at least) fill the tensor cores.

The sums are kept in units of 2^top, where top is the largest base-2 logit plus the exponent of
the value's scale: p s then fits float16 whatever the unit of the values is, and its largest is
between 1 and 2.

Lengths are read from device memory, so that a CUDA graph replays the launch while they grow.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rotorquant_hf.kernels.lookup import (
    load_pair_table,
    load_pairs,
    load_planes,
    load_table,
    pair_centroids,
    slot_centroids,
    slot_integers,
    slot_signs,
    slots,
    unknown_zero,
)

NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2
_LOG2_E = tl.constexpr(1.4426950408889634)
_MIN_LOGIT = tl.constexpr(-3.0e38)
# A scale is 0 or at least 2^-24, the smallest float16.
_MIN_EXPONENT = tl.constexpr(-24)


# What changes with the length of the text is not specialised: a generation would stop to compile.
# The rows' strides and pointers are, where that lets the codes be read 16 bytes at a time.
@triton.jit(
    do_not_specialize=[
        *("rows", "from_end", "splits", "exact_splits", "stride_f", "stride_stats", "recent_slots"),
        *("stride_ksb", "stride_ksh", "stride_knb", "stride_knh", "stride_vsb", "stride_vsh"),
        *("stride_mb", "stride_mh", "stride_mn"),
    ],
    do_not_specialize_on_alignment=["p_kscale", "p_knorm", "p_vscale", "p_mask"],
)
def attend_kernel(
    # prepared queries and queries
    p_rotated,
    p_projected,
    p_factors,
    p_q,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    from_end,  # the first query is the from_end-th from the last token
    # mask (batch, query heads, n, tokens)
    p_mask,
    stride_mb,
    stride_mh,
    stride_mn,
    stride_mt,
    # partial results
    p_sums,
    p_stats,
    stride_stats,
    splits,
    exact_splits,
    # From here on what stays from step to step.
    # packed keys and values (batch, heads, capacity, ...), contiguous from the capacity on
    p_kcodes,
    stride_kcb,
    stride_kch,
    p_kscale,
    stride_ksb,
    stride_ksh,
    p_ksigns,
    stride_kgb,
    stride_kgh,
    p_knorm,
    stride_knb,
    stride_knh,
    p_vcodes,
    stride_vcb,
    stride_vch,
    p_vscale,
    stride_vsb,
    stride_vsh,
    # tokens in full precision
    p_sink_k,
    stride_skb,
    stride_skh,
    stride_skt,
    p_sink_v,
    stride_svb,
    stride_svh,
    stride_svt,
    p_recent_k,
    stride_rkb,
    stride_rkh,
    stride_rkt,
    p_recent_v,
    stride_rvb,
    stride_rvh,
    stride_rvt,
    recent_slots,
    # lengths: sinks, first packed row, packed tokens, first slot and number of the recent tokens
    p_lengths,
    stride_f,
    stride_digit,  # of the lower digits behind the upper ones, with INTEGERS
    scale,
    softcap,
    key_unit,
    sign_unit,
    heads,
    group,
    rows,
    # tables of the look-ups
    p_ktable,
    p_kwords,
    p_vtable,
    p_vwords,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    SIGNS: tl.constexpr,  # 0, or the number of projections of RotorQuantProd
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PTX: tl.constexpr,
    DIRECT: tl.constexpr,
    INTEGERS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT_N: tl.constexpr,
    EXACT_STAGES: tl.constexpr,
):
    """Grid: batch * kv heads, of each all splits, of each all tiles of query rows, in one axis.

    (The others end at 65,535.) Sizes of tiles are in brackets.
    """
    i_program, tiles = tl.program_id(0), tl.cdiv(rows, BLOCK_M)
    i_bh = (i_program // (tiles * splits)).to(tl.int64)  # offsets into long caches exceed 32 bits
    i_split = i_program // tiles % splits
    i_b, i_h = i_bh // heads, i_bh % heads
    # Row r is query r // group of head r % group of the group.
    o_r = i_program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    m_r = o_r < rows

    n_sinks = tl.load(p_lengths)
    packed_begin, n_packed = tl.load(p_lengths + 1), tl.load(p_lengths + 2)
    recent_begin, n_recent = tl.load(p_lengths + 3), tl.load(p_lengths + 4)
    # The last token that a row's query sees, and where its mask lies. [BLOCK_M]
    o_last = n_sinks + n_packed + n_recent - from_end + o_r // group
    p_mrow = p_mask + i_b * stride_mb + (i_h * group + o_r % group) * stride_mh
    p_mrow += (o_r // group).to(tl.int64) * stride_mn
    p_stat = p_stats + (i_bh * splits + i_split) * rows + o_r
    p_sum = p_sums + ((i_bh * splits + i_split) * rows + o_r[None, :]) * D_V  # [1, BLOCK_M]

    packed_splits = splits - exact_splits
    # Whole steps for each split; the last ones may be left without any token.
    if i_split < packed_splits:
        share = tl.cdiv(tl.cdiv(n_packed, packed_splits), BLOCK_N) * BLOCK_N
        top, mass = _packed_split(
            p_rotated + i_bh * rows * D_K,
            p_projected + i_bh * rows * SIGNS,
            p_factors + i_bh * rows,
            stride_f,
            p_kcodes + i_b * stride_kcb + i_h * stride_kch,
            p_kscale + i_b * stride_ksb + i_h * stride_ksh,
            p_ksigns + i_b * stride_kgb + i_h * stride_kgh,
            p_knorm + i_b * stride_knb + i_h * stride_knh,
            p_vcodes + i_b * stride_vcb + i_h * stride_vch,
            p_vscale + i_b * stride_vsb + i_h * stride_vsh,
            stride_digit,
            packed_begin,
            i_split * share,
            tl.minimum((i_split + 1) * share, n_packed),
            n_sinks,
            o_r,
            m_r,
            o_last,
            p_mrow,
            stride_mt,
            p_sum,
            scale,
            softcap,
            key_unit,
            sign_unit,
            p_ktable,
            p_kwords,
            p_vtable,
            p_vwords,
            D_K,
            D_V,
            K_BITS,
            V_BITS,
            SIGNS,
            MASK,
            CAUSAL,
            SOFTCAP,
            PTX,
            DIRECT,
            INTEGERS,
            PAIRS,
            BLOCK_M,
            BLOCK_N,
        )
    else:
        i_exact = i_split - packed_splits
        share = tl.cdiv(tl.cdiv(n_recent, exact_splits), EXACT_N) * EXACT_N
        top, mass = _full_precision_split(
            p_q + i_b * stride_qb + (i_h * group + o_r % group) * stride_qh,
            (o_r // group).to(tl.int64) * stride_qn,
            stride_qd,
            p_sink_k + i_b * stride_skb + i_h * stride_skh,
            stride_skt,
            p_sink_v + i_b * stride_svb + i_h * stride_svh,
            stride_svt,
            p_recent_k + i_b * stride_rkb + i_h * stride_rkh,
            stride_rkt,
            p_recent_v + i_b * stride_rvb + i_h * stride_rvh,
            stride_rvt,
            recent_slots,
            recent_begin,
            tl.where(i_exact == 0, n_sinks, 0),
            i_exact * share,
            tl.minimum((i_exact + 1) * share, n_recent),
            n_sinks + n_packed,
            m_r,
            o_last,
            p_mrow,
            stride_mt,
            p_sum,
            scale,
            softcap,
            D_K,
            D_V,
            MASK,
            CAUSAL,
            SOFTCAP,
            BLOCK_M,
            EXACT_N,
            EXACT_STAGES,
        )
    tl.store(p_stat, top, mask=m_r)
    tl.store(p_stat + stride_stats, mass, mask=m_r)


@triton.jit
def _packed_split(
    p_rotated,
    p_projected,
    p_factor,
    stride_f,
    p_kcodes,
    p_kscale,
    p_ksigns,
    p_knorm,
    p_vcodes,
    p_vscale,
    stride_digit,
    packed_begin,
    start,
    end,
    n_sinks,
    o_r,
    m_r,
    o_last,
    p_mrow,
    stride_mt,
    p_sum,
    scale,
    softcap,
    key_unit,
    sign_unit,
    p_ktable,
    p_kwords,
    p_vtable,
    p_vwords,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    SIGNS: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    PTX: tl.constexpr,
    DIRECT: tl.constexpr,
    INTEGERS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Attention over the packed tokens [start, end); stores the sums, returns top and mass.

    The elements of a vector come as KSLOTS (VSLOTS) slots of KS (VS) contiguous ones, as the
    look-ups yield them; in tile sizes KS, VS and SIGN_BYTES are padded to a power of 2, at least
    16. A product over a vector is thus a sum of products over its slots.
    """
    KSLOTS: tl.constexpr = slots(K_BITS)
    VSLOTS: tl.constexpr = slots(V_BITS)
    KS: tl.constexpr = D_K // KSLOTS
    VS: tl.constexpr = D_V // VSLOTS
    SIGN_BYTES: tl.constexpr = (SIGNS + 7) // 8
    # Bytes of a row, known to the compiler, which so sees how loads are aligned.
    K_ROW: tl.constexpr = D_K * K_BITS // 8
    V_ROW: tl.constexpr = D_V * V_BITS // 8
    o_ks = tl.arange(0, max(16, triton.next_power_of_2(KS)))  # [KS]
    o_vs = tl.arange(0, max(16, triton.next_power_of_2(VS)))  # [VS]
    o_sg = tl.arange(0, max(16, triton.next_power_of_2(SIGN_BYTES)))  # [SIGN_BYTES]
    DTYPE: tl.constexpr = p_vtable.dtype.element_ty
    nothing = unknown_zero(packed_begin, PTX)
    k_table = load_table(p_ktable, p_kwords, o_ks, KS, K_BITS, PTX, DIRECT)

    # One tile of the queries per slot, which the compiler keeps in shared memory through the whole
    # walk. Their padding is zero, so the padding of the centroids may be anything.
    p_row = p_rotated + o_r[None, :] * D_K + o_ks[:, None]  # [KS, BLOCK_M]
    m_q = m_r[None, :] & (o_ks < KS)[:, None]
    b_q = ()  # KSLOTS of [KS, BLOCK_M]; with INTEGERS the upper digits, and
    b_low = ()  # the lower ones
    for k in tl.static_range(KSLOTS):
        b_q = b_q + (tl.load(p_row + k * KS, mask=m_q, other=0),)  # noqa: RUF005
        if INTEGERS:
            b_digit = tl.load(p_row + k * KS + stride_digit, mask=m_q, other=0)
            b_low = b_low + (b_digit,)  # noqa: RUF005
    q_factor = tl.load(p_factor + o_r, mask=m_r, other=0) * key_unit  # [BLOCK_M]
    q_offset = tl.load(p_factor + 2 * stride_f + o_r, mask=m_r, other=0)  # [BLOCK_M], <q, mean>
    b_g = ()  # 8 of [SIGN_BYTES, BLOCK_M]: projected queries, by the bit that holds their sign
    g_factor = q_factor
    if SIGNS > 0:
        p_row = p_projected + o_r[None, :] * SIGNS + o_sg[:, None]
        for k in tl.static_range(8):
            m_g = (o_sg < SIGN_BYTES) & (o_sg + k * SIGN_BYTES < SIGNS)
            m_g = m_r[None, :] & m_g[:, None]
            b_g = b_g + (tl.load(p_row + k * SIGN_BYTES, mask=m_g, other=0),)  # noqa: RUF005
        g_factor = tl.load(p_factor + stride_f + o_r, mask=m_r, other=0) * sign_unit

    # Running softmax: the sums are in units of 2^top, and mass is the sum of 2^(logit - top).
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc = ()  # VSLOTS of [VS, BLOCK_M]; with PAIRS, two of half the rows in place of each
    # Several PAIRS have sums of their own, [PAIRS, VS / 2, BLOCK_M]. Where VS / 2 is eight or less,
    # too few for the rows of a product, the values are its RIGHT operand: [PAIRS, M_ROWS, 8].
    RIGHT: tl.constexpr = PAIRS > 0 and VS // 2 <= 8
    IN_PARTS: tl.constexpr = PAIRS > 1 or RIGHT
    M_ROWS: tl.constexpr = max(16, BLOCK_M)
    o_vc = tl.arange(0, 8 if RIGHT else max(16, triton.next_power_of_2(VS // 2)))
    o_pair = o_vc[:, None]
    if RIGHT:
        o_pair = o_vc[None, None, :]
    elif IN_PARTS:
        o_pair = o_vc[None, :, None]
    if PAIRS > 0:
        v_table = load_pair_table(p_vwords, o_pair, VS, V_BITS)
        for _ in tl.static_range(2 * VSLOTS):
            if RIGHT:
                acc = acc + (tl.zeros([PAIRS, M_ROWS, 8], tl.float32),)  # noqa: RUF005
            elif IN_PARTS:
                acc = acc + (tl.zeros([PAIRS, o_vc.shape[0], BLOCK_M], tl.float32),)  # noqa: RUF005
            else:
                acc = acc + (tl.zeros([o_vc.shape[0], BLOCK_M], tl.float32),)  # noqa: RUF005
    else:
        v_table = load_table(p_vtable, p_vwords, o_vs, VS, V_BITS, PTX)
        for _ in tl.static_range(VSLOTS):
            acc = acc + (tl.zeros([o_vs.shape[0], BLOCK_M], tl.float32),)  # noqa: RUF005

    # Scales come a step ahead: their loads are too narrow for the compiler to prefetch.
    o_n = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
    o_row = (packed_begin + o_n).to(tl.int64)
    next_scales = _scales(p_kscale, p_vscale, o_row, o_n < end)
    for t in range(start, end, BLOCK_N):
        o_n = t + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        o_row = (packed_begin + o_n).to(tl.int64)
        k_scale = next_scales.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        v_scale = (next_scales >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        m_next = o_n + BLOCK_N < end
        next_scales = _scales(p_kscale, p_vscale, o_row + BLOCK_N, m_next)

        # Scores. Each byte is loaded once, and every slot of it looked up in turn.
        p_code = p_kcodes + o_row * K_ROW
        # [BLOCK_N, KS] each
        tiles = load_planes(p_code[:, None], o_ks, m_n[:, None], nothing, KS, K_BITS)
        if INTEGERS:
            b_high = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            b_rest = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            for k in tl.static_range(KSLOTS):
                # [BLOCK_N, KS]
                b_c = slot_integers(tiles, k_table, K_BITS, k // 2, k % 2)
                b_high = tl.dot(b_c, b_q[k], b_high, out_dtype=tl.int32)
                b_rest = tl.dot(b_c, b_low[k], b_rest, out_dtype=tl.int32)
            b_s = (b_high * 256 + b_rest).to(tl.float32)
        else:
            b_s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for k in tl.static_range(KSLOTS):
                # [BLOCK_N, KS]
                b_c = slot_centroids(tiles, o_ks, k_table, KS, K_BITS, k, PTX, DIRECT)
                b_s = tl.dot(b_c, b_q[k], b_s, input_precision="tf32x3")
        # Scales multiply scores, not elements, of which there are D_K / BLOCK_M times more.
        b_s = b_s * q_factor[None, :] * k_scale[:, None] + q_offset[None, :]
        if SIGNS > 0:
            m_sign = m_n[:, None] & (o_sg < SIGN_BYTES)[None, :]
            p_sign = p_ksigns + (o_row * SIGN_BYTES)[:, None] + o_sg[None, :]
            b_bits = tl.load(p_sign, mask=m_sign, other=0)  # [BLOCK_N, SIGN_BYTES]
            b_e = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for k in tl.static_range(8):
                b_sign = slot_signs(b_bits, k, DTYPE, PTX)  # [BLOCK_N, SIGN_BYTES], +-1
                b_e = tl.dot(b_sign, b_g[k], b_e, input_precision="tf32x3")
            k_norm = tl.load(p_knorm + o_row, mask=m_n, other=0).to(tl.float32)
            b_s += b_e * g_factor[None, :] * k_norm[:, None]
        b_z = _logits(
            b_s,
            n_sinks + o_n,
            m_n,
            o_last,
            p_mrow,
            stride_mt,
            m_r,
            scale,
            softcap,
            MASK,
            CAUSAL,
            SOFTCAP,
        )

        # A value enters as p s, with its scale s = 2^e f, 1 <= f < 2 (f = 0 for s = 0), taken
        # apart by its bits. The exponent goes into the logit: in units of 2^top, b_p = p 2^e is
        # at most 1 and b_w = p s less than 2, so that float16 holds them for values of any
        # magnitude, even if it differs much between tokens.
        e = ((v_scale.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127
        e = tl.maximum(e, _MIN_EXPONENT)  # a scale of 0 must not hide its token's mass
        unit = ((127 - e) << 23).to(tl.float32, bitcast=True)  # 2^-e
        b_p, keep, top = _rescale(b_z + e.to(tl.float32)[:, None], top)  # [BLOCK_N, BLOCK_M]
        mass = mass * keep[None, :] + b_p * unit[:, None]  # p without 2^e
        b_w = (b_p * (v_scale * unit)[:, None]).to(DTYPE)

        p_code = p_vcodes + o_row * V_ROW
        new = ()
        if IN_PARTS:
            # Each warp has tokens of its own. Their indices are made anew: a reshape of those above
            # would end in codes that are not copied in the background.
            SHARE: tl.constexpr = BLOCK_N // PAIRS
            o_m = t + tl.arange(0, PAIRS)[:, None] * SHARE + tl.arange(0, SHARE)[None, :]
            o_m = o_m[:, :, None] if RIGHT else o_m[:, None, :]
            p_share = p_vcodes + (packed_begin + o_m).to(tl.int64) * V_ROW
            # [PAIRS, VS / 2, SHARE] each; with RIGHT [PAIRS, SHARE, VS / 2]
            tiles = load_pairs(p_share, o_pair, o_m < end, nothing, VS, V_BITS)
            b_w = tl.reshape(b_w, [PAIRS, SHARE, BLOCK_M])
            b_keep = keep[None, None, :]
            if RIGHT:
                b_w, b_keep = _as_rows(b_w), _as_rows(b_keep)
        elif PAIRS == 1:
            # [VS / 2, BLOCK_N] each
            tiles = load_pairs(p_code[None, :], o_pair, m_n[None, :], nothing, VS, V_BITS)
            b_keep = keep[None, :]
        if PAIRS > 0:
            for i in tl.static_range(2 * VSLOTS):
                b_c = pair_centroids(tiles, v_table, V_BITS, i // 2, i % 2)
                left, right = (b_w, b_c) if RIGHT else (b_c, b_w)
                new = new + (tl.dot(left, right, acc[i] * b_keep),)  # noqa: RUF005
        else:
            # [BLOCK_N, VS] each
            tiles = load_planes(p_code[:, None], o_vs, m_n[:, None], nothing, VS, V_BITS)
            for k in tl.static_range(VSLOTS):
                b_c = slot_centroids(tiles, o_vs, v_table, VS, V_BITS, k, PTX)  # [BLOCK_N, VS]
                b_o = tl.dot(tl.trans(b_c), b_w, acc[k] * keep[None, :], input_precision="tf32x3")
                new = new + (b_o,)  # noqa: RUF005
        acc = new

    if PAIRS > 0:
        m_o = m_r[None, :] & (o_vc < VS // 2)[:, None]
        for i in tl.static_range(2 * VSLOTS):
            b_o = acc[i]
            if RIGHT:
                b_o = tl.sum(tl.reshape(b_o, [PAIRS, M_ROWS // BLOCK_M, BLOCK_M, 8]), axis=1)
                b_o = tl.permute(b_o, [0, 2, 1])
            if IN_PARTS:
                b_o = tl.sum(b_o, axis=0)
            tl.store(p_sum + i // 2 * VS + i % 2 + 2 * o_vc[:, None], b_o, mask=m_o)
    else:
        m_o = m_r[None, :] & (o_vs < VS)[:, None]
        for k in tl.static_range(VSLOTS):
            tl.store(p_sum + k * VS + o_vs[:, None], acc[k], mask=m_o)
    return top, tl.sum(mass, axis=0)


@triton.jit
def _as_rows(b_x):
    """(A, N, M), M query rows, as (A, M, N); 8 of them with eight rows of zeros behind.

    A product takes its rows by the sixteen. Were that left to the compiler, it would copy the 8 in
    front of every product.
    """
    if b_x.shape[2] == 8:
        b_x = tl.permute(tl.join(b_x, tl.zeros_like(b_x)), [0, 3, 2, 1])
        return tl.reshape(b_x, [b_x.shape[0], 2 * b_x.shape[2], b_x.shape[3]])
    else:
        return tl.permute(b_x, [0, 2, 1])


@triton.jit
def _scales(p_kscale, p_vscale, o_row, m_n):
    """The scales of rows of keys (lower half) and values: words, which change layout at once."""
    k_scale = tl.load(p_kscale + o_row, mask=m_n, other=0).to(tl.int16, bitcast=True)
    v_scale = tl.load(p_vscale + o_row, mask=m_n, other=0).to(tl.int16, bitcast=True)
    return (k_scale.to(tl.int32) & 0xFFFF) | (v_scale.to(tl.int32) << 16)


@triton.jit
def _full_precision_split(
    p_q,
    o_q,
    stride_qd,
    p_sink_k,
    stride_sk,
    p_sink_v,
    stride_sv,
    p_recent_k,
    stride_rk,
    p_recent_v,
    stride_rv,
    recent_slots,
    recent_begin,
    sinks,
    start,
    end,
    before,
    m_r,
    o_last,
    p_mrow,
    stride_mt,
    p_sum,
    scale,
    softcap,
    D_K: tl.constexpr,
    D_V: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    EXACT_N: tl.constexpr,
    EXACT_STAGES: tl.constexpr,
):
    """Attention over sinks and recent tokens; stores the sums, returns top and mass.

    Over the first `sinks` sinks and the recent tokens [start, end), before which lie `before`
    others in the text.
    """
    # tf32 holds float16 and bfloat16 exactly, and three bits more of p than bfloat16 would.
    HALF: tl.constexpr = p_q.dtype.element_ty != tl.float32
    PRECISION: tl.constexpr = "tf32" if HALF else "tf32x3"
    o_dk = tl.arange(0, max(16, triton.next_power_of_2(D_K)))
    o_dv = tl.arange(0, max(16, triton.next_power_of_2(D_V)))
    m_q = m_r[None, :] & (o_dk < D_K)[:, None]
    p_x = (p_q + o_q)[None, :] + o_dk[:, None] * stride_qd
    b_q = tl.load(p_x, mask=m_q, other=0).to(tl.float32)  # [D_K, BLOCK_M]
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    mass = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([o_dv.shape[0], BLOCK_M], tl.float32)  # [D_V, BLOCK_M]
    # Two walks, as the parts lie in different tensors: the recent tokens in a ring.
    for part in tl.static_range(2):
        p_k, stride_k = (p_recent_k, stride_rk) if part else (p_sink_k, stride_sk)
        p_v, stride_v = (p_recent_v, stride_rv) if part else (p_sink_v, stride_sv)
        first, last = (start, end) if part else (0, sinks)
        for t in tl.range(first, last, EXACT_N, num_stages=EXACT_STAGES):
            o_n = t + tl.arange(0, EXACT_N)  # [EXACT_N]
            m_n = o_n < last
            o_slot = (recent_begin + o_n) % recent_slots if part else o_n
            o_slot = o_slot.to(tl.int64)[:, None]
            m_k = m_n[:, None] & (o_dk < D_K)[None, :]
            b_k = tl.load(p_k + o_slot * stride_k + o_dk[None, :], mask=m_k, other=0)
            b_s = tl.dot(b_k.to(tl.float32), b_q, input_precision=PRECISION)  # [EXACT_N, BLOCK_M]
            b_z = _logits(
                b_s,
                o_n + (before if part else 0),
                m_n,
                o_last,
                p_mrow,
                stride_mt,
                m_r,
                scale,
                softcap,
                MASK,
                CAUSAL,
                SOFTCAP,
            )
            b_p, keep, top = _rescale(b_z, top)
            if HALF:
                # To tf32, to the nearest: the product would cut it off, and the mass would not.
                b_p = (b_p.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
                b_p = b_p.to(tl.float32, bitcast=True)
            mass = mass * keep + tl.sum(b_p, axis=0)
            m_v = m_n[:, None] & (o_dv < D_V)[None, :]
            b_v = tl.load(p_v + o_slot * stride_v + o_dv[None, :], mask=m_v, other=0)
            b_v = tl.trans(b_v).to(tl.float32)  # [D_V, EXACT_N]
            acc = tl.dot(b_v, b_p, acc * keep[None, :], input_precision=PRECISION)
    tl.store(p_sum + o_dv[:, None], acc, mask=m_r[None, :] & (o_dv < D_V)[:, None])
    return top, mass


@triton.jit
def _logits(
    b_s,
    o_col,
    m_n,
    o_last,
    p_mrow,
    stride_mt,
    m_r,
    scale,
    softcap,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    SOFTCAP: tl.constexpr,
):
    """Base-2 logits (N, M) of the inner products `b_s`; -inf for what is not seen."""
    if SOFTCAP:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1)
        b_t = tl.exp2(b_s * (2 * scale / softcap * _LOG2_E))
        b_z = softcap * _LOG2_E * (1 - 2 / (b_t + 1))
    else:
        b_z = b_s * (scale * _LOG2_E)
    m_seen = m_n[:, None]
    if MASK != 0:
        p_tile = p_mrow[None, :] + o_col.to(tl.int64)[:, None] * stride_mt
        b_mask = tl.load(p_tile, mask=m_seen & m_r[None, :], other=0)
        if MASK == 1:
            m_seen = m_seen & (b_mask != 0)
        else:
            # The smallest float32, which masks are made of, must not become -inf in base 2: a row
            # that has nothing else is an average then, as elsewhere.
            b_mask = b_mask.to(tl.float32)
            b_z = tl.maximum(b_z + b_mask * _LOG2_E, _MIN_LOGIT)
            b_z = tl.where(b_mask == float("-inf"), float("-inf"), b_z)
    if CAUSAL:
        m_seen = m_seen & (o_col[:, None] <= o_last[None, :])
    return tl.where(m_seen, b_z, float("-inf"))


@triton.jit
def _rescale(b_z, top):
    """2^(z - new top) (N, M), the factor of what was summed before, and the new top, (M,).

    The step of the running softmax. As long as a row has seen no token, all its logits and its
    top are -inf, and -inf - -inf would be NaN: its base is 0 instead, so that its weights and
    its factor are 2^-inf = 0.
    """
    new = tl.maximum(top, tl.max(b_z, axis=0))  # [M]
    base = tl.where(new == float("-inf"), 0.0, new)
    return tl.exp2(b_z - base[None, :]), tl.exp2(top - base), new
