"""Records -> packed rows: chat template, labels, packing, and the default data set.

In: records (conversations with pictures) from JSON, from WebDataset tar shards, or drawn on the
fly.  Out: `Row`, one packed row of tokens and one of patches, ready for `model.py`.
Called by `parallel.py`, `train.py`, `sample.py` and `convert.py`; calls `vision.py` and
`assets/scenes.py`.

The idea.  A conversation is text between special tokens (Qwen's ChatML):

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n<|vision_start|><|image_pad|>...<|vision_end|>What is this?<|im_end|>\\n
    <|im_start|>assistant\\nA cat.<|im_end|>

It is never written out as one string.  It is kept as stretches of plain text and special tokens;
each stretch is tokenised once, an answer apart from its header.  So labels need no search (answers
and the <|im_end|> behind them are learnt, all else is -100), and "<|im_end|>" typed by somebody
stays text.  A picture stands for P / 4 tokens <|image_pad|>.  Its place in a record's text is
`<image>`, in a user's turn of a record that has pictures; anywhere else `<image>` is text.

Samples of any length are laid end to end in rows of at most `seq_length` tokens.  There is no
padding: `cu_seqlens` keeps samples apart.

Shapes: T tokens in a packed row, S samples, P patches, I pictures.

Run `python data.py inspect` (default data) or `python data.py inspect --data PATH`: prints records,
their tokens with what is learnt, how full rows are; --save DIR writes the pictures.
"""

import argparse
import json
import random
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby, islice, takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from assets.scenes import drawn_records
from vision import (MALFORMED, MAX_PIXELS, MERGE, MIN_PIXELS, Picture, image_to_patches,
                    open_image, patch_grid)

SYSTEM_PROMPT = "You are a helpful assistant."
IGNORE = -100  # label of a token that is not learnt
SPECIAL_TOKENS = (  # in the order of their ids in the released vocabulary, from 151643 on
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)
# Those that structure a conversation.  Written in a text by somebody, their names stay text.
STRUCTURE = {name for name in SPECIAL_TOKENS if "_ref_" not in name and "box_" not in name
             and "quad_" not in name}
# how Qwen cuts text before byte-pair merging: contractions, words, single digits, symbols, spaces
WORD_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SYSTEM_FILES = {"Thumbs.db", "desktop.ini"}  # that Windows leaves in folders
ASSETS = Path(__file__).parent / "assets"

# {"id", "messages": [{"role", "content"}], "images": [picture, path or file content], "category"}
Record = dict

# Keys of other people's records that are used.  Other keys, such as the name of a source, are
# ignored, unless a word in them says that they would change what is learnt: the record is refused.
RECORD_KEYS = {"id", "image", "images", "messages", "conversations", "system"}
SHARD_KEYS = {"id", "texts", "media", "name", "system"}
PICTURE_KEYS = {"image", "images", "name"}
TURN_KEYS = {"role", "content", "from", "value"}
MEDIA_WORDS = {"image", "img", "picture", "pic", "photo", "video", "clip", "movie", "frame",
               "audio", "speech", "sound", "media"}
# a key that ends so tells of a medium, or of something else, but is none
ABOUT = {"id", "index", "type", "format", "size", "width", "height", "w", "h", "wh", "ratio",
         "resolution", "quality", "source", "license", "hash", "md5", "count", "caption",
         "category"}
LEARNING_WORDS = {"system", "weight", "loss", "mask", "masked", "train", "trainable", "learn",
                  "tool", "function", "reasoning", "thinking", "chosen", "rejected"}
# where other tools put a video or a sound: in front of a turn, or at its end on a line of its own
OTHER_PLACES = re.compile(
    r"\A<(video|audio)>(?!\s*<(source|track|/))|\n<(video|audio)>\Z")  # no HTML


# ---------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with Qwen's pre-tokenisation and special tokens, learnt from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.encode_special_tokens = True  # a special token's name inside a text stays text
    return tokenizer


# ------------------------------------------------------------------------------------ chat template


