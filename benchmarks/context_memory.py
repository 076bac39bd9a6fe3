"""Memory and work of one long document on one process and shared by ranks (context parallelism).

Run `python -m benchmarks.context_memory [TOKENS] [RANKS]` (default 65536 tokens, 4 ranks; some
minutes): prints for each the most memory over that of the idle process, attention work, and the
loss.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from data import Sample, lay_out
from model import PRESETS, LlavaOneVision
from parallel import find_ranks, join_ranks, shard, share_row
from tests.ranks import in_ranks, resident
from train import Step, backward


def forward_and_backward(tokens: int, recompute: str) -> dict[str, float]:
    """One document without pictures through the tiny model, by as many ranks as there are."""
    count = int(os.environ["WORLD_SIZE"])
    ranks = join_ranks(find_ranks("cpu", context=count))
    torch.manual_seed(0)
    model = LlavaOneVision(PRESETS["tiny"]).init_weights()
    shard(model, recompute, False, ranks)

    def step(tokens: int) -> Step:
        ids = torch.randint(20, 1000, (tokens,), generator=torch.Generator().manual_seed(0))
        sample = Sample(ids, ids.clone(), [], torch.zeros(0, 3, dtype=torch.int64), (0, 0), "long")
        row = share_row([sample], ranks.rank, count, [12, 13]) if count > 1 else lay_out([sample])
        return Step([row], 1, {"labels": tokens - 1}, balance=1.0)

    backward(model, step(512), ranks)  # what is loaded at the first use is not counted
    work = step(tokens)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    idle, started = resident("VmRSS"), time.monotonic()
    loss = backward(model, work, ranks)[0]
    seconds, peak = time.monotonic() - started, resident("VmHWM") - idle
    positions = getattr(work.rows[0], "position_ids", torch.arange(tokens))
    if ranks.count > 1:
        dist.all_reduce(loss)
        dist.destroy_process_group()
    return {"loss": float(loss), "peak": peak, "pairs": float((positions + 1).sum()),
            "seconds": seconds}


def compare(tokens: int, ranks: int, recompute: str = "none") -> tuple[float, float, float]:
    """Largest peak over that of one process, largest work over the mean, relative error of loss."""
    # freed tensors go back to the system at once, not to a heap with holes: set for new processes
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "131072"
    (alone,), shared = (in_ranks(n, forward_and_backward, tokens, recompute, timeout=3000)
                        for n in (1, ranks))
    for name, found in (("one process", [alone]), (f"{ranks} ranks", shared)):
        print(f"{name:12} loss {found[0]['loss']:.6f}  MiB "
              + " ".join(f"{rank['peak'] / 2**20:,.0f}" for rank in found) + "  Gpairs "
              + " ".join(f"{rank['pairs'] / 1e9:.4f}" for rank in found)
              + f"  {found[0]['seconds']:.0f} s")
    pairs = [rank["pairs"] for rank in shared]
    return (max(rank["peak"] for rank in shared) / alone["peak"],
            max(pairs) / (sum(pairs) / ranks), abs(shared[0]["loss"] / alone["loss"] - 1))


if __name__ == "__main__":
    tokens, ranks = ([int(x) for x in sys.argv[1:]] + [65536, 4][len(sys.argv) - 1:])[:2]
    memory, work, error = compare(tokens, ranks)
    print(f"{tokens:,} tokens over {ranks} ranks: memory {memory:.3f} of one process, largest work "
          f"{work:.4f} of the mean, loss differs by {error:.1e}")
