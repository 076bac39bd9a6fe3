"""Three stages of training, on one process or many: packed rows -> a model that answers questions.

In: a preset with fresh weights, or a checkpoint directory.  Out: one checkpoint directory a stage,
in the released layout, under `runs/`; a log; accuracies on held-out questions.
Run by people, alone or by torchrun; calls `model.py`, `data.py`, `convert.py`.

The idea.  The stages of LLaVA-OneVision-1.5 differ in what is trained, on what, and how fast:

    align     only the merger learns, from captions: it finds the decoder's embedding space
    mid       everything learns, from captions: knowledge, and eyes
    instruct  everything learns, from questions and answers: behaviour

Each begins with the directory that the one before wrote.  A step takes `rows` packed rows; with n_r
label tokens in row r and l_rt the cross entropy of one of them, its loss is the mean over *tokens*,

    loss = sum_r sum_t l_rt / sum_r n_r,

whatever the rows they are spread over and the ranks that hold them (`--token-mean micro`: the mean
over rows of each row's mean, as upstream).  Gradients are clipped to norm 1; AdamW decays matrices
only; the learning rate climbs linearly, then falls on a cosine from `lr` to `min_lr`.

    --recipe        quick, upstream's quick start            full, all public data once
    stage           align      mid         instruct          align      mid         instruct
    trained         merger     all         all               merger     all         all
    rows x tokens   8 x 32768  16 x 32768  24 x 8192         64 x 8192  512 x 8192  512 x 8192
    steps           2500       20000       3500              640        12200       3150
    decay, beta_2   0, .99     .01, .95    0, .99            0, .99     .01, .95    0, .99
    lr to min_lr    1e-4 to 1e-6 in align, 1e-5 to 1e-6 in mid and instruct
    the rest        beta_1 0.9, eps 1e-5, clip 1, warm-up over 0.2 % of the steps

Upstream's instruct takes 224 samples a step, unpacked; 24 rows hold about 260.  Batch and steps of
the full run were not published: these show 558 thousand, 85 and 22 million samples, of 600 tokens
each, once.  `--recipe tiny` is for the tiny preset.

A mixture of experts adds `--expert-balance` times the mean over layers and rows of their balance
(model.MixtureOfExperts) to the loss; the log's loss is without it.

Ranks.  Parameters, gradients and AdamW's moments are sharded over all ranks (FSDP2), or over groups
of them that hold a copy each (`--replicas`): masters and reductions in fp32, products in `--dtype`.
With `--context-parallel C`, C neighbours share each row: data.share_row deals its tokens and
pictures, model.SharedRow gathers keys and values.  With `--expert-parallel E`, E neighbours have
different experts and tokens travel to them and back (model.Experts), where otherwise every rank
would gather all experts of a layer.  Every rank knows the sums over all ranks without asking, for
each reads the whole stream of records (data.PackedRows): data and runs are on a disk that all
machines see.

Accounting.  FLOPs of a row's forward pass, with N weights in the matrices of a part that a token
passes (of experts K / X):

    decoder   2 N T + 4 layers H E sum over samples of L (L + 1) / 2
    ViT       2 N P + 4 layers D sum over frames of L^2,  merger  2 N P / 4,  head  2 C V labels

A backward pass costs twice that, or once where the weights are frozen and gradients pass through.
MFU counts these against the hardware's matrix rate, in bf16 even where --fp8 computes some products
at twice that; HFU counts what is computed again, too.

Shapes: T tokens in a packed row, L of a sample or frame, P patches, C and D width of decoder and
ViT, H heads, E head width, V vocabulary.

Run `python train.py`: trains the tiny preset from scratch through all stages in about ten minutes
on two CPU cores and prints its accuracies.  A checkpoint of any size: `torchrun --nproc-per-node 8
train.py --stage align --start-from DIR --data FILE`.  `--plan` computes what a run needs.  `--help`
lists all flags.
"""

