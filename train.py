"""Three stages of training: packed rows -> a model that answers questions about pictures.

In: a preset with fresh weights, or a checkpoint directory.  Out: one checkpoint directory a stage,
in the released layout, under `runs/`; a log; accuracies on held-out questions.
Run by people; calls `model.py`, `data.py`, `convert.py`.

The idea.  The stages of LLaVA-OneVision-1.5 differ in what is trained, on what, and how fast:

    align     only the merger learns, from captions: it finds the decoder's embedding space
    mid       everything learns, from captions: knowledge, and eyes
    instruct  everything learns, from questions and answers: behaviour

Each stage is the same loop.  A step takes `rows` packed rows; with n_r label tokens in row r and
l_rt the cross entropy of one of them, the loss of the step is the mean over *tokens*,

    loss = sum_r sum_t l_rt / sum_r n_r,

whatever the number of rows they are spread over; gradients are clipped to norm 1; AdamW; the
learning rate climbs linearly, then falls on a cosine from `lr` to `min_lr`.

Shapes: T tokens in a packed row, as in `model.py`.

Run `python train.py`: trains the tiny preset from scratch through all stages in about ten minutes
on two CPU cores and prints its accuracies.  `--help` lists every flag.
"""

import inspect
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TextIO

import torch
from tokenizers import Tokenizer
from torch import Tensor

from convert import load_checkpoint, save_checkpoint
from data import (Batch, PackedRows, choose_device, default_texts, encode, flag_parser,
                  held_out_questions, pack, records, train_tokenizer)
from model import PRESETS, LlavaOneVision
from vision import MAX_PIXELS, MIN_PIXELS


@dataclass(frozen=True)
class Recipe:
    """What a stage trains, on what, and how."""

    trainable: tuple[str, ...]  # of "vision", "merger", "decoder"
    data: str  # default records, see data.records; --data replaces it
    steps: int  # optimizer steps
    rows: int  # packed rows per step
    seq_length: int  # tokens in a row at most
    lr: float  # peak learning rate
    min_lr: float  # what the rate falls to
    weight_decay: float  # on matrices only
    beta2: float  # AdamW's second; the first is 0.9
    eps: float = 1e-8  # AdamW's
    warmup: float = 0.002  # share of the steps
    vision_lr: float = 1.0  # factor on the learning rate of ViT and merger
    clip: float = 1.0  # largest gradient norm


MERGER, ALL = ("merger",), ("vision", "merger", "decoder")
# The quick start's numbers; its instruct stage takes 224 unpacked samples a step, about 6 rows.
RELEASED = {
    "align": Recipe(MERGER, "captions", 2500, 8, 32768, 1e-4, 1e-6, 0.0, 0.99, 1e-5),
    "mid": Recipe(ALL, "captions", 20000, 16, 32768, 1e-5, 1e-6, 0.01, 0.95, 1e-5),
    "instruct": Recipe(ALL, "questions", 3500, 6, 32768, 1e-5, 1e-6, 0.0, 0.99, 1e-5),
}
# From random weights everything is faster and shorter, and `align` has nothing to align to yet.
# Captions come first: all of their words are learnt, so they teach the ViT to see several times as
# fast as short answers do; then they stay mixed among the questions, or reading is forgotten.
TINY = {
    "align": Recipe(MERGER, "captions", 20, 1, 1024, 1e-3, 1e-4, 0.0, 0.95, warmup=0.1),
    "mid": Recipe(ALL, "captions", 900, 1, 1024, 2e-3, 2e-4, 0.01, 0.95, warmup=0.02,
                  vision_lr=0.25),
    "instruct": Recipe(ALL, "mixed", 3600, 1, 1024, 1.5e-3, 3e-5, 0.01, 0.95, warmup=0.02,
                       vision_lr=0.25),
}


