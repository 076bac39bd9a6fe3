"""FP8: kernels against their twins in PyTorch, layers against float64, refusals, and what compiles.

Each kernel runs in Triton's interpreter on a CPU, natively on a GPU with FP8.
"""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor, nn

import fp8_kernel
from fp8_kernel import (BLOCK, Fp8Linear, Groups, Quantized, convert_to_fp8, fp8_matmul, matmul_op,
                        quantize_fp8, quantize_op, quantize_reference)
from model import PRESETS, GroupedLinear, LlavaOneVision, SwiGlu
from train import Ranks, shard

ROUNDING = 2**-4  # relative error of a number in e4m3 at most, in its normal range
# Root mean square of that over all mantissas is 0.026; of a product of two such numbers 0.036.
MEAN_ERROR = 0.04


def of_sums(summands: int) -> float:
    """Error of a product of FP8 matrices, over the sum of magnitudes: what the sums are rounded by.

    Float32 in the interpreter and on a CPU.  A GPU's FP8 units align 32 products at a time to the
    largest and keep 13 bits.  A block has four such groups, and each cuts both the products and the
    sum so far: eight times 2^-13 at most, of which signs leave less than half.
    """
    return 2**-9 if DEVICE == "cuda" else (summands + 8) * 2**-24


def twin(call: Callable, *arguments: object) -> object:
    """The same on the CPU without kernels, whatever the switch says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fp8_kernel, "uses_kernels", lambda x: False)
        moved = [x.cpu() if isinstance(x, Tensor) else x for x in arguments]
        return call(*moved)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, but any NaN equal to any other."""
    bits = {1: torch.uint8, 4: torch.int32}[a.element_size()]
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    nan = a.float().isnan() & b.float().isnan()
    return a.dtype == b.dtype and a.shape == b.shape and bool(
        ((a.view(bits) == b.view(bits)) | nan).all())


def wild_matrix(seed: int) -> Tensor:
    """1 to 300 rows, 128 to 512 columns, magnitudes over many orders, outliers, blocks of zeros."""
    torch.manual_seed(seed)
    rows = int(torch.randint(1, 301, ()))
    columns = BLOCK * int(torch.randint(1, 5, ()))
    x = torch.randn(rows, columns) * torch.exp(4 * torch.randn(rows, 1))
    x[torch.rand(x.shape) < 0.01] *= 1000
    x[:, :BLOCK][torch.rand(rows) < 0.2] = 0
    return x.to([torch.float32, torch.bfloat16][seed % 2]).to(DEVICE)


