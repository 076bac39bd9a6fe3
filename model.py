"""LLaVA-OneVision-1.5: visual tokens among words, a Qwen3 decoder, loss and generation.

In: packed token ids (T,), cu_seqlens (S + 1,), packed patches (P, 588) with grid_thw (I, 3).
Out: logits (T, V), the summed loss, or next tokens.
Called by `convert.py`, `parallel.py`, `data.py`, `train.py`, `sample.py`; calls `vision.py`,
`attention_kernel.py`, and `convert.py` to read files.

The idea.  Every `<|image_pad|>` or `<|video_pad|>` in the token ids is a hole.  The first visual
token fills the first hole of the row, the second fills the second, and so on.  The rest is a plain
Qwen3 decoder, which does not know about pictures.  Positions count 0, 1, 2, ... in each sample, and
a visual token counts like a word (this model has no M-RoPE).  A layer computes

    x <- x + W_o attention(rope(norm(W_q n)), rope(norm(W_k n)), W_v n),    n = RMSNorm(x)
    x <- x + W_down (silu(W_gate m) * W_up m),                              m = RMSNorm(x)

A mixture of experts has X of the MLPs in the second line.  A router chooses K of them for each
token, and the token gets their weighted sum.

Shapes: T tokens in a packed row, S segments, P patches, M visual tokens (P / 4), C decoder width,
F MLP width, V vocabulary, H query heads, G key/value heads, E head width, I pictures, X experts,
K experts of a token.

Parameters have the names of the released checkpoints.  Only experts differ: a file has one tensor
per expert, and memory has one tensor for all experts of a layer (`convert.released_names`).

Run `python model.py`: prints the parameters of each preset, by part.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention_kernel import flash_attn_varlen_func, packed_positions, segment_ids
from vision import MERGE, PATCH_NUMBERS, RiceViT, VisionConfig, apply_rope, visual_tokens

OUTPUTS = ("o_proj.weight", "down_proj.weight", "attn.proj.weight", "fc2.weight")  # of layers
LOSS_CHUNK = 1024  # tokens whose logits exist at a time: 1024 x 151,936 in fp32 = 0.6 GB


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the decoder and the ViT, and special ids.  The released sizes share the defaults."""

    hidden_size: int  # C
    intermediate_size: int  # F
    num_hidden_layers: int  # of the decoder
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    rope_theta: float  # base of the rotary frequencies
    head_dim: int = 128  # E
    vocab_size: int = 151936  # V
    rms_norm_eps: float = 1e-6  # added to the mean square
    max_position_embeddings: int = 32768  # tokens of the longest sample in training
    initializer_range: float = 0.02  # standard deviation of fresh weights
    tie_word_embeddings: bool = False  # the head and the embedding are the same matrix
    num_experts: int = 0  # X of each layer; 0: one MLP of width intermediate_size
    num_experts_per_tok: int = 0  # K
    moe_intermediate_size: int = 0  # F of an expert
    image_token_id: int = 151655  # <|image_pad|>
    video_token_id: int = 151656  # <|video_pad|>
    vision: VisionConfig = VisionConfig()  # the ViT and the merger

    @classmethod
    def from_dir(cls, path: str | Path) -> "ModelConfig":
        """Read the `config.json` of a checkpoint directory."""
        from convert import read_config  # here, because convert.py imports this file
        return read_config(path)


# -------------------------------------------------------------------------------------- the decoder


