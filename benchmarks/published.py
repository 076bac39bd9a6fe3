"""Training beside the authors' modelling code: forward and backward passes with the same weights.

Run `python -m benchmarks.published FOLDER` with transformers 4.53 beside the packages of
requirements.txt.  FOLDER has the authors' `configuration_llavaonevision1_5.py` and
`modeling_llavaonevision1_5.py`, from their repository or a released checkpoint; they are no part of
this project.  Both sides get a model of random weights, 132 M parameters in float32, and four
samples with a picture each, of unequal lengths: ours as one packed row, theirs as a padded batch.
First their losses are compared.  Then they take turns, so what else the machine does hits both; the
ratio is the median over pairs.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from benchmarks.clock import print_table
from benchmarks.train_speed import random_sample
from convert import config_json, pieces_of, released_names, write_directory
from data import Row, flag_parser, lay_out, refuse_in_one_sentence
from model import LlavaOneVision, ModelConfig
from vision import VisionConfig

CONFIG = ModelConfig(
    hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12,
    num_key_value_heads=4, head_dim=64, vocab_size=20480, rope_theta=1e6,
    image_token_id=1, video_token_id=2,
    # their ViT has one class token for all pictures of a batch; this switch does the same
    vision=VisionConfig(depth=8, embed_dim=384, num_heads=6, intermediate_size=1536,
                        text_hidden_size=768, released_class_token_shift=True))
TOKENS = (600, 260, 430, 150)  # of the four samples, their pictures included
SIDES = (280, 168, 224, 140)  # of their pictures, in pixels: 100, 36, 64, 25 visual tokens
CODE = "llavaonevision1_5"


def their_model(folder: Path, ours: LlavaOneVision, place: Path) -> nn.Module:
    """Their model around our weights, by way of a checkpoint.  Raises ValueError without the
    packages or files that it needs."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ValueError(f"transformers cannot be imported: {error}.  pip install "
                         "transformers==4.53.1") from error
    files = [folder / f"{kind}_{CODE}.py" for kind in ("configuration", "modeling")]
    for file in files:
        if not file.is_file():
            raise ValueError(f"there is no {file}")
    classes = {"AutoConfig": f"configuration_{CODE}.Llavaonevision1_5Config",
               "AutoModelForCausalLM":
                   f"modeling_{CODE}.LLaVAOneVision1_5_ForConditionalGeneration"}
    layout = released_names(ours)
    tensors = chain.from_iterable(pieces_of(parameter.detach(), layout[name])
                                  for name, parameter in ours.named_parameters())
    code = {file.name: file.read_text() for file in folder.glob("*.py")}
    config = config_json(ours.config, torch.float32) | {"auto_map": classes}
    write_directory(place / "checkpoint", tensors, {"config.json": config} | code)
    return AutoModelForCausalLM.from_pretrained(
        place / "checkpoint", trust_remote_code=True, attn_implementation="sdpa",
        torch_dtype=torch.float32).train()


def their_batch(row: Row, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The samples of a row one below the other, padded to the longest."""
    lengths = row.cu_seqlens.diff().tolist()
    ids = row.input_ids.split(lengths)
    # their labels stand at the token itself, our targets at the one before
    labels = [F.pad(targets[:-1], (1, 0), value=-100) for targets in row.targets.split(lengths)]
    return {"input_ids": pad_sequence(ids, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(x) for x in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
            "pixel_values": inputs["patches"], "image_grid_thw": row.grid_thw}


def seconds(loss: Callable[[], Tensor], model: nn.Module) -> float:
    """Of a forward and a backward pass; the gradients are dropped."""
    started = time.perf_counter()
    loss().backward()
    passed = time.perf_counter() - started
    model.zero_grad()
    return passed


def main() -> None:
    parser = flag_parser("Training beside the authors' modelling code.")
    parser.add_argument("folder", type=Path, help="with the authors' Python files")
    parser.add_argument("--pairs", type=int, default=7, help="measured, after one to warm up")
    flags = parser.parse_args()
    torch.manual_seed(0)
    ours = LlavaOneVision(CONFIG).init_weights()
    # of each sample the second half is learnt
    row = lay_out([random_sample(CONFIG, tokens, side, tokens // 2)
                   for tokens, side in zip(TOKENS, SIDES)])
    inputs = row.inputs()
    with tempfile.TemporaryDirectory() as place:
        theirs = their_model(flags.folder, ours, Path(place))
    batch = their_batch(row, inputs)
    sides = {"ours": (lambda: ours.loss(targets=row.targets, **inputs) / row.labels, ours),
             "theirs": (lambda: theirs(**batch, use_cache=False).loss, theirs)}
    losses = [float(loss().detach()) for loss, _ in sides.values()]
    print(f"{sum(p.numel() for p in ours.parameters()) / 1e6:.0f} M parameters, torch "
          f"{torch.__version__}, {torch.get_num_threads()} threads; losses {losses[0]:.6f} and "
          f"{losses[1]:.6f}\n")
    times = [[seconds(*side) for side in sides.values()] for _ in range(flags.pairs + 1)][1:]
    ratio = statistics.median(theirs / ours for ours, theirs in times)
    print_table(["forward and backward, s", *sides, "theirs / ours"],
                [[f"{sum(TOKENS):,} tokens, padded {len(TOKENS) * max(TOKENS):,}",
                  *(statistics.median(side) for side in zip(*times)), ratio]])


if __name__ == "__main__":
    refuse_in_one_sentence("benchmarks.published", main)
