"""What is written for readers is true: shape comments, the README's table and commands."""

import ast
import re
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from ranks import command_here
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.run import get_args_parser as torchrun_parser

import attention_kernel
import data
import fp8_kernel
import model as model_module
import parallel
import train
import vision as vision_module
from attention_kernel import (attention_reference, attention_tiled, attention_tiled_backward,
                              packed_positions)
from benchmarks import plan
from assets.scenes import train_tokenizer
from data import encode
from fp8_kernel import quantize_fp8
from model import PRESETS, LlavaOneVision
from parallel import share_row
from train import TrainConfig, parse_flags
from vision import VisionConfig

ROOT = Path(__file__).parent.parent
# `x = ...  # (T, C) ...`, also of self.x, and of q, k = ... with one shape for each
COMMENTED = re.compile(r"^\s*((?:self\.)?\w+(?:, \w+)* =|return) .*  # \(([^)]+)\)")


def shape_comments(file: Path) -> dict[int, tuple[str, str]]:
    """Line number -> (`x =` or `return`, dimensions) of every line with a shape behind it."""
    lines = enumerate(file.read_text().splitlines(), 1)
    found = ((number, COMMENTED.match(line)) for number, line in lines)
    return {number: match.groups() for number, match in found if match}


def executed(comments: dict[str, dict[int, tuple[str, str]]], work: Callable[[], None],
             check: Callable[[str, torch.Size, FrameType, dict[str, int]], None],
             ) -> set[tuple[str, int]]:
    """Do the work; check(dimensions, shape, frame, letters) after each commented line of it.

    comments: of each file, see `shape_comments`; letters: sizes known in the call, at first its
    whole numbers.  Returns the lines that were checked, as (file, number).
    """
    checked: set[tuple[str, int]] = set()

    def tracer(frame: FrameType, event: str, argument: Any) -> Any:
        name, before = frame.f_code.co_filename, [frame.f_lineno]
        if name not in comments or frame.f_code.co_name.startswith("<"):  # a comprehension
            return None
        letters = {key: x for key, x in frame.f_locals.items() if type(x) is int}

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            # Python 3.12 and later tell of a line once more when a comprehension in it is done
            left = event == "return" or event == "line" and frame.f_lineno != before[0]
            if left and before[0] in comments[name]:
                target, text = comments[name][before[0]]
                values = [argument] if target == "return" else [
                    getattr(frame.f_locals["self"], variable[5:]) if variable[:5] == "self."
                    else frame.f_locals[variable]
                    for variable in target.removesuffix(" =").split(", ")]
                try:
                    for value in values:
                        check(text, value.shape, frame, letters)
                except AssertionError as error:
                    raise AssertionError(
                        f"{name}:{before[0]} says ({text}), but the tensor has the shape "
                        f"{[*value.shape]}: mend the comment") from error
                checked.add((name, before[0]))
            before[0] = frame.f_lineno
            return line
        return line

    sys.settrace(tracer)
    try:
        work()
    finally:
        sys.settrace(None)
    return checked


def test_shape_comments_hold_in_a_forward_pass() -> None:
    """With the sizes that the letters of the legend stand for."""
    config = replace(PRESETS["tiny"], hidden_size=96, num_attention_heads=6, num_key_value_heads=3,
                     vision=VisionConfig(2, 64, 4, 128, 96))
    mixture = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    nets = [LlavaOneVision(replace(config, image_token_id=12, **more)).init_weights()
            for more in ({}, mixture)]
    grid = torch.tensor([[1, 4, 6], [1, 2, 2]])
    ids = torch.cat([torch.tensor([1, 2, *[12] * n, 3]) for n in (6, 1)])
    cu_seqlens = torch.tensor([0, 9, 13])
    common = {"P": 28, "I": 2, "S": 2, "M": 7, "T": 13, "C": 96, "V": 1024}
    symbols = {vision_module.__file__: {**common, "D": 64, "H": 4, "E": 16},
               model_module.__file__: {**common, "H": 6, "G": 3, "E": 32, "X": 5, "K": 2}}
    comments = {name: shape_comments(Path(name)) for name in symbols}

    def check(text: str, shape: torch.Size, frame: FrameType, letters: dict[str, int]) -> None:
        known = {**frame.f_locals, **symbols[frame.f_code.co_filename]}
        wanted = [eval(re.sub(r"(\w) ([A-Z])", r"\1*\2", d), {}, known)
                  for d in text.split(",") if d.strip()]
        assert list(shape) == wanted, (text, shape)

    @torch.no_grad()
    def work() -> None:
        vision_module.image_to_patches(Image.new("RGB", (60, 80)))
        for net in nets:
            net(ids, cu_seqlens, torch.randn(28, 588), grid, packed_positions(cu_seqlens))

    assert len(executed(comments, work, check)) >= 30  # the next test reaches the others


