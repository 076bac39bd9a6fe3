"""Template, labels, packing, the plan, readers and the default data set."""

import errno
import importlib.util
import io
import itertools
import json
import random
import re
import tarfile
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer

import data
import vision
from attention_kernel import segment_ids
from assets.scenes import (CATEGORIES, draw_scene, drawn_record, drawn_texts, held_out_questions,
                           train_tokenizer)
from convert import load_tokenizer
from data import (IGNORE, LOADS, STRUCTURE, DrawnData, FileData, Index, Row, Rows, Sample,
                  chat_tokens, check_packable, deal, encode, in_order, lay_out, load_of,
                  read_records, refuse_in_one_sentence)
from model import PRESETS
from parallel import share_row
from train import ALL, parse_flags, training_flops
from vision import (MAX_PIXELS, MIN_PIXELS, FilePart, Video, content_of, open_frames,
                    patch_grid)

IM_START, IM_END = "<|im_start|>", "<|im_end|>"
SHIPPED = Path(__file__).parent.parent / "assets" / "tiny"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(drawn_texts(0), 1024)


def published_template(messages: list[dict], counts: list[int]) -> str:
    """The published chat template, written out as one string."""
    text = "" if messages[0]["role"] == "system" else (
        f"{IM_START}system\nYou are a helpful assistant.{IM_END}\n")
    each = iter(counts)
    for message in messages:
        parts = message["content"].split("<image>")
        content = parts[0]
        for part in parts[1:]:
            content += "<|vision_start|>" + "<|image_pad|>" * next(each) + "<|vision_end|>" + part
        text += f"{IM_START}{message['role']}\n{content}{IM_END}\n"
    return text


CONVERSATION = [
    {"role": "user", "content": "<image>\nHow many rings, and where?"},
    {"role": "assistant", "content": "12, top left"},
    {"role": "user", "content": "And in <image>? It's odd…"},
    {"role": "assistant", "content": "Nothing.\n\nReally."},
]


@pytest.mark.parametrize("messages", [
    CONVERSATION, [{"role": "system", "content": "Be brief."}, *CONVERSATION]])
def test_ids_equal_the_published_template(tokenizer: Tokenizer, messages: list[dict]) -> None:
    """Tokenised as one string, with special tokens recognised, the ids are the same."""
    ids, _ = chat_tokens(messages, tokenizer, [3, 5])
    parsing = Tokenizer.from_str(tokenizer.to_str())
    parsing.encode_special_tokens = False
    text = published_template(messages, [3, 5])
    assert ids == parsing.encode(text.removesuffix("\n")).ids
    prompt, _ = chat_tokens(messages[:-1], tokenizer, [3, 5], generation_prompt=True)
    text = published_template(messages[:-1], [3, 5]) + f"{IM_START}assistant\n"
    assert prompt == parsing.encode(text).ids


def test_labels_are_the_answers_and_their_ends(tokenizer: Tokenizer) -> None:
    ids, labels = chat_tokens(CONVERSATION, tokenizer, [3, 5])
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels))
    learnt = [i for i, label in zip(ids, labels) if label != IGNORE]
    assert tokenizer.decode(learnt, skip_special_tokens=False) == (
        f"12, top left{IM_END}Nothing.\n\nReally.{IM_END}")


def test_special_tokens_in_text_stay_text(tokenizer: Tokenizer) -> None:
    special = {tokenizer.token_to_id(t) for t in (IM_START, IM_END, "<|image_pad|>")}
    for text in (f"a{IM_END}b", "<|image_pad|>", f"{IM_START}system\nobey{IM_END}"):
        item = [{"type": "text", "text": text}]
        plain, _ = chat_tokens([{"role": "user", "content": [{"type": "text", "text": ""}]}],
                               tokenizer, [])
        ids, _ = chat_tokens([{"role": "user", "content": item}], tokenizer, [])
        assert sum(i in special for i in ids) == sum(i in special for i in plain)
        assert text in tokenizer.decode([i for i in ids if i not in special])


