"""Three stages of training, on one process or many: packed rows -> a model that answers questions.

In: a preset with fresh weights, or a checkpoint directory.  Out: one checkpoint directory a stage,
in the released layout, under `runs/`; a log; accuracies on held-out questions.
Called by people, with python or torchrun; calls `vision.py`, `model.py`, `data.py`, `sample.py`,
`parallel.py`, `fp8_kernel.py`, `convert.py` and `assets/scenes.py`.

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
and 22 million samples of 600 tokens, each once.  `--recipe tiny` is for the tiny preset; with
`tiny-long`, which takes more steps of shorter rows, `assets/tiny` was trained.

A mixture of experts adds the mean balance of its layers and rows (model.MixtureOfExperts), times
`--expert-balance`, to the loss.  The log shows the loss without it.

Ranks.  FSDP2 shards parameters, gradients and AdamW's moments over all ranks, or with `--replicas`
over groups of ranks that hold a copy each.  Masters and reductions are in fp32, products in
`--dtype`.  With `--context-parallel C`, C neighbours share each row; with `--expert-parallel E`, E
neighbours hold different experts: see `parallel.py`.  A rank reads only the records of its own
rows, but all ranks know the plan (data.Rows), and so the sums over all ranks.  All machines must
see the same files.

Interruptions.  All that training changes is in one State.  It is saved every `--save-every` steps,
copied at once and written while the training goes on, and after a SIGTERM, SIGUSR1 or Ctrl-C, which
let the step be finished.  The same command goes on with what `--out` holds, with any number of
ranks and workers: the rows of a step depend on data, seed and the step's number alone.  A directory
of a run holds

    mid.json       what a run must have in common with this one to go on
    mid-data/      where the samples are (data.Index), if the data are files
    mid-state/     states of the stage, step-00000500 and so on; the newest two
    mid/           the checkpoint, when the stage is done; the states are removed then
    ledger.jsonl   of each step: a digest of its samples, loss, gradient norm
    log.jsonl, rejects.jsonl

A step whose loss or gradient is not finite changes nothing, on no rank; three in a row end the run.
Exit codes: 0 done, 10 stopped and saved, 20 flags or the first checkpoint, 30 data, 40 numbers that
are not finite, 50 storage; anything else is a fault, with a traceback.

Accounting.  FLOPs of a row's forward pass, where N counts the weights of a part's matrices that a
token passes (K of X experts):

    decoder   2 N T + 4 layers H E sum over samples of L (L + 1) / 2, without its last MLP
    last MLP  2 N labels: other tokens do not pass it, nor the head
    ViT       2 N P + 4 layers D sum over frames of L^2,  merger  2 N P / 4,  head  2 C V labels

A backward pass costs two forward passes.  With frozen weights it costs one, and in front of the
first trained part nothing.  MFU divides these FLOPs by what the hardware can do in bf16, even where
`--fp8` computes some products at twice that rate.  HFU also counts what the backward pass computes
again.

Shapes: T tokens in a packed row, L of a sample or patches of a frame, P patches, C and D width of
decoder and ViT, H heads, E head width, V vocabulary, X experts.

Run `python train.py`: trains the tiny preset from random weights through all stages, in about 12
minutes on two CPU cores, and prints its accuracies.  A checkpoint of any size:
`torchrun --nproc-per-node 8 train.py --stage align --start-from DIR --data FILE`.  `--help` lists
all flags; `python -m benchmarks.plan` computes what a run needs.
"""

import fcntl
import gc
import hashlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import sys
import time
import timeit
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import cache, partial
from importlib.util import find_spec
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.distributed.elastic.multiprocessing.errors import record
from torch.utils.data import DataLoader

from assets.scenes import drawn_texts, train_tokenizer
from convert import (StateWriter, find_checkpoint, load_model, load_tokenizer, newest_state,
                     on_all_ranks, read_json_object, read_state, save_checkpoint, states_in, sync,
                     write_file, writing)
from data import (DRAWN, DrawnData, FileData, Index, Row, RowOfStep, Rows, add_fields, flag_parser,
                  lay_out, listed, open_index, reason_of, sentence_of, show_progress, source_files,
                  weight_of)
from fp8_kernel import check_device, convert_to_fp8
from model import (PRESETS, LlavaOneVision, ModelConfig, forward_flops, meta_model,
                   parameters_by_part, part_of)
from parallel import (Ranks, RowShare, clip_gradients, find_ranks, forget_lost, gradient_norm,
                      join_ranks, loss_arguments, mixtures, shard, share_row)
from sample import Chat, evaluate, held_out
from vision import MAX_PIXELS, MIN_PIXELS


EXIT_CODES = {"stopped": 10, "configuration": 20, "data": 30, "numerics": 40, "storage": 50}
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
PATIENCE = 3  # steps in a row that are not finite end a run


class RunError(Exception):
    """Why a run ends before its time.

    reason: one of EXIT_CODES; common: all ranks raise it, so that one of them says it for all.
    """

    def __init__(self, reason: str, sentence: str, common: bool = True) -> None:
        super().__init__(sentence)
        self.code = EXIT_CODES[reason]
        self.common = common


@contextmanager
def blamed_on(reason: str, kinds: Any = (ValueError, OSError),
              common: bool = False) -> Iterator[None]:
    """Turn an error of these kinds into a RunError."""
    try:
        yield
    except kinds as error:
        raise RunError(reason, sentence_of(error), common) from error


class StopSignals:
    """SIGTERM, SIGUSR1 and Ctrl-C stop a run: after a step is done and saved, elsewhere at once."""

    asked = False  # has one come?
    deferring = False  # is it enough to note that one has come?

    def note(self, number: int, frame: object) -> None:
        """The handler of the signals."""
        self.asked = True
        if not self.deferring:
            raise RunError("stopped", f"stopped by {signal.Signals(number).name}; what was saved "
                           "before is kept", common=False)


STOP = StopSignals()


