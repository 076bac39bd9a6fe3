"""Training speed of a released size with random weights: tokens/s, MFU, HFU, memory.

Run `python -m benchmarks.train_speed` on a GPU: prints a table over --recompute, --compile and
--fp8 for the 4b on rows of 8,192 tokens, as many of its decoder layers as --layers says (default:
all that fit).  `python -m benchmarks.train_speed --recompute layer` leaves the other ways out,
`torchrun --nproc-per-node N -m benchmarks.train_speed` does the same on N GPUs.
`--model tiny --seq-length 2048 --dtype float32` tries it on a CPU.
"""

import gc
import itertools
import os
import statistics
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from PIL import Image

from benchmarks.plan import memory_by_part
from data import LOADS, Sample, flag_parser, lay_out, load_of
from fp8_kernel import check_device, convert_to_fp8
from model import PRESETS, LlavaOneVision, ModelConfig
from parallel import Ranks, find_ranks, join_ranks, shard, share_row
from train import (QUICK, RECOMPUTE, State, Step, matrix_rate, peak_memory, train_step,
                   training_flops)

SAMPLE, PICTURE = 600, 560  # tokens of a sample; a picture's side, 400 visual tokens


def random_sample(config: ModelConfig, tokens: int, side: int, asked: int) -> Sample:
    """A picture of side x side pixels, then random words; the first `asked` tokens, those of the
    picture among them, are not learnt."""
    ids = torch.randint(20, config.vocab_size // 2, (tokens,))
    ids[:(side // 28) ** 2] = config.image_token_id
    labels = torch.where(torch.arange(tokens) < asked, -100, ids)
    grid = torch.tensor([[1, side // 14, side // 14]])
    return Sample(ids, labels, [Image.effect_noise((side, side), 64)], grid, (3136, 10**7), "")


def random_step(config: ModelConfig, seq_length: int, rows: int, ranks: Ranks,
                recompute: str) -> Step:
    """A step of full rows of samples with a picture each, a sixth of all tokens learnt."""
    side = PICTURE if seq_length > 2 * SAMPLE else 56
    tokens = SAMPLE if seq_length > 2 * SAMPLE else seq_length // 8
    sample = random_sample(config, tokens, side, tokens * 5 // 6)
    samples = [sample] * (seq_length // tokens)
    loads = {name: float(value) * len(samples) * rows
             for name, value in zip(LOADS, load_of(sample))}
    sums = loads | training_flops(loads, config, QUICK["mid"].trainable, recompute)
    row = lay_out(samples)
    if ranks.context > 1:
        row = share_row(samples, ranks.rank % ranks.context, ranks.context,
                        [config.image_token_id, config.video_token_id])
    count = rows // ranks.data_ranks
    return Step([row] * count, count, sums, balance=1.0)


def that_fit(config: ModelConfig, seq_length: int, ranks: Ranks, recompute: str) -> int:
    """Decoder layers with which a training step should fit a GPU, a tenth of it left free."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks.count
    if ranks.device.type == "cuda":
        memory = torch.cuda.mem_get_info(ranks.device)[1]
    for layers in range(config.num_hidden_layers, 0, -1):
        recipe = replace(QUICK["mid"], seq_length=seq_length, recompute=recompute)
        needed = memory_by_part(replace(config, num_hidden_layers=layers), recipe, ranks.count,
                                ranks.context, ranks.experts, fp8=True)
        if sum(needed.values()) < 0.9 * memory:
            return layers
    raise ValueError("not even one layer fits")


def measure(config: ModelConfig, seq_length: int, rows: int, recompute: str, compiled: bool,
            fp8: bool, ranks: Ranks, steps: int, rate: float) -> str:
    """A line of the table: medians over the steps after three to warm up."""
    torch._dynamo.reset()
    gc.collect()  # hooks tie the last model into cycles
    torch.cuda.empty_cache()
    with torch.device(ranks.device):
        torch.manual_seed(0)
        model = LlavaOneVision(config).init_weights()
    if fp8:
        convert_to_fp8(model)
    shard(model, recompute, compiled, ranks)
    state = State(model, replace(QUICK["mid"], lr=1e-6, min_lr=1e-6))
    step = random_step(config, seq_length, rows * ranks.data_ranks, ranks, recompute)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
    seconds = []
    for _ in range(steps + 3):
        started = time.monotonic()
        train_step(state, step, ranks)  # ends with a number from the GPU
        seconds.append(time.monotonic() - started)
    median = statistics.median(seconds[3:])
    mfu, hfu = (step.sums[f"{kind}_flops"] / (rate * ranks.count * median)
                for kind in ("model", "hardware"))
    return (f"| {config.num_hidden_layers} | {recompute} | {'yes' if compiled else 'no'} "
            f"| {'yes' if fp8 else 'no'} | {step.sums['tokens'] / median:,.0f} "
            f"| {mfu:.1%} | {hfu:.1%} | {peak_memory(ranks.device) / 2**30:.1f} |")


def main() -> None:
    parser = flag_parser("Training speed.")
    parser.add_argument("--model", default="4b", choices=list(PRESETS))
    parser.add_argument("--layers", type=int, default=0)
    parser.add_argument("--recompute", nargs="*", default=list(RECOMPUTE), choices=RECOMPUTE)
    parser.add_argument("--seq-length", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=1, help="a step, for each rank")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context-parallel", type=int, default=1)
    flags = parser.parse_args()
    ranks = join_ranks(find_ranks(dtype=flags.dtype, context=flags.context_parallel))
    name = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "CPU"
    say = print if ranks.rank == 0 else lambda *_: None
    rate, source = matrix_rate(ranks)
    say(f"{flags.model}, rows of {flags.seq_length:,} tokens, {ranks.dtype}, {ranks.count} x "
        f"{name}, torch {torch.__version__}; MFU of {rate / 1e12:.3g} TFLOP/s ({source})\n")
    say("| decoder layers | recompute | compile | FP8 | tokens/s | MFU | HFU | GiB |")
    say("|---|---|---|---|---|---|---|---|")
    numbers = [False, True]
    try:
        check_device(ranks.device)
    except ValueError as error:
        say(error)
        numbers.remove(True)
    for recompute, compiled, fp8 in itertools.product(flags.recompute, (False, True), numbers):
        preset = PRESETS[flags.model]
        layers = flags.layers or that_fit(preset, flags.seq_length, ranks, recompute)
        try:
            say(measure(replace(preset, num_hidden_layers=layers), flags.seq_length, flags.rows,
                        recompute, compiled, fp8, ranks, flags.steps, rate))
        except torch.OutOfMemoryError:
            say(f"| {layers} | {recompute} | {'yes' if compiled else 'no'} "
                f"| {'yes' if fp8 else 'no'} | does not fit | | | |")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    main()
