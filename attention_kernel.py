"""Varlen FlashAttention in Triton: one function for the ViT, the decoder, generation and training.

In: q (Tq, H, E), k and v (Tk, G, E), all segments end to end without padding.  Out: (Tq, H, E).
Called by `vision.py` (bidirectional, one segment per picture or frame), `model.py` (causal, one
segment per sample), `parallel.py` and `fp8_kernel.py`; calls nothing of the project.

The idea.  A packed row holds S independent segments.  `cu_seqlens` (S + 1,) says where they start:
segment s has the tokens cu[s]:cu[s+1].  Query i attends to the keys j of its own segment

    s_ij = scale * q_i . k_j     LSE_i = log sum_j exp s_ij     O_i = sum_j exp(s_ij - LSE_i) v_j

up to j <= last_key(i): the last key of the segment or, if causal, the key at the query's position.
Queries stand at the *last* keys of their segment (bottom-right), so a decoding step, one query for
many cached keys, is the same call as a training step.  The cost is the sum of the squared lengths
of the segments: 8 documents of 512 tokens cost an eighth of one of 4,096.

FlashAttention never stores the (Tq, Tk) weights.  It walks over blocks of keys and keeps for every
query the largest score so far (m), the sum of exponentials (total) and of weighted values (acc):

    for each block of keys:
        s     = scale * q @ k.T                 new scores of the block
        m_new = max(m, max_j s)
        p     = exp(s - m_new)
        alpha = exp(m - m_new)                  what was summed so far was relative to the old m
        total = alpha * total + sum_j p
        acc   = alpha * acc + p @ v
    O = acc / total,  LSE = m + log total

The backward pass knows O, LSE and dO and computes p_ij = exp(s_ij - LSE_i) again, block by block:

    dv_j = sum_i p_ij dO_i        ds_ij = p_ij (dO_i . v_j - delta_i),  delta_i = dO_i . O_i
    dq_i = scale sum_j ds_ij k_j             dk_j = scale sum_i ds_ij q_i

Why delta?  The weights of a query sum to 1, so the gradient of the softmax subtracts a mean:
sum_j p_ij dO_i . v_j.  This sum over all keys is dO_i . sum_j p_ij v_j = dO_i . O_i, a number known
before the loop.  dQ sums over keys, dK and dV sum over queries: two kernels.  One program owns each
sum, so there are no atomics, and every run gives the same bits.

Shapes: T tokens in a packed row, S segments, H query heads, G key/value heads (H a multiple of G;
query head h reads key head h // (H / G)), E head width, L tokens of one segment.
Steps 2 and 3 below are tested against step 1.  The models call
`flash_attn_varlen_func`: the kernels on a GPU, PyTorch's own attention on a CPU.

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
from triton.language import constexpr
from triton.tools.tensor_descriptor import TensorDescriptor

# ------------------------------------------------------------------ step 1: the dense definition

def segment_ids(cu_seqlens: Tensor) -> Tensor:
    """Segment number of every token, (T,) int64: cu_seqlens [0, 2, 5] -> [0, 0, 1, 1, 1]."""
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
        if q_positions is None:
            # bottom-right: the last query of a segment stands at its last key
            more_keys = cu_seqlens_k.diff() - cu_seqlens_q.diff()
            q_positions = packed_positions(cu_seqlens_q) + more_keys[segment_q]
        visible &= packed_positions(cu_seqlens_k)[None, :] <= q_positions[:, None]
    # every query head gets its own copy of its key head
    copies = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(copies, dim=1)  # (Tk, H, E)
    v = v.repeat_interleave(copies, dim=1)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    scores = torch.einsum("qhe,khe->hqk", q, k) * scale  # (H, Tq, Tk)
    scores = scores.masked_fill(~visible, -math.inf)
    lse = scores.logsumexp(dim=-1)  # (H, Tq), -inf where a query sees no key
    shift = lse.masked_fill(lse.isinf(), 0)
    weights = (scores - shift[..., None]).exp()
    out = torch.einsum("hqk,khe->qhe", weights, v)
    return (out, lse) if return_lse else out


# ------------------------------------------------- step 2: the tiled loops, one head, one segment

def attention_tiled(q: Tensor, k: Tensor, v: Tensor, last_key: Tensor, scale: float,
                    block: int) -> tuple[Tensor, Tensor]:
    """The online-softmax loop for q (Lq, E), k, v (Lk, E): out (Lq, E) and LSE (Lq,).  last_key
    (Lq,): index of the last key that each query sees, -1 for none."""
    m, total = q.new_full((len(q),), -math.inf), q.new_zeros(len(q))
    acc = torch.zeros_like(q)
    numbers = torch.arange(len(k), device=k.device)
    for begin in range(0, len(k), block):
        keys = numbers[begin:begin + block]
        s = q @ k[keys].T * scale
        s = s.masked_fill(keys > last_key[:, None], -math.inf)
        m_new = torch.maximum(m, s.amax(dim=1))
        # a query that has seen no key yet: exp(-inf - 0) = 0, not NaN
        shift = m_new.masked_fill(m_new.isinf(), 0)
        p = (s - shift[:, None]).exp()
        alpha = (m - shift).exp()
        total = alpha * total + p.sum(dim=1)
        acc = alpha[:, None] * acc + p @ v[keys]
        m = m_new
    return acc / total.masked_fill(total == 0, 1)[:, None], m + total.log()


def attention_tiled_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, last_key: Tensor,
    scale: float, block: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (Lq, E), dk and dv (Lk, E) from `grad`, the gradient of out."""
    dq = torch.zeros_like(q)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    delta = (grad * out).sum(dim=1)  # (Lq,)
    numbers = torch.arange(len(k), device=k.device)
    for begin in range(0, len(k), block):
        keys = numbers[begin:begin + block]
        # LSE already holds the maximum and the sum: no online softmax this time
        s = q @ k[keys].T * scale
        p = (s - lse[:, None]).exp()
        p = p.masked_fill(keys > last_key[:, None], 0)  # (Lq, block)
        dp = grad @ v[keys].T
        ds = p * (dp - delta[:, None]) * scale
        dq += ds @ k[keys]
        dk[keys] = ds.T @ q
        dv[keys] = p.T @ grad
    return dq, dk, dv


