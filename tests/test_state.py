"""A run's state: any number of ranks reads what any other has saved; damage is found and named."""

import json
import math
import os
import random
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import in_ranks
from test_ranks import RECIPE, SHIPPED, SMALL, SMALL_MOE, write_records
from torch.distributed.tensor import DTensor

import convert
import train
from convert import (MANIFEST, StateWriter, damage_of_state, load_tokenizer, newest_state,
                     states_in, write_state)
from data import FileData, measure
from model import LlavaOneVision
from parallel import find_ranks, join_ranks, shard
from train import (State, TrainConfig, digest_halves, digest_text, drop_after, is_begun, row_loader,
                   steps_of)

STEPS = 3  # of each number of ranks


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def go_on(folder: Path, records: Path, workers: int, moe: bool, flags: dict) -> dict:
    """Read the newest state in the folder, if any, train STEPS steps, and save again."""
    ranks = join_ranks(find_ranks("cpu", "", **flags))
    torch.manual_seed(0)
    model = LlavaOneVision(SMALL_MOE if moe else SMALL).init_weights()
    shard(model, "none", False, ranks)
    recipe = replace(RECIPE, rows=4, seq_length=400, steps=100)
    state = State(model, recipe)
    path, _ = newest_state(folder)
    if path is not None:
        state.read(path, ranks.rank)
    read = {name: whole(x) for name, x in state.tensors(ranks.rank).items() if "." in name}

    tokenizer = load_tokenizer(SHIPPED)
    data = FileData(measure([records], tokenizer), tokenizer, recipe.seq_length, 0)
    recipe = replace(recipe, steps=state.step + STEPS)  # of the loader: of the schedule are 100
    losses, digests = [], []
    for step in steps_of(row_loader(data, SMALL, recipe, workers, ranks, state.step),
                         recipe.rows // ranks.data_ranks):
        train.train_step(state, step, ranks)
        losses.append(step.loss)
        digests.append(step.digest)
    writer = StateWriter(folder)
    writer.write(state.step, state.tensors(ranks.rank), state.numbers() | {"ranks": ranks.count})
    # what is written are the values as they were at the call
    saved = {name: whole(x) for name, x in state.tensors(ranks.rank).items() if "." in name}
    for tensor in state.tensors(ranks.rank).values():
        tensor.zero_()
    writer.wait()
    return {"read": read, "saved": saved, "losses": losses, "digests": digests, "step": state.step}


@pytest.mark.parametrize("moe, hops", [
    (False, [(1, 0, {}), (2, 1, {}), (4, 2, {"replicas": 2}), (2, 0, {"context": 2})]),
    (True, [(2, 0, {"experts": 2}), (1, 0, {}), (2, 1, {})])], ids=["dense", "experts"])
def test_a_run_goes_on_with_any_number_of_ranks(moe: bool, hops: list, tmp_path: Path) -> None:
    """Each hop reads the numbers that the hop before saved, and trains on the next samples.

    Losses are those of one process, as in test_ranks.py: 1e-5.
    """
    records = write_records(tmp_path)
    (tmp_path / "hops").mkdir()
    losses, digests, before = [], [], None
    for count, workers, flags in hops:
        found = in_ranks(count, go_on, tmp_path / "hops", records, workers, moe, flags)[0]
        if before is not None:
            names = {name for name in found["read"] if not name.startswith("random.")}
            assert len(names) > 50
            assert all(torch.equal(found["read"][name], before["saved"][name]) for name in names)
        losses += found["losses"]
        digests += found["digests"]
        before = found

    (tmp_path / "alone").mkdir()
    expected, expected_digests = [], []
    for _ in hops:
        found, = in_ranks(1, go_on, tmp_path / "alone", records, 0, moe, {})
        expected += found["losses"]
        expected_digests += found["digests"]
    assert digests == expected_digests and len({*digests}) == STEPS * len(hops)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert len(states_in(tmp_path / "hops")) == convert.KEPT


def small_states(folder: Path) -> list[Path]:
    """Three states of a few tensors, the oldest first."""
    folder.mkdir()
    for step in (10, 20, 30):
        tensors = {f"layer.{i}": torch.randn(7, 5) for i in range(4)} | {"steps": torch.ones(3)}
        write_state(folder / f"step-{step:08}", tensors, {"step": step, "ranks": 1}, None)
    return states_in(folder)


def test_every_damage_of_a_state_is_found(tmp_path: Path) -> None:
    """One bit of any file, a file cut, gone, or one too many; then the state before is used."""
    *_, good, newest = small_states(tmp_path / "states")
    rng = random.Random(0)
    contents = {file.name: file.read_bytes() for file in newest.iterdir()}
    assert sorted(contents) == [MANIFEST, "shard-00001-model-00001-of-00001.safetensors",
                                "state.json"]

    def damaged(name: str, content: bytes | None) -> None:
        shutil.rmtree(newest)
        newest.mkdir()
        for other, whole_content in contents.items():
            (newest / other).write_bytes(whole_content)
        if content is None:
            (newest / name).unlink()
        else:
            (newest / name).write_bytes(content)
        said = damage_of_state(newest)
        assert newest.name in said, (name, content)
        # the reading is shared by ranks: then one of them finds it
        assert any(damage_of_state(newest, part, 3) for part in range(3))

    for name, content in contents.items():
        damaged(name, None)
        for _ in range(30):
            bit = rng.randrange(8 * len(content))
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            damaged(name, bytes(flipped))
            damaged(name, content[:rng.randrange(len(content))])
    damaged("another.safetensors", b"")
    damaged(MANIFEST, b"[" * 100_000)
    path, said = newest_state(tmp_path / "states")
    assert path == good and MANIFEST in said[0]
    # it is out of the way, and the run can come to this step again
    assert newest.with_suffix(".damaged").is_dir() and states_in(tmp_path / "states")[-1] == good


def test_without_a_whole_state_nothing_begins_anew(tmp_path: Path) -> None:
    for path in small_states(tmp_path / "states"):
        (path / "state.json").unlink()
    before = states_in(tmp_path / "states")
    with pytest.raises(OSError, match="no state in .* is whole .*state.json"):
        newest_state(tmp_path / "states")
    assert states_in(tmp_path / "states") == before
    (tmp_path / "empty").mkdir()
    assert newest_state(tmp_path / "empty") == (None, [])


def fail_on_a_rank(folder: Path) -> list[str]:
    """What two ranks are told when the second one cannot write its file; once it cannot hash it."""
    join_ranks(find_ranks("cpu"))
    rank, said = int(os.environ["RANK"]), []

    def broken(*arguments: object) -> None:
        raise OSError("no space left")

    for module, name in ((convert.checkpoint.HuggingFaceStorageWriter, "write_data"),
                         (convert, "fingerprint")):
        works = getattr(module, name)
        if rank == 1:
            setattr(module, name, broken)
        try:
            write_state(folder / "step-00000001", {"x": torch.ones(3), f"r.{rank}": torch.ones(2)},
                        {}, None)
        except OSError as error:
            said.append(str(error))
        setattr(module, name, works)
    return said


def test_all_ranks_hear_of_a_failed_save(tmp_path: Path) -> None:
    path = tmp_path / "step-00000001"
    for said in in_ranks(2, fail_on_a_rank, tmp_path):
        assert said == [f"{path} cannot be written: rank 1: no space left"] * 2
    assert not list(tmp_path.iterdir())


def test_a_run_of_another_configuration_is_refused(tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """The sentence lists each difference; what changes no number may change."""
    config = train.TrainConfig(out=str(tmp_path), stage="mid", seed=3)
    recipe = config.recipes(train.sizes_of(config, ""))["mid"]
    ranks = find_ranks("cpu")
    settings = train.settings_of(config, recipe, ranks)
    assert not is_begun("mid", settings, config)
    (tmp_path / "mid.json").write_text(json.dumps(settings))
    assert is_begun("mid", settings, config)
    other = train.settings_of(replace(config, workers=3, out="x", recompute="layer"),
                              replace(recipe, recompute="layer"), ranks)
    assert is_begun("mid", other, config)
    other = train.settings_of(replace(config, seed=4), replace(recipe, lr=1.0, steps=7), ranks)
    with pytest.raises(ValueError, match=f"lr was {recipe.lr} and is 1.0, seed was 3 and is 4, "
                                         f"steps was {recipe.steps} and is 7; give"):
        is_begun("mid", other, config)
    # a later version of the code may draw other samples
    (tmp_path / "scenes.py").write_text("")
    monkeypatch.setattr(train, "SCENES", tmp_path / "scenes.py")
    with pytest.raises(ValueError, match="configuration: scenes was '.*' and is '.*'; give"):
        is_begun("mid", train.settings_of(config, recipe, ranks), config)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="--no-resume"):
        is_begun("mid", settings, replace(config, resume=False))
    # a checkpoint of which nobody knows how it was made is not overwritten
    (tmp_path / "align").mkdir()
    with pytest.raises(ValueError, match="align is there already"):
        is_begun("align", settings, config)


def test_stages_are_not_run_backwards(tmp_path: Path) -> None:
    """A later stage is done: the stages before it would start from it."""
    config = train.TrainConfig(out=str(tmp_path), start_from=str(SHIPPED))
    sizes, ranks = train.sizes_of(config, config.start_from), find_ranks("cpu")
    recipes = config.recipes(sizes)
    (tmp_path / "mid").mkdir()
    (tmp_path / "mid.json").write_text(json.dumps(train.settings_of(config, recipes["mid"], ranks)))
    with pytest.raises(ValueError, match="has mid, but not the stages before"):
        train.check_run(config, ranks, config.start_from, sizes, recipes)
    del recipes["align"]
    assert train.check_run(config, ranks, config.start_from, sizes, recipes)[1] == ["mid"]


def test_the_digest_is_of_the_set_of_samples() -> None:
    numbers = list(range(1000, 1600))
    whole_set = digest_text(*digest_halves(numbers))
    random.Random(0).shuffle(numbers)
    # two ranks have parts of it, in any order
    halves = zip(digest_halves(numbers[:77]), digest_halves(numbers[77:]))
    assert digest_text(*map(math.fsum, halves)) == whole_set
    sets = [numbers[1:], [*numbers, 7], [numbers[1], *numbers[1:]], [*numbers, numbers[0]]]
    digests = {digest_text(*digest_halves(others)) for others in sets}
    assert len(digests) == 4 and whole_set not in digests


def test_notes_of_steps_that_come_again_are_dropped(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    drop_after(file, "mid", 3)
    assert not file.exists()
    lines = [json.dumps({"stage": stage, "step": step}) + "\n"
             for stage in ("align", "mid") for step in range(1, 6)]
    file.write_text("".join(lines) + lines[-1][:9])  # the last one was cut
    drop_after(file, "mid", 3)
    assert file.read_text() == "".join(lines[:8])


@pytest.mark.beside("-m", "benchmarks.faults", "kill", "disk", "--count", "3")
def test_a_sample_of_faults(done: subprocess.CompletedProcess[str]) -> None:
    """Some of what `python -m benchmarks.faults` does to runs, each ending as if undisturbed."""
    assert done.returncode == 0, done.stdout + done.stderr
    assert "end equal" in done.stdout and "FAILURES" not in done.stdout


def test_threads_give_way_to_other_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that get one core and a quarter become one; a minute later both are tried.

    The log says when a thread is gone, and when it has a core again, but not what is only tried.
    """
    # cores that the process gets in each four seconds
    cores = [2.0, 1.25, *[1.0] * 15, 1.5, *[1.0] * 11, 1.9, 1.9]
    now, clock, chosen, said = [0.0], [0.0], [2], []
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(train.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(train.time, "process_time", lambda: clock[0])
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen[-1])
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    run = SimpleNamespace(config=TrainConfig(), ranks=find_ranks("cpu", ""),
                          say=lambda text, **_: said.append(text))
    threads = train.Threads(run)
    numbers = []
    for used in cores:
        now[0] += 5
        clock[0] += 4 * used
        threads.fit(waited=1.0)
        numbers.append(chosen[-1])
    # the thirteenth look after the change is more than a minute later
    assert numbers == [2, *[1] * 13, 2, *[1] * 13, 2, 2, 2]
    assert said == ["1 of 2 threads: of the cores it had 1.2",
                    "2 of 2 threads: of the cores it had 1.9"]
    # who names a number keeps it
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    changes = len(chosen)
    threads = train.Threads(run)
    now[0] += 100
    threads.fit(1.0)
    assert len(chosen) == changes
