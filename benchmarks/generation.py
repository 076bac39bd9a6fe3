"""Generation on a CPU, beside Hugging Face's: milliseconds for a prompt, and for each new token.

Run `python -m benchmarks.generation` with transformers 4.53 beside the packages of
requirements.txt.  Both sides compute a Qwen3 decoder with the same random weights, the same
tensors in memory: `LlavaOneVision.generate` on ours, and on theirs `Qwen3ForCausalLM` with its
cache, called in a loop (its own `generate` calls the same, and does more).  First their logits are
compared.  Then both answer the same prompt, one token of ours after one of theirs: what else the
machine does hits both, and the ratio is the median over pairs.

| shape | what it is |
|---|---|
| 130M | width 768, 12 layers, fp32 |
| 2b   | layers and vocabulary of the preset cut down, bf16: the head has its share of the weights |

The last column is the time to read once all weights that multiply a token, and its keys and values,
at the rate of a copy.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.clock import print_table
from data import flag_parser
from model import PRESETS, LlavaOneVision, ModelConfig
from vision import VisionConfig

TINY_VIT = VisionConfig(depth=1, embed_dim=64, num_heads=1, intermediate_size=64)
SHAPES: dict[str, tuple[ModelConfig, torch.dtype]] = {
    "130M": (ModelConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, vocab_size=32000, rope_theta=1e6,
        image_token_id=1, video_token_id=2,
        vision=replace(TINY_VIT, text_hidden_size=768)), torch.float32),
    "2b": (replace(
        PRESETS["2b"], num_hidden_layers=8, vocab_size=40000, image_token_id=1, video_token_id=2,
        vision=replace(TINY_VIT, text_hidden_size=2048)), torch.bfloat16),
}


def their_decoder(ours: LlavaOneVision, dtype: torch.dtype) -> torch.nn.Module:
    """Hugging Face's decoder around our tensors.  Raises ValueError without transformers."""
    try:
        from transformers import Qwen3Config, Qwen3ForCausalLM
    except ImportError as error:
        raise ValueError(f"transformers cannot be imported: {error}.  pip install "
                         "transformers==4.53.1") from error
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "vocab_size", "rope_theta", "rms_norm_eps",
             "max_position_embeddings", "tie_word_embeddings")
    config = Qwen3Config(**{name: getattr(ours.config, name) for name in names})
    theirs = Qwen3ForCausalLM._from_config(config, torch_dtype=dtype).eval()
    weights = {name: x for name, x in ours.state_dict().items() if not name.startswith("visual.")}
    theirs.load_state_dict(weights, assign=True)
    return theirs


@torch.inference_mode()
def their_tokens(model: torch.nn.Module, ids: Tensor, count: int) -> Iterator[Tensor]:
    """The likeliest next tokens, one at a time, as `LlavaOneVision.generate` yields them."""
    from transformers import DynamicCache
    cache = DynamicCache()
    token = ids
    for _ in range(count):
        out = model(input_ids=token[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = out.logits[0, -1:].argmax(-1)
        yield token


def milliseconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)


@torch.inference_mode()
def largest_difference(ours: LlavaOneVision, theirs: torch.nn.Module, ids: Tensor) -> float:
    """Between the logits of both sides, in standard deviations of the logits."""
    expected = theirs(input_ids=ids[None]).logits[0].float()
    found = ours(ids, torch.tensor([0, len(ids)])).float()
    return float((found - expected).abs().max() / expected.std())


def copy_rate() -> float:
    """Bytes per millisecond that a copy reads and writes."""
    source = torch.zeros(2**27)
    target = torch.zeros_like(source)
    times = [milliseconds(lambda: target.copy_(source)) for _ in range(5)]
    return 2 * source.nbytes / statistics.median(times)


def bytes_of_a_token(model: LlavaOneVision, keys: int) -> int:
    """Bytes that any implementation must read for a token: weights, and cached keys and values."""
    config = model.config
    size = model.lm_head.weight.element_size()
    weights = [p for name, p in model.named_parameters()
               if not name.startswith(("visual.", "model.embed_tokens."))]
    cached = 2 * keys * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return sum(p.nbytes for p in weights) + cached * size


def measure(ours: LlavaOneVision, theirs: torch.nn.Module, ids: Tensor, new_tokens: int,
            prompts: int) -> list[list[float]]:
    """[ours, theirs, ratio] of the prompt in milliseconds, then of a new token."""
    cu_seqlens = torch.tensor([0, len(ids)])
    prompt_times, token_times = [], []
    for _ in range(prompts):
        sides = (ours.generate(ids, cu_seqlens, max_new_tokens=new_tokens + 1),
                 their_tokens(theirs, ids, new_tokens + 1))
        prompt_times.append([milliseconds(lambda: next(side)) for side in sides])  # noqa: B023
        for _ in range(new_tokens):
            token_times.append([milliseconds(lambda: next(side)) for side in sides])  # noqa: B023
    lines = []
    for times in (prompt_times, token_times):
        medians = [statistics.median(side) for side in zip(*times)]
        lines.append([*medians, statistics.median(theirs / ours for ours, theirs in times)])
    return lines


def main() -> None:
    parser = flag_parser("Generation on a CPU, beside Hugging Face's transformers.")
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--layers", type=int, default=0, help="default: as the table above says")
    parser.add_argument("--prompt", type=int, default=1088, help="tokens")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=3, help="measured, one after the other")
    flags = parser.parse_args()
    table = []
    for name in flags.shapes:
        config, dtype = SHAPES[name]
        layers = flags.layers or config.num_hidden_layers
        torch.manual_seed(0)
        ours = LlavaOneVision(replace(config, num_hidden_layers=layers)).init_weights().to(dtype)
        theirs = their_decoder(ours, dtype)
        ids = torch.randint(3, config.vocab_size, (flags.prompt,))
        apart = largest_difference(ours, theirs, ids[:64])
        print(f"{name}, {layers} layers, {dtype}: logits differ by at most {apart:.2g} of their "
              "standard deviation")
        for threads in flags.threads:
            torch.set_num_threads(threads)
            prompt, token = measure(ours, theirs, ids, flags.new_tokens, flags.prompts)
            bound = bytes_of_a_token(ours, flags.prompt) / copy_rate()
            table.append([f"{name}, {str(dtype).removeprefix('torch.')}", threads,
                          *prompt, *token, bound])
    print(f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, prompt of "
          f"{flags.prompt:,} tokens, {flags.new_tokens} new ones; times in milliseconds\n")
    print_table(["decoder", "threads", "prompt, ours", "theirs", "ratio", "token, ours", "theirs",
                 "ratio", "bound"], table)


if __name__ == "__main__":
    main()