@dataclass(frozen=True)
class TrainConfig:
    """Command-line flags; 0 or an empty text means the stage's own value."""

    model: str = "tiny"  # a preset of model.py; also chooses the recipes
    stage: str = "all"  # align, mid, instruct, or all three in a row
    start: str = ""  # checkpoint directory to start from; fresh weights without
    out: str = ""  # directory of the run; default runs/MODEL-DATE-TIME
    data: str = ""  # captions, questions, mixed, or a .json, .jsonl or .tar file
    steps: int = 0  # optimizer steps of each stage
    longer: float = 1.0  # factor on the steps of every stage
    rows: int = 0  # packed rows per step
    seq_length: int = 0  # tokens in a row
    lr: float = 0.0  # peak learning rate; the lowest keeps its share of it
    max_pixels: int = MAX_PIXELS  # largest area of a picture, larger ones are shrunk
    seed: int = 0  # of weights and data
    workers: int = 1  # processes that prepare rows
    log_every: int = 50  # steps
    questions: int = 100  # held-out questions per category, asked at the end if data is not given
    device: str = ""  # cpu or cuda; default cuda where there is one

    def __post_init__(self) -> None:
        if self.model not in PRESETS:
            raise ValueError(f"there is no model {self.model!r}, only {', '.join(PRESETS)}")
        if self.stage not in ("all", *RELEASED):
            raise ValueError(f"there is no stage {self.stage!r}, only all, {', '.join(RELEASED)}")
        if self.model != "tiny" and not self.start:
            raise ValueError(f"{self.model} starts from a checkpoint: name it with --start")
        for name in ("steps", "rows", "seq_length", "lr", "workers", "questions"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} must not be negative")
        if not 0 < self.longer < math.inf or not self.lr < math.inf or self.log_every < 1:
            raise ValueError("--longer, --lr and --log-every must be positive numbers")
        if self.max_pixels < MIN_PIXELS:
            raise ValueError(f"--max-pixels must be at least {MIN_PIXELS}")

    def recipes(self) -> dict[str, Recipe]:
        """The stages to run, with the flags applied."""
        table = TINY if self.model == "tiny" else RELEASED
        names = list(table) if self.stage == "all" else [self.stage]
        given = {name: getattr(self, name) for name in ("data", "steps", "rows", "seq_length", "lr")
                 if getattr(self, name)}
        chosen = {}
        for name in names:
            recipe = replace(table[name], **given)
            chosen[name] = replace(recipe, steps=max(1, round(recipe.steps * self.longer)),
                                   min_lr=table[name].min_lr * recipe.lr / table[name].lr)
        return chosen


# -------------------------------------------------------------------------- what a stage is made of


def fresh_model(config: TrainConfig) -> tuple[LlavaOneVision, Tokenizer]:
    """The tiny preset with random weights, and a tokenizer learnt from its data."""
    preset = PRESETS[config.model]
    tokenizer = train_tokenizer(default_texts(config.seed), preset.vocab_size)
    torch.manual_seed(config.seed)
    return LlavaOneVision(preset).init_weights(), tokenizer


def part_of(name: str) -> str:
    """The part a parameter belongs to: "vision", "merger" or "decoder"."""
    if name.startswith("visual."):
        return "merger" if name.startswith("visual.merger.") else "vision"
    return "decoder"