class RMSNorm(nn.Module):
    """x / rms(x) over the last dimension, times a weight.  The division is done in fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        return self.weight * normed.to(x.dtype)


class Where(NamedTuple):
    """What attention must know about the keys."""

    cu_seqlens: Tensor  # (S + 1,) where the keys of each segment begin
    max_seqlen: int  # no segment has more keys
    q_positions: Tensor | None = None  # (T,) of the queries; None: they stand at the last keys


class Keys(Protocol):
    """A source of keys beside those of the tokens at hand: `CachedKeys`, `parallel.GatheredKeys`.

    `begin` is called once for each forward pass, then `of_layer` by each layer.
    """

    def begin(self, cu_seqlens: Tensor, positions: Tensor) -> None: ...
    def of_layer(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Where]: ...


class KVCache:
    """Keys and values of growing segments, each in a slot with room for `capacity` tokens.

    With a capacity of 4, and segments a and b in slots 0 and 2:

        two prompts, of 3 and 1 tokens    a0 a1 a2 .  | .  .  .  .  | b0 .  .  .
        after one new token for each      a0 a1 a2 a3 | .  .  .  .  | b0 b1 .  .

    Old keys never move.  The position of a query says how many keys of its segment it sees.
    """

    def __init__(self, config: ModelConfig, slots: int, capacity: int, like: Tensor) -> None:
        shape = (config.num_hidden_layers, slots * capacity, config.num_key_value_heads,
                 config.head_dim)
        self.k = like.new_zeros(shape)
        self.v = like.new_zeros(shape)
        self.capacity = capacity


class CachedKeys:
    """The keys of one forward pass, on segments in some slots of a cache, in rising order.

    fresh: the segments begin in this pass, so that the keys at hand are all that they have.
    """

    def __init__(self, cache: KVCache, slots: list[int], fresh: bool) -> None:
        self.cache, self.fresh = cache, fresh
        # Attention reads segments end to end.  So a segment reaches to the next one, over slots
        # that take no part: no query sees that far.
        firsts = [slot * cache.capacity for slot in slots]
        self.begin_key, self.end_key = firsts[0], firsts[-1] + cache.capacity
        edges = [first - self.begin_key for first in [*firsts, self.end_key]]
        self.edges = torch.tensor(edges, device=cache.k.device)  # (S + 1,)

    def begin(self, cu_seqlens: Tensor, positions: Tensor) -> None:
        """Find the places of new tokens: cu_seqlens (S + 1,), positions (T,) in their segments."""
        self.places = self.begin_key + self.edges[segment_ids(cu_seqlens)] + positions  # (T,)
        if self.fresh:
            self.where = Where(cu_seqlens, len(positions))
        else:
            self.where = Where(self.edges, self.cache.capacity, positions)

    def of_layer(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Where]:
        """Store k, v (T, G, E) of the new tokens.  Return the keys and values that they see."""
        self.cache.k[layer, self.places] = k
        self.cache.v[layer, self.places] = v
        if not self.fresh:
            own = slice(self.begin_key, self.end_key)
            k, v = self.cache.k[layer, own], self.cache.v[layer, own]
        return k, v, self.where


class SelfAttention(nn.Module):
    """Causal grouped-query attention.  Each head of q and k is normalised before the rotation."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        width = config.hidden_size
        q_width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        # heads stand side by side in the output: H of q, G of k and of v
        self.q_proj = nn.Linear(width, q_width, bias=False)
        self.k_proj = nn.Linear(width, kv_width, bias=False)
        self.v_proj = nn.Linear(width, kv_width, bias=False)
        self.o_proj = nn.Linear(q_width, width, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, cos: Tensor, sin: Tensor,
                keys: Keys | None) -> Tensor:
        heads = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, heads)  # (T, H, E)
        k = self.k_proj(x).unflatten(-1, heads)  # (T, G, E)
        v = self.v_proj(x).unflatten(-1, heads)  # (T, G, E)
        q = apply_rope(self.q_norm(q), cos, sin)  # (T, H, E)
        k = apply_rope(self.k_norm(k), cos, sin)  # (T, G, E)

        # queries read the keys of their own row, or those of a cache or of several ranks
        where = Where(cu_seqlens, max_seqlen)
        if keys is not None:
            k, v, where = keys.of_layer(self.layer, k, v)
        out = flash_attn_varlen_func(
            q, k, v, cu_seqlens, where.cu_seqlens, max_seqlen, where.max_seqlen,
            causal=True, q_positions=where.q_positions)
        return self.o_proj(out.flatten(1))  # (T, C)


