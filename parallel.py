"""Many ranks on one model: sharded parameters, shared rows, experts on different ranks.

In: a whole model and packed rows.  Out: this rank's part of both; results are those of one process.
Called by `train.py`; calls `model.py`, `data.py`, `vision.py`, `attention_kernel.py`.

N ranks hold R copies of the model.  C ranks share a row, and E ranks share the experts of a layer.
What a rank holds of a copy or of a row:

                     parameters     tokens of a row       keys and values       experts of a layer
    FSDP             R / N          all                   all                   gathered by layer
    context C        R / N          1 / C, in chunks      gathered by layer     gathered by layer
    experts E        R / N          all                   all                   X / E; tokens travel

Sharded parameters.  FSDP2 leaves a slice of each parameter, its gradient and its AdamW moments on
each rank.  It gathers a layer just before the layer runs, and drops it afterwards.  Gradients are
summed over the ranks.

A shared row (context parallelism).  The tokens of a row are dealt to the ranks in chunks of 128, so
that all ranks have about as many pairs of query and key.  In each layer, the ranks exchange keys
and values; each rank's part is padded to the longest.  An example with two ranks, samples a and b,
and chunks of one token:

    row            a0 a1 a2 a3 a4 | b0
    keys seen       1  2  3  4  5    1
    rank            0  0  1  1  0    1          8 keys for rank 0, 8 for rank 1
    gathered       a0 a1 a4 | a2 a3 b0          slots 0 1 2 | 3 4 5
    slot            0  1  3  4  2    5          where each token of the row is among the gathered

Rank 0 has queries at positions 0, 1 and 4 of a, and reads the keys of a: key_slots 0 1 3 4 2.  Rank
1 has queries of both samples, and reads all keys: key_slots 0 1 3 4 2 5.  Pictures are dealt, too,
and visual tokens exchanged in the same way, once, before the first layer.

Experts on different ranks (expert parallelism).  A rank holds X / E whole experts.  Tokens travel
to their experts and back, in two all-to-alls a layer.

Shapes: T tokens, of a row or of a rank's part, S samples, I pictures, M visual tokens, G key/value
heads, E head width, C decoder width, X experts, K experts of a token.

Run `torchrun --nproc-per-node 2 train.py --context-parallel 2`: two ranks share each row.
"""

import logging
import atexit
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
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from attention_kernel import packed_positions, segment_ids
from data import Row, Sample, choose_device, choose_dtype, cut_pictures, deal, lay_out
from model import GroupedLinear, LlavaOneVision, MixtureOfExperts, Where, grouped_product
from vision import visual_tokens

CHUNK = 128  # tokens of a shared row that stay together