def split_content(message: dict, pictures: bool) -> list[dict]:
    """A message's content as items {"type": "text"|"image"|"video", ...}.

    pictures: `<image>` in a user's text is the place of a picture.

    >>> split_content({"role": "user", "content": "<image>\\nWhat is this?"}, True)
    [{'type': 'image'}, {'type': 'text', 'text': '\\nWhat is this?'}]
    """
    content = message["content"]
    if isinstance(content, list):
        return content
    texts = [content]
    if pictures and message["role"] == "user":
        texts = content.split("<image>")
    items: list[dict] = []
    for i, text in enumerate(texts):
        items += [{"type": "image"}] if i else []
        items += [{"type": "text", "text": text}] if text else []
    return items


def check_messages(messages: list[dict]) -> None:
    """Raise ValueError for what is no conversation, naming the offending value."""
    if not isinstance(messages, list):
        raise ValueError(f"the messages are {messages!r}, not a list")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{message!r} is not a message with role and content")
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"a message has the role {message['role']!r}, "
                             "not system, user or assistant")
        content = message["content"]
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(items, list):
            raise ValueError(f"a message has the content {content!r}, not text or a list of items")
        for item in items:
            kind = item.get("type") if isinstance(item, dict) else None
            text = item.get("text") if kind == "text" else ""
            if kind not in ("text", "image", "video") or not isinstance(text, str):
                raise ValueError(f"{item!r} is not an item of type text, image or video")
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"the text {text!r} is not valid Unicode") from None


def render(messages: list[dict], visual_tokens: list[int],
           generation_prompt: bool = False) -> Iterator[tuple[str, int, bool]]:
    """The published template as pieces (text or special token, repeats, learnt).

    A piece with repeats = 0 is plain text.  Raises ValueError for a malformed message or a number
    of pictures that differs from the number of places for them.
    """
    check_messages(messages)
    counts = iter(visual_tokens)
    if messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]
    for i, message in enumerate(messages):
        if i:
            yield "\n", 0, False
        yield "<|im_start|>", 1, False
        yield f"{message['role']}\n", 0, False
        learnt = message["role"] == "assistant"
        for item in split_content(message, pictures=bool(visual_tokens)):
            if item["type"] == "text":
                yield item["text"], 0, learnt
                continue
            count = next(counts, None)
            if count is None:
                raise ValueError(f"the text has more places for pictures than the "
                                 f"{len(visual_tokens)} pictures there are")
            yield "<|vision_start|>", 1, False
            yield f"<|{item['type']}_pad|>", count, False
            yield "<|vision_end|>", 1, False
        yield "<|im_end|>", 1, learnt
    if generation_prompt:
        yield "\n", 0, False
        yield "<|im_start|>", 1, False
        yield "assistant\n", 0, False
    if next(counts, None) is not None:
        raise ValueError(f"the text has fewer places for pictures than the "
                         f"{len(visual_tokens)} pictures there are")


def mark_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    """Matches the name of any special token that is not of STRUCTURE; the longest one wins."""
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    marks = sorted(special - STRUCTURE, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, marks)) or r"(?!)")  # no marks: matches nothing


