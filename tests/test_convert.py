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
from benchmarks.fuzz import damaged_headers
from convert import (CHAT_TEMPLATE, INDEX, Stored, find_checkpoint, from_fp8, load_model,
                     load_tokenizer, read_parameter, read_tensors, released_names)
from data import render
from fp8_kernel import quantize_fp8
from model import PRESETS, LlavaOneVision, ModelConfig, meta_model

ROOT = Path(__file__).parent.parent
PARITY, SHIPPED = ROOT / "tests" / "parity", ROOT / "assets" / "tiny"
STAGE0 = PARITY / "stage0"
QKV, PATCH = "visual.blocks.0.attn.qkv.weight", "visual.patch_embed.proj.weight"
O_PROJ, FIRST = "model.layers.0.self_attn.o_proj.weight", "model-00001-of-"
Damage = Callable[[Path], object]


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


def read_all(path: Path) -> None:
    """Read all that export reads."""
    model, pieces = find_checkpoint(path)
    load_tokenizer(path, model.config)
    for _ in read_tensors(model, pieces):
        pass


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
def test_merged_parts_are_what_they_were(llm: str, tmp_path: Path, run: Callable) -> None:
    """The tensors of the sources, cut out by their layouts, to the bit; and their outputs."""
    said = run(*merge_command(llm, tmp_path / "merged", "--verify"))
    assert said.count("equal as torch.float32\n") == 2
    model, pieces = find_checkpoint(tmp_path / "merged")
    for source, layout in zip(("vit", llm), convert.source_layouts(released_names(model))):
        part = {parameter: pieces[parameter] for parameter in layout}
        ours = dict(read_tensors(model, part, layout=layout))
        theirs = load_file(STAGE0 / source / "model.safetensors")
        if source == "llm":  # its head is tied
            theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
        # the merged model has no such norm
        assert theirs.keys() - ours.keys() == {
            f"vision_model.post_layernorm.{end}" for end in ("weight", "bias") if source == "vit"}
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
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


# ------------------------------------------------------------------------------- export, side files


