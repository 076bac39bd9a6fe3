"""Parity with the released modeling code: every recorded tap, logits, loss, gradients, words.

`parity/dense` and `parity/moe` hold random-weight models in the released layout with the inputs and
outputs of the reference implementation (transformers 4.53.1, fp32, CPU); `parity/preprocess` the
pixels of its image processor.  The README.txt beside each states what the tensors are.  The
published mixture-of-experts file has one class token for all pictures of a prompt, which is as it
should be for one; with several, what is compared is its record with class tokens put right.
"""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from model import LlavaOneVision
from vision import CLIP_MEAN, CLIP_STD, image_to_patches, smart_resize

PARITY = Path(__file__).parent / "parity"
TOLERANCE = {"vision.": 2e-6, "inputs_embeds": 1e-6, "final_norm": 1e-5,
             "layer.0.router": 1e-5, "layer.1.router": 1e-5, "layer.": 1.5e-6}
# a GPU computes the same, in float32, by the kernels
DEVICES = sorted({"cpu", DEVICE})


def load_case(kind: str, name: str) -> dict[str, Tensor]:
    with safe_open(PARITY / kind / "cases.safetensors", framework="pt") as file:
        prefix = name + "/"
        return {key.removeprefix(prefix): file.get_tensor(key)
                for key in file.keys() if key.startswith(prefix)}


def load_model(kind: str, shifted: bool, device: str) -> LlavaOneVision:
    model = LlavaOneVision.from_pretrained(PARITY / kind, device=device)
    vision = replace(model.visual.config, released_class_token_shift=shifted)
    model.visual.config = vision
    return model


def packed(case: dict[str, Tensor]) -> dict[str, Tensor | None]:
    """The arguments of `model(...)` for a recorded batch: padding dropped, positions kept."""
    ids = case["input_ids"]
    keep = case.get("attention_mask", torch.ones_like(ids)).bool()
    patches = case.get("pixel_values", case.get("pixel_values_videos"))
    return {"input_ids": ids[keep], "cu_seqlens": F.pad(keep.sum(1).cumsum(0), (1, 0)),
            "patches": patches, "grid_thw": case.get("image_grid_thw", case.get("video_grid_thw")),
            "position_ids": torch.arange(ids.shape[1], device=ids.device).expand_as(ids)[keep]}


def record_taps(model: LlavaOneVision) -> dict[str, Tensor]:
    """Forward hooks that keep what passes the places named in the fixtures."""
    taps: dict[str, Tensor] = {}

    def keep(name: str):
        return lambda module, args, out: taps.__setitem__(name, out)

    model.visual.patch_embed.register_forward_hook(keep("vision.patch_embed"))
    model.visual.pre_layernorm.register_forward_hook(keep("vision.pre_layernorm"))
    for i, block in enumerate(model.visual.blocks):
        block.register_forward_hook(keep(f"vision.block.{i}"))
    model.visual.merger.register_forward_pre_hook(
        lambda module, args: taps.__setitem__("vision.merger_in", args[0]))
    model.visual.merger.register_forward_hook(keep("vision.merger"))
    model.model.register_forward_pre_hook(
        lambda module, args: taps.__setitem__("inputs_embeds", args[0]))
    for i, layer in enumerate(model.model.layers):
        layer.register_forward_hook(keep(f"layer.{i}"))
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(keep(f"layer.{i}.router_logits"))
    model.model.norm.register_forward_hook(keep("final_norm"))
    return taps


CASES = ["text_only", "one_image", "multi_image.fixed", "video.fixed", "left_pad_batch"]


@pytest.mark.parametrize("kind, name", [
    *(("dense", name) for name in [*CASES, "multi_image", "video"]),
    *(("moe", name) for name in CASES)])
