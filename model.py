"""LLaVA-OneVision-1.5: Qwen3 decoder, visual tokens placed among its words, loss, generation.

In: packed token ids (T,), cu_seqlens (S + 1,), packed patches (P, 588) with grid_thw (I, 3).
Out: logits (T, V), the summed loss, or next tokens.
Called by `convert.py`, `train.py`, `sample.py`; calls `vision.py` and `attention_kernel.py`.

The idea.  Every `<|image_pad|>` (and `<|video_pad|>`) token id is a hole; the r-th hole of the row
is filled with the r-th visual token.  From there on the decoder is plain Qwen3 and does not know
about pictures: positions are 0, 1, 2, ... in every packed sample, visual tokens counted like words
(there is no M-RoPE in this model).  A layer is

    x <- x + W_o attention(rope(norm(W_q n)), rope(norm(W_k n)), W_v n),    n = RMSNorm(x)
    x <- x + W_down (silu(W_gate m) * W_up m),                              m = RMSNorm(x)

where the second may be a mixture of experts: X such MLPs, of which each token passes the K that a
router likes best, weighted by how much it likes them.

Shapes: T tokens in a packed row, S segments, P patches, M visual tokens (P / 4), C decoder width,
F MLP width, V vocabulary, H query heads, G key/value heads, E head width, I pictures, X experts,
K of them for a token.

Module names are those of the released checkpoints, so a state dict is a file's content as it is,
but for experts: a file has a tensor for each, memory has them stacked (`released_names`).

Run `python model.py`: prints parameters of every preset by part, and how many are in the decoder
matrices that a token passes.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.utils.checkpoint import checkpoint

from attention_kernel import flash_attn_varlen_func, segment_ids
from vision import RiceViT, VisionConfig, apply_rope

SCALES = "_scale_inv"  # behind the name of a weight in FP8, in that of its scales
SQUARE = 128  # rows and columns of such a weight that share a scale
LOSS_CHUNK = 1024  # rows of logits alive at once: 1024 x 151,936 fp32 = 0.6 GB


@dataclass(frozen=True)
class ModelConfig:
    """The decoder's sizes, the special ids, and the ViT; defaults are those shared by all sizes."""

    hidden_size: int  # C
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    rope_theta: float  # base of the rotary frequencies; differs per size
    head_dim: int = 128  # E
    vocab_size: int = 151936  # V
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768  # tokens of a sample seen in training
    initializer_range: float = 0.02  # standard deviation of fresh linear weights
    tie_word_embeddings: bool = False  # the head is the embedding, transposed
    num_experts: int = 0  # X in every layer; 0: a layer has one MLP, of width intermediate_size
    num_experts_per_tok: int = 0  # K
    moe_intermediate_size: int = 0  # width of an expert
    image_token_id: int = 151655  # <|image_pad|>
    video_token_id: int = 151656  # <|video_pad|>
    vision: VisionConfig = field(default_factory=VisionConfig)

    @classmethod
    def from_dir(cls, path: str | Path) -> "ModelConfig":
        """Read a released `config.json`, as transformers 4 or 5 writes it.

        tie_word_embeddings is true unless the file says false, inside or outside of text_config:
        published ones often say nothing, and then the head is tied if there is none.
        Raises ValueError naming the file and what it lacks.
        """
        file = Path(path) / "config.json"
        if not file.is_file():
            raise ValueError(f"{path} is no checkpoint: it has no config.json")
        raw = read_json_object(file)
        text, vision = raw.get("text_config"), raw.get("vision_config")
        if not isinstance(text, dict) or not isinstance(vision, dict):
            raise ValueError(f"{file} lacks text_config or vision_config")

        quantized = raw.get("quantization_config") or {}
        if not isinstance(quantized, dict):
            raise ValueError(f"{file}: quantization_config is no object")
        refuse_others(file, quantized, {"quant_method": "fp8", "fmt": "e4m3",
                                        "weight_block_size": [SQUARE, SQUARE]})
        refuse_others(file, vision, {"patch_size": 14, "spatial_merge_size": 2, "in_channels": 3,
                                     "temporal_patch_size": 1, "hidden_act": "gelu"})
        ids = {key: int(number(file, raw, key)) for key in ("image_token_id", "video_token_id")}
        if raw.get("tie_word_embeddings") is False:  # transformers 5 says it here, 4 in text_config
            text = {**text, "tie_word_embeddings": False}
        seen = whole_numbers(file, vision, "depth", "embed_dim", "num_heads", "intermediate_size",
                             "text_hidden_size")
        return cls(**decoder_fields(file, text), **ids, vision=VisionConfig(
            **seen, layer_norm_eps=number(file, vision, "layer_norm_eps")))


