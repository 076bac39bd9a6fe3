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

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention_kernel import flash_attn_varlen_func, packed_positions, segment_ids
from vision import MERGE, PATCH_NUMBERS, RiceViT, VisionConfig, apply_rope, visual_tokens

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
        """The sizes of a checkpoint directory, from its `config.json`."""
        from convert import read_config  # the one import upward: convert.py knows the files
        return read_config(path)


def qwen3(layers: int, width: int, mlp_width: int, heads: int, rope_theta: float,
          key_heads: int = 8, **experts: int) -> ModelConfig:
    """A released size: heads of width 128, beside the full RICE-ViT."""
    return ModelConfig(hidden_size=width, intermediate_size=mlp_width, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=key_heads,
                       rope_theta=rope_theta, vision=VisionConfig(text_hidden_size=width),
                       **experts)


TINY = ModelConfig(
    hidden_size=256, intermediate_size=384, num_hidden_layers=3,
    num_attention_heads=8, num_key_value_heads=8, head_dim=32, rope_theta=1e4,
    vocab_size=1024, image_token_id=12, video_token_id=13,
    max_position_embeddings=4096, initializer_range=0.06,
    vision=VisionConfig(depth=4, embed_dim=128, num_heads=4, intermediate_size=512,
                        text_hidden_size=256))
PRESETS: dict[str, ModelConfig] = {
    "tiny": TINY,
    # a token passes 3 experts of width 128: 384, as in tiny
    "tiny-moe": replace(TINY, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=128),
    "2b": qwen3(layers=28, width=2048, mlp_width=6144, heads=16, rope_theta=1e6),
    "4b": qwen3(layers=36, width=2560, mlp_width=9728, heads=32, rope_theta=5e6),
    "8b": qwen3(layers=36, width=4096, mlp_width=12288, heads=32, rope_theta=1e6),
    "14b": qwen3(layers=40, width=5120, mlp_width=17408, heads=40, rope_theta=1e6),
    "32b": qwen3(layers=64, width=5120, mlp_width=25600, heads=64, rope_theta=1e6),
    "30b-a3b": qwen3(layers=48, width=2048, mlp_width=6144, heads=32, rope_theta=1e7, key_heads=4,
                     num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
}


# -------------------------------------------------------------------------------------- the decoder


class RMSNorm(nn.Module):
    """x / rms(x) in fp32, cast back, times a weight; over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class Where(NamedTuple):
    """What attention has to know of its keys, beside the keys."""

    cu_seqlens: Tensor  # (S + 1,) where the keys of each segment begin
    max_seqlen: int  # keys of the longest segment at most
    q_positions: Tensor | None = None  # (T,) of the queries; None: they stand at the last keys


class Keys(Protocol):
    """Keys that are not those of the row itself: of a `KVCache`, or of `parallel.GatheredKeys`."""

    def begin(self, cu_seqlens: Tensor, positions: Tensor) -> None: ...
    def of_layer(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Where]: ...


class KVCache:
    """Keys and values of S growing segments, room for `capacity` tokens in each.

    Segment s owns the slots s * capacity to (s + 1) * capacity.  Nothing is moved when it grows:
    every query says by its position how far it sees.  `begin` is called once per step with the new
    tokens' cu_seqlens and positions, then `of_layer` by each layer.
    """

    def __init__(self, config: ModelConfig, segments: int, capacity: int, like: Tensor) -> None:
        shape = (config.num_hidden_layers, segments * capacity, config.num_key_value_heads,
                 config.head_dim)
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        self.capacity, self.steps = capacity, 0
        self.cu_seqlens = torch.arange(segments + 1, device=like.device) * capacity

    def begin(self, cu_seqlens: Tensor, positions: Tensor) -> None:
        """Take note of a step's new tokens: cu_seqlens (S + 1,), positions (T,) in the segments."""
        self.steps += 1
        self.new_tokens = cu_seqlens
        self.positions = positions
        self.slots = self.cu_seqlens[segment_ids(cu_seqlens)] + positions  # (T,)

    def of_layer(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Where]:
        """Store k, v (T, G, E) of the new tokens; return the keys and values to attend to."""
        self.k[layer, self.slots] = k
        self.v[layer, self.slots] = v
        if self.steps == 1:  # the new tokens are all there are: no need to read them back
            return k, v, Where(self.new_tokens, len(k))
        return self.k[layer], self.v[layer], Where(self.cu_seqlens, self.capacity, self.positions)


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
                keys: "Keys | None") -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim))
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        q = apply_rope(self.q_norm(q), cos, sin)  # (T, H, E)
        k = apply_rope(self.k_norm(k), cos, sin)  # (T, G, E)
        where = Where(cu_seqlens, max_seqlen)  # keys are those of these very tokens ...
        if keys is not None:  # ... or of a growing cache, or gathered from other ranks
            k, v, where = keys.of_layer(self.layer, k, v)
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, where.cu_seqlens, max_seqlen,
                                     where.max_seqlen, causal=True, q_positions=where.q_positions)
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


def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """X products in one: tokens x (R, C), sorted by matrix, with weight (X F, C) -> (R, F).

    counts: (X,) tokens of each matrix.
    """
    weights = weight.unflatten(0, (len(counts), -1))  # (X, F, C)
    if x.device.type == "cpu":
        groups = zip(x.split(counts.tolist()), weights.unbind())
        return torch.cat([F.linear(tokens, matrix) for tokens, matrix in groups])
    return F.grouped_mm(x, weights.transpose(-2, -1), offs=counts.cumsum(0).int())


