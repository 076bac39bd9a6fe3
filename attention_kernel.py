"""Varlen attention: one function for the ViT, the decoder, generation and context parallelism.

In: q (Tq, H, E), k and v (Tk, G, E), all segments end to end without padding.  Out: (Tq, H, E).
Called by `vision.py` (bidirectional, one segment per picture or frame) and `model.py` (causal, one
segment per packed sample); calls nothing of the project.

The idea.  A packed row holds S independent sequences.  `cu_seqlens` (S + 1,) says where each one
starts, so segment s owns rows cu[s]:cu[s+1], and

    O_i = sum_j softmax_j(q_i . k_j * scale) v_j      over the keys j that query i may see:

keys of its own segment only and, if causal, those not after it.  Queries are aligned with the
*last* keys of their segment (bottom-right), so that a decoding step, which brings one query for
many cached keys, is the same call as a training step.  The cost is the sum of the squares of the
segment lengths, not the square of the row: 8 documents of 512 cost an eighth of 4096^2.

Shapes: T tokens in a packed row, S segments, H query heads, G key/value heads (H a multiple of G;
query head h reads key head h // (H / G)), E head width, L tokens of one segment.

`attention_reference` is the definition: dense, any dtype, any device, unconcerned with memory.
`flash_attn_varlen_func` is what the models call.

Run `python attention_kernel.py`: prints errors against float64 and timings against one dense
masked product, on this machine.
"""

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def segment_ids(cu_seqlens: Tensor) -> Tensor:
    """Segment number of every row, (T,) int64: cu_seqlens [0, 2, 5] -> [0, 0, 1, 1, 1]."""
    lengths = cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None = None,
    causal: bool = False, return_lse: bool = False, q_positions: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition, with the arguments of `flash_attn_varlen_func`: one dense (Tq, Tk) mask."""
    segment_q, segment_k = segment_ids(cu_seqlens_q), segment_ids(cu_seqlens_k)
    visible = segment_q[:, None] == segment_k[None, :]  # (Tq, Tk)
    if causal:
        position_k = torch.arange(len(k), device=k.device) - cu_seqlens_k[segment_k]
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


def check_arguments(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    causal: bool, q_positions: Tensor | None,
) -> None:
    """Raise ValueError for what would otherwise read out of bounds or attend to the wrong keys."""
    if not (q.dim() == k.dim() == v.dim() == 3) or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"need q (Tq, H, E) and k, v (Tk, G, E), got {tuple(q.shape)}, "
                         f"{tuple(k.shape)}, {tuple(v.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are not a multiple of {k.shape[1]} key heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k, v differ in dtype: {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v are on different devices: {q.device}, {k.device}, {v.device}")
    for name, cu_seqlens, tokens in (("q", cu_seqlens_q, len(q)), ("k", cu_seqlens_k, len(k))):
        if (cu_seqlens.dim() != 1 or len(cu_seqlens) == 0
                or cu_seqlens.dtype not in (torch.int32, torch.int64)):
            raise ValueError(f"cu_seqlens_{name} must be a vector of int32 or int64, at least [0]")
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != tokens or (cu_seqlens.diff() < 0).any():
            raise ValueError(f"cu_seqlens_{name} must rise from 0 to the {tokens} tokens of "
                             f"{name}, got {cu_seqlens.tolist()[:8]}...{cu_seqlens[-1]}")
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(f"cu_seqlens_q has {len(cu_seqlens_q) - 1} segments, "
                         f"cu_seqlens_k {len(cu_seqlens_k) - 1}")
    if q_positions is not None and (not causal or q_positions.shape != (len(q),)):
        raise ValueError("q_positions needs causal=True and one position per query")


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool,
           q_positions: Tensor | None, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Attention of N segments of equal lengths: q (N, Lq, H, E), k, v (N, Lk, G, E), Lk > 0.

    Returns out (N, Lq, H, E) and, if asked for, LSE (N, H, Lq).  Only square causal segments take
    the mask-free kernel; a short query block (decoding) costs little with an explicit mask.
    """
    length_q, length_k = q.shape[1], k.shape[1]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (N, heads, L, E)
    mask = None
    if q_positions is not None:
        mask = torch.arange(length_k, device=q.device) <= q_positions[..., None]  # (N, Lq, Lk)
        mask = mask[:, None]
    elif causal and 1 < length_q != length_k:
        mask = torch.ones(length_q, length_k, dtype=torch.bool, device=q.device)
        mask = mask.tril(length_k - length_q)
    lse = None
    if return_lse:
        grouped = q.unflatten(1, (k.shape[1], -1))  # (N, G, H/G, Lq, E)
        scores = (grouped @ k[:, :, None].transpose(-1, -2)).flatten(1, 2) * scale
        if mask is None and causal and length_q > 1:
            mask = torch.ones(length_q, length_k, dtype=torch.bool, device=q.device).tril()
        scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
        lse = scores.logsumexp(dim=-1)  # (N, H, Lq)
    square = mask is None and causal and length_q > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square, scale=scale,
                                         enable_gqa=q.shape[1] != k.shape[1])
    return out.transpose(1, 2), lse