def chat_tokens(messages: list[dict], tokenizer: Tokenizer, visual_tokens: list[int],
                generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and their labels (the id itself where learnt, else -100).

    messages: [{"role": "system"|"user"|"assistant", "content": str or list of items}].
    visual_tokens: tokens of each picture, in order.
    generation_prompt: end with the header of an answer instead of after one.

    Special tokens in the text: in a training record those that mark things (<|box_start|>,
    <|object_ref_start|>, <|quad_start|> and what a user has added to the tokenizer) become their
    ids, as with Qwen's own tools.  In a prompt they stay text, for anybody may have typed it.
    Those of STRUCTURE, which delimit messages and pictures, stay text in both.
    """
    ids: list[int] = []
    labels: list[int] = []
    text, text_learnt = "", False
    marks = mark_pattern(tokenizer)

    def add(new: list[int], learnt: bool) -> None:
        ids.extend(new)
        labels.extend(new if learnt else [IGNORE] * len(new))

    def flush() -> None:
        nonlocal text
        done = 0
        for mark in [] if generation_prompt else marks.finditer(text):
            add(tokenizer.encode(text[done:mark.start()], add_special_tokens=False).ids,
                text_learnt)
            add([tokenizer.token_to_id(mark[0])], text_learnt)
            done = mark.end()
        add(tokenizer.encode(text[done:], add_special_tokens=False).ids, text_learnt)
        text = ""

    for piece, repeats, learnt in render(messages, visual_tokens, generation_prompt):
        if repeats or learnt != text_learnt:
            flush()
        if repeats:
            add([tokenizer.token_to_id(piece)] * repeats, learnt)
        else:
            text, text_learnt = text + piece, learnt
    flush()
    return ids, labels


# ---------------------------------------------------------------------------------- encode and pack


@dataclass(eq=False)  # compared by identity: a waiting sample is taken once
class Sample:
    """One conversation, ready to be packed; its pictures are measured but not decoded."""

    input_ids: Tensor  # (L,) int64
    labels: Tensor  # (L,) the token itself where learnt, else -100
    images: list[Picture]
    grid_thw: Tensor  # (I, 3) int64, what the pictures will be cut into
    pixels: tuple[int, int]  # least and largest area of a picture
    name: str  # of the record, for messages

    def patches(self, i: int) -> Tensor:
        """Decode and cut picture i, (P, 588).  Raises ValueError naming the record."""
        try:
            patches, grid = image_to_patches(open_image(self.images[i]), *self.pixels)
            if list(grid) != self.grid_thw[i].tolist():
                raise ValueError(f"picture {i + 1} is not of the size that its header says")
            return patches
        except MALFORMED as error:
            raise ValueError(f"record {self.name}: {error}") from error


@dataclass
class Row:
    """One packed row."""

    input_ids: Tensor  # (T,) int64
    targets: Tensor  # (T,) the token that follows, where learnt, else -100
    cu_seqlens: Tensor  # (S + 1,) int64
    patches: Tensor | None  # (P, 588) float32, None without pictures or where not cut
    grid_thw: Tensor | None  # (I, 3) int64
    names: list[str]  # of the records

    @property
    def labels(self) -> int:
        """Tokens that are learnt."""
        return int((self.targets >= 0).sum())

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor | None]:
        """The arguments of `model(...)`; positions follow from cu_seqlens."""
        tensors = {name: getattr(self, name) for name in
                   ("input_ids", "cu_seqlens", "patches", "grid_thw")}
        return {k: None if v is None else v.to(device, non_blocking=True)
                for k, v in tensors.items()}


def encode(record: Record, tokenizer: Tokenizer, min_pixels: int = MIN_PIXELS,
           max_pixels: int = MAX_PIXELS, generation_prompt: bool = False) -> Sample:
    """Tokenise a record and measure its pictures; pixel limits are on height * width.

    Raises ValueError naming the record where it is malformed or, in training, teaches nothing.
    """
    name = str(record.get("id", "?"))
    try:
        grids = [patch_grid(image, min_pixels, max_pixels) for image in record["images"]]
        counts = [rows * columns // MERGE**2 for _, rows, columns in grids]
        ids, labels = chat_tokens(record["messages"], tokenizer, counts, generation_prompt)
        if not generation_prompt and all(label == IGNORE for label in labels):
            raise ValueError("it has no answer to learn")
    except ValueError as error:
        raise ValueError(f"record {name}: {error}") from error
    grid_thw = torch.tensor(grids, dtype=torch.int64).view(-1, 3)
    return Sample(torch.tensor(ids), torch.tensor(labels), record["images"], grid_thw,
                  (min_pixels, max_pixels), name)


def lay_out(samples: list[Sample], cut: bool = True) -> Row:
    """Lay samples end to end.  The label of a token becomes the target of the one before it.

    Pictures are decoded and cut only with `cut`.
    """
    lengths = torch.tensor([len(s.input_ids) for s in samples])
    grids = torch.cat([s.grid_thw for s in samples])
    return Row(
        input_ids=torch.cat([s.input_ids for s in samples]),
        targets=torch.cat([F.pad(s.labels[1:], (0, 1), value=IGNORE) for s in samples]),
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)),
        patches=torch.cat([s.patches(i) for s in samples for i in range(len(s.images))])
        if cut and len(grids) else None,
        grid_thw=grids if len(grids) else None,
        names=[s.name for s in samples])


def plan_rows(samples: Iterator[Sample], seq_length: int,
              pool_size: int = 64) -> Iterator[tuple[list[Sample], int]]:
    """Rows of at most `seq_length` tokens: the oldest waiting sample, then always the longest fit.

    With 64 samples to choose from, rows are full to a few tokens and none waits for ever.
    Yields a row's samples and how many were skipped since the last, being longer than a row; after
    1,000 in a row a ValueError says so.
    """
    pool: list[Sample] = []
    skipped = 0

    def take_row() -> list[Sample]:
        row, room = [], seq_length
        choice: Sample | None = pool[0]
        while choice is not None:
            pool.remove(choice)
            row.append(choice)
            room -= len(choice.input_ids)
            fitting = [s for s in pool if len(s.input_ids) <= room]
            choice = max(fitting, key=lambda s: len(s.input_ids), default=None)
        return row

    waiting = 0
    for sample in samples:
        if len(sample.input_ids) > seq_length:
            skipped += 1
            if skipped == 1000:
                raise ValueError(f"1,000 samples in a row are longer than a row of {seq_length} "
                                 f"tokens (the last has {len(sample.input_ids)}): raise "
                                 "--seq-length or lower --max-pixels")
            continue
        pool.append(sample)
        waiting += len(sample.input_ids)
        if len(pool) >= pool_size and waiting >= 2 * seq_length:
            row = take_row()
            waiting -= sum(len(s.input_ids) for s in row)
            yield row, skipped
            skipped = 0
    while pool:
        yield take_row(), skipped
        skipped = 0


# ------------------------------------------------------------------------------ dealing to ranks


def deal(work: list[float], ranks: int) -> list[list[int]]:
    """Deal items to ranks so that all finish together: in rounds, one item to each rank.

    A round takes the heaviest items left, so what is worked on at the same time is of like weight;
    within it the heaviest goes to the rank that has had least.  Returns each rank's items.
    """
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    had = [0.0] * ranks
    order = sorted(range(len(work)), key=lambda item: -work[item])
    for start in range(0, len(order), ranks):
        by_need = sorted(range(ranks), key=lambda rank: had[rank])
        for rank, item in zip(by_need, order[start:start + ranks]):
            dealt[rank].append(item)
            had[rank] += work[item]
    return dealt


# ---------------------------------------------------------------------- records from people's disks


def refuse_unused(raw: dict, known: set[str], place: str) -> None:
    """Raise ValueError for a key that is not used, though it may change what is learnt.

    An empty value says nothing and passes; a number or a flag is no medium.
    """
    for key, value in raw.items():
        if key in known or value in (None, "", [], {}, "[]", "{}"):
            continue
        # "videoPaths" and "video_paths" have the words video and path
        words = [word.lower() if word.lower() in LEARNING_WORDS else word.lower().removesuffix("s")
                 for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", key)] or [""]
        # where a picture is named, another name tells of it
        if words[-1] in ABOUT or words[-1] in ("name", "url") and (raw.keys() & PICTURE_KEYS):
            continue
        media = MEDIA_WORDS & {*words} and not isinstance(value, (bool, int, float))
        learning = words[0] in LEARNING_WORDS or words[-1] in ("weight", "loss", "mask")
        if media or learning:
            raise ValueError(f"{place}: the key {key!r} is not supported, but would change what "
                             "is learnt; remove it or the record")


def check_turn(turn: dict, place: str) -> None:
    """Raise ValueError for what a turn of a record says and training would not heed."""
    role = turn.get("role", turn.get("from"))
    # to learn answers and nothing else is what is done anyway
    as_done = {key for key in ("weight", "loss", "train", "trainable")
               if turn.get(key) == (role in ("assistant", "gpt"))}
    refuse_unused(turn, TURN_KEYS | as_done, place)
    content = turn["content"] if "content" in turn else turn.get("value")
    items = content if isinstance(content, list) else [{"type": "text", "text": content}]
    for item in items:
        if not isinstance(item, dict):
            continue  # check_messages refuses it
        if more := [key for key in item if key not in ("type", "text") and item[key]]:
            raise ValueError(f"{place}: an item of a turn has {more[0]!r}, only type and text are "
                             "supported: pictures are named in images")
        text = item.get("text") if role in ("user", "human") else None
        if item.get("type") == "video" or isinstance(text, str) and OTHER_PLACES.search(text):
            raise ValueError(f"{place}: there is a video or a sound in a turn, only pictures are "
                             "supported")


def normalize_record(raw: dict, images: list[str | Path | bytes], place: str) -> Record:
    """A record from any of the field's schemas: `messages`, LLaVA's `conversations`, or `texts`.

    A system prompt may stand in a field of its own, `system`.
    place: file and number or key, for messages.  Raises ValueError with it.
    """
    named = [name for name in ("messages", "conversations", "texts") if raw.get(name)]
    if len(named) != 1:
        raise ValueError(f"{place} has {' and '.join(named)}: which is meant?" if named else
                         f"{place} has neither messages nor conversations")
    turns = raw[named[0]]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"{place}: {named[0]} is not a list of turns")
    for turn in turns:
        check_turn(turn, place)
    if named == ["conversations"]:
        roles = {"human": "user", "gpt": "assistant"}
        try:
            turns = [{"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]}
                     for turn in turns]
        except (KeyError, TypeError):
            raise ValueError(f"{place}: conversations is not a list of from and value") from None
    if system := raw.get("system"):
        if not isinstance(system, str) or turns[0].get("role") == "system":
            raise ValueError(f"{place}: system is {system!r}, it must be the text of the only "
                             "system prompt")
        turns = [{"role": "system", "content": system}, *turns]
    return {"id": raw.get("id", place), "messages": turns, "images": images}


def read_json(path: Path) -> list[Record]:
    """Records of a .json list or a .jsonl file; picture paths are relative to the file."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = ([json.loads(line) for line in text.split("\n") if line.strip()]
                 if path.suffix == ".jsonl" else json.loads(text))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(lines, list) or not all(isinstance(raw, dict) for raw in lines):
        raise ValueError(f"{path} is not a list of records")
    records = []
    for i, raw in enumerate(lines):
        place = f"{path}[{i}]"
        refuse_unused(raw, RECORD_KEYS, place)
        if raw.get("texts"):
            raise ValueError(f"{place} has texts, which are for shards: name them messages")
        if raw.get("image") and raw.get("images"):
            raise ValueError(f"{place} has image and images: which is meant?")
        names = raw.get("images") or raw.get("image") or []
        names = [names] if isinstance(names, str) else names
        if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
            raise ValueError(f"{place}: {names!r} is not a picture's path or a list of them")
        records.append(normalize_record(raw, [path.parent / n for n in names], place))
    return records


