"""Any number of ranks computes what one does: FSDP, copies, shared rows, experts apart."""

import copy
import gc
import json
import math
import random
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import in_ranks, resident
from torch.distributed.tensor import DTensor
from torch.utils.flop_counter import FlopCounterMode

import attention_kernel
import convert
import train as train_module
from assets.scenes import drawn_record
from convert import load_model, load_tokenizer, save_checkpoint
from data import LOADS, FileData, Sample, encode, lay_out, load_of, measure
from fp8_kernel import convert_to_fp8
from model import PRESETS, LlavaOneVision, forward_flops, parameters_by_part
from parallel import Ranks, RowShare, find_ranks, join_ranks, shard, share_row
from train import (TINY, Run, RunError, State, Step, TrainConfig, backward, make_optimizer,
                   note_refused, routing, row_loader, set_balance, steps_of, train_step,
                   training_flops)
from vision import VisionConfig

SHIPPED = Path(__file__).parent.parent / "assets" / "tiny"
SMALL = replace(PRESETS["tiny"], hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                vision=VisionConfig(2, 64, 2, 128, 64))
SMALL_MOE = replace(SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
IN_128 = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4, "head_dim": 64,
          "moe_intermediate_size": 128, "vision": VisionConfig(2, 64, 2, 128, 128)}  # for FP8
RECIPE = replace(TINY["instruct"], eps=1e-5, lr=1e-3, min_lr=1e-3, warmup=0.0)


def write_records(folder: Path) -> Path:
    """Pictures large and small, several in a conversation, and a third of all without any."""
    rng, lines = random.Random(0), []
    for number in range(120):
        record = drawn_record("mixed", 0, number)
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


@pytest.fixture(scope="module")
def records_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("records"))