# --------------------------------------------------------------------------- step 3: the kernels
# A program owns one tile: BLOCK_M tile rows of queries, or BLOCK_N keys, of one segment and one key
# head.  The R = H / G query heads that share this key head are stacked in the tile.  Tile row
# `q_row` of a segment is token q_row // R and head q_row % R of those R.  For R = 2, key head g:
#     q_row     0      1      2      3      4      5    ...
#     token     0      0      1      1      2      2
#     head     2g   2g+1     2g   2g+1     2g   2g+1
# Keys are then loaded once for R heads, a short segment fills its last tile R times better, and the
# R tile rows of a decoding step are still one matrix product.
#
# A causal mask makes three sorts of blocks.  Here the tile of queries 8 to 11 (R = 1) walks over
# blocks of 4 keys; # is a visible key, . a masked one:
#     keys        0-3    4-7    8-11     12-15
#     query  8    ####   ####   #...
#     query  9    ####   ####   ##..
#     query 10    ####   ####   ###.
#     query 11    ####   ####   ####
#                 full   full   masked   not visited
# The loop takes the full blocks first (up to key full_end = 8) and spends nothing on a mask there,
# then the masked ones (up to end_key = 12).  `dkdv_kernel` reads the picture by columns: keys 8 to
# 11 meet their masked block of queries first, then full blocks from full_begin on.
# It computes S transposed, S^T = K Q^T: dV = P^T dO and dK = dS^T Q then find their left factors in
# the registers as they are.  From S they would have to be transposed in shared memory.
#
# start_q, start_k: where a segment starts in the packed row; its tokens, keys and tile rows count
# from there.  Scores are in units of log 2 (a GPU has an instruction for exp2), hence LOG2E.
# Triton compiles a kernel again for some values of an argument; these change with every row.

LOG2E = constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["tokens_q", "tokens_k", "segments", "slots"])
def tile_table_kernel(
    table,         # (N + 1, 2) int32, out: segment and first tile row of each tile; last, validity
    cu_seqlens,    # (S + 1,) of the side that is tiled
    cu_seqlens_q, cu_seqlens_k, tokens_q, tokens_k,  # checked for validity
    segments, slots,                                 # S, N
    ROWS: constexpr,  # tile rows of a token: R on the query side, 1 on the key side
    BLOCK: constexpr, LAST_FIRST: constexpr,
):
    """List the tiles, long segments first; slots that no tile needs get segment -1.
    A GPU starts programs in this order: costly ones first, small ones then even out the end.  With
    LAST_FIRST a segment's last tile comes first: under a causal mask the last queries cost most (of
    keys, the first).  Last entry: 1 if cu_seqlens rise from 0 to the tokens on both sides, else 0.
    """
    segment, lane = tl.program_id(0), tl.arange(0, 128)
    # programs 0 to S - 1 list a segment each, program S writes the free slots and the last entry
    is_segment = segment < segments
    begin = tl.load(cu_seqlens + segment)
    end = tl.load(cu_seqlens + segment + 1, mask=is_segment, other=0)
    tiles = tl.cdiv(tl.maximum(end - begin, 0).to(tl.int32) * ROWS, BLOCK)
    tiles = tl.where(is_segment, tiles, -1)
    # Sort by counting: before this segment stand the tiles of all longer segments and, of equally
    # long ones, those with a smaller number.  Program S, with -1 tiles, comes last.
    first_slot = 0
    for first in range(0, segments, 128):
        other = first + lane
        begins = tl.load(cu_seqlens + other, mask=other < segments, other=0)
        ends = tl.load(cu_seqlens + other + 1, mask=other < segments, other=0)
        other_tiles = tl.cdiv(tl.maximum(ends - begins, 0).to(tl.int32) * ROWS, BLOCK)
        is_ahead = (other_tiles > tiles) | ((other_tiles == tiles) & (other < segment))
        first_slot += tl.sum(tl.where(is_ahead, other_tiles, 0))
    count = tl.where(is_segment, tiles, slots - first_slot)
    for first in range(0, count, 128):
        number = first + lane
        tile = count - 1 - number if LAST_FIRST else number
        begin_q_row = tile * BLOCK
        slot = first_slot + number
        inside = (number < count) & (slot >= 0) & (slot < slots)
        tl.store(table + 2 * slot, tl.where(is_segment, segment, -1), mask=inside)
        tl.store(table + 2 * slot + 1, begin_q_row, mask=inside)
    # count what is wrong in cu_seqlens: first and last number, then every place where they fall
    if segment == segments:
        wrong = (tl.load(cu_seqlens_q) != 0) | (tl.load(cu_seqlens_q + segments) != tokens_q)
        wrong |= (tl.load(cu_seqlens_k) != 0) | (tl.load(cu_seqlens_k + segments) != tokens_k)
        wrong = wrong.to(tl.int32)
        for first in range(1, segments + 1, 128):
            at = tl.minimum(first + lane, segments)
            falls = tl.load(cu_seqlens_q + at) < tl.load(cu_seqlens_q + at - 1)
            falls |= tl.load(cu_seqlens_k + at) < tl.load(cu_seqlens_k + at - 1)
            wrong += tl.sum(falls.to(tl.int32))
        tl.store(table + 2 * slots, (wrong == 0).to(tl.int32))


@triton.jit
def segment_bounds(cu_seqlens, segment):
    """Where a segment starts in the packed row, and its number of tokens."""
    start = tl.load(cu_seqlens + segment).to(tl.int32)
    end = tl.load(cu_seqlens + segment + 1).to(tl.int32)
    return start, end - start