def sample_of_shard(fields: dict[str, bytes], place: str) -> Record:
    """The record that a shard's members with one key are; fields: their contents by name.

    Raises ValueError with the place.
    """
    try:
        raw = json.loads(fields["json"])
    except KeyError:
        raise ValueError(f"{place} lacks its member 'json'") from None
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{place}: its json is not valid: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{place}: its json is not an object")
    refuse_unused(raw, SHARD_KEYS, place)
    if raw.get("media") not in (None, "image", "text"):
        raise ValueError(f"{place}: its media are {raw['media']!r}, only image and text are "
                         "supported")
    names = raw.get("name") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{place}: name is {names!r}, not a list of members")
    for name in names:
        if name not in fields:
            raise ValueError(f"{place} lacks its member {name!r}")
    return normalize_record(raw, [fields[name] for name in names], place)


def read_tar(path: Path) -> Iterator[Record]:
    """Records of a WebDataset shard in the quick start's unpacked layout, one after another.

    Neighbouring members that share a key (the name up to its first dot, folders aside) are one
    sample: a `json` with `texts` and the `name`s of its media, and the media themselves.  Members
    without a key, as webdataset has it, are skipped: macOS packs files named `._*` and .DS_Store.
    """
    def members() -> Iterator[tuple[str, str, bytes]]:
        with tarfile.open(path) as tar:
            for member in tar:
                folder, slash, file = member.name.rpartition("/")
                key, dot, field = file.partition(".")
                hidden = any(part.startswith(".") and part != "." for part in folder.split("/"))
                if member.isfile() and key and dot and not hidden and file not in SYSTEM_FILES:
                    yield folder + slash + key, field, tar.extractfile(member).read()

    try:
        for key, group in groupby(members(), key=lambda member: member[0]):
            fields = {field: content for _, field, content in group}
            yield sample_of_shard(fields, f"{path}:{key}")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no shard of samples: {error}") from error


