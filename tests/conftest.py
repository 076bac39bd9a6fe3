"""Lets the Triton kernels run on a CPU: in Triton's interpreter, with two of its faults mended.

`triton.jit` looks at TRITON_INTERPRET when a kernel is defined, so the variable is set for the
first import only; a test that wants the kernels, not the CPU path, sets it again (see `kernels`).
The interpreter (3.6 to 3.9) truncates where it should round to bfloat16 or FP8 and multiplies the
bit patterns of bfloat16 matrices: conversions are done by PyTorch here, products in float32.
"""

import os
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import forkserver
from typing import Any

import numpy as np
import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# PyTorch's compiler would take what it compiled for other vector instructions from its cache
CAPABILITY = torch.backends.cpu.get_cpu_capability().replace(" ", "-")
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR",
                      f"{tempfile.gettempdir()}/torchinductor-of-tests-{CAPABILITY}")


def interpret_faithfully() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def torch_dtype(dtype: tl.dtype) -> torch.dtype:
        names = {"fp": "float", "bf": "bfloat", "fp8e4nv": "float8_e4m3fn", "fp8e5": "float8_e5m2"}
        name = names.get(dtype.name) or names[dtype.name[:2]] + dtype.name[2:]
        return getattr(torch, name)

    def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: object) -> np.ndarray:
        bits = {16: torch.int16, 8: torch.uint8, 32: torch.int32, 64: torch.int64}
        x = torch.frombuffer(bytearray(data.tobytes()), dtype=torch_dtype(source))
        x = x.to(torch_dtype(target)).view(bits[target.primitive_bitwidth])
        return x.numpy().view(f"uint{target.primitive_bitwidth}").reshape(data.shape)

    def in_float32(x: interpreter.TensorHandle) -> interpreter.TensorHandle:
        if x.dtype.scalar != tl.bfloat16:
            return x
        data = convert(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    builder.create_dot = lambda self, a, b, *rest: dot(self, in_float32(a), in_float32(b), *rest)
    interpreter._convert_float = convert


if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
    import attention_kernel  # noqa: F401
    import fp8_kernel  # noqa: F401
    interpret_faithfully()
    del os.environ["TRITON_INTERPRET"]


# ------------------------------------------------------------ commands that run beside the tests

BESIDE = pytest.StashKey[Future]()
POOL = ThreadPoolExecutor(max_workers=2)  # the other tests wait, in part, for processes
RUNNING: list[subprocess.Popen] = []
# of the commands: tests change their own meanwhile, and have the other core
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run_beside(root: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen([sys.executable, *arguments], cwd=root, env=ENVIRONMENT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    RUNNING.append(process)
    out, err = process.communicate(timeout=1800)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "beside(*arguments): a Python command, or a function, that "
                            "starts with the tests; the fixture `done` waits for it")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start what the tests marked `beside` wait for, two at a time."""
    if not session.config.option.collectonly:
        # the server that forks ranks and commands, before tests change the environment
        forkserver.ensure_running()
    for item in session.items:
        marker = item.get_closest_marker("beside")
        skipped = any(all(mark.args) for mark in item.iter_markers("skipif"))
        if marker is not None and not skipped and not session.config.option.collectonly:
            work = (marker.args if callable(marker.args[0]) else
                    (run_beside, str(session.config.rootpath), *marker.args))
            item.stash[BESIDE] = POOL.submit(*work)


def pytest_sessionfinish() -> None:
    POOL.shutdown(wait=False, cancel_futures=True)
    for process in RUNNING:
        process.kill()


@pytest.fixture
def done(request: pytest.FixtureRequest) -> Any:
    """What the command of the test's marker `beside` has printed, or the function returned."""
    return request.node.stash[BESIDE].result()


@pytest.fixture(params=[True, False] if DEVICE == "cpu" else [True])
def interpreted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run a test with the kernels, as `kernels` does, and on a CPU once more without them."""
    if request.param and DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    return request.param


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the kernels: natively on a GPU, interpreted on a CPU."""
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