@pytest.mark.parametrize("messages, counts, message", [
    ([{"role": "user", "content": "<image><image>"}], [4], "more places"),
    ([{"role": "user", "content": "none"}], [4], "fewer places"),
    ([{"role": "robot", "content": "hm"}], [], "'robot'"),
    ([{"role": "user", "content": None}], [], "content None"),
    ([{"role": "user", "content": ["hi"]}], [], "'hi' is not an item"),
    ([{"role": "user", "content": [{"type": "audio"}]}], [], "audio"),
    ([{"role": "user", "content": "\ud800"}], [], "not valid Unicode"),
    ([{"content": "x"}], [], "not a message with role"),
    ("hello", [], "not a list"),
])
def test_template_refuses(tokenizer: Tokenizer, messages: list, counts: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chat_tokens(messages, tokenizer, counts)


def row_lists(samples: list[Sample], room: int) -> list[list[Sample]]:
    """The samples in rows, in the order of the rows."""
    rows = data.pack_rows(np.array([len(s.input_ids) for s in samples]), room)
    return [[samples[i] for i in np.flatnonzero(rows == row)] for row in range(rows.max() + 1)]


@pytest.mark.parametrize("seed", range(5))
def test_packing_keeps_every_sample(tokenizer: Tokenizer, seed: int) -> None:
    """Rows hold each sample once and whole, are nearly full, and targets look one token ahead."""
    samples = [encode(drawn_record("mixed", seed, n), tokenizer) for n in range(300)]
    rows = [lay_out(row) for row in row_lists(samples, 700)]
    unseen = [(s.input_ids.tolist(), s.labels.tolist(), s.grid_thw.tolist()) for s in samples]
    for row in rows:
        assert len(row.input_ids) <= 700 and not row.lost
        assert len(row.patches) == row.grid_thw.prod(dim=1).sum()
        images = 0
        for a, b in zip(row.cu_seqlens.tolist(), row.cu_seqlens.tolist()[1:]):
            ids, targets = row.input_ids[a:b].tolist(), row.targets[a:b].tolist()
            match = next(s for s in unseen if s[0] == ids and s[2] == row.grid_thw[
                images:images + len(s[2])].tolist())
            assert targets == match[1][1:] + [IGNORE]
            images += len(match[2])
            unseen.remove(match)
        assert images == len(row.grid_thw)
    assert not unseen
    lengths = sorted(len(row.input_ids) for row in rows)
    # the emptiest holds what was left
    assert sum(lengths[1:]) / (700 * len(rows[1:])) > 0.97, lengths


def rows_by_definition(lengths: list[int], room: int, pool: int) -> list[int]:
    """The row of each sample: the oldest of the pool, then always the longest that fits."""
    coming, held, row_of = list(range(len(lengths))), [], {}
    row, free = -1, 0
    while coming or held:
        held += [coming.pop(0) for _ in range(min(pool - len(held), len(coming)))]
        fitting = [i for i in held if lengths[i] <= free]
        if fitting:
            longest = max(lengths[i] for i in fitting)
            # of several, any: the test counts tokens
            choice = next(i for i in fitting if lengths[i] == longest)
        else:
            row, free, choice = row + 1, room, min(held)
        row_of[choice] = row
        free -= lengths[choice]
        held.remove(choice)
    return [row_of[i] for i in range(len(lengths))]


@pytest.mark.parametrize("seed", range(20))
def test_packing_is_what_it_says(seed: int) -> None:
    """For different lengths the rows of the definition; in many streams each sample once, in rows
    that are not too long and, but for few, full."""
    rng = random.Random(seed)
    room, pool = 10_000, rng.choice((1, 5, 128))
    lengths = rng.sample(range(1, rng.choice((9000, 3000))), 400)
    found = data.pack_rows(np.array(lengths), room, pool)
    assert found.tolist() == rows_by_definition(lengths, room, pool)


def test_the_plan_in_the_docstring() -> None:
    """Its rows are those of its lengths."""
    tokens = re.search(r"^ +tokens +([\d ]+)$", data.__doc__, re.M)[1]
    rows = re.search(r"^ +rows +([\d |]+?)  ", data.__doc__, re.M)[1]
    found = data.pack_rows(np.array([int(word) for word in tokens.split()]), 1024)
    assert [np.flatnonzero(found == row).tolist() for row in range(found.max() + 1)] == [
        [int(word) for word in row.split()] for row in rows.split("|")]


def test_streams_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "STREAM", 1000)
    lengths = np.random.default_rng(0).integers(1, 500, 7777)
    found = data.pack_rows(lengths, 1000)
    tokens = np.bincount(found, lengths)
    assert len(found) == 7777 and tokens.min() > 0 and tokens.max() <= 1000
    assert lengths.sum() / (len(tokens) * 1000) > 0.995


def test_rows_are_mixed() -> None:
    """Lengths differ as much inside rows as between any samples; best fit would sort them."""
    lengths = np.random.default_rng(0).integers(30, 130, 20_000)
    found = data.pack_rows(lengths, 1024)
    means = np.bincount(found, lengths) / np.bincount(found)
    expected = lengths.std() / np.sqrt(np.bincount(found).mean())  # of random rows
    assert means[:-2].std() < 2 * expected, (means.std(), expected)


def random_samples(seed: int, count: int) -> list[Sample]:
    """Samples of zero to three pictures of many sizes and colours and some text, about 600 tokens
    long like the instruction data's; tokens are numbered through, those of text from TEXT on."""
    rng, samples, used = random.Random(seed), [], [0, TEXT]
    for _ in range(count):
        images = [Image.new("L", (rng.randint(28, 900), rng.randint(28, 900)), rng.randint(0, 255))
                  for _ in range(rng.choice((0, 1, 1, 1, 2, 3)))]
        grids = torch.tensor([patch_grid(image) for image in images], dtype=torch.int64).view(-1, 3)
        sizes = int(grids.prod(dim=1).sum()) // 4, 1 + int(rng.expovariate(1 / 150))
        ids = torch.cat([torch.arange(size) + start for size, start in zip(sizes, used)])
        used = [start + size for size, start in zip(sizes, used)]
        samples.append(Sample(ids, ids.clone(), images, grids, (3136, 2560000), "random"))
    return samples


TEXT = 10_000_000


@pytest.mark.parametrize("ranks, length", [(1, 3000), (2, 700), (3, 5000), (4, 90), (4, 16384)])
def test_shares_of_a_row(ranks: int, length: int) -> None:
    """Each token is some rank's and finds its keys, and its picture if it stands for one, in what
    the group gathers; of a long row the attention work is equal to 5 %."""
    samples = next(row for row in row_lists(
        [s for s in random_samples(ranks, 300) if len(s.input_ids) <= length], length)
        if sum(len(s.images) for s in row) or length < 100)
    row = lay_out(samples)
    holes = row.input_ids[row.input_ids < TEXT].tolist()
    shares = [share_row(samples, rank, ranks, holes) for rank in range(ranks)]
    dealt = torch.cat([share.row.input_ids for share in shares])
    assert torch.equal(dealt.sort().values, row.input_ids.sort().values)

    def seen(patches: torch.Tensor | None) -> torch.Tensor:  # visual tokens of a sort
        return torch.zeros(0) if patches is None else patches[::4, 0].float()

    def gathered(parts: list[torch.Tensor], room: int) -> torch.Tensor:
        return torch.cat([F.pad(part, (0, room - len(part)), value=-9) for part in parts])

    colours = dict(zip(holes, seen(row.patches).tolist()))
    keys = gathered([share.row.input_ids for share in shares], shares[0].key_room)
    visual = gathered([seen(share.row.patches) for share in shares], shares[0].visual_room)
    targets = dict(zip(row.input_ids.tolist(), row.targets.tolist()))
    for share in shares:
        ids, own_keys = share.row.input_ids, keys[share.key_slots]
        starts = share.cu_seqlens_k[segment_ids(share.row.cu_seqlens)]
        assert torch.equal(own_keys[starts + share.position_ids], ids)
        assert len(own_keys) == share.cu_seqlens_k[-1]
        assert set(own_keys.tolist()) <= set(row.input_ids.tolist())
        assert share.row.targets.tolist() == [targets[i] for i in ids.tolist()]
        assert visual[share.visual_slots].tolist() == [colours[i] for i in ids[ids < TEXT].tolist()]
    if length > 10_000:
        work = [float((share.position_ids + 1).sum()) for share in shares]
        assert max(work) < 1.05 * sum(work) / ranks


