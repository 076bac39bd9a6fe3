"""Many ranks on one model: sharded parameters, a shared row, experts that live elsewhere.

In: a whole model and packed rows.  Out: this rank's part of both; results are those of one process.
Called by `train.py`; calls `model.py`, `data.py`, `vision.py`.

Who holds what, for N ranks that form R copies, share rows by C and experts by E:

                     parameters     tokens of a row       keys and values       experts of a layer
    FSDP             R / N          all                   all                   gathered by layer
    context C        R / N          1 / C, in chunks      gathered by layer     gathered by layer
    experts E        R / N          all                   all                   X / E; tokens travel

Sharded parameters.  FSDP2 keeps a slice of every parameter, gradient and AdamW moment on each rank,
gathers a layer just before it runs and drops it afterwards.  Gradients are summed over the ranks.

A shared row (context parallelism).  The tokens of a row are dealt in chunks of 128, by the number
of keys that their queries see.  A rank computes its own tokens only.  In every layer the ranks of
the group exchange keys and values, each rank's padded to the longest.  Six tokens of two samples,
chunks of one token, two ranks:

    row            a0 a1 a2 a3 | b0 b1
    dealt to rank   0  1  1  0    1  0          rank 0 computes a0 a3 b1, rank 1 a1 a2 b0
    gathered       a0 a3 b1 | a1 a2 b0          slots 0 1 2 | 3 4 5
    key_slots       0  3  4  1    5  2          where the row's tokens lie among the gathered ones

Attention of rank 0 then reads keys by key_slots, samples a (4 keys) and b (2 keys), with queries at
positions 0 and 3 of a and 1 of b.  Visual tokens are exchanged once, before the first layer: each
rank runs the ViT on some of the row's pictures.

Experts elsewhere (expert parallelism).  A rank of the group holds X / E whole experts.  Tokens
travel to their experts and back, two all-to-alls a layer.

Shapes: T tokens, of a row or of a rank's part, S samples, I pictures, M visual tokens, G key/value
heads, E head width, C decoder width, X experts.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from attention_kernel import packed_positions, segment_ids
from data import Row, Sample, choose_device, choose_dtype, deal, lay_out
from model import GroupedLinear, LlavaOneVision, MixtureOfExperts, Where, grouped_product
from vision import visual_tokens

CHUNK = 128  # tokens of a shared row that stay together


# --------------------------------------------------------------------------------- ranks and meshes


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and this one's place among them."""

    device: torch.device
    dtype: torch.dtype  # of products
    rank: int = 0
    count: int = 1
    replicas: int = 1  # copies of the model
    context: int = 1  # neighbours that share a row
    experts: int = 1  # neighbours that share the experts of a layer
    mesh: DeviceMesh | None = None  # over which parameters are sharded; None: whole, in fp32
    context_mesh: DeviceMesh | None = None  # the neighbours that share a row
    expert_mesh: DeviceMesh | None = None  # as mesh, with a last dimension of those sharing experts

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that work on different rows."""
        return self.count // self.context


def check_division(count: int, replicas: int, context: int, experts: int) -> None:
    """Raise ValueError unless `count` ranks can be grouped as the flags want."""
    for flag, number in (("--replicas", replicas), ("--context-parallel", context)):
        if count % number:
            raise ValueError(f"{flag} {number} does not divide the number of ranks, {count}")
    if count // replicas % experts:
        raise ValueError(f"--expert-parallel {experts} does not divide the number of ranks that "
                         f"hold a copy, {count // replicas}")


def find_ranks(device: str = "", dtype: str = "", replicas: int = 1, context: int = 1,
               experts: int = 1) -> Ranks:
    """What torchrun says of the ranks, in its environment variables.

    Raises ValueError if they cannot be grouped so, or if there is no GPU for this one.
    """
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_division(count, replicas, context, experts)
    if device == "cpu" or not torch.cuda.is_available():
        chosen = choose_device(device)
    else:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if chosen.index >= torch.cuda.device_count():
            raise ValueError(f"there is no GPU for rank {rank}: the machine has "
                             f"{torch.cuda.device_count()}")
        torch.cuda.set_device(chosen)
    return Ranks(chosen, choose_dtype(dtype, chosen), rank, count, replicas, context, experts)


def join_ranks(ranks: Ranks) -> Ranks:
    """Start to talk to the other ranks.  One process that computes in fp32 needs none of this."""
    if ranks.count == 1 and ranks.dtype == torch.float32:
        return ranks
    kind, shards = ranks.device.type, ranks.count // ranks.replicas
    where: dict[str, Any] = {}
    if "RANK" not in os.environ:  # started by python, not by torchrun
        where = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if kind == "cuda":
        where["device_id"] = ranks.device
    if not dist.is_initialized():
        dist.init_process_group("gloo" if kind == "cpu" else "nccl", **where,
                                timeout=timedelta(hours=1))  # the first rank writes checkpoints

    # parameters are sharded over the last dimension and copied over the first one
    if ranks.replicas == 1:
        mesh = init_device_mesh(kind, (shards,))
    else:
        mesh = init_device_mesh(kind, (ranks.replicas, shards), mesh_dim_names=("copy", "shard"))
    ranks = replace(ranks, mesh=mesh)
    if ranks.context > 1:
        groups = init_device_mesh(kind, (ranks.data_ranks, ranks.context),
                                  mesh_dim_names=("data", "context"))
        ranks = replace(ranks, context_mesh=groups["context"])
    if ranks.experts > 1:
        # silence a warning of DTensor about gathers in two steps, which are intended here
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
        sizes, names = [shards // ranks.experts, ranks.experts], ["shard", "expert"]
        if ranks.replicas > 1:
            sizes, names = [ranks.replicas, *sizes], ["copy", *names]
        groups = init_device_mesh(kind, tuple(sizes), mesh_dim_names=tuple(names))
        ranks = replace(ranks, expert_mesh=groups)
    return ranks


# ------------------------------------------------------------------------------- sharded parameters


def mixtures(module: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of experts inside a model or a layer, in order; none in a dense one."""
    return [part for part in module.modules() if isinstance(part, MixtureOfExperts)]


