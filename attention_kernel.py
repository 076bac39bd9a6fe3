"""Varlen FlashAttention in Triton: one function for the ViT, the decoder, generation and training.

In: q (Tq, H, E), k and v (Tk, G, E), all segments end to end without padding.  Out: (Tq, H, E).
Called by `vision.py` (bidirectional, one segment per picture or frame) and `model.py` (causal, one
segment per packed sample); calls nothing of the project.

The idea.  A packed row holds S independent sequences.  `cu_seqlens` (S + 1,) says where each one
starts, so segment s owns rows cu[s]:cu[s+1], and query i attends to the keys j of its own segment

    s_ij = scale * q_i . k_j     LSE_i = log sum_j exp s_ij     O_i = sum_j exp(s_ij - LSE_i) v_j

up to j <= last_key(i): all keys, or, if causal, those not after the query.  Queries stand at the
*last* keys of their segment (bottom-right), so a decoding step, which brings one query for many
cached keys, is the same call as a training step.  The cost is the sum of the squares of the segment
lengths: 8 documents of 512 cost an eighth of one of 4096.

FlashAttention never stores the (Tq, Tk) weights.  It walks over blocks of keys, keeping for every
query the largest score so far (m), the sum of exponentials (total) and of weighted values (acc):

    for each block of keys:
        s     = scale * q @ k.T                 new scores of the block
        m_new = max(m, max_j s)
        p     = exp(s - m_new)
        alpha = exp(m - m_new)                  what was summed so far was relative to the old m
        total = alpha * total + sum_j p
        acc   = alpha * acc + p @ v
    O = acc / total,  LSE = m + log total

Backward, from O, LSE and dO alone, recomputes p_ij = exp(s_ij - LSE_i) block by block:

    dv_j = sum_i p_ij dO_i        ds_ij = p_ij (dO_i . v_j - delta_i),  delta_i = dO_i . O_i
    dq_i = scale sum_j ds_ij k_j             dk_j = scale sum_i ds_ij q_i

dQ sums over keys and dK, dV over queries: two kernels, each sum owned by one program, hence no
atomics and the same bits on every run.

Shapes: T tokens in a packed row, S segments, H query heads, G key/value heads (H a multiple of G;
query head h reads key head h // (H / G)), E head width, L tokens of one segment.

The ladder, each step tested against the one before: `attention_reference` (the definition: dense,
any dtype, any device), `attention_tiled` (the loop above in PyTorch, forward and backward), the
kernels.  `flash_attn_varlen_func` is what the models call: the kernels on a GPU, PyTorch's own
attention segment by segment on a CPU.

Run `python attention_kernel.py`: prints errors against float64 beside those of PyTorch's attention.
`python -m benchmarks.attention` prints timings.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# ------------------------------------------------------------------ step 1: the dense definition


def segment_ids(cu_seqlens: Tensor) -> Tensor:
    """Segment number of every row, (T,) int64: cu_seqlens [0, 2, 5] -> [0, 0, 1, 1, 1]."""
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def packed_positions(cu_seqlens: Tensor) -> Tensor:
    """Position of every token in its segment, (T,): cu_seqlens [0, 2, 5] -> [0, 1, 0, 1, 2]."""
    segment = segment_ids(cu_seqlens)
    return torch.arange(len(segment), device=segment.device) - cu_seqlens[segment]


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None = None,
    causal: bool = False, return_lse: bool = False, q_positions: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, with the arguments of `flash_attn_varlen_func`: one dense (Tq, Tk) mask."""
    segment_q, segment_k = segment_ids(cu_seqlens_q), segment_ids(cu_seqlens_k)
    visible = segment_q[:, None] == segment_k[None, :]  # (Tq, Tk)
    if causal:
        position_k = packed_positions(cu_seqlens_k)
        if q_positions is None:  # bottom-right: the last query stands at the last key
            from_end = cu_seqlens_q[segment_q + 1] - torch.arange(len(q), device=q.device)
            q_positions = cu_seqlens_k.diff()[segment_q] - from_end
        visible &= position_k[None, :] <= q_positions[:, None]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))  # (Tk, H, E)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("qhe,khe->hqk", q, k) * scale  # (H, Tq, Tk)
    scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(dim=-1)  # (H, Tq), -inf where a query sees no key
    weights = (scores - lse.masked_fill(lse.isinf(), 0)[..., None]).exp()
    out = torch.einsum("hqk,khe->qhe", weights, v)
    return (out, lse) if return_lse else out


# ------------------------------------------------- step 2: the tiled loops, one head, one segment


def attention_tiled(q: Tensor, k: Tensor, v: Tensor, last_key: Tensor, scale: float,
                    block: int) -> tuple[Tensor, Tensor]:
    """The online-softmax loop for q (Lq, E), k, v (Lk, E): out (Lq, E) and LSE (Lq,).

    last_key: (Lq,) index of the last key each query sees, -1 for none.
    """
    m, total = q.new_full((len(q),), -math.inf), q.new_zeros(len(q))
    acc = torch.zeros_like(q)
    for start in range(0, len(k), block):
        keys = torch.arange(start, min(start + block, len(k)), device=k.device)
        s = (q @ k[keys].T * scale).masked_fill(keys > last_key[:, None], -math.inf)
        m_new = torch.maximum(m, s.amax(dim=1))
        shift = m_new.masked_fill(m_new.isinf(), 0)  # nothing seen yet: exp(-inf - 0) = 0, not NaN
        p, alpha = (s - shift[:, None]).exp(), (m - shift).exp()
        total = alpha * total + p.sum(dim=1)
        acc = alpha[:, None] * acc + p @ v[keys]
        m = m_new
    return acc / total.masked_fill(total == 0, 1)[:, None], m + total.log()