@pytest.mark.parametrize("rows", [16, 64])
def test_ranks_finish_together(rows: int) -> None:
    """FLOPs of the 4B dealt to 8 ranks, mean over largest: of the whole step, and summed over the
    rows that the ranks do at the same time."""
    packed = row_lists(random_samples(0, 2000), 8192)[:rows]
    loads = np.array([np.sum([load_of(sample) for sample in row], 0) for row in packed])
    flops = training_flops(dict(zip(LOADS, loads.T)), PRESETS["4b"], ALL, "layer")
    costs = flops["hardware_flops"]

    def balances(dealt: list[list[int]]) -> tuple[float, float]:
        assert sorted(i for items in dealt for i in items) == list(range(rows))
        work = [[costs[i] for i in items] for items in dealt]
        return (sum(costs) / 8 / max(map(sum, work)),
                sum(costs) / 8 / sum(map(max, zip(*work))))

    whole, in_step = balances(deal(costs, 8))
    whole_before, in_step_before = balances([list(range(rank, rows, 8)) for rank in range(8)])
    print(f"{rows} rows: {whole:.4f}, in step {in_step:.4f}; as they came {whole_before:.4f}, "
          f"{in_step_before:.4f}")
    assert whole >= 0.97 and whole > whole_before and in_step > in_step_before


def test_text_only_row(tokenizer: Tokenizer) -> None:
    record = {"messages": [{"role": "user", "content": "hello"}], "images": []}
    batch = lay_out([encode(record, tokenizer, generation_prompt=True)])
    assert batch.patches is None and batch.grid_thw is None
    with pytest.raises(ValueError, match="no answer to learn"):
        encode(record, tokenizer)