def number(file: Path, section: dict, key: str) -> float:
    """A positive number of a configuration file.  Raises ValueError if it is none."""
    value = section.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{file}: {key} is {value!r}, not a positive number")
    return value


def whole_numbers(file: Path, section: dict, *keys: str) -> dict[str, int]:
    """Positive whole numbers of a configuration file, by name.  Raises ValueError."""
    for key in keys:
        if number(file, section, key) % 1:
            raise ValueError(f"{file}: {key} is {section[key]}, not a whole number")
    return {key: int(section[key]) for key in keys}


def refuse_others(file: Path, section: dict, supported: dict[str, Any]) -> None:
    """Raise ValueError if a setting is there and has another value than the one supported."""
    for key, value in supported.items():
        if section.get(key) not in (None, value):
            raise ValueError(f"{file}: {key} is {section[key]}, only {value} is supported")


def decoder_fields(file: Path, text: dict) -> dict[str, Any]:
    """The decoder's fields of a ModelConfig, from a `text_config` or Qwen3's own `config.json`.

    Raises ValueError naming the file and what it lacks.
    """
    rope = text.get("rope_parameters") or text  # transformers 5 nests the base
    scaling = text.get("rope_scaling") or rope
    if not isinstance(rope, dict) or not isinstance(scaling, dict):
        raise ValueError(f"{file}: rope_parameters or rope_scaling is no object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{file}: rotary scaling {kind!r} is not supported")
    refuse_others(file, text, {"attention_bias": False, "hidden_act": "silu",
                               "use_sliding_window": False, "partial_rotary_factor": 1.0,
                               "attention_dropout": 0.0})
    kinds = text.get("layer_types") or []
    if not isinstance(kinds, list) or {*map(str, kinds)} - {"full_attention"}:
        raise ValueError(f"{file}: layer_types has others than full_attention, which is not "
                         "supported")
    fields = whole_numbers(
        file, text, "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings")
    fields |= {key: number(file, text, key) for key in ("rms_norm_eps", "initializer_range")}
    if text.get("num_experts"):
        refuse_others(file, text, {"decoder_sparse_step": 1, "mlp_only_layers": [],
                                   "norm_topk_prob": True})
        fields |= whole_numbers(file, text, "num_experts", "num_experts_per_tok",
                                "moe_intermediate_size")
        if fields["num_experts_per_tok"] > fields["num_experts"]:
            raise ValueError(f"{file}: num_experts_per_tok is {fields['num_experts_per_tok']}, of "
                             f"{fields['num_experts']} experts")
    return {**fields, "rope_theta": number(file, rope, "rope_theta"),
            "tie_word_embeddings": text.get("tie_word_embeddings") is not False}


def qwen3(layers: int, hidden: int, ffn: int, heads: int, theta: float) -> ModelConfig:
    """A released size: 8 key heads of width 128 beside the full RICE-ViT."""
    return ModelConfig(hidden, ffn, layers, heads, 8, theta,
                       vision=VisionConfig(text_hidden_size=hidden))


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(256, 384, 3, 8, 8, 1e4, head_dim=32, vocab_size=1024,
                        max_position_embeddings=4096, initializer_range=0.06,
                        image_token_id=12, video_token_id=13,
                        vision=VisionConfig(4, 128, 4, 512, 256)),
    "2b": qwen3(28, 2048, 6144, 16, 1e6),
    "4b": qwen3(36, 2560, 9728, 32, 5e6),
    "8b": qwen3(36, 4096, 12288, 32, 1e6),
    "14b": qwen3(40, 5120, 17408, 40, 1e6),
    "32b": qwen3(64, 5120, 25600, 64, 1e6),
}
PRESETS["tiny-moe"] = replace(PRESETS["tiny"], num_experts=8, num_experts_per_tok=3,
                              moe_intermediate_size=128)  # of which a token passes 384, as in tiny
PRESETS["30b-a3b"] = replace(qwen3(48, 2048, 6144, 32, 1e7), num_key_value_heads=4,
                             num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)