def attention_tiled_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, last_key: Tensor,
    scale: float, block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (Lq, E), dk and dv (Lk, E) from the gradient of out, the weights recomputed by block."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad * out).sum(dim=1)  # (Lq,)
    for start in range(0, len(k), block):
        keys = torch.arange(start, min(start + block, len(k)), device=k.device)
        p = (q @ k[keys].T * scale - lse[:, None]).exp()
        p = p.masked_fill(keys > last_key[:, None], 0)  # (Lq, block)
        ds = p * (grad @ v[keys].T - delta[:, None]) * scale
        dq += ds @ k[keys]
        dk[keys], dv[keys] = ds.T @ q, p.T @ grad
    return dq, dk, dv


# --------------------------------------------------------------------------- step 3: the kernels
#
# A program owns one tile: BLOCK_M query rows, or BLOCK_N keys, of one segment and one key head.
# The R = H / G query heads that read the same key head are stacked: row r of a segment is head
# r % R of the group at token r // R.  Keys are then loaded once for R heads, a short segment fills
# its last tile R times better, and the R rows of a decoding step are still one matrix product.
# Scores are kept in units of log 2 (exp2 is the instruction a GPU has), hence LOG2E.  Numbers that
# change with every row are not specialised on, or each new row would compile the kernels again.

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["tokens_q", "tokens_k", "segments", "slots"])
def tile_table_kernel(
    table,         # (N + 1, 2) int32, out: segment and first row of each tile; last, the verdict
    cu_seqlens,    # (S + 1,) of the side that is tiled
    cu_seqlens_q, cu_seqlens_k, tokens_q, tokens_k,  # what the verdict is about
    segments, slots,                                 # S, N
    ROWS: tl.constexpr,  # rows per token: R on the query side, 1 on the key side
    BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr,
):
    """List the tiles, those of long segments first; what is left of the table gets segment -1.

    Costly work handed out first leaves small pieces to even out the end; LAST_FIRST because under
    a causal mask the last queries cost most, but the first keys.  Program s places the tiles of
    segment s behind those of all longer segments; program S writes the rest and the verdict,
    whether cu_seqlens rise from 0 to the number of tokens on both sides.
    """
    segment = tl.program_id(0)
    index = tl.arange(0, 128)
    is_segment = segment < segments
    start = tl.load(cu_seqlens + segment)
    end = tl.load(cu_seqlens + segment + 1, mask=is_segment, other=0)
    own = tl.cdiv(tl.maximum(end - start, 0).to(tl.int32) * ROWS, BLOCK)
    own = tl.where(is_segment, own, -1)
    before = 0
    for first in range(0, segments, 128):
        other = first + index
        starts = tl.load(cu_seqlens + other, mask=other < segments, other=0)
        ends = tl.load(cu_seqlens + other + 1, mask=other < segments, other=0)
        tiles = tl.cdiv(tl.maximum(ends - starts, 0).to(tl.int32) * ROWS, BLOCK)
        ahead = (tiles > own) | ((tiles == own) & (other < segment))
        before += tl.sum(tl.where(ahead, tiles, 0))
    count = tl.where(is_segment, own, slots - before)
    for first in range(0, count, 128):
        tile = first + index
        row = (count - 1 - tile if LAST_FIRST else tile) * BLOCK
        slot = before + tile
        inside = (tile < count) & (slot >= 0) & (slot < slots)
        tl.store(table + 2 * slot, tl.where(is_segment, segment, -1), mask=inside)
        tl.store(table + 2 * slot + 1, row, mask=inside)
    if segment == segments:
        wrong = (tl.load(cu_seqlens_q) != 0) | (tl.load(cu_seqlens_q + segments) != tokens_q)
        wrong |= (tl.load(cu_seqlens_k) != 0) | (tl.load(cu_seqlens_k + segments) != tokens_k)
        wrong = wrong.to(tl.int32)
        for first in range(1, segments + 1, 128):
            at = tl.minimum(first + index, segments)
            falls = tl.load(cu_seqlens_q + at) < tl.load(cu_seqlens_q + at - 1)
            falls |= tl.load(cu_seqlens_k + at) < tl.load(cu_seqlens_k + at - 1)
            wrong += tl.sum(falls.to(tl.int32))
        tl.store(table + 2 * slots, (wrong == 0).to(tl.int32))


@triton.jit
def segment_bounds(cu_seqlens, segment):
    """First token and length of a segment."""
    first = tl.load(cu_seqlens + segment).to(tl.int32)
    return first, tl.load(cu_seqlens + segment + 1).to(tl.int32) - first


