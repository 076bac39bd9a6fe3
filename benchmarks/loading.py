"""Speed of what comes before the model: packing, measuring lengths, loading rows; no GPU wanted.

Run `python -m benchmarks.loading` (two minutes on two cores): prints four tables.
- packing: 10 million samples, as long as the published ones, into rows;
- measuring: records a second of the index, which reads headers, beside decoding all pictures;
- loading: samples a second of a DataLoader over `data.Rows`, beside a plain loop in one process,
  for pictures that keep their size and for pictures that are made much smaller;
- bytes in flight: what waits in memory for a rank of the full recipe.

Pictures are noise with the spectrum of a photograph, so their JPEG files are about as large as a
photograph's; all files lie in a temporary directory and are read once before.
"""

import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, features
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from benchmarks.clock import print_table
from convert import load_tokenizer
from data import (COLUMNS, FileData, Index, Rows, chat_tokens, decode_all, measure, pack_rows)
from vision import CLIP_MEAN, CLIP_STD, MAX_PIXELS, MIN_PIXELS, PATCH, PATCH_NUMBERS, smart_resize

# Lengths of the published samples, 36 to 8,187 tokens: first, last + 1, and how many there are.
PUBLISHED = ((36, 1024, 4_127_403), (1024, 2048, 1_085_218), (2048, 8188, 308_112))
SAMPLES = 10_000_000  # to pack
RUNS = 3
FULL_ROW = 8192  # tokens of a row of the full recipe
WORKERS, PREFETCH = 4, 4  # processes of a rank, and rows that each prepares ahead
# pictures, width, height and --max-pixels
KEPT = (240, 640, 480, MAX_PIXELS)
SHRUNK = (48, 2000, 1500, 200_704)
WORDS = "a the in of on and with picture person street blue small two stands near table".split()