# -------------------------------------------------------------------------------------- the decoder


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, times a weight; over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class KVCache:
    """Keys and values of S growing segments, room for `capacity` tokens in each.

    Segment s owns rows s * capacity to (s + 1) * capacity.  Nothing is moved when it grows: every
    query says by its position how far it sees.  `advance` is called once per step with the new
    tokens' cu_seqlens and positions, then `update` by each layer.
    """

    def __init__(self, config: ModelConfig, segments: int, capacity: int, like: Tensor) -> None:
        shape = (config.num_hidden_layers, segments * capacity, config.num_key_value_heads,
                 config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.capacity, self.steps = capacity, 0
        self.cu_seqlens = torch.arange(segments + 1, device=like.device) * capacity

    def advance(self, cu_seqlens: Tensor, positions: Tensor) -> None:
        self.positions, self.steps = positions, self.steps + 1
        self.slots = self.cu_seqlens[segment_ids(cu_seqlens)] + positions  # (T,)

    def update(self, layer: int, k: Tensor, v: Tensor, own: dict) -> tuple[Tensor, Tensor, dict]:
        """Store k, v (T, G, E) of the step; return the keys and values to attend to, and where
        they are: `own` as they came in the first step, all of the cache in later ones."""
        self.k[layer, self.slots], self.v[layer, self.slots] = k, v
        if self.steps == 1:
            return k, v, own
        return self.k[layer], self.v[layer], {
            "cu_seqlens_k": self.cu_seqlens, "max_seqlen_k": self.capacity,
            "q_positions": self.positions}


class SharedRow:
    """A packed row that a group of ranks works on (context parallelism); it takes a cache's place.

    A rank has the queries of its own tokens; keys and values are gathered from the group in every
    layer, so that attention sees nothing but queries, their positions, and whole samples of keys.
    share: the rank's part, a `data.Share`, which says where among the gathered rows its keys are.
    mesh: the group, of one dimension.
    """

    def __init__(self, share: Any, mesh: DeviceMesh, device: torch.device) -> None:
        self.mesh, self.key_room, self.visual_room = mesh, share.key_room, share.visual_room
        self.cu_seqlens_k = share.cu_seqlens_k.to(device)
        self.key_rows, self.visual_rows = share.key_rows.to(device), share.visual_rows.to(device)

    def gather(self, x: Tensor, room: int, rows: Tensor) -> Tensor:
        """The `rows` wanted of what all ranks bring, x of each padded to `room`.

        The gradient of a row that several ranks want is the sum of theirs.
        """
        x = F.pad(x, (0,) * (2 * x.dim() - 1) + (room - len(x),))
        x = DTensor.from_local(x, self.mesh, [Shard(0)]).full_tensor(grad_placements=[Partial()])
        return x.index_select(0, rows)

    def gather_visual(self, tokens: Tensor) -> Tensor:
        """The visual tokens (M, C) that belong in this rank's holes, whoever made them."""
        return self.gather(tokens, self.visual_room, self.visual_rows)

    def advance(self, cu_seqlens: Tensor, positions: Tensor) -> None:
        self.positions = positions

    def update(self, layer: int, k: Tensor, v: Tensor, own: dict) -> tuple[Tensor, Tensor, dict]:
        """Keys and values (Tk, G, E) of all samples of which this rank has queries; as KVCache's,
        but nothing is kept.  Their gradients are added over the group in their own dtype."""
        both = self.gather(torch.cat([k, v], dim=1), self.key_room, self.key_rows)
        k, v = both.chunk(2, dim=1)
        return k, v, {"cu_seqlens_k": self.cu_seqlens_k, "max_seqlen_k": len(k),
                      "q_positions": self.positions}


class SelfAttention(nn.Module):
    """Causal grouped-query attention; q and k are normalised per head before the rotation."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, cos: Tensor, sin: Tensor,
                cache: KVCache | SharedRow | None) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim))
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = apply_rope(self.q_norm(q), cos, sin)  # (T, H, E)
        k = apply_rope(self.k_norm(k), cos, sin)  # (T, G, E)
        keys = {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen}
        if cache is not None:
            k, v, keys = cache.update(self.layer, k, v, keys)
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, max_seqlen_q=max_seqlen, causal=True,
                                     **keys)
        return self.o_proj(out.flatten(1))  # (T, C)


class SwiGlu(nn.Module):
    """Gated MLP: silu(gate) decides how much of each of the F values of `up` passes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class GroupedLinear(nn.Linear):
    """X matrices (F, C), one above the other, each for the rows that belong to it."""

    def __init__(self, matrices: int, in_features: int, out_features: int) -> None:
        super().__init__(in_features, matrices * out_features, bias=False)
        self.matrices = matrices

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """Rows (R, C) sorted by matrix -> (R, F); counts: (X,) rows of each that is at hand."""
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        weights = weight.unflatten(0, (len(counts), -1))
        if x.device.type == "cpu":
            groups = zip(x.split(counts.tolist()), weights.unbind())
            return torch.cat([F.linear(rows, matrix) for rows, matrix in groups])
        return F.grouped_mm(x, weights.transpose(-2, -1), offs=counts.cumsum(0).int())


class Exchange(torch.autograd.Function):
    """Rows to and from the ranks of a group: `sent[r]` to rank r, `received[r]` from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int],
                group: dist.ProcessGroup) -> Tensor:
        ctx.there = received, sent, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        received, sent, group = ctx.there
        return Exchange.apply(gradient, sent, received, group), None, None, None


class Experts(nn.Module):
    """X gated MLPs, each for the rows routed to it.

    A weight has the matrices of all experts, one above the other: so any number of ranks can share
    its rows evenly.  With expert parallelism (`group` set, by `train.shard`) a rank of the
    group holds X / ranks whole experts, and rows travel to their experts and back.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        sizes = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_proj, self.up_proj = GroupedLinear(*sizes), GroupedLinear(*sizes)
        self.down_proj = GroupedLinear(sizes[0], sizes[2], sizes[1])
        self.group: dist.ProcessGroup | None = None

    def products(self, x: Tensor, counts: Tensor) -> Tensor:
        """The experts at hand, on rows (R, C) sorted by them, of which they get counts (X,)."""
        h = F.silu(self.gate_proj(x, counts)) * self.up_proj(x, counts)
        return self.down_proj(h, counts)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        if self.group is None:
            return self.products(x, counts)
        counts = counts.view(self.group.size(), -1)  # a row for each rank, of its experts
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self.group)
        sent, received = torch.stack([counts.sum(1), arriving.sum(1)]).tolist()  # waits for the GPU
        x = Exchange.apply(x, received, sent, self.group)  # by rank it is from, then by expert
        expert = torch.arange(arriving.numel(), device=x.device) % arriving.shape[1]
        expert = expert.repeat_interleave(arriving.flatten(), output_size=len(x))
        order = expert.argsort(stable=True)
        y = self.products(x[order], arriving.sum(0))
        return Exchange.apply(y[order.argsort()], sent, received, self.group)