# ------------------------------------------------------------------------------- streams of records


def file_records(path: Path, seed: int) -> Iterator[Record]:
    """Endless records of a file: JSON in a new random order each epoch, a shard in its own."""
    if path.suffix not in (".json", ".jsonl", ".tar"):
        raise ValueError(f"{path} is neither .json, .jsonl nor .tar nor captions, questions, mixed")
    if not path.is_file():
        raise ValueError(f"there is no data file {path}")
    rng = random.Random(seed)
    listed = None if path.suffix == ".tar" else read_json(path)
    while True:
        empty = True
        for record in read_tar(path) if listed is None else rng.sample(listed, len(listed)):
            empty = False
            yield record
        if empty:
            raise ValueError(f"{path} holds no records")


def record_stream(data: str, seed: int) -> Iterator[Record]:
    """Endless training records: `captions`, `questions`, `mixed`, or the path of a file."""
    if data in ("captions", "questions", "mixed"):
        return drawn_records(data, seed)
    return file_records(Path(data), seed)


@dataclass
class Step:
    """What a rank trains on in one optimizer step, and what all ranks do together."""

    rows: list[Any]  # of this rank: Row, or a rank's part of one
    sums: dict[str, float]  # over all ranks: tokens, labels, samples, images, skipped, costs
    balance: float  # mean over largest cost of what the ranks do at the same time