class SwiGlu(nn.Module):
    """Gated MLP: silu(gate) decides how much of each of the F values of `up` passes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        mlp_width = config.intermediate_size
        self.gate_proj = nn.Linear(width, mlp_width, bias=False)
        self.up_proj = nn.Linear(width, mlp_width, bias=False)
        self.down_proj = nn.Linear(mlp_width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.gate_proj(x))
        return self.down_proj(gate * self.up_proj(x))


def grouped_product(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply the first counts[0] vectors of x by matrix 0, the next counts[1] by matrix 1, ...

    x: (N, C); weight: X matrices (F, C), one above the other; counts: (X,), with the sum N.
    Returns (N, F).
    """
    matrices = weight.unflatten(0, (len(counts), -1))  # X of (F, C)
    if x.device.type == "cpu":
        groups = zip(x.split(counts.tolist()), matrices)
        return torch.cat([F.linear(vectors, matrix) for vectors, matrix in groups])
    # one kernel for all matrices; the counts stay on the GPU, so that the host need not wait
    ends = counts.cumsum(0).int()
    return F.grouped_mm(x, matrices.transpose(-2, -1), offs=ends)


class GroupedLinear(nn.Linear):
    """X matrices (F, C), one above the other, each for the tokens of one expert."""

    def __init__(self, matrices: int, in_features: int, out_features: int) -> None:
        super().__init__(in_features, matrices * out_features, bias=False)
        self.matrices = matrices  # fp8_kernel.py checks the width of each

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return grouped_product(x, self.weight, counts)


class Experts(nn.Module):
    """X gated MLPs, each for the tokens routed to it.

    Each of the three weights holds the matrices of all experts, one above the other: (X F, C), or
    (X C, F) for down_proj.  FSDP cuts along the first dimension, so any number of ranks get equal
    parts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts = config.num_experts
        width = config.hidden_size
        mlp_width = config.moe_intermediate_size
        self.gate_proj = GroupedLinear(experts, width, mlp_width)
        self.up_proj = GroupedLinear(experts, width, mlp_width)
        self.down_proj = GroupedLinear(experts, mlp_width, width)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        """x: (T K, C), sorted by expert; counts: (X,) how many of them each expert gets."""
        gate = F.silu(self.gate_proj(x, counts))
        return self.down_proj(gate * self.up_proj(x, counts), counts)


class WithLoss(torch.autograd.Function):
    """Return x unchanged, and add `loss` to the total loss.

    So a layer deep in the model can add to the loss, and no forward method returns a second result.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        # total = ... + loss, hence d total / d loss = 1
        return gradient, gradient.new_ones((), dtype=torch.float32)