def peak_mib() -> float:
    """The most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def packing() -> None:
    """Print how long `pack_rows` takes, and how full the rows are."""
    rng = np.random.default_rng(0)
    counts = np.array([count for _, _, count in PUBLISHED])
    kinds = rng.choice(len(PUBLISHED), size=SAMPLES, p=counts / counts.sum())
    firsts, ends = np.array(PUBLISHED)[kinds, :2].T
    lengths = rng.integers(firsts, ends)
    del kinds, firsts, ends
    lines = []
    for room in (8192, 32768):
        started = time.perf_counter()
        rows = int(pack_rows(lengths, room).max()) + 1
        seconds = time.perf_counter() - started
        lines.append([f"{room:,}", f"{seconds:.1f}", f"{rows:,}",
                      f"{lengths.sum() / (rows * room):.3%}", f"{peak_mib():,.0f}"])
    print(f"Packing {SAMPLES:,} samples, mean {lengths.mean():,.0f} tokens.  Lengths are drawn from "
          "the published\nhistogram, uniform inside each of its intervals: "
          + ", ".join(f"{share:.1%} in [{first:,}, {end:,})"
                      for (first, end, _), share in zip(PUBLISHED, counts / counts.sum()))
          + ".\nThe peak is the whole process's, with the lengths; the rows of 8,192 come first.")
    print_table(["tokens in a row", "seconds", "rows", "full", "peak MiB"], lines)


def picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise of all scales, equally strong in each octave, as in photographs; little colour."""
    total = np.zeros((height, width, 3), dtype=np.float32)
    for octave in range(2, 10):
        cells = rng.integers(0, 256, (3 * 2**octave // 4, 2**octave, 3), dtype=np.uint8)
        total += Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    grey = total.mean(2, keepdims=True)
    levels = 128 + (grey + 0.3 * (total - grey) - 8 * 128) / 4
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def write_records(folder: Path, count: int, width: int, height: int) -> None:
    """Write records.json and its pictures, whose sides differ by up to a fifth; print their size.

    The pictures are windows of one that is larger.
    """
    rng = np.random.default_rng(1)
    whole = picture(rng, 3 * width // 2, 3 * height // 2)
    records, size = [], 0
    for i in range(count):
        w, h = (rng.uniform(0.8, 1.2, 2) * (width, height)).astype(int)
        left, top = rng.integers(0, (whole.width - w, whole.height - h))
        file = folder / f"{i}.jpg"
        whole.crop((left, top, left + w, top + h)).save(file, quality=90)
        size += file.stat().st_size
        answer = " ".join(rng.choice(WORDS, rng.integers(50, 200)))
        records.append({"id": str(i), "image": file.name, "conversations": [
            {"from": "human", "value": "<image>\nDescribe the picture."},
            {"from": "gpt", "value": answer}]})
    (folder / "records.json").write_text(json.dumps(records))
    print(f"{count} records with a JPEG of about {width} x {height} pixels (quality 90, mean "
          f"{size / count / 1000:,.0f} kB) and 50 to 200 words")


def plain_loop(folder: Path, tokenizer: Tokenizer, max_pixels: int) -> tuple[int, int]:
    """What a user would write, in one process, with the released processor's arithmetic in NumPy.

    Returns tokens and patches, for comparison.
    """
    tokens = count = 0
    roles = {"human": "user", "gpt": "assistant"}
    for record in json.loads((folder / "records.json").read_text()):
        image = Image.open(folder / record["image"]).convert("RGB")
        height, width = smart_resize(image.height, image.width, MIN_PIXELS, max_pixels)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        pixels = (np.asarray(image).astype(np.float32) / 255 - CLIP_MEAN) / CLIP_STD
        h, w = height // PATCH, width // PATCH
        pixels = pixels.transpose(2, 0, 1).reshape(3, h // 2, 2, PATCH, w // 2, 2, PATCH)
        patches = pixels.transpose(1, 4, 2, 5, 0, 3, 6).reshape(h * w, PATCH_NUMBERS)
        messages = [{"role": roles[turn["from"]], "content": turn["value"]}
                    for turn in record["conversations"]]
        ids, labels = chat_tokens(messages, tokenizer, [h * w // 4])
        sample = torch.tensor(ids), torch.tensor(labels), torch.from_numpy(patches)
        tokens, count = tokens + len(sample[0]), count + len(sample[2])
    return tokens, count


def load_rows(index: Index, tokenizer: Tokenizer, workers: int) -> tuple[int, int]:
    """All rows of an epoch through a DataLoader, as `train.row_loader` makes it; tokens, patches."""
    data = FileData(index, tokenizer, FULL_ROW, seed=0)
    loader = DataLoader(Rows(data), batch_size=None, num_workers=workers,
                        sampler=range(data.rows_in(0)), prefetch_factor=PREFETCH if workers else None)
    tokens = count = 0
    for step in loader:
        tokens, count = tokens + len(step.row.input_ids), count + len(step.row.patches)
    return tokens, count


def seconds_of(ways: dict[str, Callable], runs: int = RUNS) -> dict[str, float]:
    """Median seconds of each way; runs take turns, and all ways must give the same sums."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found = set()
    for _ in range(runs):
        for name, way in ways.items():
            started = time.perf_counter()
            found.add(way())
            seconds[name].append(time.perf_counter() - started)
    if len(found) > 1:
        raise AssertionError(f"the ways differ in tokens or patches: {found}")
    return {name: statistics.median(times) for name, times in seconds.items()}


def measuring(folder: Path, tokenizer: Tokenizer, count: int) -> None:
    """Print the speed of the index beside that of decoding."""
    files = [folder / "records.json"]
    seconds = seconds_of({
        "headers, as the index reads them": lambda: len(measure(files, tokenizer).table),
        "pictures decoded, resized and cut, too":
            lambda: len(measure(files, tokenizer, check=decode_all).table)})
    names = list(seconds)
    print("Measuring lengths in one process, texts tokenised each time; a ratio of 10 is wanted.")
    print_table(["what is read", "records/s", "ratio"],
                [[name, f"{count / seconds[name]:,.0f}",
                  f"{seconds[names[1]] / seconds[name]:.2f}"] for name in names])


def loading(folder: Path, tokenizer: Tokenizer, count: int, max_pixels: int) -> None:
    """Print the speed of the loader beside that of a plain loop."""
    index = measure([folder / "records.json"], tokenizer, pixels=(MIN_PIXELS, max_pixels))
    workers = os.cpu_count() or 1
    plain, ours = "a plain loop", "DataLoader over Rows"
    seconds = seconds_of({
        plain: lambda: plain_loop(folder, tokenizer, max_pixels),
        f"{ours}, workers 0": lambda: load_rows(index, tokenizer, 0),
        f"{ours}, workers {workers}": lambda: load_rows(index, tokenizer, workers)})
    tokens, patches = (int(index.table[:, COLUMNS.index(name)].sum())
                       for name in ("tokens", "patches"))
    print(f"Loading them with --max-pixels {max_pixels:,}: {tokens / count:,.0f} tokens and "
          f"{patches / count:,.0f} patches a sample, rows of {FULL_ROW:,}.\nOne thread a process; "
          f"median of {RUNS} runs that take turns.  The plain loop also normalises, which\ntraining "
          "does on the GPU; starting the workers counts.")
    print_table(["who loads", "samples/s", "tokens/s", "over plain"],
                [[name, f"{count / seconds[name]:,.1f}", f"{tokens / seconds[name]:,.0f}",
                  f"{seconds[plain] / seconds[name]:.2f}"] for name in seconds])


def in_flight() -> None:
    """Print what waits in memory for a rank."""
    patches = 4 * PATCH_NUMBERS  # bytes of a visual token
    row = FULL_ROW * (patches + 2 * 8)
    total = (WORKERS * PREFETCH + 1) * row
    print(f"Bytes in flight of a rank: rows of {FULL_ROW:,} tokens, {WORKERS} workers, "
          f"prefetch_factor {PREFETCH}, all tokens visual")
    print_table(["what", "formula", "MB"], [
        ["largest row", f"{FULL_ROW:,} * (4 * {PATCH_NUMBERS} bytes of patches + 2 * 8 of ids and "
         "targets)", f"{row / 1e6:,.1f}"],
        ["in flight", f"({WORKERS} * {PREFETCH} + 1) * largest row", f"{total / 1e6:,.0f}"]])


def main() -> None:
    print(f"{os.cpu_count()} CPU cores, Pillow {PIL.__version__}, JPEG "
          f"{features.version('libjpeg_turbo') or features.version('jpg')}, NumPy "
          f"{np.__version__}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    packing()
    torch.set_num_threads(1)  # as workers have
    tokenizer = load_tokenizer(Path("assets/tiny"))
    for count, width, height, max_pixels in (KEPT, SHRUNK):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_records(folder, count, width, height)
            if max_pixels == MAX_PIXELS:
                measuring(folder, tokenizer, count)
            loading(folder, tokenizer, count, max_pixels)
    in_flight()


if __name__ == "__main__":
    main()