# Functions that need a GPU, or ranks with experts: their comments are not executed
UNREACHED = {"forward_kernel", "dq_kernel", "dkdv_kernel", "exchanged", "triton_forward"}


def bind(text: str, shape: torch.Size, frame: FrameType, letters: dict[str, int]) -> None:
    """Check a shape against a comment such as `T, 2 G, E`; a new letter gets its size."""
    dimensions = [d.strip() for d in text.split(",") if d.strip()]
    if dimensions[-1] == "...":
        dimensions, shape = dimensions[:-1], shape[:len(dimensions) - 1]
    assert len(dimensions) == len(shape)
    for dimension, size in zip(dimensions, shape):
        product = re.sub(r"(\w) ([A-Z])", r"\1*\2", dimension)
        known = set(re.findall(r"[A-Za-z]\w*", product)) <= letters.keys()
        # a sum of letters that are not known yet, such as P + S, is known as a whole
        wanted = eval(product, {}, letters) if known else letters.setdefault(dimension, size)
        assert wanted == size, (dimension, size, letters)


def use_the_other_rooms() -> None:
    """Two samples through data.py and parallel.py, a small row through both references."""
    record = {"messages": [{"role": "user", "content": "<image>What is it?"},
                           {"role": "assistant", "content": "A picture."}]}
    tokenizer = train_tokenizer(iter(["What is it? A picture."] * 9), 320)
    samples = [encode({**record, "images": [Image.new("RGB", size)]}, tokenizer)
               for size in ((56, 84), (280, 280))]
    vision_module.image_to_patches(Image.new("RGB", (60, 80)))
    share_row(samples, 0, 2, [tokenizer.token_to_id("<|image_pad|>")])
    # a shared row, on the one rank of a group
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks = replace(parallel.find_ranks("cpu", "float32"),
                    context_mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("context",)))
    share = share_row(samples, 0, 1, [12])
    net = LlavaOneVision(PRESETS["tiny"]).init_weights()
    net.loss(**{**parallel.loss_arguments(share, ranks), "patches": None, "grid_thw": None})
    dist.destroy_process_group()
    data.pack_rows(np.array([3, 4, 5]), 8)
    cu_seqlens, q = torch.tensor([0, 3, 8]), torch.randn(8, 6, 4)
    k, v = torch.randn(2, 8, 3, 4)
    attention_reference(q, k, v, cu_seqlens, cu_seqlens, 5, 5, causal=True)
    q, k, v = q[:, 0], k[:, 0], v[:, 0]
    out, lse = attention_tiled(q, k, v, torch.arange(8), 0.5, 4)
    attention_tiled_backward(q, q, k, v, out, lse, torch.arange(8), 0.5, 4)
    quantize_fp8(torch.randn(6, 256))[0].dequantize()