import gc
import inspect
import json
import logging
import math
import os
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (FSDPModule, MixedPrecisionPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from convert import load_checkpoint, load_tokenizer, save_checkpoint
from data import (Batch, PackedRows, Step, choose_device, choose_dtype, default_texts, encode,
                  flag_parser, held_out_questions, pack, records, train_tokenizer)
from fp8_kernel import Fp8Linear, check_device, convert_to_fp8, quantize_weights
from model import (LOSS_CHUNK, PRESETS, LlavaOneVision, MixtureOfExperts, ModelConfig, SharedRow,
                   meta_model, parameters_by_part, part_of)
from vision import MAX_PIXELS, MIN_PIXELS


@dataclass(frozen=True)
class Recipe:
    """What a stage trains, on what, and how."""

    trainable: tuple[str, ...]  # of "vision", "merger", "decoder"
    data: str  # default records, see data.records; --data replaces it
    steps: int  # optimizer steps
    rows: int  # packed rows per step, of all ranks
    seq_length: int  # tokens in a row at most
    lr: float  # peak learning rate
    min_lr: float  # what the rate falls to
    weight_decay: float  # on matrices only
    beta2: float  # AdamW's second; the first is 0.9
    eps: float = 1e-5  # AdamW's
    warmup: float = 0.002  # share of the steps
    vision_lr: float = 1.0  # factor on the learning rate of the ViT
    merger_lr: float = 1.0  # factor on that of the merger
    expert_lr: float = 1.0  # factor on that of experts
    clip: float = 1.0  # largest gradient norm
    max_pixels: int = MAX_PIXELS  # largest area of a picture
    recompute: str = "layer"  # what the backward pass computes again, one of RECOMPUTE


MERGER, ALL = ("merger",), ("vision", "merger", "decoder")
QUICK = {
    "align": Recipe(MERGER, "captions", 2500, 8, 32768, 1e-4, 1e-6, 0.0, 0.99),
    "mid": Recipe(ALL, "captions", 20000, 16, 32768, 1e-5, 1e-6, 0.01, 0.95),
    # upstream limits the longest side to 1000 pixels
    "instruct": Recipe(ALL, "questions", 3500, 24, 8192, 1e-5, 1e-6, 0.0, 0.99,
                       max_pixels=1000 * 1000),
}
FULL = {name: replace(QUICK[name], steps=steps, rows=rows, seq_length=8192, max_pixels=MAX_PIXELS)
        for name, steps, rows in (("align", 640, 64), ("mid", 12200, 512), ("instruct", 3150, 512))}
# From random weights everything is faster and shorter, and `align` has nothing to align to yet.
# Captions come first: all of their words are learnt, so they teach the ViT to see several times as
# fast as short answers do; then they stay mixed among the questions, or reading is forgotten.
# Experts see half of the tokens each and learn at half the rate: at the whole one they end worse.
TINY = {
    "align": Recipe(MERGER, "captions", 20, 1, 1024, 1e-3, 1e-4, 0.0, 0.95, 1e-8, 0.1,
                    recompute="none"),
    "mid": Recipe(ALL, "captions", 900, 1, 1024, 2e-3, 2e-4, 0.01, 0.95, 1e-8, 0.02, 0.25, 0.25,
                  0.5, recompute="none"),
    "instruct": Recipe(ALL, "mixed", 3600, 1, 1024, 1.5e-3, 3e-5, 0.01, 0.95, 1e-8, 0.02, 0.25,
                       0.25, 0.5, recompute="none"),
}
RECIPES = {"tiny": TINY, "quick": QUICK, "full": FULL}
STAGES = tuple(QUICK)
FRESH = ("tiny", "tiny-moe")  # presets that can start from random weights
SMALL = 100e6  # parameters; models of less have the recipe tiny
GPUS = {"A100": (312e12, 80e9), "A800": (312e12, 80e9), "H100": (989e12, 80e9),  # dense bf16
        "H800": (989e12, 80e9), "H200": (989e12, 141e9), "B200": (2250e12, 180e9)}  # FLOP/s, bytes
SAMPLE_TOKENS, VISUAL_SHARE = 600, 0.7  # an average sample; half of its words are learnt
RECOMPUTE = ("none", "selective", "layer")  # selective: all of a layer but its attention


def check_flags(config: object, positive: tuple[str, ...], choices: dict[str, Iterable]) -> None:
    """Raise ValueError unless numbers are finite and not negative, and words are known ones."""
    for entry in fields(config):
        flag, value = f"--{entry.name.replace('_', '-')}", getattr(config, entry.name)
        if value not in choices.get(entry.name, [value]):
            raise ValueError(f"there is no {flag} {value!r}, only "
                             f"{', '.join(filter(None, choices[entry.name]))}")
        if isinstance(value, (int, float)) and not 0 <= value < math.inf:
            raise ValueError(f"{flag} must not be negative or infinite, it is {value}")
        if entry.name in positive and not value:
            raise ValueError(f"{flag} must be positive")


@dataclass(frozen=True)
class TrainConfig:
    """Command-line flags; 0 or an empty text means the stage's own value."""

    model: str = ""  # a preset of model.py; default the size of --start-from, without it tiny
    stage: str = "all"  # align, mid, instruct, or all three in a row
    recipe: str = ""  # tiny, quick or full; default quick, but tiny below 100 M parameters
    start_from: str = ""  # checkpoint directory; default that of the stage before
    out: str = ""  # directory of the run; default runs/MODEL-DATE-TIME
    data: str = ""  # captions, questions, mixed, or a .json, .jsonl or .tar file
    steps: int = 0  # optimizer steps of each stage
    longer: float = 1.0  # factor on the steps of every stage
    rows: int = 0  # packed rows per step, of all ranks
    seq_length: int = 0  # tokens in a row
    lr: float = 0.0  # peak learning rate; the lowest and those of the parts keep their share of it
    vision_lr: float = 0.0  # peak learning rate of the ViT
    merger_lr: float = 0.0  # peak learning rate of the merger
    max_pixels: int = 0  # largest area of a picture, larger ones are shrunk
    expert_balance: float = 0.0  # weight of the experts' load-balancing loss (0.001 is usual)
    token_mean: str = "global"  # loss as mean over all label tokens, or of micro-batches' means
    replicas: int = 1  # copies of the model; each is sharded over ranks / replicas
    context_parallel: int = 1  # ranks that share a row
    expert_parallel: int = 1  # ranks that share the experts of every layer, each holding its own
    recompute: str = ""  # in the backward pass: none, selective (all but attention), layer
    compile: bool = False  # compile layers
    dtype: str = ""  # of products, float32 or bfloat16; default bfloat16 on a GPU
    fp8: bool = False  # the decoder's large matrices in 8 bits (GPU of sm_89 or newer, or a CPU)
    seed: int = 0  # of weights and data
    workers: int = 1  # processes that prepare rows, for each rank
    log_every: int = 50  # steps
    tensorboard: bool = False  # write the log for TensorBoard, too
    questions: int = 100  # held-out questions per category, asked at the end if data is not given
    device: str = ""  # cpu or cuda; default cuda where there is one
    plan: bool = False  # print what a run needs, of the stage (mid) and recipe (full), and end
    gpus: int = 8  # for --plan: how many
    gpu: str = "a100"  # for --plan: a100, a800, h100, h800, h200 or b200
    tokens: float = 64e9  # for --plan: to train on
    price: float = 0.0  # for --plan: dollars of a GPU-hour
    mfu: float = 0.0  # for --plan: share of the GPUs' rate; default what 45 % HFU comes to

    def __post_init__(self) -> None:
        check_flags(self, ("longer", "log_every", "replicas", "context_parallel", "expert_parallel",
                           "gpus", "tokens"), {
            "model": ("", *PRESETS), "stage": ("all", *STAGES), "recipe": ("", *RECIPES),
            "token_mean": ("global", "micro"), "dtype": ("", "float32", "bfloat16"),
            "recompute": ("", *RECOMPUTE), "device": ("", "cpu", "cuda"),
            "gpu": [name.lower() for name in GPUS]})
        if self.expert_parallel > 1 and self.recompute == "selective":
            raise ValueError("--expert-parallel goes with --recompute none or layer, not selective")
        if self.plan and self.fp8 and self.gpu in ("a100", "a800"):
            raise ValueError(f"--fp8: the {self.gpu} has no FP8; name another with --gpu")
        if self.mfu > 1:
            raise ValueError(f"--mfu is a share of 1, not {self.mfu}")
        if 0 < self.max_pixels < MIN_PIXELS:
            raise ValueError(f"--max-pixels must be at least {MIN_PIXELS}")

    def recipes(self, sizes: ModelConfig) -> dict[str, Recipe]:
        """The stages to run on a model of these sizes, with the flags applied."""
        small = sum(parameters_by_part(sizes).values()) < SMALL
        table = RECIPES[self.recipe or ("tiny" if small else "quick")]
        names = STAGES if self.stage == "all" else [self.stage]
        given = {name: getattr(self, name) for name in
                 ("data", "steps", "rows", "seq_length", "lr", "max_pixels", "recompute")
                 if getattr(self, name)}
        chosen = {}
        for name in names:
            recipe = replace(table[name], **given)
            factors = {part: getattr(self, part) / recipe.lr for part in ("vision_lr", "merger_lr")
                       if getattr(self, part)}
            chosen[name] = replace(recipe, steps=max(1, round(recipe.steps * self.longer)),
                                   min_lr=table[name].min_lr * recipe.lr / table[name].lr,
                                   **factors)
        return chosen


# ------------------------------------------------------------------------------- ranks and shards


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and this one's place among them."""

    device: torch.device
    dtype: torch.dtype  # of products
    rank: int = 0
    count: int = 1
    context: int = 1  # neighbours that share a row
    replicas: int = 1  # copies of the model
    experts: int = 1  # neighbours that share the experts of a layer
    mesh: DeviceMesh | None = None  # over which parameters are sharded; None: whole, in fp32
    context_mesh: DeviceMesh | None = None  # the neighbours that share a row
    expert_mesh: DeviceMesh | None = None  # as mesh, with a last dimension of those sharing experts

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that work on different rows."""
        return self.count // self.context


def mixtures(model: nn.Module) -> list[MixtureOfExperts]:
    """The mixtures of experts of a model, one of each layer, if it has any; or of a layer."""
    return [module for module in model.modules() if isinstance(module, MixtureOfExperts)]


def check_division(config: TrainConfig, count: int) -> None:
    """Raise ValueError unless `count` ranks can be grouped as the flags want."""
    for name in ("replicas", "context_parallel"):
        if count % getattr(config, name):
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} does not divide "
                             f"the number of ranks, {count}")
    if count // config.replicas % config.expert_parallel:
        raise ValueError(f"--expert-parallel {config.expert_parallel} does not divide the number "
                         f"of ranks that hold a copy, {count // config.replicas}")


def find_ranks(config: TrainConfig) -> Ranks:
    """What torchrun says of the ranks.  Raises ValueError if they do not divide."""
    rank, count = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    check_division(config, count)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if config.device == "cpu" or not torch.cuda.is_available():
        device = choose_device(config.device)
    else:
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"there is no GPU for rank {rank}: the machine has "
                             f"{torch.cuda.device_count()}")
        torch.cuda.set_device(device)
    return Ranks(device, choose_dtype(config.dtype, device), rank, count, config.context_parallel,
                 config.replicas, config.expert_parallel)


def join_ranks(ranks: Ranks) -> Ranks:
    """Start to talk to the other ranks.  One process that computes in fp32 needs none of this."""
    if ranks.count == 1 and ranks.dtype == torch.float32:
        return ranks
    where = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    if ranks.device.type == "cuda":
        where["device_id"] = ranks.device
    if not dist.is_initialized():
        dist.init_process_group("gloo" if ranks.device.type == "cpu" else "nccl", **where,
                                timeout=timedelta(hours=1))  # the first rank writes checkpoints
    kind, shards = ranks.device.type, ranks.count // ranks.replicas
    mesh = (init_device_mesh(kind, (shards,)) if ranks.replicas == 1 else
            init_device_mesh(kind, (ranks.replicas, shards), mesh_dim_names=("copy", "shard")))
    ranks = replace(ranks, mesh=mesh)
    if ranks.context > 1:
        groups = init_device_mesh(kind, (ranks.data_ranks, ranks.context),
                                  mesh_dim_names=("data", "context"))
        ranks = replace(ranks, context_mesh=groups["context"])
    if ranks.experts > 1:
        # DTensor remarks, on every rank, that experts are gathered in two steps: they are
        logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
        sizes, names = [shards // ranks.experts, ranks.experts], ["shard", "expert"]
        if ranks.replicas > 1:
            sizes, names = [ranks.replicas, *sizes], ["copy", *names]
        ranks = replace(ranks, expert_mesh=init_device_mesh(kind, tuple(sizes),
                                                            mesh_dim_names=tuple(names)))
    return ranks


def shard_experts(model: LlavaOneVision, policy: MixedPrecisionPolicy, ranks: Ranks) -> None:
    """Give each rank of an expert group its own experts, and shard these over the groups."""
    sharing, others = ranks.expert_mesh["expert"], ranks.expert_mesh.mesh_dim_names[:-1]
    for mixture in mixtures(model):
        experts = mixture.experts
        for layer in experts.children():
            part = distribute_tensor(layer.weight.detach(), sharing, [Shard(0)])
            layer.weight = nn.Parameter(part)
        experts.group = sharing.get_group()
        fully_shard(experts, mesh=ranks.expert_mesh[others], mp_policy=policy)


def shard(model: LlavaOneVision, recompute: str, compiled: bool, ranks: Ranks) -> None:
    """Make the layers recompute and compile as told, and spread the parameters over the ranks."""
    if ranks.context > 1:
        for mixture in mixtures(model):
            mixture.row_group = ranks.context_mesh.get_group()
    layers = [*model.visual.blocks, *model.model.layers]
    keep = {"selective": {"context_fn": partial(create_selective_checkpoint_contexts,
                                                [torch.ops.llava.attention.default])}}
    for layer in layers:
        if recompute != "none":
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False,
                                    preserve_rng_state=False, **keep.get(recompute, {}))
        if compiled:
            layer.forward = torch.compile(layer.forward)
    if ranks.mesh is None:
        return
    policy = MixedPrecisionPolicy(ranks.dtype, torch.float32, cast_forward_inputs=False)
    if ranks.experts > 1:
        shard_experts(model, policy, ranks)
    units = layers
    if not model.config.tie_word_embeddings:  # else the two belong together: to the root
        units = [model.model.embed_tokens, *layers, model.lm_head]
    for unit in units:
        fully_shard(unit, mesh=ranks.mesh, mp_policy=policy,
                    reshard_after_forward=unit is not model.lm_head)  # its backward follows at once
    fully_shard(model, mesh=ranks.mesh, mp_policy=policy)  # norms, merger, what is left
    for module in (model, model.lm_head):
        register_fsdp_forward_method(module, "loss")
    for unit, following in zip(units, units[1:]):
        inside = [mixture.experts for mixture in mixtures(following) if ranks.experts > 1]
        unit.set_modules_to_forward_prefetch([following, *inside])
    for module in model.modules():
        if isinstance(module, FSDPModule):  # gradients are summed over the ranks, not averaged
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def sizes_of(config: TrainConfig, start: str) -> ModelConfig:
    """The sizes of a model: those of the checkpoint it starts from, else those of its preset.

    Raises ValueError if --model names a preset of another size.
    """
    preset = PRESETS[config.model or FRESH[0]]
    if not start:
        return preset
    found = ModelConfig.from_dir(start)
    for name in ("hidden_size", "num_hidden_layers", "num_experts") if config.model else ():
        if getattr(preset, name) != getattr(found, name):
            raise ValueError(f"{start} is not of the size {config.model}: its {name} is "
                             f"{getattr(found, name)}, not {getattr(preset, name)}; without "
                             "--model any size is taken")
    return found


def load_stage(start: str, recipe: Recipe, config: TrainConfig, ranks: Ranks) -> LlavaOneVision:
    """The model that a stage starts with, sharded; a fresh one without `start`."""
    def prepare(model: LlavaOneVision) -> None:
        if config.fp8:
            convert_to_fp8(model)
        shard(model, recipe.recompute, config.compile, ranks)

    if start:
        model, _ = load_checkpoint(start, torch.float32, ranks.device, prepare)
    else:
        torch.manual_seed(config.seed)
        model = LlavaOneVision(sizes_of(config, start)).init_weights().to(ranks.device)
        prepare(model)
    quantize_weights(model)
    return model


# ------------------------------------------------------------------------------ an optimizer step


def make_optimizer(model: LlavaOneVision, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the stage's parts; freezes the others.  Vectors (norms, biases) do not decay.

    After each step it quantises the weights of FP8 layers anew.
    """
    factors = {"vision": recipe.vision_lr, "merger": recipe.merger_lr, "decoder": 1.0,
               "experts": recipe.expert_lr}
    groups: dict[tuple[str, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in recipe.trainable)
        if parameter.requires_grad:
            part = "experts" if ".experts." in name else part_of(name)
            groups.setdefault((part, parameter.dim() > 1), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "lr_factor": factors[part],
          "weight_decay": recipe.weight_decay if matrix else 0.0}
         for (part, matrix), parameters in groups.items()],
        lr=recipe.lr, betas=(0.9, recipe.beta2), eps=recipe.eps, fused=True)
    if "decoder" in recipe.trainable:
        optimizer.register_step_post_hook(lambda *_: quantize_weights(model))
    return optimizer


