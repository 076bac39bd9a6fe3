"""Varlen attention, rung by rung: definition, tiled loop, kernels, and the CPU path beside them.

The kernels run natively where there is a GPU and in Triton's interpreter elsewhere.
"""

import math
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attention_kernel
from attention_kernel import (
    Tile,
    attention_reference,
    attention_tiled,
    attention_tiled_backward,
    flash_attn_varlen_func,
)


def random_case(seed: int, dtype: torch.dtype, widths: list[int], lengths: list[int],
                device: str = "cpu") -> dict:
    """Arguments of one call: random segments (empty and unequal ones too), heads, scale, mask."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    segments, groups = rng.randint(1, 4), rng.choice([1, 1, 2])
    heads, width = groups * rng.choice([1, 2, 3, 4]), rng.choice(widths)
    causal = rng.random() < 0.6
    kind = rng.choice(["equal", "same", "cache", "any"])
    lengths_q = [rng.choice(lengths) for _ in range(segments)]
    if kind == "equal":
        lengths_q = [rng.randint(1, 20)] * segments
    lengths_k = {"cache": [n + rng.randint(0, 40) for n in lengths_q],
                 "any": [rng.choice(lengths) for _ in lengths_q]}.get(kind, lengths_q)
    q = torch.randn(sum(lengths_q), heads, width, device=device).to(dtype).requires_grad_()
    k, v = (torch.randn(sum(lengths_k), groups, width, device=device).to(dtype).requires_grad_()
            for _ in range(2))
    cu_q, cu_k = (torch.tensor([0, *n], dtype=rng.choice([torch.int32, torch.int64]), device=device)
                  .cumsum(0) for n in (lengths_q, lengths_k))
    positions = None
    if causal and rng.random() < 0.4:  # any order, and some before the first key
        positions = torch.cat([torch.randint(-1, max(1, n_k), (n_q,), device=device)
                               for n_q, n_k in zip(lengths_q, lengths_k)])
    return {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k,
            "max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k), "causal": causal,
            "softmax_scale": rng.choice([None, 0.3]), "q_positions": positions}


def results(function: object, case: dict, weight: Tensor) -> list[Tensor]:
    """out, LSE, dq, dk, dv of the weighted sum of out; inputs nobody looks at have gradient 0."""
    out, lse = function(**case, return_lse=True)
    inputs = [case[name] for name in "qkv"]
    found = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
    return [out, lse, *(torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found))]


def upcast(case: dict) -> dict:
    """The same case in float64, where the definition is exact."""
    return case | {name: case[name].detach().double().requires_grad_() for name in "qkv"}


# ----------------------------------------------------------------------------------- the ladder


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of one head, one query at a time, from the formula."""
    rows = []
    for i in range(len(q)):
        last = i + len(k) - len(q)
        weights = [math.exp(float(q[i] @ k[j]) / math.sqrt(q.shape[1])) for j in range(last + 1)]
        rows.append(sum(w * v[j] for j, w in enumerate(weights)) / sum(weights))
    return torch.stack(rows)


def test_reference_equals_the_formula() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, 1, 8, dtype=torch.float64) for n in (4, 9, 9))
    out = attention_reference(q, k, v, torch.tensor([0, 4]), torch.tensor([0, 9]), 4, 9,
                              causal=True)
    torch.testing.assert_close(out[:, 0], naive(q[:, 0], k[:, 0], v[:, 0]))


