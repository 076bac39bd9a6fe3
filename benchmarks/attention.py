"""Attention beside PyTorch's other ways: forward and backward, TFLOP/s and ratio.

Run `python -m benchmarks.attention`: on a GPU widths 64 and 128, full and causal, 512 to 16,384
tokens, then packed rows of text and pictures; on a CPU three packings of 4,096 tokens beside one
product with a mask.  The last column says how many times faster this project is than the best of
the others; "plain form" is its own, without warps that only load.  `--without flex` leaves a way
out: FlexAttention is compiled anew for every shape, which takes longer than all the rest.

Counted are the pairs of query and key that see each other: 4 E operations each and per head in the
forward pass (two products), 10 E in the backward pass (five), whatever a kernel really computes.
"""

import functools
import inspect
import random
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import attention_kernel
from attention_kernel import flash_attn_varlen_func, segment_ids
from benchmarks.clock import attempt, describe_machine, median_ms, print_reasons, print_table
from data import flag_parser

MEAN = 753  # tokens of a training sample of the instruction data, packed into rows of 8k or 32k
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    """A packed row to attend in."""

    lengths: list[int]  # tokens of each segment
    heads: int
    key_heads: int
    width: int
    causal: bool


def packed_lengths(tokens: int, seed: int = 0) -> list[int]:
    """Random segments, exponential around MEAN like the real ones, that fill a row."""
    rng, lengths = random.Random(seed), []
    while sum(lengths) < tokens:
        lengths.append(min(1 + int(rng.expovariate(1 / MEAN)), tokens - sum(lengths)))
    return lengths


def random_row(lengths: list[int], heads: int, key_heads: int, width: int, dtype: torch.dtype,
               device: str, causal: bool) -> tuple[list[Tensor], dict]:
    """q, k, v of a packed row, and the other arguments of `flash_attn_varlen_func`."""
    qkv = [torch.randn(sum(lengths), count, width, device=device).to(dtype).requires_grad_()
           for count in (heads, key_heads, key_heads)]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return qkv, {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens,
                 "max_seqlen_q": max(lengths), "max_seqlen_k": max(lengths), "causal": causal}


# ----------------------------------------------------------------------------------- the other ways


def masked_sdpa(lengths: list[int], rest: dict) -> Attend:
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


def dense_sdpa(lengths: list[int], rest: dict, backend: SDPBackend) -> Attend:
    """PyTorch's dense attention on segments of equal length, by one of its kernels."""
    if len(set(lengths)) > 1:
        raise ValueError("segments differ in length")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        copies = q.shape[1] // k.shape[1]
        if copies > 1 and backend == SDPBackend.EFFICIENT_ATTENTION:  # it knows no groups
            k, v = (x.repeat_interleave(copies, dim=1) for x in (k, v))
        rows = (x.unflatten(0, (len(lengths), -1)).transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(*rows, is_causal=rest["causal"],
                                                 enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(0, 1)
    return attend


def flash_2(lengths: list[int], rest: dict) -> Attend:
    """FlashAttention-2's varlen operator as PyTorch ships it; it takes fewer key heads as is."""
    cu_seqlens, longest = rest["cu_seqlens_q"], rest["max_seqlen_q"]
    return lambda q, k, v: torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens, cu_seqlens, longest, longest, 0.0, rest["causal"], False)[0]


def flash_3(lengths: list[int], rest: dict) -> Attend:
    """FlashAttention-3's varlen function, from the package flash_attn_interface where it is."""
    from flash_attn_interface import flash_attn_varlen_func as flash_3_varlen
    cu_seqlens, longest = rest["cu_seqlens_q"], rest["max_seqlen_q"]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_3_varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest,
                             causal=rest["causal"])
        return out[0] if isinstance(out, tuple) else out
    return attend


def torch_varlen(lengths: list[int], rest: dict) -> Attend:
    """PyTorch's own varlen function (2.11 and later; fewer key heads since 2.12)."""
    from torch.nn.attention.varlen import varlen_attn
    cu_seqlens, longest = rest["cu_seqlens_q"], rest["max_seqlen_q"]
    window = (-1, 0) if rest["causal"] else (-1, -1)
    grouped = "enable_gqa" in inspect.signature(varlen_attn).parameters
    more = {"enable_gqa": True} if grouped else {}

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[1] != k.shape[1] and not grouped:
            raise ValueError("it takes as many key heads as query heads")
        return varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=window,
                           **more)
    return attend