def make_optimizer(model: LlavaOneVision, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the stage's parts; freezes the others.  Vectors (norms, biases) do not decay."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part_of(name) in recipe.trainable)
        if parameter.requires_grad:
            key = (part_of(name) != "decoder", parameter.dim() > 1)
            groups.setdefault(key, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "lr_factor": recipe.vision_lr if vision else 1.0,
          "weight_decay": recipe.weight_decay if matrix else 0.0}
         for (vision, matrix), parameters in groups.items()],
        lr=recipe.lr, betas=(0.9, recipe.beta2), eps=recipe.eps, fused=True)


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine from lr to min_lr; step counts from 0."""
    warmup = max(1, round(recipe.warmup * recipe.steps))
    if step < warmup:
        return recipe.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, recipe.steps - warmup)
    return recipe.min_lr + (recipe.lr - recipe.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def train_step(model: LlavaOneVision, optimizer: torch.optim.AdamW, rows: list[Batch], lr: float,
               clip: float) -> tuple[float, float]:
    """One optimizer step over the rows; returns loss (mean over label tokens), gradient norm."""
    device = model.lm_head.weight.device
    labels = sum(int((row.targets >= 0).sum()) for row in rows)
    total = torch.zeros((), device=device)
    for row in rows:
        loss = model.loss(targets=row.targets.to(device), **row.inputs(device)) / max(1, labels)
        if loss.requires_grad:  # a row without pictures teaches the merger nothing
            loss.backward()
        total += loss.detach()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]
    optimizer.step()
    optimizer.zero_grad()
    return float(total), float(norm)


def matrix_weights(model: LlavaOneVision) -> dict[str, int]:
    """Weights of the matrices that every token or patch of a part passes, by part."""
    weights = dict.fromkeys(ALL, 0)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed_tokens" not in name and "lm_head" not in name:
            weights[part_of(name)] += parameter.numel()
    return weights


def flops_of(row: Batch, model: LlavaOneVision, weights: dict[str, int],
             trainable: tuple[str, ...]) -> float:
    """Floating-point operations that training on a row needs, recomputation not counted.

    Forward, 2 per weight and token of every matrix, and 4 E per head and pair of tokens that see
    each other.  Backward, as much again for the gradient of the input and, where a part learns, of
    its weights; a ViT that does not learn has no backward pass.
    """
    config, vision = model.config, model.config.vision
    frames = torch.zeros(0)
    if row.grid_thw is not None:
        frames = torch.repeat_interleave(row.grid_thw[:, 1:].prod(dim=1), row.grid_thw[:, 0])
    patches, labels = float(frames.sum()), int((row.targets >= 0).sum())
    causal_pairs = float(row.cu_seqlens.diff().square().sum()) / 2
    query_width = config.num_attention_heads * config.head_dim
    forward = {
        "vision": 2 * weights["vision"] * patches
        + 4 * vision.depth * vision.embed_dim * float(frames.square().sum()),
        "merger": 2 * weights["merger"] * patches / 4,
        "decoder": 2 * weights["decoder"] * len(row.input_ids)
        + 2 * model.lm_head.weight.numel() * labels
        + 4 * config.num_hidden_layers * query_width * causal_pairs}
    frozen = {"vision": 1, "merger": 2, "decoder": 2}
    return sum((3 if part in trainable else frozen[part]) * n for part, n in forward.items())


def matrix_rate(device: torch.device) -> float:
    """FLOP/s of the best of five products of two 2048 x 2048 fp32 matrices."""
    a = torch.randn(2048, 2048, device=device)
    seconds = []
    for _ in range(6):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        float((a @ a)[0, 0])  # reading a number waits for the product
        seconds.append(time.perf_counter() - started)
    return 2 * 2048**3 / min(seconds[1:])


class Log:
    """One line per log step on the console, the same as JSON lines in a file, a progress bar."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.terminal = sys.stdout.isatty()

    def line(self, text: str, **values: float | str) -> None:
        print(("\r\033[K" if self.terminal else "") + text, flush=True)
        self.file.write(json.dumps(values) + "\n")
        self.file.flush()

    def progress(self, stage: str, step: int, steps: int, started: float) -> None:
        """Redraw the bar; on a terminal only."""
        if self.terminal:
            left = (time.monotonic() - started) / step * (steps - step)
            bar = "#" * (30 * step // steps)
            print(f"\r\033[K{stage} [{bar:30}] {step}/{steps}, {left:.0f} s left", end="",
                  flush=True)


def train_stage(name: str, model: LlavaOneVision, tokenizer: Tokenizer, recipe: Recipe,
                config: TrainConfig, log: Log) -> None:
    """Run one stage; the model is changed in place."""
    optimizer = make_optimizer(model, recipe)
    peak, weights = matrix_rate(model.lm_head.weight.device), matrix_weights(model)
    dataset = PackedRows(recipe.data, tokenizer, recipe.seq_length, config.seed, config.max_pixels)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=None, num_workers=config.workers,
        prefetch_factor=4 if config.workers else None)
    stream = iter(loader)
    started = mark = time.monotonic()
    waited, losses = 0.0, []
    seen = {"tokens": 0, "labels": 0, "samples": 0, "skipped": 0, "flops": 0.0}
    for step in range(recipe.steps):
        before = time.monotonic()
        rows = list(islice(stream, recipe.rows))
        waited += time.monotonic() - before
        lr = learning_rate(step, recipe)
        loss, norm = train_step(model, optimizer, rows, lr, recipe.clip)
        losses.append(loss)
        for row in rows:
            seen["tokens"] += len(row.input_ids)
            seen["labels"] += int((row.targets >= 0).sum())
            seen["samples"] += len(row.cu_seqlens) - 1
            seen["skipped"] += row.skipped
            seen["flops"] += flops_of(row, model, weights, recipe.trainable)
        if not math.isfinite(loss):
            raise ValueError(f"the loss of step {step + 1} of stage {name} is {loss}; "
                             "a smaller --lr may help")
        if (step + 1) % config.log_every == 0 or step + 1 == recipe.steps:
            seconds = time.monotonic() - mark
            rates = {f"{key}_per_second": round(seen[key] / seconds, 1)
                     for key in ("tokens", "labels", "samples")}
            mean, used = sum(losses) / len(losses), seen["flops"] / seconds / peak
            log.line(f"{name:8} {step + 1:6}/{recipe.steps}  loss {mean:.4f}  lr {lr:.2e}  "
                     f"norm {norm:.2f}  {rates['tokens_per_second']:,.0f} tok/s  "
                     f"{rates['samples_per_second']:,.0f} samples/s  {used:.0%} of matrix rate  "
                     f"wait {waited / seconds:.0%}"
                     + (f"  {seen['skipped']} samples too long" if seen["skipped"] else ""),
                     stage=name, step=step + 1, loss=mean, lr=lr, norm=norm, **rates,
                     matrix_rate=peak, matrix_share=used, wait=waited / seconds,
                     skipped=seen["skipped"], seconds=mark - started + seconds)
            mark, waited, losses, seen = time.monotonic(), 0.0, [], dict.fromkeys(seen, 0)
        log.progress(name, step + 1, recipe.steps, started)


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
                answer = tokenizer.decode(ids[:ids.index(stop)] if stop in ids else ids)
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


