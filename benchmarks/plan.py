"""What a run needs: parameters, memory of a GPU, FLOPs, time, dollars; no GPU wanted.

Run `python -m benchmarks.plan --model 8b --gpus 128 --gpu a100 --tokens 64e9 --price 0.6`, with any
flag of `train.py` beside these.  It ends with the announcement's own figures, put together.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from data import flag_parser, refuse_in_one_sentence
from fp8_kernel import convert_to_fp8
from model import LOSS_CHUNK, PRESETS, ModelConfig, meta_model, parameters_by_part
from parallel import check_division
from train import (ALL, GPUS, Recipe, TrainConfig, check_experts, name_of, parse_flags, sizes_of,
                   training_flops)

VISUAL_SHARE = 0.7  # share of visual tokens in an average row
SAMPLE_TOKENS = 600  # of an average sample; half of its words are learnt
MEMORY = {"A100": 80e9, "A800": 80e9, "H100": 80e9, "H800": 80e9, "H200": 141e9,
          "B200": 180e9}  # bytes of a GPU
SHARE = 0.45  # of the hardware's rate that a run reaches, computing again included (HFU)


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


def sample_flops(config: ModelConfig, recompute: str) -> dict[str, float]:
    """FLOPs a token of training everything on average samples."""
    visual = VISUAL_SHARE * SAMPLE_TOKENS
    loads = {"tokens": SAMPLE_TOKENS, "pairs": SAMPLE_TOKENS * (SAMPLE_TOKENS + 1) / 2,
             "labels": round((SAMPLE_TOKENS - visual) / 2), "patches": 4 * visual,
             "frame_pairs": (4 * visual)**2}
    flops = training_flops(loads, config, ALL, recompute)
    return {name: n / SAMPLE_TOKENS for name, n in flops.items()}


def plan(config: TrainConfig, flags: argparse.Namespace) -> Iterator[str]:
    """Lines on what a run needs; of the stage mid and the recipe full where none is named."""
    check_division(flags.gpus, config.replicas, config.context_parallel, config.expert_parallel)
    model, gpu = sizes_of(config, config.start_from), flags.gpu.upper()
    rate, capacity = GPUS[gpu], MEMORY[gpu]
    check_experts(config, model)
    stage = "mid" if config.stage == "all" else config.stage
    recipe = replace(config, recipe=config.recipe or "full", stage=stage).recipes(model)[stage]
    parts = parameters_by_part(model)
    yield (f"{name_of(config, config.start_from)} on {flags.gpus} {gpu} "
           f"({rate / 1e12:.0f} TFLOP/s in bf16, {capacity / 1e9:.0f} GB): "
           f"{', '.join(recipe.trainable)} trained, recompute {recipe.recompute}")
    yield f"parameters: {', '.join(f'{name} {n:,}' for name, n in parts.items())}"
    yield f"  together {sum(parts.values()):,}"

    memory = memory_by_part(model, recipe, flags.gpus // config.replicas, config.context_parallel,
                            config.expert_parallel, config.fp8)
    memory["together"] = sum(memory.values())
    fits = ":" if memory["together"] < capacity else " (it does NOT fit):"
    yield (f"memory of a GPU, rows of {recipe.seq_length:,} tokens over {config.context_parallel}"
           + fits)
    yield from (f"  {name:28}{size / 2**30:8.2f} GiB" for name, size in memory.items())

    flops = sample_flops(model, recipe.recompute)
    ratio = flops["hardware_flops"] / flops["model_flops"]
    mfu = flags.mfu or SHARE / ratio
    speed = flags.gpus * rate * mfu / flops["model_flops"]  # tokens a second
    hours = flags.gpus * flags.tokens / speed / 3600
    yield (f"FLOPs a token, all parts trained: {flops['model_flops']:.4g}, with what is computed "
           f"again {flops['hardware_flops']:.4g}\n  (samples of {SAMPLE_TOKENS} tokens, "
           f"{VISUAL_SHARE:.0%} visual, half of the others learnt)")
    yield (f"at {mfu:.1%} MFU, {mfu * ratio:.1%} HFU: {speed:,.0f} tokens/s, a step of "
           f"{recipe.rows} rows in {recipe.rows * recipe.seq_length / speed:.1f} s")
    dollars = f", ${hours * flags.price:,.0f}" if flags.price else ""
    yield (f"{flags.tokens:.3g} tokens: {flags.tokens / speed / 86400:.2f} days, {hours:,.0f} "
           f"GPU-hours{dollars}\n")


def published() -> Iterator[str]:
    """How the announcement's figures for the 8B fit together; A800s are taken for A100s."""
    flops = sample_flops(PRESETS["8b"], "layer")["hardware_flops"]
    per_hour = 3600 * SHARE * GPUS["A100"] / flops  # tokens of a GPU at 45 % HFU
    budget = 16000 / 0.6  # GPU-hours
    mid = 128 * 3.7 * 24  # GPU-hours
    hours = 64e9 / per_hour
    yield (f"The published figures, if the 8B did {flops:.3g} FLOPs a token: samples as above, "
           "layers recomputed")
    yield f"  $16,000 at $0.6 an hour buy {budget:,.0f} A100-hours"
    yield (f"  the mid stage, 128 A800 for 3.7 days, took {mid:,.0f}, {mid / budget:.0%} of them; "
           f"at 45 % HFU that is\n    {mid * per_hour / 1e9:,.0f} B tokens, or "
           f"{mid * per_hour / 85e6:,.0f} for each of 85 M samples")
    yield (f"  64 B tokens at 45 % HFU take {hours:,.0f} hours, {hours / budget:.0%} of the "
           f"budget; if they took all of it, HFU was {SHARE * hours / budget:.0%}")
    yield f"  all of the budget at 45 % HFU is {budget * per_hour / 1e9:,.0f} B tokens"


def run(arguments: list[str]) -> Iterator[str]:
    """The lines that the command prints.  Raises ValueError for a flag that makes no sense."""
    parser = flag_parser("What a run needs.", arguments)
    parser.epilog = "All flags of train.py are taken, too."
    parser.add_argument("--gpus", type=int, default=8, help="how many (default 8)")
    parser.add_argument("--gpu", default="a100", choices=[name.lower() for name in GPUS])
    parser.add_argument("--tokens", type=float, default=64e9, help="to train on (default 64e9)")
    parser.add_argument("--price", type=float, default=0.0, help="dollars of a GPU-hour")
    parser.add_argument("--mfu", type=float, default=0.0,
                        help="share of the GPUs' rate; default what 45 %% HFU comes to")
    flags, rest = parser.parse_known_args(arguments)
    config = parse_flags(rest)
    if flags.gpus < 1 or not 0 < flags.tokens < 1e18 or not 0 <= flags.price < 1e9:
        raise ValueError("--gpus and --tokens must be positive, --price not negative, all finite")
    if not 0 <= flags.mfu <= 1:
        raise ValueError(f"--mfu is a share of 1, not {flags.mfu}")
    if config.fp8 and flags.gpu in ("a100", "a800"):
        raise ValueError(f"--fp8: the {flags.gpu} has no FP8; name another with --gpu")
    yield from plan(config, flags)
    yield from published()


if __name__ == "__main__":
    refuse_in_one_sentence("benchmarks.plan", lambda: print(*run(sys.argv[1:]), sep="\n"))
