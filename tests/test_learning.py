"""That training learns: the beginning of the default run's `mid` stage, beside recorded losses.

`learning.json` has the losses of 30 steps, on one thread, after 10 of `align`, seed 0.  Another CPU
adds in another order: with the summands of every matrix product reversed, the 30 losses differed by
2e-6 of themselves at most, and the mean of steps 131 to 150 by 1e-2 of itself.
"""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from assets.scenes import drawn_texts, train_tokenizer
from data import DrawnData, Rows
from model import PRESETS, LlavaOneVision
from parallel import Ranks
from train import RECIPES, State, steps_of, train_step

RECORDED = json.loads((Path(__file__).parent / "learning.json").read_text())


def losses(steps: int) -> list[float]:
    """Losses of the first steps of `mid`, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = LlavaOneVision(PRESETS["tiny"]).init_weights(from_scratch=True)
    tokenizer = train_tokenizer(drawn_texts(0), PRESETS["tiny"].vocab_size)
    ranks, found = Ranks(torch.device("cpu"), torch.float32), []
    for name, count in (("align", 10), ("mid", steps)):
        recipe = RECIPES["tiny"][name]
        state, found = State(model, recipe), []
        data = DrawnData(recipe.data[0], tokenizer, recipe.seq_length, 0, recipe.rows)
        rows = Rows(data, recipe.rows)
        for step in steps_of((rows[i] for i in range(count)), recipe.rows):
            train_step(state, step, ranks)
            found.append(step.loss)
    return found


@pytest.mark.beside("-c", "import sys; sys.path.insert(0, 'tests'); import test_learning; "
                    "print(test_learning.losses(150))")
def test_training_learns_as_it_did(done: subprocess.CompletedProcess[str]) -> None:
    """The curve to 1e-3 for 30 steps; the mean loss of steps 131 to 150 below a bound."""
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found[:30] == pytest.approx(RECORDED["losses"], rel=1e-3)
    end = sum(found[-20:]) / 20
    assert end < 1.25, end  # recorded: 1.177
