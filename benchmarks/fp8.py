"""FP8 beside bfloat16 and PyTorch's FP8 products: errors, products, linear layers, a decoder layer.

Run `python -m benchmarks.fp8`: on a GPU (sm_89 or newer) TFLOP/s of the products of the 4b and 8b,
the share of quantising in a linear layer, and a decoder layer of the 4b; on a CPU errors and two
layers.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.clock import attempt, describe_machine, median_ms, print_reasons, print_table
from fp8_kernel import (E4M3, Fp8Linear, Quantized, check_device, convert_to_fp8, error_cases,
                        fp8_matmul, layer_products, quantize_fp8, relative_error)
from model import PRESETS, DecoderLayer

MATRICES = {  # inputs and outputs of the matrices that read the same numbers, together
    "4b": {"qkv": (2560, 6144), "o": (4096, 2560), "gate+up": (2560, 19456), "down": (9728, 2560)},
    "8b": {"qkv": (4096, 6144), "o": (4096, 4096), "gate+up": (4096, 24576), "down": (12288, 4096)}}
Product = Callable[[], Tensor]  # of two matrices that were prepared
SCALE_BLOCKS = 4  # PyTorch wants the blocks of a row padded to a multiple of this


# ------------------------------------------------------------------------------- ways to multiply


def ours(a: Tensor, b: Tensor) -> Product:
    """This project's product of quantised matrices."""
    lines, squares = quantize_fp8(a)[0], quantize_fp8(b, square=True)[0]
    return lambda: fp8_matmul(lines, squares, a.dtype)


def quantise_and_multiply(a: Tensor, b: Quantized) -> Tensor:
    """The same with a quantised inside the call."""
    return fp8_matmul(quantize_fp8(a)[0], b, a.dtype)


def bfloat16(a: Tensor, b: Tensor) -> Product:
    """cuBLAS on a GPU."""
    a, b = a.bfloat16(), b.bfloat16()
    return lambda: a @ b.T


def scaled_mm(a: Tensor, b: Tensor, kind: str) -> Product:
    """PyTorch's product, with a scale for all of a matrix, for each row, or for blocks as here."""
    recipe = {"tensor": "TensorWise", "row": "RowWise", "block": "BlockWise1x128"}
    kinds = [getattr(F.ScalingType, recipe[kind])] * 2
    if kind == "block":
        kinds[1] = F.ScalingType.BlockWise128x128
        (a8, scale_a), (b8, scale_b) = quantize_fp8(a)[0], quantize_fp8(b, square=True)[0]
        scale_b = F.pad(scale_b, (0, -scale_b.shape[1] % SCALE_BLOCKS))
    else:
        dims = None if kind == "tensor" else 1
        scale_a, scale_b = (x.float().abs().amax(dims, keepdim=dims == 1) / 448 for x in (a, b))
        a8, b8 = ((x.float() / scale).to(E4M3) for x, scale in ((a, scale_a), (b, scale_b)))
    scale_b = scale_b.T if scale_b.dim() else scale_b
    return lambda: F.scaled_mm(a8, b8.T, scale_a, kinds[0], scale_b, kinds[1],
                               output_dtype=torch.bfloat16)


WAYS: dict[str, Callable[[Tensor, Tensor], Product]] = {
    "ours": ours, "bfloat16": bfloat16,
    **{f"by {kind}": partial(scaled_mm, kind=kind) for kind in ("tensor", "row", "block")}}


# ------------------------------------------------------------------------------------------- tables


def print_errors(device: str) -> None:
    """Errors of the three products against float64, relative, root mean square."""
    pairs, reasons, lines = error_cases(device), {}, []
    exact = [a.double() @ b.double().T for a, b in pairs.values()]
    for name, way in WAYS.items():
        if name == "ours":  # as a layer computes them
            found = layer_products(pairs)
        else:
            calls = [attempt(reasons, name, way, *pair) for pair in pairs.values()]
            found = [call and attempt(reasons, name, call) for call in calls]
        lines.append([name, *(None if y is None else f"{relative_error(y, true):.1e}"
                              for y, true in zip(found, exact))])
    print_table(["error against float64", *pairs], lines)
    print_reasons(reasons)


