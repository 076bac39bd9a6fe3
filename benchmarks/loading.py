"""Speed of what comes before the model: packing, measuring, loading rows; no GPU wanted.

Run `python -m benchmarks.loading` (under two minutes on two cores): prints tables on packing, the
index, a DataLoader beside a plain loop, and the memory of what is loaded ahead.  Pictures are noise
with the spectrum of photographs, JPEG files of quality 90 in a temporary directory, which the
system still holds in memory.
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
from PIL import Image
from tokenizers import Tokenizer
from torch.utils.data import DataLoader

from benchmarks.clock import print_table
from convert import load_tokenizer
from data import COLUMNS, FileData, Index, Rows, chat_tokens, decode_all, measure, pack_rows
from vision import CLIP_MEAN, CLIP_STD, MAX_PIXELS, MIN_PIXELS, PATCH, PATCH_NUMBERS, smart_resize

# How many of the published samples have a length from the first number up to below the second.
PUBLISHED = ((36, 1024, 4_127_403), (1024, 2048, 1_085_218), (2048, 8188, 308_112))
SAMPLES = 10_000_000  # to pack
RUNS = 3
ROWS = (8192, 32768)  # tokens of a row of the recipes full and quick
LOADED = 2048  # tokens of a row that is loaded here: of many short ones, all workers get as many
WORKERS = 4  # processes of a rank; together they prepare four rows ahead, as train.row_loader says
WORDS = "a the in of on and with picture person street blue small two stands near table".split()


def cpu_seconds() -> float:
    """Processor time of this process and of its workers that have ended."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(
        resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def packing() -> None:
    """Print how long `pack_rows` takes, and how full the rows are."""
    rng = np.random.default_rng(0)
    first, end, count = np.array(PUBLISHED).T
    kind = rng.choice(len(count), size=SAMPLES, p=count / count.sum())
    lengths = rng.integers(first[kind], end[kind])
    del kind
    lines = []
    for room in (8192, 32768):
        started, cpu = time.perf_counter(), cpu_seconds()
        rows = int(pack_rows(lengths, room).max()) + 1
        seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB, on a Mac bytes
        peak /= 2**20 if sys.platform == "darwin" else 2**10
        lines.append([f"{room:,}", f"{seconds:.1f}", f"{cpu:.1f}", f"{rows:,}",
                      f"{lengths.sum() / (rows * room):.3%}", f"{peak:,.0f}"])
    shares = ", ".join(f"{100 * n / count.sum():.1f} % in [{a:,}, {b:,})" for a, b, n in PUBLISHED)
    print(f"Packing {SAMPLES:,} samples, mean {lengths.mean():,.0f} tokens.  Their lengths, as "
          f"published, uniform inside:\n{shares}.\nThe peak is that of the whole process so far.")
    print_table(["tokens in a row", "seconds", "CPU s", "rows", "full", "peak MiB"], lines)


