"""Varlen attention, rung by rung: definition, tiled loop, kernels, and the CPU path beside them.

The kernels run natively where there is a GPU and in Triton's interpreter elsewhere.
"""

import itertools
import math
import random
import re
import subprocess
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import attention_kernel
import fp8_kernel
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


# Half a step of each format, relative: a number is rounded by so much of itself at most.
ROUNDING = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11,
            torch.bfloat16: 2.0**-8}


def error_bounds(case: dict, weight: Tensor) -> list[Tensor]:
    """How far out, LSE, dq, dk, dv may be from exact ones, by the arithmetic alone.

    Each is a sum of products.  Its bound is the same sum of their magnitudes, times the roundings
    that a summand goes through: those of the sums, in float32 or, for float64, in float64, and of
    what is rounded to the case's type on the way (P, dS, out and the results).
    """
    q, k, v, g = (x.detach().double().transpose(0, 1) for x in (
        case["q"], case["k"], case["v"], weight))
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)  # (H, Tk, E)
    width, scale = q.shape[2], case["softmax_scale"] or q.shape[2] ** -0.5
    out, lse = attention_reference(**upcast(case), return_lse=True)
    unit = torch.eye(k.shape[1]).to(k)[:, None].expand(-1, case["k"].shape[1], -1)
    p = attention_reference(**{**upcast(case), "v": unit}).transpose(0, 1)  # (H, Tq, Tk)
    out = out.transpose(0, 1)
    kind = case["q"].dtype
    sums = ROUNDING[torch.float64 if kind == torch.float64 else torch.float32]
    low = ROUNDING[kind]  # what is rounded to the type itself
    scores = scale * (q.abs() @ k.abs().mT)  # summands of each score
    summands = width + group * max(len(q[0]), len(k[0]))
    # exp2 on a GPU is right to two units, the maximum and the scale in base 2 to one each
    largest = scores.amax() if scores.numel() else 0.0
    finite = lse.nan_to_num(0, 0, 0).abs()
    of_p = sums * (width * largest + max([8.0, *finite.flatten().tolist()]) + 8 + summands)
    d = g.abs() @ v.abs().mT + (g * out).abs().sum(-1, keepdim=True)  # summands of dP - delta
    ds = scale * p * d * (3 * low + 2 * of_p + (width + 8) * sums)
    # a number may also be below the format's normal range: then half the smallest step
    smallest = torch.finfo(kind).smallest_normal * low
    of_weight = p * (2 * low + 2 * of_p) + smallest
    found = [of_weight @ v.abs(), of_p + torch.zeros_like(lse),
             ds @ k.abs() + low * ((scale * p * d) @ k.abs()),
             ds.mT @ q.abs() + low * ((scale * p * d).mT @ q.abs()),
             of_weight.mT @ g.abs()]
    found = [x + smallest for x in found]
    grouped = [x.unflatten(0, (-1, group)).sum(1) for x in found[3:]]
    return [found[0].transpose(0, 1), found[1], found[2].transpose(0, 1),
            *(x.transpose(0, 1) for x in grouped)]


def assert_within_bounds(found: list[Tensor], case: dict, weight: Tensor) -> None:
    """out, LSE, dq, dk, dv are those of the definition in float64, but for rounding."""
    expected = results(attention_reference, upcast(case), weight.double())
    names = ("out", "lse", "dq", "dk", "dv")
    for name, mine, exact, allowed in zip(names, found, expected, error_bounds(case, weight)):
        error = torch.where(mine == exact, 0, mine.double() - exact).abs()  # -inf is -inf
        assert (error <= allowed).all(), (name, float(error.max()), float(allowed.max()))


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


@pytest.mark.parametrize("seed", range(8))
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
        # 2^-53 for each of some hundred summands, of magnitudes below a hundred
        torch.testing.assert_close(mine, reference.view(mine.shape), atol=1e-11, rtol=0)