@cache
def first_steps(file: Path, seq_length: int, rows: int, ranks: Ranks, count: int) -> list[Step]:
    """The first steps of a rank, with all their rows; runs that differ otherwise share them."""
    tokenizer = load_tokenizer(SHIPPED)
    data = FileData(measure([file], tokenizer), tokenizer, seq_length, 0)
    recipe = replace(RECIPE, seq_length=seq_length, rows=rows)
    loader = row_loader(data, SMALL, recipe, 0, ranks)
    found = []
    for step in islice(steps_of(loader, rows // ranks.data_ranks), count):
        step.rows = list(step.rows)
        found.append(step)
    return found


def train(flags: dict, data: Path, steps: int) -> dict:
    """Losses of `steps` steps of 4 rows, gradients of the first and weights after the last.

    Of short rows three times as many.
    """
    config = TrainConfig(**{"rows": 4, "seq_length": 640} | flags)
    steps *= 3 if config.seq_length < 300 else 1
    ranks = join_ranks(find_ranks("cpu", config.dtype, config.replicas, config.context_parallel,
                                  config.expert_parallel))
    torch.manual_seed(0)
    size = SMALL_MOE if config.model == "tiny-moe" else SMALL
    if config.fp8:
        size = replace(size, **IN_128)
    model = LlavaOneVision(size).init_weights()
    if config.fp8:
        convert_to_fp8(model)
    shard(model, config.recompute or "none", config.compile, ranks)
    state = State(model, RECIPE)
    set_balance(model, replace(RECIPE, rows=config.rows), config.expert_balance)
    place = Ranks(ranks.device, torch.float32, ranks.rank, ranks.count, context=ranks.context)
    every_step = first_steps(data, config.seq_length, config.rows, place, 3 * STEPS)

    def whole(x: torch.Tensor) -> torch.Tensor:
        return x.full_tensor() if ranks.mesh is not None else x

    found: dict = {"losses": [], "norms": [], "tokens": [], "kinds": set()}
    for number, step in enumerate(every_step[:steps]):
        if number == 0:
            backward(model, step, ranks)
            found["gradients"] = {name: whole(p.grad).clone() for name, p in
                                  model.named_parameters() if p.requires_grad}
            state.optimizer.zero_grad()
        train_step(state, step, ranks)
        found["losses"].append(step.loss)
        found["norms"].append(step.norm)
        found["tokens"].append(step.sums["tokens"])
        rows = [row.row if isinstance(row, RowShare) else row for row in step.rows]
        found["kinds"] |= {"no picture" for row in rows if row.patches is None}
        found["kinds"] |= {"no token" for row in rows if not len(row.input_ids)}
    found["routing"] = routing(model, ranks)
    found["weights"] = {name: whole(p.detach()) for name, p in model.named_parameters()}
    return found


EXPERTS = {"model": "tiny-moe", "expert_balance": 0.1}
LAYOUTS = {
    2: [{}, {"context_parallel": 2}, {**EXPERTS, "expert_parallel": 2}],
    4: [{}, {"replicas": 2, "rows": 8}, {"replicas": 4}, {"context_parallel": 2},
        {"context_parallel": 4}, {"recompute": "layer"}, {"seq_length": 200},
        {"context_parallel": 4, "seq_length": 200},
        {"context_parallel": 2, "replicas": 2},
        {"context_parallel": 4, "recompute": "selective"},
        {**EXPERTS, "expert_parallel": 2, "replicas": 2}, {**EXPERTS, "expert_parallel": 4},
        {**EXPERTS, "expert_parallel": 2, "context_parallel": 2, "recompute": "layer"}],
}
STEPS = 2  # 20 pass, too, and take several times as long
TWICE = [{"context_parallel": 2}, {"replicas": 2, "rows": 8}, LAYOUTS[2][-1], LAYOUTS[4][-1]]


def train_all(layouts: list[dict], data: Path, steps: int) -> list[dict]:
    """What `train` finds for every layout, by the ranks there are."""
    found = [train(flags, data, steps) for flags in layouts]
    torch.distributed.destroy_process_group()
    return found


def train_twice(layouts: list[dict], data: Path, steps: int) -> list[tuple[dict, dict | None]]:
    """Every layout, some of each kind twice, the second time briefly."""
    again = [train(flags, data, 1) if flags in TWICE else None for flags in layouts]
    return list(zip(train_all(layouts, data, steps), again))


@pytest.fixture(scope="module")
def trained(records_file: Path) -> dict[int, list]:
    """By number of ranks, what each rank found."""
    return {count: in_ranks(count, train_twice, layouts, records_file, STEPS)
            for count, layouts in LAYOUTS.items()}


@pytest.fixture(scope="module")
def alone(records_file: Path) -> Callable[..., dict]:
    """What one process computes for the flags that change the result."""
    return cache(lambda **flags: train(flags, records_file, STEPS))


@pytest.mark.parametrize("count, number", [
    pytest.param(count, i, id=f"{count} ranks {flags}")
    for count, layouts in LAYOUTS.items() for i, flags in enumerate(layouts)])
def test_ranks_equal_one_process(count: int, number: int, trained: dict[int, list],
                                 alone: Callable[..., dict]) -> None:
    """Losses of 2 steps to 1e-5, gradients to 1e-4, rows of mixed kinds; twice the same bits."""
    flags = LAYOUTS[count][number]
    expected = alone(**{k: v for k, v in flags.items()
                        if k in ("rows", "seq_length", *EXPERTS)})
    (first, again), *others = (found[number] for found in trained[count])
    assert first["tokens"] == expected["tokens"]
    torch.testing.assert_close(first["losses"], expected["losses"], rtol=1e-5, atol=0)
    torch.testing.assert_close(first["norms"], expected["norms"], rtol=1e-4, atol=0)
    assert first["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        error = (first["gradients"][name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, (name, error)
    for name, weight in expected["weights"].items():
        assert (first["weights"][name] - weight).norm() < 1e-3 * weight.norm(), name
    for name, by_layer in expected["routing"].items():
        assert first["routing"][name] == pytest.approx(by_layer, rel=1e-5), name
    if again:
        assert again["losses"] == first["losses"][:len(again["losses"])]
        for name, gradient in first["gradients"].items():
            assert torch.equal(again["gradients"][name], gradient)
    kinds = first["kinds"].union(*(other["kinds"] for other, _ in others))
    if "seq_length" in flags:  # short rows: these occurred
        assert kinds == {"no picture"} | ({"no token"} if "context_parallel" in flags else set())
    for other, _ in others:
        assert all(torch.equal(other["weights"][name], x) for name, x in first["weights"].items())


# ------------------------------------------------------------------- loading, memory, other flags

LARGER = replace(SMALL_MOE, hidden_size=512, moe_intermediate_size=512, num_hidden_layers=8,
                 num_attention_heads=8, num_key_value_heads=4, head_dim=64, vocab_size=16384,
                 vision=VisionConfig(4, 256, 4, 1024, 512))


def load_sharded(path: Path, flags: dict) -> dict:
    """Peak memory of loading over what was there, size of this rank's part, and a fingerprint."""
    convert.FILE_BYTES = 20e6
    ranks = join_ranks(find_ranks("cpu", **flags))
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = resident("VmRSS")
    model = load_model(path, torch.float32, "cpu",
                       lambda model: shard(model, "none", False, ranks))
    peak = resident("VmHWM") - before
    parts = [p.to_local() for p in model.parameters()]
    whole = {name: p.full_tensor().double().sum() for name, p in model.named_parameters()}
    if ranks.rank == 0:  # what they hold, they write again: together, as one checkpoint
        (path / "again").mkdir()
    torch.distributed.barrier()
    save_checkpoint(model, load_tokenizer(SHIPPED), path / "again" / "run")
    torch.distributed.destroy_process_group()
    return {"peak": peak, "shard": sum(part.nbytes for part in parts), "sums": whole}


@pytest.mark.parametrize("flags", [{"replicas": 2}, {"experts": 2}])
def test_ranks_read_their_slices_alone(flags: dict, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Peak under 1.5 times the shard and one tensor; several files in, the same bits out."""
    torch.manual_seed(0)
    model = LlavaOneVision(LARGER).init_weights().bfloat16()
    monkeypatch.setattr(convert, "FILE_BYTES", 20e6)
    save_checkpoint(model, load_tokenizer(SHIPPED), tmp_path / "run")
    assert len(list((tmp_path / "run").glob("model-*.safetensors"))) > 3
    largest = max(4 * p.numel() for p in model.parameters())
    shards = 4 // flags.get("replicas", 1)
    for found in in_ranks(4, load_sharded, tmp_path / "run", flags):
        assert found["shard"] < 4 * sum(p.numel() for p in model.parameters()) / shards * 1.01
        assert found["peak"] < 1.5 * found["shard"] + largest, (found["peak"], found["shard"])
        for name, parameter in model.named_parameters():
            assert found["sums"][name] == parameter.double().sum(), name
    assert len(list((tmp_path / "run" / "again" / "run").glob("model-*.safetensors"))) > 3
    written = LlavaOneVision.from_pretrained(tmp_path / "run" / "again" / "run")
    for name, parameter in model.named_parameters():
        assert torch.equal(written.get_parameter(name), parameter), name


def test_bfloat16_and_compiled_layers(records_file: Path, alone: Callable[..., dict]) -> None:
    """Both with everything else: sharded, a shared row, layers recomputed but for attention."""
    flags = [{"context_parallel": 2, "dtype": "bfloat16"},
             {**EXPERTS, "context_parallel": 2, "compile": True, "recompute": "selective"}]
    (low, compiled), _ = in_ranks(2, train_all, flags, records_file, STEPS)
    torch.testing.assert_close(low["losses"], alone()["losses"], rtol=0.01, atol=0)
    assert all(weight.dtype == torch.float32 for weight in low["weights"].values())
    torch.testing.assert_close(compiled["losses"], alone(**EXPERTS)["losses"], rtol=1e-5, atol=0)


FP8_LAYOUTS = {  # two rows for each rank or group; or three
    3: [{"rows": 9}, {**EXPERTS, "recompute": "layer"}],
    4: [{"replicas": 2, "recompute": "selective"}, {"context_parallel": 2},
        {**EXPERTS, "expert_parallel": 2}]}
# Half a step of e4m3.  Where two ways of adding differ by a float32 rounding, an 8-bit number may
# be rounded the other way, and what follows it again: so far apart may the two ways end.
FLIPPED = 2**-4


def train_alone(layouts: list[dict], data: Path, steps: int) -> list[dict]:
    """Every layout by one process, on one thread as each rank has it."""
    return [train({k: v for k, v in flags.items() if k in ("fp8", "rows", "seq_length", *EXPERTS)},
                  data, steps) for flags in layouts]


def train_in_fp8(count: int) -> tuple[list[dict], list[dict], list[dict]]:
    """The layouts; for each what the first of `count` ranks found, and what one process did."""
    layouts = [{"rows": 2 * count, "seq_length": 320, "fp8": True, **flags}
               for flags in FP8_LAYOUTS[count]]
    with tempfile.TemporaryDirectory() as folder:
        data = write_records(Path(folder))
        found = in_ranks(count, train_all, layouts, data, 2)[0]
        alone, = in_ranks(1, train_alone, layouts, data, 2)
    return layouts, found, alone


@pytest.mark.parametrize("count", [
    pytest.param(count, marks=pytest.mark.beside.with_args(train_in_fp8, count))
    for count in FP8_LAYOUTS])
def test_fp8_on_ranks_equals_one_process(count: int, done: tuple) -> None:
    """Shards end within squares of 128; losses of 2 steps, gradients of the first.

    Ranks quantise the same weights and, on as many threads, compute rows by the same calls: the
    first step's gradients differ by the order in which rows are added, in float32.  Where a row is
    shared, or experts meet those of several ranks, blocks of weight gradients are of other tokens:
    both ways round two factors.  Later steps start from weights that differ by a rounding.
    """
    for flags, first, expected in zip(*done):
        mixed = {"expert_parallel", "context_parallel"} & flags.keys()
        torch.testing.assert_close(first["losses"], expected["losses"], rtol=FLIPPED, atol=0)
        assert first["losses"][0] == pytest.approx(expected["losses"][0],
                                                   rel=FLIPPED if mixed else 1e-6)
        for name, gradient in expected["gradients"].items():
            error = (first["gradients"][name] - gradient).norm() / gradient.norm()
            assert error < (2 * FLIPPED if mixed else 1e-5), (flags, name, error)


# --------------------------------------------------------------------------- what is not finite


def meet(kind: str, data: Path, ranks: Ranks) -> dict:
    """A good step, then one in which something is not finite on the last rank; what came of it."""
    torch.manual_seed(0)
    model = LlavaOneVision(SMALL).init_weights()
    shard(model, "none", False, ranks)
    state = State(model, RECIPE)
    place = Ranks(ranks.device, ranks.dtype, ranks.rank, ranks.count)
    # copies, since a pixel is spoilt
    first, step, last_step = copy.deepcopy(first_steps(data, 640, 4, place, 3))

    def local(x: torch.Tensor) -> torch.Tensor:
        return (x.to_local() if isinstance(x, DTensor) else x).detach()

    def copies() -> list[torch.Tensor]:
        return [local(x).clone() for x in state.tensors(ranks.rank).values()]

    train_step(state, first, ranks)
    before, compute = copies(), train_module.backward
    last = ranks.rank == ranks.count - 1

    def spoilt(*arguments: object) -> torch.Tensor:
        loss = compute(*arguments)
        if last:
            gradient = local(model.model.layers[0].mlp.up_proj.weight.grad)
            gradient.view(-1)[-1] = math.inf if kind == "infinite gradient" else math.nan
        return loss

    if kind.endswith("gradient"):
        train_module.backward = spoilt
    elif last:
        row = next(row for row in step.rows if row.patches is not None)
        row.patches = row.patches.float()  # bytes have no such numbers
        row.patches[3, 5] = math.inf if kind == "infinite pixel" else math.nan
    train_step(state, step, ranks)
    train_module.backward = compute
    same = state.refused == 1 and all(map(torch.equal, before, copies()))
    train_step(state, last_step, ranks)  # it goes on from there
    same = same and (state.refused, state.step) == (0, 3)
    return {"decided on": (step.loss, step.norm), "same": same,
            "good": (last_step.loss, last_step.norm)}


BAD = ("infinite gradient", "NaN gradient", "infinite pixel", "NaN pixel")


def meet_all(data: Path) -> list[dict]:
    ranks = join_ranks(find_ranks("cpu"))
    return [meet(kind, data, ranks) for kind in BAD]


@pytest.mark.parametrize("count", [1, 2])
def test_a_bad_step_changes_nothing(count: int, records_file: Path) -> None:
    """On any rank; all ranks see the same numbers, of which one at least is not finite."""
    by_rank = in_ranks(count, meet_all, records_file)
    for kind, *found in zip(BAD, *by_rank):
        for of_rank in found:
            assert of_rank["same"] and all(math.isfinite(x) for x in of_rank["good"]), kind
            assert not math.isfinite(sum(of_rank["decided on"])), kind
            assert repr(of_rank["decided on"]) == repr(found[0]["decided on"]), kind


def refuse(data: Path) -> list:
    """What is logged of steps of shared rows that are not finite, and how the rank ends."""
    ranks = join_ranks(find_ranks("cpu", context=2))
    step, = first_steps(data, 640, 4, Ranks(ranks.device, ranks.dtype, ranks.rank, 2, context=2), 1)
    said = []
    run = Run(TrainConfig(out=str(data.parent)), ranks, None, "")
    run.say = lambda text, **values: said.append(text)
    if ranks.rank == 0:  # as `backward` does: it has the samples of both
        step.names = [name for share in step.rows for name in share.row.names]
    state = State(LlavaOneVision(SMALL), RECIPE)
    try:
        for state.refused in range(1, 4):
            note_refused(step, state, "mid", run)
    except RunError as error:
        return [*said, str(error), error.code, error.common]


def test_ranks_refuse_a_step_together(records_file: Path) -> None:
    """All ranks log each step, name each sample of the rows once, and end at the third."""
    first, second = in_ranks(2, refuse, records_file)
    assert first == second and first[-2:] == [40, True] and len(first) == 6
    for said in first[:4]:
        names = re.search(r"its samples are (.*?); and \d+ more", said)[1].split("; ")
        assert len(names) == len(set(names)) == 8, said


def learn_around_lost(folder: Path, context: int) -> dict:
    """A step on two rows, of which samples have a picture that cannot be decoded."""
    ranks = join_ranks(find_ranks("cpu", context=context))
    tokenizer = load_tokenizer(SHIPPED)
    samples = [encode(drawn_record("mixed", 0, number), tokenizer) for number in range(16)]
    for i in (1, 2, 9):
        samples[i].images = [b"broken"] * len(samples[i].images)
        samples[i].number = i
    packed = [samples[:8], samples[8:]]
    loads = np.sum([load_of(sample) for sample in samples], 0)
    if context > 1:
        holes = [SMALL.image_token_id, SMALL.video_token_id]
        rows = [share_row(row, ranks.rank, context, holes) for row in packed]
    else:
        rows = [lay_out(row) for row in packed]
    torch.manual_seed(0)
    model = LlavaOneVision(SMALL).init_weights()
    shard(model, "none", False, ranks)
    step = Step(rows, 2, dict(zip(LOADS, loads.tolist())), 1.0)
    train_step(State(model, RECIPE), step, ranks)

    # without what was lost, told beforehand
    torch.manual_seed(0)
    again = LlavaOneVision(SMALL).init_weights()
    whole = [lay_out(row) for row in packed]
    labels = {"labels": float(sum(row.labels for row in whole))}
    alone = Ranks(ranks.device, torch.float32)
    expected = Step(whole, 2, labels, 1.0)
    train_step(State(again, RECIPE), expected, alone)
    weights = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    apart = max(float((a - b).detach().abs().max())
                for a, b in zip(weights, again.parameters()))
    lost = sorted(name for name, _ in step.lost.values())
    return {"lost": lost, "found": (step.loss, step.norm), "apart": apart,
            "expected": (expected.loss, expected.norm)}


@pytest.mark.parametrize("count", [1, 2])
def test_lost_samples_do_not_count(count: int, tmp_path: Path) -> None:
    """The mean is over what was learnt, on ranks that share rows too; all ranks know what is lost.

    A weight moves by the learning rate, 1e-3; gradients that are nearly zero may round otherwise.
    """
    for found in in_ranks(count, learn_around_lost, tmp_path, count):
        assert found["lost"] == ["mixed 1", "mixed 2", "mixed 9"]
        assert found["found"] == pytest.approx(found["expected"], rel=1e-5)
        assert found["apart"] < 1e-4, found["apart"]


SPOILT = (math.nan, math.inf, -math.inf, 3.4e38)  # the last: infinite in bfloat16


def save_spoilt(folder: Path) -> list[str]:
    """What a rank is told that saves a model with such a number in the last rank's part."""
    ranks, said = join_ranks(find_ranks("cpu")), []
    model = LlavaOneVision(SMALL).init_weights()
    shard(model, "none", False, ranks)
    local = model.model.layers[1].mlp.up_proj.weight.detach()
    local = local.to_local() if ranks.mesh is not None else local
    for value in SPOILT:
        if ranks.rank == ranks.count - 1:
            local.view(-1)[-1] = value
        try:
            save_checkpoint(model, load_tokenizer(SHIPPED), folder / "run")
            said.append("saved")
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize("count", [1, 2])
def test_no_checkpoint_has_a_number_that_is_not_finite(count: int, tmp_path: Path) -> None:
    """All ranks are told alike, and nothing is left behind."""
    for said in in_ranks(count, save_spoilt, tmp_path):
        assert said == ["model.layers.1.mlp.up_proj.weight has a number that is not finite as "
                        "torch.bfloat16: no checkpoint is written"] * len(SPOILT)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recompute, calls", [("none", 1), ("selective", 1), ("layer", 2)])
def test_attention_is_computed_again_only_by_layer(
        recompute: str, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def counted(*arguments: object) -> object:
        nonlocal count
        count += 1
        return forward(*arguments)

    forward = attention_kernel.sdpa_forward
    monkeypatch.setattr(attention_kernel, "sdpa_forward", counted)
    model = LlavaOneVision(SMALL).init_weights()
    shard(model, recompute, False, Ranks(torch.device("cpu"), torch.float32))
    ids = torch.arange(40) + 20
    model.loss(ids, ids, torch.tensor([0, 40])).backward()
    assert count == calls * (SMALL.num_hidden_layers + SMALL.vision.depth)


@pytest.mark.beside("-m", "benchmarks.context_memory", "4096", "4")
def test_a_long_document_is_shared(done: subprocess.CompletedProcess[str]) -> None:
    """Memory of 4 ranks over that of one process, whose share is a quarter and the keys of all."""
    assert done.returncode == 0, done.stderr
    memory, work, error = (float(number) for number in re.search(
        r"memory ([\d.]+) .* work ([\d.]+) .* by (\S+)$", done.stdout).groups())
    assert memory < 0.4 and work < 1.05 and error < 1e-5, done.stdout


def test_flops_are_those_of_the_products() -> None:
    """Counted by PyTorch while the products run; attention, an operator of ours, apart."""
    grids = torch.zeros(0, 3, dtype=torch.int64), torch.tensor([[1, 6, 4]])
    samples = [Sample(torch.arange(n) + 20, torch.arange(n) + 20,
                      [Image.new("RGB", (56, 84))] * len(grid), grid, (3136, 10**6), "")
               for n, grid in zip((40, 100), grids)]
    samples[1].input_ids[:6] = SMALL.image_token_id
    row, model = lay_out(samples), LlavaOneVision(SMALL).init_weights()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.loss(targets=row.targets, **row.inputs())
    loads = dict(zip(LOADS, np.sum([load_of(s) for s in samples], 0)))
    found = forward_flops(SMALL, loads)
    products = sum(n for name, n in found.items() if "attention" not in name)
    class_tokens = 2 * parameters_by_part(SMALL, matrices=True)["vision"] - 2 * 588 * 64
    assert counter.get_total_flops() == products + class_tokens  # which are not counted: one here
    pairs = sum(n * (n + 1) / 2 for n in (40, 100))
    assert found["decoder attention"] == 4 * SMALL.num_hidden_layers * 64 * pairs
    step = training_flops(loads, SMALL, ("vision", "merger", "decoder"), "layer")
    again = sum(n for name, n in found.items() if name != "merger")
    assert step["model_flops"] == 3 * sum(found.values())
    assert step["hardware_flops"] == step["model_flops"] + again


def test_learning_rates_and_decay_by_part() -> None:
    config = TrainConfig(model="4b", stage="mid", start_from="x", lr=2e-5, vision_lr=2e-6,
                         merger_lr=4e-5)
    recipe = config.recipes(PRESETS["4b"])["mid"]
    assert recipe.min_lr == pytest.approx(2e-6)
    model = LlavaOneVision(SMALL)
    rates = {p: (group["lr_factor"] * recipe.lr, group["weight_decay"])
             for group in make_optimizer(model, recipe).param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if name.startswith("visual.class_"):
            assert not parameter.requires_grad
            continue
        rate, decay = rates[parameter]
        expected = (4e-5 if "merger" in name else 2e-6 if name.startswith("visual.") else 2e-5)
        assert rate == pytest.approx(expected) and decay == (0.01 if parameter.dim() > 1 else 0)