def train_and_generate() -> None:
    """A row with several pictures, with one, and with none, through a dense model and experts."""
    for name in ("tiny", "tiny-moe"):
        net = LlavaOneVision(PRESETS[name]).init_weights()
        for grid in ([[1, 4, 6], [2, 2, 2]], [[1, 2, 4]], []):
            grids = torch.tensor(grid, dtype=torch.int64).reshape(-1, 3)
            holes = int(grids.prod(1).sum()) // 4
            ids = torch.tensor([1, 2, *[12] * holes, 3, 4, 5, 6])
            cu_seqlens = torch.tensor([0, len(ids) - 2, len(ids)])
            patches = torch.randn(4 * holes, 588)
            targets = torch.where(ids > 3, ids, -100)
            net.loss(ids, targets, cu_seqlens, patches, grids).backward()
            with torch.no_grad():
                net(ids, cu_seqlens, patches, grids)
            list(net.generate(ids, cu_seqlens, patches, grids, max_new_tokens=2))
        train.routing(net, parallel.find_ranks("cpu", "float32"))


def test_shape_comments_hold_everywhere() -> None:
    """Letters get their sizes on first sight in a call; a contradiction fails.  In all rooms."""
    functions: dict[tuple[str, int], str] = {}  # of each commented line: its function's name
    comments = {}
    for file in (vision_module, model_module, data, parallel, attention_kernel, fp8_kernel, train):
        comments[file.__file__] = shape_comments(Path(file.__file__))
        for node in ast.walk(ast.parse(Path(file.__file__).read_text())):
            if isinstance(node, ast.FunctionDef):
                functions |= {(file.__file__, n): node.name for n in comments[file.__file__]
                              if node.lineno <= n <= node.end_lineno}
    checked = executed(comments, train_and_generate, bind)
    checked |= executed(comments, use_the_other_rooms, bind)
    missed = {functions[key] for key in functions.keys() - checked}
    assert missed <= UNREACHED, (len(checked), missed)
    assert len(checked) >= 0.9 * len(functions), f"{len(checked)} of {len(functions)} are reached"


# Floors of the house: a file imports from lower floors only, but for the two exceptions that say so
FLOORS = {"attention_kernel": 0, "fp8_kernel": 1, "vision": 1, "model": 2, "data": 2, "parallel": 3,
          "convert": 3, "sample": 4, "train": 5}
UPWARD = {("model", "convert"), ("data", "convert"), ("data", "model")}  # deferred imports


def rooms_imported(file: Path) -> set[str]:
    """Files of the project that a file imports, at its top or inside a function."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module.removeprefix("assets."))
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & {*FLOORS, "scenes"}


ROOMS = [ROOT / f"{name}.py" for name in FLOORS] + [ROOT / "assets" / "scenes.py"]


@pytest.mark.parametrize("file", ROOMS, ids=lambda file: file.stem)
def test_top_docstring_says_who_calls_whom(file: Path) -> None:
    """`Called by ...; calls ...` names the files that import this one, and those it imports."""
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    sentence = re.search(r"^(?:Called|Run) by .*?\.$", docstring, re.M | re.S)[0]
    callers, called = re.split(r"; calls\s", sentence)
    said = [{name.removeprefix("assets/") for name in re.findall(r"`([\w/]+)\.py`", part)}
            for part in (callers, called)]
    imported = rooms_imported(file)
    importing = {room.stem for room in ROOMS if file.stem in rooms_imported(room)}
    assert said == [importing, imported]
    for name in imported:
        if file.stem in FLOORS and name in FLOORS and (file.stem, name) not in UPWARD:
            assert FLOORS[name] < FLOORS[file.stem], f"{file.name} imports {name}.py, from above"


def test_first_screen_of_the_readme() -> None:
    """It says what this is, shows the way of a question, and has both commands."""
    screen = (ROOT / "README.md").read_text()[:3000]
    for words in ("vision-language model", "nine files", "logits (T, V)", "train.py", "pytest -q"):
        assert words in screen, words
    assert len((ROOT / "README.md").read_text().splitlines()) <= 320
    assert len([file for file in ROOT.glob("*.py")]) == 9


# One word, one thing: what the glossary calls otherwise, by the word that is meant
SYNONYMS = {r"(?<!micro-)\bbatch(es)?\b(?! dimension)": "row", r"\bmini-?batch": "row",
            r"\b(image|vision) tokens?\b": "visual token", r"\bcells?\b": "visual token",
            r"(?<!-)\b(language|text) (model|tower)\b": "decoder", r"\bvision tower\b": "ViT",
            r"\bshared_row\b|\bSharedRow\b": "share, keys"}


def test_one_word_for_one_thing() -> None:
    """No synonym of the glossary's words in what is written for readers; at most 20 words."""
    readme = (ROOT / "README.md").read_text()
    glossary = re.findall(r"^\| ([\w ]+) \| ", readme[readme.index("### Words"):
                                                  readme.index("## Train on your own")], re.M)[1:]
    assert 12 <= len(glossary) <= 20, glossary
    for file in [ROOT / "README.md", *(ROOT / f"{name}.py" for name in FLOORS)]:
        for number, line in enumerate(file.read_text().splitlines(), 1):
            for pattern, word in SYNONYMS.items():
                assert not re.search(pattern, line), f"{file.name}:{number} means {word}: {line}"