def print_products(model: str) -> None:
    """TFLOP/s of the product alone, ours also with x quantised before it."""
    reasons, lines = {}, []
    for name, (inputs, outputs) in MATRICES[model].items():
        for tokens in (8192, 16384):
            x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
            w = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16)
            calls = {way: attempt(reasons, way, prepare, x, w) for way, prepare in WAYS.items()}
            squares = quantize_fp8(w, square=True)[0]
            calls["with quantising"] = partial(quantise_and_multiply, x, squares)
            ms = {way: call and attempt(reasons, way, median_ms, call, "cuda")
                  for way, call in calls.items()}
            rates = [t and 2e-9 * tokens * inputs * outputs / t for t in ms.values()]
            ratios = [ms[other] and ms["ours"] and ms[other] / ms["ours"]
                      for other in ("bfloat16", "by block")]
            lines.append([name, tokens, *rates, *ratios])
    print_table([f"{model}, TFLOP/s", "tokens", *WAYS, "with quantising", "ours / bfloat16",
                 "ours / by block"], lines)
    print_reasons(reasons)


def passes_ms(layer: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor,
              device: str) -> float:
    """Milliseconds of a forward and a backward pass."""
    x = x.detach().requires_grad_()
    dy = torch.randn_like(layer(x))
    return median_ms(lambda: torch.autograd.grad(layer(x), [x, *parameters], dy), device)


def print_layers(sizes: dict[str, tuple[int, int]], tokens: int, device: str,
                 dtype: torch.dtype) -> None:
    """Linear layers, forward and backward: how much faster than in `dtype`, and which share of the
    time quantising takes: x and dy along both sides, W before each pass."""
    lines = []
    for name, (inputs, outputs) in sizes.items():
        layer = nn.Linear(inputs, outputs, bias=False, device=device, dtype=dtype)
        x, dy = (torch.randn(tokens, n, device=device, dtype=dtype) for n in (inputs, outputs))
        fast, weight = Fp8Linear(layer.weight), layer.weight.detach()
        before = passes_ms(layer, [layer.weight], x, device)
        after = passes_ms(fast, [fast.weight], x, device)
        extra = sum(median_ms(call, device) for call in (
            partial(quantize_fp8, x, transposed=True), partial(quantize_fp8, dy, transposed=True),
            partial(quantize_fp8, weight, square=True),
            partial(quantize_fp8, weight, square=True, transposed=True)))
        lines.append([f"{name}, {inputs} to {outputs}", before, after, before / after,
                      f"{extra / after:.1%}"])
    print_table([f"{tokens:,} tokens, both passes", f"{str(dtype)[6:]}, ms", "FP8, ms", "ratio",
                 "quantising"], lines)


def print_decoder_layer(tokens: int) -> None:
    """A decoder layer of the 4b on one document, forward and backward, each compiled."""
    config = PRESETS["4b"]
    x = torch.randn(tokens, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    cu_seqlens = torch.tensor([0, tokens], device="cuda")
    angles = torch.rand(tokens, 1, config.head_dim // 2, device="cuda")
    ms = []
    for fp8 in (False, True):
        layer = DecoderLayer(config, 0).to("cuda", torch.bfloat16)
        if fp8:
            convert_to_fp8(layer)
        run = torch.compile(partial(layer, cu_seqlens=cu_seqlens, max_seqlen=tokens,
                                    cos=angles.cos(), sin=angles.sin()))
        ms.append(passes_ms(run, list(layer.parameters()), x, "cuda"))
    print_table([f"decoder layer of the 4b, {tokens:,} tokens", "bfloat16, ms", "FP8, ms", "ratio"],
                [["both passes, compiled", *ms, ms[0] / ms[1]]])


def main() -> None:
    device = describe_machine()
    try:
        check_device(torch.device(device))
    except ValueError as error:
        sys.exit(f"benchmarks.fp8: {error}")
    print_errors(device)
    if device == "cpu":
        print_layers({"tiny's gate": (256, 256), "square": (1024, 1024)}, 1024, device,
                     torch.float32)
        return
    for model, sizes in MATRICES.items():
        print_products(model)
        print_layers(sizes, 8192, device, torch.bfloat16)
    print_decoder_layer(8192)


if __name__ == "__main__":
    main()
