"""What is written for readers is true: shape comments, the README's table and commands."""

import re
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from PIL import Image
from torch.distributed.run import get_args_parser as torchrun_parser

import model as model_module
import vision as vision_module
from model import PRESETS, LlavaOneVision, packed_positions
from train import TrainConfig, parse_flags, plan
from vision import VisionConfig

ROOT = Path(__file__).parent.parent
COMMENTED = re.compile(r"^\s*(\w+ =|return) .*  # \(([^)]+)\)")  # `x = ...  # (T, C) ...`


def shape_comments(file: Path) -> dict[int, tuple[str, str]]:
    """Line number -> (`x =` or `return`, dimensions) of every line with a shape behind it."""
    lines = enumerate(file.read_text().splitlines(), 1)
    found = ((number, COMMENTED.match(line)) for number, line in lines)
    return {number: match.groups() for number, match in found if match}


def test_shape_comments_hold_in_a_forward_pass() -> None:
    """Every commented assignment or return has the shape its comment says, and runs."""
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
    checked: set[tuple[str, int]] = set()

    def check(frame: FrameType, name: str, number: int, returned: Any) -> None:
        target, text = comments[name][number]
        value = returned if target == "return" else frame.f_locals[target.removesuffix(" =")]
        known = {**frame.f_locals, **symbols[name]}
        wanted = [eval(re.sub(r"(\w) ([A-Z])", r"\1*\2", d), {}, known)
                  for d in text.split(",") if d.strip()]
        assert list(value.shape) == wanted, (name, number, text, value.shape)
        checked.add((name, number))

    def tracer(frame: FrameType, event: str, argument: Any) -> Any:
        name, before = frame.f_code.co_filename, [frame.f_lineno]
        if name not in comments:
            return None

        def line(frame: FrameType, event: str, argument: Any) -> Any:
            if event in ("line", "return") and before[0] in comments[name]:
                check(frame, name, before[0], argument)
            before[0] = frame.f_lineno
            return line
        return line

    sys.settrace(tracer)
    try:
        with torch.no_grad():
            vision_module.image_to_patches(Image.new("RGB", (60, 80)))
            for net in nets:
                net(ids, cu_seqlens, torch.randn(28, 588), grid, packed_positions(cu_seqlens))
                list(net.generate(ids, cu_seqlens, torch.randn(28, 588), grid, max_new_tokens=1))
    finally:
        sys.settrace(None)
    missed = {(name, n) for name, lines in comments.items() for n in lines} - checked
    assert len(checked) >= 14 and not missed, (len(checked), missed)


def test_readme_file_table() -> None:
    """Every module is in the table, with its number of lines to within five per cent."""
    rows = re.findall(r"^\| `(\w+\.py)` \|.*\| (\d+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert {name for name, _ in rows} == {file.name for file in ROOT.glob("*.py")}
    for name, lines in rows:
        real = len((ROOT / name).read_text().splitlines())
        assert abs(int(lines) - real) <= 0.05 * real, (name, real)


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


def test_readme_plan_is_what_the_command_prints() -> None:
    text = (ROOT / "README.md").read_text()
    flags = re.search(r"train.py (--plan .*)", text)[1].split()
    printed = "\n".join(plan(parse_flags(flags)))
    assert f"```\n{printed}\n```" in text


def test_no_flag_abbreviates_one_of_torchruns() -> None:
    """torchrun reads what begins one of its flags as that flag, or refuses it as ambiguous, even
    behind the script's name.  Compared with the torchrun that is installed."""
    theirs = torchrun_parser()._option_string_actions
    assert "--start-method" in theirs
    ours = [f"--{entry.name.replace('_', '-')}" for entry in fields(TrainConfig)]
    begun = {flag: [name for name in theirs if name.startswith(flag)] for flag in ours}
    assert not {flag: names for flag, names in begun.items() if names}
