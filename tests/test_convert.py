"""Checkpoints on disk: names of the reference, stage 0, round trips, and every refusal.

`parity/keys-*.json.gz` have the names and shapes of the reference implementation at full size;
`parity/stage0` a tiny ViT, a dense decoder and a mixture of experts as transformers 4.53.1 saves
them, with its outputs (fp32, CPU): see its README.txt.
"""

import gzip
import json
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jinja2
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models

import convert
import sample
from convert import CHAT_TEMPLATE, load_tokenizer, nested_layout
from data import render
from fp8_kernel import quantize_fp8
from model import (PRESETS, LlavaOneVision, ModelConfig, Stored, from_fp8, meta_model,
                   read_parameter, released_names)

ROOT = Path(__file__).parent.parent
PARITY, SHIPPED = ROOT / "tests" / "parity", ROOT / "assets" / "tiny"
STAGE0 = PARITY / "stage0"


def call(main: Callable, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """A command in this process; returns its exit code."""
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    try:
        main()
    except SystemExit as end:
        return end.code
    return 0


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """convert.py with these arguments must succeed; returns what it prints."""
    def succeed(*arguments: object) -> str:
        code, said = call(convert.main, monkeypatch, *arguments), capsys.readouterr()
        assert code == 0, said.err
        return said.out
    return succeed


def merge_command(llm: str, out: Path, *more: str) -> tuple:
    return ("merge", "--vit", STAGE0 / "vit", "--llm", STAGE0 / llm, "--tokenizer", SHIPPED,
            "--out", out, "--dtype", "float32", *more)


@pytest.mark.parametrize("name", ["4b", "8b", "30b-a3b"])
def test_names_and_shapes_are_the_references(name: str) -> None:
    with gzip.open(PARITY / f"keys-{name}.json.gz") as file:
        expected = json.load(file)
    model, ours = meta_model(PRESETS[name]), {}
    for parameter, pieces in released_names(model).items():
        shape = model.get_parameter(parameter).shape
        ours |= {piece: [shape[0] // len(pieces), *shape[1:]] for piece in pieces}
    assert ours == expected


# ------------------------------------------------------------------------------------------ stage 0


@pytest.mark.parametrize("llm", ["llm", "llm-moe"])
def test_merged_parts_compute_what_they_did(llm: str, tmp_path: Path, run: Callable) -> None:
    said = run(*merge_command(llm, tmp_path / "merged", "--verify"))
    assert said.count("equal as torch.float32\n") == 2
    model = LlavaOneVision.from_pretrained(tmp_path / "merged")
    expected = load_file(STAGE0 / "cases.safetensors")
    ids = expected["input_ids"]
    with torch.no_grad():
        logits = model(ids, torch.tensor([0, len(ids)]))
        torch.testing.assert_close(logits, expected[llm], atol=1e-5, rtol=0)
        # the ViT: a picture's patches go in, and its rows come out, by blocks of two by two
        def blocks(x: torch.Tensor) -> torch.Tensor:
            return x.unflatten(0, (2, 2, 2, 2)).transpose(1, 2).flatten(0, 3)

        patches = expected["pixel_values"].unfold(1, 14, 14).unfold(2, 14, 14)  # (3, 4, 4, 14, 14)
        patches = blocks(patches.flatten(1, 2).transpose(0, 1).flatten(1))
        found = []
        model.visual.merger.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        model.visual(patches, torch.tensor([[1, 4, 4]]))
    torch.testing.assert_close(found[0], blocks(expected["vit"][1:]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("llm", ["llm", "llm-moe"])
def test_split_is_the_inverse_of_merge(llm: str, tmp_path: Path, run: Callable) -> None:
    run(*merge_command(llm, tmp_path / "merged", "--seed", "3"))
    run("split", tmp_path / "merged", "--out", tmp_path / "parts", "--dtype", "float32")
    for part, source in (("vit", "vit"), ("llm", llm)):
        ours = load_file(tmp_path / "parts" / part / "model.safetensors")
        theirs = load_file(STAGE0 / source / "model.safetensors")
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            if "post_layernorm" not in name:  # the merged model has none
                assert torch.equal(ours[name], tensor), name
        config = json.loads((tmp_path / "parts" / part / "config.json").read_text())
        wanted = json.loads((STAGE0 / source / "config.json").read_text())
        unimportant = {"image_size", "initializer_factor", "transformers_version", "layer_types",
                       "max_window_layers", "output_router_logits", "router_aux_loss_coef"}
        for key in wanted.keys() - unimportant:
            assert config[key] == wanted[key], key
    parts = tmp_path / "parts"
    run("merge", "--vit", parts / "vit", "--llm", parts / "llm", "--tokenizer", parts / "llm",
        "--out", tmp_path / "again", "--dtype", "float32", "--seed", "3")
    for file in (tmp_path / "merged").iterdir():
        assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


# ------------------------------------------------------------------------------- export, side files


@pytest.mark.parametrize("source", ["dense", "moe"])
def test_export_round_trips_bit_for_bit(source: str, tmp_path: Path, run: Callable,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Export -> load -> export, and old names -> new -> old, through several files."""
    config = replace(PRESETS["tiny" if source == "dense" else "tiny-moe"], num_hidden_layers=2)
    torch.manual_seed(0)
    model = LlavaOneVision(config).init_weights()
    monkeypatch.setattr(convert, "SHARD", 2e6)
    run_folder, stage = tmp_path / "run", tmp_path / "run" / "instruct"
    run_folder.mkdir()
    convert.save_checkpoint(model, load_tokenizer(SHIPPED), stage)
    shutil.copytree(SHIPPED, run_folder / "align")  # an earlier stage, written later
    run("export", tmp_path / "run", "--out", tmp_path / "once")  # a run: its last stage
    loaded = LlavaOneVision.from_pretrained(tmp_path / "once")
    convert.save_checkpoint(loaded, load_tokenizer(tmp_path / "once"), tmp_path / "saved")
    run("export", tmp_path / "saved", "--out", tmp_path / "twice")
    run("export", tmp_path / "once", "--out", tmp_path / "nested", "--layout", "nested")
    run("export", tmp_path / "nested", "--out", tmp_path / "back")
    files = {file.name for file in (tmp_path / "once").iterdir()}
    assert len([name for name in files if name.startswith("model-0")]) > 1
    for name in files:
        for other in ("twice", "back"):
            assert (tmp_path / other / name).read_bytes() == (
                tmp_path / "once" / name).read_bytes(), (other, name)
    index = json.loads((tmp_path / "nested" / "model.safetensors.index.json").read_text())
    assert {key.split(".layers")[0].split(".blocks")[0] for key in index["weight_map"]} >= {
        "lm_head.weight", "model.visual", "model.language_model"}
    assert sorted(index["weight_map"]) == sorted(
        name for names in nested_layout(released_names(model)).values() for name in names)
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16()), name
    assert "have the same numbers" in run("verify", stage, tmp_path / "nested")


def test_exported_tokenizer_files_agree(tmp_path: Path, run: Callable) -> None:
    """vocab.json with merges.txt cuts words as tokenizer.json does; special tokens keep ids."""
    run("export", SHIPPED, "--out", tmp_path / "out")
    whole = load_tokenizer(tmp_path / "out")
    parts = Tokenizer(models.BPE.from_file(str(tmp_path / "out" / "vocab.json"),
                                           str(tmp_path / "out" / "merges.txt")))
    parts.normalizer, parts.pre_tokenizer = whole.normalizer, whole.pre_tokenizer
    parts.decoder = decoders.ByteLevel()
    text = "Where is the red circle? 12 caf\u00e9 \u4f60\u597d\n\n top right"
    assert parts.encode(text).ids == whole.encode(text).ids
    about = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    for number, token in about["added_tokens_decoder"].items():
        assert whole.token_to_id(token["content"]) == int(number)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    for target in config["auto_map"].values():
        repository, _, found = target.partition("--")
        module, name = found.split(".")
        assert repository == convert.PUBLISHED and module.endswith("llavaonevision1_5") and name


CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image", "image": "b"},
                                  {"type": "text", "text": "c"}]}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [
        {"type": "image"}, {"type": "image"}, {"type": "text", "text": "Compare."}]},
     {"role": "assistant", "content": [{"type": "text", "text": "Same.\n"}]},
     {"role": "user", "content": [{"type": "text", "text": " Sure?"}, {"type": "video"}]}],
]


@pytest.mark.parametrize("messages", CONVERSATIONS)
@pytest.mark.parametrize("prompt", [False, True])
def test_chat_template_says_what_training_says(messages: list[dict], prompt: bool) -> None:
    pictures = sum(item["type"] in ("image", "video") for message in messages
                   for item in message["content"] if not isinstance(message["content"], str))
    ours = "".join(piece * max(1, repeats)
                   for piece, repeats, _ in render(messages, [1] * pictures, prompt))
    for trim in (False, True):  # transformers trims blocks
        template = jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim).from_string(
            CHAT_TEMPLATE)
        theirs = template.render(messages=messages, add_generation_prompt=prompt)
        assert theirs == (ours if prompt else ours + "\n")  # which nobody learns


def test_parts_can_be_loaded_alone() -> None:
    whole = LlavaOneVision.from_pretrained(PARITY / "dense")
    text = LlavaOneVision.from_pretrained(PARITY / "dense", part="text")
    vision = LlavaOneVision.from_pretrained(PARITY / "dense", part="vision")
    ids, starts = torch.arange(20), torch.tensor([0, 20])
    patches, grid = torch.randn(24, 588), torch.tensor([[1, 4, 6]])
    assert torch.equal(text(ids, starts), whole(ids, starts))
    assert torch.equal(vision.visual(patches, grid), whole.visual(patches, grid))
    names = {name for model in (text, vision) for name, _ in model.named_parameters()}
    assert names == {name for name, _ in whole.named_parameters()}
    holes = torch.full((6,), whole.config.image_token_id)
    with pytest.raises(ValueError, match="without its ViT"):
        text(holes, torch.tensor([0, 6]), patches, grid)


# ----------------------------------------------------------------------------------------- refusals


def change_json(name: str, **changes: object) -> Callable[[Path], None]:
    """Set entries of a JSON file; a dotted name is of a section; None removes."""
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for key, value in changes.items():
            section, _, entry = key.rpartition("__")
            place = content[section] if section else content
            place[entry] = value
            if value is None:
                del place[entry]
        (folder / name).write_text(json.dumps(content))
    return change


def change_tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Change the tensors of the first file, the index with them."""
    def rewrite(folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[0]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            content = json.loads(index.read_text())
            names = {k: v for k, v in content["weight_map"].items() if v != file.name}
            content["weight_map"] = names | dict.fromkeys(tensors, file.name)
            index.write_text(json.dumps(content))
    return rewrite


def forget(folder: Path, name: str) -> None:
    """Take a tensor from the index alone."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][name]
    index.write_text(json.dumps(content))


def alter(folder: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change a tensor of a directory with an index."""
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())[
        "weight_map"][name]
    tensors = load_file(file)
    save_file({**tensors, name: change(tensors[name])}, file)


def drop(folder: Path, name: str) -> None:
    """Take a tensor from its file and the index."""
    file = folder / json.loads((folder / "model.safetensors.index.json").read_text())[
        "weight_map"][name]
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file)
    forget(folder, name)


def change_bytes(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[0]
        file.write_bytes(change(file.read_bytes()))
    return rewrite


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return change_tensors(lambda t: t.update({name: change(t[name]).contiguous()}))


def spoil(value: float, place: int = 7) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[place] = value
        return tensor
    return change


def remove(pattern: str) -> Callable[[Path], None]:
    return lambda folder: [file.unlink() for file in list(folder.glob(pattern))][0]


PATCH, FIRST = "visual.patch_embed.proj.weight", "model-00001-of-"
QKV = "visual.blocks.0.attn.qkv.weight"
DAMAGED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {  # what, and what is said
    "no config": (remove("config.json"), ("config.json",)),
    "config no JSON": (lambda d: (d / "config.json").write_text("{,"), ("config.json", "JSON")),
    "config a list": (lambda d: (d / "config.json").write_text("[]"), ("config.json", "object")),
    "config of Llama": (lambda d: (d / "config.json").write_text('{"hidden_size": 4}'),
                        ("config.json", "text_config")),
    "width a word": (change_json("config.json", text_config__hidden_size="wide"),
                     ("config.json", "hidden_size", "wide")),
    "width of another size": (change_json("config.json", text_config__hidden_size=64,
                                          vision_config__text_hidden_size=64),
                              (".safetensors", "the model needs (", "64", "weight")),
    "merger for another": (change_json("config.json", vision_config__text_hidden_size=64),
                           ("64", "48")),
    "no theta": (change_json("config.json", text_config__rope_theta=None), ("rope_theta",)),
    "a layer more": (change_json("config.json", text_config__num_hidden_layers=3),
                     ("model.layers.2.",)),
    "a layer less": (change_json("config.json", text_config__num_hidden_layers=1),
                     ("model.layers.1.", ".safetensors")),
    "a ViT of other depth": (change_json("config.json", vision_config__depth=5),
                             ("visual.blocks.2",)),
    "experts, says the config": (change_json(
        "config.json", text_config__num_experts=4, text_config__num_experts_per_tok=2,
        text_config__moe_intermediate_size=24), ("mlp.gate.weight",)),
    "a fraction of a layer": (change_json("config.json", text_config__num_hidden_layers=1.5),
                              ("config.json", "num_hidden_layers", "1.5")),
    "a negative width": (change_json("config.json", text_config__hidden_size=-48),
                         ("config.json", "hidden_size", "-48")),
    "no heads": (change_json("config.json", vision_config__num_heads=0),
                 ("config.json", "num_heads")),
    "rotation a word": (change_json("config.json", text_config__rope_scaling="yarn"),
                        ("config.json", "rope_scaling")),
    "a window": (change_json("config.json", text_config__use_sliding_window=True),
                 ("config.json", "use_sliding_window")),
    "more experts a token than there are": (change_json(
        "config.json", text_config__num_experts=4, text_config__num_experts_per_tok=5,
        text_config__moe_intermediate_size=24), ("config.json", "num_experts_per_tok", "5")),
    "scaled rotation": (change_json("config.json", text_config__rope_scaling={"type": "yarn"}),
                        ("config.json", "yarn")),
    "other patches": (change_json("config.json", vision_config__patch_size=16),
                      ("patch_size", "16")),
    "a file missing": (remove("model-00001-*"), (FIRST,)),
    "half a file": (change_bytes(lambda b: b[:len(b) // 2]), (FIRST, "safetensors")),
    "half a header": (change_bytes(lambda b: b[:60]), (FIRST, "safetensors")),
    "an empty file": (change_bytes(lambda b: b""), (FIRST, "safetensors")),
    "a pointer for a file": (change_bytes(lambda b: b"version https://git-lfs.github.com/spec/v1\n"),
                             (FIRST, "safetensors")),
    "a header too long": (change_bytes(lambda b: struct.pack("<Q", 1 << 40) + b[8:]),
                          (FIRST, "safetensors")),
    "a header no JSON": (change_bytes(lambda b: b[:8] + b"x" + b[9:]), (FIRST, "safetensors")),
    "index no JSON": (lambda d: (d / "model.safetensors.index.json").write_text("oops"),
                      ("index.json", "JSON")),
    "index without map": (change_json("model.safetensors.index.json", weight_map=None),
                          ("index.json", "weight_map")),
    "index of more": (change_json("model.safetensors.index.json", **{
        "weight_map__lm_head.bias": "model-00001-of-00003.safetensors"}),
                      ("index.json", "lm_head.bias")),
    "index of less": (lambda d: forget(d, QKV), (FIRST, QKV, "index")),
    "index of numbers": (change_json("model.safetensors.index.json", weight_map__x=5),
                         ("index.json", "weight_map")),
    "two checkpoints in one": (lambda d: shutil.copy(SHIPPED / "model.safetensors", d),
                               ("model.safetensors", "index")),
    "no head, though untied": (lambda d: (change_json(
        "config.json", tie_word_embeddings=False)(d), drop(d, "lm_head.weight")),
        ("lm_head.weight",)),
    "no index": (remove("*.index.json"), ("model.safetensors",)),
    "pickled": (lambda d: (remove("*.index.json")(d), remove("*.safetensors")(d),
                           (d / "pytorch_model.bin").write_bytes(b"x")), ("model.safetensors",)),
    "a tensor missing": (change_tensors(lambda t: t.pop(QKV)), (QKV,)),
    "a tensor misnamed": (change_tensors(lambda t: t.update({QKV + "s": t.pop(QKV)})), (QKV,)),
    "a tensor more": (change_tensors(lambda t: t.update({"visual.post_layernorm.weight":
                                                         torch.ones(32)})),
                      (FIRST, "visual.post_layernorm.weight")),
    "a tensor under both names": (change_tensors(lambda t: t.update({
        f"model.{QKV}": t[QKV].clone()})), (FIRST, QKV)),
    "a tensor transposed": (replaced(QKV, lambda x: x.T), (FIRST, QKV, "(32, 96)", "(96, 32)")),
    "a tensor cut": (replaced(PATCH, lambda x: x[:, :, :7]), (FIRST, PATCH, "(32, 3, 7, 14)")),
    "whole numbers": (replaced(QKV, lambda x: x.long()), (FIRST, QKV, "I64")),
    "bytes": (replaced(QKV, lambda x: x.to(torch.uint8)), (FIRST, QKV, "U8")),
    "not a number": (replaced(QKV, spoil(float("nan"))), (FIRST, QKV, "finite")),
    "infinite": (replaced(PATCH, spoil(float("inf"))), (FIRST, PATCH, "finite")),
    "a number the last": (replaced(QKV, spoil(float("nan"), -1)), (FIRST, QKV, "finite")),
    "no tokenizer": (remove("tokenizer.json"), ("tokenizer.json",)),
    "a tokenizer for another": (change_json("config.json", image_token_id=99), ("99", "image_pad")),
}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged checkpoint in three files."""
    folder = tmp_path_factory.mktemp("healthy") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "SHARD", 4e5)
        assert call(convert.main, patch, *merge_command("llm", folder)) == 0
    assert len(list(folder.glob("model-*-of-00003.safetensors"))) == 3
    return folder


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_checkpoints_are_refused(name: str, healthy: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    """By each command: one sentence naming tensor and file, exit code 2, nothing written."""
    damage, words = DAMAGED[name]
    shutil.copytree(healthy, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    out, damaged = tmp_path / "out", tmp_path / "damaged"
    commands = [(convert.main, ("export", damaged, "--out", out)),
                (convert.main, ("split", damaged, "--out", out))]
    if "finite" not in words:
        commands.append((sample.main, ("--checkpoint", damaged, "Hello")))
    if "tokenizer" not in name:
        commands.append((convert.main, ("verify", damaged)))
    if "tokenizer" not in name and "size" not in name:  # then both have their own, and are told so
        commands.append((convert.main, ("verify", healthy, damaged)))
    for main, arguments in commands:
        if name == "a tokenizer for another" and arguments[0] == "split":
            continue
        code, said = call(main, monkeypatch, *arguments), capsys.readouterr()
        assert code == 2 and (not said.out or healthy in arguments), (arguments, said)
        assert said.err.count("\n") == 1 and "Traceback" not in said.err
        for word in words:
            assert word in said.err, (arguments[0], word, said.err)
        assert list(tmp_path.iterdir()) == [damaged]


def without(source: str, folder: Path, name: str) -> Path:
    shutil.copytree(STAGE0 / source, folder / source)
    change_tensors(lambda tensors: tensors.pop(name))(folder / source)
    return folder / source


@pytest.mark.parametrize("change, words", [
    (lambda d: {"--vit": d}, ("config.json",)),
    (lambda d: {"--vit": STAGE0 / "llm"}, ("hidden_act is silu",)),
    (lambda d: {"--vit": without("vit", d, "vision_model.class_pos_emb")},
     ("class_pos_emb", "vit")),
    (lambda d: {"--llm": STAGE0 / "vit"}, ("hidden_act is gelu",)),
    (lambda d: {"--llm": without("llm", d, "model.norm.weight")}, ("model.norm.weight", "llm")),
    (lambda d: {"--llm": PARITY / "dense"}, ("config.json",)),
    (lambda d: {"--tokenizer": STAGE0 / "llm"}, ("tokenizer.json",)),
    (lambda d: {"--out": SHIPPED}, ("is there already", "tiny")),
    (lambda d: {"--out": d / "no" / "out"}, ("there is no directory", "no")),
    (lambda d: {"--out": "."}, ("is there already",)),
])
def test_merge_refuses(change: Callable, words: tuple[str, ...], tmp_path: Path,
                       monkeypatch: pytest.MonkeyPatch,
                       capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"--vit": STAGE0 / "vit", "--llm": STAGE0 / "llm", "--tokenizer": SHIPPED,
             "--out": tmp_path / "out"} | change(tmp_path)
    there = sorted(tmp_path.iterdir())
    arguments = [word for pair in flags.items() for word in pair]
    code, said = call(convert.main, monkeypatch, "merge", *arguments), capsys.readouterr()
    assert code == 2 and said.err.count("\n") == 1, said
    assert all(word in said.err for word in words), said.err
    assert sorted(tmp_path.iterdir()) == there


def test_verify_tells_how_far_apart(healthy: Path, tmp_path: Path, run: Callable) -> None:
    shutil.copytree(healthy, tmp_path / "other")
    replaced(QKV, lambda x: x + 0.5)(tmp_path / "other")
    said = run("verify", healthy, tmp_path / "other").splitlines()
    assert said[-1].endswith(f"differ most in {QKV}, by 0.5")
    assert said[-2].split() == ["0.5", QKV]
    with safe_open(healthy / "model-00001-of-00003.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert any("60 tensors" in line and "all finite" in line for line in said)


def test_a_split_is_moved_into_place_whole(healthy: Path, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch,
                                           capsys: pytest.CaptureFixture[str]) -> None:
    """What is damaged lies in the second part: the first is not left behind; nor is a source lost
    that is named like something half-written."""
    shutil.copytree(healthy, tmp_path / "out.partial")
    assert call(convert.main, monkeypatch, "export", tmp_path / "out.partial", "--out",
                tmp_path / "out", "--dtype", "float32") == 0
    assert {file.name for file in tmp_path.iterdir()} == {"out.partial", "out"}
    drop(tmp_path / "out.partial", "model.norm.weight")
    assert call(convert.main, monkeypatch, "split", tmp_path / "out.partial", "--out",
                tmp_path / "parts") == 2
    assert {file.name for file in tmp_path.iterdir()} == {"out.partial", "out"}
    huge = tmp_path / "huge"
    shutil.copytree(healthy, huge)
    change_tensors(lambda t: t.update({QKV: t[QKV] + 1e6}))(huge)
    capsys.readouterr()
    assert call(convert.main, monkeypatch, "export", huge, "--out", tmp_path / "half", "--dtype",
                "float16") == 2
    assert QKV in capsys.readouterr().err and not (tmp_path / "half").exists()


def test_moe_config_round_trip(tmp_path: Path) -> None:
    for name in ("tiny-moe", "30b-a3b"):
        (tmp_path / name).mkdir()
        content = convert.config_json(PRESETS[name], torch.bfloat16)
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        assert ModelConfig.from_dir(tmp_path / name) == PRESETS[name]


# ------------------------------------------------------------ what a file switches on by itself


SWITCHES = {  # what a tokenizer.json may ask for, and the word that verify uses
    "truncation": (lambda t: t.enable_truncation(8), "truncation"),
    "left truncation": (lambda t: t.enable_truncation(5, direction="left"), "truncation"),
    "padding": (lambda t: t.enable_padding(length=64, pad_token="<|endoftext|>"), "padding"),
    "padding to multiples": (lambda t: t.enable_padding(pad_to_multiple_of=32), "padding"),
    "dropout": (lambda t: setattr(t.model, "dropout", 0.5), "dropout"),
}


@pytest.mark.parametrize("name", SWITCHES)
def test_a_tokenizer_does_what_is_asked_of_it_alone(name: str, tmp_path: Path,
                                                    run: Callable) -> None:
    """Loaded, it cuts words as without; verify tells of it; export does not hand it on."""
    change, word = SWITCHES[name]
    folder = tmp_path / "asks"
    shutil.copytree(SHIPPED, folder)
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    said = run("verify", folder)
    assert re.search(rf"tokenizer\.json asks for {word}.*: it is ignored", said)
    assert "asks for" not in run("verify", SHIPPED)
    text = "Which word is printed above the number in the second picture? 47 " * 3
    plain, loaded = load_tokenizer(SHIPPED), load_tokenizer(folder)
    assert plain.encode(text).ids == loaded.encode(text).ids == loaded.encode(text).ids
    run("export", folder, "--out", tmp_path / "out")
    assert "asks for" not in run("verify", tmp_path / "out")


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|endoftext|>"])
def test_tokens_that_would_be_found_in_any_text_are_refused(token: str, tmp_path: Path) -> None:
    """Not marked as special, the name of such a token, typed by somebody, would be one."""
    content = json.loads((SHIPPED / "tokenizer.json").read_text())
    next(x for x in content["added_tokens"] if x["content"] == token)["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(f"{token} is not special")):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("outside", [True, False, None])
@pytest.mark.parametrize("inside", [True, False, None])
def test_where_it_is_said_that_the_head_is_tied(head: bool, outside: bool | None,
                                                inside: bool | None, tmp_path: Path,
                                                run: Callable) -> None:
    """A head in the files is read.  Without one, it is the embedding, unless config.json says
    anywhere that it is not: then it was lost."""
    folder = tmp_path / "copy"
    shutil.copytree(SHIPPED, folder)
    config = json.loads((folder / "config.json").read_text())
    for section, value in ((config, outside), (config["text_config"], inside)):
        section.pop("tie_word_embeddings", None)
        if value is not None:
            section["tie_word_embeddings"] = value
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    lost = tensors["lm_head.weight"]
    save_file({k: v for k, v in tensors.items() if head or k != "lm_head.weight"},
              folder / "model.safetensors")
    if head:
        assert torch.equal(LlavaOneVision.from_pretrained(folder).lm_head.weight, lost)
    elif False in (outside, inside):
        with pytest.raises(ValueError, match="lacks the tensor lm_head.weight"):
            LlavaOneVision.from_pretrained(folder)
    else:
        model = LlavaOneVision.from_pretrained(folder)
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert "the head is the embedding" in run("verify", folder)


@pytest.mark.parametrize("changes, word", [
    ({"text_config__layer_types": ["sliding_attention"]}, "layer_types"),
    ({"text_config__partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"text_config__attention_dropout": 0.1}, "attention_dropout"),
    ({"vision_config__hidden_act": "quick_gelu"}, "hidden_act"),
    ({"vision_config__in_channels": 4}, "in_channels"),
])
def test_settings_that_would_change_the_model_are_refused(changes: dict, word: str,
                                                          tmp_path: Path) -> None:
    shutil.copy(SHIPPED / "config.json", tmp_path)
    change_json("config.json", **changes)(tmp_path)
    with pytest.raises(ValueError, match=word):
        ModelConfig.from_dir(tmp_path)


# -------------------------------------------------------------------------------------------- FP8


@pytest.fixture(scope="module")
def in_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fresh dense and mixed models of two layers, exported in FP8, in several files each."""
    folder = tmp_path_factory.mktemp("fp8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "SHARD", 2e6)
        for name in ("tiny", "tiny-moe"):
            torch.manual_seed(0)
            model = LlavaOneVision(replace(PRESETS[name], num_hidden_layers=2)).init_weights()
            convert.save_checkpoint(model, load_tokenizer(SHIPPED), folder / f"{name}-plain")
            for out, layout in ((name, "released"), (f"{name}-nested", "nested")):
                assert call(convert.main, patch, "export", folder / f"{name}-plain", "--fp8",
                            "--layout", layout, "--out", folder / out) == 0
    return folder


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
def test_fp8_export_has_block_scaled_matrices(name: str, in_fp8: Path, run: Callable) -> None:
    """weight and weight_scale_inv of the decoder's matrices; loading multiplies them; both layouts
    say the same, and the plain checkpoint is off by a sixteenth at most."""
    plain, loaded, nested = (LlavaOneVision.from_pretrained(in_fp8 / directory)
                             for directory in (f"{name}-plain", name, f"{name}-nested"))
    tensors = {}
    for file in sorted((in_fp8 / name).glob("*.safetensors")):
        tensors |= load_file(file)
    about = json.loads((in_fp8 / name / "config.json").read_text())["quantization_config"]
    assert about["weight_block_size"] == [128, 128] and about["quant_method"] == "fp8"
    scaled = {key.removesuffix("_scale_inv") for key in tensors if key.endswith("_scale_inv")}
    kept = {f"{key}.weight" for key in about["modules_to_not_convert"]}
    assert kept == {f"{module}.weight" for module, layer in plain.named_modules() if isinstance(
        layer, torch.nn.Linear) and not re.search(r"model\.layers.*_proj$", module)}
    assert len(scaled) == 2 * (7 if name == "tiny" else 4 + 3 * 8) and not scaled & kept
    for parameter, pieces in released_names(plain).items():
        ours, exact = loaded.get_parameter(parameter), plain.get_parameter(parameter)
        assert torch.equal(ours, nested.get_parameter(parameter)) and ours.dtype == torch.bfloat16
        for piece, weight, true in zip(pieces, ours.chunk(len(pieces)), exact.chunk(len(pieces))):
            if piece not in scaled:
                assert torch.equal(tensors[piece], weight) and torch.equal(weight, true)
                continue
            stored, scales = tensors[piece], tensors[f"{piece}_scale_inv"]
            assert stored.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
            expected = quantize_fp8(true.detach(), square=True)[0]
            assert torch.equal(stored.float(), expected.values.float())
            assert torch.equal(scales, expected.scales)
            whole = stored.float() * torch.kron(scales, torch.ones(128, 128))
            assert torch.equal(whole.bfloat16(), weight)
            slack = 2**-10 * torch.kron(scales, torch.ones(128, 128))
            assert ((weight - true).abs() <= true.abs() * (2**-4 + 2**-8) + slack).all()
    said = run("verify", in_fp8 / name, in_fp8 / f"{name}-nested")
    assert f"{len(scaled):,} of FP8 with scales" in said and "have the same numbers" in said


def test_fp8_of_any_shape_is_read_from_any_row() -> None:
    """Squares may end outside of the matrix; a rank's rows may begin within one."""
    values = torch.randn(300, 200).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2)
    whole = values.float() * torch.kron(scales, torch.ones(128, 128))[:300, :200]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.safetensors"
        save_file({"w": values, "w_scale_inv": scales}, file)
        stored = Stored(file, "w", Stored(file, "w_scale_inv"))
        for begin, end in ((0, 300), (0, 128), (37, 38), (100, 299), (256, 300)):
            found = from_fp8(values[begin:end], begin, [300, 200], stored.scales)
            assert torch.equal(found, whole[begin:end])
        like = torch.empty(300, 200, device="meta")
        for dtype in (torch.float32, torch.bfloat16, None):
            read = read_parameter([stored], like, dtype, None)
            assert torch.equal(read, whole.to(dtype or torch.bfloat16))
            assert read.dtype == (dtype or torch.bfloat16)


O_PROJ = "model.layers.0.self_attn.o_proj.weight"


@pytest.mark.parametrize("damage, words", [
    (lambda d: drop(d, f"{O_PROJ}_scale_inv"), (O_PROJ, "F8_E4M3", "floating point")),
    (lambda d: drop(d, O_PROJ), ("lacks the tensor", O_PROJ)),
    (lambda d: alter(d, f"{O_PROJ}_scale_inv", lambda x: x[:1].contiguous()),
     (f"{O_PROJ}_scale_inv", "[1, 2]", "[2, 2]")),
    (lambda d: alter(d, f"{O_PROJ}_scale_inv", lambda x: x.to(torch.int32)), ("I32", "F32")),
    (lambda d: alter(d, O_PROJ, lambda x: x.bfloat16()), (O_PROJ, "BF16", "scales")),
    (lambda d: alter(d, f"{O_PROJ}_scale_inv", spoil(torch.nan, 1)), (O_PROJ, "not finite")),
    (change_json("config.json", quantization_config__quant_method="awq"),
     ("config.json", "quant_method", "awq")),
    (change_json("config.json", quantization_config__weight_block_size=[64, 64]),
     ("config.json", "weight_block_size", "[64, 64]")),
    (change_json("config.json", quantization_config=[1]), ("quantization_config is no object",)),
])
def test_damaged_fp8_is_refused(damage: Callable, words: tuple[str, ...], in_fp8: Path,
                                tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(in_fp8 / "tiny", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    for arguments in (("export", tmp_path / "damaged", "--out", tmp_path / "out"),
                      ("verify", tmp_path / "damaged")):
        code, said = call(convert.main, monkeypatch, *arguments), capsys.readouterr()
        assert code == 2 and said.err.count("\n") == 1, said.err
        for word in words:
            assert word in said.err, (arguments[0], word, said.err)
        assert list(tmp_path.iterdir()) == [tmp_path / "damaged"]


def test_fp8_export_of_a_tied_head_and_of_what_float16_cannot_hold(
        tmp_path: Path, run: Callable, monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(PRESETS["tiny"], num_hidden_layers=1, tie_word_embeddings=True)
    model = LlavaOneVision(config).init_weights()
    convert.save_checkpoint(model, load_tokenizer(SHIPPED), tmp_path / "run")
    run("export", tmp_path / "run", "--fp8", "--out", tmp_path / "out")
    about = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in about["modules_to_not_convert"]
    read = LlavaOneVision.from_pretrained(tmp_path / "out")
    assert torch.equal(read.lm_head.weight, model.lm_head.weight.bfloat16())
    model.model.norm.weight.data[3] = 1e6
    convert.save_checkpoint(model, load_tokenizer(SHIPPED), tmp_path / "large")
    code = call(convert.main, monkeypatch, "export", tmp_path / "large", "--fp8", "--dtype",
                "float16", "--out", tmp_path / "low")
    assert code == 2 and "model.norm.weight is not finite everywhere, as torch.float16" in (
        capsys.readouterr().err) and not (tmp_path / "low").exists()


def test_fp8_export_refuses_narrow_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    code = call(convert.main, monkeypatch, "export", SHIPPED, "--fp8", "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert code == 2 and "q_proj maps 160 to 160 numbers; FP8 takes multiples of 128" in said
    assert not list(tmp_path.iterdir())
