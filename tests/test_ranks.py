"""Any number of ranks computes what one process computes: FSDP, copies, context parallelism."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image
from ranks import in_ranks

from convert import load_tokenizer
from data import PackedRows, default_records
from model import PRESETS, LlavaOneVision
from train import (TINY, TrainConfig, backward, find_ranks, join_ranks, make_optimizer, row_cost,
                   shard, train_step)
from vision import VisionConfig

SHIPPED = Path(__file__).parent.parent / "assets" / "tiny"
SMALL = replace(PRESETS["tiny"], hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                vision=VisionConfig(2, 64, 2, 128, 64))
RECIPE = replace(TINY["instruct"], seq_length=640, eps=1e-5)


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
    """Losses of `steps` steps of 4 rows, gradients of the first and weights after the last."""
    config = TrainConfig(**{"rows": 4} | flags)
    ranks = join_ranks(find_ranks(config), config)
    torch.manual_seed(0)
    model = LlavaOneVision(SMALL).init_weights()
    shard(model, config, ranks)
    optimizer = make_optimizer(model, RECIPE)
    stream = iter(PackedRows(
        str(data), load_tokenizer(SHIPPED), RECIPE.seq_length, 0, rows=config.rows,
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
    return found


LAYOUTS = {
    2: [{}, {"context_parallel": 2}],
    4: [{}, {"replicas": 2, "rows": 8}, {"replicas": 4}, {"context_parallel": 2},
        {"context_parallel": 4}, {"recompute": "layer"},
        {"context_parallel": 2, "replicas": 2, "token_mean": "micro"},
        {"context_parallel": 4, "recompute": "selective"}],
}


def train_all(layouts: list[dict], data: Path) -> list[tuple[dict, dict]]:
    """Every layout twice, the second time briefly."""
    found = [(train(flags, data, 20), train(flags, data, 2)) for flags in layouts]
    torch.distributed.destroy_process_group()
    return found


@pytest.fixture(scope="module")
def trained(records_file: Path) -> dict[int, list]:
    """By number of ranks, what each rank found."""
    return {count: in_ranks(count, train_all, layouts, records_file)
            for count, layouts in LAYOUTS.items()}


@pytest.fixture(scope="module")
def alone(records_file: Path) -> Callable[..., dict]:
    """What one process computes for the flags that change the result."""
    return cache(lambda rows=4, token_mean="global": train(
        {"rows": rows, "token_mean": token_mean}, records_file, 20))


@pytest.mark.parametrize("count, number", [
    pytest.param(count, i, id=f"{count} ranks {flags}")
    for count, layouts in LAYOUTS.items() for i, flags in enumerate(layouts)])
def test_ranks_equal_one_process(count: int, number: int, trained: dict[int, list],
                                 alone: Callable[..., dict]) -> None:
    """Losses of 20 steps to 1e-5, gradients to 1e-4, rows of mixed kinds; twice the same bits."""
    flags = LAYOUTS[count][number]
    expected = alone(**{k: v for k, v in flags.items() if k in ("rows", "token_mean")})
    (first, again), *others = (found[number] for found in trained[count])
    assert first["tokens"] == expected["tokens"]
    torch.testing.assert_close(first["losses"], expected["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(first["norms"], expected["norms"], rtol=1e-4, atol=0)
    assert first["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        error = (first["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, (name, error)
    assert again["losses"] == first["losses"][:2]
    assert all(torch.equal(again["gradients"][name], x) for name, x in first["gradients"].items())
    for other, _ in others:
        assert all(torch.equal(other["weights"][name], x) for name, x in first["weights"].items())
