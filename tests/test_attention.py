"""The CPU path of varlen attention against its dense definition, over random layouts."""

import math
import random

import pytest
import torch
from torch import Tensor

from attention_kernel import attention_reference, flash_attn_varlen_func


def random_case(seed: int) -> tuple[dict, bool]:
    """Arguments of one call: random segments (empty and unequal ones too), heads, scale, mask."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    segments, groups = rng.randint(1, 6), rng.choice([1, 2, 3])
    heads, width = groups * rng.choice([1, 2, 4]), rng.choice([8, 16, 32])
    causal = rng.random() < 0.5
    kind = rng.choice(["equal", "same", "cache", "any"])
    lengths_q = [rng.choice([0, 1, 2, 7, 33]) for _ in range(segments)]
    if kind == "equal":
        lengths_q = [rng.randint(1, 20)] * segments
    lengths_k = {"cache": [n + rng.randint(0, 40) for n in lengths_q],
                 "any": [rng.choice([0, 1, 5, 30]) for _ in lengths_q]}.get(kind, lengths_q)
    q = torch.randn(sum(lengths_q), heads, width, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(sum(lengths_k), groups, width, dtype=torch.float64, requires_grad=True)
            for _ in range(2))
    cu_q, cu_k = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k))
    positions = None
    if causal and kind == "cache" and rng.random() < 0.5:
        positions = torch.cat([torch.randint(0, max(1, n_k), (n_q,))
                               for n_q, n_k in zip(lengths_q, lengths_k)])
    case = {"q": q, "k": k, "v": v, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k,
            "max_seqlen_q": max(lengths_q), "max_seqlen_k": max(lengths_k), "causal": causal,
            "softmax_scale": rng.choice([None, 0.3]), "q_positions": positions}
    return case, sum(lengths_q) > 0


@pytest.mark.parametrize("seed", range(120))
def test_equals_reference(seed: int) -> None:
    case, gradients = random_case(seed)
    out, lse = flash_attn_varlen_func(**case, return_lse=True)
    expected, expected_lse = attention_reference(**case, return_lse=True)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, expected_lse, atol=1e-12, rtol=0)
    if gradients:
        weight = torch.randn_like(out)
        inputs = (case["q"], case["k"], case["v"])
        ours = torch.autograd.grad((out * weight).sum(), inputs, allow_unused=True)
        theirs = torch.autograd.grad((expected * weight).sum(), inputs)
        for mine, reference in zip(ours, theirs):
            mine = torch.zeros_like(reference) if mine is None else mine
            torch.testing.assert_close(mine, reference, atol=1e-11, rtol=0)


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


def test_a_query_without_keys_gets_zero() -> None:
    q, k = torch.ones(5, 1, 8), torch.ones(2, 1, 8)
    out, lse = flash_attn_varlen_func(q, k, k, torch.tensor([0, 5]), torch.tensor([0, 2]), 5, 2,
                                      causal=True, return_lse=True)
    assert out[:3].eq(0).all() and out[3:].eq(1).all()
    assert lse[0, :3].eq(-math.inf).all() and lse[0, 3:].isfinite().all()


@pytest.mark.parametrize("change, message", [
    ({"k": torch.zeros(6, 3, 8), "v": torch.zeros(6, 3, 8)}, "not a multiple of 3"),
    ({"v": torch.zeros(5, 2, 8)}, "need q"),
    ({"q": torch.zeros(6, 4, 8, dtype=torch.float16)}, "differ in dtype"),
    ({"cu_seqlens_q": torch.tensor([0, 5])}, "must rise from 0 to the 6 tokens of q"),
    ({"cu_seqlens_k": torch.tensor([0, 2, 6])}, "segments"),
    ({"cu_seqlens_k": torch.tensor([0, 7, 6])}, "must rise from 0 to the 6 tokens of k"),
    ({"cu_seqlens_k": torch.tensor([0.0, 6.0])}, "int32 or int64"),
    ({"q_positions": torch.zeros(6, dtype=torch.int64)}, "needs causal"),
])
def test_refuses(change: dict, message: str) -> None:
    case = {"q": torch.zeros(6, 4, 8), "k": torch.zeros(6, 2, 8), "v": torch.zeros(6, 2, 8),
            "cu_seqlens_q": torch.tensor([0, 6]), "cu_seqlens_k": torch.tensor([0, 6]),
            "max_seqlen_q": 6, "max_seqlen_k": 6}
    with pytest.raises(ValueError, match=message):
        flash_attn_varlen_func(**{**case, **change})