@triton.jit
def load_rows(x, place, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """A tile of (rows, BLOCK_E) at offsets `place`, zeros in the columns from E on."""
    if E < BLOCK_E:
        return tl.load(x + place, mask=(tl.arange(0, BLOCK_E) < E)[None, :], other=0.0)
    else:
        return tl.load(x + place)


@triton.jit
def query_rows(row, length_q, group, R: tl.constexpr):
    """Token and head of each row.  Rows behind the segment's end repeat its last token: no load
    masks rows."""
    return tl.minimum(row // R, length_q - 1), group * R + row % R


@triton.jit
def strided(first, token, head, of_token, of_head, BLOCK_E: tl.constexpr):
    """Offsets (rows, BLOCK_E) of rows in a tensor whose tokens and heads have these strides."""
    place = (first + token).to(tl.int64) * of_token + head.to(tl.int64) * of_head
    return place[:, None] + tl.arange(0, BLOCK_E)[None, :]


@triton.jit
def last_visible_key(token, q_positions, first_q, length_q, length_k,
                     CAUSAL: tl.constexpr, EXPLICIT: tl.constexpr):
    """Index in the segment of the last key that each token sees; negative: none.

    The one place that knows of masks.
    """
    if EXPLICIT:
        last = tl.load(q_positions + first_q + token).to(tl.int32)
    elif CAUSAL:
        last = token + (length_k - length_q)
    else:
        last = token * 0 + length_k
    return tl.minimum(last, length_k - 1)


@triton.jit
def load_keys(x, of_token, of_head, first_k, start, length_k, group, E: tl.constexpr,
              BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr, DESCRIPTORS: tl.constexpr,
              BOUNDARY: tl.constexpr):
    """Rows start:start + BLOCK_N of a segment's keys or values, (BLOCK_N, BLOCK_E).

    x is a pointer to (Tk, G, E), with its strides, or, with DESCRIPTORS, its tensor descriptor:
    Hopper's copy engine then fetches the tile and no register holds an address.  Rows behind the
    segment's end are the last row again; with DESCRIPTORS they belong to the next segment.  Their
    weights are zero, but zero times NaN is NaN: with BOUNDARY such foreign rows become zero.
    """
    index = start + tl.arange(0, BLOCK_N)
    if DESCRIPTORS:
        tile = x.load([first_k + start, group, 0]).reshape(BLOCK_N, BLOCK_E)
        if BOUNDARY:
            tile = tl.where((index < length_k)[:, None], tile, 0.0)
        return tile
    else:
        key = tl.minimum(index, length_k - 1)
        return load_rows(x, strided(first_k, key, group, of_token, of_head, BLOCK_E), E, BLOCK_E)


@triton.jit(do_not_specialize=["tokens_q", "split_keys"])
def forward_kernel(
    q, k, v,               # (Tq, H, E), (Tk, G, E), (Tk, G, E); k and v as `load_keys` wants them
    q_token, q_head, k_token, k_head, v_token, v_head,  # their strides, in numbers
    out,                   # (splits, Tq, H, E)
    lse,                   # (splits, H, Tq) float32
    cu_seqlens_q, cu_seqlens_k, q_positions,
    table,                 # tiles of BLOCK_M query rows
    tokens_q, split_keys,  # Tq, keys per split
    scale,                 # softmax scale * log2(e)
    R: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, EXPLICIT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):
    """Program (slot, group, split): a tile of queries against the keys of one split."""
    slot, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    groups = tl.num_programs(1)
    segment = tl.load(table + 2 * slot)
    if segment < 0:
        return
    first_q, length_q = segment_bounds(cu_seqlens_q, segment)
    first_k, length_k = segment_bounds(cu_seqlens_k, segment)
    row = tl.load(table + 2 * slot + 1) + tl.arange(0, BLOCK_M)
    token, head = query_rows(row, length_q, group, R)
    q_tile = load_rows(q, strided(first_q, token, head, q_token, q_head, BLOCK_E), E, BLOCK_E)
    last_key = last_visible_key(token, q_positions, first_q, length_q, length_k, CAUSAL, EXPLICIT)
    begin = split * split_keys
    end = tl.max(last_key) + 1
    if split < tl.num_programs(2) - 1:
        end = tl.minimum(end, begin + split_keys)
    whole = tl.maximum(tl.minimum(tl.min(last_key) + 1, end) - begin, 0)
    whole = begin + whole // BLOCK_N * BLOCK_N

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for MASKED in tl.static_range(2):  # first the blocks that every query sees, then the rest
        for start in range(whole if MASKED else begin, end if MASKED else whole, BLOCK_N):
            k_tile = load_keys(k, k_token, k_head, first_k, start, length_k, group, E, BLOCK_N,
                               BLOCK_E, DESCRIPTORS, False)
            s = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            if MASKED:
                key = start + tl.arange(0, BLOCK_N)
                s = tl.where(key[None, :] <= last_key[:, None], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * scale)
            shift = m_new
            if MASKED:  # a query that has seen no key yet: exp2(-inf - 0) = 0, not NaN
                shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s * scale - shift[:, None])
            alpha = tl.exp2(m - shift)
            total = alpha * total + tl.sum(p, 1)
            v_tile = load_keys(v, v_token, v_head, first_k, start, length_k, group, E, BLOCK_N,
                               BLOCK_E, DESCRIPTORS, MASKED)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
            m = m_new

    rows = tokens_q * groups * R
    place = strided(first_q, token, head, groups * R * E, E, BLOCK_E)
    statistic = head * tokens_q + first_q + token
    inside = (row < length_q * R)[:, None] & (tl.arange(0, BLOCK_E) < E)[None, :]
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out + split.to(tl.int64) * rows * E + place, acc, mask=inside)
    tl.store(lse + split * rows + statistic, (m + tl.log2(total)) / LOG2E, mask=row < length_q * R)


