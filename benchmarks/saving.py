"""How long a training waits for its state to be saved, beside how long the writing takes.

Run `python -m benchmarks.saving`: prints a table over states of several sizes, medians of five.
The first copy allocates the memory that the later ones use again: its time stands apart.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.clock import print_table
from convert import StateWriter

TENSORS = 300  # of a state, as of the tiny preset


def measure(folder: Path, size: float) -> list[object]:
    """A line of the table: MB, seconds of the first copy, of a copy, until it is on the disk."""
    tensors = {f"layer.{i}": torch.randn(int(size / 4 / TENSORS)) for i in range(TENSORS)}
    writer = StateWriter(folder)
    pauses, wholes = [], []
    for step in range(6):
        started = time.monotonic()
        writer.write(step, tensors, {"step": step, "ranks": 1})
        pauses.append(time.monotonic() - started)
        writer.wait()
        wholes.append(time.monotonic() - started)
    pause, whole = statistics.median(pauses[1:]), statistics.median(wholes[1:])
    return [f"{size / 1e6:,.0f}", f"{pauses[0]:.3f}", f"{pause:.3f}", f"{whole:.3f}",
            f"{pause / whole:.1%}"]


def main() -> None:
    """Print the table."""
    lines = []
    for size in (40e6, 400e6, 1.6e9):
        with tempfile.TemporaryDirectory() as folder:
            lines.append(measure(Path(folder), size))
    print_table(["MB", "first pause, s", "pause, s", "written, s", "pause / written"], lines)


if __name__ == "__main__":
    main()