def parse_flags(arguments: list[str]) -> TrainConfig:
    """Build the command line from TrainConfig's fields; the comment beside a field is its help."""
    parser = flag_parser(__doc__.splitlines()[0])
    comments = dict(re.findall(r"^    (\w+): .*#  ?(.*)$", inspect.getsource(TrainConfig), re.M))
    for entry in fields(TrainConfig):
        parser.add_argument(f"--{entry.name.replace('_', '-')}", type=type(entry.default),
                            default=entry.default,
                            help=f"{comments[entry.name]} (default {entry.default!r})")
    return TrainConfig(**vars(parser.parse_args(arguments)))


def run(config: TrainConfig) -> Path:
    """Train the stages, save a checkpoint after each, evaluate; returns the last checkpoint."""
    device = choose_device(config.device)
    out = Path(config.out or f"runs/{config.model}-{time.strftime('%Y%m%d-%H%M%S')}")
    if config.start:
        model, tokenizer = load_checkpoint(config.start, torch.float32, device)
        sizes = {name: (c.hidden_size, c.num_hidden_layers) for name, c in PRESETS.items()}
        if (model.config.hidden_size, model.config.num_hidden_layers) != sizes[config.model]:
            raise ValueError(f"{config.start} is not of the size {config.model}: "
                             "name its preset with --model")
    else:
        model, tokenizer = fresh_model(config)
        model.to(device)
    recipes = config.recipes()
    for name, recipe in recipes.items():  # refuse before anything is written
        encode(next(records(recipe.data, config.seed)), tokenizer, max_pixels=config.max_pixels)
        if (out / name).exists():
            raise ValueError(f"{out / name} is there already")
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.jsonl", "a") as file:
        log = Log(file)
        parameters = sum(p.numel() for p in model.parameters())
        log.line(f"{config.model}: {parameters:,} parameters on {device}, torch "
                 f"{torch.__version__}, {torch.get_num_threads()} threads -> {out}",
                 config=asdict(config), recipes={k: asdict(r) for k, r in recipes.items()})
        for name, recipe in recipes.items():
            train_stage(name, model, tokenizer, recipe, config, log)
            save_checkpoint(model, tokenizer, out / name)
        if config.questions and not config.data:
            report(evaluate(model, tokenizer, config.questions), log)
        log.line(f"saved: {out / name}")
    return out / name


def main() -> None:
    try:
        run(parse_flags(sys.argv[1:]))
    except (ValueError, OSError) as error:
        # an error in a worker process arrives with its traceback; its last line says what is wrong
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"train.py: {lines[-1].removeprefix('ValueError: ')}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted; finished stages are saved", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