@triton.jit
def token_and_head(q_row, length_q, key_head, R: constexpr):
    """Token and query head of each tile row; behind the segment's end its last token, so that loads
    need no mask."""
    token = tl.minimum(q_row // R, length_q - 1)
    return token, key_head * R + q_row % R


@triton.jit
def tile_offsets(start, token, head, token_stride, head_stride, BLOCK_E: constexpr):
    """Offsets (vectors, BLOCK_E) of these tokens and heads in a tensor of these strides."""
    offset = (start + token).to(tl.int64) * token_stride + head.to(tl.int64) * head_stride
    return offset[:, None] + tl.arange(0, BLOCK_E)[None, :]


@triton.jit
def load_tile(x, offsets, E: constexpr, BLOCK_E: constexpr):
    """Load x at these offsets, with zeros in the columns from E on."""
    if E < BLOCK_E:
        return tl.load(x + offsets, mask=(tl.arange(0, BLOCK_E) < E)[None, :], other=0.0)
    else:
        return tl.load(x + offsets)


@triton.jit
def last_visible_key(token, q_positions, start_q, length_q, length_k,
                     CAUSAL: constexpr, EXPLICIT: constexpr):
    """The mask: index in the segment of the last key that each token sees; negative: none."""
    if EXPLICIT:
        last = tl.load(q_positions + start_q + token).to(tl.int32)
    elif CAUSAL:
        last = token + (length_k - length_q)
    else:
        last = token * 0 + length_k  # one number per token
    return tl.minimum(last, length_k - 1)


@triton.jit
def load_keys(x, token_stride, head_stride, start_k, begin_key, length_k, key_head, E: constexpr,
              BLOCK_N: constexpr, BLOCK_E: constexpr, DESCRIPTORS: constexpr, BOUNDARY: constexpr):
    """Keys or values begin_key:begin_key + BLOCK_N of a segment, (BLOCK_N, BLOCK_E).
    x is a pointer to (Tk, G, E) or, with DESCRIPTORS, its tensor descriptor: Hopper's copy engine
    then fetches the tile, and no register holds an address.  Behind the segment's end a pointer
    finds the last key again, a descriptor the next segment."""
    key = begin_key + tl.arange(0, BLOCK_N)
    if DESCRIPTORS:
        tile = x.load([start_k + begin_key, key_head, 0]).reshape(BLOCK_N, BLOCK_E)
        # the weights of the next segment's keys are zero, but zero times NaN is NaN
        if BOUNDARY:
            tile = tl.where((key < length_k)[:, None], tile, 0.0)
        return tile
    else:
        key = tl.minimum(key, length_k - 1)
        offsets = tile_offsets(start_k, key, key_head, token_stride, head_stride, BLOCK_E)
        return load_tile(x, offsets, E, BLOCK_E)


@triton.jit(do_not_specialize=["tokens_q", "split_keys"])
def forward_kernel(
    q, k, v,               # (Tq, H, E), (Tk, G, E), (Tk, G, E); k and v as `load_keys` wants them
    q_token, q_head, k_token, k_head, v_token, v_head,  # their strides, in numbers
    out, lse,              # (splits, Tq, H, E), (splits, H, Tq) float32
    cu_seqlens_q, cu_seqlens_k, q_positions,
    table, tokens_q,       # tiles of BLOCK_M tile rows, Tq
    split_keys, scale,     # keys of a split, softmax scale * log2(e)
    R: constexpr, E: constexpr, BLOCK_E: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
    CAUSAL: constexpr, EXPLICIT: constexpr, DESCRIPTORS: constexpr,
):
    """Program (slot, key head, split): a tile of queries against the keys of one split."""
    slot, key_head = tl.program_id(0), tl.program_id(1)
    split, key_heads = tl.program_id(2), tl.num_programs(1)
    segment = tl.load(table + 2 * slot)
    if segment < 0:
        return
    start_q, length_q = segment_bounds(cu_seqlens_q, segment)
    start_k, length_k = segment_bounds(cu_seqlens_k, segment)
    q_row = tl.load(table + 2 * slot + 1) + tl.arange(0, BLOCK_M)
    token, head = token_and_head(q_row, length_q, key_head, R)
    q_offsets = tile_offsets(start_q, token, head, q_token, q_head, BLOCK_E)
    q_tile = load_tile(q, q_offsets, E, BLOCK_E)
    last_key = last_visible_key(token, q_positions, start_q, length_q, length_k, CAUSAL, EXPLICIT)

    # keys begin_key:end_key of this split; every query of the tile sees those before full_end
    begin_key = split * split_keys
    end_key = tl.max(last_key) + 1
    if split < tl.num_programs(2) - 1:
        end_key = tl.minimum(end_key, begin_key + split_keys)
    seen_by_all = tl.minimum(tl.min(last_key) + 1, end_key)
    full_blocks = tl.maximum(seen_by_all - begin_key, 0) // BLOCK_N
    full_end = begin_key + full_blocks * BLOCK_N
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for MASKED in tl.static_range(2):  # full blocks first, then masked ones
        from_key, to_key = (full_end, end_key) if MASKED else (begin_key, full_end)
        for begin in range(from_key, to_key, BLOCK_N):
            k_tile = load_keys(k, k_token, k_head, start_k, begin, length_k, key_head, E, BLOCK_N,
                               BLOCK_E, DESCRIPTORS, False)
            s = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            if MASKED:
                key = begin + tl.arange(0, BLOCK_N)
                s = tl.where(key[None, :] <= last_key[:, None], s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1) * scale)
            shift = m_new
            if MASKED:  # a query that has seen no key yet: exp2(-inf - 0) = 0, not NaN
                shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s * scale - shift[:, None])
            alpha = tl.exp2(m - shift)
            total = alpha * total + tl.sum(p, 1)
            v_tile = load_keys(v, v_token, v_head, start_k, begin, length_k, key_head, E, BLOCK_N,
                               BLOCK_E, DESCRIPTORS, MASKED)
            p = p.to(v_tile.dtype)
            acc = tl.dot(p, v_tile, acc * alpha[:, None], input_precision="ieee")
            m = m_new

    # each split has its own (Tq, H, E) in out and (H, Tq) in lse; both are contiguous
    vectors = tokens_q * key_heads * R
    out_offsets = tile_offsets(start_q, token, head, key_heads * R * E, E, BLOCK_E)
    lse_at = head * tokens_q + start_q + token
    is_query = q_row < length_q * R
    inside = is_query[:, None] & (tl.arange(0, BLOCK_E) < E)[None, :]
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out + split.to(tl.int64) * vectors * E + out_offsets, acc, mask=inside)
    tl.store(lse + split * vectors + lse_at, (m + tl.log2(total)) / LOG2E, mask=is_query)


