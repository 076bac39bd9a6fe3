"""The commands as a user runs them: training, asking, and every refusal in one sentence."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from conftest import ENVIRONMENT
from ranks import command_here, fast_command, in_ranks
from safetensors.torch import load_file, save_file

import train
from benchmarks import plan
from convert import load_tokenizer, read_config, save_checkpoint
from model import PRESETS, LlavaOneVision, meta_model
from train import STAGES
from vision import VisionConfig

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "assets" / "tiny"
SCENE = ROOT / "assets" / "examples" / "scene.png"


def command(folder: Path, *arguments: str | Path,
            **environment: str) -> subprocess.CompletedProcess[str]:
    script, *rest = map(str, arguments)
    return subprocess.run([sys.executable, ROOT / script, *rest], cwd=folder, text=True,
                          capture_output=True, timeout=300, env={**os.environ, **environment})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which all stages were run, far too briefly, on one thread."""
    folder = tmp_path_factory.mktemp("trained")
    done = command(folder, "train.py", "--steps", "3", "--log-every", "1", "--questions", "2",
                   "--out", "runs/short", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_training_writes_log_and_checkpoints(trained: Path) -> None:
    out = trained / "runs" / "short"
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [(line["stage"], line["step"]) for line in lines if "stage" in line]
    assert steps == [(s, i) for s in ("align", "mid", "instruct") for i in (1, 2, 3)]
    assert {line.get("group") for line in lines} >= {"flags", "scenes"}
    assert "held-out scenes" in (trained / "stdout").read_text()
    before = load_file(out / "align" / "model.safetensors")
    after = load_file(out / "mid" / "model.safetensors")
    assert all(not torch.equal(before[name], after[name]) for name in
               ("visual.blocks.0.attn.qkv.weight", "visual.merger.mlp.0.weight", "lm_head.weight"))


def test_align_trains_the_merger_alone(trained: Path, tmp_path: Path) -> None:
    start = trained / "runs" / "short" / "mid"
    done = fast_command(tmp_path, "train.py", "--stage", "align", "--start-from", start, "--steps",
                        "2", "--questions", "0", "--out", "out")
    assert done.returncode == 0, done.stderr
    before = load_file(start / "model.safetensors")
    after = load_file(tmp_path / "out" / "align" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("visual.merger.") for name in changed)


def test_sampling_prefers_the_newest_run(trained: Path) -> None:
    done = fast_command(trained, "sample.py", SCENE, "What is this?", "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert "runs/short/instruct (your newest run)" in done.stderr


def train_in(folder: Path, stages: list[str], out: str) -> None:
    os.chdir(folder)
    for stage in stages:
        train.run(train.TrainConfig(stage=stage, steps=3, questions=0, out=out))


def test_training_is_reproducible(trained: Path, tmp_path: Path) -> None:
    """Three stages in one command, and in three: the same bits.

    On one thread: with two, a busy machine's matrix library may add in another order.
    """
    in_ranks(1, train_in, tmp_path, ["align", "mid", "instruct"], "again")
    first, second = (LlavaOneVision.from_pretrained(folder / "instruct").state_dict()
                     for folder in (trained / "runs" / "short", tmp_path / "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_fp8_run_writes_ordinary_checkpoints(tmp_path: Path) -> None:
    """As a plain run's; exported in FP8 it can be trained on; broken weights are refused."""
    flags = ["--fp8", "--seq-length", "256", "--questions", "0", "--out"]
    fresh = write_checkpoint(tmp_path / "fresh")
    start = ["--stage", "instruct", "--steps", "2", "--start-from"]
    done = fast_command(tmp_path, "train.py", *start, fresh, *flags, "run")
    assert done.returncode == 0 and re.search(r"torch.\w+, FP8", done.stdout), done.stderr
    tensors = load_file(tmp_path / "run" / "instruct" / "model.safetensors")
    assert tensors.keys() == meta_model(PRESETS["tiny"]).state_dict().keys()
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    done = fast_command(tmp_path, "convert.py", "export", "run", "--fp8", "--out", "served")
    assert done.returncode == 0 and "28 matrices in FP8" in done.stdout, done.stderr
    done = fast_command(tmp_path, "train.py", *start, "served", *flags, "more")
    assert done.returncode == 0, done.stderr
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "run" / "instruct" / "model.safetensors")
    done = fast_command(tmp_path, "train.py", *start, "run/instruct", *flags, "broken")
    assert done.returncode == 40 and not (tmp_path / "broken" / "instruct").exists()
    assert "the loss of step 2 of stage instruct is nan" in done.stdout
    assert "down_proj.weight has a number that is not finite" in done.stderr


@pytest.mark.parametrize("arguments, ranks, message", [
    (["--context-parallel", "3"], 4, "--context-parallel 3 does not divide the number of ranks, 4"),
    (["--replicas", "3"], 4, "--replicas 3 does not divide the number of ranks, 4"),
    (["--rows", "6"], 4, "the 6 rows of a step of stage align cannot be dealt to 4"),
    (["--expert-parallel", "2"], 2, "for mixtures of experts, which the model is not"),
    (["--model", "tiny-moe", "--expert-parallel", "3"], 3, "does not divide the"),
    (["--model", "tiny-moe", "--expert-parallel", "4", "--replicas", "2"], 4,
     "--expert-parallel 4 does not divide the number of ranks that hold a copy, 2"),
    (["--model", "tiny-moe", "--expert-parallel", "2", "--recompute", "selective"], 2,
     "--recompute none or layer"),
    (["--stage", "mid"], 1, "stage mid starts from what stage align wrote"),
    (["--stage", "instruct", "--out", "odd"], 1, "there is no odd/mid"),
    (["--device", "cuda:1"], 1, "'cuda:1'"),
    pytest.param(["--tensorboard"], 1, "pip install tensorboard", marks=pytest.mark.skipif(
        find_spec("tensorboard") is not None, reason="it is installed")),
])
def test_training_refusals(tmp_path: Path, arguments: list[str], ranks: int, message: str,
                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Before any work, in one sentence.  Another rank than the first waits before it says it, and
    says nothing if torchrun meanwhile ends it, as it does when the first has reported and ended."""
    def end_rank(seconds: float) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    cases = [(0, time.sleep, 1)]
    if ranks > 1:
        cases += [(ranks - 1, end_rank, 0), (ranks - 1, lambda seconds: None, 1)]
    for rank, sleep, lines in cases:
        monkeypatch.setattr(time, "sleep", sleep)
        done = command_here(tmp_path, "train.py", *arguments, RANK=str(rank), LOCAL_RANK=str(rank),
                            WORLD_SIZE=str(ranks))
        assert done.returncode == 20, done.stdout + done.stderr
        assert done.stderr.count("\n") == lines and (message in done.stderr) == (lines == 1)
        assert (f"rank {rank} on " in done.stderr) == (rank > 0 and lines == 1)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments, message", [
    ("--gpu x100", "'x100'"), ("--fp8", "the a100 has no FP8"), ("--mfu 2", "a share of 1"),
    ("--gpus 6 --replicas 4", "--replicas 4 does not divide the number of ranks, 6"),
    ("--gpus 0", "must be positive"), ("--stpes 3", "--stpes")])
def test_plan_refuses(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(plan.run(arguments.split()))


def test_a_bad_record_is_found_before_the_first_step(trained: Path, tmp_path: Path) -> None:
    """Named in one sentence, and no run is made; with --skip-bad it is left out, and said."""
    good = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    bad = {"id": "the bad one", "messages": [{"role": "user", "content": "<image>"}]}
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, [*[good] * 300, bad])))
    done = fast_command(tmp_path, "train.py", "--start-from", trained / "runs/short/mid", "--stage",
                        "mid", "--data", "data.jsonl", "--steps", "1")
    assert done.returncode == 30 and done.stderr.count("\n") == 1
    assert "train.py: 1 records or files" in done.stderr and "record the bad one" in done.stderr
    assert not (tmp_path / "runs").exists()
    done = fast_command(tmp_path, "train.py", "--start-from", trained / "runs/short/mid", "--stage",
                        "mid", "--data", "data.jsonl", "--steps", "1", "--skip-bad")
    assert done.returncode == 0 and "an epoch is 300 samples" in done.stdout, done
    rejects, = tmp_path.glob("runs/*/mid-data/rejects.jsonl")
    assert "the bad one" in json.loads(rejects.read_text())["reason"]


@pytest.mark.parametrize("bad, code, words", [
    (1, 0, "lost: 1 cannot be read as a picture"), (2, 30, "2 of 42 samples are lost, more than")])
def test_a_damaged_picture_does_not_end_a_run(bad: int, code: int, words: str,
                                              tmp_path: Path) -> None:
    """One may be lost, and is counted and listed; more than --max-bad stop the run."""
    path = write_records(tmp_path, count=42)
    records = json.loads(path.read_text())
    for i in range(bad):
        Image.effect_noise((60, 60), 90).save(tmp_path / f"cut{i}.jpg")
        content = (tmp_path / f"cut{i}.jpg").read_bytes()
        (tmp_path / f"cut{i}.jpg").write_bytes(content[:len(content) // 2])
        records[7 + i]["image"] = f"cut{i}.jpg"
    path.write_text(json.dumps(records))
    done = fast_command(tmp_path, "train.py", "--stage", "instruct", "--start-from", SHIPPED,
                        "--data", "records.json", "--epochs", "1", "--out", "own",
                        "--seq-length", "200")
    assert done.returncode == code and words in done.stdout + done.stderr, done
    lost = [json.loads(line) for line in (tmp_path / "own" / "rejects.jsonl").open()]
    assert {entry["record"] for entry in lost} == {f"record {7 + i}" for i in range(bad)}
    assert all(f"cut{i}.jpg" in entry["reason"] for i, entry in enumerate(
        sorted(lost, key=lambda entry: entry["record"])))


def test_start_must_fit_the_preset(trained: Path, tmp_path: Path) -> None:
    done = fast_command(tmp_path, "train.py", "--model", "4b", "--start-from",
                   trained / "runs/short/mid")
    assert done.returncode == 20 and "is not of the size 4b" in done.stderr


def write_records(folder: Path, name: str = "records.json", count: int = 30) -> Path:
    """A file of records with a picture each."""
    Image.new("RGB", (60, 60), "red").save(folder / "red.png")
    turns = [{"from": "human", "value": "<image>\nWhat colour?"}, {"from": "gpt", "value": "red"}]
    records = [{"id": f"record {i}", "image": "red.png", "conversations": turns}
               for i in range(count)]
    (folder / name).write_text(json.dumps(records))
    return folder / name


def write_checkpoint(folder: Path, **changes: object) -> Path:
    """A fresh model of any size with the shipped tokenizer."""
    model = LlavaOneVision(replace(PRESETS["tiny"], **changes)).init_weights()
    save_checkpoint(model, load_tokenizer(SHIPPED), folder)
    return folder


@pytest.mark.parametrize("changes", [
    None, {"hidden_size": 96, "vision": VisionConfig(2, 64, 2, 96, 96)},
    {"num_hidden_layers": 1, "num_key_value_heads": 2},
    {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 40},
    {"tie_word_embeddings": True}], ids=str)
def test_checkpoints_of_any_size_can_be_trained(changes: dict | None, tmp_path: Path) -> None:
    """The sizes are those of config.json; the shipped one, too, which is no preset's."""
    start = SHIPPED if changes is None else write_checkpoint(tmp_path / "odd", **changes)
    done = train.run(train.TrainConfig(
        stage="instruct", start_from=str(start), data=(str(write_records(tmp_path)),), steps=1,
        workers=0, out=str(tmp_path / "own")))
    assert done == tmp_path / "own" / "instruct" and read_config(start) == read_config(done)


def test_a_loss_that_is_not_finite_names_its_samples(tmp_path: Path) -> None:
    """Finite weights, but logits beyond float32: three steps, one sentence, and no checkpoint."""
    start = write_checkpoint(tmp_path / "start")
    tensors = load_file(start / "model.safetensors")
    tensors["lm_head.weight"] *= 1e38
    save_file(tensors, start / "model.safetensors")
    write_records(tmp_path)
    done = fast_command(tmp_path, "train.py", "--stage", "instruct", "--start-from", start,
                        "--data", "records.json", "--steps", "4", "--out", "own")
    assert done.returncode == 40 and done.stderr.count("\n") == 1, done.stderr
    assert "3 steps in a row were not finite; the loss of step 3 of stage instr" in done.stderr
    assert "no weight was changed; its samples are record " in done.stderr
    for file in ("ledger.jsonl", "log.jsonl"):
        line = json.loads((tmp_path / "own" / file).read_text().splitlines()[-1],
                          parse_constant=pytest.fail)  # NaN is no JSON
    assert len(line["samples"]) > 10 and {*line["samples"]} <= {f"record {i}" for i in range(30)}
    assert not (tmp_path / "own" / "instruct").exists()


# ------------------------------------------------------------------------- commands of the README


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [line for block in blocks for line in block.splitlines() if line]


def run_server(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A command that serves, until its page has been read."""
    # not the port in the README, which may be taken; and without a shell, so that it can be ended
    words = line.replace("--serve 8000", "--serve 8765").split()
    process = subprocess.Popen(words, cwd=folder, text=True, env=ENVIRONMENT,
                               stderr=subprocess.PIPE)
    lines = iter(process.stderr.readline, "")
    said = next((line for line in lines if "http://127.0.0.1:8765/" in line), "")
    try:
        page = urllib.request.urlopen("http://127.0.0.1:8765/", timeout=30).read().decode()
    finally:
        process.kill()
    return subprocess.CompletedProcess(words, 0 if said else 1, page, said)


def run_readme_commands() -> tuple[list[tuple[str, subprocess.CompletedProcess[str]]], str]:
    """All but the tests themselves, in the order in which one makes what another reads; and the log
    of the runs on several ranks.

    Small things take the place of large ones: directories and files of the names in the README, 2
    ranks for 8, one step of two rows for a run.  Setting up, which CI does, is left out.
    """
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        for file in [*ROOT.glob("*.py"), ROOT / "assets", ROOT / "benchmarks"]:
            (here / file.name).symlink_to(file)
        (here / ".venv").symlink_to(sys.prefix)
        parts = Path(__file__).parent / "parity" / "stage0"
        for name, target in {"RICE-VIT": parts / "vit", "QWEN3": parts / "llm", "OTHER": "RELEASE",
                             "QWEN2.5-VL": SHIPPED, "CHECKPOINT": SHIPPED}.items():
            (here / name).symlink_to(target)
        for name in ("captions.json", "questions.json", "records.json"):
            write_records(here, name)
        records = json.loads((here / "captions.json").read_text())
        (here / "captions.jsonl").write_text("\n".join(map(json.dumps, records)))
        (here / "CONCEPTS").write_text("red\nblue\n")
        asked = {"image": "red.png", "question": "What colour?", "answer": "red"}
        (here / "questions.jsonl").write_text(json.dumps(asked))
        finished = []
        for line in sorted(readme_commands(), key=lambda line: "convert.py merge" not in line):
            if "pytest" in line:
                continue
            line = re.sub(r"^python3 -m venv .* && (?=\S+/python )", "", line)
            if "train.py" in line:
                line += " --steps 1 --rows 2 --questions 1"
            line = line.replace("--nproc-per-node 8", "--nproc-per-node 2")
            if "--serve" in line:
                finished.append((line, run_server(line, here)))
                continue
            # ranks share no GPU; and tests change the environment meanwhile
            hidden = {"CUDA_VISIBLE_DEVICES": ""} if "torchrun" in line else {}
            finished.append((line, subprocess.run(
                ["bash", "-c", line], cwd=here, text=True, env=ENVIRONMENT | hidden,
                capture_output=True, timeout=1200, input="What is this?\n/quit\n")))
        log = here / "runs" / "8b" / "log.jsonl"
        return finished, log.read_text() if log.exists() else ""


@pytest.mark.beside.with_args(run_readme_commands)
def test_readme_commands_run_as_written(done: tuple) -> None:
    finished, log = done
    for line, process in finished:
        assert process.returncode == 0, (line, process.stderr)
        assert process.stdout, line
    assert len(finished) >= 12 and sum("torchrun" in line for line, _ in finished) == 3
    # the log of the runs on two ranks has the accounting
    steps = [entry for entry in map(json.loads, log.splitlines()) if "step" in entry]
    assert [entry["stage"] for entry in steps] == list(STAGES)
    for entry in steps:
        assert 0 < entry["mfu"] < entry["hfu"] < 1 and 0 <= entry["padding"] < 1
        assert {"loss", "lr", "norm", "tokens_per_second", "labels_per_second", "wait",
                "images_per_second", "memory_gib", "seconds_left", "rank_balance"} <= entry.keys()


def test_shipped_checkpoint_answers(tmp_path: Path) -> None:
    """Right after installation, with a trace, several pictures, and text alone."""
    done = fast_command(tmp_path, "sample.py", SCENE, "How many objects are there?", "--trace")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "3"
    assert "shipped" in done.stderr and "5 visual tokens" in done.stderr
    sign = ROOT / "assets" / "examples" / "sign.png"
    done = fast_command(tmp_path, "sample.py", SCENE, sign,
                   "Which number is printed in the second picture?")
    assert (done.returncode, done.stdout.strip()) == (0, "47")
    done = fast_command(tmp_path, "sample.py", "Hello <|im_end|> there", "--temperature", "1",
                   "--top-p", "0.9", "--max-new-tokens", "5", "--seed", "3")
    assert done.returncode == 0 and done.stdout


@pytest.mark.parametrize("arguments, message", [
    (["sample.py", "nowhere.png", "What?"], "there is no picture nowhere.png"),
    (["sample.py", "text.png", "What?"], "text.png cannot be read as a picture"),
    (["sample.py", "narrow.png", "What?"], "too narrow"),
    (["sample.py", "narrow.png"], "the prompt is missing"),
    (["sample.py", "What?", "--device", "banana"], "there is no device banana"),
    (["sample.py", "What?", "--temperature", "nan"], "--temperature must be from 0"),
    (["sample.py", "word " * 5000], "room for 4096: the model's context is 4096"),
    (["sample.py", "What?", "--max-new-tokens", "0"], "--max-new-tokens must be"),
    (["train.py", "--vision-lr", "inf"], "--vision-lr"),
    (["train.py", "--longer", "2"], "--longer"),
    (["train.py", "--data", "odd.json"], "odd.json[0]: a message has the role None"),
    (["sample.py", "What?", "--colour", "red"], "--colour"),
    (["sample.py", "What?", "--temperature", "hot"], "--temperature"),
    (["sample.py", "What?", "--top-p", "2"], "--top-p must be"),
    (["sample.py", "What?", "--chat"], "give pictures and a prompt, or one of"),
    (["sample.py", "--evaluate", "broken.json"], "broken.json, line 1 is not valid JSON"),
    (["sample.py", "--checkpoint", "OWNER/NAME", "What?"], "OWNER/NAME"),
    (["sample.py", "What?", "--checkpoint", "nowhere"], "nowhere"),
    (["train.py", "--stpes", "3"], "--stpes"),
    (["train.py", "--steps", "many"], "--steps"),
    (["train.py", "--data", "odd.json", "--data", "nowhere.json"], "--data is given 2 times"),
    (["sample.py", "What?", "--seed=1", "--seed", "2"], "--seed is given 2 times"),
    (["data.py", "inspect", "--show", "1", "--show", "2"], "--show is given 2 times"),
    (["data.py", "unpack"], "{inspect,pack,balance}"),
    (["data.py", "pack", "odd.json"], "--out"),
    (["data.py", "inspect", "questions", "--max-pixels", "0"], "--max-pixels must be at least 1"),
    (["data.py", "inspect", "questions", "odd.json"], "without odd.json"),
    (["data.py", "inspect", "pipe:cat odd.json"], "there is no data file pipe:cat odd.json"),
    (["train.py", "--epochs", "2"], "--epochs is for --data from files"),
    (["train.py", "--data", "mixed", "odd.json"], "cannot be mixed"),
    (["train.py", "--data", "odd.json:0.5", "empty.json"], "either all sources have a weight"),
    (["convert.py", "verify", "--out", "x", "--out", "y"], "--out is given 2 times"),
    (["train.py", "--data", "video.json"], "video.json[0]: the text has fewer places for videos"),
    (["sample.py", "huge.png", "What?"], "huge.png cannot be read as a picture"),
    (["vision.py", "text.png"], "text.png cannot be read as a picture"),
    (["train.py", "--model", "5b"], "'5b'"),
    (["train.py", "--model", "4b"], "--start-from"),
    (["train.py", "--stage", "middle"], "'middle'"),
    (["train.py", "--lr", "-1"], "--lr"),
    (["train.py", "--start-from", "nowhere"], "nowhere"),
    (["train.py", "--data", "nowhere.json"], "there is no data file nowhere.json"),
    (["train.py", "--data", "empty.json"], "empty.json holds no records"),
    (["train.py", "--data", "broken.json"], "broken.json is not valid JSON"),
    (["train.py", "--data", "unseen.json"], "there is no picture"),
    (["train.py", "--data", "text.png"], "neither .json"),
    (["data.py", "inspect", "empty.json"], "empty.json holds no records"),
    (["data.py", "balance", "a", "--concepts", "b", "--keep", "0", "--out", "x"], "--keep must be"),
    (["vision.py", "nowhere.png"], "there is no picture nowhere.png"),
    (["convert.py", "verify", "nowhere"], "nowhere"),
    (["convert.py", "melt"], "'melt'"),
])
def test_refusals(tmp_path: Path, arguments: list[str], message: str) -> None:
    """One line that names the offending thing, an exit code, and nothing written."""
    (tmp_path / "text.png").write_text("not a picture")
    Image.new("RGB", (2010, 10)).save(tmp_path / "narrow.png")
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "broken.json").write_text("[{")
    (tmp_path / "odd.json").write_text('[{"conversations": [{"value": "x"}]}]')
    record = {"image": "gone.png", "messages": [{"role": "user", "content": "<image>"},
                                                {"role": "assistant", "content": "?"}]}
    (tmp_path / "unseen.json").write_text(json.dumps([record]))
    (tmp_path / "video.json").write_text(json.dumps([record | {"video": "a.mp4"}]))
    Image.new("1", (14000, 13000)).save(tmp_path / "huge.png")
    present = set(tmp_path.rglob("*"))
    done = command_here(tmp_path, *arguments)
    # train.py tells flags from data: 20 and 30
    code = 2
    if arguments[0] == "train.py":
        about_flags = "--data" not in arguments or "given" in message or "mixed" in message
        code = 20 if about_flags else 30
    assert done.returncode == code, done.stdout + done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert set(tmp_path.rglob("*")) == present
