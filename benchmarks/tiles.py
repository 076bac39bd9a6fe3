"""Other tiles than those of attention_kernel.TILES and fp8_kernel.product_options, timed on a GPU.

Run `python -m benchmarks.tiles [KERNEL ...]` on a Hopper GPU: a table for each kernel, fastest
first; what ships has a star.  KERNEL: specialized, forward, dq, dkdv, product.  Of dq and dkdv the
whole backward pass is timed.  Every candidate is first compiled and run in a process of its own,
many at once, so one that hangs or does not compile is left out, and named.
"""

import math
import multiprocessing
import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attention_kernel
import fp8_kernel
from attention_kernel import TILES
from benchmarks.attention import packed_lengths
from benchmarks.clock import attempt, describe_machine, median_ms, print_reasons, print_table

SHIPPED_TILES, SHIPPED_OPTIONS = dict(TILES), fp8_kernel.product_options
SECONDS = 100  # that a candidate may take to compile and run, after the one before it is done
# kernel -> candidates (BLOCK_M, BLOCK_N, warps, stages) for widths up to 64, and for width 128
CANDIDATES: dict[str, tuple[list[tuple], list[tuple]]] = {
    "specialized": (
        [(128, 128, 4, 2), (128, 128, 4, 3), (128, 64, 4, 2), (128, 64, 4, 3), (128, 64, 4, 4)],
        [(128, 128, 4, 2), (128, 64, 4, 2), (128, 64, 4, 3), (128, 32, 4, 4)]),
    "forward": (
        [(128, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3),
         (64, 64, 4, 3), (64, 128, 4, 3), (256, 64, 8, 3)],
        [(128, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2)]),
    "dq": (
        [(128, 64, 8, 2), (128, 64, 8, 3), (128, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 2),
         (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 4, 3)],
        [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3),
         (128, 32, 8, 3), (64, 128, 4, 2)]),
    "dkdv": (
        [(64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (32, 128, 4, 2),
         (32, 128, 8, 2), (128, 64, 8, 2)],
        [(32, 128, 8, 2), (32, 128, 8, 3), (64, 128, 8, 2), (32, 64, 4, 2), (64, 64, 4, 2),
         (64, 64, 8, 2)]),
    # BLOCK_N, BAND, warps, stages; specialized where there are 4 warps
    "product": ([], [(128, 8, 4, 3), (128, 8, 4, 4), (128, 8, 4, 2), (128, 16, 4, 3),
                     (128, 4, 4, 3), (128, 8, 8, 3), (128, 8, 8, 4), (64, 8, 4, 4)])}
SHAPES = {  # width -> label -> lengths, query heads, key heads, causal
    64: {"8 x 2048, full": ([2048] * 8, 16, 16, False)},
    128: {"8192, causal": ([8192], 32, 8, True),
          "8192 packed, causal": (packed_lengths(8192), 32, 8, True)}}


def attention_call(kernel: str, width: int, lengths: list[int], heads: int, key_heads: int,
                   causal: bool) -> tuple[Callable[[], Any], float]:
    """A forward or a backward pass, and the operations of its products under the mask."""
    torch.manual_seed(0)
    tokens, longest = sum(lengths), max(lengths)
    q, grad = torch.randn(2, tokens, heads, width, device="cuda", dtype=torch.bfloat16)
    k, v = torch.randn(2, tokens, key_heads, width, device="cuda", dtype=torch.bfloat16)
    cu = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    pairs = sum(n * (n + 1) / 2 if causal else n * n for n in lengths) * heads * width
    if kernel in ("specialized", "forward"):
        return (lambda: attention_kernel.triton_forward(
            q, k, v, cu, cu, longest, longest, width ** -0.5, causal, None)), 4 * pairs
    out, lse = attention_kernel.triton_forward(q, k, v, cu, cu, longest, longest, width ** -0.5,
                                               causal, None)
    return (lambda: attention_kernel.triton_backward(
        grad, q, k, v, out, lse, cu, cu, width ** -0.5, causal, None)), 10 * pairs