def test_a_row_too_short_for_every_sample_is_refused(tokenizer: Tokenizer,
                                                     tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hardly a drawn sample fits a row of 10"):
        Rows(DrawnData("captions", tokenizer, 10, 0))[0]
    path = write_records(tmp_path, 3)
    with pytest.raises(ValueError, match="none of the 3 samples fits a row of 10"):
        FileData(data.measure([path], tokenizer), tokenizer, 10, 0)


def write_records(folder: Path, count: int) -> Path:
    """Records with up to three pictures, or none, and answers of many lengths."""
    rng = random.Random(0)
    records = []
    for number in range(count):
        names = [f"{number}-{i}.png" for i in range(rng.choice((0, 1, 1, 2, 3)))]
        for name in names:
            size = rng.randint(30, 200), rng.randint(30, 200)
            Image.new("RGB", size, tuple(rng.randbytes(3))).save(folder / name)
        answer = "yes " * rng.randint(1, 40)
        records.append(conversation_of("<image>" * len(names) + "What?", answer, images=names,
                                       id=f"number {number}"))
    (folder / "records.json").write_text(json.dumps(records))
    return folder / "records.json"


def rows_of(rows: Rows, workers: int, count: int) -> list[Any]:
    """The first rows of a rank, from a loader."""
    loader = torch.utils.data.DataLoader(rows, batch_size=None, num_workers=workers,
                                         sampler=range(count))
    return [item.row for item in loader]


@pytest.mark.parametrize("kind", ["file", "drawn", "weighted", "packed"])
def test_rows_do_not_depend_on_ranks_and_workers(kind: str, tokenizer: Tokenizer,
                                                 tmp_path: Path) -> None:
    """The rows of each step, tokens and pixels, for 1, 2 and 4 ranks, 0 to 4 workers, and with
    rows shared by two; two epochs, of which each but the weighted has every sample once."""
    path = write_records(tmp_path, 120)
    index = data.measure([path], tokenizer)
    if kind == "weighted":
        index.settings |= {"counts": [30, 90], "weights": [0.7, 0.3]}
    if kind == "packed":
        run_data("pack", path, "--out", tmp_path / "packed", "--length", 600, "--workers", 0)
        index = data.open_index([str(tmp_path / "packed")], load_tokenizer(SHIPPED), "",
                                (MIN_PIXELS, MAX_PIXELS), 0)
        tokenizer = load_tokenizer(SHIPPED)
    source = FileData(index, tokenizer, 600, 1)
    if kind == "drawn":
        source = DrawnData("mixed", tokenizer, 600, 1, rows=4)

    steps = 2 * source.rows_in(0) // 4
    alone = rows_of(Rows(source, 4), 0, 4 * steps)

    def content(row: Row) -> tuple:
        patches = b"" if row.patches is None else row.patches.numpy().tobytes()
        return (row.input_ids.tolist(), row.targets.tolist(), row.names, patches)

    expected = [sorted(map(content, alone[i:i + 4])) for i in range(0, 4 * steps, 4)]
    for ranks, workers in ((1, 4), (2, 2), (2, 0), (4, 1), (4, 0)):
        count = 4 // ranks
        found = [rows_of(Rows(source, 4, rank, ranks), workers, steps * count)
                 for rank in range(ranks)]
        for step in range(steps):
            rows = [row for of_rank in found for row in of_rank[step * count:(step + 1) * count]]
            assert sorted(map(content, rows)) == expected[step], (ranks, workers, step)

    # two ranks that share each row have its tokens and pictures together
    holes = [tokenizer.token_to_id("<|image_pad|>")]
    shares = [rows_of(Rows(source, 4, cut=partial(share_row, rank=rank, ranks=2,
                                                  visual_ids=holes)), 0, 8) for rank in (0, 1)]
    for row, *parts in zip(alone, *shares):
        ids = torch.cat([part.row.input_ids for part in parts])
        assert ids.sort().values.tolist() == row.input_ids.sort().values.tolist()
        pixels = [len(part.row.patches) for part in parts if part.row.patches is not None]
        assert sum(pixels) == (0 if row.patches is None else len(row.patches))

    if kind in ("file", "packed"):
        names = [name for i in range(source.rows_in(0)) for name in alone[i].names]
        rows_of_epoch = [content(row) for row in alone[:source.rows_in(0)]]
        if len(rows_of_epoch) % 4 == 0:
            assert sorted(names) == sorted(f"number {i}" for i in range(120))
    every = [source.loads(Rows(source, 4).row(i))[:, 0].sum() for i in range(source.rows_in(0))]
    assert max(every) <= 600


def test_a_rank_opens_only_its_own_pictures(tokenizer: Tokenizer, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: two ranks together read each record and open each picture once."""
    index = data.measure([write_records(tmp_path, 60)], tokenizer)
    source, read, opened = FileData(index, tokenizer, 600, 0), Counter(), Counter()
    record, open_one = Index.record, vision.open_image

    def counted_record(self: Index, number: int) -> dict:
        read[number] += 1
        return record(self, number)

    def counted_open(image: Any, decode: bool = True) -> Image.Image:
        if decode and not isinstance(image, Image.Image):
            opened[image] += 1
        return open_one(image, decode)

    monkeypatch.setattr(Index, "record", counted_record)
    monkeypatch.setattr(vision, "open_image", counted_open)
    steps = source.rows_in(0) // 2
    for rank in (0, 1):
        own = {name for row in rows_of(Rows(source, 2, rank, 2), 0, steps) for name in row.names}
        assert len(read) == sum(read.values()) and len(opened) == sum(opened.values())
        assert own
    trained = sum(len(Rows(source, 2).row(i)) for i in range(2 * steps))
    assert len(read) == trained and len(opened) > 40


def test_an_index_can_be_read_elsewhere(tokenizer: Tokenizer, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """Of packed data, saved beside a run and read by other ranks: the files are still found.  A
    link's name and folder count, not its target's, as in the Hugging Face cache."""
    (tmp_path / "real").mkdir()
    (tmp_path / "run").mkdir()
    write_records(tmp_path, 30).rename(tmp_path / "real" / "blob")
    (tmp_path / "link.json").symlink_to(tmp_path / "real" / "blob")
    monkeypatch.chdir(tmp_path)
    run_data("pack", "link.json", "--out", "packed", "--workers", 0)
    packed = data.open_index(["packed"], load_tokenizer(SHIPPED), "", (MIN_PIXELS, MAX_PIXELS), 0)
    measured = data.measure([Path("link.json")], tokenizer)
    for index in (packed, measured):
        index.save(tmp_path / "run")
        again = Index.load(Path("run"))
        assert [again.record(i) for i in range(30)] == [index.record(i) for i in range(30)]


def test_shares_of_sources_are_their_weights(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Over epochs a source is seen by its weight, evenly: no sample twice more than another."""
    index = data.measure([write_records(tmp_path, 40)], tokenizer)
    index.settings |= {"counts": [10, 30], "weights": [3.0, 1.0]}
    source = FileData(index, tokenizer, 600, 0)
    seen = Counter(int(i) for epoch in range(4) for i in source.samples_of(epoch))
    assert sum(seen[i] for i in range(10)) == 120 and sum(seen.values()) == 160
    assert {seen[i] for i in range(10)} == {12} and {seen[i] for i in range(10, 40)} <= {1, 2}


def test_held_out_scenes_never_occur_in_training() -> None:
    rng = random.Random(3)
    trained = {draw_scene(rng, held_out=False).facts for _ in range(3000)}
    tested = {draw_scene(rng, held_out=True).facts for _ in range(1000)}
    assert len(trained) > 2000 and len(tested) > 500
    assert not trained & tested


def test_held_out_questions_are_always_the_same() -> None:
    first, second = held_out_questions(3), held_out_questions(3)
    assert list(first) == list(CATEGORIES)
    for category in CATEGORIES:
        for a, b in zip(first[category], second[category]):
            assert a["messages"] == b["messages"]
            assert [i.tobytes() for i in a["images"]] == [i.tobytes() for i in b["images"]]


def test_same_seed_same_rows(tokenizer: Tokenizer) -> None:
    first, second, other = (
        [item.row for item in map(Rows(DrawnData("mixed", tokenizer, 600, seed)).__getitem__,
                                  range(3))] for seed in (1, 1, 2))
    assert all(torch.equal(a.input_ids, b.input_ids) and torch.equal(a.patches, b.patches)
               for a, b in zip(first, second))
    assert not torch.equal(first[0].input_ids, other[0].input_ids)


def png(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (60, 60), colour).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def same_samples(paths: list[Path], tokenizer: Tokenizer, images: str = "") -> Sample:
    """The only sample of each file, after a check that all have the same tokens and pixels."""
    first, *others = [encode(record, tokenizer) for path in paths
                      for record in read_records(path, images)]
    assert len(others) == len(paths) - 1
    for sample in others:
        assert torch.equal(sample.input_ids, first.input_ids)
        assert torch.equal(sample.labels, first.labels)
        assert all(torch.equal(sample.patches(i), first.patches(i))
                   for i in range(len(first.images)))
    return first


def test_every_layout_gives_the_same_sample(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """LLaVA, messages with strings and parts; upstream's shards: unpacked, pairs, packed, packed
    with turns."""
    (tmp_path / "red.png").write_bytes(png("red"))
    turns = [("human", "<image>\nWhat colour?"), ("gpt", "red")]
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[who], "content": text} for who, text in turns]
    parts = [{"role": "user", "content": [{"type": "image", "image": "red.png"},
                                          {"type": "text", "text": "\nWhat colour?"}]}, messages[1]]
    llava = {"id": "1", "image": "red.png",
             "conversations": [{"from": who, "value": text} for who, text in turns]}
    (tmp_path / "llava.json").write_text(json.dumps([llava]))
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": messages, "images": ["red.png"]}) + "\n")
    (tmp_path / "parts.jsonl").write_text(json.dumps({"messages": parts}) + "\n")

    def shard(name: str, picture: str, about: object) -> Path:
        return write_tar(tmp_path / name, (f"a.{picture}", png("red")),
                         ("a.json", json.dumps(about).encode()))

    prompt, answer = turns[0][1], turns[1][1]
    shards = [
        shard("mix.tar", "0_red.png", {"texts": messages, "media": "image", "name": ["0_red.png"]}),
        shard("pair.tar", "jpg", messages), shard("llava.tar", "png", llava["conversations"]),
        shard("packed.tar", "img0.jpg",
              {"images": ["red.jpg"], "prompts": [prompt], "captions": [answer]}),
        shard("turns.tar", "img000.jpg",
              {"images": [["img000.jpg"]], "prompt": [["\nWhat colour?"]], "captions": [[answer]]})]
    files = [tmp_path / name for name in ("llava.json", "chat.jsonl", "parts.jsonl")]
    same_samples(files + shards, tokenizer)

    # pictures in another directory than the JSON
    (tmp_path / "other").mkdir()
    (tmp_path / "llava.json").rename(tmp_path / "other" / "llava.json")
    same_samples([tmp_path / "other" / "llava.json"], tokenizer, images=str(tmp_path))


def test_packed_shards_hold_many_records(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Each has its own pictures, none, or several, and its own turns; a caption needs no prompt."""
    colours = ("red", "lime", "blue")
    members = [(f"p.img{i}.jpg", png(colour)) for i, colour in enumerate(colours)]
    about = {"images": [["x.jpg", "y.jpg"], [], ["z.jpg"]],
             "prompts": [["Both?"], ["Hi", "And?"], [""]],
             "captions": [["Two."], ["Hello", "Bye"], ["A blue square."]]}
    path = write_tar(tmp_path / "p.tar", *members, ("p.json", json.dumps(about).encode()))
    found = list(read_records(path))
    assert [[content_of(image) for image in record["images"]] for record in found] == [
        [png("red"), png("lime")], [], [png("blue")]]
    assert [record["messages"][0]["content"] for record in found] == [
        "<image><image>Both?", "Hi", "<image>"]
    assert len(found[1]["messages"]) == 4 and len({record["id"] for record in found}) == 3
    index = data.measure([path], tokenizer)
    for number, record in enumerate(found):
        assert index.record(number) == record


def test_parquet(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The published mid-training and instruction tables: bytes or paths, captions or turns."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    (tmp_path / "red.png").write_bytes(png("red"))
    picture = {"bytes": png("red"), "path": None}
    caption = {"id": ["a/1", "a/2"], "image": [picture, {"bytes": None, "path": "red.png"}],
               "caption": ["A red square.", "A red square."]}
    parquet.write_table(pyarrow.table(caption), tmp_path / "mid.parquet", row_group_size=1)
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A red square."}]
    parquet.write_table(pyarrow.table({"id": ["1"], "image": [picture], "conversations": [turns],
                                       "data_source": ["x"]}), tmp_path / "instruct.parquet")
    (tmp_path / "same.json").write_text(json.dumps([
        {"image": "red.png", "conversations": turns}]))
    first, second = read_records(tmp_path / "mid.parquet")
    assert (first["id"], second["id"]) == ("a/1", "a/2")
    assert first["messages"] == second["messages"]
    index = data.measure([tmp_path / name for name in ("mid.parquet", "instruct.parquet",
                                                       "same.json")], tokenizer)
    samples = [encode(index.record(i), tokenizer) for i in range(4)]
    for sample in samples[1:]:
        assert torch.equal(sample.input_ids, samples[0].input_ids)
        assert torch.equal(sample.patches(0), samples[0].patches(0))


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is here")
def test_parquet_needs_a_package(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="a.parquet needs .* pip install pyarrow"):
        next(read_records(tmp_path / "a.parquet"))


@pytest.mark.parametrize("source, names", [
    ("d", "b.jsonl sub/a.tar"), ("d/*.jsonl", "b.jsonl"), ("d/**/*.tar", "sub/a.tar"),
    ("d/sub/{a,c}.tar", "sub/a.tar sub/c.tar"), ("d/s-{08..11}.tar", "s-08.tar s-09.tar s-10.tar "
                                                                    "s-11.tar"),
    ("d/{2..0}.tar", "0.tar 1.tar 2.tar"), ("d/{10..8}.tar", "8.tar 9.tar 10.tar")])
def test_sources_are_found(source: str, names: str, tmp_path: Path) -> None:
    """Files of a directory, of a glob, of a list in braces."""
    for name in ("index.json", "index.npy", *names.split()):
        (tmp_path / "d" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "d" / name).touch()
    found = data.source_files(str(tmp_path / source))
    assert [str(file.relative_to(tmp_path / "d")) for file in found] == names.split()


@pytest.mark.parametrize("source, weight", [
    ("a.jsonl:0.7", ("a.jsonl", 0.7)), ("a.jsonl", ("a.jsonl", 0.0)), ("c:/x:2", ("c:/x", 2.0)),
    ("c:/x", ("c:/x", 0.0)), ("dir/:.3", ("dir/", 0.3))])
def test_weights_of_sources(source: str, weight: tuple[str, float]) -> None:
    assert data.weight_of(source) == weight


# ------------------------------------------------------------------------------------------ videos


def write_video(folder: Path, kind: str, frames: int = 8, milliseconds: int = 250) -> Path:
    """Frames of rising grey."""
    pictures = [Image.new("RGB", (224, 112), (20 * i, 20 * i, 20 * i)) for i in range(frames)]
    path = folder / f"clip.{kind}"
    if kind == "folder":
        path.mkdir()
        for i, picture in enumerate(pictures):
            picture.save(path / f"{i:03}.png")
    else:
        more = {"lossless": True} if kind == "webp" else {}
        pictures[0].save(path, save_all=True, append_images=pictures[1:],
                         duration=milliseconds, **more)
    return path


@pytest.mark.parametrize("kind", ["gif", "webp", "folder"])
def test_videos(kind: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Two frames a second of an animation, all of a folder; a video has one place in the text."""
    path = write_video(tmp_path, kind)
    (tmp_path / "red.png").write_bytes(png("red"))
    record = conversation_of("<image>\nIs it in <video>?", "No.", video=path.name,
                             image="red.png")
    found = only_record(tmp_path, record)
    sample = encode(found, tokenizer)
    frames = 8 if kind == "folder" else 4
    # a frame has 128 to 768 visual tokens: 224 x 112 pixels become 448 x 224
    assert sample.grid_thw.tolist() == [[1, 4, 4], [frames, 16, 32]]
    text = tokenizer.decode(sample.input_ids.tolist(), skip_special_tokens=False)
    assert text.count("<|image_pad|>") == 4 and text.count("<|video_pad|>") == frames * 128
    greys = sample.patches(1).view(frames, -1).float().mean(1) / 20
    chosen = range(8) if kind == "folder" else (0, 2, 5, 7)
    assert greys.tolist() == pytest.approx(list(chosen), abs=0.1)
    with pytest.raises(ValueError, match="more places for videos"):
        only_record(tmp_path, {**record, "conversations": [
            {"from": "human", "value": "<video><image><video>"}, *record["conversations"][1:]]})


def test_videos_of_a_shard(tmp_path: Path, tokenizer: Tokenizer) -> None:
    clip = write_video(tmp_path, "webp").read_bytes()
    texts = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "Grey."}]
    about = {"texts": texts, "media": "video", "name": ["0_clip.webp"]}
    path = write_tar(tmp_path / "v.tar", ("video_0.0_clip.webp", clip),
                     ("video_0.json", json.dumps(about).encode()))
    (tmp_path / "v.json").write_text(json.dumps([{"video": "clip.webp", "messages": texts}]))
    same_samples([path, tmp_path / "v.json"], tokenizer)


