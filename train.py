"""Three stages of training, on one process or many: packed rows -> a model that answers questions.

In: a preset with fresh weights, or a checkpoint directory.  Out: one checkpoint directory a stage,
in the released layout, under `runs/`; a log; accuracies on held-out questions.
Called by people, with python or torchrun; calls `vision.py`, `model.py`, `data.py`, `parallel.py`,
`fp8_kernel.py`, `convert.py` and `assets/scenes.py`.

The idea.  The three stages of LLaVA-OneVision-1.5 train different parts, on different data:

    align     captions train the merger: its output moves into the decoder's embedding space
    mid       captions train everything: the decoder learns facts, the ViT learns to see
    instruct  questions and answers train everything: the model learns to answer

Each stage starts from the directory that the stage before it wrote.  A step takes `rows` packed
rows.  Row r has n_r tokens to learn, and token t of them the cross entropy l_rt.  The loss is

    loss = sum_r sum_t l_rt / sum_r n_r,

the mean over *tokens*: it does not matter which rows and ranks they are in.  (Upstream averages
within each row, then over rows.)  Gradients are clipped to norm 1.  AdamW decays matrices only.
The learning rate rises linearly, then falls along a cosine from `lr` to `min_lr`.

    --recipe        quick, upstream's quick start            full, all public data once
    stage           align      mid         instruct          align      mid         instruct
    trained         merger     all         all               merger     all         all
    rows x tokens   8 x 32768  16 x 32768  24 x 8192         64 x 8192  512 x 8192  512 x 8192
    steps           2500       20000       3500              640        12200       3150
    decay, beta_2   0, .99     .01, .95    0, .99            0, .99     .01, .95    0, .99
    lr to min_lr    1e-4 to 1e-6 in align, 1e-5 to 1e-6 in mid and instruct
    the rest        beta_1 0.9, eps 1e-5, clip 1, warm-up over 0.2 % of the steps

Upstream's instruct takes 224 samples a step, unpacked; 24 rows hold about 260, of 753 tokens each.
Rows and steps of upstream's full run were not published.  Those above show 558 thousand, 85 million
and 22 million samples of 600 tokens, each once.  `--recipe tiny` is for the tiny preset.

A mixture of experts adds the mean balance of its layers and rows (model.MixtureOfExperts), times
`--expert-balance`, to the loss.  The log shows the loss without it.

Ranks.  FSDP2 shards parameters, gradients and AdamW's moments over all ranks, or with `--replicas`
over groups of ranks that hold a copy each.  Masters and reductions are in fp32, products in
`--dtype`.  With `--context-parallel C`, C neighbours share each row; with `--expert-parallel E`, E
neighbours hold different experts: see `parallel.py`.  A rank reads only the records of its own
rows, but all ranks know the plan (data.Rows), and so the sums over all ranks.  All machines must
see the same files.

Accounting.  FLOPs of a row's forward pass, where N counts the weights of a part's matrices that a
token passes (K of X experts):

    decoder   2 N T + 4 layers H E sum over samples of L (L + 1) / 2
    ViT       2 N P + 4 layers D sum over frames of L^2,  merger  2 N P / 4,  head  2 C V labels

A backward pass costs two forward passes.  With frozen weights it costs one, and in front of the
first trained part nothing.  MFU divides these FLOPs by what the hardware can do in bf16, even where
`--fp8` computes some products at twice that rate.  HFU also counts what the backward pass computes
again.

Shapes: T tokens in a packed row, L of a sample or patches of a frame, P patches, C and D width of
decoder and ViT, H heads, E head width, V vocabulary, X experts.

Run `python train.py`: trains the tiny preset from random weights through all stages, in 15 to 20
minutes on two CPU cores, and prints its accuracies.  A checkpoint of any size:
`torchrun --nproc-per-node 8 train.py --stage align --start-from DIR --data FILE`.  `--help` lists
all flags; `python -m benchmarks.plan` computes what a run needs.
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
import timeit
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from assets.scenes import drawn_texts, held_out_questions, train_tokenizer
from convert import check_tokenizer, load_model, load_tokenizer, read_config, save_checkpoint
from data import (DRAWN, DrawnData, FileData, Index, Row, RowOfStep, Rows, encode, flag_parser,
                  lay_out, open_index, reason_of, source_files, weight_of)
from fp8_kernel import check_device, convert_to_fp8
from model import (LOSS_CHUNK, PRESETS, LlavaOneVision, ModelConfig, forward_flops, meta_model,
                   parameters_by_part, part_of)
from parallel import (Ranks, RowShare, clip_gradients, find_ranks, forget_lost, join_ranks,
                      loss_arguments, mixtures, shard, share_row)
from vision import MAX_PIXELS, MIN_PIXELS


@dataclass(frozen=True)
class Recipe:
    """What a stage trains, on which data, and how."""

    trainable: tuple[str, ...]  # parts that learn: "vision", "merger", "decoder"
    data: tuple[str, ...]  # default records, one of data.DRAWN; --data replaces them
    steps: int  # optimizer steps
    rows: int  # packed rows per step, of all ranks
    seq_length: int  # tokens in a row at most
    lr: float  # peak learning rate
    min_lr: float  # learning rate of the last step
    weight_decay: float  # of matrices only
    beta2: float  # AdamW's second beta; the first is 0.9
    eps: float = 1e-5  # AdamW's epsilon
    warmup: float = 0.002  # share of the steps
    vision_lr_factor: float = 1.0  # multiplies the learning rate of the ViT
    merger_lr_factor: float = 1.0  # of the merger
    expert_lr_factor: float = 1.0  # of the experts
    clip: float = 1.0  # largest gradient norm
    min_pixels: int = MIN_PIXELS  # least area of a picture
    max_pixels: int = MAX_PIXELS  # largest area of a picture
    recompute: str = "layer"  # what the backward pass computes again, one of RECOMPUTE


MERGER, ALL = ("merger",), ("vision", "merger", "decoder")
QUICK = {  # upstream's quick start
    "align": Recipe(
        trainable=MERGER, data=("captions",), steps=2500, rows=8, seq_length=32768,
        lr=1e-4, min_lr=1e-6, weight_decay=0.0, beta2=0.99),
    "mid": Recipe(
        trainable=ALL, data=("captions",), steps=20000, rows=16, seq_length=32768,
        lr=1e-5, min_lr=1e-6, weight_decay=0.01, beta2=0.95),
    # Upstream limits the longest side to 1000 pixels.  Here the limit is the area of such a square:
    # tokens cost the same, and a panorama keeps its detail.
    "instruct": Recipe(
        trainable=ALL, data=("questions",), steps=3500, rows=24, seq_length=8192,
        lr=1e-5, min_lr=1e-6, weight_decay=0.0, beta2=0.99, max_pixels=1000 * 1000),
}
FULL = {  # all public data once
    "align": replace(QUICK["align"], steps=640, rows=64, seq_length=8192),
    "mid": replace(QUICK["mid"], steps=12200, rows=512, seq_length=8192),
    "instruct": replace(QUICK["instruct"], steps=3150, rows=512, max_pixels=MAX_PIXELS),
}
# Random weights learn at higher rates, and `align` has no embedding space to align to yet.
# Captions come first: every word of a caption is learnt, so the ViT learns to see several times
# as fast as from short answers.  In `instruct` captions stay among the questions; without them the
# model forgets how to read.
# On average an expert sees 3 of 8 tokens.  At half the rate it ends better than at the full rate.
TINY_MID = Recipe(
    trainable=ALL, data=("captions",), steps=900, rows=1, seq_length=1024,
    lr=2e-3, min_lr=2e-4, weight_decay=0.01, beta2=0.95, eps=1e-8, warmup=0.02,
    vision_lr_factor=0.25, merger_lr_factor=0.25, expert_lr_factor=0.5, recompute="none")
TINY = {
    "align": Recipe(
        trainable=MERGER, data=("captions",), steps=20, rows=1, seq_length=1024,
        lr=1e-3, min_lr=1e-4, weight_decay=0.0, beta2=0.95, eps=1e-8, warmup=0.1,
        recompute="none"),
    "mid": TINY_MID,
    "instruct": replace(TINY_MID, data=("mixed",), steps=3600, lr=1.5e-3, min_lr=3e-5),
}
RECIPES = {"tiny": TINY, "quick": QUICK, "full": FULL}
STAGES = tuple(QUICK)
FROM_SCRATCH = ("tiny", "tiny-moe")  # presets that may start from random weights; default the first
SMALL = 100e6  # models of fewer parameters use the recipe tiny by default
GPUS = {"A100": (312e12, 80e9), "A800": (312e12, 80e9), "H100": (989e12, 80e9),  # dense bf16
        "H800": (989e12, 80e9), "H200": (989e12, 141e9), "B200": (2250e12, 180e9)}  # FLOP/s, bytes
VISUAL_SHARE = 0.7  # share of visual tokens in an average row
RECOMPUTE = ("none", "selective", "layer")  # selective: all of a layer except its attention


@dataclass(frozen=True)
class TrainConfig:
    """Command-line flags.  A flag of the recipe that is 0 or empty keeps the stage's own value."""

    model: str = ""  # a preset of model.py; default the size of --start-from, without it tiny
    stage: str = "all"  # align, mid, instruct, or all three one after the other
    recipe: str = ""  # tiny, quick or full; default quick, but tiny below 100 M parameters
    start_from: str = ""  # checkpoint directory; default that of the stage before
    out: str = ""  # directory of the run; default runs/MODEL-DATE-TIME
    data: tuple[str, ...] = ()  # captions, questions, mixed, or files and directories, PATH:WEIGHT
    images: str = ""  # directory of the pictures that JSON files name; default beside the file
    steps: int = 0  # optimizer steps of each stage
    epochs: float = 0.0  # instead of steps: how often each sample of --data is seen
    rows: int = 0  # packed rows per step, of all ranks
    seq_length: int = 0  # tokens in a row
    lr: float = 0.0  # peak learning rate; the lowest rate and the parts' rates change with it
    vision_lr: float = 0.0  # peak learning rate of the ViT
    merger_lr: float = 0.0  # peak learning rate of the merger
    min_pixels: int = 0  # least area of a picture; smaller pictures are enlarged
    max_pixels: int = 0  # largest area of a picture; larger pictures are shrunk
    skip_bad: bool = False  # leave out records and files that cannot be used; default is to stop
    max_bad: float = 0.001  # share of the records that may prove damaged in training
    expert_balance: float = 0.0  # weight of the experts' load-balancing loss (0.001 is usual)
    replicas: int = 1  # copies of the model; each is sharded over ranks / replicas
    context_parallel: int = 1  # ranks that share a row
    expert_parallel: int = 1  # ranks that share the experts of every layer
    recompute: str = ""  # in the backward pass: none, selective (all but attention), layer
    compile: bool = False  # compile layers
    dtype: str = ""  # of products, float32 or bfloat16; default bfloat16 on a GPU
    fp8: bool = False  # the decoder's large matrices in 8 bits (GPU of sm_89 or newer, or a CPU)
    seed: int = 0  # of weights and data
    workers: int = 1  # processes that prepare rows, for each rank
    log_every: int = 50  # steps between two lines of the log
    tensorboard: bool = False  # write the log for TensorBoard, too
    questions: int = 100  # held-out questions per category, asked at the end unless --data is given
    device: str = ""  # cpu or cuda; default cuda if there is a GPU

    def __post_init__(self) -> None:
        """Raise ValueError for a word that is unknown or a number that is out of range."""
        choices = {"model": PRESETS, "stage": ("all", *STAGES), "recipe": RECIPES,
                   "dtype": ("float32", "bfloat16"), "recompute": RECOMPUTE,
                   "device": ("cpu", "cuda")}
        positive = ("log_every", "replicas", "context_parallel", "expert_parallel")
        for entry in fields(self):
            value = getattr(self, entry.name)
            flag = f"--{entry.name.replace('_', '-')}"
            words = choices.get(entry.name)
            # a default may be empty: then the stage, the model or the machine decides
            if words and value not in (entry.default, *words):
                raise ValueError(f"there is no {flag} {value!r}, only {', '.join(words)}")
            # no comparison with NaN is true
            if isinstance(value, (int, float)) and not 0 <= value < math.inf:
                raise ValueError(f"{flag} must not be negative or infinite, it is {value}")
            if entry.name in positive and not value:
                raise ValueError(f"{flag} must be positive")
        if self.expert_parallel > 1 and self.recompute == "selective":
            raise ValueError("--expert-parallel goes with --recompute none or layer, not selective")
        self.check_data()

    def check_data(self) -> None:
        """Raise ValueError for flags about data that do not go together."""
        if self.steps and self.epochs:
            raise ValueError("--steps and --epochs are given: which is meant?")
        if self.epochs and not set(self.data) - set(DRAWN):
            raise ValueError("--epochs is for --data from files: drawn data do not end")
        if len(self.data) > 1 and set(self.data) & set(DRAWN):
            raise ValueError(f"--data: {', '.join(DRAWN)} cannot be mixed with others")
        least = self.min_pixels or MIN_PIXELS
        if self.max_pixels and self.max_pixels < least:
            raise ValueError(f"--max-pixels must be at least {least}")

    def recipes(self, sizes: ModelConfig) -> dict[str, Recipe]:
        """The recipes of the stages to run on a model of these sizes, with the flags applied."""
        small = sum(parameters_by_part(sizes).values()) < SMALL
        table = RECIPES[self.recipe or ("tiny" if small else "quick")]
        names = STAGES if self.stage == "all" else [self.stage]
        return {name: self.applied_to(table[name]) for name in names}

    def applied_to(self, recipe: Recipe) -> Recipe:
        """The recipe with the values of the flags that are given."""
        names = ("data", "steps", "rows", "seq_length", "lr", "min_pixels", "max_pixels",
                 "recompute")
        changes = {name: getattr(self, name) for name in names if getattr(self, name)}
        # the lowest rate keeps its ratio to the peak; the rates of the parts are factors on it
        lr = self.lr or recipe.lr
        changes["min_lr"] = recipe.min_lr * lr / recipe.lr
        if self.vision_lr:
            changes["vision_lr_factor"] = self.vision_lr / lr
        if self.merger_lr:
            changes["merger_lr_factor"] = self.merger_lr / lr
        return replace(recipe, **changes)


