"""Processes that can join as ranks, for tests and measurements on one machine."""

import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch


def child(function: Callable, rank: int, count: int, port: int, folder: str,
          arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank),
                   "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.save(function(*arguments), f"{folder}/{rank}")


def in_ranks(count: int, function: Callable, *arguments: object, timeout: float = 300) -> list:
    """What the function returns in each of `count` processes, which torchrun might have started."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch.distributed.tensor", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=child, args=(function, rank, count, port, folder,
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
        return [torch.load(Path(folder) / str(rank)) for rank in range(count)]