class WithLoss(torch.autograd.Function):
    """x as it is; in the backward pass `loss` is differentiated too, as a summand of the total."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones((), dtype=torch.float32)


class MixtureOfExperts(nn.Module):
    """y = sum over the K likeliest experts e of p_e / (their sum) expert_e(x), p = softmax(W x).

    Balance: with f_e the share of a row's tokens that expert e gets and P_e the mean of p_e,

        balance = X sum_e f_e P_e,

    is K when all get the same, X when all tokens go to the same ones (Switch Transformer, arXiv
    2101.03961; the scale is Hugging Face's).  f has no gradient.  `balance_weight` times it is
    added to the loss.  What training wants to know of the routing is summed up in `routed`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.balance_weight = 0.0
        self.row_group: dist.ProcessGroup | None = None  # ranks that have tokens of the same row
        # (X + 2,): tokens by expert, balance, forward passes; all of them twice if recomputed
        self.routed: Tensor | int = 0

    @torch.compiler.disable  # the number of rows for each expert is data
    def forward(self, x: Tensor) -> Tensor:
        p = self.gate(x).softmax(-1, dtype=torch.float32)  # (T, X)
        weights, chosen = p.topk(self.experts_per_token)  # (T, K)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)  # (T, K)
        chosen = chosen.flatten()
        order = chosen.argsort(stable=True)  # (T K,)
        counts = chosen.new_zeros(p.shape[1])  # (X,)
        counts.scatter_add_(0, chosen, torch.ones_like(chosen))
        # rows are copied, then permuted: the gradient of either is the same bits on every run
        copies = x[:, None].expand(-1, self.experts_per_token, -1).flatten(0, 1)  # (T K, C)
        y = self.experts(copies[order], counts)[order.argsort()].unflatten(0, weights.shape)
        y = (weights[:, :, None] * y).sum(1)  # (T, C)
        return self.balanced(y, p, counts) if torch.is_grad_enabled() else y

    def balanced(self, y: Tensor, p: Tensor, counts: Tensor) -> Tensor:
        """y, with the balance in its backward pass; takes note of the routing."""
        of_row = counts.clone()
        if self.row_group is not None:
            dist.all_reduce(of_row, group=self.row_group)
        tokens = of_row.sum() / self.experts_per_token
        balance = len(counts) * (of_row / tokens * p.sum(0) / tokens).sum()  # this rank's summand
        noted = torch.stack([balance.detach(), torch.ones_like(balance)])
        self.routed = self.routed + torch.cat([counts, noted.double()])
        return WithLoss.apply(y, self.balance_weight * balance)


class DecoderLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if config.num_experts else SwiGlu(config)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, cos: Tensor, sin: Tensor,
                cache: KVCache | SharedRow | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cu_seqlens, max_seqlen, cos, sin, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


def packed_positions(cu_seqlens: Tensor) -> Tensor:
    """0, 1, 2, ... restarting in every segment, (T,)."""
    segment = segment_ids(cu_seqlens)
    return torch.arange(len(segment), device=segment.device) - cu_seqlens[segment]


class Qwen3(nn.Module):
    """Embeddings (T, C) -> normalised hidden states (T, C).  Source: Qwen3 (arXiv 2505.09388)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i)
                                    for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cu_seqlens: Tensor, position_ids: Tensor | None = None,
                cache: KVCache | SharedRow | None = None) -> Tensor:
        if position_ids is None:
            position_ids = packed_positions(cu_seqlens)
        width = self.config.head_dim
        powers = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
        angles = position_ids[:, None, None] * self.config.rope_theta**-powers  # (T, 1, E/2)
        cos, sin = angles.cos(), angles.sin()
        max_seqlen = len(x) - len(cu_seqlens) + 2  # an upper bound that asks the GPU nothing
        if cache is not None:
            cache.advance(cu_seqlens, position_ids)
        for layer in self.layers:
            x = layer(x, cu_seqlens, max_seqlen, cos, sin, cache)
        return self.norm(x)


# ---------------------------------------------------------------------------------- the whole model


class Head(nn.Linear):
    """Logits of the vocabulary, (T, C) -> (T, V)."""

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy summed over rows, LOSS_CHUNK at a time; the backward pass computes the
        logits again, so all (T, V) of them never exist."""
        def chunk_loss(x: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(x, self.weight).float(), targets, reduction="sum")

        chunks = zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK))
        losses = [checkpoint(chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False)
                  for chunk in chunks]
        return torch.stack(losses).sum()