def set_balance(model: LlavaOneVision, recipe: Recipe, weight: float) -> None:
    """Add `weight` times the balance of experts, the mean over layers and rows, to the loss of a
    step; but not where routers are frozen."""
    layers, trained = mixtures(model), "decoder" in recipe.trainable
    for layer in layers:
        layer.balance_weight = weight * trained / (len(layers) * recipe.rows)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine from lr to min_lr; step counts from 0."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def backward(model: LlavaOneVision, step: Step, ranks: Ranks, token_mean: str) -> Tensor:
    """Gradients of the step's loss, summed over rows and ranks; returns this rank's part of it."""
    total = torch.zeros((), device=ranks.device)
    for i, (row, labels) in enumerate(zip(step.rows, step.row_labels)):
        weight = (1 / max(1, step.sums["labels"]) if token_mean == "global" else
                  1 / max(1, labels) / (len(step.rows) * ranks.data_ranks))
        shared_row = SharedRow(row, ranks.context_mesh, ranks.device) if ranks.context > 1 else None
        loss = weight * model.loss(targets=row.targets.to(ranks.device), shared_row=shared_row,
                                   **row.inputs(ranks.device))
        if ranks.mesh is not None:  # copies of the model need the sum of the rows only
            model.set_requires_all_reduce(i + 1 == len(step.rows))
        loss.backward()
        total += loss.detach()
    return total