@pytest.mark.parametrize("seed", range(30))
def test_tiled_loops_equal_reference(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    length_q, length_k, block = rng.randint(1, 40), rng.randint(1, 60), rng.choice([1, 7, 16, 64])
    q, grad = torch.randn(2, length_q, 1, 8, dtype=torch.float64)
    k, v = torch.randn(2, length_k, 1, 8, dtype=torch.float64)
    last_key = torch.randint(-1, length_k, (length_q,))
    case = {"q": q.requires_grad_(), "k": k.requires_grad_(), "v": v.requires_grad_(),
            "cu_seqlens_q": torch.tensor([0, length_q]), "max_seqlen_q": length_q,
            "cu_seqlens_k": torch.tensor([0, length_k]), "max_seqlen_k": length_k,
            "causal": True, "softmax_scale": 0.4, "q_positions": last_key}
    expected = results(attention_reference, case, grad)
    q, k, v, grad = (x.detach()[:, 0] for x in (q, k, v, grad))
    out, lse = attention_tiled(q, k, v, last_key, 0.4, block)
    found = out, lse, *attention_tiled_backward(grad, q, k, v, out, lse, last_key, 0.4, block)
    for mine, reference in zip(found, expected):
        torch.testing.assert_close(mine, reference.view(mine.shape), atol=1e-12, rtol=0)


@pytest.mark.parametrize("seed", range(120))
def test_cpu_path_equals_reference(seed: int) -> None:
    case = random_case(seed, torch.float64, [8, 16, 32], [0, 1, 2, 7, 33])
    weight = torch.randn_like(case["q"])
    expected = results(attention_reference, case, weight)
    for mine, reference in zip(results(flash_attn_varlen_func, case, weight), expected):
        torch.testing.assert_close(mine, reference, atol=1e-11, rtol=0)


TOLERANCE = {torch.float32: 1e-5, torch.float16: 6e-3, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("seed", range(200 if DEVICE == "cpu" else 40))  # a GPU compiles each
def test_kernels_equal_reference(seed: int, kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 to round-off, 16 bits to theirs; small tiles, so that segments span several."""
    rng = random.Random(seed)
    if DEVICE == "cpu":  # a GPU takes the tiles that ship
        tile = Tile(*rng.choice([(32, 32), (16, 64), (64, 32)]), 4, 2)
        monkeypatch.setattr(attention_kernel, "tile_for", lambda *_: tile)
        target = rng.choice(["hopper", "ampere"])  # with and without tensor descriptors
        monkeypatch.setattr(attention_kernel, "architecture", lambda _: target)
    dtype = rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    case = random_case(seed, dtype, [16, 32, 64, 80, 96, 128], [0, 1, 5, 33, 70], DEVICE)
    weight = torch.randn_like(case["q"])
    expected = results(attention_reference, upcast(case), weight.double())
    for mine, reference in zip(results(flash_attn_varlen_func, case, weight), expected):
        finite = reference.detach().nan_to_num(0, 0, 0).abs().flatten().tolist()
        allowed = TOLERANCE[dtype] * max([1.0, *finite])
        torch.testing.assert_close(mine.double(), reference, atol=allowed, rtol=0)


# --------------------------------------------------------------------- what the kernels promise


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_errors_beside_pytorch(dtype: torch.dtype, kernels: None) -> None:
    """Root-mean-square errors against float64 at most 1.1 times those of PyTorch's attention."""
    torch.manual_seed(0)
    q, k, v, weight = (torch.randn(200, 2, 64, device=DEVICE).to(dtype).requires_grad_()
                       for _ in range(4))
    cu_seqlens = torch.tensor([0, 200], device=DEVICE)
    case = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens,
            "max_seqlen_q": 200, "max_seqlen_k": 200, "causal": True}

    def pytorch(q: Tensor, k: Tensor, v: Tensor, **_: object) -> tuple[Tensor, Tensor]:
        rows = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(*rows, is_causal=True)[0].transpose(0, 1), q

    exact = results(attention_reference, upcast(case), weight.double())
    ours, theirs = (results(f, case, weight) for f in (flash_attn_varlen_func, pytorch))
    for i in (0, 2, 3, 4):
        error, allowed = ((x[i].double() - exact[i]).square().mean().sqrt() for x in (ours, theirs))
        assert error <= 1.1 * allowed, (i, float(error), float(allowed))


@pytest.mark.parametrize("interpreted", [True, False])
def test_gradients_are_the_same_on_every_run(
    interpreted: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    if interpreted and DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    case = random_case(11, torch.float32, [32], [1, 40], DEVICE)
    weight = torch.randn_like(case["q"])
    first = results(flash_attn_varlen_func, case, weight)
    for _ in range(3 if interpreted and DEVICE == "cpu" else 1000):
        again = results(flash_attn_varlen_func, case, weight)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("seed", range(6))
def test_tile_table(seed: int, kernels: None) -> None:
    """Every tile once, long segments first, then empty slots; the verdict on the last token."""
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, 64, 65, rng.randint(0, 900)]) for _ in range(rng.choice([1, 140]))]
    heads, block = rng.choice([1, 3]), 64
    cu_seqlens = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    q, k = (torch.empty(sum(lengths), n, 16, device=DEVICE) for n in (heads, 1))
    for of_queries in (True, False):
        table, slots = attention_kernel.tile_table(q, k, cu_seqlens, cu_seqlens, of_queries, block)
        rows = [n * (heads if of_queries else 1) for n in lengths]
        found = [tuple(x) for x in table[:-1].tolist() if x[0] >= 0]
        assert sorted(found) == [(s, r) for s, n in enumerate(rows) for r in range(0, n, block)]
        assert table[len(found):-1, 0].eq(-1).all() and table[-1, 0] == 1
        tiles = [-(-rows[s] // block) for s, _ in found]
        assert tiles == sorted(tiles, reverse=True)
    broken = attention_kernel.tile_table(q, k, cu_seqlens, cu_seqlens + 1, True, block)[0]
    assert broken[-1, 0] == 0


def test_decoding_splits_the_keys(kernels: None) -> None:
    """One query each for caches of very different lengths, whatever the longest is said to be."""
    torch.manual_seed(0)
    lengths = torch.tensor([1500, 1, 0, 700], device=DEVICE)
    cu_k, cu_q = F.pad(lengths.cumsum(0), (1, 0)), torch.arange(5, device=DEVICE)
    q = torch.randn(4, 4, 64, device=DEVICE)
    k, v = torch.randn(2, int(lengths.sum()), 2, 64, device=DEVICE)
    expected = attention_reference(q, k, v, cu_q, cu_k, 1, 1500, causal=True, return_lse=True)
    for longest in (1500, 4000, 300):
        found = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 1, longest, causal=True,
                                       return_lse=True)
        for mine, reference in zip(found, expected):
            torch.testing.assert_close(mine, reference, atol=3e-6, rtol=0)


@pytest.mark.parametrize("interpreted", [True, False])
def test_ranks_with_chunks_of_documents(
    interpreted: bool, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Context parallelism: every rank's queries against all keys; dk and dv add up over ranks."""
    if interpreted and DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.manual_seed(0)
    lengths, chunk, ranks = [90, 30, 7], 16, 3
    cu_k = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    segment = attention_kernel.segment_ids(cu_k)
    position = torch.arange(len(segment), device=DEVICE) - cu_k[segment]
    q, k, v, weight = (torch.randn(127, 2, 32, device=DEVICE).requires_grad_() for _ in range(4))
    case = {"k": k, "v": v, "cu_seqlens_k": cu_k, "max_seqlen_q": 90, "max_seqlen_k": 90,
            "causal": True}
    whole = results(attention_reference, case | {"q": q, "cu_seqlens_q": cu_k}, weight)
    sums = [torch.zeros_like(x) for x in (k, v)]
    for rank in range(ranks):
        mine = (position // chunk + segment) % ranks == rank
        cu_q = F.pad(torch.bincount(segment[mine], minlength=3).cumsum(0), (1, 0))
        part = results(flash_attn_varlen_func, case | {
            "q": q[mine].detach().requires_grad_(), "cu_seqlens_q": cu_q,
            "q_positions": position[mine]}, weight[mine])
        torch.testing.assert_close(part[0], whole[0][mine], atol=1e-5, rtol=0)
        torch.testing.assert_close(part[2], whole[2][mine], atol=1e-5, rtol=0)
        sums = [total + x for total, x in zip(sums, part[3:])]
    for total, expected in zip(sums, whole[3:]):
        torch.testing.assert_close(total, expected, atol=1e-5, rtol=0)


def test_a_query_without_keys_gets_zero() -> None:
    q, k = torch.ones(5, 1, 8), torch.ones(2, 1, 8)
    out, lse = flash_attn_varlen_func(q, k, k, torch.tensor([0, 5]), torch.tensor([0, 2]), 5, 2,
                                      causal=True, return_lse=True)
    assert out[:3].eq(0).all() and out[3:].eq(1).all()
    assert lse[0, :3].eq(-math.inf).all() and lse[0, 3:].isfinite().all()


# ------------------------------------------------------------------- compilation and bad input


def test_operator_compiles_and_checkpoints() -> None:
    """One graph under torch.compile; the same gradients when recomputed in the backward pass."""
    case = random_case(5, torch.float32, [32], [20, 40], DEVICE)
    weight = torch.randn_like(case["q"])

    def doubled(**arguments: object) -> tuple[Tensor, Tensor]:
        out, lse = flash_attn_varlen_func(**arguments)
        return out * 2, lse

    def recomputed(**arguments: object) -> tuple[Tensor, Tensor]:
        return checkpoint(doubled, use_reentrant=False, **arguments)

    expected = results(doubled, case, weight)
    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for function in (compiled, recomputed):
        for mine, reference in zip(results(function, case, weight), expected):
            torch.testing.assert_close(mine, reference, atol=0, rtol=0)


def test_kernels_compile_without_spills(capfd: pytest.CaptureFixture) -> None:
    """All that ships, for sm_90 and sm_80: no spills, shared memory fits, matrix instructions."""
    command = [sys.executable, Path(__file__).parent / "compile_kernels.py", "attention"]
    running = {sm: subprocess.Popen([*command, sm], stdout=subprocess.PIPE, text=True,
                                    stderr=subprocess.STDOUT) for sm in ("90", "80")}
    for sm, process in running.items():
        table = process.communicate()[0]
        with capfd.disabled():
            print("\n" + table)
        assert process.returncode == 0, table
        assert len(re.findall(rf"^\w+ +{sm} ", table, re.MULTILINE)) > 50


@pytest.mark.parametrize("change, message", [
    ({"k": torch.zeros(6, 3, 8), "v": torch.zeros(6, 3, 8)}, "not a multiple of 3"),
    ({"v": torch.zeros(5, 2, 8)}, "need q"),
    ({"q": torch.zeros(6, 4, 8, dtype=torch.float16)}, "differ in dtype"),
    ({"k": torch.zeros(6, 2, 8, device="meta")}, "q is on cpu, but k on meta"),
    ({"cu_seqlens_k": torch.zeros(2, dtype=torch.int64, device="meta")}, "cu_seqlens_k on meta"),
    ({"q": torch.zeros(6, 8, 4).transpose(1, 2)}, "last dimension of q must be contiguous"),
    ({"cu_seqlens_q": torch.tensor([0, 5])}, "must rise from 0 to the 6 tokens of q"),
    ({"cu_seqlens_k": torch.tensor([0, 2, 6])}, "segments"),
    ({"cu_seqlens_k": torch.tensor([0, 7])}, "must rise from 0 to the 6 tokens of k"),
    ({"cu_seqlens_k": torch.tensor([1, 6])}, "must rise from 0 to the 6 tokens of k"),
    ({"cu_seqlens_k": torch.tensor([0.0, 6.0])}, "int32 or int64"),
    ({"q_positions": torch.zeros(6, dtype=torch.int64)}, "needs causal"),
    ({"softmax_scale": -1.0}, "must be positive, got -1.0"),
])
def test_refuses(change: dict, message: str) -> None:
    case = {"q": torch.zeros(6, 4, 8), "k": torch.zeros(6, 2, 8), "v": torch.zeros(6, 2, 8),
            "cu_seqlens_q": torch.tensor([0, 6]), "cu_seqlens_k": torch.tensor([0, 6]),
            "max_seqlen_q": 6, "max_seqlen_k": 6}
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(**{**case, **change})


@pytest.mark.parametrize("q, message", [
    (torch.zeros(6, 1, 64, dtype=torch.float64), "not torch.float64"),
    (torch.zeros(6, 1, 256), "head widths of 16 to 128 in steps of 8, not 256"),
    (torch.zeros(6, 1, 8), "not 8"),
    (torch.zeros(6, 1, 20), "not 20"),
])
def test_kernels_refuse(q: Tensor, message: str, kernels: None) -> None:
    q, cu_seqlens = q.to(DEVICE), torch.tensor([0, 6], device=DEVICE)
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 6, 6)


@pytest.mark.skipif(DEVICE == "cuda", reason="a failed assertion there ends the process")
@pytest.mark.parametrize("numbers", [[0, 600], [0, 5], [1, 6], [0, 7, 6], [0, 300, -300, 6]])
def test_kernels_never_run_on_segments_that_do_not_fit(numbers: list[int], kernels: None) -> None:
    """What a GPU checks without telling the host: the assertion stands before the kernel."""
    q, cu_seqlens = torch.zeros(6, 1, 16), torch.tensor(numbers)
    with pytest.raises(RuntimeError, match="must rise from 0 to the number of tokens"):
        attention_kernel.triton_forward(q, q, q, cu_seqlens, cu_seqlens, 6, 6, 1.0, True, None)
