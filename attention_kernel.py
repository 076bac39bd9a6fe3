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
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

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
# A program owns one tile: BLOCK_M queries, or BLOCK_N keys, of one segment and one head.  It finds
# the tile by its number and walks over blocks of the other side.
#
# A descriptor gives the GPU the address, shape and strides of one segment (`describe`).  Hopper's
# TMA (Tensor Memory Accelerator) then loads a tile by one instruction; for older GPUs Triton makes
# ordinary loads of the same line.  Loads past the end of the segment give zeros.  So tiles need no
# masks, and a NaN of the next segment cannot leak in, as it would with a weight of 0: 0 times NaN
# is NaN.
#
# A causal mask makes three sorts of blocks.  Here the tile of queries 8 to 11 walks over blocks of
# 4 keys; # is a visible key, . a masked one:
#     keys        0-3    4-7    8-11     12-15
#     query  8    ####   ####   #...
#     query  9    ####   ####   ##..
#     query 10    ####   ####   ###.
#     query 11    ####   ####   ####
#                 full   full   masked   not visited
# Every query sees the keys before full_end = 9, so blocks that end there or earlier need no mask.
# The loop stops at end_key = 12.  `dkdv_kernel` reads the picture by columns: keys 8 to 11 meet
# their masked block of queries first, then full ones from full_begin on.
# `dkdv_kernel` computes S^T = K Q^T: P^T and dS^T are then left factors of dV = P^T dO and
# dK = dS^T Q and stay in registers.  P and dS would have to be transposed through shared memory.
#
# query, key, begin_*, end_* count within a segment; start_q + query is the place in the packed row.
# In the kernels scores and LSE are in units of log 2, since a GPU has an instruction for exp2.
# Triton compiles a kernel anew if an integer becomes 1 or a multiple of 16; do_not_specialize names
# those that change with every row.  Without input_precision="ieee", products of float32 would be
# cut to the 10 bits of TF32.

LOG2E = tl.constexpr(1.4426950408889634)
# What kernels take, besides tl.constexpr: an address on the GPU, a number, a block of numbers.
# Triton has one class for all of them.
Pointer = Number = Block = tl.tensor


@triton.jit
def segment_bounds(cu_seqlens: Pointer, segment: Number):
    """Where a segment starts in the packed row, and its number of tokens."""
    start = tl.load(cu_seqlens + segment).to(tl.int32)
    end = tl.load(cu_seqlens + segment + 1).to(tl.int32)
    return start, end - start