@pytest.mark.parametrize("seed", range(24))
def test_cpu_path_equals_reference(seed: int) -> None:
    case = random_case(seed, torch.float64, [8, 16, 32], [0, 1, 2, 7, 33])
    weight = torch.randn_like(case["q"])
    assert_within_bounds(results(flash_attn_varlen_func, case, weight), case, weight)


def designed_cases() -> Iterator[tuple]:
    """Every type with every mask, by the plain and the specialized forward pass; widths, heads per
    group and layouts of segments go round."""
    ratios, widths = itertools.cycle([1, 2, 3, 4, 5]), itertools.cycle([16, 32, 64, 128])
    layouts = itertools.cycle([
        ([70, 0, 5], None), ([33, 1], [70, 40]), ([1, 1, 1], [90, 1, 33]), ([7, 64], [0, 64]),
        ([128], None)])
    for dtype, mask, specialized, _ in itertools.product(
            (torch.float32, torch.float16, torch.bfloat16), ("full", "causal", "explicit"),
            (True, False), range(2)):
        lengths_q, lengths_k = next(layouts)
        yield (dtype, mask, specialized, next(widths), next(ratios), lengths_q,
               lengths_k or lengths_q)


def small_tiles(monkeypatch: pytest.MonkeyPatch, number: int, specialized: bool) -> None:
    """Blocks of a few tokens, and the form of the forward pass; a GPU takes the tiles that ship,
    and is specialized only if it can be."""
    if DEVICE == "cpu":
        tile = Tile(*[(32, 32), (16, 64), (64, 32)][number % 3], 4, 2)
        monkeypatch.setattr(attention_kernel, "tile_for", lambda *_: tile)
        monkeypatch.setattr(attention_kernel, "architecture", lambda x: "hopper")
        monkeypatch.setattr(attention_kernel, "specializes", lambda x: specialized)
    monkeypatch.setattr(attention_kernel, "SPECIALIZE", specialized)
    if specialized:  # a program takes several heads, if there are, as in a long row
        monkeypatch.setattr(attention_kernel, "PROGRAMS_WANTED", 0)


@pytest.mark.parametrize("case_number", range(36))
def test_kernels_equal_reference(case_number: int, kernels: None,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """To rounding; small tiles, so that segments span several.  k and v are strided."""
    dtype, mask, specialized, width, ratio, lengths_q, lengths_k = next(
        itertools.islice(designed_cases(), case_number, None))
    if DEVICE == "cuda":  # of its larger tiles several, too
        lengths_q, lengths_k = ([9 * n for n in lengths] for lengths in (lengths_q, lengths_k))
    small_tiles(monkeypatch, case_number, specialized)
    torch.manual_seed(case_number)
    groups, queries, keys = 1 + case_number % 2, sum(lengths_q), sum(lengths_k)
    q = torch.randn(queries, groups * ratio, width, device=DEVICE).to(dtype).requires_grad_()
    both = torch.randn(keys, 2 * groups, width, device=DEVICE).to(dtype)
    k, v = (x.requires_grad_() for x in both.chunk(2, dim=1))
    cu_q, cu_k = (torch.tensor([0, *n], device=DEVICE).cumsum(0) for n in (lengths_q, lengths_k))
    positions = None
    if mask == "explicit":  # any order, and some before the first key
        positions = torch.cat([torch.randint(-1, max(1, n_k), (n_q,), device=DEVICE)
                               for n_q, n_k in zip(lengths_q, lengths_k)])
    case = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k,
            "max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k),
            "causal": mask != "full", "softmax_scale": None, "q_positions": positions}
    weight = torch.randn_like(q)
    assert_within_bounds(results(flash_attn_varlen_func, case, weight), case, weight)


