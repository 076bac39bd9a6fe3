"""Ask a checkpoint: pictures and a prompt -> an answer, streamed to the terminal.

In: `python sample.py IMAGE... PROMPT` (without IMAGE: plain text).  Out: the answer on standard
output; the checkpoint that gave it on standard error.
Called by people, and by `train.py` for its held-out questions; calls `convert.py`, `data.py`,
`model.py`, `vision.py` and `assets/scenes.py`.

The idea.  The prompt is encoded as in training, but ends with the header of an answer.  One pass
over it fills the cache of keys and values and gives the logits of the first token.  Each further
pass feeds the last token back to the model:

    y_1 = argmax p(. | x),   y_{n+1} = argmax p(. | x, y_1 ... y_n)

With a temperature, a token is drawn from the nucleus of likely tokens instead of the argmax.  The
answer stops at <|im_end|> or <|endoftext|>, after --max-new-tokens, or when the context is full.

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

from assets.scenes import held_out_questions
from convert import load_checkpoint, newest_checkpoint
from data import (Row, choose_device, choose_dtype, encode, flag_parser, lay_out,
                  refuse_in_one_sentence)
from model import LlavaOneVision
from vision import MAX_PIXELS, MIN_PIXELS, open_image


def build_prompt(images: list[Image.Image], prompt: str, tokenizer: Tokenizer,
                 max_pixels: int) -> Row:
    """One turn of a user: the pictures in their order, then the text."""
    content = [{"type": "image"}] * len(images)
    content.append({"type": "text", "text": prompt})
    record = {"messages": [{"role": "user", "content": content}], "images": images, "id": "prompt"}
    sample = encode(record, tokenizer, (MIN_PIXELS, max_pixels), generation_prompt=True)
    row = lay_out([sample])
    if row.lost:
        raise ValueError(row.lost[0])
    return row


def stream_answer(model: LlavaOneVision, tokenizer: Tokenizer, row: Row, max_new_tokens: int,
                  temperature: float = 0.0, top_p: float = 1.0) -> Iterator[str]:
    """Yield the text of the answer in pieces of complete characters."""
    inputs = row.inputs(model.lm_head.weight.device)
    # <|im_end|> ends a turn of a conversation, <|endoftext|> a plain text.
    stop_ids = tuple(tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>"))
    ids: list[int] = []
    text = shown = ""
    for token in model.generate(**inputs, max_new_tokens=max_new_tokens, stop_ids=stop_ids,
                                temperature=temperature, top_p=top_p):
        if int(token) in stop_ids:
            break
        ids.append(int(token))
        # Special tokens are part of the answer: for example, those around a box.
        text = tokenizer.decode(ids, skip_special_tokens=False)
        # U+FFFD stands for a part of a character of several bytes: wait for the other bytes.
        if not text.endswith("\ufffd"):
            yield text.removeprefix(shown)
            shown = text
    yield text.removeprefix(shown)


def trace(model: LlavaOneVision, row: Row) -> None:
    """Print the shapes of the prompt, then those of each station of the next forward pass."""

    def show(file: str, what: str, x: Tensor) -> None:
        shape = ", ".join(f"{n:,}" for n in x.shape)
        print(f"  {file:20} {what:45}({shape})", file=sys.stderr)

    def station(module: nn.Module, file: str, what: str) -> None:
        # The hook removes itself: later passes, of one token each, print nothing.
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            show(file, what, out)
            handle.remove()
        handle = module.register_forward_hook(hook)

    show("data.py", "encode, lay_out: token ids of the prompt", row.input_ids)
    if row.patches is not None:
        show("vision.py", "image_to_patches: patches of the pictures", row.patches)
    # Without pictures the ViT does not run, so its stations print nothing.
    visual = model.visual
    station(visual.patch_embed, "vision.py", "patch_embed: a vector per patch")
    station(visual.pre_layernorm, "vision.py", "class tokens in front of each picture")
    station(visual.blocks[-1], "vision.py", f"after {len(visual.blocks)} blocks")
    station(visual.merger, "vision.py", "merger: visual tokens, placed in their holes")
    decoder = model.model
    attention = decoder.layers[0].self_attn
    station(decoder.embed_tokens, "model.py", "embed_tokens: a vector per token")
    station(attention.q_proj, "model.py", "first layer: all query heads")
    station(attention.k_proj, "model.py", "first layer: all key heads")
    station(attention, "model.py", "first layer: attention, after o_proj")
    station(decoder.norm, "model.py", f"after {len(decoder.layers)} layers")
    station(model.lm_head, "model.py", "logits of the first word")


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


def parse_flags(arguments: list[str]) -> argparse.Namespace:
    """The command's flags; raises ValueError for a value out of range."""
    parser = flag_parser("Ask about pictures.", arguments)
    parser.usage = "python sample.py [flags] IMAGE... PROMPT"
    parser.add_argument("inputs", nargs="+", metavar="IMAGE... PROMPT",
                        help="files of pictures, then the question; without pictures: text only")
    parser.add_argument("--checkpoint", default="", help="directory in the released layout; "
                        "default: the newest of runs/, else the checkpoint of this project")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default) is greedy")
    parser.add_argument("--top-p", type=float, default=1.0,
                        help="draw from the likeliest tokens of this total probability, default 1")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="default 1024")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS,
                        help=f"largest area of a picture, default {MAX_PIXELS:,}")
    parser.add_argument("--seed", type=int, default=0, help="for draws at a temperature above 0")
    parser.add_argument("--device", default="", help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--dtype", default="", choices=["", "float32", "bfloat16"],
                        help="default: bfloat16 on a GPU, else float32 (twice the memory)")
    parser.add_argument("--trace", action="store_true",
                        help="print the prompt's way through the files, with shapes")

    # "Intermixed": a flag may stand between the pictures and the prompt.
    flags = parser.parse_intermixed_args(arguments)
    if not 0 <= flags.temperature < math.inf or not 0 < flags.top_p <= 1:
        raise ValueError("--temperature must be at least 0, --top-p above 0 and at most 1")
    if flags.max_new_tokens < 1 or flags.max_pixels < MIN_PIXELS:
        raise ValueError(f"--max-new-tokens must be at least 1, --max-pixels at least {MIN_PIXELS}")
    # `Path.is_file` raises an error for a long prompt; os.path.isfile answers False.
    if os.path.isfile(flags.inputs[-1]):
        raise ValueError(f"the prompt is missing: {flags.inputs[-1]} is a file")
    return flags