def flex(lengths: list[int], rest: dict) -> Attend:
    """FlexAttention, compiled, with its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    segment = segment_ids(rest["cu_seqlens_q"])

    def visible(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        same = segment[i] == segment[j]
        return same & (i >= j) if rest["causal"] else same

    mask = create_block_mask(visible, None, None, len(segment), len(segment), segment.device)
    torch.compiler.reset()  # each shape is compiled anew; the compiler counts and gives up at 8
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(*(x.transpose(0, 1)[None] for x in (q, k, v)),
                                    block_mask=mask, enable_gqa=True)[0].transpose(0, 1)


def plain_form(lengths: list[int], rest: dict) -> Attend:
    """This project's kernels without warps that only load, as GPUs other than Hopper run them."""
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attention_kernel.SPECIALIZE = False
        try:
            return flash_attn_varlen_func(q, k, v, **rest)
        finally:
            attention_kernel.SPECIALIZE = True
    return attend


def competitors(device: str) -> dict[str, Callable[[list[int], dict], Attend]]:
    """The other ways by name."""
    if device == "cpu":
        return {"masked SDPA": masked_sdpa}
    dense = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION,
             "efficient": SDPBackend.EFFICIENT_ATTENTION}
    return {**{name: functools.partial(dense_sdpa, backend=x) for name, x in dense.items()},
            "FA2": flash_2, "FA3": flash_3, "varlen": torch_varlen, "flex": flex,
            "plain form": plain_form}


# ------------------------------------------------------------------------------------------ timings


def passes_ms(attend: Attend, qkv: list[Tensor], device: str) -> dict[str, float]:
    """Milliseconds of the forward pass, of both passes, and of the backward pass between them."""
    grad = torch.randn_like(attend(*qkv))
    forward = median_ms(lambda: attend(*qkv), device)
    both = median_ms(lambda: torch.autograd.grad(attend(*qkv), qkv, grad), device)
    return {"forward": forward, "backward": both - forward, "both": both}


def print_timings(title: str, shapes: dict[str, Shape], device: str, dtype: torch.dtype,
                  without: list[str]) -> None:
    """A table of TFLOP/s, ours and of the others; last, ours over the best of the others."""
    others = {name: way for name, way in competitors(device).items() if name not in without}
    reasons, lines = {}, []
    for label, shape in shapes.items():
        qkv, rest = random_row(*shape[:4], dtype, device, shape.causal)
        attend = functools.partial(flash_attn_varlen_func, **rest)
        ours, found = attempt(reasons, f"ours, {label}", passes_ms, attend, qkv, device), {}
        if ours is None:
            continue
        for name, prepare in others.items():
            found[name] = attempt(
                reasons, name, lambda p=prepare, q=qkv, s=shape, r=rest:
                passes_ms(p(s.lengths, r), q, device))
        pairs = sum(n * (n + 1) / 2 if shape.causal else n * n for n in shape.lengths)
        for name, factor in (("forward", 4), ("backward", 10), ("both", 14)):
            rate = factor * pairs * shape.heads * shape.width / 1e9
            times = [other and other[name] for other in found.values()]
            foreign = [t for way, t in zip(others, times) if t and way != "plain form"]
            best = min(foreign, default=None)
            lines.append([label, name, ours[name], rate / ours[name],
                          *(t and rate / t for t in times), best and best / ours[name]])
    print_table([title, "pass", "ms", "TFLOP/s", *others, "times best"], lines)
    print_reasons(reasons)


def main() -> None:
    parser = flag_parser("Attention beside PyTorch's other ways.")
    parser.add_argument("--without", nargs="*", default=[], help="columns to leave out")
    without = parser.parse_args().without
    device = describe_machine()
    torch.manual_seed(0)
    if device == "cpu":
        lengths = {"8 x 512": [512] * 8, "64 x 64": [64] * 64,
                   "8 of 46 to 1,500": [100, 900, 250, 1500, 46, 700, 300, 300]}
        print_timings("4,096 tokens, 8 heads, 2 key heads of 64",
                      {label: Shape(n, 8, 2, 64, True) for label, n in lengths.items()},
                      device, torch.float32, without)
        return
    for width, heads, key_heads in ((64, 16, 16), (128, 32, 8)):
        for causal in (False, True):
            shapes = {f"{16384 // n} x {n}": Shape([n] * (16384 // n), heads, key_heads, width,
                                                   causal)
                      for n in (512, 1024, 2048, 4096, 8192, 16384)}
            title = (f"{heads} heads, {key_heads} key heads of {width}, "
                     f"{'causal' if causal else 'full'}")
            print_timings(title, shapes, device, torch.bfloat16, without)
    packed = {f"text, {n} tokens of {MEAN} on average": Shape(packed_lengths(n), 32, 8, 128, True)
              for n in (8192, 32768)}
    sizes = random.Random(0).choices((256, 576, 1024, 1296, 2304, 4096), k=16)
    packed[f"pictures, {sum(sizes)} patches, 16 of 64"] = Shape(sizes, 16, 16, 64, False)
    print_timings("packed", packed, device, torch.bfloat16, without)


if __name__ == "__main__":
    main()