def sample_tokens(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """One token per row of logits (S, V): the best at temperature 0, else drawn from the nucleus.

    The nucleus is the smallest set of likeliest tokens whose probabilities reach `top_p`.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() - logits.amax(dim=-1, keepdim=True)  # any temperature stays finite
    probabilities, order = (logits / temperature).softmax(dim=-1).sort(descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities[before >= top_p] = 0
    return order.gather(-1, torch.multinomial(probabilities, 1))[:, 0]


def init_linear(module: nn.Module, std: float, generator: torch.Generator | None = None) -> None:
    """Fresh weights if it is a linear layer or an embedding: normal, biases zero."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=std, generator=generator)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class LlavaOneVision(nn.Module):
    """RICE-ViT, merger, Qwen3 and head.  Source: LLaVA-OneVision-1.5 (arXiv 2509.23661)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vision.text_hidden_size != config.hidden_size:
            raise ValueError(f"the merger's width {config.vision.text_hidden_size} is not the "
                             f"decoder's {config.hidden_size}")
        self.config = config
        self.visual = RiceViT(config.vision)
        self.model = Qwen3(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self) -> "LlavaOneVision":
        """Fresh random weights from torch's global generator, as upstream draws them.

        But for patch_embed: the norm behind it makes its scale free, and a large one makes its
        relative steps small, which it needs, since the 588 numbers of a patch move together.
        """
        for module in self.modules():
            init_linear(module, self.config.initializer_range)
        nn.init.normal_(self.visual.patch_embed.proj.weight, std=0.5)
        nn.init.normal_(self.visual.class_embedding, std=self.config.vision.embed_dim**-0.5)
        nn.init.normal_(self.visual.class_pos_emb)
        return self

    def embed(self, input_ids: Tensor, patches: Tensor | None, grid_thw: Tensor | None,
              shared_row: SharedRow | None = None, always_see: bool = False) -> Tensor:
        """Token embeddings with the visual tokens in their holes, (T, C).

        always_see: without pictures run the ViT all the same, on a blank one that no token needs.
        """
        x = self.model.embed_tokens(input_ids)
        image, video = self.config.image_token_id, self.config.video_token_id
        holes = ((input_ids == image) | (input_ids == video)).nonzero()[:, 0]  # (M,)
        rows = 0 if patches is None else len(patches)
        cells = 0 if grid_thw is None else int(grid_thw.prod(dim=1).sum()) // 4
        if rows != 4 * cells or shared_row is None and len(holes) != cells:
            raise ValueError(f"{len(holes)} image or video tokens in the text and {rows} patches, "
                             f"but the grids of the pictures have {cells} visual tokens")
        if self.visual is None and (cells or always_see):
            raise ValueError("the model was loaded without its ViT, which this needs")
        if always_see and not cells:
            patches, grid_thw = x.new_zeros(4, 588), input_ids.new_tensor([[1, 2, 2]])
        if cells or always_see:
            tokens = self.visual(patches, grid_thw).to(x.dtype)
            tokens = shared_row.gather_visual(tokens) if shared_row else tokens[:len(holes)]
            x = x.index_copy(0, holes, tokens)
        return x

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, patches: Tensor | None = None,
                grid_thw: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """Logits (T, V) of a packed row.

        input_ids: (T,); cu_seqlens: (S + 1,) starts of the samples, then T; patches: (P, 588);
        grid_thw: (I, 3) frames, rows, columns of each picture in patches, in the row's order;
        position_ids: (T,), default 0, 1, 2, ... in each sample.
        Raises ValueError if visual tokens and their places in the text differ in number.
        """
        x = self.embed(input_ids, patches, grid_thw)
        return self.lm_head(self.model(x, cu_seqlens, position_ids))

    def loss(self, input_ids: Tensor, targets: Tensor, cu_seqlens: Tensor,
             patches: Tensor | None = None, grid_thw: Tensor | None = None,
             position_ids: Tensor | None = None, shared_row: SharedRow | None = None) -> Tensor:
        """Cross entropy summed (not averaged) over the tokens with targets >= 0, fp32 scalar.

        targets: (T,) the token that should *follow* each one, -100 where nothing is to be learnt;
        only those that are reach the head.  shared_row: the arguments are a rank's part of it, and
        so is the loss.  Ranks of a sharded model run in step, so the ViT runs with or without
        pictures.
        """
        rows = (targets >= 0).nonzero()[:, 0]  # first: it waits for what the GPU has to do
        x = self.embed(input_ids, patches, grid_thw, shared_row, always_see=True)
        x = self.model(x, cu_seqlens, position_ids, shared_row)
        return self.lm_head.loss(x.index_select(0, rows), targets.index_select(0, rows))

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, cu_seqlens: Tensor, patches: Tensor | None = None,
                 grid_thw: Tensor | None = None, max_new_tokens: int = 1024,
                 stop_ids: tuple[int, ...] = (), temperature: float = 0.0,
                 top_p: float = 1.0) -> Iterator[Tensor]:
        """Continue S packed prompts; yields (S,) next tokens, one tensor per step.

        Greedy at temperature 0.  A prompt that has produced one of `stop_ids` repeats it; the
        generator ends when all have, or after max_new_tokens.
        """
        prompts = len(cu_seqlens) - 1
        lengths = cu_seqlens.diff()
        x = self.embed(input_ids, patches, grid_thw)
        cache = KVCache(self.config, prompts, int(lengths.max()) + max_new_tokens, x)
        position_ids = packed_positions(cu_seqlens)
        stops = torch.tensor(stop_ids, dtype=torch.int64, device=x.device)
        tokens = torch.full((prompts,), -1, device=x.device)
        for _ in range(max_new_tokens):
            x = self.model(x, cu_seqlens, position_ids, cache)
            logits = self.lm_head(x.index_select(0, cu_seqlens[1:] - 1))  # (S, V)
            done = torch.isin(tokens, stops)
            tokens = torch.where(done, tokens, sample_tokens(logits, temperature, top_p))
            yield tokens
            if torch.isin(tokens, stops).all():
                return
            x = self.model.embed_tokens(tokens)
            position_ids, lengths = lengths, lengths + 1
            cu_seqlens = torch.arange(prompts + 1, device=x.device)

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = None,
                        device: str | torch.device | None = None,
                        prepare: "Callable[[LlavaOneVision], None] | None" = None,
                        part: str = "") -> "LlavaOneVision":
        """Load a released checkpoint: a directory of safetensors, one file or many with an index.

        Both key layouts are read (`visual.*`, `model.*` and `model.visual.*`,
        `model.language_model.*`), and matrices in FP8 with `weight_scale_inv` beside them, which
        become bfloat16.  The head is tied to the embedding only when the files have none
        and config.json does not say that it should have one.
        dtype and device default to those of the files and the CPU.
        prepare: called with the model while it is on the meta device; if it shards parameters
        (`fully_shard`), only this rank's slices of them are read.
        part: "vision" loads the ViT and merger alone (the decoder is None), "text" all the rest.
        Raises ValueError naming the tensor and the file if one is missing, unknown, misshapen or
        not of floating point.
        """
        model, tensors = find_checkpoint(Path(path), part)
        if prepare is not None:
            prepare(model)
        parameters, names = dict(model.named_parameters()), released_names(model)
        state: dict[str, Tensor] = {}
        with ProgressBar(parameters.values()) as bar:
            for name, parameter in parameters.items():
                pieces = [tensors[piece] for piece in names[name]]
                state[name] = read_parameter(pieces, parameter, dtype, device)
                bar.advance(state[name])
        tied = model.config.tie_word_embeddings and part != "vision"
        if tied:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        model.load_state_dict(state, assign=True)
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model


def meta_model(config: ModelConfig) -> LlavaOneVision:
    """A model without numbers, for its parameters' names and shapes."""
    with torch.device("meta"):
        return LlavaOneVision(config)


# --------------------------------------------------------------------------- checkpoints, as read


class ProgressBar:
    """A line with a bar and MB/s on standard error, if that is a terminal; erased at the end."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.total = sum(parameter.numel() for parameter in parameters)
        self.numbers, self.megabytes, self.started = 0, 0.0, time.monotonic()
        self.shown = sys.stderr.isatty() and int(os.environ.get("RANK", 0)) == 0

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *error: object) -> None:
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)

    def advance(self, parameter: Tensor) -> None:
        """A parameter was read, or this rank's part of it."""
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        self.numbers += parameter.numel()
        self.megabytes += local.nbytes / 1e6
        if self.shown:
            speed = self.megabytes / (time.monotonic() - self.started)
            bar = "#" * (30 * self.numbers // self.total)
            print(f"\r\033[Kreading [{bar:30}] {self.megabytes:,.0f} MB, {speed:,.0f} MB/s",
                  end="", file=sys.stderr, flush=True)


def released_names(model: LlavaOneVision) -> dict[str, list[str]]:
    """The names in files of each parameter: its own, but for stacked experts one for each."""
    def names(name: str) -> list[str]:
        stem, stacked, matrix = name.partition(".experts.")
        if not stacked:
            return [name]
        return [f"{stem}.experts.{e}.{matrix}" for e in range(model.config.num_experts)]

    return {name: names(name) for name, _ in model.named_parameters()}


class Stored(NamedTuple):
    """Where a tensor of a checkpoint is."""

    file: Path
    key: str  # the file's name for it
    scales: "Stored | None" = None  # of squares of 128 x 128, if it is in FP8


def with_head(config: ModelConfig, tensors: dict[str, Stored]) -> ModelConfig:
    """The configuration of files that have these tensors: a head that may be tied is, if it is not
    among them."""
    tied = config.tie_word_embeddings and "lm_head.weight" not in tensors
    return replace(config, tie_word_embeddings=tied)


def check_names(path: Path, tensors: dict[str, Stored],
                names: dict[str, list[str]], prefixes: tuple[str, ...] = (),
                suffixes: tuple[str, ...] = ()) -> None:
    """Raise ValueError unless a directory has the tensors named, and no others but such as begin or
    end so."""
    known = dict.fromkeys(name for pieces in names.values() for name in pieces)
    for name in known:
        if name not in tensors:
            raise ValueError(f"{path} lacks the tensor {name}")
    for name, (file, key, _) in tensors.items():
        if not (name in known or name.startswith(prefixes) or name.endswith(suffixes)):
            raise ValueError(f"{file} has a tensor {key} that the model does not have")


def find_checkpoint(path: Path, part: str = "",
                    ) -> tuple[LlavaOneVision, dict[str, Stored]]:
    """The model that a directory is of, on the meta device, and where its tensors are.

    part: "vision" or "text" makes the other side None.  Raises ValueError naming what is missing or
    not the model's.
    """
    config, tensors = ModelConfig.from_dir(path), tensor_files(path)
    model, others = meta_model(with_head(config, tensors)), ()
    if part == "vision":
        model.model = model.lm_head = None
        others = "model.", "lm_head."
    elif part == "text":
        model.visual, others = None, ("visual.",)
    elif part:
        raise ValueError(f"there is no part {part!r} of a model, only vision and text")
    check_names(path, tensors, released_names(model), prefixes=others)
    return model, tensors


def open_tensors(file: Path) -> Any:
    """The safetensors file, memory-mapped.  Raises ValueError naming it if it cannot be read."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read as safetensors: {error}") from error


def read_parameter(pieces: list[Stored], like: Tensor, dtype: torch.dtype | None,
                   device: str | torch.device | None) -> Tensor:
    """A parameter whose rows are those of one or more tensors, in turn.

    Distributed like `like`: then this rank reads its own rows alone.  They are copied from the
    mapped file, which is opened for each parameter, so that its pages do not stay.
    """
    begin, end = 0, len(like)
    if isinstance(like, DTensor):
        chunk, = like.__create_chunk_list__()  # what distributed checkpoints ask it, too
        begin, end = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]  # shards are of rows
    rows = len(like) // len(pieces)  # of a piece
    wanted = range(begin // rows, -(-end // rows)) if begin < end else range(1)
    read, reader, opened = [], None, None
    for number in wanted:
        file, key, scales = pieces[number]
        if file != opened:
            reader, opened = open_tensors(file), file
        stored = reader.get_slice(key)
        if (shape := tuple(stored.get_shape())) != (rows, *like.shape[1:]):
            raise ValueError(f"{file}: {key} has shape {shape}, "
                             f"the model needs {(rows, *like.shape[1:])}")
        kinds = ("F64", "F32", "F16", "BF16") if scales is None else ("F8_E4M3",)
        if stored.get_dtype() not in kinds:
            raise ValueError(f"{file}: {key} has numbers of type {stored.get_dtype()}, the model "
                             + ("needs floating point" if scales is None else "has scales for FP8"))
        first = number * rows
        part = stored[(top := max(begin - first, 0)):max(min(end - first, rows), 0)]
        if scales is not None:
            part = from_fp8(part, top, stored.get_shape(), scales).to(dtype or torch.bfloat16)
        read.append(part.to(device=device, dtype=dtype, copy=len(wanted) == 1))
    local = read[0] if len(read) == 1 else torch.cat(read)
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(local, like.device_mesh, like.placements, shape=like.shape,
                              stride=like.stride())


def from_fp8(part: Tensor, top: int, shape: list[int], scales: Stored) -> Tensor:
    """Rows of a matrix in e4m3 from the row `top` on, times the scales of their squares: float32.

    Raises ValueError naming the scales if they are not those of a matrix of this shape.
    """
    reader = open_tensors(scales.file).get_slice(scales.key)
    squares = [-(-size // SQUARE) for size in shape]
    kind = reader.get_dtype()
    if len(shape) != 2 or reader.get_shape() != squares or kind not in ("F32", "BF16"):
        raise ValueError(f"{scales.file}: {scales.key} is of type {kind} and shape "
                         f"{reader.get_shape()}, an FP8 matrix of {shape} needs F32 and {squares}")
    rows = torch.arange(top, top + len(part)) // SQUARE
    factors = reader[:].float()[rows].repeat_interleave(SQUARE, 1)[:, :shape[1]]
    return part.float() * factors


def read_json_object(file: Path) -> dict:
    """The JSON object in a file.  Raises ValueError naming the file if there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds no JSON object")
    return content


def canonical_name(key: str) -> str:
    """The name of a file's tensor in this model: both published layouts become the first one."""
    for prefix, ours in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if key.startswith(prefix):
            return ours + key.removeprefix(prefix)
    return key


def tensor_files(path: Path) -> dict[str, Stored]:
    """Where each tensor of a checkpoint directory is, by our name for it; its scales with it.

    Raises ValueError for a directory without weights, an unreadable file, an index that names a
    tensor its file does not have, or a tensor that is there twice.
    """
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
                isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map of file names")
        if (path / "model.safetensors").exists() and "model.safetensors" not in weight_map.values():
            raise ValueError(f"{path} has a model.safetensors beside the files of its index")
        files = sorted({path / name for name in weight_map.values()})
    else:
        weight_map, files = {}, [path / "model.safetensors"]
    found: dict[str, Stored] = {}
    for file in files:
        if not file.is_file():
            raise ValueError(f"{path} has no {file.name}")
        for key in open_tensors(file).keys():
            name = canonical_name(key)
            if name in found:
                raise ValueError(f"{file}: {key} is also in {found[name][0]}")
            if weight_map and key not in weight_map:
                raise ValueError(f"{file}: {key} is not in {index.name}")
            found[name] = Stored(file, key)
    for key, name in weight_map.items():
        if found.get(canonical_name(key), (None,))[0] != path / name:
            raise ValueError(f"{index} places {key} in {name}, which does not have it")
    for name in [name for name in found if name.endswith(SCALES)]:
        if (weight := name.removesuffix(SCALES)) in found:
            found[weight] = found[weight]._replace(scales=found.pop(name))
    return found


def part_of(name: str) -> str:
    """The part a parameter belongs to; the class token, which upstream never trains, to none."""
    if name.startswith("visual.class_"):
        return "class token"
    if name.startswith("visual."):
        return "merger" if name.startswith("visual.merger.") else "vision"
    return "decoder"


@cache
def parameters_by_part(config: ModelConfig, matrices: bool = False) -> dict[str, int]:
    """Parameters of each part; or only those in the matrices that a token or patch passes: of
    experts K / X, and neither embedding, of which it takes a row, nor head, which labels reach."""
    model = meta_model(config)
    count = dict.fromkeys(("class token", "vision", "merger", "decoder"), 0)
    for name, parameter in model.named_parameters():
        if not matrices or parameter.dim() > 1 and name not in ("model.embed_tokens.weight",
                                                                "lm_head.weight"):
            passed = matrices and ".experts." in name
            count[part_of(name)] += (parameter.numel() * config.num_experts_per_tok
                                     // config.num_experts if passed else parameter.numel())
    return count


def main() -> None:
    print(f"{'preset':9}{'class token':>12}{'vision':>13}{'merger':>12}{'decoder':>16}{'total':>16}"
          f"{'passed by a token':>18}")
    for name, config in PRESETS.items():
        token, vision, merger, decoder = parameters_by_part(config).values()
        passed = parameters_by_part(config, matrices=True)["decoder"]
        print(f"{name:9}{token:12,}{vision:13,}{merger:12,}{decoder:16,}"
              f"{token + vision + merger + decoder:16,}{passed:18,}")


if __name__ == "__main__":
    main()