class MixtureOfExperts(nn.Module):
    """y = sum of w_e expert_e(x) over the K experts with the largest p_e, p = softmax(W x).

    The weights w_e are these p_e, divided by their sum.

    Balance.  Let f_e be the share of a row's tokens that expert e gets, and P_e the mean of p_e:

        balance = X sum_e f_e P_e

    It is K if all experts get the same number of tokens, and X if K experts get all tokens (Switch
    Transformer, arXiv 2101.03961, in the scale of Hugging Face).  f has no gradient.  In the last
    layer, which other tokens do not pass, both are of the tokens with a label.
    `balance_weight` times the balance is added to the loss.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.experts_per_token = config.num_experts_per_tok
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = Experts(config)
        self.balance_weight = 0.0
        # Sums for the training log, (X + 2,): tokens of each expert, balance, forward passes.
        self.routed: Tensor | int = 0

    @torch.compiler.disable  # the number of tokens of an expert is not known beforehand
    def forward(self, x: Tensor) -> Tensor:
        # the router: the K likeliest experts of each token, and their weights
        p = self.gate(x).softmax(-1, dtype=torch.float32)  # (T, X)
        weights, chosen = p.topk(self.experts_per_token)  # (T, K) each
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)  # (T, K)

        # Sort the T K pairs (token, expert) by expert.  Two tokens a, b and K = 2:
        #     chosen  [[2, 0], [2, 1]]    the pairs a2 a0 b2 b1
        #     order   [1, 3, 0, 2]        sorted    a0 b1 a2 b2
        #     counts  [1, 1, 2]           pairs of experts 0, 1, 2
        chosen = chosen.flatten()  # (T K,)
        order = chosen.argsort(stable=True)  # (T K,)
        counts = chosen.new_zeros(p.shape[1])  # (X,)
        counts.scatter_add_(0, chosen, torch.ones_like(chosen))

        # Copy each token K times, then permute: gradients are the same to the bit on every run.
        # x[order // K] gives the same tokens in one step, but PyTorch does not promise in which
        # order its backward pass adds the K gradients of a token.
        copies = x[:, None].expand(-1, self.experts_per_token, -1)  # (T, K, C)
        pairs = copies.flatten(0, 1)[order]  # (T K, C)
        y = self.experts(pairs, counts)  # (T K, C)

        # order.argsort() is the permutation back; then add the K outputs of each token
        y = y[order.argsort()].unflatten(0, weights.shape)  # (T, K, C)
        y = (weights[:, :, None] * y).sum(1)  # (T, C)
        if torch.is_grad_enabled():
            y = WithLoss.apply(y, self.balance_weight * self.balance(p, counts))
        return y

    def row_counts(self, counts: Tensor) -> Tensor:
        """Tokens of each expert in the whole row, (X,).

        If several ranks share a row, `parallel.shard` replaces this method by a sum over them.
        """
        return counts

    def balance(self, p: Tensor, counts: Tensor) -> Tensor:
        """The balance of a forward pass, a scalar; `routed` takes note of it.

        If ranks share the row, this is the rank's summand: the sum over its own tokens' p.
        """
        row_counts = self.row_counts(counts)
        # tokens of the row; if it has no labels, none reaches the last layer's MLP
        tokens = (row_counts.sum() / self.experts_per_token).clamp(min=1)
        share = row_counts / tokens  # f, (X,)
        balance = len(counts) * (share * p.sum(0) / tokens).sum()
        noted = torch.stack([balance.detach(), torch.ones_like(balance)])
        self.routed = self.routed + torch.cat([counts, noted.double()])
        return balance


class DecoderLayer(nn.Module):
    """Attention, then an MLP.  Each reads the normalised x and adds its result to x."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MixtureOfExperts(config) if config.num_experts else SwiGlu(config)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, cos: Tensor, sin: Tensor,
                keys: Keys | None = None, wanted: Tensor | None = None) -> Tensor:
        normed = self.input_layernorm(x)
        x = x + self.self_attn(normed, cu_seqlens, max_seqlen, cos, sin, keys)  # (T, C)
        if wanted is not None:
            x = x.index_select(0, wanted)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen3(nn.Module):
    """Embeddings (T, C) -> normalised hidden states (T, C).  Source: Qwen3 (arXiv 2505.09388).

    wanted: (N,) tokens whose states are needed; the result is then (N, C).  The others are computed
    up to the last layer's attention, which still reads their keys and values.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i)
                                    for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cu_seqlens: Tensor, position_ids: Tensor | None = None,
                keys: Keys | None = None, wanted: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids = packed_positions(cu_seqlens)
        # rotary angles: position * rope_theta^(-2i / E), i = 0 .. E/2 - 1, the same for all heads
        width = self.config.head_dim
        powers = torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width
        angles = position_ids[:, None, None] * self.config.rope_theta**-powers  # (T, 1, E/2)
        cos = angles.cos()
        sin = angles.sin()
        # An upper bound, T - S + 1, reached if all segments but one have a single token.  The
        # longest length itself is on the GPU, and to read it the host would have to wait.
        max_seqlen = len(x) - len(cu_seqlens) + 2

        if keys is not None:
            keys.begin(cu_seqlens, position_ids)
        *layers, last = self.layers
        for layer in layers:
            x = layer(x, cu_seqlens, max_seqlen, cos, sin, keys)
        return self.norm(last(x, cu_seqlens, max_seqlen, cos, sin, keys, wanted))


# ---------------------------------------------------------------------------------- the whole model


class Head(nn.Linear):
    """Logits of the vocabulary, (T, C) -> (T, V)."""

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, summed over tokens: x (T, C), targets (T,).

        The logits (T, V) of all tokens never exist at one time: `checkpoint` drops those of each
        chunk of LOSS_CHUNK tokens, and the backward pass computes them again.
        """
        def chunk_loss(x: Tensor, targets: Tensor) -> Tensor:
            logits = F.linear(x, self.weight).float()
            return F.cross_entropy(logits, targets, reduction="sum")

        losses = []
        for chunk in zip(x.split(LOSS_CHUNK), targets.split(LOSS_CHUNK)):
            losses.append(checkpoint(chunk_loss, *chunk, use_reentrant=False,
                                     preserve_rng_state=False))  # nothing in it is random
        return torch.stack(losses).sum()