class GroupedLinear(nn.Linear):
    """X matrices (F, C), one above the other, each for the tokens that belong to it."""

    def __init__(self, matrices: int, in_features: int, out_features: int) -> None:
        super().__init__(in_features, matrices * out_features, bias=False)
        self.matrices = matrices

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return grouped_product(x, self.weight, counts)


class Experts(nn.Module):
    """X gated MLPs, each for the tokens routed to it.

    A weight has the matrices of all experts, one above the other, so that any number of ranks can
    share it evenly.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, width, inner = (config.num_experts, config.hidden_size,
                                 config.moe_intermediate_size)
        self.gate_proj = GroupedLinear(experts, width, inner)
        self.up_proj = GroupedLinear(experts, width, inner)
        self.down_proj = GroupedLinear(experts, inner, width)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x: (R, C) sorted by expert; counts: (X,) tokens of each."""
        h = F.silu(self.gate_proj(x, counts)) * self.up_proj(x, counts)
        return self.down_proj(h, counts)


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

    def row_counts(self, counts: Tensor) -> Tensor:
        """Tokens of each expert (X,) in the whole row.

        `parallel.shard` replaces this method where several ranks have tokens of a row.
        """
        return counts

    def balanced(self, y: Tensor, p: Tensor, counts: Tensor) -> Tensor:
        """y, with the balance in its backward pass; takes note of the routing."""
        of_row = self.row_counts(counts)
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
                keys: "Keys | None" = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cu_seqlens, max_seqlen, cos, sin, keys)
        return x + self.mlp(self.post_attention_layernorm(x))


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
                keys: "Keys | None" = None) -> Tensor:
        if position_ids is None:
            position_ids = packed_positions(cu_seqlens)
        width = self.config.head_dim
        powers = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
        angles = position_ids[:, None, None] * self.config.rope_theta**-powers  # (T, 1, E/2)
        cos, sin = angles.cos(), angles.sin()
        max_seqlen = len(x) - len(cu_seqlens) + 2  # an upper bound that asks the GPU nothing
        if keys is not None:
            keys.begin(cu_seqlens, position_ids)
        for layer in self.layers:
            x = layer(x, cu_seqlens, max_seqlen, cos, sin, keys)
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
              exchange: Callable[[Tensor], Tensor] | None = None,
              blank_picture: bool = False) -> Tensor:
        """Token embeddings with the visual tokens in their holes, (T, C).

        exchange: of a shared row, whose pictures may belong in other ranks' holes: takes the visual
        tokens made here, returns those of the holes here.
        blank_picture: without pictures run the ViT all the same, on a blank one that no hole needs.
        Under FSDP all ranks must run the same modules.
        """
        x = self.model.embed_tokens(input_ids)
        image, video = self.config.image_token_id, self.config.video_token_id
        holes = ((input_ids == image) | (input_ids == video)).nonzero()[:, 0]  # (M,)
        if patches is None:
            patches, grid_thw = x.new_zeros(0, PATCH_NUMBERS), input_ids.new_zeros(0, 3)
        expected = int(visual_tokens(grid_thw).sum())
        if len(patches) != expected * MERGE**2 or exchange is None and len(holes) != expected:
            raise ValueError(f"{len(holes)} image or video tokens in the text and {len(patches)} "
                             f"patches, but the grids of the pictures have {expected} visual "
                             "tokens")
        if blank_picture and not expected:
            patches = x.new_zeros(MERGE**2, PATCH_NUMBERS)
            grid_thw = input_ids.new_tensor([[1, MERGE, MERGE]])
        if not len(patches):
            return x
        if self.visual is None:
            raise ValueError("the model was loaded without its ViT, which this needs")
        tokens = self.visual(patches, grid_thw).to(x.dtype)  # (M, C), of a blank picture too
        tokens = tokens[:len(holes)] if exchange is None else exchange(tokens)
        return x.index_copy(0, holes, tokens)

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
             position_ids: Tensor | None = None, keys: Any = None) -> Tensor:
        """Cross entropy summed (not averaged) over the tokens with targets >= 0, fp32 scalar.

        targets: (T,) the token that should *follow* each one, -100 where nothing is to be learnt;
        only the tokens with a target reach the head.
        keys: `parallel.GatheredKeys` if the arguments are a rank's part of a shared row; then the
        loss is of this part, too.
        """
        # first, while the GPU's queue is short: nonzero waits until the GPU has done all before it
        learnt = (targets >= 0).nonzero()[:, 0]
        exchange = None if keys is None else keys.visual
        x = self.embed(input_ids, patches, grid_thw, exchange, blank_picture=True)
        x = self.model(x, cu_seqlens, position_ids, keys)
        return self.lm_head.loss(x.index_select(0, learnt), targets.index_select(0, learnt))

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
        keys = KVCache(self.config, prompts, int(lengths.max()) + max_new_tokens, x)
        position_ids = packed_positions(cu_seqlens)
        stops = torch.tensor(stop_ids, dtype=torch.int64, device=x.device)
        tokens = torch.full((prompts,), -1, device=x.device)
        for _ in range(max_new_tokens):
            x = self.model(x, cu_seqlens, position_ids, keys)
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
                        device: str | torch.device | None = None) -> "LlavaOneVision":
        """Load a released checkpoint directory; see `convert.load_model`.

        dtype and device default to those of the files and the CPU.
        """
        from convert import load_model  # the one import upward: convert.py knows the files
        return load_model(path, dtype, device)


def meta_model(config: ModelConfig) -> LlavaOneVision:
    """A model without numbers, for its parameters' names and shapes."""
    with torch.device("meta"):
        return LlavaOneVision(config)


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