def ignore_signals(worker: int) -> None:
    """For a worker process of the DataLoader, which ends when its parent does."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class Recipe:
    """What a stage trains, on which data, and how."""

    trainable: tuple[str, ...]  # parts that learn: "vision", "merger", "decoder"
    data: tuple[str, ...]  # default records, one of data.DRAWN; --data replaces them
    steps: int  # optimizer steps
    rows: int  # packed rows per step, of all ranks
    seq_length: int  # tokens in a row at most
    lr: float  # peak learning rate
    min_lr: float  # learning rate that the last steps approach
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
# Random weights learn at higher rates.  `align` has no embedding space to align to yet: fresh
# layers add nothing, so that no gradient reaches the merger.  It only shows the order of stages.
# Captions come first: every word of a caption is learnt, so the ViT learns to see several times
# as fast as from short answers.  The rate hardly falls before `instruct`: it falls once, at the end
# of the run.  In `instruct` captions stay among the questions; without them the model forgets how
# to read.
# On average an expert sees 2 of 8 tokens: it learns at half the rate.
TINY_MID = Recipe(
    trainable=ALL, data=("captions",), steps=700, rows=1, seq_length=2048,
    lr=1.25e-3, min_lr=1e-3, weight_decay=0.01, beta2=0.95, eps=1e-8, warmup=0.02,
    vision_lr_factor=0.25, merger_lr_factor=0.25, expert_lr_factor=0.5, recompute="none")
TINY = {
    "align": Recipe(
        trainable=MERGER, data=("captions",), steps=10, rows=1, seq_length=2048,
        lr=1e-3, min_lr=1e-4, weight_decay=0.0, beta2=0.95, eps=1e-8, warmup=0.1,
        recompute="none"),
    "mid": TINY_MID,
    "instruct": replace(TINY_MID, data=("mixed",), steps=1150, lr=1e-3, min_lr=2.5e-5),
}
# The recipe of assets/tiny.  A step has half of the tokens and 0.8 of the rate: as much is learnt
# from a token, but two threads take longer for it.
TINY_LONG = {
    "align": replace(TINY["align"], steps=20, seq_length=1024),
    "mid": replace(TINY["mid"], steps=4000, seq_length=1024, lr=1e-3, min_lr=8e-4),
    "instruct": replace(TINY["instruct"], steps=11000, seq_length=1024, lr=8e-4, min_lr=2e-5),
}
RECIPES = {"tiny": TINY, "tiny-long": TINY_LONG, "quick": QUICK, "full": FULL}
STAGES = tuple(QUICK)
SCENES = Path(__file__).parent / "assets" / "scenes.py"  # draws the default data
FROM_SCRATCH = ("tiny", "tiny-moe")  # presets that may start from random weights; default the first
SMALL = 100e6  # models of fewer parameters use the recipe tiny by default
GPUS = {"A100": 312e12, "A800": 312e12, "H100": 989e12, "H800": 989e12, "H200": 989e12,
        "B200": 2250e12}  # FLOP/s in dense bf16
RECOMPUTE = {  # what of the layers the backward pass computes again, by names of forward_flops
    "none": (),
    "selective": ("vision", "decoder"),  # all but attention
    "layer": ("vision", "decoder", "vision attention", "decoder attention"),
}


@dataclass(frozen=True)
class TrainConfig:
    """Command-line flags.  A flag of the recipe that is 0 or empty keeps the stage's own value."""

    model: str = ""  # a preset of model.py; default the size of --start-from, without it tiny
    stage: str = "all"  # align, mid, instruct, or all three one after the other
    recipe: str = ""  # tiny, tiny-long, quick or full; default quick, tiny below 100 M parameters
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
    save_every: int = 500  # steps between two saves of the run's state; 0: only when it is stopped
    resume: bool = True  # go on with the run that --out holds; --no-resume refuses to
    ledger: bool = False  # write the numbers of each step's samples to ledger.jsonl
    deterministic: bool = False  # the same bits on every run, at some cost
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
            least = 1 if entry.name in positive else 0
            # no comparison with NaN is true
            if isinstance(value, (int, float)) and not least <= value < math.inf:
                raise ValueError(f"{flag} must be {least} at least, and finite: it is {value}")
        if self.expert_parallel > 1 and self.recompute == "selective":
            raise ValueError("--expert-parallel goes with --recompute none or layer, not selective")
        self.check_data()

    def check_data(self) -> None:
        """Raise ValueError for flags about data that do not go together."""
        if self.steps and self.epochs:
            raise ValueError("--steps and --epochs are given: which is meant?")
        drawn = not self.data or set(self.data) & set(DRAWN)
        if self.epochs and drawn:
            raise ValueError("--epochs is for --data from files: drawn data do not end")
        if len(self.data) > 1 and drawn:
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
        # the flags that are given and have the name of a field of the recipe
        given = vars(self)
        changes = {name: given[name] for name in vars(recipe) if given.get(name)}
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
    model, _ = find_checkpoint(Path(start))
    if not config.model:
        return model.config
    # these three fields tell the presets apart
    for name in ("hidden_size", "num_hidden_layers", "num_experts"):
        size, wanted = getattr(model.config, name), getattr(preset, name)
        if size != wanted:
            raise ValueError(f"{start} is not of the size {config.model}: its {name} is {size}, "
                             f"not {wanted}; without --model any size is taken")
    return model.config


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
    model = LlavaOneVision(sizes_of(config, start)).init_weights(from_scratch=True)
    model = model.to(ranks.device)
    prepare(model)
    return model


# ------------------------------------------------------------------------------ an optimizer step