def sample_tokens(logits: Tensor, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0,
                  generator: torch.Generator | None = None) -> Tensor:
    """Choose a token for each of S segments, (S,), from logits (S, V).

    At temperature 0, the likeliest.  Else draw from the `top_k` likeliest (0: from all), and of
    these from the nucleus: the smallest set of likeliest whose probabilities add up to `top_p`.
    """
    if temperature < 1e-30:  # what is smaller becomes 0 in float32: nothing can be divided by it
        return logits.argmax(-1)
    # now the largest is 0, and no temperature, however small, makes it infinite
    logits = logits.float() - logits.amax(-1, keepdim=True)
    logits, order = (logits / temperature).topk(top_k or logits.shape[-1])  # sorted
    probabilities = logits.softmax(-1)
    # The nucleus ends where the likelier tokens have reached top_p.  For top_p = 0.7:
    #     probabilities  0.5  0.3  0.2
    #     likelier       0.0  0.5  0.8     the third token is outside
    likelier = probabilities.cumsum(-1) - probabilities
    probabilities[likelier >= top_p] = 0
    # multinomial divides by the sum itself; it draws a place in the sorted order
    place = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, place)[:, 0]


def init_linear(module: nn.Module, std: float, generator: torch.Generator | None = None) -> None:
    """Draw the weights of a linear layer or an embedding.  Biases are zero."""
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
        if config.num_attention_heads % config.num_key_value_heads:
            raise ValueError(f"{config.num_attention_heads} query heads cannot share "
                             f"{config.num_key_value_heads} key heads evenly")
        # a position turns pairs of numbers of a head; in the ViT, y and x turn half of them each
        if config.head_dim % 2 or config.vision.embed_dim % (4 * config.vision.num_heads):
            raise ValueError("the width of a head must be even, and in the ViT a multiple of 4")
        self.config = config
        self.visual = RiceViT(config.vision)
        self.model = Qwen3(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @torch.no_grad()
    def init_weights(self, from_scratch: bool = False) -> "LlavaOneVision":
        """Draw fresh weights from torch's global generator, as upstream but for patch_embed.

        from_scratch: layers add nothing to x at first.  Then gradients pass them unchanged, and
        training from random weights learns sooner.  Attention begins as sharp as in wide heads.
        """
        for module in self.modules():
            init_linear(module, self.config.initializer_range)
        # The norm behind patch_embed cancels its scale.  Large weights make an optimizer step small
        # in proportion, as it must be: the 588 numbers of a patch mostly rise and fall together.
        nn.init.normal_(self.visual.patch_embed.proj.weight, std=0.5)
        nn.init.normal_(self.visual.class_embedding, std=self.config.vision.embed_dim**-0.5)
        nn.init.normal_(self.visual.class_pos_emb)
        for name, parameter in self.named_parameters():
            if from_scratch and name.endswith(OUTPUTS):
                nn.init.zeros_(parameter)
            # A score is at most the root of the head's width, 5.7 for 32.  Twice as much lets a
            # narrow head choose one token among many, as heads of width 128 can.
            if from_scratch and name.endswith("q_norm.weight"):
                nn.init.constant_(parameter, (128 / self.config.head_dim) ** 0.5)
        return self

    def embed(self, input_ids: Tensor, patches: Tensor | None, grid_thw: Tensor | None,
              keys: Any = None, blank_picture: bool = False) -> Tensor:
        """Embed the tokens, and fill the holes with visual tokens: (T, C).

        keys: `parallel.GatheredKeys` if ranks share the row; it exchanges visual tokens, too.
        blank_picture: without pictures, run the ViT on a blank one.  Under FSDP, all ranks must run
        the same modules.
        """
        x = self.model.embed_tokens(input_ids)  # (T, C)
        is_image = input_ids == self.config.image_token_id
        is_video = input_ids == self.config.video_token_id
        holes = (is_image | is_video).nonzero()[:, 0]  # (M,)

        if patches is None:
            patches = x.new_zeros(0, PATCH_NUMBERS)
        if grid_thw is None:
            grid_thw = input_ids.new_zeros(0, 3)
        expected = int(visual_tokens(grid_thw).sum())
        # in a shared row, a rank may run the ViT on the pictures of another rank's holes
        holes_differ = keys is None and len(holes) != expected
        if holes_differ or len(patches) != expected * MERGE**2:
            raise ValueError(f"{len(holes)} image or video tokens in the text and {len(patches)} "
                             f"patches, but the grids of the pictures have {expected} visual "
                             "tokens")
        if blank_picture and expected == 0:
            # 2 x 2 patches, one visual token
            patches = x.new_zeros(MERGE**2, PATCH_NUMBERS)
            grid_thw = input_ids.new_tensor([[1, MERGE, MERGE]])
        if len(patches) == 0:
            return x
        if self.visual is None:
            raise ValueError("the model was loaded without its ViT, which this needs")

        tokens = self.visual(patches, grid_thw).to(x.dtype)
        if keys is None:
            # drops the token of a blank picture; the ViT still takes part in the backward pass
            tokens = tokens[:len(holes)]  # (M, C)
        else:
            tokens = keys.visual(tokens)
        return x.index_copy(0, holes, tokens)  # (T, C)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor, patches: Tensor | None = None,
                grid_thw: Tensor | None = None, position_ids: Tensor | None = None) -> Tensor:
        """Logits (T, V) of a packed row.

        input_ids: (T,).
        cu_seqlens: (S + 1,) first token of each sample, then T.
        patches: (P, 588) of all pictures, in the order of their holes.
        grid_thw: (I, 3) frames, height and width in patches of each picture.
        position_ids: (T,), by default 0, 1, 2, ... in each sample.
        Raises ValueError if the numbers of visual tokens and holes differ.
        """
        x = self.embed(input_ids, patches, grid_thw)
        return self.lm_head(self.model(x, cu_seqlens, position_ids))

    def loss(self, input_ids: Tensor, targets: Tensor, cu_seqlens: Tensor,
             patches: Tensor | None = None, grid_thw: Tensor | None = None,
             position_ids: Tensor | None = None, keys: Any = None) -> Tensor:
        """Cross entropy, summed (not averaged) over the tokens with targets >= 0: fp32 scalar.

        targets: (T,) for each token the one that should follow, or -100 if nothing is to be learnt.
        keys: `parallel.GatheredKeys` if ranks share the row.  The other arguments, and the loss,
        are then those of this rank's part.
        """
        # first, because nonzero makes the host wait until the GPU has done all work given to it
        learnt = (targets >= 0).nonzero()[:, 0]
        x = self.embed(input_ids, patches, grid_thw, keys, blank_picture=True)
        # only tokens with a target pass the head, the widest matrix (V outputs)
        x = self.model(x, cu_seqlens, position_ids, keys, wanted=learnt)  # (learnt tokens, C)
        return self.lm_head.loss(x, targets.index_select(0, learnt))

    @torch.inference_mode()
    def next_logits(self, input_ids: Tensor, cu_seqlens: Tensor, position_ids: Tensor,
                    keys: CachedKeys, patches: Tensor | None = None,
                    grid_thw: Tensor | None = None) -> Tensor:
        """Logits (S, V) of the token behind each segment; for the arguments see `forward`."""
        x = self.embed(input_ids, patches, grid_thw)  # (T, C)
        # the last token of each segment predicts the next one
        return self.lm_head(self.model(x, cu_seqlens, position_ids, keys, cu_seqlens[1:] - 1))

    def generate(self, input_ids: Tensor, cu_seqlens: Tensor, patches: Tensor | None = None,
                 grid_thw: Tensor | None = None, max_new_tokens: int = 1024,
                 stop_ids: tuple[int, ...] = ()) -> Iterator[Tensor]:
        """Continue S packed prompts with the likeliest tokens; `sample.Chat` can do more.

        Yields the next token of each, (S,), one tensor a pass.  A prompt that has produced one of
        `stop_ids` repeats it.  Ends when all prompts have, or after max_new_tokens.
        """
        slots = list(range(len(cu_seqlens) - 1))
        lengths = cu_seqlens.diff()  # (S,)
        cache = KVCache(self.config, len(slots), int(lengths.max()) + max_new_tokens,
                        like=self.model.embed_tokens.weight)
        stops = torch.tensor(stop_ids, dtype=torch.int64, device=input_ids.device)
        logits = self.next_logits(input_ids, cu_seqlens, packed_positions(cu_seqlens),
                                  CachedKeys(cache, slots, fresh=True), patches, grid_thw)
        tokens = sample_tokens(logits)  # (S,)
        # from now on, a row has one token of each prompt: T = S
        each = torch.arange(len(slots) + 1, device=input_ids.device)
        for number in range(max_new_tokens):
            yield tokens
            done = torch.isin(tokens, stops)  # (S,)
            if done.all() or number == max_new_tokens - 1:
                return
            logits = self.next_logits(tokens, each, lengths, CachedKeys(cache, slots, fresh=False))
            tokens = torch.where(done, tokens, sample_tokens(logits))
            lengths = lengths + 1

    @classmethod
    def from_pretrained(cls, path: str | Path, dtype: torch.dtype | None = None,
                        device: str | torch.device | None = None) -> "LlavaOneVision":
        """Load a checkpoint directory; see `convert.load_model`.

        By default, dtype is that of the files, and device is the CPU.
        """
        from convert import load_model  # here, because convert.py imports this file
        return load_model(path, dtype, device)


