"""One clock and one table printer for all kernel timings."""

import gc
import time
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.errors import TritonError

GRAPH_BELOW = 10.0  # milliseconds; shorter calls are captured, or Python would be what is measured


def describe_machine() -> str:
    """Print what is measured on; returns the device, cuda where there is one."""
    if torch.cuda.is_available():
        device, name = "cuda", torch.cuda.get_device_name()
    else:
        device, name = "cpu", f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, "
          f"Triton {triton.__version__}, {time.strftime('%Y-%m-%d')}")
    return device


def median_ms(call: Callable[[], object], device: str) -> float:
    """Median time of a call in milliseconds, warmed up.

    On a GPU a short call is captured in a CUDA graph and replayed: launching it from Python takes
    longer than the GPU needs.  A call that cannot be captured is timed as it is.
    """
    if device == "cuda":
        ms = triton.testing.do_bench(call, return_mode="median")
        if ms < GRAPH_BELOW:
            try:
                gc.collect()  # gradients of earlier calls belong to another stream
                ms = triton.testing.do_bench_cudagraph(call, return_mode="median")
            except RuntimeError:
                torch.cuda.synchronize()
        return ms
    times = []
    for _ in range(8):
        started = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - started))
    return sorted(times[1:])[3]


def attempt(reasons: dict[str, str], name: str, call: Callable, *arguments: Any) -> Any:
    """What the call returns; None if it cannot be done here, and `reasons` gets why."""
    try:
        return call(*arguments)
    except (RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError,
            TritonError) as error:
        reasons[name] = (str(error).strip() or repr(error)).split("\n")[0][:100]
        return None


def print_table(header: list[str], lines: list[list[object]]) -> None:
    """A Markdown table: text to the left, numbers to the right; None is a dash."""
    def shown(value: object) -> str:
        if value is None:
            return "-"
        return f"{value:.3g}" if isinstance(value, float) else str(value)

    cells = [header, *([shown(value) for value in line] for line in lines)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    for number, line in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                                for i, (cell, width) in enumerate(zip(line, widths))) + " |")
        if number == 0:
            print("|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print(flush=True)


def print_reasons(reasons: dict[str, str]) -> None:
    """Why dashes are dashes."""
    for name, reason in reasons.items():
        print(f"- {name}: {reason}")