# --------------------------------------------------------------------------------- ranks and meshes


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and the place of this one among them."""

    device: torch.device  # of this process
    dtype: torch.dtype  # of products
    rank: int = 0  # number of this process
    count: int = 1  # processes
    replicas: int = 1  # copies of the model
    context: int = 1  # neighbours that share a row
    experts: int = 1  # neighbours that share the experts of a layer
    mesh: DeviceMesh | None = None  # for FSDP; None: parameters stay whole, in fp32
    context_mesh: DeviceMesh | None = None  # the neighbours that share a row
    expert_mesh: DeviceMesh | None = None  # as mesh, with the neighbours as a last dimension

    @property
    def data_ranks(self) -> int:
        """Number of groups of ranks that work on different rows."""
        return self.count // self.context


def check_division(count: int, replicas: int, context: int, experts: int) -> None:
    """Raise ValueError unless `count` ranks can form the groups that the flags ask for."""
    for flag, number in (("--replicas", replicas), ("--context-parallel", context)):
        if count % number:
            raise ValueError(f"{flag} {number} does not divide the number of ranks, {count}")
    if count // replicas % experts:
        raise ValueError(f"--expert-parallel {experts} does not divide the number of ranks that "
                         f"hold a copy, {count // replicas}")


def find_ranks(device: str = "", dtype: str = "", replicas: int = 1, context: int = 1,
               experts: int = 1) -> Ranks:
    """Read this process's rank from the environment variables that torchrun sets.

    Raises ValueError if the ranks cannot form the groups, or if there is no GPU for this rank.
    """
    rank = int(os.environ.get("RANK", 0))
    count = int(os.environ.get("WORLD_SIZE", 1))
    check_division(count, replicas, context, experts)
    if device == "cpu" or not torch.cuda.is_available():
        chosen = choose_device(device)
    else:
        # the ranks of a machine take its GPUs in order
        index = int(os.environ.get("LOCAL_RANK", 0))
        gpus = torch.cuda.device_count()
        if index >= gpus:
            raise ValueError(f"there is no GPU for rank {rank}: the machine has {gpus}")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    return Ranks(chosen, choose_dtype(dtype, chosen), rank, count, replicas, context, experts)


def start_processes(device: torch.device) -> None:
    """Connect the processes of a run."""
    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        options = {"backend": "nccl", "device_id": device}
    if "RANK" not in os.environ:
        # started by python, not by torchrun: one process, no address to meet at
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        # NCCL warns about groups that are left.  Of several ranks, one would wait for the others.
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
    elif "TORCHELASTIC_RESTART_COUNT" in os.environ:
        # torchrun keeps its store when it restarts the ranks: without names of their own they would
        # find the addresses of the ranks before, which are gone
        store, rank, count = next(rendezvous("env://"))
        attempt = f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
        options |= {"store": dist.PrefixStore(attempt, store), "rank": rank, "world_size": count}
    # the others wait while the first rank writes a checkpoint: an hour, not the usual minutes
    dist.init_process_group(**options, timeout=timedelta(hours=1))


def join_ranks(ranks: Ranks) -> Ranks:
    """Connect the ranks and arrange them in meshes.  One process in fp32 needs neither."""
    if ranks.count == 1 and ranks.dtype == torch.float32:
        return ranks
    if not dist.is_initialized():
        start_processes(ranks.device)

    def grid(**sizes: int) -> DeviceMesh:
        return init_device_mesh(ranks.device.type, tuple(sizes.values()),
                                mesh_dim_names=tuple(sizes))

    # FSDP copies parameters over the first dimension and shards them over the next
    copies = {"copy": ranks.replicas} if ranks.replicas > 1 else {}
    shards = ranks.count // ranks.replicas
    ranks = replace(ranks, mesh=grid(**copies, shard=shards))
    if ranks.context > 1:
        groups = grid(data=ranks.data_ranks, context=ranks.context)
        ranks = replace(ranks, context_mesh=groups["context"])
    if ranks.experts > 1:
        # silence a warning of DTensor about gathers in two steps, which are intended here
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
        groups = grid(**copies, shard=shards // ranks.experts, expert=ranks.experts)
        ranks = replace(ranks, expert_mesh=groups)
    return ranks


# ------------------------------------------------------------------------------- sharded parameters


def mixtures(module: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of experts inside a model or a layer, in order; none in a dense one."""
    return [part for part in module.modules() if isinstance(part, MixtureOfExperts)]


def shard(model: LlavaOneVision, recompute: str, compiled: bool, ranks: Ranks) -> None:
    """Set up recomputing and compiling of layers, and spread the parameters over the ranks.

    recompute: what of a layer the backward pass computes again: "none", "selective" (all but its
    attention; not with experts on different ranks) or "layer".
    """
    # The order matters: recomputing wraps a layer, compiling wraps both, and the hooks of FSDP,
    # which gather the layer's parameters, stay outside.
    layers = [*model.visual.blocks, *model.model.layers]
    for layer in layers:
        wrap_layer(layer, recompute, compiled)
    if ranks.context > 1:
        group = ranks.context_mesh.get_group()
        for mixture in mixtures(model):
            mixture.row_counts = partial(summed_over, group=group)
    if ranks.mesh is None:
        return

    # FSDP gathers one unit at a time: a layer, the embedding, the head
    policy = MixedPrecisionPolicy(ranks.dtype, torch.float32, cast_forward_inputs=False)
    if ranks.experts > 1:
        shard_experts(model, policy, ranks)
    units = layers
    if not model.config.tie_word_embeddings:  # tied, they are one tensor, left to the root
        units = [model.model.embed_tokens, *layers, model.lm_head]
    for unit in units:
        # the head stays after its forward pass: its backward pass follows at once
        fully_shard(unit, mesh=ranks.mesh, mp_policy=policy,
                    reshard_after_forward=unit is not model.lm_head)
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy)  # the root: norms, merger, all the rest
    for module in (model, model.lm_head):
        register_fsdp_forward_method(module, "loss")

    # while a unit computes, FSDP gathers the next one
    for unit, following in zip(units, units[1:]):
        prefetched = [following]
        if ranks.experts > 1:
            prefetched += [mixture.experts for mixture in mixtures(following)]
        unit.set_modules_to_forward_prefetch(prefetched)
    # the loss is a sum over all tokens: gradients are summed over the ranks, not averaged
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def wrap_layer(layer: nn.Module, recompute: str, compiled: bool) -> None:
    """Replace the forward method of a layer by one that recomputes and is compiled, as asked."""
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if recompute == "selective":
        # keep the result of attention, recompute everything else
        kept = [torch.ops.llava.attention.default]
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    if recompute != "none":
        layer.forward = partial(checkpoint, layer.forward, **options)
    if compiled:
        layer.forward = torch.compile(layer.forward)