class PackedRows(torch.utils.data.IterableDataset):
    """Endless steps of `rows` packed rows, for a DataLoader with batch_size=None.

    Every rank reads every record, but decodes only the pictures it trains on.  So the rows of a
    step are the same for any number of ranks, and can be dealt by what they cost.  All ranks must
    have the same files.
    rank, ranks: this one's number among those that train on different rows, and how many there are.
    cost: what a row (without its patches) costs, by name; rows are dealt by the first cost.
    cut: makes what the rank trains on of a row's samples; `lay_out`, or `parallel.share_row`.
    """

    def __init__(self, data: str, tokenizer: Tokenizer, seq_length: int, seed: int,
                 max_pixels: int = MAX_PIXELS, rows: int = 1, rank: int = 0, ranks: int = 1,
                 cost: Callable[[Row], dict[str, float]] | None = None,
                 cut: Callable[[list[Sample]], Any] = lay_out) -> None:
        self.data, self.tokenizer = data, tokenizer
        self.seq_length, self.seed, self.max_pixels, self.rows = seq_length, seed, max_pixels, rows
        self.rank, self.ranks, self.cut = rank, ranks, cut
        self.cost = cost or (lambda row: {"length": float(len(row.input_ids))})

    def __iter__(self) -> Iterator[Step]:
        worker = torch.utils.data.get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        mine = islice(record_stream(self.data, self.seed), first, None, step)
        samples = (encode(record, self.tokenizer, max_pixels=self.max_pixels) for record in mine)
        stream = plan_rows(samples, self.seq_length)
        while rows := list(islice(stream, self.rows)):
            yield self.step_of([row for row, _ in rows], sum(skipped for _, skipped in rows))

    def step_of(self, rows: list[list[Sample]], skipped: int) -> Step:
        """This rank's part of a step: its rows cut, all rows counted."""
        measured = [lay_out(row, cut=False) for row in rows]
        costs = [self.cost(row) for row in measured]
        work = [next(iter(cost.values())) for cost in costs]
        dealt = deal(work, self.ranks)
        # the ranks do their first rows at the same time, then their second ones, ...
        slowest = [max(work[i] for i in together) for together in zip(*dealt)]
        sums = {"tokens": sum(len(row.input_ids) for row in measured),
                "labels": sum(row.labels for row in measured),
                "samples": sum(len(row) for row in rows),
                "images": sum(len(sample.images) for row in rows for sample in row),
                "skipped": skipped}
        for name in costs[0]:
            sums[name] = sum(cost[name] for cost in costs)
        return Step(rows=[self.cut(rows[i]) for i in dealt[self.rank]], sums=sums,
                    balance=sum(work) / self.ranks / sum(slowest))


