"""Exported directories in Hugging Face's own loaders.

With transformers 4.53 beside the packages of requirements.txt: `python tests/with_transformers.py`
exports the shipped checkpoint, reads it with AutoTokenizer and AutoImageProcessor, and compares a
prompt's token ids and pixels with ours; it splits merged checkpoints and runs the parts as
MLCDVisionModel and Qwen3.  `--record` makes the models and outputs of tests/parity/stage0 anew.
The suite does without transformers.
"""

import sys
import tempfile
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (AutoImageProcessor, AutoModelForCausalLM, AutoTokenizer,
                          GenerationConfig, MLCDVisionConfig, MLCDVisionModel,
                          Qwen2_5_VLProcessor, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig,
                          Qwen3MoeForCausalLM)

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import convert  # noqa: E402
from data import encode, pack  # noqa: E402

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


def convert_with(*arguments: object) -> None:
    flags = convert.parse_flags([str(word) for word in arguments])
    for line in flags.run(flags):
        print(line)


def main() -> None:
    if "--record" in sys.argv:
        return record()
    with tempfile.TemporaryDirectory() as folder:
        convert_with("export", SHIPPED, "--out", f"{folder}/out")
        tokenizer = AutoTokenizer.from_pretrained(f"{folder}/out")
        pictures = AutoImageProcessor.from_pretrained(f"{folder}/out", use_fast=False)
        print(GenerationConfig.from_pretrained(f"{folder}/out"))
        Qwen2_5_VLProcessor.attributes = ["image_processor", "tokenizer"]  # video wants torchvision
        processor = Qwen2_5_VLProcessor(pictures, tokenizer, chat_template=tokenizer.chat_template)
        messages = [{"role": "user", "content": [{"type": "image"},
                                                 {"type": "text", "text": PROMPT}]}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        theirs = processor(text=[text], images=[Image.open(SCENE)], return_tensors="pt")
        ours = pack([encode({"messages": messages, "images": [str(SCENE)], "id": "prompt"},
                            convert.load_tokenizer(Path(folder) / "out"), generation_prompt=True)])
        assert theirs["input_ids"][0].tolist() == ours.input_ids.tolist()
        apart = (theirs["pixel_values"] - ours.patches).abs().max()
        assert apart < 1e-6
        print(f"transformers {transformers.__version__}: {len(ours.input_ids)} token ids equal, "
              f"pixels differ by at most {apart:.2g}")
        expected = load_file(STAGE0 / "cases.safetensors")
        for llm in ("llm", "llm-moe"):
            convert_with("merge", "--vit", STAGE0 / "vit", "--llm", STAGE0 / llm, "--tokenizer",
                         SHIPPED, "--out", f"{folder}/{llm}", "--dtype", "float32")
            convert_with("split", f"{folder}/{llm}", "--out", f"{folder}/{llm}-parts", "--dtype",
                         "float32")
            vit = MLCDVisionModel.from_pretrained(f"{folder}/{llm}-parts/vit")
            decoder = AutoModelForCausalLM.from_pretrained(f"{folder}/{llm}-parts/llm")
            with torch.no_grad():
                seen = vit(pixel_values=expected["pixel_values"][None]).last_hidden_state[0]
                logits = decoder(input_ids=expected["input_ids"][None]).logits[0]
            apart = [(seen - expected["vit"]).abs().max(), (logits - expected[llm]).abs().max()]
            assert max(apart) < 1e-5
            print(f"{type(decoder).__name__}: outputs of the parts differ by at most "
                  f"{apart[0]:.2g} and {apart[1]:.2g}")


if __name__ == "__main__":
    main()