@pytest.mark.parametrize("seed", range(11))
def test_kernels_equal_reference_on_random_cases(seed: int, kernels: None,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    small_tiles(monkeypatch, rng.randrange(3), seed % 2 == 0)
    dtype = rng.choice([torch.float32, torch.float16, torch.bfloat16])
    case = random_case(seed, dtype, [16, 32, 64, 128], [0, 1, 5, 33, 70], DEVICE)
    weight = torch.randn_like(case["q"])
    assert_within_bounds(results(flash_attn_varlen_func, case, weight), case, weight)


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


def test_gradients_are_the_same_on_every_run(interpreted: bool) -> None:
    case = random_case(11, torch.float32, [32], [1, 40], DEVICE)
    weight = torch.randn_like(case["q"])
    first = results(flash_attn_varlen_func, case, weight)
    for _ in range(300 if DEVICE == "cuda" else 1 if interpreted else 20):
        again = results(flash_attn_varlen_func, case, weight)
        assert all(torch.equal(a, b) for a, b in zip(first, again))


@pytest.mark.parametrize("seed", range(3))
def test_every_tile_is_found_once(seed: int, kernels: None) -> None:
    """As dK of one query that sees all keys shows, and a query of each segment, dV."""
    rng = random.Random(seed)
    segments = 130 if seed == 0 else rng.randint(1, 9)  # 128 at a time are looked at
    lengths = [rng.choice([0, 1, 64, 65, rng.randint(0, 300)]) for _ in range(segments)]
    if seed == 0:
        lengths = [min(n, 2) for n in lengths]
    cu_k = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    cu_q = torch.arange(segments + 1, device=DEVICE)
    q = torch.zeros(segments, 1, 16, device=DEVICE)
    k, v = torch.zeros(2, sum(lengths), 1, 16, device=DEVICE)
    v.requires_grad_()
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 1, max(lengths))
    weight, = torch.autograd.grad(out.sum(), v)
    expected = torch.cat([torch.full((n,), 1 / max(n, 1)) for n in lengths]).to(DEVICE)
    # exp2(-log2(n)) of a float32 logarithm of at most 9
    torch.testing.assert_close(weight[:, 0, 0], expected, atol=0, rtol=10 * 2**-23)


@pytest.mark.parametrize("positions", [None, [650, 0, -1, 12]])
def test_decoding_splits_the_keys(positions: list[int] | None, kernels: None) -> None:
    """One query each for caches of very different lengths, whatever the longest is said to be; and
    for caches that are not full, as in generation: positions say how far they are."""
    torch.manual_seed(0)
    lengths = torch.tensor([700, 1, 0, 300], device=DEVICE)
    cu_k, cu_q = F.pad(lengths.cumsum(0), (1, 0)), torch.arange(5, device=DEVICE)
    q = torch.randn(4, 4, 64, device=DEVICE)
    k, v = torch.randn(2, int(lengths.sum()), 2, 64, device=DEVICE)
    case = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": 1,
            "causal": True, "softmax_scale": None}
    if positions:
        case["q_positions"] = torch.tensor(positions, device=DEVICE)
    for x in (q, k, v):
        x.requires_grad_()
    for longest in (700, 1500, 200):
        case["max_seqlen_k"] = longest
        found = flash_attn_varlen_func(**case, return_lse=True)
        assert_within_bounds(list(found), case, torch.ones_like(q))


def test_only_decoding_splits_the_keys(kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training row too short to fill a GPU is computed at once, not merged from parts."""
    grids = []
    kernel = attention_kernel.forward_kernel

    class Watched:
        def __getitem__(self, grid: tuple) -> object:
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(attention_kernel, "forward_kernel", Watched())
    for queries in (300, 1):
        q, k = (torch.randn(n, 1, 16, device=DEVICE) for n in (queries, 600))
        cu_q, cu_k = (torch.tensor([0, n], device=DEVICE) for n in (queries, 600))
        flash_attn_varlen_func(q, k, k, cu_q, cu_k, queries, 600, causal=True)
    assert grids[0][2] == 1 and grids[1][2] > 1


@pytest.mark.parametrize("specialized", [True, False])
@pytest.mark.parametrize("name, value", [("q", math.nan), ("k", math.nan), ("v", math.nan),
                                         ("v", math.inf), ("grad", math.nan)])
def test_what_is_not_finite_stays_in_its_sample(
    specialized: bool, name: str, value: float, kernels: None, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its neighbours on both sides get the bits that they get without it."""
    small_tiles(monkeypatch, 0, specialized)
    torch.manual_seed(0)
    cu_seqlens = torch.tensor([0, 41, 60, 100], device=DEVICE)
    tensors = {n: torch.randn(100, 2, 16, device=DEVICE).to(torch.float16)
               for n in ("q", "k", "v", "grad")}
    found = []
    for spoilt in (False, True):
        if spoilt:
            tensors[name][45, :, 3] = value
        q, k, v = (tensors[n].clone().requires_grad_() for n in "qkv")
        case = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens,
                "max_seqlen_q": 41, "max_seqlen_k": 41, "causal": True}
        found.append(results(flash_attn_varlen_func, case, tensors["grad"]))
    for clean, dirty in zip(*found):
        rows = (clean, dirty) if len(clean) == 100 else (clean.T, dirty.T)  # LSE is (H, T)
        for part in (slice(0, 41), slice(60, 100)):
            assert torch.equal(*(x[part] for x in rows))