def by_mesh(parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters with a gradient, in groups of one mesh: PyTorch stacks no tensors of two."""
    # with expert parallelism, experts have a mesh of their own
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            groups.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return list(groups.values())


def gradient_norm(parameters: list[nn.Parameter], device: torch.device) -> Tensor:
    """The norm of all gradients together, float32, over the shards of all ranks."""
    norms = [torch.zeros((), device=device)]
    for group in by_mesh(parameters):
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in group])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()  # of the gradients of all ranks, not of this one's shards
        norms.append(norm)
    return torch.stack(norms).norm()


def clip_gradients(parameters: list[nn.Parameter], clip: float, norm: float) -> None:
    """Scale all gradients, whose common norm is `norm`, so that it becomes `clip` at most."""
    for group in by_mesh(parameters):
        total = torch.tensor(norm, dtype=torch.float32, device=group[0].grad.device)
        torch.nn.utils.clip_grads_with_norm_(group, clip, total)


# ------------------------------------------------------------------------------------- a shared row


@dataclass
class RowShare:
    """One rank's part of a packed row: some of its tokens, and some of its pictures."""

    row: Row  # the rank's tokens and pictures, laid out as a row
    samples: list[int]  # which samples of the whole row those are
    position_ids: Tensor  # (T,) of the rank's tokens in their samples
    cu_seqlens_k: Tensor  # (S + 1,) of the samples, whole, of which the rank has tokens
    key_slots: Tensor  # (Tk,) where the keys of these samples are among the gathered ones
    key_room: int  # keys that each rank brings, padding included
    visual_slots: Tensor  # (M,) where the visual tokens of the rank's holes are, likewise
    visual_room: int  # visual tokens that each rank brings, padding included

    def pin_memory(self) -> "RowShare":
        """For the DataLoader, see Row.pin_memory."""
        self.row.pin_memory()
        return self


def owner_of(dealt: list[list[int]]) -> Tensor:
    """The rank that each item was dealt to: [[0, 3], [1, 2]] -> [0, 1, 1, 0]."""
    owners = torch.empty(sum(map(len, dealt)), dtype=torch.int64)
    for rank, items in enumerate(dealt):
        owners[items] = rank
    return owners


def gathered_slots(owners: Tensor, ranks: int) -> tuple[Tensor, int]:
    """The slot of each item when the items of all ranks are gathered, and the room of each rank.

    >>> gathered_slots(torch.tensor([0, 0, 1, 1, 0, 1]), 2)
    (tensor([0, 1, 3, 4, 2, 5]), 3)
    """
    owned = F.one_hot(owners, ranks)  # (items, ranks)
    room = max(1, int(owned.sum(0).max()))
    # a rank's items keep their order: count the items of the same rank before each item
    before = owned.cumsum(0) - owned  # (items, ranks)
    before = before.gather(1, owners[:, None])[:, 0]  # (items,)
    return owners * room + before, room


def share_row(samples: list[Sample], rank: int, ranks: int, visual_ids: list[int]) -> RowShare:
    """One rank's part of a packed row.  A rank may get no tokens (of a short row) or no pictures.

    visual_ids: the token ids that are holes.
    """
    row = lay_out(samples, cut=False)
    segment = segment_ids(row.cu_seqlens)  # (T,)
    position = packed_positions(row.cu_seqlens)  # (T,)

    # tokens: a query at position p sees p + 1 keys; deal the chunks by the keys that they see
    keys_seen = [float((chunk + 1).sum()) for chunk in position.split(CHUNK)]
    chunk_owners = owner_of(deal(keys_seen, ranks))
    owners = chunk_owners.repeat_interleave(CHUNK)[:len(position)]  # (T,)
    own_tokens = owners == rank  # (T,)

    # keys: for one query of a sample, the rank needs the keys of the whole sample
    slots, key_room = gathered_slots(owners, ranks)
    query_counts = torch.bincount(segment[own_tokens], minlength=len(samples))  # (S,)
    own_samples = query_counts > 0  # (S,)
    key_counts = row.cu_seqlens.diff()[own_samples]

    # pictures: the ViT's work is about their patches; the holes may be another rank's tokens
    grid_thw = torch.cat([sample.grid_thw for sample in samples])
    patch_counts = grid_thw.prod(1).tolist()
    picture_owners = owner_of(deal(patch_counts, ranks))
    own_pictures = picture_owners == rank  # (I,)
    patches, lost = cut_pictures(samples, own_pictures.tolist())
    visual_owners = picture_owners.repeat_interleave(visual_tokens(grid_thw))  # (M,) of the row
    visual_slots, visual_room = gathered_slots(visual_owners, ranks)
    is_hole = torch.isin(row.input_ids, torch.tensor(visual_ids))  # (T,), M of them true

    part = Row(
        input_ids=row.input_ids[own_tokens], targets=row.targets[own_tokens],
        cu_seqlens=F.pad(query_counts[own_samples].cumsum(0), (1, 0)),
        patches=patches, grid_thw=None if patches is None else grid_thw[own_pictures],
        names=row.names, numbers=row.numbers, lost=lost)
    return RowShare(
        row=part, samples=own_samples.nonzero()[:, 0].tolist(), position_ids=position[own_tokens],
        cu_seqlens_k=F.pad(key_counts.cumsum(0), (1, 0)),
        key_slots=slots[own_samples[segment]], key_room=key_room,
        visual_slots=visual_slots[own_tokens[is_hole]], visual_room=visual_room)


def forget_lost(row: Row | RowShare, ranks: Ranks) -> Row:
    """Of a shared row, learn nothing from samples with a picture that any of the ranks has lost.

    Returns the row, or the rank's part as a row.
    """
    if isinstance(row, Row):
        return row
    # a rank cuts only its own pictures: the others hear of a bad one here
    flags = torch.zeros(len(row.row.names), device=ranks.device)
    flags[list(row.row.lost)] = 1
    dist.all_reduce(flags, group=ranks.context_mesh.get_group())
    lost = flags.tolist()
    row.row.forget(i for i, sample in enumerate(row.samples) if lost[sample])
    return row.row


class GatheredKeys:
    """The keys of a shared row, gathered in each layer from the ranks that share it (`mesh`).

    `LlavaOneVision.loss` takes it as `keys`.
    """

    def __init__(self, share: RowShare, mesh: DeviceMesh, device: torch.device) -> None:
        self.mesh = mesh
        self.key_room = share.key_room
        self.visual_room = share.visual_room
        self.key_slots = share.key_slots.to(device)
        self.visual_slots = share.visual_slots.to(device)
        self.cu_seqlens_k = share.cu_seqlens_k.to(device)

    def gather(self, x: Tensor, room: int, slots: Tensor) -> Tensor:
        """Pad each rank's x to `room` entries, gather all, and return the entries in `slots`.

        Several ranks may read an entry.  Its gradient is the sum of theirs, in the dtype of x.
        """
        padding = x.new_zeros(room - len(x), *x.shape[1:])
        padded = torch.cat([x, padding])  # (room, ...)
        # forward: an all-gather; backward: Partial makes it a reduce-scatter, which sums
        shared = DTensor.from_local(padded, self.mesh, [Shard(0)])
        entries = shared.full_tensor(grad_placements=[Partial()])  # (ranks room, ...)
        return entries.index_select(0, slots)

    def visual(self, tokens: Tensor) -> Tensor:
        """Visual tokens made by this rank -> those for the holes of this rank, (M, C)."""
        return self.gather(tokens, self.visual_room, self.visual_slots)

    def begin(self, cu_seqlens: Tensor, positions: Tensor) -> None:
        """Keep the positions (T,) of this rank's queries for all layers."""
        self.positions = positions

    def of_layer(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Where]:
        """Keys and values of this rank's tokens -> those (Tk, G, E) of its samples, whole."""
        # k and v travel in one message
        both = torch.cat([k, v], 1)  # (T, 2 G, E)
        both = self.gather(both, self.key_room, self.key_slots)  # (Tk, 2 G, E)
        k, v = both.chunk(2, 1)
        return k, v, Where(self.cu_seqlens_k, len(k), self.positions)


def loss_arguments(row: Row | RowShare, ranks: Ranks) -> dict[str, Any]:
    """The arguments of `LlavaOneVision.loss` for a row, or for a rank's part, on its device."""
    if isinstance(row, Row):
        return {"targets": row.targets.to(ranks.device), **row.inputs(ranks.device)}
    arguments = loss_arguments(row.row, ranks)
    arguments["position_ids"] = row.position_ids.to(ranks.device)
    arguments["keys"] = GatheredKeys(row, ranks.context_mesh, ranks.device)
    return arguments


def summed_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over a group of ranks.  x itself does not change."""
    x = x.clone()
    dist.all_reduce(x, group=group)
    return x


# ----------------------------------------------------------------------- experts on different ranks


def shard_experts(model: LlavaOneVision, policy: MixedPrecisionPolicy, ranks: Ranks) -> None:
    """Give each rank of an expert group its own experts, and shard these over the groups."""
    sharing = ranks.expert_mesh["expert"]
    others = ranks.expert_mesh[ranks.expert_mesh.mesh_dim_names[:-1]]
    for mixture in mixtures(model):
        experts = mixture.experts
        for layer in experts.children():
            # of the X matrices, one above the other, the rank keeps X / E
            part = distribute_tensor(layer.weight.detach(), sharing, [Shard(0)])
            layer.weight = nn.Parameter(part)
            if isinstance(layer, GroupedLinear):  # not an Fp8Linear, which finds its part itself
                layer.forward = partial(product_of_own, layer)
        experts.forward = partial(exchanged, experts.forward, sharing.get_group())
        fully_shard(experts, mesh=others, mp_policy=policy)


def product_of_own(layer: GroupedLinear, x: Tensor, counts: Tensor) -> Tensor:
    """`GroupedLinear.forward` with the matrices of this rank only."""
    return grouped_product(x, layer.weight.to_local(), counts)


class Exchange(torch.autograd.Function):
    """All-to-all of tokens: x has sent[r] tokens for rank r, the result received[r] from rank r."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, received: list[int], sent: list[int],
                group: dist.ProcessGroup) -> Tensor:
        ctx.counts = received, sent, group
        out = x.new_empty(sum(received), *x.shape[1:])
        dist.all_to_all_single(out, x.contiguous(), received, sent, group)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        # gradients travel the way back
        received, sent, group = ctx.counts
        return Exchange.apply(gradient, sent, received, group), None, None, None


