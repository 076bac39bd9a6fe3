"""Random checkpoints at full size: written, merged, read, converted, asked about a picture.

Run `python -m benchmarks.full_size`: needs 30 GB of disk and 16 GB of memory for the 4b (`--model
8b`: 55 and 22).  It runs the commands a user runs and prints, for each, seconds and peak resident
memory, the mapped files included.  Numbers are random, so the answer is, too.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from convert import config_json, released_names, side_files, source_layouts, write_directory
from data import SPECIAL_TOKENS
from model import PRESETS, LlavaOneVision, ModelConfig, meta_model

ROOT = Path(__file__).parent.parent


def wide_tokenizer() -> Tokenizer:
    """Bytes, words that never occur, and the special tokens at their released ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"word {i}" for i in range(151643 - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def random_tensors(model: LlavaOneVision,
                   layout: dict[str, list[str]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Normal numbers, norms of one, for all tensors that a layout names."""
    generator = torch.Generator().manual_seed(0)
    for name, pieces in layout.items():
        parameter = model.get_parameter(name)
        shape = (len(parameter) // len(pieces), *parameter.shape[1:])
        for piece in pieces:
            tensor = torch.ones(shape, dtype=torch.bfloat16)
            if "norm" not in name and "ln_q" not in name:
                tensor.normal_(std=0.02, generator=generator)
            yield piece, tensor


def make_released(config: ModelConfig, folder: Path) -> None:
    """Write folder/released, a whole model."""
    model = meta_model(config)
    write_directory(folder / "released", random_tensors(model, released_names(model)),
                    side_files(config, wide_tokenizer(), torch.bfloat16))


def make_parts(config: ModelConfig, folder: Path) -> None:
    """Write folder/vit and folder/decoder, the sources of a merge, without tokenizers."""
    model, vision = meta_model(config), config.vision
    about_vit = {
        "patch_size": 14, "num_channels": 3, "hidden_act": "gelu",
        "num_hidden_layers": vision.depth, "hidden_size": vision.embed_dim,
        "num_attention_heads": vision.num_heads, "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": vision.layer_norm_eps}
    about_decoder = config_json(config, torch.bfloat16)["text_config"]
    layouts = source_layouts(released_names(model))
    for name, layout, about in zip(("vit", "decoder"), layouts, (about_vit, about_decoder)):
        write_directory(folder / name, random_tensors(model, layout),
                        {"config.json": json.dumps(about)})


def in_own_process(make: Callable[[ModelConfig, Path], None], config: ModelConfig,
                   folder: Path) -> None:
    """Write, and leave no trace in this process: children inherit the peak of their parent."""
    writer = multiprocessing.get_context("spawn").Process(target=make, args=(config, folder))
    writer.start()
    writer.join()
    if writer.exitcode:
        sys.exit("writing failed")


def measured(what: str, command: list[str]) -> float:
    """Run a command, print a line of the table; returns its peak memory in bytes."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = process.stdout.read().strip().splitlines()
    _, status, usage = os.wait4(process.pid, 0)
    peak = usage.ru_maxrss * 1024
    last = said[-1] if said else ""
    print(f"| {what} | {time.monotonic() - started:.0f} | {peak / 1e9:.1f} | {last[:90]} |",
          flush=True)
    if status:
        sys.exit("\n".join(said))
    return peak


LOAD = """
import sys, time
from convert import load_model
started = time.monotonic()
model = load_model(sys.argv[1], side=sys.argv[2])
seconds = time.monotonic() - started
size = sum(p.nbytes for p in model.parameters())
print(f"{size / 1e9:.2f} GB in {seconds:.1f} s, {size / 1e6 / seconds:,.0f} MB/s")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="4b", choices=PRESETS)
    parser.add_argument("--folder", help="where there is room; default: that for temporary files")
    flags = parser.parse_args()
    config = PRESETS[flags.model]
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        released, exported, vit, decoder, merged = (f"{folder}/{name}" for name in (
            "released", "exported", "vit", "decoder", "merged"))
        print(f"{flags.model}, torch {torch.__version__}\n\n| | s | peak, GB | printed last |\n"
              "|---|---|---|---|")
        started = time.monotonic()
        in_own_process(make_released, config, Path(folder))
        files = list(Path(released).glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        print(f"| written with random numbers | {time.monotonic() - started:.0f} | | "
              f"{size / 1e9:.2f} GB in {len(files)} files |", flush=True)
        in_own_process(make_parts, config, Path(folder))
        measured("`convert.py merge --verify`", [
            "convert.py", "merge", "--vit", vit, "--llm", decoder, "--tokenizer", released,
            "--out", merged, "--verify"])
        for path in (vit, decoder, merged):
            shutil.rmtree(path)
        peak = measured("read", ["-c", LOAD, released, ""])
        measured("read, decoder alone", ["-c", LOAD, released, "decoder"])
        measured("read, vision alone", ["-c", LOAD, released, "vision"])
        measured("`sample.py --dtype bfloat16`, 8 words", [
            "sample.py", "assets/examples/scene.png", "Where is the red circle?", "--checkpoint",
            released, "--dtype", "bfloat16", "--max-new-tokens", "8"])
        measured("`convert.py export`", ["convert.py", "export", released, "--out", exported])
        measured("`convert.py verify`, both", ["convert.py", "verify", released, exported])
        print(f"\nreading peaks at {peak / size:.3f} of the files' size, the program included")


if __name__ == "__main__":
    main()