def equal_runs(lengths: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Maximal runs of equal neighbours as (first, last + 1): [a, a, b] -> [(0, 2), (2, 3)]."""
    edges = [0] + [i for i in range(1, len(lengths)) if lengths[i] != lengths[i - 1]]
    return list(zip(edges, edges[1:] + [len(lengths)]))


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float | None = None,
    causal: bool = False, return_lse: bool = False, q_positions: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed segments; signature and meaning of the flash-attn function of that name.

    q: (Tq, H, E); k, v: (Tk, G, E), H a multiple of G.
    cu_seqlens_q, cu_seqlens_k: (S + 1,) int32 or int64, first row of each segment, then the total.
    max_seqlen_q, max_seqlen_k: longest segment, in tokens (of use to a kernel's launch only).
    softmax_scale: factor on the scores, default E ** -0.5.
    causal: query i of a segment sees keys up to i + len_k - len_q (bottom-right alignment).
    q_positions: (Tq,) with causal=True: the query sees keys up to this position of its segment.

    Returns out (Tq, H, E), and with return_lse the log-sum-exp of the scores, (H, Tq).  A query
    that sees no key gets 0 and -inf.  Raises ValueError on shapes that do not fit together.
    """
    check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, q_positions)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    lengths = list(zip(cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()))
    runs = equal_runs(lengths)
    # one batched product per run of equal neighbours (the pictures of one size, the rows of a
    # decoding batch); split, unlike slicing, costs no zero-filled gradient per piece
    rows_q = [(b - a) * lengths[a][0] for a, b in runs]
    rows_k = [(b - a) * lengths[a][1] for a, b in runs]
    positions = [None] * len(runs) if q_positions is None else q_positions.split(rows_q)
    outs, lses = [], []
    for (a, b), qs, ks, vs, ps in zip(runs, q.split(rows_q), k.split(rows_k), v.split(rows_k),
                                      positions):
        length_q, length_k = lengths[a]
        blind = length_q if length_k == 0 else 0  # leading queries of each segment without a key
        if causal and ps is None:
            blind = max(blind, length_q - length_k)
        qs, ks, vs = (x.unflatten(0, (b - a, -1)) if len(x) else x.new_zeros(b - a, 0, *x.shape[1:])
                      for x in (qs, ks, vs))
        ps = None if ps is None else ps.view(b - a, length_q)
        out = torch.zeros_like(qs)
        lse = q.new_full((b - a, q.shape[1], length_q), -math.inf)
        if blind < length_q:
            seen, seen_lse = attend(qs[:, blind:], ks, vs, scale, causal, ps, return_lse)
            out = seen if blind == 0 else torch.cat([out[:, :blind], seen], dim=1)
            if return_lse:
                lse = torch.cat([lse[..., :blind], seen_lse], dim=-1)
        outs.append(out.flatten(0, 1))
        lses.append(lse.transpose(0, 1).flatten(1))
    out = torch.cat(outs) if outs else torch.zeros_like(q)
    return (out, torch.cat(lses, dim=1)) if return_lse else out