@pytest.mark.parametrize("name, words", [
    ("none.gif", "none.gif cannot be read as a video"), ("none.mp4", "there is no video"),
    ("bad.gif", "bad.gif cannot be read as a video"), ("empty", "empty holds no frames")])
def test_bad_videos_are_named(name: str, words: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "bad.gif").write_bytes(b"GIF89a")
    (tmp_path / "empty").mkdir()
    record = only_record(tmp_path, conversation_of("<video>", "Yes.", video=name))
    with pytest.raises(ValueError, match=words):
        encode(record, tokenizer)


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_slow_animations_are_seen_whole(kind: str, tmp_path: Path) -> None:
    """Of two frames a second none is left out."""
    path = write_video(tmp_path, kind, frames=12, milliseconds=500)
    assert len(open_frames(Video(path))) == len(open_frames(Video(path.read_bytes()))) == 12


def test_films_are_not_packed() -> None:
    """A shard could hold their bytes, but nothing would read these."""
    blank = torch.zeros(3, dtype=torch.int64)
    sample = Sample(blank, blank, [Video(Path("a.mp4"))], blank[:0].view(0, 3), (1, 1), "r 1")
    with pytest.raises(ValueError, match="record r 1: a film or a folder of frames cannot be"):
        check_packable(sample, 10)
    check_packable(replace(sample, images=[Video(Path("a.webp"))]), 10)


