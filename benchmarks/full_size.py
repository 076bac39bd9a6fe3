"""A random checkpoint at full size, on disk: written, read, converted, asked about a picture.

`python tests/full_size.py` needs 40 GB of disk and 16 GB of memory for the 4B (`--model 8b`: 70 and
22).  It runs the commands a user runs and prints, for each, seconds and peak resident memory, the
mapped files included.  Numbers are random, so the answer is, too.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from convert import side_files, write_directory  # noqa: E402
from data import SPECIAL_TOKENS  # noqa: E402
from model import PRESETS, ModelConfig, meta_model, released_names  # noqa: E402


def wide_tokenizer() -> Tokenizer:
    """Bytes, words that never occur, and the special tokens at their released ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [f"word {i}" for i in range(151643 - len(alphabet))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def make(config: ModelConfig, path: Path) -> None:
    """Write a checkpoint of normal numbers, norms of one."""
    model, generator = meta_model(config), torch.Generator().manual_seed(0)
    layout = released_names(model)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in model.named_parameters():
            shape = (len(parameter) // len(layout[name]), *parameter.shape[1:])
            for piece in layout[name]:
                tensor = torch.ones(shape, dtype=torch.bfloat16)
                if "norm" not in name and "ln_q" not in name:
                    tensor.normal_(std=0.02, generator=generator)
                yield piece, tensor

    write_directory(path, tensors(), side_files(config, wide_tokenizer(), torch.bfloat16))


def measured(what: str, command: list[str]) -> float:
    """Run a command, print a row of the table; returns its peak memory in bytes."""
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
import sys, time, torch; sys.path.insert(0, ".")
from model import LlavaOneVision
started = time.monotonic()
model = LlavaOneVision.from_pretrained(sys.argv[1], part=sys.argv[2])
size = sum(p.nbytes for p in model.parameters())
print(f"{size / 1e9:.2f} GB in {time.monotonic() - started:.1f} s, "
      f"{size / 1e6 / (time.monotonic() - started):,.0f} MB/s")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="4b", choices=PRESETS)
    parser.add_argument("--folder", help="where there is room; default: that for temporary files")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        released, nested, parts, again = (f"{folder}/{name}" for name in (
            "released", "nested", "parts", "again"))
        print(f"{flags.model}, torch {torch.__version__}\n\n| | s | peak, GB | printed last |\n"
              "|---|---|---|---|")
        started = time.monotonic()
        writer = multiprocessing.get_context("spawn").Process(
            target=make, args=(PRESETS[flags.model], Path(released)))
        writer.start()  # a process of its own: children inherit the peak of their parent
        writer.join()
        if writer.exitcode:
            sys.exit("writing failed")
        size = sum(file.stat().st_size for file in Path(released).glob("*.safetensors"))
        print(f"| written with random numbers | {time.monotonic() - started:.0f} | | "
              f"{size / 1e9:.2f} GB in {len(list(Path(released).glob('*.safetensors')))} files |")
        peak = measured("read", ["-c", LOAD, released, ""])
        measured("read, text alone", ["-c", LOAD, released, "text"])
        measured("read, vision alone", ["-c", LOAD, released, "vision"])
        measured("`sample.py --dtype bfloat16`, 8 words", [
            "sample.py", "assets/examples/scene.png", "Where is the red circle?", "--checkpoint",
            released, "--dtype", "bfloat16", "--max-new-tokens", "8"])
        measured("`convert.py export --layout nested`", [
            "convert.py", "export", released, "--out", nested, "--layout", "nested"])
        measured("read, nested names", ["-c", LOAD, nested, ""])
        measured("`convert.py verify`, both", ["convert.py", "verify", released, nested])
        shutil.rmtree(nested)
        measured("`convert.py split`", ["convert.py", "split", released, "--out", parts])
        measured("`convert.py merge --verify`", [
            "convert.py", "merge", "--vit", f"{parts}/vit", "--llm", f"{parts}/llm", "--tokenizer",
            f"{parts}/llm", "--out", again, "--verify"])
        print(f"\nreading peaks at {peak / size:.3f} of the files' size, the program included")


if __name__ == "__main__":
    main()
