"""What the decoder's layers know of the places on a board, by linear probes.

Run `python -m benchmarks.probe [CHECKPOINT]` (default: the shipped one): prints a table, in a
minute.  A probe is a ridge regression from the input of a layer to the nine places.  The first
column reads the place of a visual token from the token itself, the second the place that is asked
for ("Where is the red circle?") from the token whose logits begin the answer.
"""

import random
import sys
from pathlib import Path

import torch
from torch import Tensor

from assets.scenes import PLACES, conversation, objects_scene
from benchmarks.clock import print_table
from convert import load_checkpoint
from data import encode, lay_out

SCENES = 1000  # boards; three quarters teach the probe


def accuracy(x: Tensor, places: Tensor) -> float:
    """Share of places that a probe reads from other lines of x (N, C) than it was made from."""
    taught = len(x) * 3 // 4
    x = (x - x[:taught].mean(0)) / (x[:taught].std(0) + 1e-5)
    x = torch.cat([x, torch.ones(len(x), 1)], dim=1)
    wanted = torch.eye(len(PLACES))[places[:taught]]
    seen = x[:taught]
    weights = torch.linalg.solve(seen.T @ seen + 30 * torch.eye(x.shape[1]), seen.T @ wanted)
    return ((x[taught:] @ weights).argmax(1) == places[taught:]).float().mean().item()


@torch.inference_mode()
def main(checkpoint: str) -> None:
    model, tokenizer = load_checkpoint(checkpoint, torch.float32, torch.device("cpu"))
    inputs = []  # of the layers in the pass at hand, then of the last norm
    for module in (*model.model.layers, model.model.norm):
        module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    tokens, slots, answers = [], [], []
    for number in range(SCENES):
        rng = random.Random(f"probe {number}")
        scene = objects_scene(rng)
        asked = [question for question in scene.questions if question[1].startswith("Where")]
        if not asked:
            continue
        record = conversation(rng, [scene.draw(rng)], asked, most=1)
        row = lay_out([encode(record, tokenizer)])
        inputs.clear()
        model(**row.inputs())
        holes = row.input_ids == model.config.image_token_id
        slot = int((row.targets >= 0).nonzero()[0])
        tokens.append(torch.stack([x[holes] for x in inputs]))  # (layers + 1, M, C)
        slots.append(torch.stack([x[slot] for x in inputs]))  # (layers + 1, C)
        answers.append(PLACES.index(record["messages"][1]["content"][0]["text"]))

    places = torch.arange(len(PLACES)).repeat(len(tokens))
    lines = []
    for layer, (x, y) in enumerate(zip(torch.cat(tokens, dim=1), torch.stack(slots, dim=1))):
        name = f"layer {layer}" if layer < len(model.model.layers) else "last norm"
        lines.append([name, f"{accuracy(x, places):.2f}",
                      f"{accuracy(y, torch.tensor(answers)):.2f}"])
    print_table(["input of", "place of a visual token", "place that is asked for"], lines)


if __name__ == "__main__":
    main(*sys.argv[1:] or [str(Path(__file__).parent.parent / "assets" / "tiny")])