# ------------------------------------------------------------------------- errors and timings


def random_row(lengths: list[int], heads: int, groups: int, width: int, dtype: torch.dtype,
               device: str) -> tuple[list[Tensor], dict]:
    """q, k, v of a causal packed row, and the other arguments."""
    tokens = sum(lengths)
    qkv = [torch.randn(tokens, n, width, device=device).to(dtype).requires_grad_()
           for n in (heads, groups, groups)]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0)
    longest = max(lengths)
    return qkv, {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": longest,
                 "max_seqlen_k": longest, "causal": True}


def dense_sdpa(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, causal: bool,
               **unused: object) -> Tensor:
    """The obvious alternative: one PyTorch product with a (T, T) mask."""
    segment = segment_ids(cu_seqlens_q)
    mask = (segment[:, None] == segment[None, :]).tril()
    out = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)),
                                         attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


def print_errors(device: str) -> None:
    """Largest error against float64 of the function and of one masked PyTorch product."""
    print(f"{'largest error against float64':32}{'out':>10}{'dq':>10}{'dk':>10}{'dv':>10}")
    for dtype in (torch.float32, torch.bfloat16):
        qkv, rest = random_row([1, 300, 40, 171], 8, 2, 64, dtype, device)
        weight = torch.randn_like(qkv[0])
        exact = [x.detach().double().requires_grad_() for x in qkv]
        expected = attention_reference(*exact, **rest)
        expected = [expected, *torch.autograd.grad((expected * weight.double()).sum(), exact)]
        for name, attention in (("this file", flash_attn_varlen_func), ("masked SDPA", dense_sdpa)):
            out = attention(*qkv, **rest)
            found = [out, *torch.autograd.grad((out * weight).sum(), qkv)]
            errors = [float((a.double() - b).abs().max().detach())
                      for a, b in zip(found, expected)]
            label = f"{name}, {str(dtype).removeprefix('torch.')}"
            print(f"{label:32}" + "".join(f"{e:10.1e}" for e in errors))


def median_ms(attention: Callable[..., Tensor], qkv: list[Tensor], rest: dict, backward: bool,
              repeats: int = 7) -> float:
    """Median time of one call, in milliseconds, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        out = attention(*qkv, **rest)
        if backward:
            torch.autograd.grad(out.sum(), qkv)
        if out.is_cuda:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return sorted(times[1:])[repeats // 2]


def print_timings(device: str) -> None:
    """Milliseconds on packed rows, beside one masked product, and how many times faster."""
    print(f"\n{'ms, fp32, 8 heads, 2 groups of 64':36}{'forward':>10}{'masked':>9}{'times':>7}"
          f"{'fwd+bwd':>10}{'masked':>9}{'times':>7}")
    for lengths in ([512] * 8, [100, 900, 250, 1500, 46, 700, 300, 300], [64] * 64):
        qkv, rest = random_row(lengths, 8, 2, 64, torch.float32, device)
        row = f"{f'{len(lengths)} segments, {sum(lengths)} tokens':36}"
        for backward in (False, True):
            ours, dense = (median_ms(attention, qkv, rest, backward)
                           for attention in (flash_attn_varlen_func, dense_sdpa))
            row += f"{ours:10.1f}{dense:9.1f}{dense / ours:7.1f}"
        print(row)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if device == "cuda" else (
        f"CPU, {torch.get_num_threads()} threads")
    print(f"{name}, torch {torch.__version__}")
    torch.manual_seed(0)
    print_errors(device)
    print_timings(device)


if __name__ == "__main__":
    main()