def shard(model: LlavaOneVision, recompute: str, compiled: bool, ranks: Ranks) -> None:
    """Let layers recompute and compile as told, and spread the parameters over the ranks.

    recompute: what the backward pass computes again of a layer: "none", "selective" (all but its
    attention) or "layer".  The order matters: a layer is wrapped by recomputing, then compiled, and
    FSDP's hooks stay outside of both.
    """
    layers = [*model.visual.blocks, *model.model.layers]
    for layer in layers:
        wrap_layer(layer, recompute, compiled)
    for mixture in mixtures(model) if ranks.context > 1 else []:
        mixture.row_counts = partial(summed_over, group=ranks.context_mesh.get_group())
    if ranks.mesh is None:
        return

    policy = MixedPrecisionPolicy(ranks.dtype, torch.float32, cast_forward_inputs=False)
    if ranks.experts > 1:
        shard_experts(model, policy, ranks)
    units = layers
    if not model.config.tie_word_embeddings:  # tied, the two belong together: to the root
        units = [model.model.embed_tokens, *layers, model.lm_head]
    for unit in units:
        # the head is not dropped after its forward pass: its backward pass follows at once
        fully_shard(unit, mesh=ranks.mesh, mp_policy=policy,
                    reshard_after_forward=unit is not model.lm_head)
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy)  # norms, merger, what is left
    for module in (model, model.lm_head):
        register_fsdp_forward_method(module, "loss")

    # while a unit computes, the next one is gathered
    for unit, following in zip(units, units[1:]):
        experts = [mixture.experts for mixture in mixtures(following) if ranks.experts > 1]
        unit.set_modules_to_forward_prefetch([following, *experts])
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients are summed over the ranks, not averaged
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def wrap_layer(layer: nn.Module, recompute: str, compiled: bool) -> None:
    """Replace a layer's forward method by one that recomputes and is compiled as told."""
    rest: dict[str, Any] = {}
    if recompute == "selective":  # the output of attention is kept, everything else recomputed
        kept = [torch.ops.llava.attention.default]
        rest["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    if recompute != "none":
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False,
                                preserve_rng_state=False, **rest)
    if compiled:
        layer.forward = torch.compile(layer.forward)


def clip_gradients(parameters: list[nn.Parameter], clip: float) -> Tensor:
    """Shrink gradients to a norm of at most `clip`, all together; returns what it was.

    Parameters on different meshes (experts have their own) cannot be stacked: a norm for each mesh,
    then the norm of these norms.
    """
    by_mesh: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = []
    for group in by_mesh.values():
        norm = torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    total = torch.stack(norms).norm()
    for group in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(group, clip, total)
    return total


# ------------------------------------------------------------------------------------- a shared row