# -------------------------------------------------------------------------------------------- sizes


def qwen3(layers: int, width: int, mlp_width: int, heads: int, rope_theta: float) -> ModelConfig:
    """A released size: 8 key heads of width 128, and the full RICE-ViT."""
    return ModelConfig(
        hidden_size=width, intermediate_size=mlp_width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=8, rope_theta=rope_theta,
        vision=VisionConfig(text_hidden_size=width))


TINY = ModelConfig(
    hidden_size=256, intermediate_size=256, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=4, head_dim=32, rope_theta=1e4,
    vocab_size=1024, image_token_id=12, video_token_id=13,
    max_position_embeddings=4096, initializer_range=0.06,
    vision=VisionConfig(depth=4, embed_dim=128, num_heads=4, intermediate_size=512,
                        text_hidden_size=256))
PRESETS: dict[str, ModelConfig] = {
    "tiny": TINY,
    # a token passes 2 experts of width 128: 256, as in tiny
    "tiny-moe": replace(TINY, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128),
    "2b": qwen3(layers=28, width=2048, mlp_width=6144, heads=16, rope_theta=1e6),
    "4b": qwen3(layers=36, width=2560, mlp_width=9728, heads=32, rope_theta=5e6),
    "8b": qwen3(layers=36, width=4096, mlp_width=12288, heads=32, rope_theta=1e6),
    "14b": qwen3(layers=40, width=5120, mlp_width=17408, heads=40, rope_theta=1e6),
    "32b": qwen3(layers=64, width=5120, mlp_width=25600, heads=64, rope_theta=1e6),
    # 30 billion parameters, of which 3 billion ("A3B": active) multiply a token
    "30b-a3b": replace(
        qwen3(layers=48, width=2048, mlp_width=6144, heads=32, rope_theta=1e7),
        num_key_value_heads=4, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768),
}