def run(flags: argparse.Namespace) -> None:
    # Read the pictures first: a wrong file is refused before the model is loaded.
    *names, prompt = flags.inputs
    images = [open_image(name) for name in names]
    if flags.checkpoint:
        checkpoint, origin = Path(flags.checkpoint), "as told"
    else:
        checkpoint, origin = newest_checkpoint()
    device = choose_device(flags.device)
    model, tokenizer = load_checkpoint(checkpoint, choose_dtype(flags.dtype, device), device)
    row = build_prompt(images, prompt, tokenizer, flags.max_pixels)

    # Prompt and answer share the context.
    context = model.config.max_position_embeddings
    tokens = len(row.input_ids)
    if tokens >= context:
        raise ValueError(f"the prompt has {tokens} tokens, but the model's context is {context}")
    max_new_tokens = min(flags.max_new_tokens, context - tokens)

    print(f"checkpoint: {checkpoint} ({origin})", file=sys.stderr)
    # The same seed draws the same answer again.
    torch.manual_seed(flags.seed)
    if flags.trace:
        trace(model, row)
    started = time.monotonic()
    for piece in stream_answer(model, tokenizer, row, max_new_tokens, flags.temperature,
                               flags.top_p):
        print(piece, end="", flush=True)
    print()
    if flags.trace:
        print(f"  answered in {time.monotonic() - started:.2f} s", file=sys.stderr)


def main() -> None:
    refuse_in_one_sentence("sample.py", lambda: run(parse_flags(sys.argv[1:])))


if __name__ == "__main__":
    main()