# --------------------------------------------------------------------------- the model of a stage


def sizes_of(config: TrainConfig, start: str) -> ModelConfig:
    """The sizes of a model: those of the checkpoint it starts from, else those of its preset.

    Raises ValueError if --model names a preset of another size.
    """
    preset = PRESETS[config.model or FROM_SCRATCH[0]]
    if not start:
        return preset
    sizes = read_config(start)
    if config.model:
        # these three fields tell the presets apart
        for name in ("hidden_size", "num_hidden_layers", "num_experts"):
            size = getattr(sizes, name)
            if size != getattr(preset, name):
                raise ValueError(f"{start} is not of the size {config.model}: its {name} is {size}"
                                 f", not {getattr(preset, name)}; without --model any size is "
                                 "taken")
    return sizes


def load_stage(start: str, recipe: Recipe, config: TrainConfig, ranks: Ranks) -> LlavaOneVision:
    """The model that a stage starts with, sharded; without `start` one with random weights."""
    def prepare(model: LlavaOneVision) -> None:
        if config.fp8:
            convert_to_fp8(model)
        shard(model, recipe.recompute, config.compile, ranks)

    if start:
        # the model is sharded while it is empty, so each rank reads only its own slices
        return load_model(start, torch.float32, ranks.device, prepare)
    torch.manual_seed(config.seed)
    model = LlavaOneVision(sizes_of(config, start)).init_weights().to(ranks.device)
    prepare(model)
    return model