def product_call(tokens: int, inputs: int, outputs: int,
                 square: bool) -> tuple[Callable[[], Tensor], float]:
    """A product of quantised matrices."""
    torch.manual_seed(0)
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
    a, b = fp8_kernel.quantize_fp8(x)[0], fp8_kernel.quantize_fp8(w, square=square)[0]
    return lambda: fp8_kernel.fp8_matmul(a, b), 2 * tokens * inputs * outputs


def calls(kernel: str, width: int, small: bool) -> dict[str, tuple[Callable[[], Any], float]]:
    """What to time, by label; small: the same kernels, on an eighth of the tokens."""
    if kernel == "product":
        tokens = 256 if small else 8192
        return {"by squares, 2560 to 19456": product_call(tokens, 2560, 19456, True),
                "by rows, 8192 to 2560": product_call(2560, tokens, 2560, False)}
    cut = 8 if small else 1
    return {label: attention_call(kernel, width, [max(1, n // cut) for n in lengths], *rest)
            for label, (lengths, *rest) in SHAPES[width].items()}


def use(kernel: str, width: int, candidate: tuple) -> None:
    """Let the next launches take the candidate."""
    if kernel == "product":
        block_n, band, warps, stages = candidate
        fp8_kernel.product_options = lambda *_: {
            "SPECIALIZED": warps == 4, "BLOCK": fp8_kernel.BLOCK, "BLOCK_N": block_n,
            "BAND": band, "num_warps": warps, "num_stages": stages}
        return
    attention_kernel.SPECIALIZE = kernel != "forward"
    tiles = list(TILES[kernel, "hopper"])
    tiles[width > 64] = candidate
    TILES[kernel, "hopper"] = tuple(tiles)


def ships(kernel: str, width: int) -> tuple:
    """The candidate that is not one."""
    if kernel == "product":
        options = SHIPPED_OPTIONS(9, True)
        return tuple(options[name] for name in ("BLOCK_N", "BAND", "num_warps", "num_stages"))
    return SHIPPED_TILES[kernel, "hopper"][width > 64]


def rehearse(kernel: str, width: int, candidate: tuple) -> str:
    """Compile and run a candidate; returns what is wrong with it."""
    use(kernel, width, candidate)
    attention_kernel.PROGRAMS_WANTED = 0  # several heads a program, as at full size
    reasons = {}
    for label, (call, _) in calls(kernel, width, small=True).items():
        attempt(reasons, label, lambda c=call: (c(), torch.cuda.synchronize()))
    return "; ".join(reasons.values())


def main() -> None:
    if describe_machine() != "cuda":
        sys.exit("benchmarks.tiles: needs a GPU")
    wanted = sys.argv[1:] or list(CANDIDATES)
    jobs = [(kernel, width, candidate) for kernel in wanted
            for width, candidates in zip((64, 128), CANDIDATES[kernel])
            for candidate in candidates]
    pool = multiprocessing.get_context("spawn").Pool(
        max(1, (os.cpu_count() or 2) - 2), maxtasksperchild=1)
    waiting = [(job, pool.apply_async(rehearse, job)) for job in jobs]
    fit = []
    for job, result in waiting:
        try:
            wrong = result.get(timeout=SECONDS)
        except multiprocessing.TimeoutError:
            wrong = f"not done after {SECONDS} s"
        if wrong:
            print("left out:", *job, wrong, flush=True)
        else:
            fit.append(job)
    pool.terminate()
    for kernel in wanted:
        for width in (64, 128):
            lines, reasons = [], {}
            for job in fit:
                if job[:2] != (kernel, width):
                    continue
                use(*job)
                name = " x ".join(map(str, job[2])) + " *" * (job[2] == ships(kernel, width))
                line = [name]
                for call, work in calls(kernel, width, small=False).values():
                    ms = attempt(reasons, name, median_ms, call, "cuda")
                    line += [ms, ms and work / ms / 1e9]
                lines.append(line)
                TILES.update(SHIPPED_TILES)
                fp8_kernel.product_options = SHIPPED_OPTIONS
            if lines:
                labels = [f"{label}, {unit}" for label in calls(kernel, width, small=True)
                          for unit in ("ms", "TFLOP/s")]
                print_table([f"{kernel}, width {width}", *labels],
                            sorted(lines, key=lambda line: line[1] or math.inf))
                print_reasons(reasons)


if __name__ == "__main__":
    main()