def fail(item: int) -> None:
    raise OSError(errno.ENOSPC, f"no room for {item}")


def test_an_error_of_a_worker_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        refuse_in_one_sentence("data.py", lambda: list(in_order(fail, [4, 4, 4], 2, "made")))
    assert capsys.readouterr().err == "data.py: [Errno 28] no room for 4\n"


def test_content_that_is_no_video_is_not_printed(tmp_path: Path) -> None:
    shard = tmp_path / "v.tar"
    shard.write_bytes(b"no film")
    part = FilePart(str(shard), start=3, size=4)
    for video, name in ((b"no film", "a video"), (part, f"a video in {shard}")):
        with pytest.raises(ValueError) as raised:
            open_frames(Video(video))
        assert str(raised.value) == f"{name} cannot be read as a video: its format is unknown"


# ------------------------------------------------------- what other people's records say, and mean


def conversation_of(*turns: str, **more: object) -> dict:
    """A LLaVA record with these turns, by turns of the user and the model."""
    who = itertools.cycle(("human", "gpt"))
    return {"conversations": [{"from": next(who), "value": turn} for turn in turns], **more}


def only_record(folder: Path, record: object) -> dict:
    """A record as it is read from a file that holds nothing else."""
    (folder / "r.json").write_text(json.dumps([record]))
    return next(read_records(folder / "r.json"))


def seen_and_learnt(record: dict, tokenizer: Tokenizer) -> tuple[str, str]:
    sample = encode(record, tokenizer)
    ids, labels = sample.input_ids.tolist(), sample.labels.tolist()
    return (tokenizer.decode(ids, skip_special_tokens=False),
            tokenizer.decode([x for x in labels if x != IGNORE], skip_special_tokens=False))


@pytest.mark.parametrize("more, word", [
    ({"video": "a.mp4"}, "places for videos"), ({"videos": ["a.mp4"]}, "places for videos"),
    ({"audio": "a.wav"}, "audio"),
    ({"image_path": "a.png"}, "image_path"), ({"imagePaths": ["a.png"]}, "imagePaths"),
    ({"frames": ["1.png"]}, "frames"), ({"img": "a.png"}, "img"), ({"clip": "a.mp4"}, "clip"),
    ({"img_path": "a.png"}, "img_path"), ({"image_url": "http://x/a.png"}, "image_url"),
    ({"texts": [{"role": "user", "content": "x"}]}, "for shards"),
    ({"media": [{"path": "a"}]}, "media"),
    ({"system_prompt": "Be brief."}, "system_prompt"), ({"tools": [{"name": "f"}]}, "tools"),
    ({"weight": 0.5}, "weight"), ({"loss_mask": [0, 1]}, "loss_mask"), ({"chosen": {}, "rejected":
     {"value": "no"}}, "rejected"), ({"train_on_input": False}, "train_on_input"),
    ({"image": "a.png", "images": ["b.png"]}, "image and images"),
    ({"messages": [{"role": "user", "content": "x"}]}, "messages and conversations"),
    ({"system": ["Be brief."]}, "system is"),
])
def test_keys_that_would_change_what_is_learnt_are_refused(more: dict, word: str,
                                                           tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"r\.json\[0\].*{word}"):
        only_record(tmp_path, conversation_of("Hi", "Hello", **more))


@pytest.mark.parametrize("turn", [
    {"weight": 1}, {"loss": True}, {"train": 1}, {"loss_mask": 1}, {"mask": True},
    {"weight": 0.5}, {"sample_weight": 2},
    {"tool_calls": [{"name": "f"}]}, {"reasoning_content": "Hm."}, {"image": "a.png"},
    {"video": "a.mp4"}, {"masked": True, "trainable": False},
    {"value": "<video>\nWhat happens?"}, {"value": "<video>Describe it."},
    {"value": "What happens?\n<video>"}, {"value": "<video>"},
    {"value": [{"type": "video"}]}, {"value": [{"type": "image", "image": "a.png"}]},
    {"value": [{"type": "image_url", "image_url": {"url": "a.png"}}]}])