@triton.jit(do_not_specialize=["tokens_q"])
def dq_kernel(
    q, k, v,
    q_token, q_head, k_token, k_head, v_token, v_head,  # strides of these three
    out, grad, lse,  # (Tq, H, E), its gradient, (H, Tq) float32
    dq, delta,       # out: (Tq, H, E), (H, Tq) float32; `dkdv_kernel` reads delta
    cu_seqlens_q, cu_seqlens_k, q_positions, table, tokens_q, scale,
    R: constexpr, E: constexpr, BLOCK_E: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
    CAUSAL: constexpr, EXPLICIT: constexpr, DESCRIPTORS: constexpr,
):
    """Program (slot, key head): a tile of queries over the keys they see; also their delta."""
    slot = tl.program_id(0)
    key_head, key_heads = tl.program_id(1), tl.num_programs(1)
    segment = tl.load(table + 2 * slot)
    if segment < 0:
        return
    start_q, length_q = segment_bounds(cu_seqlens_q, segment)
    start_k, length_k = segment_bounds(cu_seqlens_k, segment)
    q_row = tl.load(table + 2 * slot + 1) + tl.arange(0, BLOCK_M)
    token, head = token_and_head(q_row, length_q, key_head, R)
    out_offsets = tile_offsets(start_q, token, head, key_heads * R * E, E, BLOCK_E)
    lse_at = head * tokens_q + start_q + token
    q_offsets = tile_offsets(start_q, token, head, q_token, q_head, BLOCK_E)
    q_tile = load_tile(q, q_offsets, E, BLOCK_E)
    grad_tile = load_tile(grad, out_offsets, E, BLOCK_E)
    out_tile = load_tile(out, out_offsets, E, BLOCK_E)
    # delta here, once per query, because out and grad are at hand
    lse_tile = tl.load(lse + lse_at) * LOG2E
    delta_tile = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    is_query = q_row < length_q * R
    tl.store(delta + lse_at, delta_tile, mask=is_query)
    last_key = last_visible_key(token, q_positions, start_q, length_q, length_k, CAUSAL, EXPLICIT)
    end_key = tl.max(last_key) + 1
    full_end = tl.maximum(tl.min(last_key) + 1, 0) // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for MASKED in tl.static_range(2):  # full blocks first, then masked ones
        from_key, to_key = (full_end, end_key) if MASKED else (0, full_end)
        for begin in range(from_key, to_key, BLOCK_N):
            k_tile = load_keys(k, k_token, k_head, start_k, begin, length_k, key_head, E, BLOCK_N,
                               BLOCK_E, DESCRIPTORS, MASKED)
            v_tile = load_keys(v, v_token, v_head, start_k, begin, length_k, key_head, E, BLOCK_N,
                               BLOCK_E, DESCRIPTORS, MASKED)
            s = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            p = tl.exp2(s * scale - lse_tile[:, None])
            if MASKED:
                key = begin + tl.arange(0, BLOCK_N)
                p = tl.where(key[None, :] <= last_key[:, None], p, 0.0)
            dp = tl.dot(grad_tile, v_tile.T, input_precision="ieee")
            ds = p * (dp - delta_tile[:, None])
            acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    # `scale` contains log2(e) for exp2, the gradient does not
    inside = is_query[:, None] & (tl.arange(0, BLOCK_E) < E)[None, :]
    tl.store(dq + out_offsets, acc * (scale / LOG2E), mask=inside)


@triton.jit
def tokens_that_see(begin_key, q_positions, start_q, length_q, length_k, BLOCK_M: constexpr,
                    BLOCK_N: constexpr, CAUSAL: constexpr, EXPLICIT: constexpr):
    """Who sees the tile of keys at begin_key: tokens before begin_token see no key of it, tokens
    from full_token on see all of it."""
    begin_token, full_token = 0, 0
    if EXPLICIT:
        # right for any order of positions; in rising order it skips all tokens that see nothing
        last = -1
        while (begin_token < length_q) & (last < begin_key):
            token = tl.minimum(begin_token + tl.arange(0, BLOCK_M), length_q - 1)
            last = tl.max(last_visible_key(token, q_positions, start_q, length_q, length_k,
                                           CAUSAL, EXPLICIT))
            begin_token += tl.where(last < begin_key, BLOCK_M, 0)
        full_token = length_q
    elif CAUSAL:
        begin_token = tl.maximum(begin_key + length_q - length_k, 0)
        full_token = tl.minimum(begin_key + BLOCK_N, length_k) - 1 + length_q - length_k
    return begin_token, full_token