@triton.jit(do_not_specialize=["tokens_q"])
def dq_kernel(
    q, k, v,
    q_token, q_head, k_token, k_head, v_token, v_head,  # strides of these three
    out, grad,           # grad: of out
    lse,                 # (H, Tq) float32
    dq,                  # (Tq, H, E), out
    delta,               # (H, Tq) float32, out: `dkdv_kernel` needs it too
    cu_seqlens_q, cu_seqlens_k, q_positions, table, tokens_q, scale,
    R: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, EXPLICIT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):
    """Program (slot, group): a tile of queries over the keys they see, as in the forward pass."""
    slot, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    segment = tl.load(table + 2 * slot)
    if segment < 0:
        return
    first_q, length_q = segment_bounds(cu_seqlens_q, segment)
    first_k, length_k = segment_bounds(cu_seqlens_k, segment)
    row = tl.load(table + 2 * slot + 1) + tl.arange(0, BLOCK_M)
    token, head = query_rows(row, length_q, group, R)
    place = strided(first_q, token, head, groups * R * E, E, BLOCK_E)
    statistic = head * tokens_q + first_q + token
    q_tile = load_rows(q, strided(first_q, token, head, q_token, q_head, BLOCK_E), E, BLOCK_E)
    grad_tile = load_rows(grad, place, E, BLOCK_E)
    out_tile = load_rows(out, place, E, BLOCK_E)
    lse_row = tl.load(lse + statistic) * LOG2E
    delta_row = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    tl.store(delta + statistic, delta_row, mask=row < length_q * R)
    last_key = last_visible_key(token, q_positions, first_q, length_q, length_k, CAUSAL, EXPLICIT)
    end = tl.max(last_key) + 1
    whole = tl.maximum(tl.min(last_key) + 1, 0) // BLOCK_N * BLOCK_N

    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for MASKED in tl.static_range(2):
        for start in range(whole if MASKED else 0, end if MASKED else whole, BLOCK_N):
            k_tile = load_keys(k, k_token, k_head, first_k, start, length_k, group, E, BLOCK_N,
                               BLOCK_E, DESCRIPTORS, MASKED)
            v_tile = load_keys(v, v_token, v_head, first_k, start, length_k, group, E, BLOCK_N,
                               BLOCK_E, DESCRIPTORS, MASKED)
            s = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            p = tl.exp2(s * scale - lse_row[:, None])
            if MASKED:
                key = start + tl.arange(0, BLOCK_N)
                p = tl.where(key[None, :] <= last_key[:, None], p, 0.0)
            dp = tl.dot(grad_tile, v_tile.T, input_precision="ieee")
            ds = p * (dp - delta_row[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    inside = (row < length_q * R)[:, None] & (tl.arange(0, BLOCK_E) < E)[None, :]
    tl.store(dq + place, acc * (scale / LOG2E), mask=inside)


@triton.jit
def tokens_that_see(first, q_positions, first_q, length_q, length_k, BLOCK_M: tl.constexpr,
                    BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, EXPLICIT: tl.constexpr):
    """Of a tile of keys that begins at `first`: the token before which none sees a key of the tile,
    and the token from which on all see the whole of it."""
    begin, whole = 0, 0
    if EXPLICIT:
        # right for any order; in rising order, as ranks hold them, all blind tokens are skipped
        last = -1
        while (begin < length_q) & (last < first):
            token = tl.minimum(begin + tl.arange(0, BLOCK_M), length_q - 1)
            last = tl.max(last_visible_key(token, q_positions, first_q, length_q, length_k,
                                           CAUSAL, EXPLICIT))
            begin += tl.where(last < first, BLOCK_M, 0)
        whole = length_q
    elif CAUSAL:
        begin = tl.maximum(first + length_q - length_k, 0)
        whole = tl.minimum(first + BLOCK_N, length_k) - 1 + length_q - length_k
    return begin, whole


@triton.jit(do_not_specialize=["tokens_q"])
def dkdv_kernel(
    q, grad,       # (Tq, H, E) as pointers or, with DESCRIPTORS, as descriptors of R heads at once
    k, v,          # (Tk, G, E)
    q_token, q_head, k_token, k_head, v_token, v_head,  # strides of q, k and v
    lse, delta,    # (H, Tq) float32
    dk, dv,        # (Tk, G, E), out
    cu_seqlens_q, cu_seqlens_k, q_positions,
    table,         # tiles of BLOCK_N keys
    tokens_q, scale,
    R: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAUSAL: tl.constexpr, EXPLICIT: tl.constexpr, DESCRIPTORS: tl.constexpr,
):
    """Program (slot, group): a tile of keys over all rows (tokens x R heads) that see it."""
    slot, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    segment = tl.load(table + 2 * slot)
    if segment < 0:
        return
    first_q, length_q = segment_bounds(cu_seqlens_q, segment)
    first_k, length_k = segment_bounds(cu_seqlens_k, segment)
    first = tl.load(table + 2 * slot + 1)
    k_tile = load_keys(k, k_token, k_head, first_k, first, length_k, group, E, BLOCK_N, BLOCK_E,
                       False, False)
    v_tile = load_keys(v, v_token, v_head, first_k, first, length_k, group, E, BLOCK_N, BLOCK_E,
                       False, False)

    begin, whole = tokens_that_see(first, q_positions, first_q, length_q, length_k, BLOCK_M,
                                   BLOCK_N, CAUSAL, EXPLICIT)
    begin, end = begin * R, length_q * R
    whole = begin + tl.cdiv(tl.maximum(whole * R - begin, 0), BLOCK_M) * BLOCK_M
    key = first + tl.arange(0, BLOCK_N)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    # First the diagonal, then the rows that see it all.  Where rows come by descriptors, a last
    # block that reaches into the next segment is apart: its foreign rows become zero (load_keys).
    tail = end
    if DESCRIPTORS:
        tail = begin + (end - begin) // BLOCK_M * BLOCK_M
    for part in tl.static_range(3 if DESCRIPTORS else 2):
        from_row = begin if part == 0 else whole if part == 1 else tl.maximum(whole, tail)
        to_row = tl.minimum(whole, end) if part == 0 else tail if part == 1 else end
        for start in range(from_row, to_row, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            token, head = query_rows(row, length_q, group, R)
            statistic = head * tokens_q + first_q + token
            if DESCRIPTORS:
                corner = [first_q + start // R, group * R, 0]
                q_tile = q.load(corner).reshape(BLOCK_M, BLOCK_E)
                grad_tile = grad.load(corner).reshape(BLOCK_M, BLOCK_E)
                if part != 1:
                    q_tile = tl.where((row < end)[:, None], q_tile, 0.0)
                    grad_tile = tl.where((row < end)[:, None], grad_tile, 0.0)
            else:
                q_tile = load_rows(q, strided(first_q, token, head, q_token, q_head, BLOCK_E), E,
                                   BLOCK_E)
                place = strided(first_q, token, head, groups * R * E, E, BLOCK_E)
                grad_tile = load_rows(grad, place, E, BLOCK_E)
            # a row behind the segment's end belongs to another: its weight is exp2(s - inf) = 0
            lse_row = tl.load(lse + statistic, mask=row < length_q * R, other=float("inf")) * LOG2E
            delta_row = tl.load(delta + statistic)
            s = tl.dot(k_tile, q_tile.T, input_precision="ieee")  # (BLOCK_N, BLOCK_M): transposed
            p = tl.exp2(s * scale - lse_row[None, :])
            if part != 1:
                last_key = last_visible_key(token, q_positions, first_q, length_q, length_k,
                                            CAUSAL, EXPLICIT)
                p = tl.where(key[:, None] <= last_key[None, :], p, 0.0)
            dv_tile = tl.dot(p.to(grad_tile.dtype), grad_tile, dv_tile, input_precision="ieee")
            dp = tl.dot(v_tile, grad_tile.T, input_precision="ieee")
            ds = p * (dp - delta_row[None, :])
            dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")

    column = tl.arange(0, BLOCK_E)
    place = ((first_k + key).to(tl.int64) * groups + group)[:, None] * E + column[None, :]
    inside = (key < length_k)[:, None] & (column < E)[None, :]
    tl.store(dk + place, dk_tile * (scale / LOG2E), mask=inside)
    tl.store(dv + place, dv_tile, mask=inside)


# ---------------------------------------------------------------------------------- the launches


class Tile(NamedTuple):
    """A launch configuration: query rows and keys of a block, warps, stages of the pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


# (kernel, architecture) -> one for widths up to 64, one for widths up to 128.  Each compiles, not
# spilling registers in Triton 3.6 and 3.9 (`tests/compile_kernels.py` prints the table); which are
# the fastest only a GPU can tell.  Decoding has 16 rows, too few for Hopper's matrix instructions:
# it waits for memory.
TILES = {
    ("forward", "hopper"): (Tile(128, 64, 4, 3), Tile(128, 128, 8, 2)),
    ("forward", "ampere"): (Tile(128, 64, 8, 3), Tile(128, 32, 8, 3)),
    ("forward", "float32"): (Tile(16, 32, 4, 2), Tile(16, 32, 8, 1)),
    ("decode", "hopper"): (Tile(16, 128, 4, 3), Tile(16, 64, 4, 3)),
    ("decode", "ampere"): (Tile(16, 128, 4, 2), Tile(16, 64, 4, 2)),
    ("decode", "float32"): (Tile(16, 32, 4, 2), Tile(16, 32, 8, 1)),
    ("dq", "hopper"): (Tile(128, 64, 8, 2), Tile(128, 64, 8, 2)),
    ("dq", "ampere"): (Tile(128, 64, 8, 2), Tile(128, 32, 8, 2)),
    ("dq", "float32"): (Tile(16, 32, 4, 2), Tile(8, 32, 4, 2)),
    ("dkdv", "hopper"): (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2)),
    ("dkdv", "ampere"): (Tile(32, 128, 8, 2), Tile(64, 64, 8, 2)),
    ("dkdv", "float32"): (Tile(16, 32, 4, 1), Tile(16, 32, 8, 1)),
}
PROGRAMS_WANTED = 256  # about two for each of a large GPU's multiprocessors
SPLIT_KEYS = 256       # keys in a split, at least: shorter ones cost more to merge than they save


def compute_capability(device: torch.device) -> tuple[int, int]:
    """What a GPU can do, (8, 0) for sm_80; (0, 0) for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def has_copy_engine(x: Tensor) -> bool:
    """Hopper and B200 fetch tiles by tensor descriptors, and have 227 KiB for them.

    Older GPUs have no engine for it.  sm_120 (RTX 50) has one, but 99 KiB, too few for its tiles.
    """
    return compute_capability(x.device)[0] in (9, 10)


def architecture(x: Tensor) -> str:
    """Which column of TILES: full float32 products, a copy engine, or what all GPUs have."""
    if x.dtype == torch.float32:
        return "float32"
    return "hopper" if has_copy_engine(x) else "ampere"


def tile_for(kernel: str, target: str, width: int) -> Tile:
    return TILES[kernel, target][width > 64]


def readable(x: Tensor, descriptors: bool) -> Tensor:
    """x (T, heads, E) as it is; or a copy if it is to be described and its strides forbid that.

    The copy engine wants addresses divisible by 16, and heads that lie inside their token.
    """
    token, head, _ = x.stride()
    bytes_apart = (x.data_ptr(), token * x.element_size(), head * x.element_size())
    aligned = all(number % 16 == 0 for number in bytes_apart)
    nested = head >= x.shape[2] and token % head == 0 and token >= head * x.shape[1]
    if descriptors and not (aligned and nested):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def described(x: Tensor, rows: int, heads: int) -> TensorDescriptor:
    """Descriptor of x (T, heads, E) for tiles of rows x heads x E, E rounded up to a power of 2."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()),
                            [rows, heads, triton.next_power_of_2(x.shape[2])])


def strides(*tensors: Tensor) -> list[int]:
    """Strides of tokens and heads of each, in turn."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def tile_table(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, of_queries: bool,
               block: int) -> tuple[Tensor, int]:
    """Table of `tile_table_kernel` and its number of slots, enough for every layout.

    S segments waste at most block - 1 rows each, so nothing is read from the GPU to size the grid.
    """
    cu_seqlens, tokens = (cu_seqlens_q, len(q)) if of_queries else (cu_seqlens_k, len(k))
    rows, segments = q.shape[1] // k.shape[1] if of_queries else 1, len(cu_seqlens) - 1
    slots = max(1, (tokens * rows + segments * (block - 1)) // block)
    table = torch.empty(slots + 1, 2, dtype=torch.int32, device=q.device)
    tile_table_kernel[(segments + 1,)](
        table, cu_seqlens, cu_seqlens_q, cu_seqlens_k, len(q), len(k), segments, slots,
        ROWS=rows, BLOCK=block, LAST_FIRST=of_queries)
    return table, slots


def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, scale: float, causal: bool, q_positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out (Tq, H, E) and LSE (H, Tq) by `forward_kernel`.

    Where the tiles of queries are too few to fill a GPU (generation), the keys are split among
    several programs and their results merged by LSE.
    """
    (tokens, heads, width), groups, target = q.shape, k.shape[1], architecture(q)
    if tokens == 0 or len(k) == 0:
        return q.new_zeros(q.shape), q.new_full((heads, tokens), -math.inf, dtype=torch.float32)
    descriptors = target == "hopper"
    k, v = readable(k, descriptors), readable(v, descriptors)
    few = max_seqlen_q * (heads // groups) <= 16
    tile = tile_for("decode" if few else "forward", target, width)
    table, slots = tile_table(q, k, cu_seqlens_q, cu_seqlens_k, True, tile.BLOCK_M)
    torch.ops.aten._assert_async.msg(
        table[-1, 0], "cu_seqlens_q and cu_seqlens_k must rise from 0 to the number of tokens")
    splits = 1
    if few:
        splits = min(triton.cdiv(max_seqlen_k, SPLIT_KEYS), PROGRAMS_WANTED // (slots * groups))
        splits = max(splits, 1)
    split_keys = triton.cdiv(triton.cdiv(max_seqlen_k, splits), tile.BLOCK_N) * tile.BLOCK_N
    out = q.new_empty(splits, *q.shape, dtype=q.dtype if splits == 1 else torch.float32)
    lse = q.new_empty(splits, heads, tokens, dtype=torch.float32)
    forward_kernel[(slots, groups, splits)](
        q, *((described(x, tile.BLOCK_N, 1) for x in (k, v)) if descriptors else (k, v)),
        *strides(q, k, v), out, lse, cu_seqlens_q, cu_seqlens_k, q_positions, table, tokens,
        split_keys, scale * LOG2E.value,
        R=heads // groups, E=width, BLOCK_E=triton.next_power_of_2(width), CAUSAL=causal,
        EXPLICIT=q_positions is not None, DESCRIPTORS=descriptors, **tile._asdict())
    if splits == 1:
        return out[0], lse[0]
    total = lse.logsumexp(dim=0)  # (H, Tq)
    weights = (lse - total.masked_fill(total.isinf(), 0)).exp()  # (splits, H, Tq)
    return (out * weights.transpose(1, 2)[..., None]).sum(dim=0).to(q.dtype), total


def triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, scale: float, causal: bool, q_positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv: `dq_kernel` first, for it also finds delta, which `dkdv_kernel` reads."""
    (tokens, heads, width), groups, target = q.shape, k.shape[1], architecture(q)
    if tokens == 0 or len(k) == 0:
        return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    grad = readable(grad.contiguous(), target == "hopper")
    q, k, v = (readable(x, target == "hopper") for x in (q, k, v))
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    ratio = heads // groups
    common = {"R": ratio, "E": width, "BLOCK_E": triton.next_power_of_2(width), "CAUSAL": causal,
              "EXPLICIT": q_positions is not None}
    scale2 = scale * LOG2E.value

    tile, descriptors = tile_for("dq", target, width), target == "hopper"
    table, slots = tile_table(q, k, cu_seqlens_q, cu_seqlens_k, True, tile.BLOCK_M)
    dq_kernel[(slots, groups)](
        q, *((described(x, tile.BLOCK_N, 1) for x in (k, v)) if descriptors else (k, v)),
        *strides(q, k, v), out, grad, lse, dq, delta, cu_seqlens_q, cu_seqlens_k, q_positions,
        table, tokens, scale2, **common, DESCRIPTORS=descriptors, **tile._asdict())

    tile = tile_for("dkdv", target, width)
    # a described tile holds all heads of a group, so their number must be a power of 2
    descriptors = descriptors and ratio == triton.next_power_of_2(ratio) <= tile.BLOCK_M
    rows = tile.BLOCK_M // ratio
    table, slots = tile_table(q, k, cu_seqlens_q, cu_seqlens_k, False, tile.BLOCK_N)
    dkdv_kernel[(slots, groups)](
        *((described(x, rows, ratio) for x in (q, grad)) if descriptors else (q, grad)), k, v,
        *strides(q, k, v), lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, q_positions, table,
        tokens, scale2, **common, DESCRIPTORS=descriptors, **tile._asdict())
    return dq, dk, dv


# --------------------------------------------------------- without a GPU: PyTorch's own attention


def dense_calls(
    like: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool,
    q_positions: Tensor | None,
) -> Iterator[tuple[slice, slice, int, dict]]:
    """A packed row as calls of dense attention: rows of queries, of keys, segments, and the mask.

    Neighbouring segments of equal lengths (pictures of one size) are one call.  Of a segment with
    explicit positions each stretch of successive ones is a call, with the keys up to its last.
    """
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    calls = []  # first query, first key, segments, queries and keys of one, position of the first
    if q_positions is None:
        segment = 0
        lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist())
        for (length_q, length_k), run in itertools.groupby(lengths):
            calls.append((starts_q[segment], starts_k[segment], n := len(list(run)),
                          length_q, length_k, length_k - length_q))
            segment += n
    else:
        for first_q, end_q, first_k, end_k in zip(starts_q, starts_q[1:], starts_k, starts_k[1:]):
            positions = q_positions[first_q:end_q]
            for stretch in positions.tensor_split((positions.diff() != 1).nonzero()[:, 0] + 1):
                last = int(stretch[-1]) if len(stretch) else -1
                calls.append((first_q, first_k, 1, len(stretch), min(end_k - first_k, last + 1),
                              last + 1 - len(stretch)))
                first_q += len(stretch)
    for first_q, first_k, n, length_q, length_k, position in calls:
        if length_q == 0 or length_k <= 0:
            continue
        square = causal and position == 0 and length_q == length_k
        mask = None
        if causal and not square and position < length_k - 1:
            mask = torch.full((1, 1, length_q, length_k), -math.inf, dtype=like.dtype)
            mask = mask.triu(position + 1)
        yield (slice(first_q, first_q + n * length_q), slice(first_k, first_k + n * length_k), n,
               {"is_causal": square, "attn_mask": mask})


def sdpa_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, scale: float, causal: bool, q_positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `triton_forward`, by the CPU kernel behind `scaled_dot_product_attention`.

    One dense product with a mask is the obvious alternative; on 8 documents of 4,096 tokens in all
    it takes several times as long (`python attention_kernel.py` prints by how much).
    """
    out = q.new_zeros(q.shape)
    lse = q.new_full((q.shape[1], len(q)), -math.inf, dtype=lse_dtype(q))
    for rows_q, rows_k, n, mask in dense_calls(q, cu_seqlens_q, cu_seqlens_k, causal, q_positions):
        qs, ks, vs = (x[rows].unflatten(0, (n, -1)).transpose(1, 2)  # (n, heads, L, E)
                      for x, rows in ((q, rows_q), (k, rows_k), (v, rows_k)))
        found, found_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            qs, ks, vs, 0.0, mask["is_causal"], attn_mask=mask["attn_mask"], scale=scale)
        if mask["attn_mask"] is not None:  # it says 0 for a query that sees no key
            found_lse = found_lse.masked_fill(mask["attn_mask"].isneginf().all(dim=-1), -math.inf)
        out[rows_q] = found.transpose(1, 2).flatten(0, 1)
        lse[:, rows_q] = found_lse.transpose(0, 1).flatten(1)
    return out, lse


def sdpa_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, scale: float, causal: bool, q_positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by the same CPU kernel."""
    sums = torch.float32 if q.element_size() == 2 else q.dtype
    dq, dk, dv = q.new_zeros(q.shape), *(x.new_zeros(x.shape, dtype=sums) for x in (k, v))
    lse = lse.masked_fill(lse.isneginf(), 0)
    # the kernel would add up a group's heads in 16 bits: give each its own keys, add in float32
    copies = q.shape[1] // k.shape[1] if q.element_size() == 2 else 1
    for rows_q, rows_k, n, mask in dense_calls(q, cu_seqlens_q, cu_seqlens_k, causal, q_positions):
        grads, qs, ks, vs, outs = (
            x[rows].unflatten(0, (n, -1)).transpose(1, 2)
            for x, rows in ((grad, rows_q), (q, rows_q), (k, rows_k), (v, rows_k), (out, rows_q)))
        if copies > 1:
            ks, vs = ks.repeat_interleave(copies, dim=1), vs.repeat_interleave(copies, dim=1)
        lses = lse[:, rows_q].unflatten(1, (n, -1)).transpose(0, 1)  # (n, H, L)
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grads, qs, ks, vs, outs, lses, 0.0, mask["is_causal"], attn_mask=mask["attn_mask"],
            scale=scale)
        dqs, dks, dvs = (x.transpose(1, 2).flatten(0, 1) for x in found)  # (rows, heads, E)
        dq[rows_q] = dqs
        for whole, part in ((dk, dks), (dv, dvs)):
            whole[rows_k] += part if copies == 1 else (  # several stretches may share keys
                part.to(sums).unflatten(1, (-1, copies)).sum(dim=2))
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# ------------------------------------------------------------------------- the operator and its API


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def uses_kernels(q: Tensor) -> bool:
    """On a GPU always; on a CPU only in Triton's interpreter, which is for debugging: slow."""
    return q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


@torch.library.custom_op("llava::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, scale: float, causal: bool, q_positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` as an operator: `torch.compile` takes it as it is, unbroken."""
    if not q.is_cuda:  # on a GPU the forward pass checks them there, before its kernel runs
        check_cu_seqlens("q", cu_seqlens_q, len(q))
        check_cu_seqlens("k", cu_seqlens_k, len(k))
    forward = triton_forward if uses_kernels(q) else sdpa_forward
    with torch.cuda.device_of(q):
        return forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
                       causal, q_positions)


@torch.library.custom_op("llava::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, scale: float, causal: bool, q_positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    backward = triton_backward if uses_kernels(q) else sdpa_backward
    with torch.cuda.device_of(q):
        return backward(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, scale, causal,
                        q_positions)


@attention.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype(q))


@attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def save_for_backward(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, _, _, ctx.scale, ctx.causal, q_positions = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k, q_positions)


def backward_of_op(ctx: object, grad: Tensor, grad_lse: Tensor | None) -> tuple:
    *tensors, q_positions = ctx.saved_tensors
    return (*attention_backward(grad, *tensors, ctx.scale, ctx.causal, q_positions), *[None] * 7)


attention.register_autograd(backward_of_op, setup_context=save_for_backward)


def check_cu_seqlens(name: str, cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ValueError unless the segments cover the tokens; reads values, so on the CPU only."""
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens_{name} must rise from 0 to the {tokens} tokens of {name}, "
                         f"got {cu_seqlens.tolist()[:8]}...{cu_seqlens[-1]}")


def check_tensors(**arguments: object) -> None:
    """Raise ValueError naming an argument that is a list or the like."""
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, not a {type(x).__name__}")


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    softmax_scale: float | None, causal: bool, q_positions: Tensor | None,
) -> None:
    """Raise ValueError for what would otherwise read out of bounds or attend to the wrong keys."""
    check_tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k,
                  **({} if q_positions is None else {"q_positions": q_positions}))
    if not (q.dim() == k.dim() == v.dim() == 3) or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"need q (Tq, H, E) and k, v (Tk, G, E), got {tuple(q.shape)}, "
                         f"{tuple(k.shape)}, {tuple(v.shape)}")
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"attention runs on cpu and cuda, not on {q.device.type}")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    if uses_kernels(q):
        if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"the kernels take float32, float16 or bfloat16, not {q.dtype}")
        if q.shape[2] % 8 or not 16 <= q.shape[2] <= 128:
            raise ValueError(f"the kernels take head widths of 16 to 128 in steps of 8, "
                             f"not {q.shape[2]}")
    others = {"k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if q_positions is not None:
        others["q_positions"] = q_positions
        if not causal or q_positions.shape != q.shape[:1]:
            raise ValueError("q_positions needs causal=True and one position per query")
    for name, x in others.items():
        if x.device != q.device:
            raise ValueError(f"q is on {q.device}, but {name} on {x.device}")
        if x.dim() == 1 and (x.dtype not in (torch.int32, torch.int64) or not x.is_contiguous()):
            raise ValueError(f"{name} must be a contiguous vector of int32 or int64")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1:
            raise ValueError(f"the last dimension of {name} must be contiguous, its strides are "
                             f"{x.stride()}")
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape != cu_seqlens_k.shape or not len(cu_seqlens_q):
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be vectors of segments + 1 numbers, "
                         f"got {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}")
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}")


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None = None,
    causal: bool = False, return_lse: bool = False, q_positions: Tensor | None = None, *,
    dropout_p: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed segments; names and meanings are those of flash-attn's function.

    q: (Tq, H, E); k, v: (Tk, G, E), H a multiple of G; of any strides but of the last dimension.
    cu_seqlens_q, cu_seqlens_k: (S + 1,) int32 or int64, first row of each segment, then the total.
    max_seqlen_q, max_seqlen_k: longest segment, in tokens; decide on the launch, not the result.
    softmax_scale: factor on the scores, default E ** -0.5.
    causal: query i of a segment sees keys up to i + len_k - len_q (bottom-right alignment).
    q_positions: (Tq,) with causal=True: the query sees keys up to this position of its segment.
    dropout_p: 0 and nothing else; there is no dropout.  Pass what follows max_seqlen_k by name:
    flash-attn has dropout_p in front of softmax_scale.

    Returns out (Tq, H, E), and with return_lse the log-sum-exp of the scores, (H, Tq) float32 and
    without a gradient.  A query that sees no key gets 0 and -inf.  Raises ValueError on what does
    not fit together.  On a GPU the values of cu_seqlens are checked there, since looking at them
    here would stop the stream: an assertion ends the process before the kernel reads anything.
    """
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0, got {dropout_p}: there is no dropout")
    check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, q_positions)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
                         causal, q_positions)
    return (out, lse.detach()) if return_lse else out


# ------------------------------------------------------------------------------------------- errors


def random_row(lengths: list[int], heads: int, key_heads: int, width: int, dtype: torch.dtype,
               device: str, causal: bool) -> tuple[list[Tensor], dict]:
    """q, k, v of a packed row, and the other arguments of `flash_attn_varlen_func`."""
    qkv = [torch.randn(sum(lengths), n, width, device=device).to(dtype).requires_grad_()
           for n in (heads, key_heads, key_heads)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return qkv, {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens,
                 "max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths), "causal": causal}


def masked_sdpa(lengths: list[int], rest: dict) -> Callable[..., Tensor]:
    """The obvious way to pack: one dense product with a (T, T) mask."""
    segment = segment_ids(rest["cu_seqlens_q"])
    mask = segment[:, None] == segment[None, :]
    mask = mask.tril() if rest["causal"] else mask
    return lambda q, k, v: F.scaled_dot_product_attention(
        *(x.transpose(0, 1)[None] for x in (q, k, v)), attn_mask=mask, enable_gqa=True,
    )[0].transpose(0, 1)


def main() -> None:
    """Print root-mean-square errors against float64, beside one masked PyTorch product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    print(f"{f'rms error against float64, {device}':32}{'out':>10}{'dq':>10}{'dk':>10}{'dv':>10}")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        qkv, rest = random_row([1, 300, 40, 171], 8, 2, 64, dtype, device, causal=True)
        weight = torch.randn_like(qkv[0])
        exact = [x.detach().double().requires_grad_() for x in qkv]
        expected = attention_reference(*exact, **rest)
        expected = [expected, *torch.autograd.grad((expected * weight.double()).sum(), exact)]
        for name, attend in (("this file", functools.partial(flash_attn_varlen_func, **rest)),
                             ("masked SDPA", masked_sdpa([], rest))):
            out = attend(*qkv)
            found = [out, *torch.autograd.grad((out * weight).sum(), qkv)]
            errors = [(a.double() - b).square().mean().sqrt() for a, b in zip(found, expected)]
            print(f"{f'{name}, {dtype}':32}" + "".join(f"{e:10.1e}" for e in errors))


if __name__ == "__main__":
    main()