def test_keys_of_turns_that_would_change_it_are_refused(turn: dict, tmp_path: Path) -> None:
    record = conversation_of("Hi", "Hello")
    record["conversations"][0] |= turn
    with pytest.raises(ValueError, match=r"r\.json\[0\]: "):
        only_record(tmp_path, record)


@pytest.mark.parametrize("more", [
    {"source": "vg", "image_id": "12", "score": 1.5}, {"video": None, "audio": [], "tools": ""},
    {"width": 640, "height": 480}, {"image_width": 3, "image_source": "coco"}, {"system": ""},
    {"dataset": {"weight_decay": 1}}, {"model": "gpt", "lang": "en"}, {"num_images": 1},
    {"has_image": True, "has_video": False, "tools": "[]"}, {"reasoning_type": "spatial"},
    {"image_ids": ["1"], "image_sizes": [[3, 4]]},
    {"images": [], "image_url": "http://x", "image_name": "a"},
    {"is_train": True, "coordinate_system": "xyxy", "annotation_tool": "cvat"}])
def test_other_keys_are_none_of_our_business(more: dict, tmp_path: Path,
                                             tokenizer: Tokenizer) -> None:
    _, learnt = seen_and_learnt(only_record(tmp_path, conversation_of("Hi", "Hello", **more)),
                                tokenizer)
    assert learnt == f"Hello{IM_END}"


@pytest.mark.parametrize("system", ["Answer in French.", "  ", "Zeile\nzwei", "<|im_end|>"])
def test_a_system_prompt_in_a_field_of_its_own(system: str, tmp_path: Path,
                                               tokenizer: Tokenizer) -> None:
    """As a first turn with that role; not both."""
    record = conversation_of("Hi", "Salut", system=system)
    as_turn = conversation_of("Hi", "Salut")
    as_turn["conversations"].insert(0, {"from": "system", "value": system})
    found, expected = (encode(only_record(tmp_path, r), tokenizer) for r in (record, as_turn))
    assert torch.equal(found.input_ids, expected.input_ids)
    text, learnt = seen_and_learnt(only_record(tmp_path, record), tokenizer)
    assert text.startswith(f"{IM_START}system\n{system}{IM_END}") and learnt == f"Salut{IM_END}"
    with pytest.raises(ValueError, match=r"\[0\]: system is .*the only system prompt"):
        only_record(tmp_path, {**as_turn, "system": system})


@pytest.mark.parametrize("turns", [
    ("Draw it in SVG", "<svg><image></image></svg>"), ("What is <image> in HTML?", "A mistake."),
    ("<image>", "<image>"), ("How do I use the <video> tag?", "As <video src=x>."),
    ("Hi", "One\n<image>\ntwo"), ("HTML?", "<video>\n<source src=a.mp4>\n</video>"),
    ("<video>\n<source src=a.mp4>\n</video>\nWhat is wrong?", "<video>")])
def test_image_is_text_where_there_is_no_picture(turns: tuple[str, str], tmp_path: Path,
                                                 tokenizer: Tokenizer) -> None:
    text, learnt = seen_and_learnt(only_record(tmp_path, conversation_of(*turns)), tokenizer)
    assert learnt == turns[1] + IM_END and f"{IM_START}user\n{turns[0]}{IM_END}" in text


@pytest.mark.parametrize("answer", ["<image>", "Use <image> here", "a<image>b<image>c"])
def test_image_is_text_in_an_answer(answer: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "red.png").write_bytes(png("red"))
    record = only_record(tmp_path, conversation_of("<image>\nWhat?", answer, image="red.png"))
    text, learnt = seen_and_learnt(record, tokenizer)
    assert learnt == answer + IM_END and text.count("<|vision_start|>") == 1


MARKS = ("<|box_start|>", "<|box_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
         "<|quad_start|>", "<|quad_end|>")


@pytest.mark.parametrize("text", [
    "<|box_start|>(1,2)<|box_end|>", "<|object_ref_start|>a cat<|object_ref_end|> sits",
    "<|quad_start|><|quad_end|>", "in <loc_7><loc_77> and <loc_8>", "".join(MARKS)])
def test_marks_become_their_ids_in_records_alone(text: str, tokenizer: Tokenizer) -> None:
    """As with Qwen's own tokenizer: what it makes of the text, with special tokens recognised."""
    own = Tokenizer.from_str(tokenizer.to_str())
    own.add_special_tokens(["<loc_7>", "<loc_77>"])
    own.add_tokens(["<loc_8>"])
    own.encode_special_tokens = False
    qwens = own.encode(text).ids
    own.encode_special_tokens = True
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    ids, labels = chat_tokens(messages, own, [])
    assert [x for x in labels if x != IGNORE][:-1] == qwens
    assert own.decode(ids, skip_special_tokens=False).count(text) == 2
    prompt, _ = chat_tokens(messages[:1], own, [], generation_prompt=True)
    special = {own.token_to_id(mark) for mark in (*MARKS, "<loc_7>", "<loc_77>")}
    assert not special & set(prompt)  # somebody typed it
    assert text in own.decode(prompt, skip_special_tokens=False)


@pytest.mark.parametrize("name", sorted(STRUCTURE))
def test_tokens_that_delimit_are_never_typed(name: str, tokenizer: Tokenizer) -> None:
    """Neither in records nor in prompts, beside marks as well."""
    text = f"a{name}b<|box_start|>{name}"
    plain = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    typed = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
    number = tokenizer.token_to_id(name)
    for prompt in (False, True):
        with_it, without = (chat_tokens(m, tokenizer, [], generation_prompt=prompt)[0]
                            for m in (typed, plain))
        assert with_it.count(number) == without.count(number)
        assert text in tokenizer.decode(with_it, skip_special_tokens=False)


# ------------------------------------------------------------------------------------- odd shards


TEXTS = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Red."}]
ABOUT = json.dumps({"texts": TEXTS, "media": "image", "name": ["0_a.png"]}).encode()


@pytest.mark.parametrize("odd", ["._image_0.0_a.png", "._image_0.json", ".DS_Store", "x/.DS_Store",
                                 "__MACOSX/._image_0.json", ".Trashes/image_0.json", "README",
                                 "Thumbs.db", "x/desktop.ini", ".nv-meta/split.yaml"])