@triton.jit(do_not_specialize=["tokens_q"])
def dkdv_kernel(
    q, grad,       # (Tq, H, E) as pointers or, with DESCRIPTORS, as descriptors of R heads at once
    k, v, q_token, q_head, k_token, k_head, v_token, v_head,  # (Tk, G, E); strides of q, k and v
    lse, delta,    # (H, Tq) float32
    dk, dv,        # (Tk, G, E), out
    cu_seqlens_q, cu_seqlens_k, q_positions, table, tokens_q, scale,  # table: tiles of BLOCK_N keys
    R: constexpr, E: constexpr, BLOCK_E: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr,
    CAUSAL: constexpr, EXPLICIT: constexpr, DESCRIPTORS: constexpr,
):
    """Program (slot, key head): a tile of keys over all tile rows, of R heads, that see it."""
    slot = tl.program_id(0)
    key_head, key_heads = tl.program_id(1), tl.num_programs(1)
    segment = tl.load(table + 2 * slot)
    if segment < 0:
        return
    start_q, length_q = segment_bounds(cu_seqlens_q, segment)
    start_k, length_k = segment_bounds(cu_seqlens_k, segment)
    begin_key = tl.load(table + 2 * slot + 1)
    k_tile = load_keys(k, k_token, k_head, start_k, begin_key, length_k, key_head, E, BLOCK_N,
                       BLOCK_E, False, False)
    v_tile = load_keys(v, v_token, v_head, start_k, begin_key, length_k, key_head, E, BLOCK_N,
                       BLOCK_E, False, False)
    begin_token, full_token = tokens_that_see(begin_key, q_positions, start_q, length_q, length_k,
                                              BLOCK_M, BLOCK_N, CAUSAL, EXPLICIT)
    # from tokens to tile rows; full_begin is a whole number of blocks behind begin_q_row
    begin_q_row, end_q_row = begin_token * R, length_q * R
    masked_blocks = tl.cdiv(tl.maximum(full_token * R - begin_q_row, 0), BLOCK_M)
    full_begin = begin_q_row + masked_blocks * BLOCK_M
    key = begin_key + tl.arange(0, BLOCK_N)
    dk_tile = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
    # Part 0 is the diagonal, part 1 the full blocks.  With descriptors the last block may reach
    # into the next segment: it is part 2, and its foreign queries become zero (see `load_keys`).
    tail = end_q_row
    if DESCRIPTORS:
        tail = begin_q_row + (end_q_row - begin_q_row) // BLOCK_M * BLOCK_M
    for PART in tl.static_range(3 if DESCRIPTORS else 2):
        if PART == 0:
            from_q_row, to_q_row = begin_q_row, tl.minimum(full_begin, end_q_row)
        elif PART == 1:
            from_q_row, to_q_row = full_begin, tail
        else:
            from_q_row, to_q_row = tl.maximum(full_begin, tail), end_q_row
        for begin in range(from_q_row, to_q_row, BLOCK_M):
            q_row = begin + tl.arange(0, BLOCK_M)
            token, head = token_and_head(q_row, length_q, key_head, R)
            lse_at = head * tokens_q + start_q + token
            if DESCRIPTORS:
                corner = [start_q + begin // R, key_head * R, 0]
                q_tile = q.load(corner).reshape(BLOCK_M, BLOCK_E)
                grad_tile = grad.load(corner).reshape(BLOCK_M, BLOCK_E)
                if PART != 1:
                    is_query = q_row < end_q_row
                    q_tile = tl.where(is_query[:, None], q_tile, 0.0)
                    grad_tile = tl.where(is_query[:, None], grad_tile, 0.0)
            else:
                q_offsets = tile_offsets(start_q, token, head, q_token, q_head, BLOCK_E)
                q_tile = load_tile(q, q_offsets, E, BLOCK_E)
                out_offsets = tile_offsets(start_q, token, head, key_heads * R * E, E, BLOCK_E)
                grad_tile = load_tile(grad, out_offsets, E, BLOCK_E)
            # behind the segment's end the weight is exp2(s - inf) = 0
            lse_tile = tl.load(lse + lse_at, mask=q_row < end_q_row, other=float("inf")) * LOG2E
            delta_tile = tl.load(delta + lse_at)
            s = tl.dot(k_tile, q_tile.T, input_precision="ieee")  # (BLOCK_N, BLOCK_M)
            p = tl.exp2(s * scale - lse_tile[None, :])
            if PART != 1:
                last_key = last_visible_key(token, q_positions, start_q, length_q, length_k,
                                            CAUSAL, EXPLICIT)
                p = tl.where(key[:, None] <= last_key[None, :], p, 0.0)
            dv_tile = tl.dot(p.to(grad_tile.dtype), grad_tile, dv_tile, input_precision="ieee")
            dp = tl.dot(v_tile, grad_tile.T, input_precision="ieee")
            ds = p * (dp - delta_tile[None, :])
            dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")

    column = tl.arange(0, BLOCK_E)
    vector = (start_k + key).to(tl.int64) * key_heads + key_head
    offsets = vector[:, None] * E + column[None, :]
    inside = (key < length_k)[:, None] & (column < E)[None, :]
    tl.store(dk + offsets, dk_tile * (scale / LOG2E), mask=inside)
    tl.store(dv + offsets, dv_tile, mask=inside)


# ---------------------------------------------------------------------------------- the launches

class Tile(NamedTuple):
    """A launch configuration."""
    BLOCK_M: int     # tile rows of queries in a block
    BLOCK_N: int     # keys in a block
    num_warps: int
    num_stages: int  # of the pipeline that loads blocks ahead


# (kernel, architecture) -> the numbers of a Tile for widths up to 64, and for widths up to 128.  No
# kernel spills registers in Triton 3.6 and 3.9 (`benchmarks/compile.py` prints all); only a GPU can
# say which tiles are fastest.  Decoding has 16 tile rows, too few for Hopper's matrix instructions.
TILES = {
    ("forward", "hopper"): ((128, 64, 4, 3), (128, 128, 8, 2)),
    ("forward", "ampere"): ((128, 64, 8, 3), (128, 32, 8, 3)),
    ("forward", "float32"): ((16, 32, 4, 2), (16, 32, 8, 1)),
    ("decode", "hopper"): ((16, 128, 4, 3), (16, 64, 4, 3)),
    ("decode", "ampere"): ((16, 128, 4, 2), (16, 64, 4, 2)),
    ("decode", "float32"): ((16, 32, 4, 2), (16, 32, 8, 1)),
    ("dq", "hopper"): ((128, 64, 8, 2), (128, 64, 8, 2)),
    ("dq", "ampere"): ((128, 64, 8, 2), (128, 32, 8, 2)),
    ("dq", "float32"): ((16, 32, 4, 2), (8, 32, 4, 2)),
    ("dkdv", "hopper"): ((64, 128, 8, 2), (32, 128, 8, 2)),
    ("dkdv", "ampere"): ((32, 128, 8, 2), (64, 64, 8, 2)),
    ("dkdv", "float32"): ((16, 32, 4, 1), (16, 32, 8, 1)),
}
PROGRAMS_WANTED = 256  # about two for each of a large GPU's multiprocessors
SPLIT_KEYS = 256       # keys in a split, at least: shorter ones cost more to merge than they save


def compute_capability(device: torch.device) -> tuple[int, int]:
    """What a GPU can do, (8, 0) for sm_80; (0, 0) for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def has_copy_engine(x: Tensor) -> bool:
    """Hopper and B200 fetch tiles by tensor descriptors, into 227 KiB of shared memory.  sm_120
    (RTX 50) has an engine for it, but 99 KiB, too few for these tiles; older GPUs have none."""
    return compute_capability(x.device)[0] in (9, 10)


def architecture(x: Tensor) -> str:
    """The architecture in TILES: of float32 products, of GPUs with a copy engine, of all others."""
    if x.dtype == torch.float32:
        return "float32"
    return "hopper" if has_copy_engine(x) else "ampere"


def tile_for(kernel: str, target: str, width: int) -> Tile:
    narrow, wide = TILES[kernel, target]
    return Tile(*(narrow if width <= 64 else wide))


def readable(x: Tensor, descriptors: bool) -> Tensor:
    """x (T, heads, E), or a copy if the kernel wants a descriptor and the strides forbid it: the
    copy engine wants addresses divisible by 16, and heads that lie inside their token."""
    token, head = x.stride()[:2]
    steps = (x.data_ptr(), token * x.element_size(), head * x.element_size())
    aligned = all(step % 16 == 0 for step in steps)
    nested = head >= x.shape[2] and token % head == 0 and token >= head * x.shape[1]
    if descriptors and not (aligned and nested):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def described(x: Tensor, tokens: int, heads: int, descriptors: bool) -> TensorDescriptor | Tensor:
    """x (T, heads, E), or its descriptor for tiles of these tokens and heads."""
    if not descriptors:
        return x
    tile = [tokens, heads, triton.next_power_of_2(x.shape[2])]
    return TensorDescriptor(x, list(x.shape), list(x.stride()), tile)


def strides(*tensors: Tensor) -> list[int]:
    """Strides of tokens and heads of each, in turn."""
    return [stride for x in tensors for stride in x.stride()[:2]]


def tile_table(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, of_queries: bool,
               block: int) -> tuple[Tensor, int]:
    """Table of `tile_table_kernel` and its number of slots, enough for every layout."""
    cu_seqlens = cu_seqlens_q if of_queries else cu_seqlens_k
    tokens = len(q) if of_queries else len(k)
    ratio = q.shape[1] // k.shape[1] if of_queries else 1
    # S segments waste at most block - 1 tile rows each: no need to read lengths from the GPU
    segments = len(cu_seqlens) - 1
    slots = max(1, (tokens * ratio + segments * (block - 1)) // block)
    table = torch.empty(slots + 1, 2, dtype=torch.int32, device=q.device)
    tile_table_kernel[(segments + 1,)](
        table, cu_seqlens, cu_seqlens_q, cu_seqlens_k, len(q), len(k), segments, slots,
        ROWS=ratio, BLOCK=block, LAST_FIRST=of_queries)
    return table, slots


def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, scale: float, causal: bool, q_positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out (Tq, H, E) and LSE (H, Tq) by `forward_kernel`."""
    tokens, heads = q.shape[:2]
    key_heads, width = k.shape[1:]
    ratio = heads // key_heads
    if tokens == 0 or len(k) == 0:
        return q.new_zeros(q.shape), q.new_full((heads, tokens), -math.inf, dtype=torch.float32)
    target = architecture(q)
    descriptors = target == "hopper"
    k, v = readable(k, descriptors), readable(v, descriptors)
    kernel = "decode" if max_seqlen_q * ratio <= 16 else "forward"
    tile = tile_for(kernel, target, width)
    table, slots = tile_table(q, k, cu_seqlens_q, cu_seqlens_k, True, tile.BLOCK_M)
    torch.ops.aten._assert_async.msg(
        table[-1, 0], "cu_seqlens_q and cu_seqlens_k must rise from 0 to the number of tokens")
    # generation has too few tiles of queries to fill a GPU: several programs share the keys
    splits = 1
    if kernel == "decode":
        splits = min(triton.cdiv(max_seqlen_k, SPLIT_KEYS), PROGRAMS_WANTED // (slots * key_heads))
        splits = max(splits, 1)
    dtype = q.dtype if splits == 1 else torch.float32
    split_keys = triton.cdiv(triton.cdiv(max_seqlen_k, splits), tile.BLOCK_N) * tile.BLOCK_N
    out = q.new_empty(splits, *q.shape, dtype=dtype)
    lse = q.new_empty(splits, heads, tokens, dtype=torch.float32)
    forward_kernel[(slots, key_heads, splits)](
        q, described(k, tile.BLOCK_N, 1, descriptors), described(v, tile.BLOCK_N, 1, descriptors),
        *strides(q, k, v), out, lse, cu_seqlens_q, cu_seqlens_k, q_positions, table, tokens,
        split_keys, scale * LOG2E.value, R=ratio, E=width, BLOCK_E=triton.next_power_of_2(width),
        CAUSAL=causal, EXPLICIT=q_positions is not None, DESCRIPTORS=descriptors, **tile._asdict())
    if splits == 1:
        return out[0], lse[0]
    # merge: each split counts by its share of the sum of exponentials
    total = lse.logsumexp(dim=0)  # (H, Tq)
    weights = (lse - total.masked_fill(total.isinf(), 0)).exp()  # (splits, H, Tq)
    out = out * weights.transpose(1, 2)[..., None]
    return out.sum(dim=0).to(q.dtype), total


def triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, scale: float, causal: bool, q_positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv: `dq_kernel` first, for it also finds delta, which `dkdv_kernel` reads."""
    key_heads, width = k.shape[1:]
    ratio = q.shape[1] // key_heads
    dq = q.new_empty(q.shape)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    if len(q) == 0 or len(k) == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    target = architecture(q)
    descriptors = target == "hopper"
    grad, q = readable(grad.contiguous(), descriptors), readable(q, descriptors)
    k, v = readable(k, descriptors), readable(v, descriptors)
    delta = torch.empty_like(lse)
    common = {"R": ratio, "E": width, "BLOCK_E": triton.next_power_of_2(width), "CAUSAL": causal,
              "EXPLICIT": q_positions is not None}

    tile = tile_for("dq", target, width)
    table, slots = tile_table(q, k, cu_seqlens_q, cu_seqlens_k, True, tile.BLOCK_M)
    dq_kernel[(slots, key_heads)](
        q, described(k, tile.BLOCK_N, 1, descriptors), described(v, tile.BLOCK_N, 1, descriptors),
        *strides(q, k, v), out, grad, lse, dq, delta, cu_seqlens_q, cu_seqlens_k, q_positions,
        table, len(q), scale * LOG2E.value, **common, DESCRIPTORS=descriptors, **tile._asdict())
    # a described tile of queries holds all R heads, so R must be a power of 2 that fits the tile
    tile = tile_for("dkdv", target, width)
    descriptors = descriptors and ratio == triton.next_power_of_2(ratio) <= tile.BLOCK_M
    block_tokens = tile.BLOCK_M // ratio
    table, slots = tile_table(q, k, cu_seqlens_q, cu_seqlens_k, False, tile.BLOCK_N)
    dkdv_kernel[(slots, key_heads)](
        described(q, block_tokens, ratio, descriptors),
        described(grad, block_tokens, ratio, descriptors), k, v, *strides(q, k, v), lse, delta,
        dk, dv, cu_seqlens_q, cu_seqlens_k, q_positions, table, len(q), scale * LOG2E.value,
        **common, DESCRIPTORS=descriptors, **tile._asdict())
    return dq, dk, dv


# --------------------------------------------------------- without a GPU: PyTorch's own attention

class DenseCall(NamedTuple):
    """What one call of dense attention computes: `segments` segments of equal lengths at once."""
    queries: slice  # tokens of the packed row
    keys: slice
    segments: int
    position: int   # of a segment's first query among its keys


def dense_calls(cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                q_positions: Tensor | None) -> Iterator[DenseCall]:
    """Cut a packed row into calls of dense attention.  Neighbouring segments of equal lengths
    (pictures of one size) are one call.  With positions, each stretch of successive positions is
    one: 4 5 6 0 1 are 4 5 6 with 7 keys, then 0 1 with 2 keys."""
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    if q_positions is None:
        begin = 0
        lengths = zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist())
        for (length_q, length_k), run in itertools.groupby(lengths):
            end = begin + len(list(run))  # segments begin:end
            queries = slice(starts_q[begin], starts_q[end])
            keys = slice(starts_k[begin], starts_k[end])
            if length_q > 0 and length_k > 0:
                yield DenseCall(queries, keys, end - begin, length_k - length_q)
            begin = end
        return
    jumps = (q_positions.diff() != 1).nonzero()[:, 0] + 1
    edges = torch.cat([cu_seqlens_q, jumps]).unique().tolist()
    segment = segment_ids(cu_seqlens_q).tolist()
    for begin_q, end_q in itertools.pairwise(edges):
        position = int(q_positions[begin_q])
        begin_k = starts_k[segment[begin_q]]
        end_k = min(starts_k[segment[begin_q] + 1], begin_k + position + end_q - begin_q)
        # positions before the first key see nothing: their out stays 0, their LSE -inf
        if end_k > begin_k:
            yield DenseCall(slice(begin_q, end_q), slice(begin_k, end_k), 1, position)


def dense_mask(q: Tensor, k: Tensor, position: int, causal: bool) -> dict[str, object]:
    """What tells dense attention the keys that each query of q (segments, H, Lq, E) sees."""
    length_q, length_k = q.shape[2], k.shape[2]
    # is_causal aligns at the first key, attention here at the last: the same only in a square
    is_causal = causal and position == 0 and length_q == length_k
    mask = None
    if causal and not is_causal and position < length_k - 1:
        mask = torch.full((1, 1, length_q, length_k), -math.inf, dtype=q.dtype).triu(position + 1)
    return {"is_causal": is_causal, "attn_mask": mask}


def batched(x: Tensor, tokens: slice, segments: int) -> Tensor:
    """Equal segments of x (T, heads, E) as dense attention wants them, (segments, heads, L, E)."""
    return x[tokens].unflatten(0, (segments, -1)).transpose(1, 2)


def sdpa_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, scale: float, causal: bool, q_positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `triton_forward`, by the CPU kernel behind `scaled_dot_product_attention`."""
    out = q.new_zeros(q.shape)
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_full((q.shape[1], len(q)), -math.inf, dtype=dtype)
    for call in dense_calls(cu_seqlens_q, cu_seqlens_k, q_positions):
        queries = batched(q, call.queries, call.segments)
        keys = batched(k, call.keys, call.segments)
        mask = dense_mask(queries, keys, call.position, causal)
        call_out, call_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, batched(v, call.keys, call.segments), 0.0, **mask, scale=scale)
        # for a query that sees no key the CPU kernel says 0
        if mask["attn_mask"] is not None:
            call_lse = call_lse.masked_fill(mask["attn_mask"].isneginf().all(dim=-1), -math.inf)
        out[call.queries] = call_out.transpose(1, 2).flatten(0, 1)
        lse[:, call.queries] = call_lse.transpose(0, 1).flatten(1)
    return out, lse


def sdpa_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, scale: float, causal: bool, q_positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by the same CPU kernel."""
    # the CPU kernel would add up R heads in 16 bits: give each its own keys, and add in float32
    dtype = torch.promote_types(q.dtype, torch.float32)
    copies = q.shape[1] // k.shape[1] if q.dtype != dtype else 1
    dq = q.new_zeros(q.shape)
    dk, dv = (x.new_zeros(x.shape, dtype=dtype) for x in (k, v))
    lse = lse.masked_fill(lse.isneginf(), 0)
    for call in dense_calls(cu_seqlens_q, cu_seqlens_k, q_positions):
        queries = batched(q, call.queries, call.segments)
        keys = batched(k, call.keys, call.segments)
        values = batched(v, call.keys, call.segments)
        mask = dense_mask(queries, keys, call.position, causal)
        if copies > 1:
            keys, values = (x.repeat_interleave(copies, dim=1) for x in (keys, values))
        call_lse = lse[:, call.queries].unflatten(1, (call.segments, -1)).transpose(0, 1)
        call_dq, *sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            batched(grad, call.queries, call.segments), queries, keys, values,
            batched(out, call.queries, call.segments), call_lse, 0.0, **mask, scale=scale)
        dq[call.queries] = call_dq.transpose(1, 2).flatten(0, 1)
        for total, part in zip((dk, dv), sums):
            part = part.transpose(1, 2).flatten(0, 1)
            if copies > 1:
                part = part.to(dtype).unflatten(1, (-1, copies)).sum(dim=2)
            total[call.keys] += part  # several stretches may share keys
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# ------------------------------------------------------------------------- the operator and its API

def uses_kernels(q: Tensor) -> bool:
    """On a GPU always; on a CPU only in Triton's interpreter, which is for debugging: slow."""
    return q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


@torch.library.custom_op("llava::attention", mutates_args=())
@functools.wraps(triton_forward)  # the operator has its parameters
def attention(*arguments: object) -> tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` as an operator: `torch.compile` keeps it whole in its graph."""
    q, k = arguments[:2]
    if not q.is_cuda:  # a GPU checks the values itself, see `triton_forward`
        check_cu_seqlens("q", arguments[3], len(q))
        check_cu_seqlens("k", arguments[4], len(k))
    forward = triton_forward if uses_kernels(q) else sdpa_forward
    with torch.cuda.device_of(q):
        return forward(*arguments)


@torch.library.custom_op("llava::attention_backward", mutates_args=())
@functools.wraps(triton_backward)
def attention_backward(grad: Tensor, q: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    backward = triton_backward if uses_kernels(q) else sdpa_backward
    with torch.cuda.device_of(q):
        return backward(grad, q, *rest)


@attention.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=lse_dtype)


@attention_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: object) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def save_for_backward(ctx: object, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    # inputs of `attention`: 0 to 4 are q, k, v and both cu_seqlens, 5 and 6 the longest segments
    ctx.scale, ctx.causal = inputs[7:9]
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:5], inputs[9])


def backward_of_op(ctx: object, grad: Tensor, grad_lse: Tensor | None) -> tuple:
    *tensors, q_positions = ctx.saved_tensors
    grads = attention_backward(grad, *tensors, ctx.scale, ctx.causal, q_positions)
    return *grads, *[None] * 7  # behind q, k and v nothing has a gradient


attention.register_autograd(backward_of_op, setup_context=save_for_backward)


def check_cu_seqlens(name: str, cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ValueError unless the segments cover the tokens; reads values, so on the CPU only."""
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (cu_seqlens.diff() < 0).any():
        raise ValueError(f"cu_seqlens_{name} must rise from 0 to the {tokens} tokens of {name}, "
                         f"got {cu_seqlens.tolist()[:8]}...{cu_seqlens[-1]}")


def check_tensors(tensors: dict[str, object]) -> None:
    """Raise ValueError unless all are tensors on q's device, and all but q, k and v integers."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, not a {type(x).__name__}")
        if x.device != tensors["q"].device:
            raise ValueError(f"q is on {tensors['q'].device}, but {name} on {x.device}")
        is_integer = x.dtype in (torch.int32, torch.int64)
        if name not in ("q", "k", "v") and not (is_integer and x.is_contiguous()):
            raise ValueError(f"{name} must be a contiguous vector of int32 or int64")


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless shapes, types and strides fit each other, and fit the kernels."""
    if not q.dim() == k.dim() == v.dim() == 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"need q (Tq, H, E) and k, v (Tk, G, E), got {tuple(q.shape)}, "
                         f"{tuple(k.shape)}, {tuple(v.shape)}")
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"attention runs on cpu and cuda, not on {q.device.type}")
    heads, width = q.shape[1:]
    key_heads = k.shape[1]
    if key_heads == 0 or heads % key_heads != 0:
        raise ValueError(f"{heads} query heads are not a multiple of {key_heads} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    for name, x in {"q": q, "k": k, "v": v}.items():
        if x.stride(2) != 1:
            raise ValueError(f"the last dimension of {name} must be contiguous, its strides are "
                             f"{x.stride()}")
    # the CPU path takes any type and width
    if uses_kernels(q):
        if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"the kernels take float32, float16 or bfloat16, not {q.dtype}")
        if width % 8 or not 16 <= width <= 128:
            raise ValueError(f"the kernels take head widths of 16 to 128 in steps of 8, "
                             f"not {width}")


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None = None,
    causal: bool = False, return_lse: bool = False, q_positions: Tensor | None = None, *,
    dropout_p: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed segments; names and meanings are those of flash-attn's function.

    q: (Tq, H, E); k, v: (Tk, G, E), H a multiple of G.  Only the last dimension must be contiguous.
    cu_seqlens_q, cu_seqlens_k: (S + 1,) int32 or int64, first token of each segment and the total.
    max_seqlen_q, max_seqlen_k: longest segment, in tokens.  They shape the launch, not the result.
    softmax_scale: factor on the scores, default E ** -0.5.
    causal: query i of a segment sees keys up to i + len_k - len_q (bottom-right alignment).
    q_positions: (Tq,) with causal=True: the query sees keys up to this position of its segment.
    dropout_p: must be 0.  flash-attn has it before softmax_scale: pass that and the rest by name.

    Returns out (Tq, H, E), and with return_lse the log-sum-exp of the scores, (H, Tq) float32,
    without gradient.  A query that sees no key gets 0 and -inf.  Raises ValueError if arguments do
    not fit together.  Reading cu_seqlens here would stop a GPU's stream: an assertion on the GPU
    checks their values and ends the process before a kernel reads anything.
    """
    if dropout_p != 0:
        raise ValueError(f"dropout_p must be 0, got {dropout_p}: there is no dropout")
    if softmax_scale is not None and not 0 < softmax_scale < math.inf:
        raise ValueError(f"softmax_scale must be positive and finite, got {softmax_scale}")
    # refuse what would read out of bounds or attend to the wrong keys
    tensors = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    if q_positions is not None:
        tensors["q_positions"] = q_positions
    check_tensors(tensors)
    check_heads(q, k, v)
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape != cu_seqlens_k.shape or not len(cu_seqlens_q):
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be vectors of segments + 1 numbers, "
                         f"got {tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}")
    if q_positions is not None and (not causal or q_positions.shape != q.shape[:1]):
        raise ValueError("q_positions needs causal=True and one position per query")
    scale = softmax_scale or q.shape[-1] ** -0.5
    out, lse = attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
                         causal, q_positions)
    return (out, lse.detach()) if return_lse else out


# ------------------------------------------------------------------------------------------- errors

def random_row(lengths: list[int], heads: int, key_heads: int, width: int, dtype: torch.dtype,
               device: str, causal: bool) -> tuple[list[Tensor], dict]:
    """q, k, v of a packed row, and the other arguments of `flash_attn_varlen_func`."""
    qkv = [torch.randn(sum(lengths), count, width, device=device).to(dtype).requires_grad_()
           for count in (heads, key_heads, key_heads)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return qkv, {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens,
                 "max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths), "causal": causal}


def masked_sdpa(lengths: list[int], rest: dict) -> Callable[..., Tensor]:
    """The obvious way to pack: one dense product with a (T, T) mask, several times slower."""
    segment = segment_ids(rest["cu_seqlens_q"])
    mask = segment[:, None] == segment[None, :]
    if rest["causal"]:
        mask = mask.tril()

    def attend(*qkv: Tensor) -> Tensor:
        dense = (x.transpose(0, 1)[None] for x in qkv)
        out = F.scaled_dot_product_attention(*dense, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)
    return attend


def main() -> None:
    """Print root-mean-square errors against float64, beside one masked PyTorch product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    print(f"{f'rms error against float64, {device}':32}{'out':>10}{'dq':>10}{'dk':>10}{'dv':>10}")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        qkv, rest = random_row([1, 300, 40, 171], 8, 2, 64, dtype, device, causal=True)
        weight = torch.randn_like(qkv[0])
        # the same numbers in float64 are the measure
        exact = [x.detach().double().requires_grad_() for x in qkv]
        out = attention_reference(*exact, **rest)
        expected = [out, *torch.autograd.grad((out * weight).sum(), exact)]
        outs = {"this file": flash_attn_varlen_func(*qkv, **rest),
                "masked SDPA": masked_sdpa([], rest)(*qkv)}
        for name, out in outs.items():
            results = [out, *torch.autograd.grad((out * weight).sum(), qkv)]
            errors = [(a.double() - b).square().mean().sqrt() for a, b in zip(results, expected)]
            print(f"{f'{name}, {dtype}':32}" + "".join(f"{error:10.1e}" for error in errors))


if __name__ == "__main__":
    main()