def clip_gradients(parameters: list[nn.Parameter], clip: float) -> Tensor:
    """Shrink gradients to a norm of at most `clip`, all together; returns what it was."""
    by_mesh: dict[DeviceMesh | None, list[Tensor]] = {}  # that of experts is another
    for parameter in parameters:
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = [torch.nn.utils.get_total_norm([p.grad for p in group if p.grad is not None])
             for group in by_mesh.values()]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for group in by_mesh.values():
        torch.nn.utils.clip_grads_with_norm_(group, clip, norm)
    return norm


def train_step(model: LlavaOneVision, optimizer: torch.optim.AdamW, step: Step, lr: float,
               clip: float, ranks: Ranks, token_mean: str = "global") -> tuple[float, float]:
    """One optimizer step; returns the loss and the gradient norm, the same on all ranks.

    If either is not finite, nothing is changed: neither weights nor the optimizer's moments.
    """
    loss = backward(model, step, ranks, token_mean)
    norm = clip_gradients([p for group in optimizer.param_groups for p in group["params"]], clip)
    # what is decided on is summed over the ranks, so that all of them decide alike
    totals = torch.stack([loss, norm / ranks.count])
    if ranks.count > 1:
        dist.all_reduce(totals)
    total_loss, total_norm = totals.tolist()
    if math.isfinite(total_loss + total_norm):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        optimizer.step()
    optimizer.zero_grad()
    return total_loss, total_norm


# ------------------------------------------------------------------------------------- accounting


def forward_flops(config: ModelConfig, lengths: Tensor, frames: Tensor,
                  labels: int) -> dict[str, float]:
    """FLOPs of a row's forward pass: see the top of the file.

    lengths: (S,) tokens of the samples; frames: patches of each frame; labels: tokens learnt.
    """
    weights, vision = parameters_by_part(config, matrices=True), config.vision
    lengths, patches = lengths.double(), float(frames.sum())
    pairs = float((lengths * (lengths + 1)).sum()) / 2  # of query and key that causality leaves
    query_width = config.num_attention_heads * config.head_dim
    return {"vision": 2 * weights["vision"] * patches,
            "vision attention": 4 * vision.depth * vision.embed_dim
            * float(frames.double().square().sum()),
            "merger": 2 * weights["merger"] * patches / 4,
            "decoder": 2 * weights["decoder"] * float(lengths.sum()),
            "decoder attention": 4 * config.num_hidden_layers * query_width * pairs,
            "head": 2.0 * config.hidden_size * config.vocab_size * labels}