@pytest.mark.parametrize("layout", ["qkv", "chunk", "transposed", "expanded", "misaligned"])
def test_strided_inputs(layout: str, kernels: None) -> None:
    """The same bits as of copies; nothing is copied where the layout allows it."""
    torch.manual_seed(0)
    sizes = {"qkv": (40, 3, 2, 16), "chunk": (40, 6, 16), "transposed": (3, 2, 40, 16),
             "expanded": (3, 40, 1, 16), "misaligned": (3, 40 * 2 * 16 + 1)}
    whole = torch.randn(sizes[layout], device=DEVICE).half()
    tensors = {"qkv": lambda: whole.unbind(1), "chunk": lambda: whole.chunk(3, dim=1),
               "transposed": lambda: whole.transpose(1, 2).unbind(0),
               "expanded": lambda: whole.expand(-1, -1, 2, -1).unbind(0),
               "misaligned": lambda: whole[:, 1:].unflatten(1, (40, 2, 16)).unbind(0)}[layout]()
    cu_seqlens = torch.tensor([0, 13, 40], device=DEVICE)
    common = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": 27,
              "max_seqlen_k": 27, "causal": True}
    as_is = [x.detach().requires_grad_() for x in tensors]
    copied = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
              for x in tensors]
    weight = torch.randn(40, 2, 16, device=DEVICE).half()
    for ours, theirs in zip(*(results(flash_attn_varlen_func, dict(zip("qkv", qkv)) | common,
                                      weight) for qkv in (as_is, copied))):
        assert torch.equal(ours, theirs)
    if layout in ("qkv", "chunk"):
        assert all(attention_kernel.describable(x) is x for x in as_is)