@pytest.mark.parametrize("seed", range(24))
def test_quantising_equals_its_twin_bit_for_bit(seed: int, kernels: None) -> None:
    """Values and scales, by rows and by squares, each with the transposed copy; of one matrix of
    any height, and of three."""
    x = wild_matrix(seed)
    if seed % 3 == 0:
        x[len(x) // 2, 5], x[-1, -1] = torch.inf, torch.nan
    cases = [(x, False, True, 1), (x, True, seed % 2 == 0, 1),
             (x[:1].repeat(3 * BLOCK, 1) * torch.rand(3 * BLOCK, 1).to(x), True, True, 3)]
    for matrix, square, transposed, matrices in cases:
        ours, theirs = (call(quantize_op, matrix, square, transposed, matrices) for call in (
            lambda f, *a: f(*a), twin))
        assert len(ours) == len(theirs) == (4 if transposed else 2)
        assert all(same(a, b) for a, b in zip(ours, theirs))


def test_a_square_and_its_transpose_have_the_same_numbers() -> None:
    """Of each matrix by itself."""
    torch.manual_seed(0)
    w = torch.randn(3 * 256, 128, device=DEVICE)
    squares, turned = quantize_fp8(w, square=True, transposed=True, matrices=3)
    assert turned.values.shape == (3 * 128, 256) and turned.scales.shape == (3, 2)
    for whole, other in zip(squares.dequantize().chunk(3), turned.dequantize().chunk(3)):
        assert torch.equal(whole.T, other)


@pytest.mark.parametrize("seed", range(12))
def test_products_equal_their_twin(seed: int, kernels: None,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """b by squares and by rows, ragged shapes, with wide tiles and narrow ones."""
    if DEVICE == "cpu":
        monkeypatch.setattr(fp8_kernel, "compute_capability", lambda x: (8 + seed % 2, 9))
    a = wild_matrix(seed)
    b = torch.randn(int(torch.randint(1, 400, ())), a.shape[1]).to(a)
    left = quantize_fp8(a)[0]
    for right in (quantize_fp8(b)[0], quantize_fp8(b, square=True)[0]):
        ours = fp8_matmul(left, right, torch.float32).cpu()
        theirs = twin(matmul_op, *left, *right, None, torch.float32)
        size = (left.dequantize().abs() @ right.dequantize().abs().T).cpu()  # of the summands
        assert ours.shape == (len(a), len(b))
        allowed = of_sums(a.shape[1]) * size
        assert ((ours - theirs).abs() <= allowed).all()
        low = fp8_matmul(left, right, torch.bfloat16).cpu()
        assert low.dtype == torch.bfloat16
        assert ((low.float() - theirs).abs() <= 2 * allowed + 2**-8 * theirs.abs()).all()


@pytest.mark.parametrize("seed", range(8))
def test_products_of_groups_equal_one_by_one(seed: int, kernels: None,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """All three products of experts, some without rows, against a product for each."""
    if DEVICE == "cpu":
        monkeypatch.setattr(fp8_kernel, "compute_capability", lambda x: (8 + seed % 2, 9))
    torch.manual_seed(seed)
    counts = (torch.randint(0, 200, (5,)) * torch.randint(0, 2, (5,)) * (seed > 0)).to(DEVICE)
    rows, n, k = int(counts.sum()), 256, 128
    x, w, dy = (torch.randn(shape, device=DEVICE) for shape in ((rows, k), (5 * n, k), (rows, n)))
    groups = Groups.of(counts, rows)
    assert groups.room % BLOCK == 0 and groups.room >= int(groups.starts[-1]) * BLOCK
    x_rows, x_columns = quantize_fp8(groups.spread(x), transposed=True)
    dy_rows, dy_columns = quantize_fp8(groups.spread(dy), transposed=True)
    weights, turned = quantize_fp8(w, square=True, transposed=True, matrices=5)
    y = fp8_matmul(x_rows, weights, torch.float32, groups.starts)[groups.places]
    dx = fp8_matmul(dy_rows, turned, torch.float32, groups.starts)[groups.places]
    dw = fp8_matmul(dy_columns, x_columns, torch.float32, groups.starts)
    whole = weights.dequantize().chunk(5)
    for expert, (xs, dys) in enumerate(zip(x.split(counts.tolist()), dy.split(counts.tolist()))):
        start = int(counts[:expert].sum())
        part = slice(start, start + len(xs))
        by_rows = [quantize_fp8(m)[0].dequantize() for m in (xs, dys)]
        by_columns = [quantize_fp8(m, transposed=True)[1].dequantize() for m in (xs, dys)]
        for found, a, b in ((y[part], by_rows[0], whole[expert]),
                            (dx[part], by_rows[1], whole[expert].T),
                            (dw.chunk(5)[expert], by_columns[1], by_columns[0])):
            exact, size = (a.double() @ b.double().T), a.abs() @ b.abs().T
            assert ((found - exact).abs() <= of_sums(a.shape[1]) * size).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("height, width", [(1, BLOCK), (BLOCK, BLOCK), (BLOCK, 1)])
def test_numbers_are_off_by_a_sixteenth_at_most(seed: int, height: int, width: int) -> None:
    """Or by 2^-10 of their block's scale, below the normal range; its largest number by nothing."""
    x = wild_matrix(seed).float()
    rows, columns = quantize_fp8(x, square=height == width, transposed=height != width)
    found = rows.dequantize() if height < BLOCK or height == width else columns.dequantize().T
    x = F.pad(x, (0, 0, 0, -len(x) % height))
    found = F.pad(found, (0, 0, 0, len(x) - len(found)))
    blocks, found = (m.reshape(len(x) // height, height, -1, width) for m in (x, found))
    largest = blocks.abs().amax((1, 3), keepdim=True)
    assert ((found - blocks).abs() <= ROUNDING * blocks.abs() + 2**-10 * largest / 440).all()
    torch.testing.assert_close(found.abs().amax((1, 3), keepdim=True), largest, rtol=1e-6, atol=0)


def test_zeros_infinities_and_the_ends_of_float32() -> None:
    x = torch.randn(5, 256, device=DEVICE)
    x[0] = 0
    x[1, 3], x[2, 130] = torch.inf, torch.nan
    x[3], x[4] = 1e-38, 1e36
    q = quantize_fp8(x)[0]
    assert q.scales.isnan().tolist() == [[False, False], [True, False], [False, True],
                                         [False, False], [False, False]]
    assert not q.values.float().isnan().any()
    found = q.dequantize()
    assert (found[0] == 0).all() and (found[3] == 0).all()  # below 1e-30 all is zero
    torch.testing.assert_close(found[4], x[4], rtol=1e-6, atol=0)
    y = fp8_matmul(q, quantize_fp8(torch.randn(128, 256, device=DEVICE), square=True)[0])
    assert y.isnan().all(1).tolist() == [False, True, True, False, False]
    for empty in (x[:0], x[:0].bfloat16()):
        rows, columns = quantize_fp8(empty, transposed=True)
        assert rows.values.shape == (0, 256) and columns.values.shape == (256, 0)
        assert fp8_matmul(columns, columns).eq(0).all()


# ---------------------------------------------------------------------------------------- layers


def bound(a: Tensor, b: Tensor) -> Tensor:
    """How far the FP8 product of a and b^T may be from the exact one: each factor by a sixteenth of
    itself, or by 2^-10 of its block's scale, here of the whole matrix's; and the sums."""
    a, b = (x.abs() + x.abs().max() * 2**-10 / 448 / ROUNDING for x in (a, b))
    return (2 * ROUNDING + ROUNDING**2 + 2 * of_sums(a.shape[1])) * (a @ b.T)


@pytest.mark.parametrize("seed", range(12))
def test_gradients_are_within_the_step_of_the_format(seed: int) -> None:
    """Output and both gradients of a layer against float64; groups of rows are experts'."""
    torch.manual_seed(seed)
    matrices = 3 if seed % 2 else 1
    n, k = (BLOCK * int(torch.randint(1, 4, ())) for _ in range(2))
    layer = GroupedLinear(matrices, k, n).to(DEVICE)
    fast = Fp8Linear(layer.weight)
    counts = torch.randint(0, 150, (matrices,)) * (seed > 1)
    x = torch.randn(int(counts.sum()), k, device=DEVICE, requires_grad=True)
    dy = torch.randn(len(x), n, device=DEVICE)
    y = fast(x, counts.to(DEVICE) if matrices > 1 else None)
    dx, dw = torch.autograd.grad(y, (x, fast.weight), dy)
    for x_e, dy_e, w, *found in zip(
            x.split(counts.tolist()), dy.split(counts.tolist()), layer.weight.chunk(matrices),
            y.split(counts.tolist()), dx.split(counts.tolist()), dw.chunk(matrices)):
        x_e, w, dy_e = x_e.detach().double(), w.detach().double(), dy_e.double()
        for ours, a, b in zip(found, (x_e, dy_e, dy_e.T), (w, w.T, x_e.T)):
            exact = a @ b.T
            assert ((ours - exact).abs() <= bound(a, b)).all() if a.numel() else (ours == 0).all()
            if a.numel() and len(x_e) > 20:
                assert (ours - exact).norm() < MEAN_ERROR * exact.norm()


def test_only_the_large_matrices_of_the_decoder_are_converted() -> None:
    for name in ("tiny", "tiny-moe"):
        net = LlavaOneVision(PRESETS[name])
        before = {key: id(parameter) for key, parameter in net.named_parameters()}
        convert_to_fp8(net)
        assert {key: id(parameter) for key, parameter in net.named_parameters()} == before
        fast = {path for path, module in net.named_modules() if isinstance(module, Fp8Linear)}
        kind = "mlp.experts" if name == "tiny-moe" else "mlp"
        assert fast == {f"model.layers.{layer}.{part}_proj" for layer in range(4) for part in (
            "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", f"{kind}.gate",
            f"{kind}.up", f"{kind}.down")}


def test_each_pass_quantises_the_weights_it_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once each, in experts too: so a weight that changed counts at once.  For the gradient of a
    frozen weight nothing is kept."""
    calls = []

    def counted(x: Tensor, square: bool = False, transposed: bool = False,
                matrices: int = 1) -> object:
        calls.append((square, transposed))
        return quantize_fp8(x, square, transposed, matrices)

    monkeypatch.setattr(fp8_kernel, "quantize_fp8", counted)
    net = LlavaOneVision(PRESETS["tiny-moe"]).init_weights()
    convert_to_fp8(net)
    layers = [module for module in net.modules() if isinstance(module, Fp8Linear)]
    ids, starts = torch.arange(30) + 20, torch.tensor([0, 10, 30])
    net.loss(ids, ids, starts).backward()
    assert len(layers) == 28
    assert calls.count((True, False)) == calls.count((True, True)) == 28
    assert calls.count((False, True)) == 2 * 28 and len(calls) == 4 * 28
    net.requires_grad_(False)
    calls.clear()
    net.loss(ids, ids, starts)
    assert set(calls) == {(True, False), (False, False)}

    x = torch.randn(3, layers[0].in_features)
    before = layers[0](x)
    layers[0].weight.mul_(2)
    assert torch.equal(layers[0](x), 2 * before)


def test_recomputing_changes_no_bit() -> None:
    torch.manual_seed(0)
    net = LlavaOneVision(PRESETS["tiny"]).init_weights().to(DEVICE)
    ids = torch.arange(40, device=DEVICE) + 20
    convert_to_fp8(net)
    found = []
    for recompute in ("none", "layer", "selective"):
        other = copy.deepcopy(net)
        shard(other, recompute, False, Ranks(torch.device(DEVICE), torch.float32))
        starts = torch.tensor([0, 15, 40], device=DEVICE)
        other.loss(ids, ids.roll(1), starts).backward()
        found.append([p.grad for p in other.parameters() if p.grad is not None])
    assert len(found[0]) > 20
    assert all(torch.equal(a, b) for others in found[1:] for a, b in zip(found[0], others))


def test_compiled_layers_quantise_what_they_share_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """x of gate and up, h of down, and their three gradients."""
    torch.manual_seed(0)
    mlp = SwiGlu(PRESETS["tiny"])
    convert_to_fp8(mlp)
    x, calls = torch.randn(20, 256, requires_grad=True), []

    def counted(x: Tensor, height: int, width: int) -> Quantized:
        calls.append((height, width))
        return quantize_reference(x, height, width)

    monkeypatch.setattr(fp8_kernel, "quantize_reference", counted)
    found = []
    for run in (mlp, torch.compile(mlp, backend="aot_eager")):
        calls.clear()
        y = run(x)
        found.append([y, *torch.autograd.grad(y.square().sum(), [x, *mlp.parameters()])])
        assert calls.count((1, BLOCK)) == calls.count((BLOCK, 1)) == (6 if run is mlp else 5)
        assert calls.count((BLOCK, BLOCK)) == 6  # three weights, in both passes
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_operators_keep_pytorchs_rules() -> None:
    """PyTorch's own checks; but for those that compare numbers of 8 bits, which it cannot."""
    x, w = torch.randn(300, 256, device=DEVICE), torch.randn(256, 256, device=DEVICE)
    checks = ("test_autograd_registration", "test_faketensor")
    for arguments in ((x, False, True, 1), (x, True, False, 1), (w, True, True, 2)):
        torch.library.opcheck(torch.ops.llava.quantize_fp8.default, arguments, test_utils=checks)
    a, b = quantize_fp8(x)[0], quantize_fp8(w, square=True)[0]
    starts = torch.tensor([0, 1, 3], dtype=torch.int32, device=DEVICE)
    for groups in (None, starts):
        torch.library.opcheck(torch.ops.llava.matmul_fp8.default,
                              (*a, *b, groups, torch.float32), test_utils=checks)


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("change, words", [
    ({"hidden_size": 160, "vision": replace(PRESETS["tiny"].vision, text_hidden_size=160)},
     "model.layers.0.self_attn.q_proj maps 160 to 128 numbers; FP8 takes multiples of 128"),
    ({"intermediate_size": 200}, "model.layers.0.mlp.gate_proj maps 256 to 200 numbers"),
    ({"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64},
     "model.layers.0.mlp.experts.gate_proj maps 256 to 64 numbers"),
])
def test_widths_are_refused_by_the_name_of_the_layer(change: dict, words: str) -> None:
    net = LlavaOneVision(replace(PRESETS["tiny"], **change))
    with pytest.raises(ValueError, match=re.escape(words)):
        convert_to_fp8(net)
    assert not any(isinstance(module, Fp8Linear) for module in net.modules())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_that_is_not_finite_makes_no_number(value: float) -> None:
    """Its outputs are NaN, so that training refuses the step; those of other squares are not."""
    weight = torch.randn(256, 128, device=DEVICE)
    weight[3, 7] = value
    y = Fp8Linear(nn.Parameter(weight))(torch.randn(5, 128, device=DEVICE))
    assert y[:, :128].isnan().all() and y[:, 128:].isfinite().all()


def test_a_gpu_without_fp8_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    for capability, refused in (((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        if refused:
            with pytest.raises(ValueError, match=f"NVIDIA A100 .sm_8{capability[1]}. has no FP8"):
                fp8_kernel.check_device(torch.device("cuda"))
        else:
            fp8_kernel.check_device(torch.device("cuda"))


@pytest.mark.parametrize("call, words", [
    (lambda: quantize_fp8(torch.zeros(4, 100)), "columns in multiples of 128"),
    (lambda: quantize_fp8(torch.zeros(4, 128, dtype=torch.float16)), "not torch.float16"),
    (lambda: quantize_fp8(torch.zeros(128)), "of shape (128,)"),
    (lambda: fp8_matmul(SQUARES, SQUARES), "a scaled by rows"),
    (lambda: fp8_matmul(quantize_fp8(torch.zeros(4, 128))[0], SQUARES), "need rows (Ra, C)"),
    (lambda: fp8_matmul(quantize_fp8(torch.zeros(4, 256))[0], SQUARES, starts=torch.zeros(4)),
     "starts must be two int32 at least, not 4 torch.float32"),
    (lambda: fp8_matmul(quantize_fp8(torch.zeros(4, 256))[0], SQUARES, starts=torch.zeros(4).int()),
     "256 rows are not 3 matrices"),
    (lambda: quantize_fp8(torch.zeros(256, 128), square=True, transposed=True, matrices=3),
     "256 rows are not 3 matrices"),
    (lambda: fp8_matmul(ROWS, SQUARES, starts=torch.zeros(1).int()), "not 1 torch.int32"),
])
def test_shapes_that_do_not_fit_are_refused(call: Callable, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        call()


SQUARES = quantize_fp8(torch.zeros(256, 256), square=True)[0]
ROWS = quantize_fp8(torch.zeros(4, 256))[0]


def test_the_file_prints_its_errors() -> None:
    """As `python fp8_kernel.py` on this machine: FP8 within a few percent, bfloat16 far below."""
    done = subprocess.run([sys.executable, Path(fp8_kernel.__file__)], text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr
    ours, low = (re.search(rf"^{name} +(\S+) +(\S+) +(\S+)$", done.stdout, re.M).groups()
                 for name in ("this file", "bfloat16"))
    assert all(0.02 < float(error) < MEAN_ERROR for error in ours)
    assert all(float(error) < 2**-8 for error in low)  # two factors of 2^-9 and the result


@pytest.mark.beside("-m", "benchmarks.compile", "fp8")
def test_kernels_compile_without_spills(done: subprocess.CompletedProcess[str]) -> None:
    """For Hopper and Ada, with their FP8 matrix instructions; Ampere has none, and says so."""
    assert done.returncode == 0, done.stdout + done.stderr
    for sm in ("90", "89"):
        lines = re.findall(rf"^(quantize|product).* {sm} ", done.stdout, re.MULTILINE)
        assert len(lines) == 10
    assert "type fp8e4nv not supported in this architecture" in done.stdout