@dataclass
class RowShare:
    """A rank's part of a packed row that a group of ranks works on: some tokens, some pictures."""

    row: Row  # the rank's tokens and pictures, laid out as a row
    position_ids: Tensor  # (T,) of the rank's tokens in their samples
    cu_seqlens_k: Tensor  # (S + 1,) samples of which the rank has tokens, whole
    key_slots: Tensor  # (Tk,) where the keys of these samples are among the gathered ones
    key_room: int  # keys that each rank brings, padding included
    visual_slots: Tensor  # (M,) where the rank's visual tokens are among the gathered ones
    visual_room: int  # visual tokens that each rank brings, padding included


def owner_of(dealt: list[list[int]]) -> Tensor:
    """The rank that each item was dealt to: [[0, 3], [1, 2]] -> [0, 1, 1, 0]."""
    owners = torch.empty(sum(map(len, dealt)), dtype=torch.int64)
    for rank, items in enumerate(dealt):
        owners[items] = rank
    return owners


def gathered_slots(owners: Tensor, ranks: int) -> tuple[Tensor, int]:
    """Where each item lies when all ranks' items are gathered, and the room of each rank.

    >>> gathered_slots(torch.tensor([0, 1, 1, 0, 1, 0]), 2)
    (tensor([0, 3, 4, 1, 5, 2]), 3)
    """
    owned = F.one_hot(owners, ranks)  # (items, ranks)
    room = max(1, int(owned.sum(dim=0).max()))
    before = (owned.cumsum(dim=0) - owned).gather(1, owners[:, None])[:, 0]  # of the same rank
    return owners * room + before, room


def share_row(samples: list[Sample], rank: int, ranks: int, visual_ids: list[int]) -> RowShare:
    """One rank's part of a packed row: chunks of tokens dealt by attention work, pictures by size.

    A rank may end up without tokens (a row of few chunks) or pictures.
    """
    row = lay_out(samples, cut=False)
    segment, position = segment_ids(row.cu_seqlens), packed_positions(row.cu_seqlens)  # (T,) each

    # tokens: a query at position p sees p + 1 keys
    work = [float((chunk + 1).sum()) for chunk in position.split(CHUNK)]
    owners = owner_of(deal(work, ranks)).repeat_interleave(CHUNK)[:len(position)]  # (T,)
    slots, key_room = gathered_slots(owners, ranks)
    own_tokens = owners == rank
    queries = torch.bincount(segment[own_tokens], minlength=len(samples))  # (S,) by sample
    own_samples = queries > 0  # samples of which the rank has tokens: it needs all of their keys
    lengths = row.cu_seqlens.diff()

    # pictures: by their number of patches
    pictures = [(sample, i) for sample in samples for i in range(len(sample.images))]
    grid_thw = torch.cat([sample.grid_thw for sample in samples])
    picture_owners = owner_of(deal(grid_thw.prod(dim=1).tolist(), ranks))
    visual_owners = picture_owners.repeat_interleave(visual_tokens(grid_thw))  # (M,) of the row
    visual_slots, visual_room = gathered_slots(visual_owners, ranks)
    own_pictures = picture_owners == rank
    patches = [sample.patches(i) for (sample, i), own in zip(pictures, own_pictures) if own]
    is_hole = torch.isin(row.input_ids, torch.tensor(visual_ids))  # (T,)

    own = Row(
        input_ids=row.input_ids[own_tokens], targets=row.targets[own_tokens],
        cu_seqlens=F.pad(queries[own_samples].cumsum(0), (1, 0)),
        patches=torch.cat(patches) if patches else None,
        grid_thw=grid_thw[own_pictures] if patches else None, names=row.names)
    return RowShare(
        row=own, position_ids=position[own_tokens],
        cu_seqlens_k=F.pad(lengths[own_samples].cumsum(0), (1, 0)),
        key_slots=slots[own_samples[segment]], key_room=key_room,
        visual_slots=visual_slots[own_tokens[is_hole]], visual_room=visual_room)