def exchanged(forward: Callable[[Tensor, Tensor], Tensor], group: dist.ProcessGroup, x: Tensor,
              counts: Tensor) -> Tensor:
    """`Experts.forward` (the argument `forward`) for experts that a group of ranks shares.

    x: (T K, C) this rank's tokens, sorted by expert; counts: (X,) tokens of each expert.
    """
    # each rank tells each other rank how many tokens it sends to each of its experts
    leaving = counts.view(group.size(), -1)  # (ranks, X / ranks), a line for each receiver
    arriving = torch.empty_like(leaving)  # (ranks, X / ranks), a line for each sender
    dist.all_to_all_single(arriving, leaving, group=group)
    # here the host waits for the GPU: it must know the sizes of the messages
    sizes = torch.stack([leaving.sum(1), arriving.sum(1)])  # (2, ranks)
    sent, received = sizes.tolist()
    x = Exchange.apply(x, received, sent, group)

    # tokens arrive sorted by sender, then by expert; the experts want them sorted by expert:
    #     from rank 0: e0 e0 e1 | from rank 1: e0 e1    ->    e0 e0 e0 e1 e1
    expert = torch.arange(arriving.numel(), device=x.device) % arriving.shape[1]
    expert = expert.repeat_interleave(arriving.flatten(), output_size=len(x))  # of each token
    order = expert.argsort(stable=True)
    y = forward(x[order], arriving.sum(0))
    # order.argsort() is the permutation back
    return Exchange.apply(y[order.argsort()], sent, received, group)