def noise(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Noise of all scales, equally strong in each octave, as in photographs; little colour."""
    total = np.zeros((height, width, 3), dtype=np.float32)
    for octave in range(2, 10):
        cells = rng.integers(0, 256, (3 * 2**octave // 4, 2**octave, 3), dtype=np.uint8)
        total += Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
    grey = total.mean(2, keepdims=True)
    levels = 128 + (grey + 0.3 * (total - grey) - 8 * 128) / 4
    return Image.fromarray(levels.clip(0, 255).astype(np.uint8))


def write_records(folder: Path, count: int, width: int, height: int) -> None:
    """Write records.json and its pictures, windows of one that is larger; print their size."""
    rng = np.random.default_rng(1)
    whole = noise(rng, 3 * width // 2, 3 * height // 2)
    records, size = [], 0
    for i in range(count):
        w, h = (rng.uniform(0.8, 1.2, 2) * (width, height)).astype(int)
        left, top = rng.integers(0, (whole.width - w, whole.height - h))
        file = folder / f"{i}.jpg"
        whole.crop((left, top, left + w, top + h)).save(file, quality=90)
        size += file.stat().st_size
        records.append({"id": str(i), "image": file.name, "conversations": [
            {"from": "human", "value": "<image>\nDescribe the picture."},
            {"from": "gpt", "value": " ".join(rng.choice(WORDS, rng.integers(50, 200)))}]})
    (folder / "records.json").write_text(json.dumps(records))
    print(f"{count} records, each with a picture of about {width} x {height} pixels (mean "
          f"{size / count / 1000:,.0f} kB) and 50 to 200 words.")


def plain_loop(folder: Path, tokenizer: Tokenizer, max_pixels: int) -> tuple[int, int]:
    """What a user would write, with the released processor's arithmetic: tokens and patches."""
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
        sample = [*map(torch.tensor, chat_tokens(messages, tokenizer, [h * w // 4])),
                  torch.from_numpy(patches)]
        tokens, count = tokens + len(sample[0]), count + len(sample[2])
    return tokens, count


def load_rows(index: Index, tokenizer: Tokenizer, workers: int) -> tuple[int, int]:
    """An epoch through a DataLoader like `train.row_loader`'s: tokens and patches."""
    data = FileData(index, tokenizer, LOADED, seed=0)
    loader = DataLoader(Rows(data), batch_size=None, sampler=range(data.rows_in(0)),
                        num_workers=workers,
                        prefetch_factor=max(1, 4 // workers) if workers else None)
    tokens = count = 0
    for step in loader:
        tokens, count = tokens + len(step.row.input_ids), count + len(step.row.patches)
    return tokens, count


def compare(title: str, count: int, ways: dict[str, Callable[[], object]]) -> None:
    """Print medians of runs that take turns; all ways must return the same."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    found = set()
    for _ in range(RUNS):
        for name, way in ways.items():
            started, cpu = time.perf_counter(), cpu_seconds()
            found.add(way())
            times[name].append((time.perf_counter() - started, cpu_seconds() - cpu))
    if len(found) > 1:
        raise ValueError(f"the ways do not agree: {found}")
    medians = [[statistics.median(column) for column in zip(*runs)] for runs in times.values()]
    print_table([title, "samples/s", "ratio", "CPU ms a sample", "CPU ratio"],
                [[name, f"{count / wall:,.0f}", f"{medians[0][0] / wall:.2f}",
                  f"{1000 * cpu / count:.2f}", f"{medians[0][1] / cpu:.2f}"]
                 for name, (wall, cpu) in zip(ways, medians)])


def measuring_and_loading(tokenizer: Tokenizer, count: int, width: int, height: int,
                          max_pixels: int) -> None:
    """Print the speed of the index and of the loader."""
    with tempfile.TemporaryDirectory() as name:
        folder, files, pixels = Path(name), [Path(name, "records.json")], (MIN_PIXELS, max_pixels)
        write_records(folder, count, width, height)
        index = measure(files, tokenizer, pixels=pixels)
        if width < 1000:
            compare("measuring, one process", count, {
                "all pictures decoded and cut, too":
                    lambda: len(measure(files, tokenizer, pixels=pixels, check=decode_all).table),
                "only headers read (wanted: 10)":
                    lambda: len(measure(files, tokenizer, pixels=pixels).table)})
        tokens, patches = index.table[:, [COLUMNS.index("tokens"), COLUMNS.index("patches")]].T
        print(f"Rows of {LOADED:,} tokens, --max-pixels {max_pixels:,}: a sample has "
              f"{tokens.mean():,.0f} tokens and {patches.mean():,.0f} patches.")
        compare("loading", count, {
            "plain loop": lambda: plain_loop(folder, tokenizer, max_pixels),
            **{f"DataLoader of Rows, workers={n}": lambda n=n: load_rows(index, tokenizer, n)
               for n in (0, os.cpu_count() or 1)}})


def main() -> None:
    print(f"{os.cpu_count()} CPU cores, Pillow {PIL.__version__}, NumPy {np.__version__}, "
          f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}\n")
    packing()
    torch.set_num_threads(1)  # as in workers
    tokenizer = load_tokenizer(Path("assets/tiny"))
    print(f"Measuring and loading: medians of {RUNS} runs that take turns, one thread a process.  "
          "The plain\nloop also normalises, which training does on the GPU.  Starting the workers "
          "counts, and CPU\nis the processor time of all processes: other programs hardly disturb "
          "it.\n")
    measuring_and_loading(tokenizer, 200, 640, 480, MAX_PIXELS)
    measuring_and_loading(tokenizer, 40, 2000, 1500, 200_704)
    print(f"Bytes in flight of a rank with {WORKERS} workers, if all tokens are visual.  A token\n"
          f"has 4 patches of {PATCH_NUMBERS} bytes, an id and a target; {WORKERS} rows are ahead, "
          "one is trained on.")
    sizes = [tokens * (4 * PATCH_NUMBERS + 2 * 8) / 1e6 for tokens in ROWS]
    print_table(["tokens of a row", "MB of a row", "MB in flight"],
                [[f"{tokens:,}", f"{size:.1f}", f"{(WORKERS + 1) * size:.0f}"]
                 for tokens, size in zip(ROWS, sizes)])


if __name__ == "__main__":
    main()