def test_ranks_with_chunks_of_documents(interpreted: bool) -> None:
    """Context parallelism: every rank's queries against all keys; dk and dv add up over ranks."""
    torch.manual_seed(0)
    lengths, chunk, ranks = [90, 30, 7], 16, 3
    cu_k = torch.tensor([0, *lengths], device=DEVICE).cumsum(0)
    segment = attention_kernel.segment_ids(cu_k)
    position = torch.arange(len(segment), device=DEVICE) - cu_k[segment]
    q, k, v, weight = (torch.randn(127, 2, 32, device=DEVICE).requires_grad_() for _ in range(4))
    case = {"k": k, "v": v, "cu_seqlens_k": cu_k, "max_seqlen_q": 90, "max_seqlen_k": 90,
            "causal": True}
    one_row = case | {"q": q, "cu_seqlens_q": cu_k, "softmax_scale": None}
    whole = results(attention_reference, upcast(one_row), weight.double())
    allowed = error_bounds(one_row, weight)
    sums = [torch.zeros_like(x) for x in (k, v)]
    for rank in range(ranks):
        mine = (position // chunk + segment) % ranks == rank
        cu_q = F.pad(torch.bincount(segment[mine], minlength=3).cumsum(0), (1, 0))
        part = results(flash_attn_varlen_func, case | {
            "q": q[mine].detach().requires_grad_(), "cu_seqlens_q": cu_q,
            "q_positions": position[mine]}, weight[mine])
        for i in (0, 2):
            assert ((part[i] - whole[i][mine]).abs() <= allowed[i][mine]).all()
        sums = [total + x for total, x in zip(sums, part[3:])]
    for total, expected, bound in zip(sums, whole[3:], allowed[3:]):
        assert ((total - expected).abs() <= bound).all()


def test_a_query_without_keys_gets_zero() -> None:
    q, k = torch.ones(5, 1, 16, device=DEVICE), torch.ones(2, 1, 16, device=DEVICE)
    cu_q, cu_k = (torch.tensor([0, n], device=DEVICE) for n in (5, 2))
    out, lse = flash_attn_varlen_func(q, k, k, cu_q, cu_k, 5, 2, causal=True, return_lse=True)
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


def test_operators_keep_pytorchs_rules(interpreted: bool) -> None:
    """Schemas, gradients, shapes without numbers, dynamic shapes: PyTorch's own checks."""
    q, k, v = (torch.randn(20, heads, 16, device=DEVICE, requires_grad=True) for heads in (2, 1, 1))
    cu_seqlens = torch.tensor([0, 3, 20], device=DEVICE)
    rest = 0.25, True, None
    operators = torch.ops.llava
    torch.library.opcheck(operators.attention.default,
                          (q, k, v, cu_seqlens, cu_seqlens, 17, 17, *rest))
    out, lse = (x.detach() for x in operators.attention(q, k, v, cu_seqlens, cu_seqlens, 17, 17,
                                                        *rest))
    inputs = [x.detach() for x in (out, q, k, v, out, lse)]
    torch.library.opcheck(operators.attention_backward.default,
                          (*inputs, cu_seqlens, cu_seqlens, *rest))


@pytest.mark.beside("-m", "benchmarks.compile", "attention", "--common")
def test_kernels_compile_without_spills(done: subprocess.CompletedProcess[str]) -> None:
    """For sm_90 and sm_80: no spills, shared memory fits, matrix instructions.

    Two fifths of what can be launched; `python -m benchmarks.compile` compiles all of it.
    """
    assert done.returncode == 0, done.stdout + done.stderr
    for sm in ("90", "80"):
        assert len(re.findall(rf"^\w+ +{sm} ", done.stdout, re.MULTILINE)) > 20


@pytest.mark.parametrize("change, message", [
    ({"k": torch.zeros(6, 3, 8), "v": torch.zeros(6, 3, 8)}, "not a multiple of 3"),
    ({"v": torch.zeros(5, 2, 8)}, "need q"),
    ({"q": torch.zeros(6, 4, 8, dtype=torch.float16)}, "differ in dtype"),
    ({"k": torch.zeros(6, 2, 8, device="meta")}, "q is on cpu, but k on meta"),
    ({"cu_seqlens_k": torch.zeros(2, dtype=torch.int64, device="meta")}, "cu_seqlens_k on meta"),
    ({"q": torch.zeros(6, 8, 4).transpose(1, 2)}, "last dimension of q must be contiguous"),
    ({"cu_seqlens_q": torch.tensor([0, 5])}, "must rise from 0 to the 6 tokens of q"),
    ({"cu_seqlens_k": torch.tensor([0, 2, 6])}, "segments \\+ 1 numbers, got 2 and 3"),
    ({"causal": True, "q_positions": torch.zeros(5, dtype=torch.int64)}, "one position per query"),
    ({"cu_seqlens_k": torch.tensor([0, 7])}, "must rise from 0 to the 6 tokens of k"),
    ({"cu_seqlens_k": torch.tensor([1, 6])}, "must rise from 0 to the 6 tokens of k"),
    ({"cu_seqlens_k": torch.tensor([0.0, 6.0])}, "int32 or int64"),
    ({"q_positions": torch.zeros(6, dtype=torch.int64)}, "needs causal"),
    ({"softmax_scale": -1.0}, "must be positive and finite, got -1.0"),
    ({"softmax_scale": 0.0}, "must be positive and finite, got 0.0"),
    ({"softmax_scale": math.nan}, "must be positive and finite, got nan"),
    ({"softmax_scale": math.inf}, "must be positive and finite, got inf"),
    ({"cu_seqlens_q": [0, 6]}, "cu_seqlens_q must be a tensor, not a list"),
    ({"cu_seqlens_k": (0, 6)}, "cu_seqlens_k must be a tensor, not a tuple"),
    ({"cu_seqlens_k": None}, "cu_seqlens_k must be a tensor, not a NoneType"),
    ({"causal": True, "q_positions": [0] * 6}, "q_positions must be a tensor, not a list"),
    ({"dropout_p": 0.1}, "dropout_p must be 0, got 0.1"),
    ({"dropout_p": 1.0}, "dropout_p must be 0, got 1.0"),
    ({"dropout_p": math.nan}, "dropout_p must be 0, got nan"),
])
def test_refuses(change: dict, message: str) -> None:
    case = {"q": torch.zeros(6, 4, 8), "k": torch.zeros(6, 2, 8), "v": torch.zeros(6, 2, 8),
            "cu_seqlens_q": torch.tensor([0, 6]), "cu_seqlens_k": torch.tensor([0, 6]),
            "max_seqlen_q": 6, "max_seqlen_k": 6}
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(**{**case, **change})


def test_flash_attns_call_without_dropout_is_accepted() -> None:
    q, cu_seqlens = torch.randn(6, 1, 8), torch.tensor([0, 6], dtype=torch.int32)
    arguments = (q, q, q, cu_seqlens, cu_seqlens, 6, 6)
    with_it = flash_attn_varlen_func(*arguments, dropout_p=0.0, causal=True)
    assert torch.equal(with_it, flash_attn_varlen_func(*arguments, causal=True))


@pytest.mark.parametrize("capability, target, specialized", [
    ((8, 0), "ampere", False), ((8, 9), "ampere", False), ((9, 0), "hopper", True),
    ((10, 0), "hopper", False), ((12, 0), "ampere", False)])
def test_what_a_gpu_can_do_is_said_once(capability: tuple[int, int], target: str,
                                        specialized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A B200 takes Hopper's tiles, an RTX 50, of less shared memory, smaller ones; one constant
    brings the plain form back."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    class OnGpu:
        device, dtype = torch.device("cuda"), torch.bfloat16

    assert attention_kernel.architecture(OnGpu) == target
    assert attention_kernel.specializes(OnGpu) == specialized
    assert fp8_kernel.specializes is attention_kernel.specializes
    monkeypatch.setattr(attention_kernel, "SPECIALIZE", False)
    assert not attention_kernel.specializes(OnGpu)


@pytest.mark.parametrize("q, message", [
    (torch.zeros(6, 1, 64, dtype=torch.float64), "not torch.float64"),
    (torch.zeros(6, 1, 256), "head widths of 16, 32, 64 and 128, not 256"),
    (torch.zeros(6, 1, 8), "not 8"),
    (torch.zeros(6, 1, 96), "not 96"),
])
def test_kernels_refuse(q: Tensor, message: str, kernels: None) -> None:
    q, cu_seqlens = q.to(DEVICE), torch.tensor([0, 6], device=DEVICE)
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(q, q, q, cu_seqlens, cu_seqlens, 6, 6)


@pytest.mark.skipif(DEVICE == "cuda", reason="a failed assertion there ends the process")
@pytest.mark.parametrize("numbers", [[0, 600], [0, 5], [1, 6], [0, 7, 6], [0, 300, -300, 6]])
def test_kernels_never_run_on_segments_that_do_not_fit(
    numbers: list[int], kernels: None, monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU checks without telling the host: the assertion stands before the kernel."""
    monkeypatch.setattr(attention_kernel, "forward_kernel", None)
    q, cu_seqlens = torch.zeros(6, 1, 16), torch.tensor(numbers)
    with pytest.raises(RuntimeError, match="must rise from 0 to the number of tokens"):
        attention_kernel.triton_forward(q, q, q, cu_seqlens, cu_seqlens, 6, 6, 1.0, True, None)
