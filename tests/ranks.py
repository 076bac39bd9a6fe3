"""Processes with everything imported already: ranks that can join, and commands that start fast."""

import contextlib
import io
import multiprocessing
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch

from train import SIGNALS

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train", "sample", "torch.distributed.tensor", "torch._dynamo"])


def run_script(folder: Path, arguments: list[str], environment: dict[str, str]) -> None:
    os.chdir(folder)
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(folder.with_name(f"{folder.name}.{name}"), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    os.environ |= environment
    torch.set_num_threads(1)  # other tests have the other core, and threads would wait for it
    sys.argv = arguments
    runpy.run_path(str(ROOT / arguments[0]), run_name="__main__")


def fast_command(folder: Path, *arguments: str | Path,
                 **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as `python SCRIPT ARGUMENTS`, three seconds faster."""
    process = CONTEXT.Process(target=run_script, args=(folder, list(map(str, arguments)),
                                                       environment))
    process.start()
    process.join(300)
    process.kill()
    files = [folder.with_name(f"{folder.name}.{name}") for name in ("stdout", "stderr")]
    texts = [file.read_text() for file in files]
    for file in files:
        file.unlink()
    return subprocess.CompletedProcess(arguments, process.exitcode, *texts)


def command_here(folder: Path, *arguments: str | Path,
                 **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as `python SCRIPT ARGUMENTS`, but in this process: for what ends at once."""
    code, out, err = 0, io.StringIO(), io.StringIO()
    before, at = dict(os.environ), os.getcwd()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    os.environ |= environment
    os.chdir(folder)
    argv, sys.argv = sys.argv, list(map(str, arguments))
    try:
        # train.py ends with killing what its process has started: here, ranks of other tests
        with (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err),
              mock.patch("multiprocessing.active_children", return_value=[])):
            runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
        os.chdir(at)
        os.environ.clear()
        os.environ |= before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def child(function: Callable, rank: int, count: int, port: int, folder: str,
          arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank),
                   "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # errors are printed, the logs of runs are not
    torch.set_num_threads(1)
    Path(folder, str(rank)).write_bytes(pickle.dumps(function(*arguments)))


def in_ranks(count: int, function: Callable, *arguments: object, timeout: float = 300) -> list:
    """What the function returns in each of `count` processes, which torchrun might have started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = [CONTEXT.Process(target=child, args=(function, rank, count, port, folder,
                                                         arguments)) for rank in range(count)]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]  # None: it hangs
        for process in processes:
            process.kill()
        if codes != [0] * count:
            raise RuntimeError(f"the ranks ended with exit codes {codes}")
        return [pickle.loads(Path(folder, str(rank)).read_bytes()) for rank in range(count)]


def resident(name: str) -> int:
    """Bytes of this process by a name of Linux: VmRSS is now, VmHWM the most so far."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024