# ------------------------------------------------------------------------------ an optimizer step


def make_optimizer(model: LlavaOneVision, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the parts that the stage trains; freezes the others."""
    factors = {"vision": recipe.vision_lr_factor, "merger": recipe.merger_lr_factor,
               "experts": recipe.expert_lr_factor, "decoder": 1.0}
    groups: dict[tuple[str, bool], dict] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in recipe.trainable)
        if not parameter.requires_grad:
            continue
        if ".experts." in name:
            part = "experts"
        is_matrix = parameter.dim() > 1
        # vectors (norms, biases) do not decay
        decay = recipe.weight_decay if is_matrix else 0.0
        group = groups.setdefault((part, is_matrix), {
            "params": [], "lr_factor": factors[part], "weight_decay": decay})
        group["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), lr=recipe.lr, betas=(0.9, recipe.beta2),
                             eps=recipe.eps, fused=True)


def set_balance(model: LlavaOneVision, recipe: Recipe, weight: float) -> None:
    """Add `weight` times the experts' balance, averaged over layers and rows, to a step's loss.

    Frozen routers cannot learn balance: then nothing is added.
    """
    layers = mixtures(model)
    if "decoder" not in recipe.trainable:
        weight = 0.0
    for layer in layers:
        layer.balance_weight = weight / (len(layers) * recipe.rows)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine from lr to min_lr; step counts from 0."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))  # from 1 down to 0
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * cosine


@dataclass
class Step:
    """What a rank trains on in one optimizer step, and what all ranks do together."""

    rows: Iterable[Row | RowShare]  # of this rank; from a loader they are read one at a time
    count: int  # rows of this rank
    sums: dict[str, float]  # over all ranks, from the plan: see data.RowOfStep
    balance: float
    waited: float = 0.0  # seconds until the rows were there
    names: list[str] = field(default_factory=list)  # of the samples of the rows that were read
    # samples that were not learnt: number in the data -> name and reason
    lost: dict[int, tuple[str, str]] = field(default_factory=dict)


def steps_of(loader: Iterable[RowOfStep], count: int) -> Iterator[Step]:
    """Steps of `count` rows; a step reads its rows from the loader while they are trained on."""
    stream = iter(loader)

    # a generator: `backward` asks for the next row when it is done with one
    def read(first: RowOfStep) -> Iterator[Row | RowShare]:
        yield first.row
        for _ in range(1, count):
            before = time.monotonic()
            row = next(stream).row
            step.waited += time.monotonic() - before
            yield row

    while True:
        before = time.monotonic()
        first = next(stream, None)
        if first is None:
            return
        step = Step((), count, first.sums, first.balance, time.monotonic() - before)
        step.rows = read(first)
        yield step


def backward(model: LlavaOneVision, step: Step, ranks: Ranks) -> Tensor:
    """Gradients of the step's loss, summed over rows and ranks.

    Returns this rank's summand of the loss, and the number of tokens that it learnt.
    """
    # the labels of all ranks, which the plan knows
    weight = 1 / max(1, step.sums["labels"])
    # float32 would round the labels of a large step
    total = torch.zeros(2, dtype=torch.float64, device=ranks.device)
    for number, row in enumerate(step.rows, 1):
        whole = forget_lost(row, ranks)
        step.names += whole.names
        step.lost |= {whole.numbers[i]: (whole.names[i], reason)
                      for i, reason in whole.lost.items()}
        loss = weight * model.loss(**loss_arguments(row, ranks))
        if ranks.mesh is not None:
            # copies of the model add their gradients once, after the last row
            model.set_requires_all_reduce(number == step.count)
        loss.backward()
        total[0] += loss.detach()
        total[1] += whole.labels
    return total


def train_step(model: LlavaOneVision, optimizer: torch.optim.AdamW, step: Step, lr: float,
               clip: float, ranks: Ranks) -> tuple[float, float]:
    """One optimizer step; returns the loss and the gradient norm, the same on all ranks.

    If one of them is not finite, the weights and the optimizer's moments stay as they are.
    """
    totals = backward(model, step, ranks)
    if ranks.count > 1:
        dist.all_reduce(totals)
    loss, labels = totals.tolist()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if labels < step.sums["labels"]:
        # samples were lost, of which the plan did not know: the mean is over those that were learnt
        share = step.sums["labels"] / max(1.0, labels)
        loss *= share
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= share
        step.lost = gathered(step.lost, ranks)
    norm = clip_gradients(parameters, clip) / ranks.count
    # the sum of all ranks' norms: so all decide alike, even if NaN is on one of them only
    if ranks.count > 1:
        dist.all_reduce(norm)
    norm = float(norm)
    if math.isfinite(loss + norm):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        optimizer.step()
    optimizer.zero_grad()
    return loss, norm


def gathered(entries: dict, ranks: Ranks) -> dict:
    """The entries of all ranks in one dictionary."""
    of_ranks = [entries]
    if ranks.count > 1:
        of_ranks = [{}] * ranks.count
        dist.all_gather_object(of_ranks, entries)
    return {key: value for part in of_ranks for key, value in part.items()}


# ------------------------------------------------------------------------------------- accounting


def training_flops(forward: dict[str, float], trainable: tuple[str, ...],
                   recompute: str) -> dict[str, float]:
    """FLOPs of a training step: all that the hardware does, and the part that MFU counts."""
    total = {"hardware_flops": 0.0, "model_flops": 0.0}
    for name, flops in forward.items():
        part = "decoder" if name == "head" else name.split()[0]
        if part in trainable:
            passes = 3  # forward, gradient of the input, gradient of the weights
        elif part == "vision":
            passes = 1  # nothing before a frozen ViT needs a gradient
        else:
            passes = 2  # the weights are frozen, but gradients pass through
        total["model_flops"] += passes * flops

        # computed again: the head's logits always, the merger never, layers with a backward pass as
        # told
        again = name == "head"
        if passes > 1 and part != "merger" and name != "head":
            again = recompute == "layer" or recompute == "selective" and "attention" not in name
        if again:
            passes += 1
        total["hardware_flops"] += passes * flops
    return total


def rows_cost(loads: dict[str, np.ndarray], config: ModelConfig, trainable: tuple[str, ...],
              recompute: str) -> dict[str, np.ndarray]:
    """FLOPs of training on rows; loads: see data.LOADS."""
    return training_flops(forward_flops(config, loads), trainable, recompute)


def matrix_rate(ranks: Ranks) -> tuple[float, str]:
    """FLOP/s of one rank that count as an MFU of 100 %, and where the number comes from.

    For bfloat16 on a GPU in GPUS it is the data sheet's (SXM cards), else it is measured.
    """
    if ranks.device.type == "cuda" and ranks.dtype == torch.bfloat16:
        card = torch.cuda.get_device_name(ranks.device)
        for name, (rate, _) in GPUS.items():
            if name in card:
                return rate, f"data sheet of {name}"

    # the largest product comes closest to the peak; but many CPUs are 100 times slower in bfloat16
    # than in float32, so the loop ends where the next product, 8 times the work, would take long
    for size in (256, 512, 1024, 2048):
        matrix = torch.randn(size, size, device=ranks.device).to(ranks.dtype)
        # reading a number waits for the product
        seconds = timeit.repeat(lambda x=matrix: float(nn.functional.linear(x, x)[0, 0]),
                                number=1, repeat=6)
        if min(seconds) > 0.1:
            break
    # the first product warms up
    return 2 * size**3 / min(seconds[1:]), f"measured, product of {size} x {size}"


def memory_of_rank(device: torch.device) -> float:
    """Bytes that a rank can use: those of its GPU, or its share of the machine's."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return machine / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def peak_memory(device: torch.device) -> int:
    """Most memory that this process has held, in bytes: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def routing(model: LlavaOneVision, ranks: Ranks) -> dict[str, list[float]]:
    """How tokens were routed in each layer since the last call: tokens of the busiest and of the
    idlest expert, divided by the mean of all, and the balance (see model.MixtureOfExperts)."""
    layers = mixtures(model)
    if not layers:
        return {}
    sums = torch.stack([layer.routed for layer in layers])  # (layers, X + 2)
    if ranks.count > 1:
        dist.all_reduce(sums)
    for layer in layers:
        layer.routed = 0

    # X columns of tokens by expert, one of summed balances, one of forward passes
    tokens, balance = sums[:, :-2], sums[:, -2]
    passes = sums[:, -1] / ranks.context  # each of the ranks that share a row has counted it
    load = tokens / tokens.mean(1, keepdim=True)
    return {"expert_most": load.amax(1).tolist(), "expert_least": load.amin(1).tolist(),
            "expert_balance": (balance / passes).tolist()}


# the console's line about training steps; log_step fills it in
LOG_LINE = ("loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  {tokens_per_second:,.0f} tok/s  "
            "{labels_per_second:,.0f} labels/s  {images_per_second:,.0f} images/s  "
            "pad {padding:.1%}  wait {wait:.0%}  MFU {mfu:.0%}  HFU {hfu:.0%}  "
            "{memory_gib:.1f} GiB")


class Log:
    """The first rank's log: text on the console, JSON lines in a file, curves for TensorBoard."""

    def __init__(self, out: Path, first: bool, tensorboard: bool) -> None:
        self.file = open(out / "log.jsonl", "a") if first else None
        self.terminal = first and sys.stdout.isatty()
        self.board = None
        if first and tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(out))

    def line(self, text: str, **values: object) -> None:
        """Print the text and write the values; nothing on other ranks than the first."""
        if self.file is None:
            return
        if self.terminal:
            text = f"\r\033[K{text}"  # erases the progress bar
        print(text, flush=True)
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()
        if self.board is not None and "stage" in values:
            self.draw(**values)

    def draw(self, stage: str, step: int, **values: float | list[float]) -> None:
        """Add a point to each curve; a list has a curve for each layer."""
        for name, value in values.items():
            if isinstance(value, list):
                for layer, number in enumerate(value):
                    self.board.add_scalar(f"{stage}/{name}/{layer}", number, step)
            else:
                self.board.add_scalar(f"{stage}/{name}", value, step)
        self.board.flush()

    def progress(self, stage: str, step: int, steps: int, left: float) -> None:
        """Redraw the bar; on a terminal only."""
        if self.terminal:
            bar = "#" * (30 * step // steps)
            print(f"\r\033[K{stage} [{bar:30}] {step}/{steps}, {left:.0f} s left", end="",
                  flush=True)


def log_step(log: Log, stage: str, step: int, recipe: Recipe, seen: Counter, left: float,
             peak: float, device: torch.device, routed: dict[str, list[float]]) -> None:
    """Write one line about the steps since the last line.

    seen: sums over these steps and all ranks; left: seconds to the end of the stage; peak: FLOP/s
    of all ranks at an MFU of 100 %; routed: what `routing` returns.
    """
    steps, seconds = seen["steps"], seen["seconds"]
    values = {name: seen[name] / steps for name in ("loss", "lr", "norm")}
    for name in ("tokens", "labels", "samples", "images"):
        values[f"{name}_per_second"] = seen[name] / seconds
    # nothing computes padding: it is the room that samples leave free in the rows
    room = steps * recipe.rows * recipe.seq_length
    values |= {"padding": 1 - seen["tokens"] / room, "wait": seen["waited"] / seconds,
               "rank_balance": seen["balance"] / steps,
               "mfu": seen["model_flops"] / seconds / peak,
               "hfu": seen["hardware_flops"] / seconds / peak,
               "memory_gib": peak_memory(device) / 2**30,  # of the first rank
               "seconds_left": left, "lost": seen["lost"]}

    minutes, rest = divmod(round(left), 60)
    text = f"{LOG_LINE.format(**values)}  {minutes // 60}:{minutes % 60:02}:{rest:02} left"
    kinds = [f"{seen[kind]} {kind.removeprefix('lost ')}" for kind in seen
             if kind.startswith("lost ")]
    if kinds:
        text += f"  lost: {', '.join(kinds)}"
    if routed:
        balances = routed["expert_balance"]
        text += (f"  expert load {min(routed['expert_least']):.2f}-"
                 f"{max(routed['expert_most']):.2f}, balance {sum(balances) / len(balances):.3f}")
    log.line(f"{stage:8} {step:6}/{recipe.steps}  {text}", stage=stage, step=step, **values,
             **routed)


# -------------------------------------------------------------------------------- what a run needs


def saved_bytes(layer: nn.Module, width: int, heads: int, head_dim: int,
                recompute: str) -> tuple[float, float]:
    """Activation bytes per token (or patch) of a layer in bf16: kept until its backward pass, and
    held during it, with all that is computed again.

    They are counted on the meta device, where tensors have shapes but no numbers.
    """
    tokens = 1024
    x = torch.empty(tokens, width, dtype=torch.bfloat16, device="meta", requires_grad=True)
    angles = torch.empty(tokens, 1, head_dim // 2, device="meta")
    cu_seqlens = torch.empty(2, dtype=torch.int64, device="meta")
    storages = {}

    def keep(tensor: Tensor) -> Tensor:
        # several saved tensors can be views of one storage, which counts once
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, cu_seqlens, tokens, angles, angles)

    # autograd saves weights, too, but those are no activations
    for weight in layer.parameters():
        storages.pop(weight.untyped_storage()._cdata, None)
    held = sum(storage.nbytes() for storage in storages.values()) / tokens

    # what is computed again starts from the layer's input, in bf16; selective recomputing also
    # keeps attention's output, in bf16, and its log-sum-exp, in fp32
    kept = {"none": held, "layer": 2 * width,
            "selective": 2 * width + 2 * heads * head_dim + 4 * heads}
    return kept[recompute], held


def activation_bytes(config: ModelConfig, recipe: Recipe, context: int, layer: nn.Module,
                     block: nn.Module) -> float:
    """Activation bytes of a rank's part of a row; layer: of the decoder, block: of the ViT."""
    vision, recompute = config.vision, recipe.recompute
    kept, held = saved_bytes(layer, config.hidden_size, config.num_attention_heads,
                             config.head_dim, recompute)
    # keys and values of the other ranks' tokens, in bf16
    gathered = 4 * (context - 1) * config.num_key_value_heads * config.head_dim
    held += gathered
    if recompute == "none":
        kept += gathered

    block_kept, block_held = 0, 0  # a frozen ViT has no backward pass
    if "vision" in recipe.trainable:
        block_kept, block_held = saved_bytes(block, vision.embed_dim, vision.num_heads,
                                             vision.head_dim, recompute)
    tokens = recipe.seq_length / context
    patches = 4 * VISUAL_SHARE * tokens
    total = kept * config.num_hidden_layers * tokens + block_kept * vision.depth * patches
    if recompute == "none":
        return total
    # one layer at a time is computed again, of the decoder or of the ViT
    return total + max(held * tokens, block_held * patches)


def memory_by_part(config: ModelConfig, recipe: Recipe, shards: int, context: int,
                   experts: int, fp8: bool) -> dict[str, float]:
    """Estimated bytes of a rank at its peak; products are in bf16, with `fp8` some in 8 bits.

    Not counted: what the allocator wastes, buffers of the communication, the CUDA context.
    """
    parts = parameters_by_part(config)
    total, trained = sum(parts.values()), sum(parts[part] for part in recipe.trainable)
    # in fp32, 4 bytes a number; AdamW has two moments
    memory = {"masters, fp32": 4 * total / shards, "gradients, fp32": 4 * trained / shards,
              "AdamW's moments": 8 * trained / shards}

    model = meta_model(config).to(torch.bfloat16)
    layer, head = model.model.layers[0], config.hidden_size * config.vocab_size
    layer.requires_grad_("decoder" in recipe.trainable)
    if fp8:
        convert_to_fp8(layer)
    # with expert parallelism a rank gathers the weights of its own experts only
    sizes = [weight.numel() / (experts if ".experts." in name else 1)
             for name, weight in layer.named_parameters()]
    layer_size = sum(sizes)

    # copies in bf16, 2 bytes a number: the layer that computes, the next layer, merger, head
    copies = 2 * (2 * layer_size + parts["merger"] + head)
    if fp8:
        copies += 2 * max(sizes)  # one matrix at a time also in 8 bits, as it is and transposed
    memory["gathered weights"] = copies
    # of the largest unit: a gradient in bf16 and its copy in fp32, which the ranks sum
    memory["gradients, not yet reduced"] = 6 * max(layer_size, head)
    memory["activations"] = activation_bytes(config, recipe, context, layer, model.visual.blocks[0])
    # of a chunk: logits in bf16, their log-probabilities and gradients in fp32
    memory["logits"] = 10 * min(recipe.seq_length / context, LOSS_CHUNK) * config.vocab_size
    return memory


# ------------------------------------------------------------------------------- a run, end to end


def leave_to_first_rank(ranks: Ranks) -> None:
    """End this process unless it is the first rank, which then reports what all ranks found."""
    if ranks.rank:
        time.sleep(2)  # torchrun ends all ranks as soon as one ends: the first must report before
        sys.exit(2)


def refuse_step(step: Step, loss: float, norm: float, place: str, ranks: Ranks, log: Log) -> None:
    """End the run, on all ranks, at a step that is not finite; the first rank names its samples."""
    # ranks that share a row have the same samples
    names = list(gathered(dict.fromkeys(step.names), ranks))
    leave_to_first_rank(ranks)

    log.line(f"{place} is not finite", samples=names, loss=str(loss), norm=str(norm))
    listed = ", ".join(names[:8])
    if len(names) > 8:
        listed += f" and {len(names) - 8} more, all in log.jsonl"
    raise ValueError(f"the loss of {place} is {loss}, its gradient norm {norm}; no weight was "
                     f"changed; its samples are {listed}")


def note_lost(step: Step, lost: set[int], data: FileData | DrawnData, config: TrainConfig,
              out: Path, ranks: Ranks) -> Counter[str]:
    """Add the step's lost samples to `lost` and to rejects.jsonl; returns their kinds, for the log.

    Raises ValueError if more than --max-bad of all samples are lost; one may always be.
    """
    # a later epoch meets the same samples again
    new = {number: found for number, found in step.lost.items() if number not in lost}
    lost.update(new)
    if ranks.rank == 0:
        with open(out / "rejects.jsonl", "a") as file:
            file.writelines(json.dumps({"sample": number, "record": name, "reason": reason}) + "\n"
                            for number, (name, reason) in new.items())
    samples = len(data.index.table)
    if len(lost) > max(1, config.max_bad * samples):
        leave_to_first_rank(ranks)
        _, reason = list(step.lost.values())[-1]
        raise ValueError(f"{len(lost)} of {samples:,} samples are lost, more than --max-bad "
                         f"{config.max_bad} allows: see {out / 'rejects.jsonl'}; the last: "
                         f"{reason}")
    return Counter(f"lost {reason_of(reason)}" for _, reason in step.lost.values())


def check_index(index: Index, skip_bad: bool) -> None:
    """Raise ValueError for records and files that cannot be used, unless they are to be skipped."""
    bad = [*index.damaged, *(reject["reason"] for reject in index.rejects)]
    if bad and not skip_bad:
        listed = "; ".join(bad[:8])
        if len(bad) > 8:
            listed += f"; and {len(bad) - 8} more, which `python data.py inspect --all` lists"
        raise ValueError(f"{len(bad)} records or files of the data cannot be used (--skip-bad goes "
                         f"on without them): {listed}")


def open_indexes(recipes: dict[str, Recipe], tokenizer: Tokenizer, config: TrainConfig,
                 ranks: Ranks) -> dict[str, Index]:
    """The index of each stage's data, made by the first rank; the others read it from a file later.

    Raises ValueError, on all ranks, for data that cannot be used.
    """
    indexes: dict[str, Index] = {}
    error = [""]
    try:
        for name, recipe in recipes.items():
            if ranks.rank or recipe.data[0] in DRAWN:
                continue
            pixels = (recipe.min_pixels, recipe.max_pixels)
            same = [index for index in indexes.values() if index.settings["pixels"] == list(pixels)]
            indexes[name] = same[0] if same else open_index(
                recipe.data, tokenizer, config.images, pixels, os.cpu_count() or 1)
            check_index(indexes[name], config.skip_bad)
            FileData(indexes[name], tokenizer, recipe.seq_length, config.seed)  # refuses short rows
    except (ValueError, OSError) as found:
        error = [str(found)]
    if ranks.count > 1:
        dist.broadcast_object_list(error)
    if error[0]:
        leave_to_first_rank(ranks)
        raise ValueError(error[0])
    return indexes


def stage_data(name: str, tokenizer: Tokenizer, recipe: Recipe, config: TrainConfig, out: Path,
               indexes: dict[str, Index], ranks: Ranks) -> FileData | DrawnData:
    """The data of a stage.  The first rank keeps its index beside the run, where others find it."""
    if recipe.data[0] in DRAWN:
        return DrawnData(recipe.data[0], tokenizer, recipe.seq_length, config.seed, recipe.rows,
                         (recipe.min_pixels, recipe.max_pixels))
    folder = out / f"{name}-data"
    if ranks.rank == 0:
        folder.mkdir(exist_ok=True)
        indexes[name].save(folder)
    if ranks.count > 1:
        dist.barrier()
    # all ranks plan with the same table, whatever has become of the files
    index = indexes[name] if ranks.rank == 0 else Index.load(folder)
    return FileData(index, tokenizer, recipe.seq_length, config.seed)


def row_loader(data: FileData | DrawnData, sizes: ModelConfig, recipe: Recipe, workers: int,
               ranks: Ranks) -> DataLoader:
    """The rows of this rank, prepared by worker processes, from the first step to the last."""
    cut = lay_out
    if ranks.context > 1:
        # neighbours read the same rows, and each cuts its own part of them
        cut = partial(share_row, rank=ranks.rank % ranks.context, ranks=ranks.context,
                      visual_ids=[sizes.image_token_id, sizes.video_token_id])
    cost = partial(rows_cost, config=sizes, trainable=recipe.trainable, recompute=recipe.recompute)
    rows = Rows(data, recipe.rows, ranks.rank // ranks.context, ranks.data_ranks, cost, cut)
    return DataLoader(rows, batch_size=None, num_workers=workers,
                      sampler=range(recipe.steps * recipe.rows // ranks.data_ranks),
                      prefetch_factor=max(1, 4 // workers) if workers else None,
                      pin_memory=ranks.device.type == "cuda")


def train_stage(name: str, model: LlavaOneVision, tokenizer: Tokenizer, recipe: Recipe,
                config: TrainConfig, out: Path, indexes: dict[str, Index], ranks: Ranks,
                log: Log) -> None:
    """Train the model, in place, with the recipe of one stage."""
    data = stage_data(name, tokenizer, recipe, config, out, indexes, ranks)
    if isinstance(data, FileData):
        rows, samples = data.rows_in(0), sum(map(len, data.sources))
        if config.epochs:
            whole, part = divmod(config.epochs, 1)
            seen_rows = sum(data.rows_in(epoch) for epoch in range(int(whole))) + part * rows
            recipe = replace(recipe, steps=math.ceil(seen_rows / recipe.rows))
        log.line(f"{name}: an epoch is {samples:,} samples in {rows:,} rows"
                 f"{' as they were packed' if data.packed else ''}, "
                 f"{rows / recipe.rows:,.1f} steps; left out: {data.too_long:,} samples longer "
                 f"than a row, {len(data.index.rejects):,} bad records, what is damaged of "
                 f"{len(data.index.damaged)} files",
                 samples=samples, rows=rows, too_long=data.too_long, damaged=data.index.damaged)
    optimizer = make_optimizer(model, recipe)
    set_balance(model, recipe, config.expert_balance)
    rate, source = matrix_rate(ranks)
    log.line(f"{name}: {', '.join(recipe.trainable)} trained, {recipe.steps} steps of "
             f"{recipe.rows} rows; MFU of {ranks.count} x {rate / 1e12:.3g} TFLOP/s ({source})",
             recipe=asdict(recipe), matrix_rate=rate)
    loader = row_loader(data, model.config, recipe, config.workers, ranks)
    started = last_line = time.monotonic()
    seen: Counter[str] = Counter()  # sums since the last line of the log
    lost: set[int] = set()  # samples that could not be decoded
    for number, step in enumerate(steps_of(loader, recipe.rows // ranks.data_ranks), 1):
        lr = learning_rate(number - 1, recipe)
        loss, norm = train_step(model, optimizer, step, lr, recipe.clip, ranks)
        if not math.isfinite(loss + norm):
            refuse_step(step, loss, norm, f"step {number} of stage {name}", ranks, log)
        if step.lost:
            seen.update(note_lost(step, lost, data, config, out, ranks))

        seen.update({"loss": loss, "norm": norm, "lr": lr, "steps": 1, "waited": step.waited,
                     "balance": step.balance, "lost": len(step.lost), **step.sums})
        now = time.monotonic()
        left = (now - started) / number * (recipe.steps - number)
        if number % config.log_every == 0 or number == recipe.steps:
            # every rank comes here, since routing sums over the ranks
            seen["seconds"] = now - last_line
            log_step(log, name, number, recipe, seen, left, rate * ranks.count, ranks.device,
                     routing(model, ranks))
            last_line, seen = now, Counter()
        log.progress(name, number, recipe.steps, left)


def evaluate(model: LlavaOneVision, tokenizer: Tokenizer, per_category: int,
             at_once: int = 50) -> dict[str, float]:
    """Percentage of held-out questions that greedy answers match exactly, by category."""
    device = model.lm_head.weight.device
    stop = tokenizer.token_to_id("<|im_end|>")
    scores = {}
    for category, questions in held_out_questions(per_category).items():
        right = 0
        for start in range(0, len(questions), at_once):
            asked = questions[start:start + at_once]
            # the prompt is the conversation without its last message, the answer
            prompts = [{**record, "messages": record["messages"][:-1]} for record in asked]
            samples = [encode(prompt, tokenizer, generation_prompt=True) for prompt in prompts]
            inputs = lay_out(samples).inputs(device)
            steps = list(model.generate(**inputs, max_new_tokens=24, stop_ids=(stop,)))
            # the tokens of each step become the tokens of each answer, which ends at the first stop
            for record, ids in zip(asked, torch.stack(steps, dim=1).tolist()):
                if stop in ids:
                    ids = ids[:ids.index(stop)]
                answer = tokenizer.decode(ids, skip_special_tokens=False)
                if answer == record["messages"][-1]["content"][0]["text"]:
                    right += 1
        scores[category] = 100 * right / len(questions)
    return scores


def report(scores: dict[str, float], log: Log) -> None:
    """Log the accuracies by category, and their means over scenes and over flags."""
    flags = {k: v for k, v in scores.items() if k.startswith("flag")}
    scenes = {k: v for k, v in scores.items() if k not in flags}
    for name, group in (("flags", flags), ("scenes", scenes)):
        mean = sum(group.values()) / len(group)
        detail = "  ".join(f"{k.removeprefix('flag ')} {v:.0f}" for k, v in group.items())
        log.line(f"held-out {name}: {mean:.1f} %   ({detail})", group=name, mean=mean, **group)


def start_of(config: TrainConfig) -> str:
    """The directory that the first stage starts from; empty for random weights.

    Raises ValueError if there is no such directory.
    """
    if config.start_from:
        return config.start_from
    if config.stage not in ("all", STAGES[0]):
        before = STAGES[STAGES.index(config.stage) - 1]
        directory = Path(config.out, before)
        # without --out there is no run whose earlier stage could be meant
        if not config.out or not directory.is_dir():
            raise ValueError(f"stage {config.stage} starts from what stage {before} wrote, but "
                             f"there is no {directory}: name the run with --out or a directory "
                             "with --start-from")
        return str(directory)
    if config.model not in ("", *FROM_SCRATCH):
        raise ValueError(f"{config.model} starts from a checkpoint: name it with --start-from")
    return ""


def name_of(config: TrainConfig, start: str) -> str:
    """The name of a run's model: its preset, else the directory that it starts from."""
    return config.model or (Path(start).resolve().name if start else FROM_SCRATCH[0])


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
    """Raise ValueError for what cannot run, before a model is loaded or a file is written.

    Returns the tokenizer.
    """
    check_experts(config, sizes)
    if config.fp8:
        check_device(ranks.device)
        convert_to_fp8(meta_model(sizes))  # refuses widths that FP8 cannot take
    shards = ranks.count // ranks.replicas
    for name, recipe in recipes.items():
        directory = Path(config.out, name)
        if config.out and directory.exists():
            raise ValueError(f"{directory} is there already")
        if recipe.rows % ranks.data_ranks:
            raise ValueError(f"the {recipe.rows} rows of a step of stage {name} cannot be dealt "
                             f"to {ranks.data_ranks} ranks or groups of ranks: choose --rows")
        # the memory is estimated: print it, but let the device itself refuse
        memory = memory_by_part(sizes, recipe, shards, ranks.context, ranks.experts, config.fp8)
        needed, present = sum(memory.values()) / 2**30, memory_of_rank(ranks.device) / 2**30
        if needed > present and not ranks.rank:
            print(f"stage {name} may run out of memory: rows of {recipe.seq_length:,} tokens over "
                  f"--context-parallel {ranks.context} and {shards} shards of the model need about "
                  f"{needed:,.0f} GiB of a rank, most of it for {max(memory, key=memory.get)}, and "
                  f"it has {present:,.0f}", file=sys.stderr)
        if recipe.data[0] not in DRAWN:
            source_files(*(weight_of(source)[0] for source in recipe.data))  # they must be there
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package that is not here: pip install tensorboard")

    if start:
        tokenizer = load_tokenizer(Path(start))
        check_tokenizer(Path(start), tokenizer, sizes)
        return tokenizer
    return train_tokenizer(drawn_texts(config.seed), sizes.vocab_size)


def run(config: TrainConfig) -> Path:
    """Train the stages, save a checkpoint after each, evaluate; returns the last checkpoint."""
    ranks = find_ranks(config.device, config.dtype, config.replicas, config.context_parallel,
                       config.expert_parallel)
    start = start_of(config)
    sizes = sizes_of(config, start)
    model_name = name_of(config, start)
    recipes = config.recipes(sizes)
    tokenizer = check_run(config, ranks, start, sizes, recipes)
    ranks = join_ranks(ranks)
    # bad data and a damaged checkpoint are refused here, before the run has a directory
    indexes = open_indexes(recipes, tokenizer, config, ranks)
    model = load_stage(start, next(iter(recipes.values())), config, ranks)
    names = [config.out or f"runs/{model_name}-{time.strftime('%Y%m%d-%H%M%S')}"]
    if ranks.count > 1:
        # clocks differ: the first rank's list replaces the lists of the others
        dist.broadcast_object_list(names)
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
        if model is None:
            model = load_stage(start, recipe, config, ranks)
        train_stage(name, model, tokenizer, recipe, config, out, indexes, ranks, log)
        try:
            save_checkpoint(model, tokenizer, out / name)
        except ValueError:
            leave_to_first_rank(ranks)
            raise
        start = str(out / name)
        # hooks tie a sharded model into cycles, and the next model needs its memory
        model = None
        gc.collect()

    if ranks.mesh is not None:
        dist.destroy_process_group()
    if ranks.rank == 0 and config.questions and not config.data:
        model = load_model(start, ranks.dtype, ranks.device)
        report(evaluate(model, tokenizer, config.questions), log)
    log.line(f"saved: {start}", saved=start)
    return Path(start)


def parse_flags(arguments: list[str]) -> TrainConfig:
    """Build the command line from TrainConfig's fields; the comment beside a field is its help."""
    parser = flag_parser(__doc__.splitlines()[0], arguments)
    comments = dict(re.findall(r"^    (\w+): .*#  ?(.*)$", inspect.getsource(TrainConfig), re.M))
    for entry in fields(TrainConfig):
        flag = f"--{entry.name.replace('_', '-')}"
        comment = comments[entry.name].replace("%", "%%")  # argparse formats with %
        text = f"{comment} (default {entry.default!r})"
        # a flag of type bool takes no value: its presence means True
        options = {"action": "store_true"} if entry.type is bool else {"type": entry.type}
        if isinstance(entry.default, tuple):
            options = {"nargs": "+"}
        parser.add_argument(flag, default=entry.default, help=text, **options)
    flags = vars(parser.parse_args(arguments))
    return TrainConfig(**{**flags, "data": tuple(flags["data"])})


def main() -> None:
    """Run the command; what a user caused becomes one line on standard error, exit code 2."""
    try:
        run(parse_flags(sys.argv[1:]))
    except (ValueError, OSError) as error:
        # an error of a worker process comes with its traceback; the last line says what is wrong
        lines = str(error).strip().splitlines() or [type(error).__name__]
        # before the ranks join, all of a machine find the same error: only the first says it
        if os.environ.get("LOCAL_RANK", "0") == "0" or dist.is_initialized():
            print(f"train.py: {lines[-1].removeprefix('ValueError: ')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted; finished stages are saved", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