@pytest.mark.parametrize("device", DEVICES)
def test_taps_logits_and_greedy_tokens(device: str, kind: str, name: str) -> None:
    recorded = load_case(kind, name)
    inputs = packed(load_case(kind, name.removesuffix(".fixed")))
    inputs = {key: x if x is None else x.to(device) for key, x in inputs.items()}
    model = load_model(kind, not name.endswith(".fixed"), device)
    taps = record_taps(model)
    with torch.no_grad():
        logits = model(**inputs).cpu()
    if "attention_mask" in recorded:
        recorded["logits"] = recorded["logits"][recorded["attention_mask"].bool()]
    torch.testing.assert_close(logits, recorded["logits"].flatten(0, -2), atol=1e-4, rtol=0)
    if name == "one_image":
        cos = recorded["tap.vision.rope_cos"]
        ours, _ = model.visual.rope(inputs["grid_thw"], torch.arange(len(cos), device=device))
        torch.testing.assert_close(torch.cat([ours, ours], -1)[:, 0].cpu(), cos, atol=2e-6, rtol=0)
    checked = 0
    for key, tensor in recorded.items():
        if key.startswith("tap.") and "rope" not in key:
            tap = key.removeprefix("tap.")
            tolerance = next(t for prefix, t in TOLERANCE.items() if tap.startswith(prefix))
            ours = taps[tap].cpu().view_as(tensor)
            assert (ours - tensor).abs().max() <= tolerance, tap
            checked += 1
    assert checked == sum(key.startswith("tap.") and "rope" not in key for key in recorded)
    steps = model.generate(inputs["input_ids"], inputs["cu_seqlens"], inputs["patches"],
                           inputs["grid_thw"], max_new_tokens=16)
    assert torch.equal(torch.stack(list(steps), dim=1).cpu(), recorded["generated_ids"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_loss_and_gradients(kind: str, device: str) -> None:
    case = {key: x.to(device) for key, x in load_case(kind, "one_image").items()}
    model = load_model(kind, False, device)
    targets = F.pad(case["labels"][0, 1:], (0, 1), value=-100)
    loss = model.loss(targets=targets, **packed(case)) / (targets >= 0).sum()
    torch.testing.assert_close(loss, case["loss"][0], atol=1e-5, rtol=0)
    loss.backward()
    names = [key.removeprefix("grad.") for key in case if key.startswith("grad.")]
    assert len(names) >= 10
    for name in names:
        recorded = case[f"grad.{name}"]
        stem, of_expert, rest = name.partition(".experts.")
        if of_expert:  # they are stacked here
            number, matrix, _ = rest.split(".")
            stacked = model.get_parameter(f"{stem}.experts.{matrix}.weight").grad
            gradient = stacked.chunk(model.config.num_experts)[int(number)]
        else:
            gradient = model.get_parameter(name).grad
        error = (gradient - recorded).abs().max()
        assert error <= 1e-4 * recorded.abs().max(), name


MANIFEST = json.loads((PARITY / "preprocess" / "manifest.json").read_text())


@pytest.mark.parametrize("name", list(MANIFEST["images"]))
def test_preprocessing(name: str) -> None:
    entry = MANIFEST["images"][name]
    image = Image.open(PARITY / "preprocess" / f"{name}.png")
    patches, grid = image_to_patches(image, entry["min_pixels"], entry["max_pixels"])
    assert list(grid) == entry["grid_thw"]
    assert patches.shape == (entry["n_patches"], 588)
    resized = smart_resize(*entry["input_hw"], entry["min_pixels"], entry["max_pixels"])
    assert list(resized) == entry["resized_hw"]
    # undo merge order and normalisation: the resized picture must be the reference's, bit for bit
    rows, columns = grid[1] // 2, grid[2] // 2
    blocks = patches.numpy().reshape(rows, columns, 2, 2, 3, 14, 14).transpose(0, 2, 5, 1, 3, 6, 4)
    pixels = blocks.reshape(*resized, 3) * CLIP_STD + CLIP_MEAN
    levels = np.rint(pixels * 255).astype(np.uint8)
    digest = hashlib.sha256(levels.tobytes()).hexdigest()
    assert digest == entry["slow"]["resized_uint8_sha256"]
    with safe_open(PARITY / "preprocess" / "preprocess.safetensors", framework="pt") as file:
        recorded = file.get_tensor(f"{name}/slow.first1000")
    torch.testing.assert_close(patches.flatten()[:1000], recorded, atol=1e-6, rtol=0)