def meta_model(config: ModelConfig) -> LlavaOneVision:
    """A model without numbers: names and shapes of its parameters."""
    with torch.device("meta"):
        return LlavaOneVision(config)


def part_of(name: str) -> str:
    """The part of the model that a parameter belongs to, by its name."""
    if name.startswith("visual.class_"):
        return "class token"  # a part of its own: upstream never trains it
    if name.startswith("visual.merger."):
        return "merger"
    if name.startswith("visual."):
        return "vision"
    return "decoder"


def multiplied(name: str, parameter: nn.Parameter, config: ModelConfig) -> int:
    """How many weights of a parameter every token (or patch) is multiplied by."""
    # the embedding is a table, and only tokens with a target reach the head
    if parameter.dim() < 2 or name in ("model.embed_tokens.weight", "lm_head.weight"):
        return 0
    if ".experts." in name:
        # a token passes K of X experts
        return parameter.numel() * config.num_experts_per_tok // config.num_experts
    return parameter.numel()


@cache
def parameters_by_part(config: ModelConfig, matrices: bool = False) -> dict[str, int]:
    """Number of parameters of each part.

    matrices: count only the weights by which every token (or patch) is multiplied, and those of the
    last layer's MLP, which only tokens with a target pass, as a part of their own.
    """
    count = dict.fromkeys(("class token", "vision", "merger", "decoder"), 0)
    last_mlp = f"model.layers.{config.num_hidden_layers - 1}.mlp."
    for name, parameter in meta_model(config).named_parameters():
        part = part_of(name)
        numbers = parameter.numel()
        if matrices:
            numbers = multiplied(name, parameter, config)
            if name.startswith(last_mlp):
                part = "last mlp"
        count[part] = count.get(part, 0) + numbers
    return count