def training_flops(forward: dict[str, float], trainable: tuple[str, ...],
                   recompute: str) -> dict[str, float]:
    """What the hardware does in a training step, and the part of it that MFU counts."""
    total = {"hardware_flops": 0.0, "model_flops": 0.0}
    for name, flops in forward.items():
        part = "decoder" if name == "head" else name.split()[0]
        passes = 3 if part in trainable else 1 if part == "vision" else 2
        again = name == "head" or passes > 1 and part != "merger" and (
            recompute == "layer" or recompute == "selective" and "attention" not in name)
        total["model_flops"] += passes * flops
        total["hardware_flops"] += (passes + again) * flops
    return total


def row_cost(row: Batch, config: ModelConfig, trainable: tuple[str, ...],
             recompute: str) -> dict[str, float]:
    """FLOPs of training on a packed row."""
    grids = torch.zeros(0, 3) if row.grid_thw is None else row.grid_thw
    frames = torch.repeat_interleave(grids[:, 1] * grids[:, 2], grids[:, 0].long())
    forward = forward_flops(config, row.cu_seqlens.diff(), frames, row.labels)
    return training_flops(forward, trainable, recompute)


def matrix_rate(ranks: Ranks) -> tuple[float, str]:
    """FLOP/s that MFU is a share of, of one rank, and where the number comes from.

    The data sheet's for a known GPU (of the SXM kind) and bfloat16; else the best of five products
    of two 2048 x 2048 matrices, or of smaller ones where those would take long: many CPUs multiply
    in bfloat16 a hundred times as slowly as in float32.
    """
    if ranks.device.type == "cuda" and ranks.dtype == torch.bfloat16:
        card = torch.cuda.get_device_name(ranks.device)
        for name, (rate, _) in GPUS.items():
            if name in card:
                return rate, f"data sheet of {name}"
    for size in (256, 512, 1024, 2048):
        a = torch.randn(size, size, device=ranks.device).to(ranks.dtype)
        seconds = []
        for _ in range(6):
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            float(nn.functional.linear(a, a)[0, 0])  # reading a number waits for the product
            seconds.append(time.perf_counter() - started)
        if min(seconds) > 0.1:  # the next one would take eight times as long
            break
    return 2 * size**3 / min(seconds[1:]), f"measured, product of {size} x {size}"


def memory_of_rank(device: torch.device) -> float:
    """Bytes that a rank can have: its GPU's, or its part of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return whole / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_memory(device: torch.device) -> int:
    """Most memory that this process has held, in bytes: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def routing(model: LlavaOneVision, ranks: Ranks) -> dict[str, list[float]]:
    """By layer, since it was asked last: tokens of the busiest and of the idlest expert over the
    mean of all, and the balance (see model.MixtureOfExperts)."""
    layers = mixtures(model)
    if not layers:
        return {}
    sums = torch.stack([layer.routed for layer in layers])  # (layers, X + 2)
    if ranks.count > 1:
        dist.all_reduce(sums)
    for layer in layers:
        layer.routed = 0
    load, balance, passes = sums[:, :-2], sums[:, -2], sums[:, -1] / ranks.context
    load = load / load.mean(1, keepdim=True)
    return {"expert_most": load.amax(1).tolist(), "expert_least": load.amin(1).tolist(),
            "expert_balance": (balance / passes).tolist()}


