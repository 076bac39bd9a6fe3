"""Our files in Hugging Face's own loaders, and Hugging Face's files in ours.

Run `python -m benchmarks.with_transformers` with transformers 4.53 beside the packages of
requirements.txt: exports the shipped checkpoint, reads it with AutoTokenizer and
AutoImageProcessor, and compares a prompt's token ids and pixels with ours; merges the models of
tests/parity/stage0, and compares what the merged model computes with what MLCDVisionModel and
Qwen3 compute.  `--record` makes the models and outputs of tests/parity/stage0 anew.  The tests do
without transformers.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer,
                          GenerationConfig, MLCDVisionConfig, MLCDVisionModel,
                          Qwen2_5_VLProcessor, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig,
                          Qwen3MoeForCausalLM)

from convert import load_model, load_tokenizer
from data import encode, lay_out
from model import LlavaOneVision

ROOT = Path(__file__).parent.parent
STAGE0, SHIPPED = ROOT / "tests" / "parity" / "stage0", ROOT / "assets" / "tiny"
PROMPT, SCENE = "Where is the red circle?", ROOT / "assets" / "examples" / "scene.png"


def record() -> None:
    """Write tests/parity/stage0 but for its README.txt."""
    torch.manual_seed(0)
    torch.set_num_threads(1)

    def noisy(model: nn.Module) -> nn.Module:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and "class" not in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        return model.eval()

    sizes = {"vocab_size": 1024, "hidden_size": 48, "intermediate_size": 64,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 16, "max_position_embeddings": 4096}
    vit = noisy(MLCDVisionModel(MLCDVisionConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        image_size=56)))
    dense = noisy(Qwen3ForCausalLM(Qwen3Config(**sizes, rope_theta=5e6, tie_word_embeddings=True)))
    mixture = noisy(Qwen3MoeForCausalLM(Qwen3MoeConfig(
        **sizes, rope_theta=1e7, tie_word_embeddings=False, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=24, norm_topk_prob=True, decoder_sparse_step=1)))
    for model, name in ((vit, "vit"), (dense, "llm"), (mixture, "llm-moe")):
        model.save_pretrained(STAGE0 / name)
        (STAGE0 / name / "generation_config.json").unlink(missing_ok=True)
    ids, pixels = torch.randint(20, 1024, (1, 24)), torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        outputs = {"vit": vit(pixel_values=pixels).last_hidden_state,
                   "llm": dense(input_ids=ids).logits, "llm-moe": mixture(input_ids=ids).logits}
    save_file({name: x[0].contiguous() for name, x in
               ({"pixel_values": pixels, "input_ids": ids} | outputs).items()},
              STAGE0 / "cases.safetensors")


def convert(*arguments: object) -> None:
    """Run convert.py."""
    subprocess.run([sys.executable, "convert.py", *map(str, arguments)], cwd=ROOT, check=True)


def compare_prompt(folder: Path) -> None:
    """An exported directory: token ids and pixels of a prompt with a picture."""
    convert("export", SHIPPED, "--out", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pictures = AutoImageProcessor.from_pretrained(folder, use_fast=False)
    print(GenerationConfig.from_pretrained(folder))
    Qwen2_5_VLProcessor.attributes = ["image_processor", "tokenizer"]  # video wants torchvision
    processor = Qwen2_5_VLProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    theirs = processor(text=[text], images=[Image.open(SCENE)], return_tensors="pt")
    record = {"messages": messages, "images": [str(SCENE)], "id": "prompt"}
    ours = lay_out([encode(record, load_tokenizer(folder), generation_prompt=True)])
    assert theirs["input_ids"][0].tolist() == ours.input_ids.tolist()
    apart = (theirs["pixel_values"] - ours.patches).abs().max()
    assert apart < 1e-6
    print(f"transformers {transformers.__version__}: {len(ours.input_ids)} token ids equal, "
          f"pixels differ by at most {apart:.2g}")


def by_squares(x: Tensor) -> Tensor:
    """4 x 4 patches in raster order, as our ViT has them: by squares of 2 x 2."""
    return x.unflatten(0, (2, 2, 2, 2)).transpose(1, 2).flatten(0, 3)


def vit_output(model: LlavaOneVision, pixels: Tensor) -> Tensor:
    """What the ViT gives the merger for a picture (3, 56, 56): (16, D), by squares."""
    patches = pixels.unfold(1, 14, 14).unfold(2, 14, 14)  # (3, 4, 4, 14, 14)
    patches = patches.flatten(1, 2).transpose(0, 1).flatten(1)  # (16, 588)
    seen = []
    model.visual.merger.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model.visual(by_squares(patches), torch.tensor([[1, 4, 4]]))
    return seen[0]


@torch.no_grad()
def compare_merged(decoder: str, folder: Path) -> None:
    """A merged directory: each part computes what its source does, there and as recorded."""
    convert("merge", "--vit", STAGE0 / "vit", "--llm", STAGE0 / decoder, "--tokenizer", SHIPPED,
            "--out", folder, "--dtype", "float32")
    cases = load_file(STAGE0 / "cases.safetensors")
    ids, pixels = cases["input_ids"], cases["pixel_values"]
    vit = MLCDVisionModel.from_pretrained(STAGE0 / "vit")
    their_decoder = AutoModelForCausalLM.from_pretrained(STAGE0 / decoder)
    theirs = {"vit": vit(pixel_values=pixels[None]).last_hidden_state[0],
              decoder: their_decoder(input_ids=ids[None]).logits[0]}
    merged = load_model(folder)
    seen, logits = vit_output(merged, pixels), merged(ids, torch.tensor([0, len(ids)]))
    for name, expected in (("transformers", theirs), ("the recorded outputs", cases)):
        # their first line is the class token, which our merger never sees
        apart = [(seen - by_squares(expected["vit"][1:])).abs().max(),
                 (logits - expected[decoder]).abs().max()]
        assert max(apart) < 1e-5
        print(f"{type(their_decoder).__name__}: ViT and logits differ from {name} by at most "
              f"{apart[0]:.2g} and {apart[1]:.2g}")


def main() -> None:
    if "--record" in sys.argv:
        return record()
    with tempfile.TemporaryDirectory() as folder:
        compare_prompt(Path(folder) / "exported")
        for decoder in ("llm", "llm-moe"):
            compare_merged(decoder, Path(folder) / decoder)


if __name__ == "__main__":
    main()