# ----------------------------------------------------------------------------------- python data.py


def drawn_texts(seed: int) -> Iterator[str]:
    """Text of 8,000 default records, template included: what the tiny tokenizer learns from."""
    for kind in ("captions", "questions"):
        for record in islice(drawn_records(kind, seed), 4000):
            pieces = render(record["messages"], [1] * len(record["images"]))
            yield from (piece for piece, repeats, _ in pieces if not repeats)


def inspect(data: str, count: int, seq_length: int, save: str) -> None:
    """Print records with what is learnt in brackets, then how full packed rows are."""
    tokenizer = train_tokenizer(drawn_texts(0), 1024)
    for number, record in enumerate(islice(record_stream(data, 0), count)):
        sample = encode(record, tokenizer)
        print(f"\n{number}: {len(sample.input_ids)} tokens, {int((sample.labels >= 0).sum())} "
              f"learnt, pictures of {[grid[1:] for grid in sample.grid_thw.tolist()]} patches")
        learnt = False
        for i, label in zip(sample.input_ids.tolist(), sample.labels.tolist()):
            if (label != IGNORE) != learnt:
                print("]" if learnt else "[", end="")
                learnt = not learnt
            text = tokenizer.id_to_token(i)
            print(text if text in SPECIAL_TOKENS else tokenizer.decode([i]), end="")
        print("]" if learnt else "")
        for i, image in enumerate(record["images"] if save else []):
            Path(save).mkdir(parents=True, exist_ok=True)
            open_image(image).save(Path(save) / f"{number}-{i}.png")
    step = next(iter(PackedRows(data, tokenizer, seq_length, seed=0, rows=50)))
    print(f"\n{len(step.rows)} rows of {seq_length}: {step.sums['samples']} samples, "
          f"{step.sums['tokens'] / (len(step.rows) * seq_length):.1%} full")


def flag_parser(description: str, arguments: list[str] = ()) -> argparse.ArgumentParser:
    """A command-line parser that raises ValueError, one sentence, instead of printing its usage.

    arguments: refused if a flag is among them twice, of which argparse would use the last.
    """
    def refuse(message: str) -> None:
        raise ValueError(message)

    flags = [word.partition("=")[0] for word in takewhile(lambda word: word != "--", arguments)
             if word.startswith("--")]
    for flag, times in Counter(flags).items():
        if times > 1:
            refuse(f"{flag} is given {times} times: once is meant")
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = refuse
    return parser


def refuse_in_one_sentence(script: str, work: Callable[[], None]) -> None:
    """Do a command's work; what a user caused becomes one line on standard error, exit code 2."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def choose_device(name: str) -> torch.device:
    """The device of that name, or a GPU if there is one.  Raises ValueError if it is not there."""
    if not name:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name} here: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of that name, or what products are best computed in on the device."""
    return getattr(torch, name or ("float32" if device.type == "cpu" else "bfloat16"))


def run() -> None:
    parser = flag_parser("Look at training data.", sys.argv[1:])
    parser.add_argument("command", choices=["inspect"])
    parser.add_argument("--data", default="questions", help="captions, questions or a data file")
    parser.add_argument("--count", type=int, default=4, help="records to print")
    parser.add_argument("--seq-length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--save", default="", help="directory for the records' pictures")
    flags = parser.parse_args()
    if flags.count < 0 or flags.seq_length < 1:
        raise ValueError("--count must not be negative, --seq-length must be positive")
    inspect(flags.data, flags.count, flags.seq_length, flags.save)


if __name__ == "__main__":
    refuse_in_one_sentence("data.py", run)