def make_optimizer(model: LlavaOneVision, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the parts that the stage trains; freezes the others."""
    groups = defaultdict(list)
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in recipe.trainable)
        if not parameter.requires_grad:
            continue
        if ".experts." in name:
            part = "expert"
        # vectors (norms, biases) do not decay
        decay = recipe.weight_decay if parameter.dim() > 1 else 0.0
        groups[part, decay].append(parameter)
    # the decoder has no factor of its own
    optimizer = torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay,
          "lr_factor": getattr(recipe, f"{part}_lr_factor", 1.0)}
         for (part, decay), parameters in groups.items()],
        lr=recipe.lr, betas=(0.9, recipe.beta2), eps=recipe.eps, fused=True)
    # AdamW would make its moments later: here, so that the state of a run always has them
    for parameter in chain.from_iterable(groups.values()):
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),  # float32, as AdamW's own
            "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return optimizer


def set_balance(model: LlavaOneVision, recipe: Recipe, weight: float) -> None:
    """Add `weight` times the experts' balance, averaged over layers and rows, to a step's loss.

    Frozen routers cannot learn balance: then nothing is added.
    """
    layers = mixtures(model)
    if "decoder" in recipe.trainable:
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


class State:
    """All that training changes: `train_step` works on it, and it is what is saved and resumed.

    The learning rate of step n follows from the recipe, and its rows from data, seed and n
    (data.Rows): so `step` is the position of the schedule and of the data.
    """

    def __init__(self, model: LlavaOneVision, recipe: Recipe) -> None:
        self.model = model
        self.recipe = recipe
        self.optimizer = make_optimizer(model, recipe)
        self.step = 0  # steps that are done
        self.refused = 0  # the last ones of these that were not finite, and changed no weight
        self.lost: set[int] = set()  # samples that could not be decoded

    def tensors(self, rank: int) -> dict[str, Tensor]:
        """The tensors to save; those of a sharded model are shards."""
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[name] = parameter.detach()
            # AdamW's moments, and how many steps it has made
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = value
        # training draws no random numbers, but a model that somebody changes may
        tensors[f"random.{rank}"] = torch.get_rng_state()
        if parameter.device.type == "cuda":
            tensors[f"random.cuda.{rank}"] = torch.cuda.get_rng_state()
        return tensors

    def numbers(self) -> dict[str, Any]:
        """What else to save."""
        return {"step": self.step, "refused": self.refused, "lost": sorted(self.lost)}

    def read(self, path: Path, rank: int) -> None:
        """Go on from a saved state, whatever number of ranks has saved it.

        Raises ValueError if it is of another model.
        """
        numbers = read_json_object(path / "state.json")
        rank %= numbers["ranks"]
        tensors = self.tensors(rank)
        read_state(path, tensors)
        torch.set_rng_state(tensors[f"random.{rank}"])
        if f"random.cuda.{rank}" in tensors:
            torch.cuda.set_rng_state(tensors[f"random.cuda.{rank}"])
        self.step = numbers["step"]
        self.refused = numbers["refused"]
        self.lost = set(numbers["lost"])


@dataclass
class Step:
    """What a rank trains on in one optimizer step, what all ranks do together, what came of it."""

    rows: Iterable[Row | RowShare]  # of this rank; from a loader they are read one at a time
    count: int  # rows of this rank
    sums: dict[str, float]  # over all ranks, from the plan: see data.RowOfStep
    balance: float  # mean over largest cost of the ranks' rows
    waited: float = 0.0  # seconds until the rows were there
    # of the samples of the rows that were read; of ranks that share a row, the first has them
    names: list[str] = field(default_factory=list)  # of their records
    numbers: list[int] = field(default_factory=list)  # in the data
    # samples that were not learnt: number in the data -> name and reason
    lost: dict[int, tuple[str, str]] = field(default_factory=dict)
    # the same on all ranks, when `train_step` is done
    loss: float = math.nan
    norm: float = math.nan  # of the gradient
    digest: str = ""  # of the numbers of all ranks' samples, in any order
    stop: bool = False  # is the run to stop?


def timed(loader: Iterable[RowOfStep]) -> Iterator[tuple[RowOfStep, float]]:
    """Rows, each with the seconds until it was there."""
    before = time.monotonic()
    with blamed_on("data"):
        for row in loader:
            yield row, time.monotonic() - before
            before = time.monotonic()


def steps_of(loader: Iterable[RowOfStep], count: int) -> Iterator[Step]:
    """Steps of `count` rows; a step reads its rows from the loader while they are trained on."""
    stream = timed(loader)

    # a generator: `backward` asks for the next row when it is done with one
    def rows_of(step: Step, first: RowOfStep) -> Iterator[Row | RowShare]:
        yield first.row
        for row, waited in islice(stream, count - 1):
            step.waited += waited
            yield row.row

    for first, waited in stream:
        step = Step((), count, first.sums, first.balance, waited)
        step.rows = rows_of(step, first)
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
        # ranks that share a row have the same samples: the first of them notes these
        if ranks.rank % ranks.context == 0:
            step.names += whole.names
            step.numbers += whole.numbers
        for i, reason in whole.lost.items():
            step.lost[whole.numbers[i]] = whole.names[i], reason
        loss = weight * model.loss(**loss_arguments(row, ranks))
        if ranks.mesh is not None:
            # copies of the model add their gradients once, after the last row
            model.set_requires_all_reduce(number == step.count)
        loss.backward()
        total[0] += loss.detach()
        total[1] += whole.labels
    return total


def digest_halves(numbers: list[int]) -> list[float]:
    """The sum of 64-bit hashes of samples, as sums of their upper and of their lower 32 bits.

    A sum does not depend on order, and float64 holds that of two million halves exactly.
    """
    hashes = [hashlib.blake2b(number.to_bytes(8, "little"), digest_size=8).digest()
              for number in numbers]
    halves = np.frombuffer(b"".join(hashes), ">u4").reshape(-1, 2)
    return halves.sum(0, dtype=np.float64).tolist()


def digest_text(upper: float, lower: float) -> str:
    """The digest of a set of samples, 16 hexadecimal digits, from `digest_halves`."""
    return f"{((int(upper) << 32) + int(lower)) % 2**64:016x}"


def train_step(state: State, step: Step, ranks: Ranks, stop: bool = False) -> None:
    """One optimizer step.  What came of it is noted in `step`, the same on all ranks.

    If the loss or the gradient is not finite, weights and moments stay as they are, on all ranks.
    stop: does this rank ask all ranks to stop after the step?
    """
    sums = backward(state.model, step, ranks)
    parameters = list(state.optimizer.state)  # those that are trained
    norm = gradient_norm(parameters, ranks.device)
    halves = digest_halves(step.numbers)  # meanwhile a GPU computes
    # all that the ranks tell each other, in one message: a NaN or a wish of one of them is in the
    # sum, and so all decide alike
    message = torch.tensor([*sums.tolist(), float(norm), *halves, stop], dtype=torch.float64,
                           device=ranks.device)
    if ranks.count > 1:
        dist.all_reduce(message)
    step.loss, labels, norms, upper, lower, wishes = message.tolist()
    step.norm = norms / ranks.count
    step.digest = digest_text(upper, lower)
    step.stop = wishes > 0

    if labels < step.sums["labels"]:
        # samples were lost, of which the plan did not know: the mean is over those that were learnt
        share = step.sums["labels"] / max(1.0, labels)
        step.loss *= share
        step.norm *= share
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad *= share
        step.lost = dict(gathered(step.lost.items()))
    if math.isfinite(step.loss + step.norm):
        clip_gradients(parameters, state.recipe.clip, step.norm)
        lr = learning_rate(state.step, state.recipe)
        for group in state.optimizer.param_groups:
            group["lr"] = lr * group["lr_factor"]
        state.optimizer.step()
        state.refused = 0
    else:
        state.refused += 1
    state.optimizer.zero_grad()
    state.step += 1


def gathered(items: Iterable[Any]) -> list[Any]:
    """The items of all ranks, in one list."""
    return list(chain(*on_all_ranks(lambda: list(items))))


# ------------------------------------------------------------------------------------- accounting


def training_flops(loads: dict[str, Any], config: ModelConfig, trainable: tuple[str, ...],
                   recompute: str) -> dict[str, Any]:
    """FLOPs of training on rows: all that the hardware does, and the part that MFU counts.

    loads: sums over the samples, see data.LOADS; each is a number, or an array of several rows.
    """
    total = {"hardware_flops": 0.0, "model_flops": 0.0}
    for name, flops in forward_flops(config, loads).items():
        part = "decoder" if name == "head" else name.split()[0]
        if part in trainable:
            passes = 3  # forward, gradient of the input, gradient of the weights
        elif part == "vision":
            passes = 1  # nothing before a frozen ViT needs a gradient
        else:
            passes = 2  # the weights are frozen, but gradients pass through
        total["model_flops"] += passes * flops

        # the head's logits are always computed again, layers with a backward pass as told
        if name == "head" or passes > 1 and name in RECOMPUTE[recompute]:
            passes += 1
        total["hardware_flops"] += passes * flops
    return total


def matrix_rate(ranks: Ranks) -> tuple[float, str]:
    """FLOP/s of one rank that count as an MFU of 100 %, and where the number comes from.

    For bfloat16 on a GPU in GPUS it is the data sheet's (SXM cards), else it is measured.
    """
    if ranks.device.type == "cuda" and ranks.dtype == torch.bfloat16:
        card = torch.cuda.get_device_name(ranks.device)
        for name, rate in GPUS.items():
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
    load = tokens / tokens.mean(1, keepdim=True).clamp(min=1e-6)  # 0 without labels, last layer
    return {"expert_most": load.amax(1).tolist(), "expert_least": load.amin(1).tolist(),
            "expert_balance": (balance / passes).tolist()}


# -------------------------------------------------------------------------- notes, saving, resuming


class Threads:
    """Computes with fewer threads while other programs take the CPU's cores.

    Threads wait for each other in a loop, since that is fastest while each has a core.  But if one
    has none, the others burn theirs: beside one busy program, two threads on two cores took 3 to 4
    times as long as alone, and one thread no longer than alone.
    """

    CHECK, RETRY = 3, 60  # seconds until the next look, and until all threads are tried again

    # who has chosen a number of threads, or how they wait, keeps that
    CHOSEN = {"OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}

    def __init__(self, run: "Run") -> None:
        self.run = run
        self.most = self.said = torch.get_num_threads()
        self.fixed = (run.ranks.device.type != "cpu" or run.ranks.count > 1
                      or run.config.deterministic or not self.CHOSEN.isdisjoint(os.environ))
        self.begin()

    def begin(self) -> None:
        """Before a stage, and before the evaluation: all threads."""
        self.changed = self.looked = time.monotonic()
        self.used = time.process_time()
        if not self.fixed:
            torch.set_num_threads(self.most)

    def fit(self, waited: float) -> None:
        """After a step, which waited so many seconds for its rows: choose the number of threads."""
        self.looked += waited  # leaves out time in which nothing is computed
        now = time.monotonic()
        if self.fixed or now - self.looked < self.CHECK:
            return
        # the cores that this process had, on average
        used = time.process_time()
        cores = (used - self.used) / (now - self.looked)
        self.looked, self.used = now, used

        wanted = threads = torch.get_num_threads()
        if threads > 1 and cores < 0.8 * threads:
            wanted = max(1, int(cores))
        elif now - self.changed > self.RETRY:
            wanted = self.most
        # of more threads it is not known yet whether they have cores: the next look says it
        if wanted <= threads and wanted != self.said:
            self.run.say(f"{wanted} of {self.most} threads: of the cores it had {cores:.1f}",
                         threads=wanted)
            self.said = wanted
        if wanted != threads:
            self.changed = now
            torch.set_num_threads(wanted)


class Run:
    """What the stages of a run share, and what the first rank writes of it.

    Its log is text on the console, JSON lines in a file, and curves for TensorBoard.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, tokenizer: Tokenizer,
                 model_name: str) -> None:
        self.config = config  # the flags
        self.ranks = ranks  # all processes, and which one this is
        self.tokenizer = tokenizer  # the model's
        name = config.out or f"runs/{model_name}-{time.strftime('%Y%m%d-%H%M%S')}"
        # clocks differ: all ranks take the name of the first one
        self.out = Path(on_all_ranks(lambda: name)[0])  # the directory that it writes to
        self.out.mkdir(parents=True, exist_ok=True)
        self.board = None  # TensorBoard's
        if ranks.rank == 0:
            self.open_log()
        self.threads = Threads(self)  # how many a CPU computes with

    def open_log(self) -> None:
        """Begin to log.  Raises RunError if another run does so here."""
        self.log = open(self.out / "log.jsonl", "a")
        # ranks outlive a torchrun that is killed: two runs would mix their steps and states
        try:
            fcntl.lockf(self.log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise RunError("configuration", f"another run writes to {self.out}: end its processes "
                           "first, or name another --out", common=False) from error
        except OSError:
            pass  # a file system without locks
        if self.config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(str(self.out))

    def say(self, text: str, **values: object) -> None:
        """Print the text and log the values; nothing on other ranks than the first."""
        if self.ranks.rank:
            return
        if text:
            show_progress(1, 1, "")  # removes the bar
            print(text, flush=True)
        self.log.write(json.dumps(values) + "\n")
        self.log.flush()
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

    def append(self, file: str, entry: dict) -> None:
        """Append a JSON line to a file of the run; the first rank does."""
        if self.ranks.rank:
            return
        with writing(self.out / file), open(self.out / file, "a") as lines:
            lines.write(json.dumps(entry) + "\n")


# the console's line about training steps; Meter.write fills it in
LOG_LINE = ("{stage:8} {step:6}/{steps}  loss {loss:.4f}  lr {lr:.2e}  norm {norm:.2f}  "
            "{tokens_per_second:,.0f} tok/s  {labels_per_second:,.0f} labels/s  "
            "{images_per_second:,.0f} images/s  pad {padding:.1%}  wait {wait:.0%}  MFU {mfu:.0%}  "
            "HFU {hfu:.0%}  {memory_gib:.1f} GiB  {left} left")


class Meter:
    """Sums over the steps of a stage since the last line of the log; writes that line."""

    def __init__(self, stage: str, state: State, run: Run) -> None:
        self.stage, self.state, self.run = stage, state, run
        run.threads.begin()
        self.rate, source = matrix_rate(run.ranks)
        self.first = state.step
        self.started = self.last = time.monotonic()
        self.seen = Counter()  # sums
        self.lost = Counter()  # samples, by what is wrong with them
        recipe = state.recipe
        run.say(f"{stage}: {', '.join(recipe.trainable)} trained, {recipe.steps} steps of "
                f"{recipe.rows} rows; MFU of {run.ranks.count} x {self.rate / 1e12:.3g} TFLOP/s "
                f"({source})", recipe=asdict(recipe), matrix_rate=self.rate)

    def add(self, step: Step) -> None:
        """Count a step; write a line every --log-every steps, and after the last."""
        self.run.threads.fit(step.waited)
        self.seen.update(step.sums, steps=1, waited=step.waited, balance=step.balance)
        self.lost.update(reason_of(reason) for _, reason in step.lost.values())
        if not self.state.refused:
            self.seen.update(updates=1, loss=step.loss, norm=step.norm)
        done, steps = self.state.step, self.state.recipe.steps
        now = time.monotonic()
        # as long a step as the mean of those since the stage was begun, or gone on with
        left = (now - self.started) / (done - self.first) * (steps - done)
        if done % self.run.config.log_every == 0 or done == steps:
            self.write(now - self.last, left)
            self.last = now
            self.seen.clear()
            self.lost.clear()
        if self.run.ranks.rank == 0:
            show_progress(done, steps, f"{self.stage}, {left:.0f} s left")

    def write(self, seconds: float, left: float) -> None:
        """Write the line; seconds: since the last one; left: to the end of the stage."""
        seen, recipe, ranks = self.seen, self.state.recipe, self.run.ranks
        updates = max(1, seen["updates"])
        # nothing computes padding: it is the room that samples leave free in the rows
        room = seen["steps"] * recipe.rows * recipe.seq_length
        flops = seconds * self.rate * ranks.count  # that were possible
        values = {"stage": self.stage, "step": self.state.step, "loss": seen["loss"] / updates,
                  "norm": seen["norm"] / updates, "lr": learning_rate(self.state.step - 1, recipe),
                  "padding": 1 - seen["tokens"] / room, "wait": seen["waited"] / seconds,
                  "rank_balance": seen["balance"] / seen["steps"],
                  "mfu": seen["model_flops"] / flops, "hfu": seen["hardware_flops"] / flops,
                  "memory_gib": peak_memory(ranks.device) / 2**30,  # of the first rank
                  "seconds_left": left, "lost": self.lost.total()}
        for name in ("tokens", "labels", "samples", "images"):
            values[f"{name}_per_second"] = seen[name] / seconds
        text = LOG_LINE.format(**values, steps=recipe.steps, left=timedelta(seconds=round(left)))
        if self.lost:
            kinds = [f"{count} {kind}" for kind, count in self.lost.items()]
            text += f"  lost: {', '.join(kinds)}"
        # on all ranks, whose numbers it sums
        routed = routing(self.state.model, ranks)
        if routed:
            balances = routed["expert_balance"]
            text += (f"  expert load {min(routed['expert_least']):.2f}-"
                     f"{max(routed['expert_most']):.2f}, balance "
                     f"{sum(balances) / len(balances):.3f}")
        self.run.say(text, **values, **routed)


def note_step(step: Step, state: State, stage: str, run: Run) -> None:
    """Add to the ledger what a step has trained on, and what came of it."""
    entry = {"stage": stage, "step": state.step, "samples": step.sums["samples"],
             "digest": step.digest}
    for name in ("loss", "norm"):
        value = getattr(step, name)
        entry[name] = value if math.isfinite(value) else str(value)  # NaN is no JSON
    if run.config.ledger:
        entry["numbers"] = sorted(gathered(step.numbers))
    run.append("ledger.jsonl", entry)


def note_refused(step: Step, state: State, stage: str, run: Run) -> None:
    """Log a step that was not finite, with its samples.  RunError after PATIENCE of them."""
    names = list(dict.fromkeys(gathered(step.names)))
    said = (f"the loss of step {state.step} of stage {stage} is {step.loss}, its gradient norm "
            f"{step.norm}; no weight was changed; its samples are "
            f"{listed(names, 'log.jsonl has all')}")
    run.say(said, samples=names, loss=str(step.loss), norm=str(step.norm))
    if state.refused == PATIENCE:
        raise RunError("numerics", f"{PATIENCE} steps in a row were not finite; {said}")


def note_lost(step: Step, state: State, data: FileData | DrawnData, stage: str, run: Run) -> None:
    """Add the samples that a step has lost to rejects.jsonl.

    Raises RunError if more than --max-bad of all samples are lost; one may always be.
    """
    for number, (name, reason) in step.lost.items():
        # a later epoch meets the same samples again
        if number not in state.lost:
            state.lost.add(number)
            run.append("rejects.jsonl", {"stage": stage, "step": state.step, "sample": number,
                                         "record": name, "reason": reason})
    samples = len(data.index.table)
    if len(state.lost) > max(1, run.config.max_bad * samples):
        raise RunError("data", f"{len(state.lost)} of {samples:,} samples are lost, more than "
                       f"--max-bad {run.config.max_bad} allows: see {run.out / 'rejects.jsonl'}; "
                       f"the last: {reason}")


def digest_of(files: list[Path]) -> str:
    """16 digits of the sha256 of the files, one after another."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def settings_of(config: TrainConfig, recipe: Recipe, ranks: Ranks) -> dict[str, object]:
    """What a stage that is resumed must have in common with the one that was begun."""
    flags = ("model", "start_from", "images", "epochs", "skip_bad", "expert_balance", "fp8", "seed")
    settings = {flag: getattr(config, flag) for flag in flags} | asdict(recipe) | {
        "dtype": str(ranks.dtype), "device": ranks.device.type}
    del settings["recompute"]  # it changes no number
    if recipe.data[0] in DRAWN:  # the code decides what is drawn, and so the tokens
        settings["scenes"] = digest_of([SCENES])
    return json.loads(json.dumps(settings))  # as it comes back from a file


def is_begun(stage: str, settings: dict[str, object], config: TrainConfig) -> bool:
    """Has the run in --out begun this stage?

    Raises ValueError if it has, but with other settings or without leave to go on.
    """
    file = Path(config.out, f"{stage}.json")
    if not config.out:
        return False
    if not file.exists():
        # they alone do not say how they were made
        for path in (file.with_suffix(""), *states_in(Path(config.out, f"{stage}-state"))):
            if path.exists():
                raise ValueError(f"{path} is there already, but no {file} says with which settings "
                                 "it was made")
        return False
    if not config.resume:
        raise ValueError(f"{config.out} has a stage {stage} already: --no-resume forbids to go on")
    before = read_json_object(file)
    changed = [f"{name} was {before.get(name)!r} and is {settings.get(name)!r}"
               for name in sorted({*before, *settings}) if before.get(name) != settings.get(name)]
    if changed:
        raise ValueError(f"{config.out} holds a stage {stage} of another configuration: "
                         f"{', '.join(changed)}; give the same flags, or another --out")
    return True


@cache  # of the files as they were when the run began to save, and read once
def code_version() -> str:
    """A digest of the source files that a run executes."""
    here = Path(__file__).parent
    return digest_of([*sorted(here.glob("*.py")), SCENES])


def save(state: State, writer: StateWriter, settings: dict[str, object], run: Run) -> None:
    """Begin to save the state of a run; the training waits only while it is copied."""
    started = time.monotonic()
    about = state.numbers() | {"ranks": run.ranks.count, "settings": settings,
                               "code": code_version(), "torch": torch.__version__}
    if run.ranks.rank == 0:
        sync(run.out / "ledger.jsonl")
    with blamed_on("storage", common=True):
        writer.write(state.step, state.tensors(run.ranks.rank), about)
    run.say("", saved_step=state.step, paused=time.monotonic() - started)


def drop_after(file: Path, stage: str, step: int) -> None:
    """Remove the lines of a stage after a step: these steps will come again."""
    if not file.exists():
        return
    lines = file.read_text().splitlines(keepends=True)
    # the last line may have been cut
    entries = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
    kept = [line for line, entry in entries if entry["stage"] != stage or entry["step"] <= step]
    write_file(file, "".join(kept))


def go_on(state: State, stage: str, run: Run) -> None:
    """Read the newest whole state of a stage that was begun, if there is one."""
    path, damaged = newest_state(run.out / f"{stage}-state")
    for sentence in damaged:
        run.say(f"{sentence}: it is not used")
    if path is not None:
        state.read(path, run.ranks.rank)
        run.say(f"{stage}: goes on after step {state.step}, from {path}", resumed=state.step)
    if run.ranks.rank == 0:
        for file in ("ledger.jsonl", "rejects.jsonl"):
            drop_after(run.out / file, stage, state.step)


# ------------------------------------------------------------------------------- a run, end to end


def open_data(recipes: dict[str, Recipe], begun: list[str], tokenizer: Tokenizer,
              config: TrainConfig, ranks: Ranks) -> dict[str, FileData]:
    """On the first rank, the data of the stages that are trained on files, and have not begun.

    Raises OSError, on all ranks, for data that cannot be used, also of a stage that has begun.
    """
    found = {}

    @cache  # stages with the same limits share an index
    def index_of(pixels: tuple[int, int]) -> Index:
        index = open_index(config.data, tokenizer, config.images, pixels, os.cpu_count() or 1)
        index.check(config.skip_bad)
        return index

    def open_all() -> None:
        for name, recipe in recipes.items():
            if ranks.rank or recipe.data[0] in DRAWN:
                continue
            if name in begun:
                # its index is beside the run: that must be whole, and the files must be there
                Index.load(Path(config.out, f"{name}-data"))
                source_files(*(weight_of(source)[0] for source in recipe.data))
            else:
                index = index_of((recipe.min_pixels, recipe.max_pixels))
                found[name] = FileData(index, tokenizer, recipe.seq_length, config.seed)

    on_all_ranks(open_all)
    return found


def stage_data(name: str, recipe: Recipe, data: FileData | None,
               run: Run) -> tuple[FileData | DrawnData, Recipe]:
    """The data of a stage, and its recipe, with the steps of --epochs if that is given.

    data: what the first rank has just opened.  It keeps the index beside the run, where the other
    ranks find it, and all ranks when the stage goes on.
    """
    seed = run.config.seed
    if recipe.data[0] in DRAWN:
        return DrawnData(recipe.data[0], run.tokenizer, recipe.seq_length, seed, recipe.rows,
                         (recipe.min_pixels, recipe.max_pixels)), recipe
    folder = run.out / f"{name}-data"
    if data is not None:
        with blamed_on("storage"), writing(folder):
            folder.mkdir(exist_ok=True)
            data.index.save(folder)
    if run.ranks.count > 1:
        dist.barrier()
    # all ranks plan with the same table, whatever has become of the files
    data = data or FileData(Index.load(folder), run.tokenizer, recipe.seq_length, seed)

    rows = data.rows_in(0)
    if run.config.epochs:
        # epochs differ a little in their rows; of the last one, a part may be wanted
        whole, part = divmod(run.config.epochs, 1)
        seen_rows = sum(map(data.rows_in, range(int(whole)))) + part * rows
        recipe = replace(recipe, steps=math.ceil(seen_rows / recipe.rows))
    packed = " as they were packed" if data.packed else ""
    run.say(f"{name}: an epoch is {data.total:,} samples in {rows:,} rows{packed}, "
            f"{rows / recipe.rows:,.1f} steps; left out: {data.too_long:,} samples longer than a "
            f"row, {len(data.index.rejects):,} bad records, what is damaged of "
            f"{len(data.index.damaged)} files",
            samples=data.total, rows=rows, too_long=data.too_long, damaged=data.index.damaged)
    return data, recipe


def row_loader(data: FileData | DrawnData, sizes: ModelConfig, recipe: Recipe, workers: int,
               ranks: Ranks, done: int = 0) -> DataLoader:
    """The rows of this rank, prepared by worker processes, from the first step after `done` on."""
    cut = lay_out
    if ranks.context > 1:
        # neighbours read the same rows, and each cuts its own part of them
        cut = partial(share_row, rank=ranks.rank % ranks.context, ranks=ranks.context,
                      visual_ids=[sizes.image_token_id, sizes.video_token_id])
    cost = partial(training_flops, config=sizes, trainable=recipe.trainable,
                   recompute=recipe.recompute)
    rows = Rows(data, recipe.rows, ranks.rank // ranks.context, ranks.data_ranks, cost, cut)
    of_rank = recipe.rows // ranks.data_ranks
    return DataLoader(rows, batch_size=None, num_workers=workers,
                      sampler=range(done * of_rank, recipe.steps * of_rank),
                      prefetch_factor=max(1, 4 // workers) if workers else None,
                      worker_init_fn=ignore_signals,
                      pin_memory=ranks.device.type == "cuda")


def train_stage(name: str, model: LlavaOneVision, recipe: Recipe, data: FileData | None,
                run: Run) -> None:
    """Train the model, in place, with the recipe of one stage."""
    config, ranks = run.config, run.ranks
    settings = settings_of(config, recipe, ranks)
    with blamed_on("data"):
        data, recipe = stage_data(name, recipe, data, run)
    state = State(model, recipe)
    set_balance(model, recipe, config.expert_balance)
    if ranks.rank == 0:
        write_file(run.out / f"{name}.json", json.dumps(settings, indent=1))
    writer = StateWriter(run.out / f"{name}-state", ranks.device.type == "cuda")
    go_on(state, name, run)
    # nothing is replayed: the loader begins at the next step
    loader = row_loader(data, model.config, recipe, config.workers, ranks, state.step)
    meter = Meter(name, state, run)
    for step in steps_of(loader, recipe.rows // ranks.data_ranks):
        train_step(state, step, ranks, stop=STOP.asked or writer.failed())
        note_step(step, state, name, run)
        if state.refused:
            note_refused(step, state, name, run)
        if step.lost:
            note_lost(step, state, data, name, run)
        meter.add(step)

        due = config.save_every and state.step % config.save_every == 0
        if (step.stop or due) and state.step < recipe.steps:
            save(state, writer, settings, run)
        if step.stop:
            break
    with blamed_on("storage", common=True):
        writer.wait()
    if state.step < recipe.steps:
        raise RunError("stopped", f"stopped and saved after step {state.step} of stage {name}; "
                       f"the same command with --out {run.out} goes on")


def finish_stage(name: str, model: LlavaOneVision, run: Run) -> None:
    """Write the checkpoint of a stage, and remove its states."""
    if run.ranks.rank == 0:
        for left in run.out.glob(f"{name}.*.partial"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
    with blamed_on("numerics", ValueError, common=True):
        save_checkpoint(model, run.tokenizer, run.out / name)
    if run.ranks.rank == 0:
        shutil.rmtree(run.out / f"{name}-state")
    if any(on_all_ranks(lambda: STOP.asked)):
        raise RunError("stopped", f"stopped after stage {name}, which is saved; the same command "
                       f"with --out {run.out} goes on")


def report(found: dict[str, list[float]], run: Run) -> None:
    """Log the accuracies by category, in per cent, and their means over scenes and over flags."""
    groups = {"flags": {}, "scenes": {}}
    for name, values in found.items():
        group = "flags" if name.startswith("flag") else "scenes"
        groups[group][name] = 100 * sum(values) / len(values)
    for group, scores in groups.items():
        mean = sum(scores.values()) / len(scores)
        detail = [f"{name.removeprefix('flag ')} {score:.0f}" for name, score in scores.items()]
        run.say(f"held-out {group}: {mean:.1f} %   ({'  '.join(detail)})", group=group, mean=mean,
                **scores)


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
              recipes: dict[str, Recipe]) -> tuple[Tokenizer, list[str]]:
    """Raise ValueError for what cannot run, before a model is loaded or a file is written.

    Returns the tokenizer, and the stages that the run has begun, in order.
    """
    check_experts(config, sizes)
    if config.fp8:
        check_device(ranks.device)
        convert_to_fp8(meta_model(sizes))  # refuses widths that FP8 cannot take
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and not config.out:
        raise ValueError("a run that torchrun restarts must be named by --out, to go on")
    begun = []
    for name, recipe in recipes.items():
        if is_begun(name, settings_of(config, recipe, ranks), config):
            begun.append(name)
        if recipe.rows % ranks.data_ranks:
            raise ValueError(f"the {recipe.rows} rows of a step of stage {name} cannot be dealt "
                             f"to {ranks.data_ranks} ranks or groups of ranks: choose --rows")
    finished = [name in begun and Path(config.out, name).is_dir() for name in recipes]
    if finished != sorted(finished, reverse=True):  # a stage would start from a later one
        names = ", ".join(name for name, done in zip(recipes, finished) if done)
        raise ValueError(f"{config.out} has {names}, but not the stages before: name the --stage "
                         "that is wanted, or another --out")
    if config.tensorboard and find_spec("tensorboard") is None:
        raise ValueError("--tensorboard needs a package that is not here: pip install tensorboard")

    if start:
        return load_tokenizer(Path(start), sizes), begun
    return train_tokenizer(drawn_texts(config.seed), sizes.vocab_size), begun


def make_deterministic() -> None:
    """Make two runs of this process the same, bit for bit."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    # of two threads of a CPU's matrix library, now one and now the other adds first
    torch.set_num_threads(1)


def run(config: TrainConfig) -> Path:
    """Train the stages, save a checkpoint after each, evaluate; returns the last checkpoint."""
    if config.deterministic:
        make_deterministic()
    ranks = find_ranks(config.device, config.dtype, config.replicas, config.context_parallel,
                       config.expert_parallel)
    start = start_of(config)
    sizes = sizes_of(config, start)
    model_name = name_of(config, start)
    recipes = config.recipes(sizes)
    tokenizer, begun = check_run(config, ranks, start, sizes, recipes)
    ranks = join_ranks(ranks)
    for name in begun:
        directory = Path(config.out, name)
        if directory.is_dir():  # an earlier command has finished this stage
            start = str(directory)
            del recipes[name]
            # but it may have been killed before it removed the states
            if ranks.rank == 0:
                shutil.rmtree(f"{directory}-state", ignore_errors=True)
    # bad data are refused here, before the run has a directory
    with blamed_on("data", common=True):
        data = open_data(recipes, begun, tokenizer, config, ranks)
    whole = Run(config, ranks, tokenizer, model_name)
    whole.say(f"{model_name}: {sum(parameters_by_part(sizes).values()):,} parameters on "
              f"{ranks.count} x {ranks.device.type} ({ranks.replicas} copies, rows shared by "
              f"{ranks.context}, experts by {ranks.experts}), {ranks.dtype}"
              f"{', FP8' if config.fp8 else ''}, torch {torch.__version__}, "
              f"{torch.get_num_threads()} threads -> {whole.out}",
              config=asdict(config))

    for name, recipe in recipes.items():
        model = load_stage(start, recipe, config, ranks)
        # from here on, a signal lets the step or the checkpoint be finished
        STOP.deferring = True
        try:
            train_stage(name, model, recipe, data.get(name), whole)
            finish_stage(name, model, whole)
        finally:
            STOP.deferring = False
        start = str(whole.out / name)
        # hooks tie a sharded model into cycles, and the next model needs its memory
        del model
        gc.collect()

    if ranks.mesh is not None:
        dist.destroy_process_group()
    if ranks.rank == 0 and config.questions and not config.data:
        whole.threads.begin()
        model = load_model(start, ranks.dtype, ranks.device)
        # a question and its answer have at most some hundred tokens
        chat = Chat(model, tokenizer, context=512, slots=50)
        report(evaluate(chat, held_out(config.questions), max_new_tokens=24), whole)
    whole.say(f"saved: {start}", saved=start)
    return Path(start)


def parse_flags(arguments: list[str]) -> TrainConfig:
    """Build the command line from TrainConfig's fields."""
    parser = flag_parser(__doc__.splitlines()[0], arguments)
    add_fields(parser, TrainConfig)
    flags = vars(parser.parse_args(arguments))
    flags["data"] = tuple(flags["data"])
    return TrainConfig(**flags)


def end_workers() -> None:
    """Kill the processes that prepare rows, in a run that ends early.

    At its exit Python sends them SIGTERM, which they ignore, and waits until they have ended.
    """
    # the DataLoader's handler would raise an error about a worker that was killed
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        worker.kill()


@record  # torchrun repeats an unexpected error with its rank and host
def main() -> None:
    """Run the command.  A run that ends early says why in one line, and in its exit code."""
    rank = int(os.environ.get("RANK", "0"))
    for number in SIGNALS:
        signal.signal(number, STOP.note)
    try:
        with blamed_on("storage", OSError), blamed_on("configuration", ValueError):
            run(parse_flags(sys.argv[1:]))
    except RunError as end:
        STOP.deferring = True  # a second signal must not break off the end
        reported = False  # by the first rank
        # most errors before the ranks join are all ranks' errors, too
        if rank and (end.common or not dist.is_initialized()):
            time.sleep(2)  # torchrun ends all ranks as soon as one ends: the first must report
            reported = end.common or STOP.asked
        if not reported:
            place = f"rank {rank} on {socket.gethostname()}: " if rank else ""
            print(f"train.py: {place}{end}", file=sys.stderr, flush=True)
        sys.exit(end.code)
    finally:
        end_workers()


if __name__ == "__main__":
    main()