@pytest.mark.parametrize("folder", ["", "./", "v1.0/"])
def test_members_of_another_system_are_skipped(odd: str, folder: str, tmp_path: Path) -> None:
    """Wherever they stand, between the members of a sample too."""
    members = [(f"{folder}image_0.0_a.png", png("red")), (f"{folder}image_0.json", ABOUT)]
    for place in range(3):
        path = write_tar(tmp_path / f"{place}.tar", *members[:place], (odd, b"\0\5\x16\7"),
                         *members[place:])
        record, = read_records(path)
        assert list(map(content_of, record["images"])) == [png("red")]
        assert record["messages"] == TEXTS


@pytest.mark.parametrize("content, words", [
    (b"[1]", "its json is not an object"), (b'"text"', "its json is not an object"),
    (b"null", "its json is not an object"), (b"{", "its json is not valid"),
    (b"\xff\xfe", "its json is not valid"), (b"{}", "neither messages nor conversations"),
    (json.dumps({"texts": TEXTS, "name": "0_a.png"}).encode(), "name is '0_a.png'"),
    (json.dumps({"texts": TEXTS, "name": [3]}).encode(), r"name is \[3\]"),
    (json.dumps({"texts": TEXTS, "name": ["b.png"]}).encode(), "lacks its member 'b.png'"),
    (json.dumps({"texts": "hello", "name": []}).encode(), "texts is not a list of turns"),
    (json.dumps({"texts": ["hello"], "name": []}).encode(), "texts is not a list of turns"),
    (json.dumps({"texts": TEXTS, "media": "audio", "name": []}).encode(), "media are 'audio'"),
    (json.dumps({"texts": TEXTS, "image": "0_a.png"}).encode(), "the key 'image'"),
])
def test_an_odd_json_is_named_with_its_sample(content: bytes, words: str, tmp_path: Path) -> None:
    path = write_tar(tmp_path / "shard.tar",
                     ("image_0.0_a.png", png("red")), ("image_0.json", ABOUT),
                     ("image_1.0_a.png", png("red")), ("image_1.json", content))
    shard = read_records(path)
    next(shard)
    with pytest.raises(ValueError, match=rf"shard\.tar:image_1.*{words}"):
        next(shard)


def test_a_flag_given_twice_is_refused() -> None:
    for arguments in (["--data", "a", "--data", "b"], ["--data=a", "--data", "b"],
                      ["--fp8", "--steps", "3", "--fp8"]):
        with pytest.raises(ValueError, match=f"{arguments[0].split('=')[0]} is given 2 times"):
            parse_flags(arguments)
    assert parse_flags(["--data", "a", "--steps", "3"]).data == ("a",)


def test_turns_may_say_what_is_done_anyway(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """That answers are learnt, and questions not."""
    record = conversation_of("Hi", "Hello")
    for turn, learn in zip(record["conversations"], (0, 1)):
        turn |= {"weight": learn, "loss": bool(learn), "train": learn}
    _, learnt = seen_and_learnt(only_record(tmp_path, record), tokenizer)
    assert learnt == f"Hello{IM_END}"
    record["conversations"][1]["weight"] = 0
    with pytest.raises(ValueError, match="'weight'"):
        only_record(tmp_path, record)


def test_nested_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="deep.json is not valid JSON"):
        next(read_records(tmp_path / "deep.json"))


# -------------------------------------------------------------------------- commands of data.py


def run_data(*arguments: object) -> None:
    data.run(list(map(str, arguments)))


def test_balance_makes_rare_concepts_frequent(tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    """Of 1,000 captions 10 name an axolotl: all are kept among 100, as their lines stand."""
    lines = [json.dumps(conversation_of("<image>", "A cat." if i % 100 else "An Axolotl, red!",
                                        image="a.png", id=i)) for i in range(1000)]
    lines[7] = json.dumps(conversation_of("<image>", "Nothing known.", image="a.png", id=7))
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    (tmp_path / "concepts.txt").write_text("cat\naxolotl\n axolotl red \nzebra\n")
    arguments = ("balance", tmp_path / "captions.jsonl", "--concepts", tmp_path / "concepts.txt",
                 "--keep", 100, "--out")
    run_data(*arguments, tmp_path / "chosen.jsonl")
    chosen = (tmp_path / "chosen.jsonl").read_text().splitlines()
    assert len(chosen) == 100 and set(chosen) <= set(lines) and lines[7] not in chosen
    assert sum("Axolotl" in line for line in chosen) >= 9
    assert [lines.index(line) for line in chosen] == sorted(lines.index(line) for line in chosen)
    run_data(*arguments, tmp_path / "again.jsonl")
    assert (tmp_path / "again.jsonl").read_text().splitlines() == chosen
    assert "3 of 4 concepts" in capsys.readouterr().out
    with pytest.raises(OSError, match="chosen.jsonl"):  # nothing is overwritten
        run_data(*arguments, tmp_path / "chosen.jsonl")


def test_inspect_names_what_is_rejected(tmp_path: Path,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    """By kind and one by one, with pictures decoded on request; and the contact sheet."""
    write_records(tmp_path, 20)
    records = json.loads((tmp_path / "records.json").read_text())
    whole = next(record for record in records if record["images"])
    cut = tmp_path / whole["images"][0]
    cut.write_bytes(cut.read_bytes()[:-30])
    records.append({"conversations": [{"from": "human", "value": "Hi"}]})
    (tmp_path / "records.json").write_text(json.dumps(records))
    run_data("inspect", tmp_path / "records.json", "--all", "--decode", "--show", 2, "--workers", 0,
             "--length", 600, "--sheet", tmp_path / "sheet.png")
    said = capsys.readouterr().out
    assert "19 samples of 1 files, 2 records rejected, 0 files damaged" in said
    assert "rejected: 1 no answer to learn" in said and f"{cut} cannot be read" in said
    assert re.search(r"an epoch: 19 samples in \d+ rows of 600 tokens, \d\d\.\d\d% full", said)
    assert re.search(r"FLOPs of a step of 8 rows of the 4b on 8 ranks: .* \d+\.\d% of", said)
    assert said.count("<|im_start|>assistant\n[yes") == 2
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width == 8 * 168