def forward_flops(config: ModelConfig, loads: dict[str, Any]) -> dict[str, Any]:
    """FLOPs of a forward pass by part; the formulas stand at the top of `train.py`.

    loads: `tokens`, `pairs` of query and key that meet in the decoder, `labels`, `patches`, and
    `frame_pairs` of patches that meet in the ViT.  Each is a number, or an array of several rows.
    """
    weights = parameters_by_part(config, matrices=True)
    vision = config.vision
    query_width = config.num_attention_heads * config.head_dim
    return {"vision": 2 * weights["vision"] * loads["patches"],
            "vision attention": 4 * vision.depth * vision.embed_dim * loads["frame_pairs"],
            "merger": 2 * weights["merger"] * loads["patches"] / 4,
            "decoder": (2 * weights["decoder"] * loads["tokens"]
                        + 2 * weights["last mlp"] * loads["labels"]),
            "decoder attention": 4 * config.num_hidden_layers * query_width * loads["pairs"],
            "head": 2.0 * config.hidden_size * config.vocab_size * loads["labels"]}


def main() -> None:
    """Print the parameters of each preset, and the decoder's that multiply a token."""
    print("preset    class token       vision      merger         decoder           total "
          "passed by a token")
    line = "{:9}{:12,}{:13,}{:12,}{:16,}{:16,}{:18,}"
    for name, config in PRESETS.items():
        parts = parameters_by_part(config).values()
        passed = parameters_by_part(config, matrices=True)
        print(line.format(name, *parts, sum(parts), passed["decoder"] + passed["last mlp"]))


if __name__ == "__main__":
    main()
