"""A GPU would take every launch of a kernel; `benchmarks/launch_walk.py` notices an illegal one."""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

LACKING = [reason for here, reason in (
    (sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64"),
     "the CUDA driver's stand-in is for Linux on x86-64 or aarch64"),
    (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"), "no C compiler"),
    (Path(sysconfig.get_path("include"), "Python.h").is_file(),
     "no Python.h, which Triton compiles its launcher with"),
    (not torch.cuda.is_available(), "there is a GPU: the other tests launch the kernels on it"),
) if not here]
pytestmark = pytest.mark.skipif(bool(LACKING), reason="; ".join(LACKING))


@pytest.mark.beside("-m", "benchmarks.launch_walk")
def test_all_launches_are_legal(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr
    *groups, total = done.stdout.splitlines()
    launches, described = map(int, re.fullmatch(
        r"(\d+) launches, (\d+) tensors described, all legal", total).groups())
    assert len(groups) >= 13 and launches > 500 and described > 1000, done.stdout


@pytest.mark.beside("-m", "benchmarks.launch_walk", "--break")
def test_an_illegal_launch_is_named(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1, done.stdout + done.stderr
    assert "all legal" not in done.stdout
    last = done.stderr[done.stderr.rindex("attention, "):]  # the case, and why
    assert ": k and v expanded: " in last or ": heads outside: " in last, done.stderr
    assert re.search(r"_kernel: [qkv] has the strides \(", last), done.stderr