def test_files_print_what_their_docstrings_promise() -> None:
    """`python vision.py PICTURE`, `python model.py` and `python data.py inspect`."""
    scene = ROOT / "assets" / "examples" / "scene.png"
    done = command_here(ROOT, "vision.py", scene)
    assert done.returncode == 0 and "84 x 84 pixels" in done.stdout, done.stderr
    assert "6 x 6 patches: (36, 588)" in done.stdout and "visual tokens: 9" in done.stdout
    done = command_here(ROOT, "model.py")
    assert done.returncode == 0, done.stderr
    assert "8,527,214,624" in done.stdout and "4,741,610,528" in done.stdout
    done = command_here(ROOT, "data.py", "inspect", "captions", "--show", "2", "--length",
                        "1024")
    assert done.returncode == 0 and "<|im_start|>assistant" in done.stdout, done.stderr
    assert re.search(r"in 16 rows of 1,024 tokens, 9\d\.\d\d% full", done.stdout), done.stdout


def test_readme_file_table() -> None:
    """Every module is in the table, with its number of lines."""
    rows = re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", (ROOT / "README.md").read_text(), re.M)
    differ = {name for name, _ in rows} ^ {file.name for file in ROOT.glob("*.py")}
    assert not differ, f"README.md's table of files and the files differ in {sorted(differ)}"
    for name, lines in rows:
        real = len((ROOT / name).read_text().splitlines())
        assert int(lines) == real, (
            f"README.md says that {name} has {lines} lines; it has {real}")


