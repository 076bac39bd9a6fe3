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

whatever the rows they are spread over and the ranks that hold them (upstream takes the mean over
rows of each row's mean).  Gradients are clipped to norm 1; AdamW decays matrices
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
With `--context-parallel C`, C neighbours share each row; with `--expert-parallel E`, E neighbours
have different experts: see `parallel.py`.  Every rank reads all records (data.PackedRows) and so
knows the sums over all ranks.  Data and runs are on a disk that all machines see.

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
train.py --stage align --start-from DIR --data FILE`.  `--help` lists all
flags; `python -m benchmarks.plan` computes what a run needs.
"""

import gc
import inspect
import json
import math
import os
import re
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn

from assets.scenes import held_out_questions
from convert import load_checkpoint, load_tokenizer, read_config, save_checkpoint
from data import (PackedRows, Row, Step, drawn_texts, encode, flag_parser, lay_out, record_stream,
                  train_tokenizer)
from fp8_kernel import Fp8Linear, check_device, convert_to_fp8, quantize_weights
from model import (LOSS_CHUNK, PRESETS, LlavaOneVision, ModelConfig, meta_model,
                   parameters_by_part, part_of)
from parallel import (Ranks, RowShare, clip_gradients, find_ranks, join_ranks, loss_arguments,
                      mixtures, shard, share_row)
from vision import MAX_PIXELS, MIN_PIXELS, frame_sizes


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
    vision_lr_factor: float = 1.0  # on the learning rate, for the ViT
    merger_lr_factor: float = 1.0  # for the merger
    expert_lr_factor: float = 1.0  # for experts
    clip: float = 1.0  # largest gradient norm
    max_pixels: int = MAX_PIXELS  # largest area of a picture
    recompute: str = "layer"  # what the backward pass computes again, one of RECOMPUTE


MERGER, ALL = ("merger",), ("vision", "merger", "decoder")
QUICK = {  # upstream's quick start
    "align": Recipe(
        trainable=MERGER, data="captions", steps=2500, rows=8, seq_length=32768,
        lr=1e-4, min_lr=1e-6, weight_decay=0.0, beta2=0.99),
    "mid": Recipe(
        trainable=ALL, data="captions", steps=20000, rows=16, seq_length=32768,
        lr=1e-5, min_lr=1e-6, weight_decay=0.01, beta2=0.95),
    # upstream limits the longest side to 1000 pixels; here the area is limited to that of a square
    "instruct": Recipe(
        trainable=ALL, data="questions", steps=3500, rows=24, seq_length=8192,
        lr=1e-5, min_lr=1e-6, weight_decay=0.0, beta2=0.99, max_pixels=1000 * 1000),
}
FULL = {  # all public data once
    "align": replace(QUICK["align"], steps=640, rows=64, seq_length=8192),
    "mid": replace(QUICK["mid"], steps=12200, rows=512, seq_length=8192),
    "instruct": replace(QUICK["instruct"], steps=3150, rows=512, max_pixels=MAX_PIXELS),
}
# From random weights everything is faster and shorter, and `align` has nothing to align to yet.
# Captions come first: all of their words are learnt, so they teach the ViT to see several times as
# fast as short answers do; then they stay mixed among the questions, or reading is forgotten.
# Experts see half of the tokens each and learn at half the rate: at the whole one they end worse.
TINY_MID = Recipe(
    trainable=ALL, data="captions", steps=900, rows=1, seq_length=1024,
    lr=2e-3, min_lr=2e-4, weight_decay=0.01, beta2=0.95, eps=1e-8, warmup=0.02,
    vision_lr_factor=0.25, merger_lr_factor=0.25, expert_lr_factor=0.5, recompute="none")
TINY = {
    "align": Recipe(
        trainable=MERGER, data="captions", steps=20, rows=1, seq_length=1024,
        lr=1e-3, min_lr=1e-4, weight_decay=0.0, beta2=0.95, eps=1e-8, warmup=0.1,
        recompute="none"),
    "mid": TINY_MID,
    "instruct": replace(TINY_MID, data="mixed", steps=3600, lr=1.5e-3, min_lr=3e-5),
}
RECIPES = {"tiny": TINY, "quick": QUICK, "full": FULL}
STAGES = tuple(QUICK)
FRESH = ("tiny", "tiny-moe")  # presets that can start from random weights
SMALL = 100e6  # parameters; models of less have the recipe tiny
GPUS = {"A100": (312e12, 80e9), "A800": (312e12, 80e9), "H100": (989e12, 80e9),  # dense bf16
        "H800": (989e12, 80e9), "H200": (989e12, 141e9), "B200": (2250e12, 180e9)}  # FLOP/s, bytes
VISUAL_SHARE = 0.7  # of the tokens of an average row are visual
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
    rows: int = 0  # packed rows per step, of all ranks
    seq_length: int = 0  # tokens in a row
    lr: float = 0.0  # peak learning rate; the lowest and those of the parts keep their share of it
    vision_lr: float = 0.0  # peak learning rate of the ViT
    merger_lr: float = 0.0  # peak learning rate of the merger
    max_pixels: int = 0  # largest area of a picture, larger ones are shrunk
    expert_balance: float = 0.0  # weight of the experts' load-balancing loss (0.001 is usual)
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

    def __post_init__(self) -> None:
        check_flags(self, ("log_every", "replicas", "context_parallel", "expert_parallel"), {
            "model": ("", *PRESETS), "stage": ("all", *STAGES), "recipe": ("", *RECIPES),
            "dtype": ("", "float32", "bfloat16"), "recompute": ("", *RECOMPUTE),
            "device": ("", "cpu", "cuda")})
        if self.expert_parallel > 1 and self.recompute == "selective":
            raise ValueError("--expert-parallel goes with --recompute none or layer, not selective")
        if 0 < self.max_pixels < MIN_PIXELS:
            raise ValueError(f"--max-pixels must be at least {MIN_PIXELS}")

    def recipes(self, sizes: ModelConfig) -> dict[str, Recipe]:
        """The stages to run on a model of these sizes, with the flags applied."""
        small = sum(parameters_by_part(sizes).values()) < SMALL
        table = RECIPES[self.recipe or ("tiny" if small else "quick")]
        given = {name: getattr(self, name) for name in
                 ("data", "steps", "rows", "seq_length", "lr", "max_pixels", "recompute")
                 if getattr(self, name)}
        chosen = {}
        for name in STAGES if self.stage == "all" else [self.stage]:
            recipe = replace(table[name], **given)
            # the lowest rate keeps its share of the peak; the parts' rates are factors on it
            recipe = replace(recipe, min_lr=table[name].min_lr * recipe.lr / table[name].lr)
            if self.vision_lr:
                recipe = replace(recipe, vision_lr_factor=self.vision_lr / recipe.lr)
            if self.merger_lr:
                recipe = replace(recipe, merger_lr_factor=self.merger_lr / recipe.lr)
            chosen[name] = recipe
        return chosen


# --------------------------------------------------------------------------- the model of a stage


def sizes_of(config: TrainConfig, start: str) -> ModelConfig:
    """The sizes of a model: those of the checkpoint it starts from, else those of its preset.

    Raises ValueError if --model names a preset of another size.
    """
    preset = PRESETS[config.model or FRESH[0]]
    if not start:
        return preset
    found = read_config(start)
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
    factors = {"vision": recipe.vision_lr_factor, "merger": recipe.merger_lr_factor,
               "experts": recipe.expert_lr_factor, "decoder": 1.0}
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


def backward(model: LlavaOneVision, step: Step, ranks: Ranks) -> Tensor:
    """Gradients of the step's loss, summed over rows and ranks; returns this rank's part of it."""
    weight = 1 / max(1, step.sums["labels"])  # of all ranks: known to each, see data.PackedRows
    total = torch.zeros((), device=ranks.device)
    for number, row in enumerate(step.rows, 1):
        loss = weight * model.loss(**loss_arguments(row, ranks))
        if ranks.mesh is not None:  # copies of the model add their gradients once, after the last
            model.set_requires_all_reduce(number == len(step.rows))
        loss.backward()
        total += loss.detach()
    return total


def train_step(model: LlavaOneVision, optimizer: torch.optim.AdamW, step: Step, lr: float,
               clip: float, ranks: Ranks) -> tuple[float, float]:
    """One optimizer step; returns the loss and the gradient norm, the same on all ranks.

    If either is not finite, nothing is changed: neither weights nor the optimizer's moments.
    """
    loss = backward(model, step, ranks)
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
        if part in trainable:
            passes = 3  # forward, gradient of the input, gradient of the weights
        elif part == "vision":
            passes = 1  # nothing in front of a frozen ViT wants a gradient
        else:
            passes = 2  # frozen, but gradients pass through
        total["model_flops"] += passes * flops
        # computed again: the head always (its logits are not kept), layers as told
        again = name == "head"
        if passes > 1 and part in ("vision", "decoder") and name != "head":
            again = recompute == "layer" or recompute == "selective" and "attention" not in name
        if again:
            passes += 1
        total["hardware_flops"] += passes * flops
    return total


def row_cost(row: Row, config: ModelConfig, trainable: tuple[str, ...],
             recompute: str) -> dict[str, float]:
    """FLOPs of training on a packed row."""
    frames = torch.zeros(0) if row.grid_thw is None else frame_sizes(row.grid_thw)
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


# ------------------------------------------------------------------------------- a run, end to end


def refuse_step(step: Step, loss: float, norm: float, where: str, ranks: Ranks, log: Log) -> None:
    """End the run at a step that is not finite, on all ranks; the first one names its samples."""
    rows = [row.row if isinstance(row, RowShare) else row for row in step.rows]
    names = [name for row in rows for name in row.names]
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
    cut = lay_out
    if ranks.context > 1:
        visual_ids = [model.config.image_token_id, model.config.video_token_id]
        cut = partial(share_row, rank=ranks.rank % ranks.context, ranks=ranks.context,
                      visual_ids=visual_ids)
    dataset = PackedRows(
        recipe.data, tokenizer, recipe.seq_length, config.seed, recipe.max_pixels, recipe.rows,
        rank=ranks.rank // ranks.context, ranks=ranks.data_ranks, cut=cut,
        cost=partial(row_cost, config=model.config, trainable=recipe.trainable,
                     recompute=recipe.recompute))
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
        loss, norm = train_step(model, optimizer, step, lr, recipe.clip, ranks)
        if not math.isfinite(loss + norm):
            refuse_step(step, loss, norm, f"step {number} of stage {name}", ranks, log)
        seen.update({"loss": loss, "norm": norm, "lr": lr, "steps": 1, "balance": step.balance,
                     **step.sums})
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
            samples = [encode(prompt, tokenizer, generation_prompt=True) for prompt in prompts]
            steps = model.generate(**lay_out(samples).inputs(device), max_new_tokens=24,
                                   stop_ids=(stop,))
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
        if needed > there and not ranks.rank:
            print(f"stage {name} may run out of memory: rows of {recipe.seq_length:,} tokens over "
                  f"--context-parallel {ranks.context} and {ranks.count // ranks.replicas} shards "
                  f"of the model need about {needed:,.0f} GiB of a rank, most of it for "
                  f"{max(memory, key=memory.get)}, and it has {there:,.0f}", file=sys.stderr)
        first_records[name] = next(record_stream(recipe.data, config.seed))
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package that is not here: pip install tensorboard")
    tokenizer = load_tokenizer(Path(start)) if start else train_tokenizer(
        drawn_texts(config.seed), sizes.vocab_size)
    for name, record in first_records.items():
        encode(record, tokenizer, max_pixels=recipes[name].max_pixels)
    return tokenizer


def run(config: TrainConfig) -> Path:
    """Train the stages, save a checkpoint after each, evaluate; returns the last checkpoint."""
    ranks = find_ranks(config.device, config.dtype, config.replicas, config.context_parallel,
                       config.expert_parallel)
    start = start_of(config)
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
