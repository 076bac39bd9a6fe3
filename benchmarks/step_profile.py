"""Where the time of a step of the default run goes, by PyTorch's profiler.

Run `python -m benchmarks.step_profile [--threads 1] [--steps 30]`: prints a table.  An operator
counts with its own time, without that of operators that it calls.  What the profiler itself costs
is in the last line.
"""

import argparse
import time
from collections import Counter
from dataclasses import replace

import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from assets.scenes import drawn_texts, train_tokenizer
from data import DrawnData
from model import PRESETS, LlavaOneVision
from parallel import find_ranks
from train import TINY, State, matrix_rate, row_loader, steps_of, train_step

KINDS = {  # the beginning of an operator's name, without aten:: -> where it belongs
    "mm": "matrix products", "addmm": "matrix products", "bmm": "matrix products",
    "_fused_adamw": "optimizer, gradient norm", "Optimizer": "optimizer, gradient norm",
    "linalg_vector_norm": "optimizer, gradient norm", "_foreach": "optimizer, gradient norm",
    "_log_softmax": "loss", "nll_loss": "loss", "embedding": "embedding, placing of visual tokens",
    "index": "embedding, placing of visual tokens"}
OTHERS = "norms, RoPE, activations, sums, copies"


def kind_of(event: FunctionEvent) -> str:
    """The line of the table that an operator belongs to, with those that attention calls."""
    parent = event
    while parent is not None:
        if "llava" in parent.name:
            return "attention"
        parent = parent.cpu_parent
    name = event.name.removeprefix("aten::")
    return next((kind for begin, kind in KINDS.items() if name.startswith(begin)), OTHERS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="threads of the CPU")
    parser.add_argument("--steps", type=int, default=30, help="steps that are measured")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    torch.manual_seed(0)
    ranks, config = find_ranks("cpu", ""), PRESETS["tiny"]
    recipe = replace(TINY["instruct"], steps=10 + 2 * flags.steps)
    model = LlavaOneVision(config).init_weights(from_scratch=True)
    tokenizer = train_tokenizer(drawn_texts(0), config.vocab_size)
    data = DrawnData(recipe.data[0], tokenizer, recipe.seq_length, 0)
    state = State(model, recipe)
    started = time.perf_counter()
    ready = list(row_loader(data, config, recipe, 0, ranks))
    drawing = (time.perf_counter() - started) / len(ready)

    def train(begin: int, end: int) -> float:
        """Seconds a step; the first steps warm up."""
        started = time.perf_counter()
        for step in steps_of(iter(ready[begin:end]), 1):
            train_step(state, step, ranks)
        return (time.perf_counter() - started) / (end - begin)

    train(0, 10)
    seconds = train(10, 10 + flags.steps)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        profiled = train(10 + flags.steps, len(ready))
    times: Counter[str] = Counter()
    for event in profiler.events():
        times[kind_of(event)] += event.self_cpu_time_total / 1e6 / flags.steps

    rate, source = matrix_rate(ranks)
    flops = sum(row.sums["model_flops"] for row in ready[10:10 + flags.steps]) / flags.steps
    print(f"{1e3 * seconds:.0f} ms a step, {1e3 * profiled:.0f} ms under the profiler; "
          f"{flags.threads} threads, torch {torch.__version__}\n"
          f"MFU {flops / seconds / rate:.0%} of {rate / 1e9:.0f} GFLOP/s ({source})\n"
          f"drawing and cutting a row, in another process: {1e3 * drawing:.0f} ms\n\n"
          f"| what | ms | share |\n|---|---|---|")
    for kind, spent in times.most_common():
        print(f"| {kind} | {1e3 * spent:.0f} | {spent / profiled:.0%} |")
    left = profiled - sum(times.values())
    print(f"| Python between operators, the profiler | {1e3 * left:.0f} | {left / profiled:.0%} |")


if __name__ == "__main__":
    main()