def test_readme_commands_exist() -> None:
    """Files named in the README's commands exist, and so do the flags of train.py."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    commands = [line for block in blocks for line in block.splitlines() if line]
    assert sum("train.py" in c for c in commands) >= 2
    assert sum("pytest" in c for c in commands) == 1
    for word in " ".join(commands).split():
        if word.endswith((".py", ".png", ".txt")):
            assert (ROOT / word).is_file(), word
    for line in commands:
        if "train.py" in line:
            parse_flags(line.partition("train.py")[2].split())
        if " -m benchmarks." in line:
            name = re.search(r"-m benchmarks\.(\w+)", line)[1]
            assert (ROOT / "benchmarks" / f"{name}.py").is_file(), line


def test_readme_trace_is_what_the_command_prints() -> None:
    """The eight stops: the same words and shapes, and numbers to one in the last digit."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"```\n(1 record .*?)```", text, re.S)[1].splitlines()
    assert [line[0] for line in block] == list("12345678")
    done = command_here(ROOT, "sample.py", "assets/examples/scene.png", "Where is the red circle?",
                        "--trace", "--checkpoint", "assets/tiny", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    number = re.compile(r"-?\d+(?:[.,]\d+)*")
    for said, printed in zip(block, done.stderr.splitlines()):
        advice = f"put what sample.py --trace prints into README.md: {printed}"
        assert number.sub("#", said) == number.sub("#", printed), advice
        for a, b in zip(number.findall(said), number.findall(printed)):
            if "." in a:
                assert float(a) == pytest.approx(float(b), abs=0.011), advice
            else:
                assert a == b, advice


def test_results_name_command_date_and_versions() -> None:
    """Each section of the measured tables says how, when and on what it was measured."""
    sections = (ROOT / "benchmarks" / "RESULTS.md").read_text().split("\n## ")[1:]
    assert len(sections) >= 8
    wanted = {"a command": r"`[^`]*(python|sample\.py|train\.py)[^`]*`"}
    measured = {"a date": r"20\d\d-\d\d-\d\d", "the machine": r"EPYC|Xeon|H\d00|sm_90",
                "versions": r"torch 2|Triton 3|transformers 4"}
    for section in sections:
        for what, pattern in (wanted | (measured if "|" in section else {})).items():
            title = section.splitlines()[0]
            assert re.search(pattern, section), f"RESULTS.md, {title}: name {what}"


def test_fields_are_explained() -> None:
    """A comment stands beside each field of a dataclass or named tuple, or above it."""
    for file in ROOMS:
        lines = file.read_text().splitlines()
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.ClassDef):
                continue
            heads = [ast.unparse(head) for head in [*node.decorator_list, *node.bases]]
            if not any("dataclass" in head or head == "NamedTuple" for head in heads):
                continue
            for entry in node.body:
                if isinstance(entry, ast.AnnAssign):
                    beside, above = lines[entry.end_lineno - 1], lines[entry.lineno - 2]
                    assert "  # " in beside or above.strip().startswith("#"), (
                        f"{file.name}:{entry.lineno}: say what {node.name}."
                        f"{entry.target.id} means, and its unit")


DOCUMENTED = [*ROOMS, *sorted((ROOT / "benchmarks").glob("[a-z]*.py"))]


@pytest.mark.parametrize("file", DOCUMENTED, ids=lambda file: file.stem)
def test_commands_of_docstrings_exist(file: Path) -> None:
    """Files and flags of the commands in a top docstring: `python FILE --flag`."""
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    for command in re.findall(r"`((?:python|torchrun)\s[^`]*)`", docstring):
        name = re.search(r"([\w/]+)\.py|-m benchmarks\.(\w+)", command)
        script = ROOT / (f"{name[1]}.py" if name[1] else f"benchmarks/{name[2]}.py")
        assert script.is_file(), f"{file.name}: there is no {script.name}, which {command!r} runs"
        source = script.read_text()
        if "TrainConfig" in source:
            source += (ROOT / "train.py").read_text()
        behind = command[name.end():]
        for flag in re.findall(r"--([a-z][\w-]*)", behind):
            known = f'"--{flag}"' in source or re.search(
                rf"^    {flag.replace('-', '_')}: ", source, re.M)
            assert known, f"{file.name}: {script.name} has no --{flag}, which {command!r} passes"


def test_readme_plan_is_what_the_command_prints() -> None:
    text = (ROOT / "README.md").read_text()
    flags = re.search(r"benchmarks\.plan (--.*)", text)[1].split()
    printed = "\n".join(plan.run(flags))
    for figure in ("8,527,214,624", "GiB", "45.0% HFU", "26,667 A100-hours", "11,366", "$4,9"):
        assert figure in printed
    assert f"```\n{printed}\n```" in (ROOT / "benchmarks" / "RESULTS.md").read_text()


def test_no_flag_abbreviates_one_of_torchruns() -> None:
    """torchrun reads what begins one of its flags as that flag, or refuses it as ambiguous, even
    behind the script's name.  Compared with the torchrun that is installed."""
    theirs = torchrun_parser()._option_string_actions
    assert "--start-method" in theirs
    ours = [f"--{entry.name.replace('_', '-')}" for entry in fields(TrainConfig)]
    begun = {flag: [name for name in theirs if name.startswith(flag)] for flag in ours}
    assert not {flag: names for flag, names in begun.items() if names}
