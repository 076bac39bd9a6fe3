"""Any number of ranks computes what one process computes: FSDP, copies, context parallelism."""

import json
import multiprocessing
import os
import random
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from convert import load_tokenizer
from data import PackedRows, Share, default_records, encode, pack, share_row
from model import PRESETS, LlavaOneVision
from train import (TINY, TrainConfig, backward, find_ranks, join_ranks, make_optimizer, row_cost,
                   shard, train_step)
from vision import VisionConfig

SHIPPED = Path(__file__).parent.parent / "assets" / "tiny"
SMALL = replace(PRESETS["tiny"], hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                vision=VisionConfig(2, 64, 2, 128, 64))
RECIPE = replace(TINY["instruct"], rows=8, seq_length=640, eps=1e-5)


def child(function: Callable, rank: int, count: int, port: int, file: Path,
          arguments: tuple) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_PORT": str(port),
                   "MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    torch.save(function(*arguments), f"{file}.{rank}")


def in_ranks(count: int, file: Path, function: Callable, *arguments: object) -> list:
    """What the function returns in each of `count` processes that can join as ranks."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch.distributed.tensor", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=child, args=(function, rank, count, port, file, arguments))
                 for rank in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    for process in processes:
        process.kill()
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(f"{file}.{rank}") for rank in range(count)]


@pytest.fixture(scope="module")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures large and small, several in a conversation, and a third of all without any."""
    folder, rng, lines = tmp_path_factory.mktemp("records"), random.Random(0), []
    for number, record in enumerate(islice(default_records("mixed", 0), 120)):
        names = []
        for i, image in enumerate(record["images"] if number % 3 else []):
            names.append(f"{number}-{i}.png")
            size = (rng.randint(30, 300), rng.randint(30, 300))
            image.resize(size, Image.Resampling.NEAREST).save(folder / names[-1])
        messages = record["messages"]
        if not names:
            messages = [{"role": m["role"], "content": m["content"][-1].get("text", "What?")}
                        for m in messages]
        lines.append(json.dumps({"messages": messages, "images": names}))
    (folder / "records.jsonl").write_text("\n".join(lines))
    return folder / "records.jsonl"


def train(flags: dict, data: Path, steps: int) -> dict:
    """Losses of `steps` steps, gradients of the first and weights after the last."""
    config = TrainConfig(**flags)
    ranks = join_ranks(find_ranks(config), config)
    torch.manual_seed(0)
    model = LlavaOneVision(SMALL).init_weights()
    shard(model, config, ranks)
    optimizer = make_optimizer(model, RECIPE)
    stream = iter(PackedRows(
        str(data), load_tokenizer(SHIPPED), RECIPE.seq_length, 0, rows=RECIPE.rows,
        rank=ranks.rank, data_ranks=ranks.data_ranks, context_ranks=ranks.context,
        cost=partial(row_cost, config=SMALL, trainable=RECIPE.trainable, recompute="none")))

    def whole(x: torch.Tensor) -> torch.Tensor:
        return x.full_tensor() if ranks.mesh is not None else x

    found: dict = {"losses": [], "norms": [], "tokens": []}
    for number, step in enumerate(islice(stream, steps)):
        if number == 0:
            backward(model, step, ranks, config.token_mean)
            found["gradients"] = {name: whole(p.grad).clone() for name, p in
                                  model.named_parameters() if p.requires_grad}
            optimizer.zero_grad()
        loss, norm = train_step(model, optimizer, step, 1e-3, 1.0, ranks, config.token_mean)
        found["losses"].append(loss)
        found["norms"].append(norm)
        found["tokens"].append(step.tokens)
    found["weights"] = {name: whole(p.detach()) for name, p in model.named_parameters()}
    if ranks.count > 1:
        torch.distributed.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def alone(records_file: Path) -> Callable[[str], dict]:
    """What one process computes, by token mean."""
    known: dict = {}

    def result(token_mean: str = "global") -> dict:
        if token_mean not in known:
            known[token_mean] = train({"token_mean": token_mean}, records_file, 20)
        return known[token_mean]
    return result


@pytest.mark.parametrize("count, flags", [
    (2, {}),
    (2, {"context_parallel": 2}),
    (4, {}),
    (4, {"replicas": 2}),
    (4, {"replicas": 4}),
    (4, {"context_parallel": 2}),
    (4, {"context_parallel": 4}),
    (4, {"context_parallel": 2, "replicas": 2, "token_mean": "micro"}),
    (4, {"recompute": "layer"}),
    (4, {"context_parallel": 4, "recompute": "selective"}),
], ids=str)
def test_ranks_equal_one_process(count: int, flags: dict, records_file: Path, tmp_path: Path,
                                 alone: Callable[[str], dict]) -> None:
    """Losses of 20 steps to 1e-5, gradients to 1e-4, rows of mixed kinds; twice the same bits."""
    expected = alone(flags.get("token_mean", "global"))
    first, *others = in_ranks(count, tmp_path / "first", train, flags, records_file, 20)
    assert first["tokens"] == expected["tokens"]
    torch.testing.assert_close(first["losses"], expected["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(first["norms"], expected["norms"], rtol=1e-4, atol=0)
    assert first["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        error = (first["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, (name, error)
    again, *_ = in_ranks(count, tmp_path / "again", train, flags, records_file, 3)
    assert again["losses"] == first["losses"][:3]
    for other in others:
        assert all(torch.equal(other["weights"][name], x) for name, x in first["weights"].items())