@triton.jit
def find_tile(cu_seqlens: Pointer, segments: Number, tile: Number, BLOCK: tl.constexpr):
    """Segment of a tile, where the segment starts, its length, and the tile's first token in it.

    The tiles of segment s are numbered from start // BLOCK + s on, which leaves room for all
    ceil(length / BLOCK) of them.  So a row of T tokens has T // BLOCK + S tiles, known without
    reading cu_seqlens.  Some are surplus: they begin at the end of their segment or past it.  With
    BLOCK 4 and lengths 4 and 3, tile 0 is segment 0, tile 1 is surplus, tile 2 is segment 1.
    """
    segment = -1
    for first in range(0, segments, 128):
        number = first + tl.arange(0, 128)
        inside = number < segments
        start = tl.load(cu_seqlens + number, mask=inside, other=0).to(tl.int32)
        starts_before = inside & (start // BLOCK + number <= tile)
        segment += tl.sum(starts_before.to(tl.int32))
    start, length = segment_bounds(cu_seqlens, segment)
    return segment, start, length, (tile - start // BLOCK - segment) * BLOCK


@triton.jit
def describe(x: Pointer, stride: Number, start: Number, length: Number,
             HEADS: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):
    """Describe a segment of x (T, HEADS, E), `stride` elements a token: tiles (BLOCK, E) of it are
    loaded from [first token, head * E]."""
    height = tl.maximum(length, 1)  # 0 is no legal height; nothing is loaded from an empty segment
    return tl.make_tensor_descriptor(
        x + start.to(tl.int64) * stride, shape=[height, HEADS * E], strides=[stride, 1],
        block_shape=[BLOCK, E])


@triton.jit
def padded_start(segment: Number, start: Number):
    """Where a segment starts in `lse_delta`: at a multiple of 4 numbers of float32, since TMA wants
    addresses in multiples of 16 bytes.  Segments have room as tiles have, see `find_tile`."""
    return (start // 4 + segment) * 4


@triton.jit
def last_visible_key(query: Block, q_positions: Pointer, start_q: Number, length_q: Number,
                     length_k: Number, MASK: tl.constexpr):
    """The mask: index in the segment of the last key that each query sees; negative: none.
    MASK: "full", "causal", or "explicit" with q_positions."""
    if MASK == "explicit":
        is_query = query < length_q
        last = tl.load(q_positions + start_q + query, mask=is_query, other=-1).to(tl.int32)
    elif MASK == "causal":
        last = query + (length_k - length_q)
    else:
        last = tl.zeros_like(query) + length_k
    return tl.minimum(last, length_k - 1)


@triton.jit
def hide(x: Block, begin: Number, last_key: Block, hidden: Number, BLOCK_N: tl.constexpr):
    """x (BLOCK_M, BLOCK_N), with `hidden` for keys from `begin` on that a query does not see."""
    visible = tl.arange(0, BLOCK_N)[None, :] <= (last_key - begin)[:, None]
    return tl.where(visible, x, hidden)


@triton.jit(do_not_specialize=["segments", "tokens_q", "keys_per_split"])
def forward_kernel(
    q: Pointer, k: Pointer, v: Pointer,  # (Tq, H, E), (Tk, G, E), (Tk, G, E)
    q_stride: Number, k_stride: Number, v_stride: Number,  # elements from token to token
    out: Pointer, lse: Pointer,          # (splits, Tq, H, E), (splits, H, Tq) float32
    cu_seqlens_q: Pointer, cu_seqlens_k: Pointer, q_positions: Pointer,  # (S + 1,), (S + 1,), (Tq,)
    segments: Number, tokens_q: Number,  # S, Tq
    keys_per_split: Number,
    scale: Number,                       # softmax scale * log2(e)
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr,
    STACKED: tl.constexpr,            # so many successive queries are heads of one token
    HEADS_PER_PROGRAM: tl.constexpr,
    SPECIALIZED: tl.constexpr,        # some warps load, the others compute; Hopper only
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Program (slot, heads, split): a tile of queries against the keys of one split."""
    split = tl.program_id(2)
    # last tiles first: under a causal mask the last queries of a segment cost most
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    segment, start_q, length_q, begin_q = find_tile(cu_seqlens_q, segments, tile, BLOCK_M)
    start_k, length_k = segment_bounds(cu_seqlens_k, segment)
    queries = describe(q, q_stride, start_q, length_q, H, E, BLOCK_M)
    keys = describe(k, k_stride, start_k, length_k, G, E, BLOCK_N)
    values = describe(v, v_stride, start_k, length_k, G, E, BLOCK_N)
    query = begin_q + tl.arange(0, BLOCK_M)
    is_query = query < length_q
    last_key = last_visible_key(query // STACKED, q_positions, start_q // STACKED,
                                length_q // STACKED, length_k, MASK)

    # keys begin_key:end_key of this split; every query of the tile sees those before full_end
    begin_key = split * keys_per_split
    end_key = tl.max(last_key) + 1
    # the last split has no end of its own: max_seqlen_k may be too small and must change nothing
    is_last = split == tl.num_programs(2) - 1
    end_key = tl.where(is_last, end_key, tl.minimum(end_key, begin_key + keys_per_split))
    full_end = tl.min(last_key) + 1
    # A specialized program takes several heads in turn: they share the descriptors, which take
    # about a microsecond to make, and the loading warps run ahead into the next head.  A surplus
    # tile loops over no heads, because warp specialization takes no early `return`.
    first_head = tl.program_id(1) * HEADS_PER_PROGRAM
    end_head = tl.where(begin_q < length_q, first_head + HEADS_PER_PROGRAM, first_head)
    for head in tl.range(first_head, end_head, warp_specialize=SPECIALIZED):
        column = head // (H // G) * E  # where the vectors of its key head begin
        q_tile = queries.load([begin_q, head * E])
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, E], tl.float32)
        for begin in range(begin_key, end_key, BLOCK_N):
            k_tile = keys.load([begin, column])
            s = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
            # warp specialization takes no `if` at run time: it always masks
            if SPECIALIZED or begin + BLOCK_N > full_end:
                s = hide(s, begin, last_key, float("-inf"), BLOCK_N)
            # the largest score times the scale is the largest scaled score, since scale > 0
            m_new = tl.maximum(m, tl.max(s, 1) * scale)
            # a query that has seen no key yet: exp2(-inf - 0) = 0, not NaN
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s * scale - shift[:, None])
            alpha = tl.exp2(m - shift)
            total = alpha * total + tl.sum(p, 1)
            v_tile = values.load([begin, column])
            p = p.to(v_tile.dtype)
            acc = tl.dot(p, v_tile, acc * alpha[:, None], input_precision="ieee")
            m = m_new

        # each split has its own (Tq, H, E) in out and (H, Tq) in lse; both are contiguous
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        vector = (split * tokens_q + start_q + query).to(tl.int64) * H + head
        place = vector[:, None] * E + tl.arange(0, E)[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=is_query[:, None])
        lse_at = (split * H + head) * tokens_q + start_q + query
        tl.store(lse + lse_at, m + tl.log2(total), mask=is_query)


@triton.jit(do_not_specialize=["segments", "tokens_q", "padded"])
def dq_kernel(
    q: Pointer, k: Pointer, v: Pointer,  # (Tq, H, E), (Tk, G, E), (Tk, G, E)
    grad: Pointer,              # gradient of out, (Tq, H, E)
    q_stride: Number, k_stride: Number, v_stride: Number, grad_stride: Number,
    out: Pointer, lse: Pointer,  # (Tq, H, E), (H, Tq) float32
    dq: Pointer,                # written: (Tq, H, E)
    lse_delta: Pointer,         # written: (2, H, padded) float32, as `dkdv_kernel` reads them
    cu_seqlens_q: Pointer, cu_seqlens_k: Pointer, q_positions: Pointer,
    segments: Number, tokens_q: Number, padded: Number, scale: Number,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Program (slot, head): a tile of queries over the keys they see; also their delta."""
    tile, head = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1)
    segment, start_q, length_q, begin_q = find_tile(cu_seqlens_q, segments, tile, BLOCK_M)
    if begin_q >= length_q:
        return
    start_k, length_k = segment_bounds(cu_seqlens_k, segment)
    keys = describe(k, k_stride, start_k, length_k, G, E, BLOCK_N)
    values = describe(v, v_stride, start_k, length_k, G, E, BLOCK_N)
    corner = [begin_q, head * E]
    q_tile = describe(q, q_stride, start_q, length_q, H, E, BLOCK_M).load(corner)
    grad_tile = describe(grad, grad_stride, start_q, length_q, H, E, BLOCK_M).load(corner)
    out_tile = describe(out, H * E, start_q, length_q, H, E, BLOCK_M).load(corner)

    # delta here, once per query, because out and grad are at hand
    delta_tile = tl.sum(grad_tile.to(tl.float32) * out_tile.to(tl.float32), 1)
    query = begin_q + tl.arange(0, BLOCK_M)
    is_query = query < length_q
    lse_at = head * tokens_q + start_q + query
    lse_tile = tl.load(lse + lse_at, mask=is_query, other=0.0)
    at = head * padded + padded_start(segment, start_q) + query
    tl.store(lse_delta + at, lse_tile, mask=is_query)
    tl.store(lse_delta + H * padded + at, delta_tile, mask=is_query)
    last_key = last_visible_key(query, q_positions, start_q, length_q, length_k, MASK)
    end_key = tl.max(last_key) + 1
    full_end = tl.min(last_key) + 1
    column = head // (H // G) * E
    acc = tl.zeros([BLOCK_M, E], tl.float32)
    for begin in range(0, end_key, BLOCK_N):
        k_tile = keys.load([begin, column])
        v_tile = values.load([begin, column])
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        p = tl.exp2(s * scale - lse_tile[:, None])
        if begin + BLOCK_N > full_end:
            p = hide(p, begin, last_key, 0.0, BLOCK_N)
        dp = tl.dot(grad_tile, v_tile.T, input_precision="ieee")
        ds = p * (dp - delta_tile[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")

    # `scale` contains log2(e) for exp2, the gradient does not
    acc = acc * (scale / LOG2E)
    place = ((start_q + query).to(tl.int64) * H + head)[:, None] * E + tl.arange(0, E)[None, :]
    tl.store(dq + place, acc.to(dq.dtype.element_ty), mask=is_query[:, None])


@triton.jit
def queries_that_see(begin_key: Number, q_positions: Pointer, start_q: Number, length_q: Number,
                     length_k: Number, MASK: tl.constexpr,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Who sees the tile of keys at begin_key: queries before begin_q see no key of it, queries
    from full_begin on see all of it."""
    begin_q, full_begin = 0, 0
    if MASK == "explicit":
        # skip the first blocks of queries that see none of these keys; of positions that do not
        # rise, fewer are skipped, never too many
        last = -1
        while (begin_q < length_q) & (last < begin_key):
            query = begin_q + tl.arange(0, BLOCK_M)
            last = tl.max(last_visible_key(query, q_positions, start_q, length_q, length_k, MASK))
            begin_q += tl.where(last < begin_key, BLOCK_M, 0)
        full_begin = length_q
    elif MASK == "causal":
        # TMA wants multiples of 16 bytes within a segment, too: of LSE and delta 4 numbers
        begin_q = tl.maximum(begin_key + length_q - length_k, 0) // 4 * 4
        full_begin = tl.minimum(begin_key + BLOCK_N, length_k) - 1 + length_q - length_k
    return begin_q, full_begin


@triton.jit(do_not_specialize=["segments", "tokens_q", "padded"])
def dkdv_kernel(
    q: Pointer, k: Pointer, v: Pointer, grad: Pointer,  # as in `dq_kernel`
    q_stride: Number, k_stride: Number, v_stride: Number, grad_stride: Number,
    lse_delta: Pointer,        # (2, H, padded) float32, LSE and delta
    dk: Pointer, dv: Pointer,  # written: (Tk, G, E)
    cu_seqlens_q: Pointer, cu_seqlens_k: Pointer, q_positions: Pointer,
    segments: Number, tokens_q: Number, padded: Number, scale: Number,
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Program (slot, key head): a tile of keys over all queries, of H / G heads, that see it."""
    # first tiles first: under a causal mask the first keys of a segment cost most
    tile, key_head = tl.program_id(0), tl.program_id(1)
    segment, start_k, length_k, begin_key = find_tile(cu_seqlens_k, segments, tile, BLOCK_N)
    if begin_key >= length_k:
        return
    start_q, length_q = segment_bounds(cu_seqlens_q, segment)
    corner = [begin_key, key_head * E]
    k_tile = describe(k, k_stride, start_k, length_k, G, E, BLOCK_N).load(corner)
    v_tile = describe(v, v_stride, start_k, length_k, G, E, BLOCK_N).load(corner)
    queries = describe(q, q_stride, start_q, length_q, H, E, BLOCK_M)
    grads = describe(grad, grad_stride, start_q, length_q, H, E, BLOCK_M)
    # LSE and delta, a number for each query, come through descriptors, too
    lse = lse_delta + padded_start(segment, start_q)
    delta = lse + H * padded
    width = tl.maximum(length_q, 1)
    lses = tl.make_tensor_descriptor(lse, [H, width], [padded, 1], [1, BLOCK_M])
    deltas = tl.make_tensor_descriptor(delta, [H, width], [padded, 1], [1, BLOCK_M])
    begin_q, full_begin = queries_that_see(begin_key, q_positions, start_q, length_q, length_k,
                                           MASK, BLOCK_M, BLOCK_N)
    key = begin_key + tl.arange(0, BLOCK_N)
    dk_tile = tl.zeros([BLOCK_N, E], tl.float32)
    dv_tile = tl.zeros([BLOCK_N, E], tl.float32)
    # the H / G query heads of this key head: their sums stay in this program, without atomics
    for head in range(key_head * (H // G), (key_head + 1) * (H // G)):
        for begin in range(begin_q, length_q, BLOCK_M):
            q_tile = queries.load([begin, head * E])
            grad_tile = grads.load([begin, head * E])
            lse_tile = lses.load([head, begin]).reshape(BLOCK_M)
            delta_tile = deltas.load([head, begin]).reshape(BLOCK_M)
            s = tl.dot(k_tile, q_tile.T, input_precision="ieee")  # (BLOCK_N, BLOCK_M)
            p = tl.exp2(s * scale - lse_tile[None, :])
            if begin < full_begin:
                query = begin + tl.arange(0, BLOCK_M)
                last_key = last_visible_key(query, q_positions, start_q, length_q, length_k, MASK)
                p = tl.where(key[:, None] <= last_key[None, :], p, 0.0)
            # queries past the end of the segment are zeros: p is 1, and p dO and ds q are 0
            dv_tile = tl.dot(p.to(grad_tile.dtype), grad_tile, dv_tile, input_precision="ieee")
            dp = tl.dot(v_tile, grad_tile.T, input_precision="ieee")
            ds = p * (dp - delta_tile[None, :])
            dk_tile = tl.dot(ds.to(q_tile.dtype), q_tile, dk_tile, input_precision="ieee")

    place = ((start_k + key).to(tl.int64) * G + key_head)[:, None] * E + tl.arange(0, E)[None, :]
    is_key = (key < length_k)[:, None]
    dk_tile = dk_tile * (scale / LOG2E)
    tl.store(dk + place, dk_tile.to(dk.dtype.element_ty), mask=is_key)
    tl.store(dv + place, dv_tile.to(dv.dtype.element_ty), mask=is_key)


@triton.jit(do_not_specialize=["tokens_q", "tokens_k", "segments"])
def check_kernel(valid: Pointer, cu_seqlens_q: Pointer, cu_seqlens_k: Pointer, tokens_q: Number,
                 tokens_k: Number, segments: Number):
    """valid: 1 if cu_seqlens rise from 0 to the tokens on both sides, else 0."""
    wrong = (tl.load(cu_seqlens_q) != 0) | (tl.load(cu_seqlens_q + segments) != tokens_q)
    wrong |= (tl.load(cu_seqlens_k) != 0) | (tl.load(cu_seqlens_k + segments) != tokens_k)
    wrong = wrong.to(tl.int32)
    for first in range(1, segments + 1, 128):
        at = tl.minimum(first + tl.arange(0, 128), segments)
        falls = tl.load(cu_seqlens_q + at) < tl.load(cu_seqlens_q + at - 1)
        falls |= tl.load(cu_seqlens_k + at) < tl.load(cu_seqlens_k + at - 1)
        wrong += tl.sum(falls.to(tl.int32))
    tl.store(valid, (wrong == 0).to(tl.int32))


# ---------------------------------------------------------------------------------- the launches

class Tile(NamedTuple):
    """A launch configuration."""
    BLOCK_M: int     # queries in a block
    BLOCK_N: int     # keys in a block
    num_warps: int   # of a program, 32 threads each
    num_stages: int  # of the pipeline that loads blocks ahead


# (kernel, architecture) -> the numbers of a Tile for widths up to 64, and for width 128.  On Hopper
# a tile of queries of width 128 takes 128 x 128 x 2 bytes = 32 KiB, two stages of K and V 128 KiB.
# No kernel spills registers in Triton 3.6 and 3.9, but for float32 dK/dV of width 128
# (`benchmarks/compile.py` prints all).  Only a GPU can say which tiles are fastest.  Decoding has
# 16 queries, too few for Hopper's matrix instructions (wgmma).  Three stages of dK/dV would want 32
# queries at least: TMA wants each stage of LSE at a multiple of 128 bytes.
TILES = {
    ("specialized", "hopper"): ((128, 128, 4, 2), (128, 128, 4, 2)),
    ("forward", "hopper"): ((128, 64, 4, 3), (128, 128, 8, 2)),
    ("forward", "ampere"): ((128, 64, 8, 2), (128, 32, 8, 3)),
    ("forward", "float32"): ((16, 32, 8, 1), (16, 16, 8, 1)),
    ("decode", "hopper"): ((16, 128, 4, 3), (16, 64, 4, 3)),
    ("decode", "ampere"): ((16, 128, 4, 2), (16, 64, 4, 2)),
    ("decode", "float32"): ((16, 32, 8, 1), (16, 16, 8, 1)),
    ("dq", "hopper"): ((128, 64, 8, 2), (128, 64, 8, 2)),
    ("dq", "ampere"): ((128, 64, 8, 2), (64, 64, 8, 2)),
    ("dq", "float32"): ((16, 32, 4, 2), (8, 16, 4, 1)),
    ("dkdv", "hopper"): ((64, 128, 8, 2), (32, 128, 8, 2)),
    ("dkdv", "ampere"): ((32, 128, 8, 2), (32, 64, 8, 2)),
    ("dkdv", "float32"): ((16, 16, 8, 2), (16, 16, 8, 1)),
}
SPECIALIZE = True        # on Hopper some warps load, the others compute; False: the plain form
HEADS_PER_PROGRAM = 4    # of a specialized program, where there are enough programs
PROGRAMS_WANTED = 256    # about two for each of a large GPU's multiprocessors
MIN_KEYS_PER_SPLIT = 256  # shorter splits cost more to merge than they save


def compute_capability(device: torch.device) -> tuple[int, int]:
    """What a GPU can do, (8, 0) for sm_80; (0, 0) for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def architecture(x: Tensor) -> str:
    """The key of TILES: "float32" for float32; "hopper" for sm_90 and sm_100, which have 227 KiB of
    shared memory; "ampere" for all others, which have 99 KiB at least, sm_120 (RTX 50) included."""
    if x.dtype == torch.float32:
        return "float32"
    return "hopper" if compute_capability(x.device)[0] in (9, 10) else "ampere"


def specializes(x: Tensor) -> bool:
    """Triton is known to compile the specialized forms for sm_90 only."""
    return SPECIALIZE and compute_capability(x.device)[0] == 9


def tile_for(kernel: str, target: str, width: int) -> Tile:
    narrow, wide = TILES[kernel, target]
    return Tile(*(narrow if width <= 64 else wide))


def describable(x: Tensor) -> Tensor:
    """x (T, heads, E), copied if no descriptor fits: heads must lie side by side, tokens at
    multiples of 16 bytes."""
    token, head = x.stride()[:2]
    nested = head == x.shape[2] and token >= x.shape[1] * head
    if nested and x.data_ptr() % 16 == 0 and token * x.element_size() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def give_scratch(device: torch.device) -> None:
    """Set Triton's allocator for the descriptors that a kernel makes.  It belongs to a thread, and
    PyTorch runs backward passes in another one: call this before each launch."""
    triton.set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device))


def tiles_at_most(tokens: int, cu_seqlens: Tensor, block: int) -> int:
    """Tiles of a row, surplus ones included, see `find_tile`."""
    return tokens // block + len(cu_seqlens) - 1


def triton_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, scale: float, causal: bool, q_positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out (Tq, H, E) and LSE (H, Tq) in units of log 2, by `forward_kernel`."""
    tokens, heads, width = q.shape
    key_heads = k.shape[1]
    if tokens == 0 or len(k) == 0:
        return q.new_zeros(q.shape), q.new_full((heads, tokens), -math.inf, dtype=torch.float32)
    valid = torch.empty(1, dtype=torch.int32, device=q.device)
    segments = len(cu_seqlens_q) - 1
    check_kernel[(1,)](valid, cu_seqlens_q, cu_seqlens_k, tokens, len(k), segments)
    torch.ops.aten._assert_async.msg(
        valid[0], "cu_seqlens_q and cu_seqlens_k must rise from 0 to the number of tokens")

    target, kernel, stacked = architecture(q), "forward", 1
    if max_seqlen_q * heads // key_heads <= 16:
        # Decoding: the R = H / G heads that share keys become R queries of one tile, so keys are
        # loaded once for all of them: q becomes (Tq R, G, E).
        kernel, stacked = "decode", heads // key_heads
        q = q.unflatten(1, (key_heads, stacked)).transpose(1, 2).flatten(0, 1)
        cu_seqlens_q, heads = cu_seqlens_q * stacked, key_heads
    elif specializes(q) and target == "hopper" and q_positions is None:
        kernel = "specialized"
    tile = tile_for(kernel, target, width)
    q, k, v = describable(q), describable(k), describable(v)
    tiles = tiles_at_most(len(q), cu_seqlens_q, tile.BLOCK_M)

    splits = heads_per_program = 1
    if kernel == "decode":
        # too few tiles to fill a GPU: several programs share the keys, as in Flash-Decoding
        wanted = PROGRAMS_WANTED // (tiles * heads)
        splits = max(1, min(triton.cdiv(max_seqlen_k, MIN_KEYS_PER_SPLIT), wanted))
    elif kernel == "specialized" and tiles * heads >= HEADS_PER_PROGRAM * PROGRAMS_WANTED:
        heads_per_program = math.gcd(heads, HEADS_PER_PROGRAM)
    keys_per_split = triton.cdiv(triton.cdiv(max_seqlen_k, splits), tile.BLOCK_N) * tile.BLOCK_N
    dtype = q.dtype if splits == 1 else torch.float32
    out = q.new_empty(splits, *q.shape, dtype=dtype)
    lse = q.new_empty(splits, heads, len(q), dtype=torch.float32)
    give_scratch(q.device)
    forward_kernel[tiles, heads // heads_per_program, splits](
        q, k, v, q.stride(0), k.stride(0), v.stride(0), out, lse, cu_seqlens_q, cu_seqlens_k,
        q_positions, segments, len(q), keys_per_split, scale * LOG2E.value,
        H=heads, G=key_heads, E=width, MASK=mask_of(causal, q_positions), STACKED=stacked,
        HEADS_PER_PROGRAM=heads_per_program, SPECIALIZED=kernel == "specialized", **tile._asdict())
    out, lse = merge_splits(out, lse)
    if kernel == "decode":
        # back to (Tq, H, E) and (H, Tq)
        out = out.unflatten(0, (tokens, stacked)).transpose(1, 2).flatten(1, 2)
        lse = lse.unflatten(1, (tokens, stacked)).transpose(1, 2).flatten(0, 1)
    return out.to(k.dtype), lse.contiguous()


def mask_of(causal: bool, q_positions: Tensor | None) -> str:
    """MASK of the kernels."""
    if q_positions is not None:
        return "explicit"
    return "causal" if causal else "full"


def merge_splits(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Each split counts by its share of the sum of exponentials: (splits, ...) -> (...)."""
    if len(out) == 1:
        return out[0], lse[0]
    total = torch.logsumexp(lse / LOG2E.value, dim=0) * LOG2E.value  # in units of log 2
    weights = (lse - total.masked_fill(total.isinf(), 0)).exp2()
    return (out * weights.transpose(1, 2)[..., None]).sum(dim=0), total


def triton_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, scale: float, causal: bool, q_positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv: `dq_kernel` first, for it also finds delta, which `dkdv_kernel` reads."""
    heads, width = q.shape[1:]
    key_heads = k.shape[1]
    dq = q.new_empty(q.shape)
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    if len(q) == 0 or len(k) == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    inputs = [describable(x) for x in (q, k, v, grad)]
    inputs += [x.stride(0) for x in inputs]
    segments = len(cu_seqlens_q) - 1
    padded = (len(q) // 4 + segments) * 4  # see `padded_start`
    lse_delta = lse.new_empty(2, heads, padded)
    rest = cu_seqlens_q, cu_seqlens_k, q_positions, segments, len(q), padded, scale * LOG2E.value
    common = {"H": heads, "G": key_heads, "E": width, "MASK": mask_of(causal, q_positions)}

    give_scratch(q.device)
    tile = tile_for("dq", architecture(q), width)
    dq_kernel[tiles_at_most(len(q), cu_seqlens_q, tile.BLOCK_M), heads](
        *inputs, out, lse, dq, lse_delta, *rest, **common, **tile._asdict())
    tile = tile_for("dkdv", architecture(q), width)
    dkdv_kernel[tiles_at_most(len(k), cu_seqlens_k, tile.BLOCK_N), key_heads](
        *inputs, lse_delta, dk, dv, *rest, **common, **tile._asdict())
    return dq, dk, dv


# --------------------------------------------------------- without a GPU: PyTorch's own attention

def differences(numbers: list[int]) -> list[int]:
    """Each number less the one before."""
    return [after - before for before, after in itertools.pairwise(numbers)]


def dense_calls(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, q_positions: Tensor | None,
    dtype: torch.dtype,
) -> Iterator[tuple[slice, slice, int, dict[str, object]]]:
    """Cut a packed row into calls of dense attention: queries, keys, number of segments, mask.

    Neighbouring segments of equal lengths (pictures of one size) are one call.  With positions,
    each run of successive ones is: 4 5 6 0 1 becomes 4 5 6 on keys 0 to 6, then 0 1 on keys 0, 1.
    """
    # numbers in lists: for one new token, an operator on these few takes longer than the attention
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    calls = []  # with the position of the first query among the keys
    if q_positions is None:
        begin = 0
        lengths = zip(differences(starts_q), differences(starts_k))
        for (length_q, length_k), run in itertools.groupby(lengths):
            end = begin + len(list(run))  # segments begin:end
            calls.append((slice(starts_q[begin], starts_q[end]),
                          slice(starts_k[begin], starts_k[end]), end - begin, length_k - length_q))
            begin = end
    else:
        positions = q_positions.tolist()
        for segment, (begin, end) in enumerate(itertools.pairwise(starts_q)):
            jumps = [i for i in range(begin + 1, end) if positions[i] != positions[i - 1] + 1]
            for begin_q, end_q in itertools.pairwise(sorted({begin, *jumps, end})):
                position = positions[begin_q]
                begin_k = starts_k[segment]
                end_k = min(starts_k[segment + 1], begin_k + position + end_q - begin_q)
                calls.append((slice(begin_q, end_q), slice(begin_k, end_k), 1, position))
    for queries, keys, segments, position in calls:
        length_q = (queries.stop - queries.start) // segments
        length_k = (keys.stop - keys.start) // segments
        if length_q == 0 or length_k <= 0:
            continue  # these see nothing: their out stays 0, their LSE -inf
        # PyTorch's is_causal aligns top-left, ours bottom-right: the same only in a square
        is_causal = causal and position == 0 and length_q == length_k
        mask = None
        if causal and not is_causal and position < length_k - 1:
            mask = torch.full((1, 1, length_q, length_k), -math.inf, dtype=dtype)
            mask = mask.triu(position + 1)
        yield queries, keys, segments, {"is_causal": is_causal, "attn_mask": mask}


def batched(x: Tensor, tokens: slice, segments: int) -> Tensor:
    """Equal segments of x (T, heads, E) as dense attention wants them, (segments, heads, L, E).

    16 bits become 32: few CPUs have instructions for 16, and without them the kernel takes 8 times
    as long.  And dK, dV of heads that share keys are added up in 32 bits.
    """
    x = x[tokens].to(torch.promote_types(x.dtype, torch.float32))
    return x.unflatten(0, (segments, -1)).transpose(1, 2)


def sdpa_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, scale: float, causal: bool, q_positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As `triton_forward`, by the CPU kernel behind `scaled_dot_product_attention`."""
    out = q.new_zeros(q.shape)
    dtype = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_full((q.shape[1], len(q)), -math.inf, dtype=dtype)
    calls = dense_calls(cu_seqlens_q, cu_seqlens_k, causal, q_positions, dtype)
    for queries, keys, n, mask in calls:
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            batched(q, queries, n), batched(k, keys, n), batched(v, keys, n), 0.0, **mask,
            scale=scale)
        if mask["attn_mask"] is not None:  # for a query that sees no key the CPU kernel says 0
            sees_none = mask["attn_mask"].isneginf().all(dim=-1)
            part_lse = part_lse.masked_fill(sees_none, -math.inf)
        out[queries] = part.transpose(1, 2).flatten(0, 1)
        lse[:, queries] = part_lse.transpose(0, 1).flatten(1)
    return out, lse * LOG2E.value


def sdpa_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, scale: float, causal: bool, q_positions: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv by the same CPU kernel."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    dq, dk, dv = (x.new_zeros(x.shape, dtype=dtype) for x in (q, k, v))
    lse = lse.masked_fill(lse.isneginf(), 0) / LOG2E.value
    calls = dense_calls(cu_seqlens_q, cu_seqlens_k, causal, q_positions, dtype)
    for queries, keys, n, mask in calls:
        part_lse = lse[:, queries].unflatten(1, (n, -1)).transpose(0, 1)
        parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            batched(grad, queries, n), batched(q, queries, n), batched(k, keys, n),
            batched(v, keys, n), batched(out, queries, n), part_lse, 0.0, **mask, scale=scale)
        part_dq, part_dk, part_dv = (x.transpose(1, 2).flatten(0, 1) for x in parts)
        dq[queries] = part_dq
        dk[keys] += part_dk  # several stretches may share keys
        dv[keys] += part_dv
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


# ------------------------------------------------------------------------- the operator and its API

def uses_kernels(q: Tensor) -> bool:
    """On a GPU always; on a CPU only in Triton's interpreter, which is for debugging: slow."""
    return q.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


@functools.wraps(triton_forward)  # has its parameters
def attend(*arguments: object) -> tuple[Tensor, Tensor]:
    """Out and LSE, by the kernels or by PyTorch's attention."""
    q, k, _, cu_seqlens_q, cu_seqlens_k = arguments[:5]
    if not q.is_cuda:
        check_cu_seqlens("q", cu_seqlens_q, len(q))
        check_cu_seqlens("k", cu_seqlens_k, len(k))
    forward = triton_forward if uses_kernels(q) else sdpa_forward
    with torch.cuda.device_of(q):
        return forward(*arguments)


# an operator has a gradient, and `torch.compile` keeps it whole in its graph
attention = torch.library.custom_op("llava::attention", attend, mutates_args=())


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
    *tensors, _, _, ctx.scale, ctx.causal, q_positions = inputs  # not the longest segments
    ctx.save_for_backward(*tensors, *output, q_positions)


def backward_of_op(ctx: object, grad: Tensor, grad_lse: Tensor | None) -> tuple:
    q, k, v, cu_seqlens_q, cu_seqlens_k, out, lse, q_positions = ctx.saved_tensors
    grads = attention_backward(grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, ctx.scale,
                               ctx.causal, q_positions)
    return *grads, *[None] * 7  # the other inputs have no gradient


attention.register_autograd(backward_of_op, setup_context=save_for_backward)


def check_cu_seqlens(name: str, cu_seqlens: Tensor, tokens: int) -> None:
    """Raise ValueError unless the segments cover the tokens.  Reading the values would synchronise
    with a GPU, so there `check_kernel` and an assertion on the device stand for this."""
    starts = cu_seqlens.tolist()
    if starts[0] != 0 or starts[-1] != tokens or starts != sorted(starts):
        raise ValueError(f"cu_seqlens_{name} must rise from 0 to the {tokens} tokens of {name}, "
                         f"got {starts[:8]}...{starts[-1]}")


def check_tensors(tensors: dict[str, object]) -> None:
    """Raise ValueError unless all are tensors on q's device, of integers but for q, k and v."""
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, not a {type(x).__name__}")
        if x.device != tensors["q"].device:
            raise ValueError(f"q is on {tensors['q'].device}, but {name} on {x.device}")
        if name in ("q", "k", "v"):
            if x.stride()[-1:] != (1,):
                raise ValueError(f"the last dimension of {name} must be contiguous, its strides "
                                 f"are {x.stride()}")
        elif x.dtype not in (torch.int32, torch.int64) or x.dim() != 1 or not x.is_contiguous():
            raise ValueError(f"{name} must be a contiguous vector of int32 or int64")


def check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless shapes and types fit each other and, where they run, the kernels."""
    if not q.dim() == k.dim() == v.dim() == 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"need q (Tq, H, E) and k, v (Tk, G, E), got {tuple(q.shape)}, "
                         f"{tuple(k.shape)}, {tuple(v.shape)}")
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"attention runs on cpu and cuda, not on {q.device.type}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    if uses_kernels(q):  # the CPU path takes any type and width
        if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(f"the kernels take float32, float16 or bfloat16, not {q.dtype}")
        if q.shape[2] not in (16, 32, 64, 128):
            raise ValueError("the kernels take head widths of 16, 32, 64 and 128, not "
                             f"{q.shape[2]}")


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
    not fit together; on a GPU wrong values of cu_seqlens end the process by an assertion there.
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
    check_shapes(q, k, v)
    if len(cu_seqlens_q) != len(cu_seqlens_k) or len(cu_seqlens_q) == 0:
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k must be vectors of segments + 1 numbers, "
                         f"got {len(cu_seqlens_q)} and {len(cu_seqlens_k)}")
    if q_positions is not None and (not causal or len(q_positions) != len(q)):
        raise ValueError("q_positions needs causal=True and one position per query")
    scale = softmax_scale or q.shape[-1] ** -0.5
    # generation needs no operator, and on a CPU the call of one takes as long as a short attention
    plain = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled() and q.is_cpu
    forward = attend if plain else attention
    out, lse = forward(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale,
                       causal, q_positions)
    return (out, lse.detach() * math.log(2)) if return_lse else out


# ------------------------------------------------------------------------------------------- errors

def main() -> None:
    """Print root-mean-square errors against float64, beside one masked PyTorch product."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 1, 301, 341, 512], device=device)
    segment = segment_ids(cu_seqlens)
    visible = (segment[:, None] == segment[None, :]).tril()

    def this_file(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 300, 300, causal=True)

    def masked_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        return out[0].transpose(0, 1)

    print(f"{f'rms error against float64, {device}':32}{'out':>10}{'dq':>10}{'dk':>10}{'dv':>10}")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        qkv = [torch.randn(512, heads, 64, device=device).to(dtype) for heads in (8, 2, 2)]
        weight, found = torch.randn_like(qkv[0]), []
        # first the measure: the same numbers in float64
        for attend in (masked_sdpa, this_file, masked_sdpa):
            kind = dtype if found else torch.float64
            inputs = [x.to(kind).requires_grad_() for x in qkv]
            out = attend(*inputs)
            found.append([out, *torch.autograd.grad((out * weight).sum(), inputs)])
            errors = [(a - b).square().mean().sqrt() for a, b in zip(found[-1], found[0])]
            if len(found) > 1:
                print(f"{f'{attend.__name__}, {dtype}':32}"
                      + "".join(f"{error:10.1e}" for error in errors))


if __name__ == "__main__":
    main()
