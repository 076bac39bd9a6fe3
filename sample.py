"""Ask a checkpoint: pictures and a prompt -> an answer, streamed to the terminal.

In: `python sample.py IMAGE... PROMPT` (no picture: plain text).  Out: the answer on standard
output; which checkpoint gave it on standard error.
Run by people; calls `data.py`, `model.py`, `convert.py`.

The idea.  The prompt is encoded as in training but ends with the header of an answer.  One pass
over it fills the cache of keys and values and gives the logits of the first word; from then on each
step feeds one token back in:

    y_1 = argmax p(. | x),   y_{n+1} = argmax p(. | x, y_1 ... y_n)   until <|im_end|>

or, with a temperature, a draw from the nucleus of likely words instead of the argmax.

Shapes: T tokens of the prompt, P patches, M = P / 4 visual tokens, C decoder width, V vocabulary.

Run `python sample.py assets/examples/scene.png "Where is the red circle?"`.  `--trace` prints the
prompt's way through the files, with shapes.
"""

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from convert import load_checkpoint, newest_checkpoint
from data import (Row, choose_device, choose_dtype, encode, flag_parser, lay_out,
                  refuse_in_one_sentence)
from model import LlavaOneVision
from vision import MAX_PIXELS, MIN_PIXELS, open_image


def build_prompt(images: list[Image.Image], prompt: str, tokenizer: Tokenizer,
                 max_pixels: int) -> Row:
    """Pictures in their order, then the text, as one user's turn."""
    content = [{"type": "image"}] * len(images) + [{"type": "text", "text": prompt}]
    record = {"messages": [{"role": "user", "content": content}], "images": images, "id": "prompt"}
    return lay_out([encode(record, tokenizer, MIN_PIXELS, max_pixels, generation_prompt=True)])


def stream_answer(model: LlavaOneVision, tokenizer: Tokenizer, row: Row, max_new_tokens: int,
                  temperature: float = 0.0, top_p: float = 1.0) -> Iterator[str]:
    """Pieces of the answer's text as they become complete characters."""
    inputs = row.inputs(model.lm_head.weight.device)
    stop_ids = tuple(tokenizer.token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>"))
    ids: list[int] = []
    text = shown = ""
    for token in model.generate(**inputs, max_new_tokens=max_new_tokens, stop_ids=stop_ids,
                                temperature=temperature, top_p=top_p):
        ids += [int(token)] if int(token) not in stop_ids else []
        text = tokenizer.decode(ids, skip_special_tokens=False)  # such as those of boxes
        if not text.endswith("\ufffd"):  # half of a character of several bytes: wait for the rest
            yield text.removeprefix(shown)
            shown = text
    yield text.removeprefix(shown)


def trace(model: LlavaOneVision, row: Row) -> None:
    """Print shapes at the stations of the next forward pass, each once."""
    def shape(x: Tensor) -> str:
        return "(" + ", ".join(f"{n:,}" for n in x.shape) + ")"

    def station(module: nn.Module, file: str, what: str) -> None:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            print(f"  {file:20} {what:45}{shape(out)}", file=sys.stderr)
            handle.remove()
        handle = module.register_forward_hook(hook)

    visual, decoder = model.visual, model.model
    print(f"  {'data.py':20} {'encode, lay_out: token ids of the prompt':45}"
          f"{shape(row.input_ids)}", file=sys.stderr)
    if row.patches is not None:
        print(f"  {'vision.py':20} {'image_to_patches: patches of the pictures':45}"
              f"{shape(row.patches)}", file=sys.stderr)
    for module, file, what in (
            (decoder.embed_tokens, "model.py", "embed_tokens: a vector per token"),
            (visual.patch_embed, "vision.py", "patch_embed: a vector per patch"),
            (visual.pre_layernorm, "vision.py", "class tokens in front of each picture"),
            (visual.blocks[-1], "vision.py", f"after {len(visual.blocks)} blocks"),
            (visual.merger, "vision.py", "merger: visual tokens, placed in their holes"),
            (decoder.layers[0].self_attn.q_proj, "model.py", "first layer: all query heads"),
            (decoder.layers[0].self_attn.k_proj, "model.py", "first layer: all key heads"),
            (decoder.layers[0].self_attn, "attention_kernel.py", "first layer: attended"),
            (decoder.norm, "model.py", f"after {len(decoder.layers)} layers"),
            (model.lm_head, "model.py", "logits of the first word")):
        station(module, file, what)


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    parser = flag_parser("Ask about pictures.", arguments)
    parser.usage = "python sample.py [flags] IMAGE... PROMPT"
    parser.add_argument("inputs", nargs="+", metavar="IMAGE... PROMPT",
                        help="files of pictures, then the question; without pictures: text only")
    parser.add_argument("--checkpoint", default="", help="directory in the released layout; "
                        "default: the newest of runs/, else the one that comes with the project")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of the nucleus, default 1")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="default 1024")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS,
                        help=f"a picture's largest area, default {MAX_PIXELS:,}")
    parser.add_argument("--seed", type=int, default=0, help="of the draws at a temperature above 0")
    parser.add_argument("--device", default="", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", default="", choices=["", "float32", "bfloat16"],
                        help="default: bfloat16 on a GPU, else float32, of twice the memory")
    parser.add_argument("--trace", action="store_true",
                        help="print the prompt's way through the files, with shapes")
    flags = parser.parse_intermixed_args(arguments)
    if not 0 <= flags.temperature < math.inf or not 0 < flags.top_p <= 1:
        raise ValueError("--temperature must be at least 0, --top-p above 0 and at most 1")
    if flags.max_new_tokens < 1 or flags.max_pixels < MIN_PIXELS:
        raise ValueError(f"--max-new-tokens must be at least 1, --max-pixels at least {MIN_PIXELS}")
    if os.path.isfile(flags.inputs[-1]):  # unlike Path.is_file, no error for a long text
        raise ValueError(f"the prompt is missing: {flags.inputs[-1]} is a file")
    return flags


def run(flags: argparse.Namespace) -> None:
    *names, prompt = flags.inputs
    images = [open_image(name) for name in names]  # refuse before the model is loaded
    checkpoint, whose = ((Path(flags.checkpoint), "as told") if flags.checkpoint
                         else newest_checkpoint())
    device = choose_device(flags.device)
    model, tokenizer = load_checkpoint(checkpoint, choose_dtype(flags.dtype, device), device)
    row = build_prompt(images, prompt, tokenizer, flags.max_pixels)
    room = model.config.max_position_embeddings - len(row.input_ids)
    if room < 1:
        raise ValueError(f"the prompt has {len(row.input_ids)} tokens, but the model's context "
                         f"is {model.config.max_position_embeddings}")
    print(f"checkpoint: {checkpoint} ({whose})", file=sys.stderr)
    torch.manual_seed(flags.seed)
    if flags.trace:
        trace(model, row)
    started = time.monotonic()
    for piece in stream_answer(model, tokenizer, row, min(flags.max_new_tokens, room),
                               flags.temperature, flags.top_p):
        print(piece, end="", flush=True)
    print()
    if flags.trace:
        print(f"  answered in {time.monotonic() - started:.2f} s", file=sys.stderr)


def main() -> None:
    refuse_in_one_sentence("sample.py", lambda: run(parse_flags(sys.argv[1:])))


if __name__ == "__main__":
    main()