def nest(source: Path, target: Path) -> None:
    """The same checkpoint with the other published key layout."""
    def nested(name: str) -> str:
        name = re.sub(r"^model\.", "model.language_model.", name)
        return re.sub(r"^visual\.", "model.visual.", name)

    shutil.copytree(source, target)
    for file in target.glob("*.safetensors"):
        save_file({nested(name): tensor for name, tensor in load_file(file).items()}, file)
    index = json.loads((target / INDEX).read_text())
    index["weight_map"] = {nested(name): file for name, file in index["weight_map"].items()}
    (target / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_export_round_trips_bit_for_bit(preset: str, tmp_path: Path, run: Callable,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Export -> load -> save -> export, and the other key layout -> export, in several files."""
    torch.manual_seed(0)
    model = LlavaOneVision(replace(PRESETS[preset], num_hidden_layers=2)).init_weights()
    monkeypatch.setattr(convert, "FILE_BYTES", 2e6)
    (tmp_path / "run").mkdir()
    convert.save_checkpoint(model, load_tokenizer(SHIPPED), tmp_path / "run" / "instruct")
    shutil.copytree(SHIPPED, tmp_path / "run" / "align")  # an earlier stage, written later
    run("export", tmp_path / "run", "--out", tmp_path / "once")  # a run: its last stage
    loaded = LlavaOneVision.from_pretrained(tmp_path / "once")
    for name, parameter in model.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter.bfloat16()), name
    convert.save_checkpoint(loaded, load_tokenizer(tmp_path / "once"), tmp_path / "saved")
    run("export", tmp_path / "saved", "--out", tmp_path / "twice")
    nest(tmp_path / "once", tmp_path / "nested")
    run("export", tmp_path / "nested", "--out", tmp_path / "back")
    files = sorted((tmp_path / "once").iterdir())
    assert len({file.stat().st_mode for file in files}) == 1  # all can be read by the same people
    assert len([file for file in files if file.name.startswith("model-0")]) > 1
    for file in files:
        for other in ("twice", "back"):
            assert (tmp_path / other / file.name).read_bytes() == file.read_bytes(), file.name
    assert "have the same numbers" in run("verify", tmp_path / "run" / "instruct",
                                          tmp_path / "nested")


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


def test_sides_can_be_loaded_alone() -> None:
    whole = LlavaOneVision.from_pretrained(PARITY / "dense")
    decoder = load_model(PARITY / "dense", side="decoder")
    vision = load_model(PARITY / "dense", side="vision")
    ids, starts = torch.arange(20), torch.tensor([0, 20])
    patches, grid = torch.randn(24, 588), torch.tensor([[1, 4, 6]])
    assert torch.equal(decoder(ids, starts), whole(ids, starts))
    assert torch.equal(vision.visual(patches, grid), whole.visual(patches, grid))
    names = {name for model in (decoder, vision) for name, _ in model.named_parameters()}
    assert names == {name for name, _ in whole.named_parameters()}
    holes = torch.full((6,), whole.config.image_token_id)
    with pytest.raises(ValueError, match="without its ViT"):
        decoder(holes, torch.tensor([0, 6]), patches, grid)
    with pytest.raises(ValueError, match="no side 'text'"):
        load_model(PARITY / "dense", side="text")


# ----------------------------------------------------------------------------------------- refusals


def change_json(name: str, **changes: object) -> Damage:
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


def change_tensors(change: Callable[[dict], object], having: str = QKV) -> Damage:
    """Change the tensors of the file that has one of this name, the index with them."""
    def rewrite(folder: Path) -> None:
        index = {"weight_map": {}}
        if (folder / INDEX).is_file():
            index = json.loads((folder / INDEX).read_text())
        file = folder / index["weight_map"].get(having, "model.safetensors")
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        if index["weight_map"]:
            others = {k: v for k, v in index["weight_map"].items() if v != file.name}
            index["weight_map"] = others | dict.fromkeys(tensors, file.name)
            (folder / INDEX).write_text(json.dumps(index))
    return rewrite


def drop(name: str) -> Damage:
    """Take a tensor from its file and the index."""
    return change_tensors(lambda tensors: tensors.pop(name), name)


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return change_tensors(lambda t: t.update({name: change(t[name]).contiguous()}), name)


def spoil(value: float, place: int = 7) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[place] = value
        return tensor
    return change


def change_bytes(change: Callable[[bytes], bytes]) -> Damage:
    def rewrite(folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[0]
        file.write_bytes(change(file.read_bytes()))
    return rewrite


def remove(pattern: str) -> Damage:
    return lambda folder: [file.unlink() for file in list(folder.glob(pattern))][0]


def write(name: str, text: str) -> Damage:
    return lambda folder: (folder / name).write_text(text)


def all_of(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def config(**changes: object) -> Damage:
    return change_json("config.json", **changes)


def decoder(**changes: object) -> Damage:
    return config(**{f"text_config__{key}": value for key, value in changes.items()})


def vision(**changes: object) -> Damage:
    return config(**{f"vision_config__{key}": value for key, value in changes.items()})


def experts(chosen: int) -> Damage:
    return decoder(num_experts=4, num_experts_per_tok=chosen, moe_intermediate_size=24)


# three damages that every command meets, and the words of the refusal
A_LAYER_MORE = (decoder(num_hidden_layers=3), "lacks the tensor model.layers.2.")
HALF_A_FILE = (change_bytes(lambda b: b[:len(b) // 2]), f"{FIRST} safetensors")
TRANSPOSED = (replaced(QKV, lambda x: x.T), f"{FIRST} {QKV} (32, 96) (96, 32)")
DAMAGED = [
    A_LAYER_MORE, HALF_A_FILE, TRANSPOSED,
    # config.json
    (remove("config.json"), "config.json"),
    (write("config.json", "{,"), "config.json JSON"),
    (write("config.json", "[]"), "config.json object"),
    (write("config.json", '{"hidden_size": 4}'), "config.json text_config"),
    (decoder(hidden_size="wide"), "config.json hidden_size wide"),
    (all_of(decoder(hidden_size=64), vision(text_hidden_size=64)),
     ".safetensors the model needs ( 64 weight"),
    (vision(text_hidden_size=64), "64 48"),
    (decoder(rope_theta=None), "rope_theta"),
    (decoder(num_hidden_layers=1), "model.layers.1. .safetensors"),
    (vision(depth=5), "visual.blocks.2"),
    (experts(chosen=2), "mlp.gate.weight"),
    (experts(chosen=5), "config.json num_experts_per_tok 5"),
    (decoder(num_hidden_layers=1.5), "config.json num_hidden_layers 1.5 whole"),
    (decoder(num_hidden_layers=True), "config.json num_hidden_layers True positive"),
    (decoder(hidden_size=-48), "config.json hidden_size -48"),
    (vision(num_heads=0), "config.json num_heads"),
    (decoder(rope_scaling="yarn"), "config.json rope_scaling"),
    (decoder(rope_scaling={"type": "yarn"}), "config.json yarn"),
    (decoder(use_sliding_window=True), "config.json use_sliding_window"),
    (decoder(layer_types=["sliding_attention"]), "config.json layer_types"),
    (decoder(partial_rotary_factor=0.5), "config.json partial_rotary_factor 0.5"),
    (decoder(attention_dropout=0.1), "config.json attention_dropout 0.1"),
    (vision(patch_size=16), "config.json patch_size 16"),
    (vision(hidden_act="quick_gelu"), "config.json hidden_act quick_gelu"),
    (vision(in_channels=4), "config.json in_channels 4"),
    (config(image_token_id=99), "99 image_pad"),
    (vision(num_heads=3), "config.json multiple of 4"),
    (decoder(num_attention_heads=3), "config.json 3 query heads"),
    # files and their index
    (remove("model-00001-*"), FIRST),
    (change_bytes(lambda b: b[:60]), f"{FIRST} safetensors"),
    (change_bytes(lambda b: b""), f"{FIRST} safetensors"),
    (change_bytes(lambda b: b"version https://git-lfs.github.com/spec/v1"), f"{FIRST} safetensors"),
    (change_bytes(lambda b: struct.pack("<Q", 1 << 40) + b[8:]), f"{FIRST} safetensors"),
    (change_bytes(lambda b: b[:8] + b"x" + b[9:]), f"{FIRST} safetensors"),
    (write(INDEX, "oops"), "index.json JSON"),
    (change_json(INDEX, weight_map=None), "index.json weight_map"),
    (change_json(INDEX, weight_map__x=5), "index.json weight_map"),
    (change_json(INDEX, **{"weight_map__lm_head.bias": "model-00001-of-00003.safetensors"}),
     "index.json lm_head.bias"),
    (change_json(INDEX, **{f"weight_map__{QKV}": None}), f"{FIRST} {QKV} index"),
    (remove("*.index.json"), "model.safetensors"),
    (all_of(remove("*.index.json"), remove("*.safetensors"), write("pytorch_model.bin", "x")),
     "model.safetensors"),
    (lambda d: shutil.copy(SHIPPED / "model.safetensors", d), "model.safetensors beside index"),
    (remove("tokenizer.json"), "tokenizer.json"),
    # tensors
    (drop(QKV), f"lacks {QKV}"),
    (all_of(config(tie_word_embeddings=False), drop("lm_head.weight")), "lacks lm_head.weight"),
    (change_tensors(lambda t: t.update({QKV + "s": t.pop(QKV)})), QKV),
    (change_tensors(lambda t: t.update({"visual.post_layernorm.weight": torch.ones(32)})),
     f"{FIRST} visual.post_layernorm.weight"),
    (change_tensors(lambda t: t.update({f"model.{QKV}": t[QKV].clone()})), f"{FIRST} {QKV} also"),
    (replaced(PATCH, lambda x: x[:, :, :7]), f"{FIRST} {PATCH} (32, 3, 7, 14)"),
    (replaced(QKV, lambda x: x.long()), f"{FIRST} {QKV} I64"),
    (replaced(QKV, lambda x: x.to(torch.uint8)), f"{FIRST} {QKV} U8"),
    (replaced(QKV, spoil(float("nan"))), f"{FIRST} {QKV} finite"),
    (replaced(QKV, spoil(float("nan"), -1)), f"{FIRST} {QKV} finite"),
    (replaced(PATCH, spoil(float("inf"))), f"{FIRST} {PATCH} finite"),
]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged checkpoint in three files."""
    folder = tmp_path_factory.mktemp("healthy") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "FILE_BYTES", 4e5)
        assert call(convert.main, patch, *merge_command("llm", folder)) == 0
    assert len(list(folder.glob("model-*-of-00003.safetensors"))) == 3
    return folder


def check_refused(folder: Path, words: str) -> None:
    """Reading ends with one sentence that has these words."""
    with pytest.raises(ValueError) as refusal:
        read_all(folder)
    said = str(refusal.value)
    assert "\n" not in said and all(word in said for word in words.split()), said


@pytest.mark.parametrize("damage, words", DAMAGED)
def test_damaged_checkpoints_are_refused(damage: Damage, words: str, healthy: Path,
                                         tmp_path: Path) -> None:
    shutil.copytree(healthy, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    check_refused(tmp_path / "damaged", words)


def test_hundreds_of_damaged_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is read or refused in one sentence, at once, and nothing outside is opened."""
    found = damaged_headers(240)
    assert not found.failures, found.failures[0]
    assert found.refused > 160 and found.valid > 10
    # without the check of names, some lead to files outside: what is sought here is found
    monkeypatch.setattr(convert, "check_name", lambda file, name: None)
    assert any("opened" in failure for failure in damaged_headers(80).failures)


@pytest.mark.parametrize("damage, words", [A_LAYER_MORE, HALF_A_FILE, TRANSPOSED])
def test_every_command_refuses(damage: Damage, words: str, healthy: Path, tmp_path: Path,
                               monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence naming tensor and file, exit code 2, nothing written."""
    damaged = tmp_path / "damaged"
    shutil.copytree(healthy, damaged)
    damage(damaged)
    for main, *arguments in ((convert.main, "export", damaged, "--out", tmp_path / "out"),
                             (convert.main, "verify", damaged),
                             (convert.main, "verify", healthy, damaged),
                             (sample.main, "--checkpoint", damaged, "Hello")):
        code, said = call(main, monkeypatch, *arguments), capsys.readouterr()
        assert code == 2 and (not said.out or healthy in arguments), (arguments, said)
        assert said.err.count("\n") == 1, said.err
        assert all(word in said.err for word in words.split()), said.err
        assert list(tmp_path.iterdir()) == [damaged]


def source(name: str, damage: Damage) -> Callable[[Path], Path]:
    """A damaged copy of a source of stage 0."""
    def make(folder: Path) -> Path:
        shutil.copytree(STAGE0 / name, folder / name)
        damage(folder / name)
        return folder / name
    return make


@pytest.mark.parametrize("flag, value, words", [
    ("vit", lambda d: d, "config.json"),
    ("vit", lambda d: STAGE0 / "llm", "hidden_act is silu"),
    ("vit", source("vit", drop("vision_model.class_pos_emb")), "class_pos_emb vit"),
    ("llm", lambda d: STAGE0 / "vit", "hidden_act is gelu"),
    ("llm", source("llm", drop("model.norm.weight")), "model.norm.weight llm"),
    ("llm", source("llm", config(vocab_size=1000)), "more tokens than the model's 1000"),
    ("llm", lambda d: PARITY / "dense", "config.json"),
    ("tokenizer", lambda d: STAGE0 / "llm", "tokenizer.json"),
    ("out", lambda d: SHIPPED, "is there already tiny"),
    ("out", lambda d: d / "no" / "out", "there is no directory"),
    ("out", lambda d: ".", "is there already"),
])
def test_merge_refuses(flag: str, value: Callable, words: str, tmp_path: Path,
                       monkeypatch: pytest.MonkeyPatch,
                       capsys: pytest.CaptureFixture[str]) -> None:
    flags = {"vit": STAGE0 / "vit", "llm": STAGE0 / "llm", "tokenizer": SHIPPED,
             "out": tmp_path / "out"} | {flag: value(tmp_path)}
    there = sorted(tmp_path.iterdir())
    code = call(convert.main, monkeypatch, "merge", *(f"--{k}={v}" for k, v in flags.items()))
    said = capsys.readouterr().err
    assert code == 2 and said.count("\n") == 1 and all(w in said for w in words.split()), said
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


def test_an_export_is_moved_into_place_whole(healthy: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    """A source named like something half-written is not lost, and a failed export leaves nothing:
    the number that float16 cannot hold is met after a file was written."""
    source, out = tmp_path / "out.partial", tmp_path / "out"
    shutil.copytree(healthy, source)
    monkeypatch.setattr(convert, "FILE_BYTES", 4e4)
    assert call(convert.main, monkeypatch, "export", source, "--out", out) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"out.partial", "out"}
    replaced(O_PROJ, lambda x: x + 1e6)(source)
    assert call(convert.main, monkeypatch, "export", source, "--out", tmp_path / "half", "--dtype",
                "float16") == 2
    assert O_PROJ in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"out.partial", "out"}


def test_moe_config_round_trip(tmp_path: Path) -> None:
    for name in ("tiny-moe", "30b-a3b"):
        (tmp_path / name).mkdir()
        content = convert.config_json(PRESETS[name], torch.bfloat16)
        (tmp_path / name / "config.json").write_text(json.dumps(content))
        assert ModelConfig.from_dir(tmp_path / name) == PRESETS[name]


# ------------------------------------------------------------ what a file switches on by itself


@pytest.mark.parametrize("change, word", [
    (lambda t: t.enable_truncation(5, direction="left"), "truncation"),
    (lambda t: t.enable_padding(length=64, pad_token="<|endoftext|>"), "padding"),
    (lambda t: t.enable_padding(pad_to_multiple_of=32), "padding"),
    (lambda t: setattr(t.model, "dropout", 0.5), "dropout"),
])
def test_a_tokenizer_does_what_is_asked_of_it_alone(change: Callable, word: str, tmp_path: Path,
                                                    run: Callable) -> None:
    """Loaded, it cuts words as without; verify tells of it; export does not hand it on."""
    folder = tmp_path / "asks"
    shutil.copytree(SHIPPED, folder)
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    change(tokenizer)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert re.search(rf"tokenizer\.json asks for {word}.*: it is ignored", run("verify", folder))
    text = "Which word is printed above the number in the second picture? 47 " * 3
    plain, loaded = load_tokenizer(SHIPPED), load_tokenizer(folder)
    assert plain.encode(text).ids == loaded.encode(text).ids == loaded.encode(text).ids
    run("export", folder, "--out", tmp_path / "out")
    assert convert.switched_on(folder) and not convert.switched_on(tmp_path / "out")


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


# -------------------------------------------------------------------------------------------- FP8


@pytest.fixture(scope="module")
def in_fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fresh dense and mixed models of two layers, exported in FP8, in several files each."""
    folder = tmp_path_factory.mktemp("fp8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "FILE_BYTES", 2e6)
        for name in ("tiny", "tiny-moe"):
            torch.manual_seed(0)
            model = LlavaOneVision(replace(PRESETS[name], num_hidden_layers=2)).init_weights()
            convert.save_checkpoint(model, load_tokenizer(SHIPPED), folder / f"{name}-plain")
            assert call(convert.main, patch, "export", folder / f"{name}-plain", "--fp8",
                        "--out", folder / name) == 0
            nest(folder / name, folder / f"{name}-nested")
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


def test_fp8_of_any_shape_is_read_from_any_line(tmp_path: Path) -> None:
    """Squares may end outside of the matrix; a rank's lines may begin within one."""
    values = torch.randn(300, 200).to(torch.float8_e4m3fn)
    scales = torch.rand(3, 2)
    whole = values.float() * torch.kron(scales, torch.ones(128, 128))[:300, :200]
    file = tmp_path / "x.safetensors"
    save_file({"w": values, "w_scale_inv": scales}, file)
    stored = Stored(file, "w", Stored(file, "w_scale_inv"))
    for begin, end in ((0, 300), (0, 128), (37, 38), (100, 299), (256, 300)):
        lines = from_fp8(values[begin:end], begin, [300, 200], stored.scales)
        assert torch.equal(lines, whole[begin:end])
    for dtype in (torch.float32, torch.bfloat16, None):
        read = read_parameter([stored], torch.empty(300, 200, device="meta"), dtype, None)
        assert torch.equal(read, whole.to(dtype or torch.bfloat16))
        assert read.dtype == (dtype or torch.bfloat16)


@pytest.mark.parametrize("damage, words", [
    (drop(f"{O_PROJ}_scale_inv"), f"{O_PROJ} F8_E4M3 floating point"),
    (drop(O_PROJ), f"lacks the tensor {O_PROJ}"),
    (replaced(f"{O_PROJ}_scale_inv", lambda x: x[:1]), f"{O_PROJ}_scale_inv [1, 1] [2, 1]"),
    (replaced(f"{O_PROJ}_scale_inv", lambda x: x.to(torch.int32)), "I32 F32"),
    (replaced(O_PROJ, lambda x: x.bfloat16()), f"{O_PROJ} BF16 scales"),
    (replaced(f"{O_PROJ}_scale_inv", spoil(torch.nan, 1)), f"{O_PROJ} not finite"),
    (config(quantization_config__quant_method="awq"), "config.json quant_method awq"),
    (config(quantization_config__weight_block_size=[64, 64]), "weight_block_size [64, 64]"),
    (config(quantization_config=[1]), "quantization_config is no object"),
])
def test_damaged_fp8_is_refused(damage: Damage, words: str, in_fp8: Path, tmp_path: Path) -> None:
    shutil.copytree(in_fp8 / "tiny", tmp_path / "damaged")
    damage(tmp_path / "damaged")
    check_refused(tmp_path / "damaged", words)


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
    config = replace(PRESETS["tiny"], hidden_size=160, num_hidden_layers=1,
                     vision=replace(PRESETS["tiny"].vision, text_hidden_size=160))
    run = tmp_path / "run"
    convert.save_checkpoint(LlavaOneVision(config).init_weights(), load_tokenizer(SHIPPED), run)
    code = call(convert.main, monkeypatch, "export", run, "--fp8", "--out", tmp_path / "out")
    said = capsys.readouterr().err
    assert code == 2 and "q_proj maps 160 to 128 numbers; FP8 takes multiples of 128" in said
    assert [*tmp_path.iterdir()] == [run]