class Log:
    """The first rank's log: lines on the console, as JSON in a file, in TensorBoard if wanted."""

    def __init__(self, out: Path, first: bool, tensorboard: bool) -> None:
        self.file = open(out / "log.jsonl", "a") if first else None
        self.terminal = first and sys.stdout.isatty()
        self.board = None
        if first and tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(out))

    def line(self, text: str, **values: object) -> None:
        if self.file is None:
            return
        print(("\r\033[K" if self.terminal else "") + text, flush=True)
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        if self.board is not None and "stage" in values:
            for name, value in values.items():
                by_layer = value if isinstance(value, list) else [value]
                for layer, number in enumerate(by_layer):
                    if isinstance(number, (int, float)):
                        tag = f"{values['stage']}/{name}" + f"/{layer}" * (len(by_layer) > 1)
                        self.board.add_scalar(tag, number, values["step"])
            self.board.flush()

    def progress(self, stage: str, step: int, steps: int, left: float) -> None:
        """Redraw the bar; on a terminal only."""
        if self.terminal:
            bar = "#" * (30 * step // steps)
            print(f"\r\033[K{stage} [{bar:30}] {step}/{steps}, {left:.0f} s left", end="",
                  flush=True)


def log_step(log: Log, name: str, step: int, recipe: Recipe, seen: Counter, seconds: float,
             left: float, peak: float, device: torch.device, routed: dict[str, list]) -> None:
    """One line on the steps since the last: `seen` has their sums, over all ranks, `routed` what
    `routing` says of them."""
    steps, (minutes, rest) = seen["steps"], divmod(round(left), 60)
    padding = 1 - seen["tokens"] / (steps * recipe.rows * recipe.seq_length)
    shown = (  # name, value, and how the line shows it
        ("loss", seen["loss"] / steps, "loss {:.4f}"), ("lr", seen["lr"] / steps, "lr {:.2e}"),
        ("norm", seen["norm"] / steps, "norm {:.2f}"),
        ("tokens_per_second", seen["tokens"] / seconds, "{:,.0f} tok/s"),
        ("labels_per_second", seen["labels"] / seconds, "{:,.0f} labels/s"),
        ("samples_per_second", seen["samples"] / seconds, ""),
        ("images_per_second", seen["images"] / seconds, "{:,.0f} images/s"),
        ("padding", padding, "pad {:.1%}"), ("wait", seen["waited"] / seconds, "wait {:.0%}"),
        ("rank_balance", seen["balance"] / steps, ""),
        ("mfu", seen["model_flops"] / seconds / peak, "MFU {:.0%}"),
        ("hfu", seen["hardware_flops"] / seconds / peak, "HFU {:.0%}"),
        ("memory_gib", peak_memory(device) / 2**30, "{:.1f} GiB"),  # of the first rank
        ("seconds_left", left, f"{minutes // 60}:{minutes % 60:02}:{rest:02} left"),
        ("skipped", seen["skipped"], "{} samples too long" if seen["skipped"] else ""))
    text = "  ".join(form.format(value) for _, value, form in shown if form)
    if routed:
        mean = sum(routed["expert_balance"]) / len(routed["expert_balance"])
        text += (f"  expert load {min(routed['expert_least']):.2f}-"
                 f"{max(routed['expert_most']):.2f}, balance {mean:.3f}")
    log.line(f"{name:8} {step:6}/{recipe.steps}  {text}", stage=name, step=step,
             **{key: value for key, value, _ in shown}, **routed)


# -------------------------------------------------------------------------------- what a run needs


def saved_bytes(layer: nn.Module, width: int, heads: int, head_dim: int,
                recompute: str) -> tuple[float, float]:
    """Bytes a row (token or patch) that a bf16 layer keeps until its backward pass, and then holds.

    Counted by running it on the meta device, where shapes are all there is.
    """
    rows = 1024
    x = torch.empty(rows, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    angles = torch.empty(rows, 1, head_dim // 2, device="meta")
    known = {p.untyped_storage()._cdata for p in layer.parameters()}
    known |= {part.untyped_storage()._cdata for module in layer.modules()
              if isinstance(module, Fp8Linear) for part in (module.values, module.scales)}
    saved = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in known:
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, torch.empty(2, dtype=torch.int64, device="meta"), rows, angles, angles)
    everything = sum(storage.nbytes() for storage in saved.values()) / rows
    kept = {"none": everything, "layer": 2 * width,
            "selective": 2 * width + 2 * heads * head_dim + 4 * heads}
    return kept[recompute], everything


def memory_by_part(config: ModelConfig, recipe: Recipe, shards: int, context: int,
                   experts: int, fp8: bool) -> dict[str, float]:
    """Bytes of a rank at its fullest, about, with products in bf16 and those of `fp8` in 8 bits.

    Not counted: what the allocator loses, buffers of the communication, the CUDA context.
    """
    parts, vision, recompute = parameters_by_part(config), config.vision, recipe.recompute
    total, trained = sum(parts.values()), sum(parts[part] for part in recipe.trainable)
    tokens = recipe.seq_length / context
    patches = 4 * VISUAL_SHARE * tokens
    model = meta_model(config).to(torch.bfloat16)
    layer, block = model.model.layers[0], model.visual.blocks[0]
    layer.requires_grad_("decoder" in recipe.trainable)
    if fp8:
        convert_to_fp8(layer)
        quantize_weights(layer)
    in_fp8 = {name: module.weight.numel() for name, module in layer.named_modules()
              if isinstance(module, Fp8Linear)}
    gathered_fp8 = {name: n / (experts if ".experts." in name else 1) for name, n in in_fp8.items()}
    kept, whole = saved_bytes(layer, config.hidden_size, config.num_attention_heads,
                              config.head_dim, recompute)
    gathered = 4 * (context - 1) * config.num_key_value_heads * config.head_dim  # keys, values
    kept, whole = kept + gathered * (recompute == "none"), whole + gathered
    seen, seen_whole = saved_bytes(block, vision.embed_dim, vision.num_heads, vision.head_dim,
                                   recompute) if "vision" in recipe.trainable else (0, 0)
    layer_size = sum(p.numel() / (experts if ".experts." in name else 1)
                     for name, p in layer.named_parameters())
    head = config.hidden_size * config.vocab_size
    return {"masters, fp32": 4 * total / shards, "gradients, fp32": 4 * trained / shards,
            "AdamW's moments": 8 * trained / shards,
            **({"weights in FP8": sum(in_fp8.values()) * config.num_hidden_layers / shards}
               if fp8 else {}),
            "gathered weights": 2 * (2 * layer_size + parts["merger"] + head) + 2 * (
                max(gathered_fp8.values(), default=0) - sum(gathered_fp8.values())),
            "gradients, not yet reduced": 6 * max(layer_size, head),
            "activations": kept * config.num_hidden_layers * tokens + seen * vision.depth * patches
            + (recompute != "none") * max(whole * tokens, seen_whole * patches),
            "logits": 10 * min(tokens, LOSS_CHUNK) * config.vocab_size}


def sample_flops(config: ModelConfig, recompute: str) -> dict[str, float]:
    """FLOPs a token of training everything on average samples."""
    visual = VISUAL_SHARE * SAMPLE_TOKENS
    forward = forward_flops(config, torch.tensor([SAMPLE_TOKENS]), torch.tensor([4 * visual]),
                            round((SAMPLE_TOKENS - visual) / 2))
    flops = training_flops(forward, ALL, recompute)
    return {name: n / SAMPLE_TOKENS for name, n in flops.items()}


def published() -> Iterator[str]:
    """How the announcement's figures for the 8B fit together; A800s are taken for A100s."""
    flops = sample_flops(PRESETS["8b"], "layer")["hardware_flops"]
    per_hour = 3600 * 0.45 * GPUS["A100"][0] / flops  # tokens of a GPU at 45 % HFU
    budget, mid, hours = 16000 / 0.6, 128 * 3.7 * 24, 64e9 / per_hour
    yield (f"The published figures, if the 8B did {flops:.3g} FLOPs a token: samples as above, "
           "layers recomputed")
    yield f"  $16,000 at $0.6 an hour buy {budget:,.0f} A100-hours"
    yield (f"  the mid stage, 128 A800 for 3.7 days, took {mid:,.0f}, {mid / budget:.0%} of them; "
           f"at 45 % HFU that is\n    {mid * per_hour / 1e9:,.0f} B tokens, or "
           f"{mid * per_hour / 85e6:,.0f} for each of 85 M samples")
    yield (f"  64 B tokens at 45 % HFU take {hours:,.0f} hours, {hours / budget:.0%} of the "
           f"budget; if they took all of it, HFU was {0.45 * hours / budget:.0%}")
    yield f"  all of the budget at 45 % HFU is {budget * per_hour / 1e9:,.0f} B tokens"


def plan(config: TrainConfig) -> Iterator[str]:
    """Lines on what a run needs: parameters, memory, FLOPs, time, dollars."""
    check_division(config, config.gpus)
    stage = "mid" if config.stage == "all" else config.stage
    model, (rate, capacity) = sizes_of(config, config.start_from), GPUS[config.gpu.upper()]
    check_experts(config, model)
    recipe = replace(config, recipe=config.recipe or "full", stage=stage).recipes(model)[stage]
    parts = parameters_by_part(model)
    yield (f"{name_of(config, config.start_from)} on {config.gpus} {config.gpu.upper()} "
           f"({rate / 1e12:.0f} TFLOP/s in "
           f"bf16, {capacity / 1e9:.0f} GB): {', '.join(recipe.trainable)} trained, recompute "
           f"{recipe.recompute}")
    yield f"parameters: {', '.join(f'{name} {n:,}' for name, n in parts.items())}"
    yield f"  together {sum(parts.values()):,}"
    memory = memory_by_part(model, recipe, config.gpus // config.replicas, config.context_parallel,
                            config.expert_parallel, config.fp8)
    memory["together"] = sum(memory.values())
    yield (f"memory of a GPU, rows of {recipe.seq_length:,} tokens over {config.context_parallel}"
           + (":" if memory["together"] < capacity else " (it does NOT fit):"))
    yield from (f"  {name:28}{size / 2**30:8.2f} GiB" for name, size in memory.items())
    flops = sample_flops(model, recipe.recompute)
    ratio = flops["hardware_flops"] / flops["model_flops"]
    mfu = config.mfu or 0.45 / ratio
    speed = config.gpus * rate * mfu / flops["model_flops"]
    hours = config.gpus * config.tokens / speed / 3600
    yield (f"FLOPs a token, all parts trained: {flops['model_flops']:.4g}, with what is computed "
           f"again {flops['hardware_flops']:.4g}\n  (samples of {SAMPLE_TOKENS} tokens, "
           f"{VISUAL_SHARE:.0%} visual, half of the others learnt)")
    yield (f"at {mfu:.1%} MFU, {mfu * ratio:.1%} HFU: {speed:,.0f} tokens/s, a step of "
           f"{recipe.rows} rows in {recipe.rows * recipe.seq_length / speed:.1f} s")
    yield (f"{config.tokens:.3g} tokens: {config.tokens / speed / 86400:.2f} days, {hours:,.0f} "
           "GPU-hours" + (f", ${hours * config.price:,.0f}" if config.price else "") + "\n")
    yield from published()


# ------------------------------------------------------------------------------- a run, end to end


def refuse_step(step: Step, loss: float, norm: float, where: str, ranks: Ranks, log: Log) -> None:
    """End the run at a step that is not finite, on all ranks; the first one names its samples."""
    names = [name for row in step.rows for name in row.names]
    if ranks.count > 1:
        gathered: list = [None] * ranks.count
        dist.all_gather_object(gathered, names)
        names = [name for of_rank in gathered for name in of_rank]
    names = list(dict.fromkeys(names))  # ranks that share a row have the same ones
    if ranks.rank:
        time.sleep(2)  # the first rank says it, before torchrun ends the others
        sys.exit(2)
    log.line(f"{where} is not finite", samples=names, loss=str(loss), norm=str(norm))
    more = f" and {len(names) - 8} more, all in log.jsonl" if len(names) > 8 else ""
    raise ValueError(f"the loss of {where} is {loss}, its gradient norm {norm}; no weight was "
                     f"changed; its samples are {', '.join(names[:8])}{more}")


def train_stage(name: str, model: LlavaOneVision, tokenizer: Tokenizer, recipe: Recipe,
                config: TrainConfig, ranks: Ranks, log: Log) -> None:
    """Run one stage; the model is changed in place."""
    optimizer = make_optimizer(model, recipe)
    set_balance(model, recipe, config.expert_balance)
    rate, source = matrix_rate(ranks)
    log.line(f"{name}: {', '.join(recipe.trainable)} trained, {recipe.steps} steps of "
             f"{recipe.rows} rows; MFU of {ranks.count} x {rate / 1e12:.3g} TFLOP/s ({source})",
             recipe=asdict(recipe), matrix_rate=rate)
    dataset = PackedRows(
        recipe.data, tokenizer, recipe.seq_length, config.seed, recipe.max_pixels, recipe.rows,
        ranks.rank, ranks.data_ranks, ranks.context, cost=partial(
            row_cost, config=model.config, trainable=recipe.trainable, recompute=recipe.recompute))
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=config.workers,
        # four rows wait for each rank; a step of many comes as a whole
        prefetch_factor=max(1, 4 * ranks.data_ranks // recipe.rows) if config.workers else None)
    stream = iter(loader)
    started = mark = time.monotonic()
    seen: Counter[str] = Counter()
    for number in range(1, recipe.steps + 1):
        before = time.monotonic()
        step = next(stream)
        seen["waited"] += time.monotonic() - before
        lr = learning_rate(number - 1, recipe)
        loss, norm = train_step(model, optimizer, step, lr, recipe.clip, ranks, config.token_mean)
        if not math.isfinite(loss + norm):
            refuse_step(step, loss, norm, f"step {number} of stage {name}", ranks, log)
        seen.update({"loss": loss, "norm": norm, "lr": lr, "steps": 1, **step.sums})
        now = time.monotonic()
        left = (now - started) / number * (recipe.steps - number)
        if number % config.log_every == 0 or number == recipe.steps:
            log_step(log, name, number, recipe, seen, now - mark, left, rate * ranks.count,
                     ranks.device, routing(model, ranks))
            mark, seen = now, Counter()
        log.progress(name, number, recipe.steps, left)


def evaluate(model: LlavaOneVision, tokenizer: Tokenizer, per_category: int,
             batch: int = 50) -> dict[str, float]:
    """Exact match of greedy answers on held-out questions, in percent by category."""
    device = model.lm_head.weight.device
    stop = tokenizer.token_to_id("<|im_end|>")
    scores = {}
    for category, questions in held_out_questions(per_category).items():
        right = 0
        for start in range(0, len(questions), batch):
            chunk = questions[start:start + batch]
            prompts = [{**record, "messages": record["messages"][:-1]} for record in chunk]
            packed = pack([encode(prompt, tokenizer, generation_prompt=True) for prompt in prompts])
            steps = model.generate(**packed.inputs(device), max_new_tokens=24, stop_ids=(stop,))
            for record, ids in zip(chunk, torch.stack(list(steps), dim=1).tolist()):
                ids = ids[:ids.index(stop)] if stop in ids else ids
                answer = tokenizer.decode(ids, skip_special_tokens=False)
                right += answer == record["messages"][-1]["content"][0]["text"]
        scores[category] = 100 * right / len(questions)
    return scores


def report(scores: dict[str, float], log: Log) -> None:
    """Print the accuracies by category, and the means over scenes and flags."""
    flags = {k: v for k, v in scores.items() if k.startswith("flag")}
    scenes = {k: v for k, v in scores.items() if k not in flags}
    for name, group in (("flags", flags), ("scenes", scenes)):
        mean = sum(group.values()) / len(group)
        detail = "  ".join(f"{k.removeprefix('flag ')} {v:.0f}" for k, v in group.items())
        log.line(f"held-out {name}: {mean:.1f} %   ({detail})", group=name, mean=mean, **group)


def start_of(config: TrainConfig) -> str:
    """The directory that the first stage starts from; empty for fresh weights.

    Raises ValueError if there is none.
    """
    if config.start_from:
        return config.start_from
    earlier = STAGES[:STAGES.index(config.stage)] if config.stage != "all" else ()
    if earlier:
        before = Path(config.out or "--out") / earlier[-1]
        if not before.is_dir():
            raise ValueError(f"stage {config.stage} starts from what stage {earlier[-1]} wrote, "
                             f"but there is no {before}: name a directory with --start-from")
        return str(before)
    if config.model not in ("", *FRESH):
        raise ValueError(f"{config.model} starts from a checkpoint: name it with --start-from")
    return ""


def name_of(config: TrainConfig, start: str) -> str:
    """What a run's model is called: its preset, else the directory that it starts from."""
    return config.model or (Path(start).resolve().name if start else FRESH[0])


def check_experts(config: TrainConfig, sizes: ModelConfig) -> None:
    """Raise ValueError if the flags for mixtures of experts do not fit the model."""
    if (config.expert_parallel > 1 or config.expert_balance) and not sizes.num_experts:
        raise ValueError("--expert-parallel and --expert-balance are for mixtures of experts, "
                         "which the model is not")
    if sizes.num_experts % config.expert_parallel:
        raise ValueError(f"--expert-parallel {config.expert_parallel} does not divide the "
                         f"{sizes.num_experts} experts of the model")


def check_run(config: TrainConfig, ranks: Ranks, start: str, sizes: ModelConfig,
              recipes: dict[str, Recipe]) -> Tokenizer:
    """Refuse what cannot run before anything is loaded or written; returns the tokenizer.

    Raises ValueError.
    """
    check_experts(config, sizes)
    if config.fp8:
        check_device(ranks.device)
        convert_to_fp8(meta_model(sizes))
    first_records = {}
    for name, recipe in recipes.items():
        if config.out and (Path(config.out) / name).exists():
            raise ValueError(f"{Path(config.out) / name} is there already")
        if recipe.rows % ranks.data_ranks:
            raise ValueError(f"the {recipe.rows} rows of a step of stage {name} cannot be dealt "
                             f"to {ranks.data_ranks} ranks or groups of ranks: choose --rows")
        memory = memory_by_part(sizes, recipe, ranks.count // ranks.replicas, ranks.context,
                                ranks.experts, config.fp8)
        needed, there = sum(memory.values()) / 2**30, memory_of_rank(ranks.device) / 2**30
        if needed > there:
            raise ValueError(
                f"rows of {recipe.seq_length:,} tokens over --context-parallel {ranks.context} and "
                f"{ranks.count // ranks.replicas} shards of the model need about {needed:,.0f} GiB "
                f"of a rank, most of it for {max(memory, key=memory.get)}, and it has {there:,.0f}")
        first_records[name] = next(records(recipe.data, config.seed))
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package that is not here: pip install tensorboard")
    tokenizer = load_tokenizer(Path(start)) if start else train_tokenizer(
        default_texts(config.seed), sizes.vocab_size)
    for name, record in first_records.items():
        encode(record, tokenizer, max_pixels=recipes[name].max_pixels)
    return tokenizer


def run(config: TrainConfig) -> Path:
    """Train the stages, save a checkpoint after each, evaluate; returns the last checkpoint."""
    ranks, start = find_ranks(config), start_of(config)
    sizes, model_name = sizes_of(config, start), name_of(config, start)
    recipes = config.recipes(sizes)
    tokenizer = check_run(config, ranks, start, sizes, recipes)
    ranks = join_ranks(ranks)
    model = load_stage(start, next(iter(recipes.values())), config, ranks)  # or refuse it
    names = [config.out or f"runs/{model_name}-{time.strftime('%Y%m%d-%H%M%S')}"]
    if ranks.count > 1:
        dist.broadcast_object_list(names)  # clocks differ
    out = Path(names[0])
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out, ranks.rank == 0, config.tensorboard)
    log.line(f"{model_name}: {sum(parameters_by_part(model.config).values()):,} parameters on "
             f"{ranks.count} x {ranks.device.type} ({ranks.replicas} copies, rows shared by "
             f"{ranks.context}, experts by {ranks.experts}), {ranks.dtype}"
             f"{', FP8' if config.fp8 else ''}, torch {torch.__version__}, "
             f"{torch.get_num_threads()} threads -> {out}",
             config=asdict(config))
    for name, recipe in recipes.items():
        model = model or load_stage(start, recipe, config, ranks)
        train_stage(name, model, tokenizer, recipe, config, ranks, log)
        try:
            save_checkpoint(model, tokenizer, out / name)
        except ValueError:
            if ranks.rank:
                time.sleep(2)  # the first rank says it, before torchrun ends the others
                sys.exit(2)
            raise
        start, model = str(out / name), None
        gc.collect()  # hooks tie a sharded model into cycles, and the next one needs its memory
    if ranks.mesh is not None:
        dist.destroy_process_group()
    if ranks.rank == 0 and config.questions and not config.data:
        model, _ = load_checkpoint(start, ranks.dtype, ranks.device)
        report(evaluate(model, tokenizer, config.questions), log)
    log.line(f"saved: {start}", saved=start)
    return Path(start)


def parse_flags(arguments: list[str]) -> TrainConfig:
    """Build the command line from TrainConfig's fields; the comment beside a field is its help."""
    parser = flag_parser(__doc__.splitlines()[0], arguments)
    comments = dict(re.findall(r"^    (\w+): .*#  ?(.*)$", inspect.getsource(TrainConfig), re.M))
    for entry in fields(TrainConfig):
        switch = {"action": "store_true"} if entry.type is bool else {"type": entry.type}
        parser.add_argument(f"--{entry.name.replace('_', '-')}", default=entry.default, **switch,
                            help=f"{comments[entry.name].replace('%', '%%')} "
                                 f"(default {entry.default!r})")
    return TrainConfig(**vars(parser.parse_args(arguments)))


def main() -> None:
    try:
        config = parse_flags(sys.argv[1:])
        if config.plan:
            print(*plan(config), sep="\n")
        else:
            run(config)
    except (ValueError, OSError) as error:
        # an error in a worker process arrives with its traceback; its last line says what is wrong
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # before they join, all ranks of a machine find the same
        if os.environ.get("LOCAL_RANK", "0") == "0" or dist.is_initialized():
            print(f"train.py: {lines[-1].removeprefix('ValueError: ')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted; finished stages are saved", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