class GatheredKeys:
    """Keys of a shared row, gathered from the ranks of its group in each layer.

    `model.loss` takes it as `keys`: attention sees nothing but queries, their positions, and whole
    samples of keys.  mesh: the group, of one dimension.
    """

    def __init__(self, share: RowShare, mesh: DeviceMesh, device: torch.device) -> None:
        self.mesh, self.key_room, self.visual_room = mesh, share.key_room, share.visual_room
        self.key_slots = share.key_slots.to(device)
        self.visual_slots = share.visual_slots.to(device)
        self.cu_seqlens_k = share.cu_seqlens_k.to(device)

    def gather(self, x: Tensor, room: int, slots: Tensor) -> Tensor:
        """The `slots` wanted of what all ranks bring, x of each padded to `room` entries.

        The gradient of an entry that several ranks want is the sum of theirs.
        """
        padding = x.new_zeros(room - len(x), *x.shape[1:])
        x = DTensor.from_local(torch.cat([x, padding]), self.mesh, [Shard(0)])
        return x.full_tensor(grad_placements=[Partial()]).index_select(0, slots)

    def visual(self, tokens: Tensor) -> Tensor:
        """The visual tokens (M, C) that belong in this rank's holes, whoever made them."""
        return self.gather(tokens, self.visual_room, self.visual_slots)

    def begin(self, cu_seqlens: Tensor, positions: Tensor) -> None:
        """Take note of the positions of this rank's queries, (T,)."""
        self.positions = positions

    def of_layer(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Where]:
        """Keys and values (Tk, G, E) of all samples of which this rank has queries.

        Gradients are added over the group in their own dtype.
        """
        both = self.gather(torch.cat([k, v], dim=1), self.key_room, self.key_slots)
        k, v = both.chunk(2, dim=1)
        return k, v, Where(self.cu_seqlens_k, len(k), self.positions)


def loss_arguments(row: Row | RowShare, ranks: Ranks) -> dict[str, Any]:
    """The arguments of `model.loss` for a row, or for this rank's part of one, on its device."""
    if isinstance(row, Row):
        return {"targets": row.targets.to(ranks.device), **row.inputs(ranks.device)}
    return {**loss_arguments(row.row, ranks), "position_ids": row.position_ids.to(ranks.device),
            "keys": GatheredKeys(row, ranks.context_mesh, ranks.device)}


def summed_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over a group of ranks; x is left as it is."""
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


# ---------------------------------------------------------------------- experts that live elsewhere


def shard_experts(model: LlavaOneVision, policy: MixedPrecisionPolicy, ranks: Ranks) -> None:
    """Give each rank of an expert group its own experts, and shard these over the groups."""
    sharing, others = ranks.expert_mesh["expert"], ranks.expert_mesh.mesh_dim_names[:-1]
    for mixture in mixtures(model):
        experts = mixture.experts
        for layer in experts.children():
            part = distribute_tensor(layer.weight.detach(), sharing, [Shard(0)])
            layer.weight = nn.Parameter(part)
            if isinstance(layer, GroupedLinear):  # an FP8 layer looks at its own weights
                layer.forward = partial(product_of_own, layer)
        experts.forward = partial(exchanged, experts.forward, sharing.get_group())
        fully_shard(experts, mesh=ranks.expert_mesh[others], mp_policy=policy)


def product_of_own(layer: GroupedLinear, x: Tensor, counts: Tensor) -> Tensor:
    """`GroupedLinear.forward` with the matrices that this rank holds."""
    return grouped_product(x, layer.weight.to_local(), counts)


class Exchange(torch.autograd.Function):
    """Tokens to and from the ranks of a group: `sent[r]` to rank r, `received[r]` from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int],
                group: dist.ProcessGroup) -> Tensor:
        ctx.counts = received, sent, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        received, sent, group = ctx.counts
        return Exchange.apply(gradient, sent, received, group), None, None, None  # the way back


def exchanged(forward: Callable[[Tensor, Tensor], Tensor], group: dist.ProcessGroup, x: Tensor,
              counts: Tensor) -> Tensor:
    """`Experts.forward` where the experts are spread over a group of ranks.

    x: this rank's tokens sorted by expert, (R, C); counts: (X,) tokens of each expert.  Tokens
    arrive by the rank they are from, then by expert; the experts want them by expert alone.
    """
    leaving = counts.view(group.size(), -1)  # (ranks, X / ranks), a line for each rank's experts
    arriving = torch.empty_like(leaving)  # a line for each rank that sends
    dist.all_to_all_single(arriving, leaving, group=group)
    # the one place where the host waits for the GPU: sizes of messages must be known
    sent, received = torch.stack([leaving.sum(1), arriving.sum(1)]).tolist()
    x = Exchange.apply(x, received, sent, group)
    expert = torch.arange(arriving.numel(), device=x.device) % arriving.shape[1]
    expert = expert.repeat_interleave(arriving.flatten(), output_size=len(x))  # of each token
    order = expert.argsort(stable=True)
    y = forward(x[order], arriving.sum(0))
    return Exchange.apply(y[order.argsort()], sent, received, group)
