"""Records -> samples -> plan -> packed rows: readers, chat template, labels, packing.

In: records, which are conversations with pictures, in JSON, WebDataset shards or parquet, or drawn
by `assets/scenes.py`.  Out: `Row`, one packed row of tokens and patches for `model.py`.
Called by `parallel.py`, `train.py`, `sample.py`, `convert.py` and `assets/scenes.py`; calls
`vision.py`, and inside functions `assets/scenes.py`, `model.py` and `convert.py`.

The idea.  A conversation is text between special tokens (Qwen's ChatML):

    <|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n
    <|im_start|>user\\n<|vision_start|><|image_pad|>...<|vision_end|>What is this?<|im_end|>\\n
    <|im_start|>assistant\\nA cat.<|im_end|>

The code never builds this string.  It makes a sequence of pieces, which are texts and special
tokens, and tokenises each text by itself.  So labels need no search: an answer and the <|im_end|>
behind it are learnt, and every other token has the label -100.  And if somebody types "<|im_end|>",
it stays text.

A picture of P patches becomes P / 4 tokens <|image_pad|>.  If a record has pictures, `<image>` in
a user's turn is the place of a picture.  Everywhere else `<image>` is text.

Samples of any length lie end to end in rows of at most `seq_length` tokens, without padding.
`cu_seqlens` says where each sample starts, and attention stays inside a sample.

The plan.  An index has a line for each sample: where its record is, its tokens, labels, patches.
To make it, texts are tokenised and the headers of pictures are read, once.  From then on a sample
is a number, a row is a list of numbers, and a step is a list of rows:

    samples      0   1   2   3   4   5   6   7          a random order for each epoch
    tokens     300 620 180 700 400 310 610 190
    rows       0 3 | 1 4 | 2 6 7 | 5                    of 1,024 tokens: see `pack_rows`
    steps      rows 0 and 1, then rows 2 and 3          dealt to the ranks by their FLOPs

Data, seed and the length of rows decide the plan; ranks and workers do not.  So the position of a
run is the number of its step, and a rank reads only the records of its own rows.  Drawn data have
no index: an epoch is drawn, and its rows are chosen, when it is needed.

A bad record (a missing picture, no answer) is rejected while the index is made.  A picture that
cannot be decoded is found only in training: its sample stays in the row, but is not learnt.

The helpers for command lines, which other files share, stand last in this file.

Shapes: T tokens in a packed row, L tokens in a sample, S samples, P patches, I pictures.

Run `python data.py inspect SOURCE...`: prints counts, lengths, how full rows are and what is
rejected; `--show 4` prints samples with what is learnt in brackets.  `python data.py pack SOURCE...
--out DIR` writes shards of full rows with their index.  `python data.py balance` chooses captions
so that rare concepts are not rare.
"""

import argparse
import glob
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache, partial
from inspect import getsource
from itertools import chain, compress, count, groupby, repeat, takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tokenizers import Tokenizer
from torch import Tensor

from vision import (ANIMATIONS, MALFORMED, MAX_PIXELS, MIN_PIXELS, PATCH, PATCH_NUMBERS, UNREADABLE,
                    FilePart, Picture, Video, content_of, cut_patches, normalize_patches,
                    open_frames, open_image, patch_grid, to_rgb, visual_tokens)

SYSTEM_PROMPT = "You are a helpful assistant."
IGNORE = -100  # label of a token that is not learnt
SPECIAL_TOKENS = (  # in the order of their ids in the released vocabulary, from 151643 on
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)
# The tokens that delimit messages and pictures.  Their names inside a text always stay text.
STRUCTURE = {name for name in SPECIAL_TOKENS if not re.search("_ref_|box_|quad_", name)}
SYSTEM_FILES = {"Thumbs.db", "desktop.ini"}  # Windows leaves these files in folders

# {"id", "messages": [{"role", "content"}], "images": [picture, path or file content], "category"}
Record = dict
Fields = dict[str, FilePart]  # of a sample in a shard: the members by the ends of their names
Media = dict[str, list]  # what a record names: pictures under "image", Videos under "video"
Pixels = tuple[int, int]  # least and largest height * width of a picture
PIXELS = (MIN_PIXELS, MAX_PIXELS)

# The keys that this code uses of a record or turn in a file.  It ignores other keys, such as the
# name of a source, unless the words of a key say that the key would change what is learnt.  Then it
# refuses the record.
RECORD_KEYS = {"id", "image", "images", "video", "videos", "messages", "conversations", "system"}
SHARD_KEYS = {"id", "texts", "media", "name", "system"}
PICTURE_KEYS = {"image", "images", "name"}
TURN_KEYS = {"role", "content", "from", "value"}
MEDIA_WORDS = set("image img picture pic photo video clip movie frame audio speech sound "
                  "media".split())
# A key that ends with one of these words only describes a picture (image_width).
ABOUT = set("id index type format size width height w h wh ratio resolution quality source license "
            "hash md5 count caption category".split())
# A key that begins with one of these words changes what is learnt (train_on_input).
LEARNING_WORDS = set("system weight loss mask masked train trainable learn tool function reasoning "
                     "thinking chosen rejected".split())
# Other tools put <video> or <audio> in front of a turn, or at its end on a line of its own.  With a
# source, a track or a closing tag behind it, the turn is about HTML.
OTHER_MEDIA = re.compile(r"\A<(video|audio)>(?!\s*<(source|track|/))|\n<(video|audio)>\Z")
BAD_RECORD = (*UNREADABLE, ArithmeticError, MemoryError)  # what readers and decoders raise
DRAWN = ("captions", "questions", "mixed")  # data drawn by assets/scenes.py
CHUNK = 1000  # records that a process measures at once
EPOCH_NUMBERS = 2**20  # numbers for the drawn samples of an epoch
STREAM = 2**15  # samples that are packed one after another, beside other streams
SHARD = 4096  # samples of a shard that it writes, to the end of a row


# ------------------------------------------------------------------------------------ chat template


def split_content(message: dict, places: str = "") -> list[dict]:
    """A message's content as items {"type": "text"|"image"|"video", ...}.

    places: a pattern of what is the place of a picture or video in a user's text; "": nothing is.
    Raises ValueError with the offending value if this is no message.

    >>> split_content({"role": "user", "content": "<image>\\nWhat is this?"}, "<image>")
    [{'type': 'image'}, {'type': 'text', 'text': '\\nWhat is this?'}]
    """
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        raise ValueError(f"{message!r} is not a message with role and content")
    role, items = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"a message has the role {role!r}, not system, user or assistant")
    if isinstance(items, str):
        # a split at a group keeps what it matches: text, place, text, place, ..., text
        parts = re.split(f"({places})", items) if places and role == "user" else [items]
        items = [{"type": part[1:-1]} if i % 2 else {"type": "text", "text": part}
                 for i, part in enumerate(parts) if part]
    if not isinstance(items, list):
        raise ValueError(f"a message has the content {items!r}, not text or a list of items")
    for item in items:
        check_item(item)
    return items


def check_item(item: Any) -> None:
    """Raise ValueError if this is not an item of a message's content."""
    item_type = item.get("type") if isinstance(item, dict) else None
    if item_type in ("image", "video"):
        return
    if item_type != "text" or not isinstance(item.get("text"), str):
        raise ValueError(f"{item!r} is not an item of type text, image or video")
    try:
        item["text"].encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can write as \ud800
        raise ValueError(f"the text {item['text']!r} is not valid Unicode") from None


def check_places(places: int, given: int, kind: str) -> None:
    """Raise ValueError if a text has not one place for each picture or video that is given."""
    if places != given:
        word = "more" if places > given else "fewer"
        raise ValueError(f"the text has {word} places for {kind}s than the {given} {kind}s there "
                         "are")


def render(messages: list[dict], visual_counts: list[int],
           generation_prompt: bool = False) -> Iterator[tuple[str, int, bool]]:
    """The published template as pieces (text or name of a special token, repeats, learnt).

    A piece with repeats = 0 is plain text.  Raises ValueError for a malformed message, and if the
    number of pictures differs from the number of places for them.
    """
    if not isinstance(messages, list):
        raise ValueError(f"the messages are {messages!r}, not a list")
    pattern = "<image>" if visual_counts else ""
    turns = [(split_content(message, pattern), message["role"]) for message in messages]
    if turns and turns[0][1] != "system":
        turns = [([{"type": "text", "text": SYSTEM_PROMPT}], "system"), *turns]
    counts = iter(visual_counts)
    places = 0

    for i, (items, role) in enumerate(turns):
        # <|im_start|> role \n content <|im_end|>, and \n between two messages
        if i > 0:
            yield "\n", 0, False
        yield "<|im_start|>", 1, False
        yield f"{role}\n", 0, False
        learnt = role == "assistant"

        for item in items:
            if item["type"] == "text":
                yield item["text"], 0, learnt
                continue
            places += 1
            yield "<|vision_start|>", 1, False
            yield f"<|{item['type']}_pad|>", next(counts, 1), False
            yield "<|vision_end|>", 1, False

        # the end of an answer is learnt too: this token stops generation
        yield "<|im_end|>", 1, learnt

    if generation_prompt:
        yield "\n", 0, False
        yield "<|im_start|>", 1, False
        yield "assistant\n", 0, False
    check_places(places, len(visual_counts), "picture")


def mark_pattern(tokenizer: Tokenizer) -> str:
    """A pattern of marks, the special tokens whose names in a text become their ids; "": of none.

    Tokens of STRUCTURE are no marks.
    """
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    # the longer name first: <loc_77> before a mark <loc_7
    return "|".join(map(re.escape, sorted(special - STRUCTURE, key=len, reverse=True)))


def text_tokens(text: str, tokenizer: Tokenizer, marks: str) -> list[int]:
    """Token ids of plain text; a name that `marks` matches becomes the id of its token."""
    ids = []
    # a split at a group keeps what it matches: text, mark, text, mark, ..., text
    for i, part in enumerate(re.split(f"({marks})", text) if marks else [text]):
        if i % 2 == 1:
            ids.append(tokenizer.token_to_id(part))
        else:
            ids += tokenizer.encode(part, add_special_tokens=False).ids
    return ids


def chat_tokens(messages: list[dict], tokenizer: Tokenizer, visual_counts: list[int],
                generation_prompt: bool = False) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and their labels (the id itself where learnt, else -100).

    messages: [{"role": "system"|"user"|"assistant", "content": str or list of items}].
    visual_counts: number of visual tokens of each picture, in order.
    generation_prompt: end with the header of an answer instead of after an answer.

    Names of special tokens in a text: in a training record, marks (<|box_start|>,
    <|object_ref_start|>, <|quad_start|> and the tokens that a user has added to the tokenizer)
    become their ids, as with Qwen's own tools.  In a prompt they stay text, because anybody may
    have typed it.  The tokens of STRUCTURE, which delimit messages and pictures, always stay text.
    """
    ids, labels = [], []
    marks = "" if generation_prompt else mark_pattern(tokenizer)
    pieces = render(messages, visual_counts, generation_prompt)

    # Neighbouring texts are tokenised as one text, for example "user\n" and the question behind it.
    # "assistant\n" and the answer stay apart, because only the answer is learnt.
    for (repeats, learnt), group in groupby(pieces, key=lambda piece: piece[1:]):
        texts = [text for text, _, _ in group]
        if repeats == 0:
            tokens = text_tokens("".join(texts), tokenizer, marks)
        else:
            tokens = [i for name in texts for i in [tokenizer.token_to_id(name)] * repeats]
        ids += tokens
        labels += tokens if learnt else [IGNORE] * len(tokens)
    return ids, labels


# ---------------------------------------------------------------------------------- encode and pack


@contextmanager
def named(words: str, errors: tuple[type[Exception], ...] = (ValueError,)) -> Iterator[None]:
    """Raise these errors as ValueError, with words in front that say what the error is about."""
    try:
        yield
    except errors as error:
        # a MemoryError has no text
        raise ValueError(f"{words}: {str(error) or type(error).__name__}") from error


@dataclass
class Sample:
    """One conversation, ready to be packed; its pictures are measured but not decoded."""

    input_ids: Tensor  # (L,) int64
    labels: Tensor  # (L,) the token itself where learnt, else -100
    images: list[Picture | Video]  # in the order of their places
    grid_thw: Tensor  # (I, 3) int64, the patches that each picture will be cut into
    pixels: Pixels  # least and largest area of a picture
    name: str  # of the record, for messages
    number: int = 0  # in the data; names need not be unique
    lost: str = ""  # why nothing is learnt from it, although the plan counts on it

    def patches(self, i: int) -> Tensor:
        """Decode and cut picture i, (P, 588) uint8.  Raises ValueError with the record's name."""
        with named(f"record {self.name}", MALFORMED):
            patches, grid = cut_patches(self.images[i], *self.pixels)
            if list(grid) != self.grid_thw[i].tolist():
                raise ValueError(f"picture {i + 1} is not of the size that its header says")
            return patches


@dataclass
class Row:
    """One packed row."""

    input_ids: Tensor  # (T,) int64
    targets: Tensor  # (T,) the token that follows, where learnt, else -100
    cu_seqlens: Tensor  # (S + 1,) int64
    patches: Tensor | None  # (P, 588) uint8, None without pictures or where not cut
    grid_thw: Tensor | None  # (I, 3) int64
    names: list[str]  # of the records
    numbers: list[int]  # of the samples in the data
    lost: dict[int, str] = field(default_factory=dict)  # samples that are not learnt, and why

    @property
    def labels(self) -> int:
        """Number of tokens that are learnt."""
        return int((self.targets >= 0).sum())

    def forget(self, segments: Iterable[int]) -> None:
        """Learn nothing from these samples; their tokens stay in the row."""
        for i in segments:
            self.targets[self.cu_seqlens[i]:self.cu_seqlens[i + 1]] = IGNORE

    def pin_memory(self) -> "Row":
        """For the DataLoader: copies of pinned memory to a GPU do not wait."""
        if self.patches is not None:
            self.patches = self.patches.pin_memory()
        return self

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor | None]:
        """The arguments of `model(...)`; positions follow from cu_seqlens."""
        inputs = {}
        for name in ("input_ids", "cu_seqlens", "patches", "grid_thw"):
            tensor = getattr(self, name)
            inputs[name] = None if tensor is None else tensor.to(device, non_blocking=True)
        if self.patches is not None:
            # patches travel as bytes, a quarter of their size in float32
            inputs["patches"] = normalize_patches(inputs["patches"])
        return inputs


def encode(record: Record, tokenizer: Tokenizer, pixels: Pixels = PIXELS,
           generation_prompt: bool = False, number: int = 0) -> Sample:
    """Tokenise a record and measure its pictures; pixels: least and largest height * width.

    number: of the sample in the data.  Raises ValueError, with the record's name, if the record is
    malformed or, in training, has nothing to learn.
    """
    # half a surrogate, which JSON may hold, could not be printed
    name = str(record.get("id", "?")).encode(errors="backslashreplace").decode()
    with named(f"record {name}"):
        # the size of a picture is in its file's header; pixels are not read here
        grids = [patch_grid(image, *pixels) for image in record["images"]]
        grid_thw = torch.tensor(grids, dtype=torch.int64).view(-1, 3)  # (I, 3)
        counts = visual_tokens(grid_thw).tolist()
        ids, labels = chat_tokens(record["messages"], tokenizer, counts, generation_prompt)
        if not generation_prompt and labels.count(IGNORE) == len(labels):
            raise ValueError("it has no answer to learn")
    # NumPy reads a list several times as fast as PyTorch
    input_ids, labels = torch.from_numpy(np.array([ids, labels], dtype=np.int64))  # (L,) each
    return Sample(input_ids, labels, record["images"], grid_thw, pixels, name, number)


def cut_pictures(samples: list[Sample],
                 own: Sequence[bool] | None = None) -> tuple[Tensor | None, dict[int, str]]:
    """Patches of the pictures of a row, end to end, and the samples that are lost, with the reason.

    own: which pictures to cut; default all.  In the place of a picture that cannot be decoded is
    black, and its sample is lost.
    """
    patches = []
    lost = {i: sample.lost for i, sample in enumerate(samples) if sample.lost}
    pictures = [(i, j) for i, sample in enumerate(samples) for j in range(len(sample.images))]
    for i, j in compress(pictures, own or repeat(True)):
        try:
            patches.append(samples[i].patches(j))
        except ValueError as error:
            lost[i] = str(error)
            size = int(samples[i].grid_thw[j].prod())
            patches.append(torch.zeros(size, PATCH_NUMBERS, dtype=torch.uint8))
    # a patch has 588 bytes, a visual token 2.4 kB, a row of 8,192 visual tokens 19 MB
    return torch.cat(patches) if patches else None, lost


def lay_out(samples: list[Sample], cut: bool = True) -> Row:
    """Lay samples end to end; with `cut`, also decode their pictures and cut them into patches."""
    # The label of a token is the target of the token before it:
    #     input_ids  <|im_start|>  assistant  \n    A    cat         <|im_end|>
    #     labels     -100          -100       -100  A    cat         <|im_end|>
    #     targets    -100          -100       A     cat  <|im_end|>  -100
    targets = [F.pad(s.labels[1:], (0, 1), value=IGNORE) for s in samples]
    lengths = torch.tensor([len(s.input_ids) for s in samples])  # (S,)
    grid_thw = torch.cat([s.grid_thw for s in samples])
    row = Row(
        input_ids=torch.cat([s.input_ids for s in samples]), targets=torch.cat(targets),
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)), patches=None,
        grid_thw=grid_thw if len(grid_thw) else None, names=[s.name for s in samples],
        numbers=[s.number for s in samples])
    if cut:
        row.patches, row.lost = cut_pictures(samples)
        row.forget(row.lost)
    return row


# ------------------------------------------------------------------------------- records from files


def is_list_of(values: Any, entry_type: type) -> bool:
    """Whether `values` is a list and all its entries are of this type."""
    return isinstance(values, list) and all(isinstance(value, entry_type) for value in values)


def words_of(key: str) -> list[str]:
    """Words of a key, lower case and singular: "videoPaths" and "video_paths" give video, path."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", key)] or [""]
    # "loss" is singular already
    return [word if word in LEARNING_WORDS else word.removesuffix("s") for word in words]


def refuse_unused(raw: dict, used: set[str]) -> None:
    """Raise ValueError for a key of a record or turn that is unused, but would change learning."""
    for key, value in raw.items():
        # an empty value has no meaning
        if key in used or value in (None, "", [], {}, "[]", "{}"):
            continue
        words = words_of(key)
        # beside the key of a picture, image_name and image_url only describe it
        about = ABOUT | {"name", "url"} if raw.keys() & PICTURE_KEYS else ABOUT
        if words[-1] in about:
            continue

        # a number or a flag holds no picture: num_images, has_video
        media = MEDIA_WORDS & {*words} and not isinstance(value, (int, float))
        learning = words[0] in LEARNING_WORDS or words[-1] in ("weight", "loss", "mask")
        if media or learning:
            raise ValueError(f"the key {key!r} is not supported, but would change what is learnt; "
                             "remove it or the record")


def turns_of(raw: dict) -> list[dict]:
    """The turns of a record, with `role` and `content`, after a check of their keys."""
    schemas = [key for key in ("messages", "conversations", "texts") if raw.get(key)]
    if len(schemas) != 1:
        found = " and ".join(schemas) or "neither messages nor conversations"
        raise ValueError(f"it has {found}: it must have one of them (texts is for shards)")
    if not is_list_of(raw[schemas[0]], dict):
        raise ValueError(f"{schemas[0]} is not a list of turns")

    turns = []
    for turn in raw[schemas[0]]:
        # LLaVA has other names for the same keys and roles; upstream's shards have either
        role = turn.get("role") or turn.get("from")
        role = {"human": "user", "gpt": "assistant"}.get(str(role), role)
        # A flag may say what this code does anyway: answers are learnt, other turns are not.  In
        # JSON the flag is true or 1, and in Python both are equal to True.
        learnt = role == "assistant"
        flags = {key for key in ("weight", "loss", "train", "trainable") if turn.get(key) == learnt}
        refuse_unused(turn, TURN_KEYS | flags)
        # parquet gives the keys that a turn has not as None
        content = turn.get("value") if turn.get("content") is None else turn["content"]
        turns.append({"role": role, "content": content})
    return turns


def open_media(kind: str, files: list, folder: Path) -> list[Picture | Video]:
    """The pictures or videos that a record names, by their paths or with their bytes."""
    media = []
    for file in files:
        # Hugging Face stores a picture as its bytes, or as a path, or both
        if isinstance(file, dict):
            file = file.get("bytes") or file.get("path")
        if isinstance(file, str):
            file = folder / file
        elif not isinstance(file, bytes):
            raise ValueError(f"{file!r} is not the path of {kind}s or a list of them")
        media.append(Video(file) if kind == "video" else file)
    return media


def media_of_entry(raw: dict, folder: Path) -> Media:
    """The files that a record names in `image` or `images`, `video` or `videos`."""
    refuse_unused(raw, RECORD_KEYS)
    media = {}
    for kind in ("image", "video"):
        if raw.get(kind) and raw.get(f"{kind}s"):
            raise ValueError(f"it has {kind} and {kind}s: which is meant?")
        # either key may hold one path or a list of paths
        files = raw.get(f"{kind}s") or raw.get(kind) or []
        media[kind] = open_media(kind, files if isinstance(files, list) else [files], folder)
    return media


def media_of_members(raw: dict, fields: Fields) -> Media:
    """The members of a shard that a record has in `name`: its pictures or, as `media` says, videos.

    They have the order of the places for pictures; in the shard they may have another order.
    """
    refuse_unused(raw, SHARD_KEYS)
    kind, names = raw.get("media"), raw.get("name") or []
    if kind not in (None, "image", "video", "text"):
        raise ValueError(f"its media are {kind!r}, only image, video and text are supported")
    if not is_list_of(names, str):
        raise ValueError(f"name is {names!r}, not a list of members")
    parts = [member_of(fields, name) for name in names]
    if kind == "video":
        return {"image": [], "video": [Video(part) for part in parts]}
    return {"image": parts, "video": []}


def refuse_other_media(text: str, videos: list[Video]) -> None:
    """Raise ValueError if a user's text has a video, but the record has none, or a sound."""
    other = OTHER_MEDIA.search(text)
    if other and ("audio" in other[0] or not videos):
        raise ValueError("there is a video or a sound in a turn, but the record names none that is "
                         "supported")


def place_media(turns: list[dict], media: Media, folder: Path | None) -> list[Picture | Video]:
    """The pictures and videos in the order of their places, which `render` will find in the turns.

    folder: where an item may name its own file, {"type": "image", "image": "a.png"}.  Raises
    ValueError for a place too many or too few, and for content that training would ignore.
    """
    waiting = {kind: iter(files) for kind, files in media.items()}
    pattern = "|".join(f"<{kind}>" for kind, files in media.items() if files)
    places: Counter[str] = Counter()
    placed = []
    for turn in turns:
        items = split_content(turn, pattern)
        for item in items:
            kind = item["type"]
            if kind == "text":
                # in an answer, <video> is text
                if turn["role"] == "user":
                    refuse_other_media(item["text"], media["video"])
            elif folder and item.get(kind):
                placed += open_media(kind, [item.pop(kind)], folder)
            else:
                placed.append(next(waiting[kind], None))
                places[kind] += 1
            unused = [key for key in item if key not in ("type", "text") and item[key]]
            if unused:
                raise ValueError(f"an item of a turn has {unused[0]!r}, only type and text are "
                                 "supported: pictures are named in images")
        if media["video"]:
            turn["content"] = items  # in a text, `render` finds pictures alone
    for kind, files in media.items():
        check_places(places[kind], len(files), kind)
    return placed


def normalize_record(raw: Any, origin: str, files: Path | Fields) -> Record:
    """A record from any of the field's schemas: `messages`, LLaVA's `conversations`, or `texts`.

    The key `system` may hold a system prompt.  origin: file and number or key of the record.
    files: the folder of the files that it names, or the members of its shard.  Raises ValueError
    with the record's origin.
    """
    with named(origin):
        if not isinstance(raw, dict):
            raise ValueError("it is not an object")
        if isinstance(files, dict):
            media = media_of_members(raw, files)
        else:
            media = media_of_entry(raw, files)
        turns = turns_of(raw)
        system = raw.get("system")
        if system:
            if not isinstance(system, str) or turns[0]["role"] == "system":
                raise ValueError(f"system is {system!r}, it must be the text of the only system "
                                 "prompt")
            turns = [{"role": "system", "content": system}, *turns]
        # only items of `messages` may name files, and not those of shards
        own_files = isinstance(files, Path) and raw.get("messages")
        images = place_media(turns, media, files if own_files else None)
    name = raw.get("id")
    return {"id": origin if name is None else name, "messages": turns, "images": images}


# ------------------------------------------------------------------------------------------ readers

# Each kind of file has two functions.  The first gives the places of its records: first byte, byte
# behind the last, and number of the record in the file.  In parquet a place is: group of lines,
# line of the group, number.  The second reads a place; `images` is the directory of the pictures,
# by default the file's own.  It gives, by their numbers, what `normalize_record` makes the records
# from: several if a shard is packed.
Place = tuple[int, int, int]
Found = dict[int, tuple[Any, str, Path | Fields]]  # number -> arguments of normalize_record


def load_json(content: bytes, origin: str | Path) -> Any:
    """The value of a JSON text, which may begin with the mark of Windows.  Else ValueError."""
    with named(f"{origin} is not valid JSON", (ValueError, RecursionError)):
        return json.loads(content.decode("utf-8-sig"))


def json_places(path: Path) -> Iterator[Place]:
    """Places of the lines of a .jsonl file, or of the entries of a .json list."""
    if path.suffix == ".jsonl":
        end = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file):
                end += len(line)
                if line.strip():
                    yield end - len(line), end, number
        return
    content = path.read_bytes()
    entries = load_json(content, path)
    if not isinstance(entries, list):
        raise ValueError(f"{path} is not a list of records")
    # The list is valid: read its entries again, to see where each ends.  In Latin-1 each byte is
    # a character, so places in the text are places in the file.
    text = content.decode("latin-1")
    separator, decoder = re.compile(r"[ \t\r\n,]*"), json.JSONDecoder()
    end = text.index("[") + 1
    for number in range(len(entries)):
        start = separator.match(text, end).end()
        _, end = decoder.raw_decode(text, start)
        yield start, end, number


def json_records(path: Path, place: Place, images: str) -> Found:
    """The record of a line or entry."""
    start, end, number = place
    origin = f"{path}[{number}]"
    raw = load_json(content_of(FilePart(str(path), start, end - start)), origin)
    return {number: (raw, origin, Path(images or path.parent))}


# what tarfile raises for a damaged header, such as one that claims a size of 1 TB
BAD_SHARD = (tarfile.TarError, EOFError, ValueError, OverflowError, MemoryError)


def key_of(member: tarfile.TarInfo) -> tuple[str, str]:
    """Key and field of a member: a/b.0_x.png has key a/b, field 0_x.png; "" of what is no data."""
    if member.size < 0:  # tarfile would read the same member for ever
        raise tarfile.ReadError(f"{member.name} has {member.size} bytes")
    folder, slash, name = member.name.rpartition("/")
    stem, _, field_name = name.partition(".")
    # systems add files: macOS's ._* and .DS_Store have an empty stem
    hidden = not stem or name in SYSTEM_FILES or re.search(r"(^|/)\.[^./]", folder)
    # links, devices and sparse files have no content of their own
    if hidden or not field_name or not member.isfile() or member.issparse():
        return "", ""
    return folder + slash + stem, field_name


def shard_samples(path: Path, start: int = 0, end: int = 0) -> Iterator[list[tuple]]:
    """The samples of a WebDataset shard: neighbouring members (key, field, member) of one key.

    start, end: bytes of the only sample that is wanted.  Raises ValueError where the shard is
    damaged, after the samples before.
    """
    sample: list[tuple] = []
    with named(f"{path} cannot be read as a shard", BAD_SHARD), open(path, "rb") as file:
        file.seek(start)
        tar = tarfile.TarFile(fileobj=file, errors="backslashreplace")  # of names not in UTF-8
        for member in tar:
            key, field_name = key_of(member)
            if sample and key and key != sample[0][0]:
                yield sample
                sample = []
            if key:
                sample.append((key, field_name, member))
            if end and tar.offset >= end:  # the next header is not read
                break
        # tarfile takes a broken header for the end; a tar ends with zeros, 1 to 11 kB
        file.seek(tar.offset)
        rest = file.read(2**14)
    if sample:
        yield sample
    if not end and (any(rest) or not 1024 <= len(rest) <= 11 * 1024):
        raise ValueError(f"{path} is damaged from byte {tar.offset:,} on, or cut there")


def shard_places(path: Path) -> Iterator[Place]:
    """Places of the samples of a shard."""
    for number, sample in enumerate(shard_samples(path)):
        last = sample[-1][2]
        # a member ends with zeros to a multiple of 512 bytes
        yield sample[0][2].offset, last.offset_data + -(-last.size // 512) * 512, number


def shard_records(path: Path, place: Place, images: str) -> Found:
    """The records of the neighbouring members with the same key.

    Upstream's layouts: `texts` with the `name`s of the pictures; a list of turns, beside one
    picture; and packed, lists of `images`, `prompts` and `captions`, an entry for each record.
    """
    sample = next(shard_samples(path, *place[:2]), None)
    if sample is None:
        return {}  # the file has changed
    # the picture of a member is not read here: its place in the file is kept
    fields: Fields = {}
    origin = f"{path}:{sample[0][0]}"
    with named(origin):
        for _, name, member in sample:
            if name in fields:
                raise ValueError(f"it has its member {name!r} twice")
            fields[name] = FilePart(str(path), member.offset_data, member.size)
        raw = load_json(content_of(member_of(fields, "json")), "its json")
        if raw and is_list_of(raw, dict):
            raw = {"texts": raw, "name": [name for name in fields if name != "json"]}
        if not isinstance(raw, dict):
            raise ValueError("its json is not an object")
        if "captions" not in raw:
            return {0: (raw, origin, fields)}
        return {i: (entry, f"{origin}[{i}]", fields)
                for i, entry in enumerate(unpacked(raw, fields))}


def member_of(fields: Fields, name: str) -> FilePart:
    if name not in fields:
        raise ValueError(f"it lacks its member {name!r}")
    return fields[name]


def exchange(prompt: Any, answer: Any) -> list[dict]:
    """A turn of the user and its answer."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def unpacked(raw: dict, fields: Fields) -> Iterator[dict]:
    """The entries of a packed record as unpacked records; each may have several turns."""
    columns = [raw.get("images"), raw.get("prompts", raw.get("prompt")), raw["captions"]]
    if not all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        raise ValueError("images, prompts and captions are not lists of one length")
    numbers = count()  # of the pictures of all entries
    for entry in zip(*columns):
        # without turns, an entry is one picture, one prompt and one caption
        names, prompts, captions = (part if isinstance(part, list) else [part] for part in entry)
        # the list may have the names before packing; then the members are numbered
        members = []
        for name, number in zip(names, numbers):
            possible = (str(name), f"img{number}.jpg", f"img{number:03}.jpg")
            members.append(next((member for member in possible if member in fields), str(name)))
        if not prompts or len(prompts) != len(captions) or not is_list_of(prompts, str):
            raise ValueError(f"its prompts {prompts!r} are not texts, one for each caption")
        if members and "<image>" not in "".join(prompts):
            prompts = ["<image>" * len(members) + prompts[0], *prompts[1:]]
        yield {"texts": [*chain.from_iterable(map(exchange, prompts, captions))], "name": members}


@lru_cache(maxsize=4)
def parquet_group(path: Path, group: int) -> Any:
    """A group of lines, which parquet can only read whole."""
    return parquet_file(path).read_row_group(group)


def parquet_file(path: Path) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError(f"{path} needs a package that is not here: pip install pyarrow") from None
    with named(f"{path} is not valid parquet", (ArrowException, OSError)):
        return parquet.ParquetFile(path)


def parquet_places(path: Path) -> Iterator[Place]:
    metadata = parquet_file(path).metadata
    number = 0
    for group in range(metadata.num_row_groups):
        for line in range(metadata.row_group(group).num_rows):
            yield group, line, number
            number += 1


def parquet_records(path: Path, place: Place, images: str) -> Found:
    """The record of a line: `conversations` or `messages`, or a `caption`."""
    group, line, number = place
    entry, = parquet_group(path, group).slice(line, 1).to_pylist()
    raw = {key: value for key, value in entry.items() if value is not None}
    caption = raw.pop("caption", None)
    if not raw.get("conversations") and not raw.get("messages"):
        raw["messages"] = exchange("<image>", caption)
    return {number: (raw, f"{path}[{number}]", Path(images or path.parent))}


# file name's end -> the two functions
READERS = {".json": (json_places, json_records), ".jsonl": (json_places, json_records),
           ".tar": (shard_places, shard_records), ".parquet": (parquet_places, parquet_records)}


def read_records(path: Path, images: str = "") -> Iterator[Record]:
    """All records of a file, in order.  Raises ValueError at the first that cannot be read."""
    places, records = READERS[path.suffix]
    for place in places(path):
        for found in records(path, place, images).values():
            yield normalize_record(*found)


def expand_braces(pattern: str) -> list[str]:
    """The names that a pattern with braces stands for: a{0..2}, a{000..104}, a{x,y}."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    words = braces[1].split(",")
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", braces[1])
    if ends:
        first, last = sorted(ends.groups(), key=int)
        words = [f"{i:0{len(first)}}" for i in range(int(first), int(last) + 1)]
    return [name for word in words for name in expand_braces(pattern.replace(braces[0], word, 1))]


def source_files(*sources: str) -> list[Path]:
    """The files of sources, each a file, a directory, a glob or a list in braces."""
    files: list[Path] = []
    for name in chain.from_iterable(map(expand_braces, sources)):
        path = Path(name)
        # a name may contain the characters of a glob
        found = [path] if path.exists() else [*map(Path, glob.glob(name, recursive=True))]
        if path.is_dir():
            # of packed shards; these hold no records
            index = {"index.json", "rejects.jsonl"}
            found = [file for file in path.rglob("*") if file.suffix in READERS
                     and not (file.name in index and (file.parent / "index.npy").is_file())]
        if not found:
            raise ValueError(f"there is no data file {name}")
        files += sorted(found)
    for file in files:
        if file.suffix not in READERS:
            raise ValueError(f"{file} is neither {', '.join(READERS)} nor {', '.join(DRAWN)}")
    return files


def weight_of(source: str) -> tuple[str, float]:
    """A source and its weight: a.jsonl:0.7 -> a.jsonl, 0.7; 0 without one."""
    match = re.fullmatch(r"(.*):(\d+\.?\d*|\.\d+)", source)
    if match is None:
        return source, 0.0
    path, weight = match.groups()
    if not float(weight):
        raise ValueError(f"{source}: a weight must be positive")
    return path, float(weight)


# -------------------------------------------------------------------------------------------- index

# What the plan knows of a sample, all sums over its tokens and frames: with L tokens of which the
# attention sees pairs of query and key, L (L + 1) / 2, and frames of p patches each, sum p and p^2.
LOADS = ("tokens", "pairs", "labels", "patches", "frame_pairs", "images")
# Of an index: first the place, then the row of packed data, else -1.
COLUMNS = ("file", "start", "end", "part", "row", *LOADS)
# Kinds of rejected records, for counting: words of the sentence that says why.
REASONS = ("cannot be read as a picture", "cannot be read as a video", "there is no picture",
           "too narrow", "no answer to learn", "places for", "not valid JSON", "lacks its member",
           "is not supported", "not text")


def reason_of(sentence: str) -> str:
    """The kind of an error, for counting."""
    return next((reason for reason in REASONS if reason in sentence), "other")


def listed(items: list[str], others: str) -> str:
    """The first eight items, for a sentence; others: says where the others are."""
    text = "; ".join(items[:8])
    if len(items) > 8:
        text += f"; and {len(items) - 8} more: {others}"
    return text


def load_of(sample: Sample) -> list[int]:
    """The numbers of LOADS of a sample."""
    tokens = len(sample.input_ids)
    grids = sample.grid_thw.tolist()
    labels = int((sample.labels.numpy()[1:] >= 0).sum())  # no token comes before the first
    return [tokens, tokens * (tokens + 1) // 2, labels, sum(t * h * w for t, h, w in grids),
            sum(t * (h * w)**2 for t, h, w in grids), len(grids)]


def facts_of(path: Path, digest: bool = False) -> dict[str, Any]:
    """What tells a file from what it is when it is damaged: its size and, if wanted, its digest."""
    facts = {"size": path.stat().st_size}
    if digest:
        with open(path, "rb") as file:
            facts["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return facts


@dataclass
class Index:
    """Where the samples of a data set are and how long they are; nothing of their content."""

    files: list[dict]  # "file", "size" in bytes; of packed data also sums and "sha256"
    table: np.ndarray  # (samples, 11) int64, see COLUMNS
    settings: dict  # what the numbers depend on: tokenizer, pixel limits, directory of pictures
    rejects: list[dict] = field(default_factory=list)  # "file", "part", "reason" of bad records
    damaged: list[str] = field(default_factory=list)  # a sentence for each damaged file

    def column(self, name: str) -> np.ndarray:
        """A column of the table, (samples,)."""
        return self.table[:, COLUMNS.index(name)]

    def record(self, number: int) -> Record:
        """Read record `number`.  Raises ValueError if it cannot be read."""
        file, start, end, part = self.table[number, :4].tolist()
        path = Path(self.files[file]["file"])
        found = READERS[path.suffix][1](path, (start, end, part), self.settings["images"])
        if part not in found:
            raise ValueError(f"{path} has no record {part} at byte {start}: it has changed")
        return normalize_record(*found[part])

    def save(self, folder: Path) -> None:
        """Write index.npy, rejects.jsonl and, last, index.json."""
        np.save(folder / "index.npy", self.table)
        with open(folder / "rejects.jsonl", "w") as file:
            file.writelines(json.dumps(reject) + "\n" for reject in self.rejects)
        head = {"columns": COLUMNS, "samples": len(self.table), "settings": self.settings,
                "files": self.files}
        # its name says that the index is whole
        unfinished = folder / "index.json.partial"
        unfinished.write_text(json.dumps(head, indent=1))
        unfinished.replace(folder / "index.json")

    @classmethod
    def load(cls, folder: Path) -> "Index":
        """Read an index, with its rejected records."""
        bad = (ValueError, KeyError, TypeError, EOFError, FileNotFoundError)
        with named(f"{folder} holds no valid index", bad):
            head = json.loads((folder / "index.json").read_text())
            table = np.load(folder / "index.npy", mmap_mode="r")
            rejects = (folder / "rejects.jsonl").read_text().splitlines()
            files, settings = head["files"], head["settings"]
            if table.shape != (head["samples"], len(COLUMNS)) or head["columns"] != list(COLUMNS):
                raise ValueError("index.npy is not what index.json says")
            for entry in files:
                # of packed data relative to the folder
                entry["file"] = os.path.abspath(folder / entry["file"])
        return cls(files, table, settings, list(map(json.loads, rejects)))

    def check(self, skip_bad: bool) -> None:
        """Raise ValueError for records and files that cannot be used, unless these are skipped."""
        bad = [*self.damaged, *(reject["reason"] for reject in self.rejects)]
        if bad and not skip_bad:
            others = "`python data.py inspect --all` lists all"
            raise ValueError(f"{len(bad)} records or files of the data cannot be used (--skip-bad "
                             f"goes on without them): {listed(bad, others)}")

    def leave_out_damaged(self, digests: bool = False) -> None:
        """Note files that are missing or not as they were, and leave out their samples.

        digests: read the files of packed data, and do not only compare their sizes.
        """
        damaged = {}
        for number, entry in enumerate(self.files):
            path = Path(entry["file"])
            if not path.is_file():
                damaged[number] = f"{path} is missing"
                continue
            facts = facts_of(path, digests)
            if facts["size"] != entry["size"]:
                damaged[number] = (f"{path} has {facts['size']:,} bytes, not the "
                                   f"{entry['size']:,} it had")
            elif not facts.items() <= entry.items():
                damaged[number] = f"{path} has another sha256 than when it was written"
        if damaged:
            # a line of the table is a sample, and its first number is that of its file
            self.table = self.table[~np.isin(self.table[:, 0], list(damaged))]
        self.damaged += damaged.values()


def in_order(function: Callable, items: Sequence, workers: int, what: str,
             kept: str | Path = os.devnull, about: Any = None) -> Iterator[Any]:
    """function(item) of all items, made by worker processes; with a bar that says what they are.

    kept: a file that keeps the results, so that a second run goes on where one was stopped; about:
    what they depend on, its first line.  Raises ValueError if a file is about something else.
    """
    title = json.dumps(about)
    lines = Path(kept).read_text().splitlines(keepends=True) if Path(kept).is_file() else []
    if lines and lines[0] != f"{title}\n":
        raise ValueError(f"{kept} is of other data or flags: remove what was begun there, or "
                         "choose another --out")
    # the last line may have been cut
    done = [json.loads(line) for line in lines[1:] if line.endswith("\n")]
    left = items[len(done):]
    # with batch_size=None, a worker calls collate_fn with one item
    results = torch.utils.data.DataLoader(left, batch_size=None, collate_fn=function,
                                          num_workers=max(0, min(workers, len(left) - 1)))
    with open(kept, "w") as file:
        print(title, file=file)
        for number, result in enumerate(chain(done, results), 1):
            print(json.dumps(result), file=file, flush=True)
            show_progress(number, len(items), what)
            yield result


def measure_chunk(chunk: tuple[int, Path, list[Place]], images: str,
                  encode_one: Callable[[Record], Sample], check: Callable[[Sample], Any] | None
                  ) -> tuple[list[list[int]], list[dict]]:
    """Lines of an index, and rejected records, of places in a file with this number."""
    file, path, places = chunk
    lines, rejects = [], []
    for place in places:
        try:
            found = READERS[path.suffix][1](path, place, images)
        except BAD_RECORD as error:
            rejects.append((place[2], error))
            continue
        # of a packed shard, one bad record does not lose the others
        for part, raw in found.items():
            try:
                sample = encode_one(normalize_record(*raw))
                if check:
                    check(sample)
                lines.append([file, *place[:2], part, -1, *load_of(sample)])
            except BAD_RECORD as error:
                rejects.append((part, error))
    return lines, [{"file": str(path), "part": part, "reason": str(error)}
                   for part, error in rejects]


def decode_all(sample: Sample) -> None:
    """Reject a sample whose pictures cannot be decoded."""
    for i in range(len(sample.images)):
        sample.patches(i)


def settings_of(tokenizer: Tokenizer, images: str, pixels: Pixels) -> dict:
    """What the lengths of samples depend on."""
    digest = hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
    return {"tokenizer": digest, "images": images, "pixels": list(pixels)}


def measure(files: list[Path], tokenizer: Tokenizer, images: str = "",
            pixels: Pixels = PIXELS, workers: int = 0,
            check: Callable[[Sample], Any] | None = None, most: int | None = None,
            kept: str | Path = os.devnull) -> Index:
    """Measure all records of files: their tokens, and their pictures by the headers alone.

    check: raises ValueError for a sample that is to be rejected.  most: measure only so many chunks
    of 1,000 records.  kept: see `in_order`.
    """
    settings = settings_of(tokenizer, images, pixels)
    entries, chunks, damaged = [], [], []
    for number, path in enumerate(files):
        places = []
        try:
            places.extend(READERS[path.suffix][0](path))
        except ValueError as error:  # the places before the damage are used
            damaged.append(str(error))
        # absolute, but links stay: their names and folders count
        entries.append({"file": os.path.abspath(path), **facts_of(path)})
        chunks += [(number, path, places[i:i + CHUNK]) for i in range(0, len(places), CHUNK)]
    if not chunks and not damaged:
        raise ValueError(f"{', '.join(map(str, files))} holds no records")

    one = partial(measure_chunk, images=images, check=check,
                  encode_one=partial(encode, tokenizer=tokenizer, pixels=pixels))
    tables, rejects = [np.empty((0, len(COLUMNS)), dtype=np.int64)], []
    for lines, bad in in_order(one, chunks[:most], workers, f"x {CHUNK:,} records measured", kept,
                               [settings, entries]):
        tables.append(np.array(lines, dtype=np.int64).reshape(-1, len(COLUMNS)))
        rejects += bad
    return Index(entries, np.concatenate(tables), settings, rejects, damaged)


def open_index(sources: Sequence[str], tokenizer: Tokenizer, images: str,
               pixels: Pixels, workers: int) -> Index:
    """One index of several sources, each with its weight: packed ones are read, others measured."""
    paths, weights = zip(*map(weight_of, sources))
    if any(weights) and not all(weights):
        raise ValueError(f"{' '.join(sources)}: either all sources have a weight or none")
    settings = settings_of(tokenizer, images, pixels)
    indexes = []
    for path in paths:
        if not Path(path, "index.json").is_file():
            indexes.append(measure(source_files(path), tokenizer, images, pixels, workers))
            continue
        index = Index.load(Path(path))
        index.leave_out_damaged()
        least, most = index.settings["pixels"]
        packed_with = {"pixels": f"--min-pixels {least} --max-pixels {most}",
                       "tokenizer": "the tokenizer of another checkpoint"}
        for name, words in packed_with.items():
            if index.settings[name] != settings[name]:
                raise ValueError(f"{path} was packed with {words}: give the same, pack it again, "
                                 f"or name its shards, {path}/*.tar, to measure them anew")
        indexes.append(index)
    if len(indexes) == 1:
        return indexes[0]

    settings |= {"counts": [len(index.table) for index in indexes],
                 "weights": weights if all(weights) else None}
    whole = Index([], np.empty((0, len(COLUMNS)), dtype=np.int64), settings)
    for index in indexes:
        # the files are numbered through, those of the first source first
        table = index.table.copy()
        table[:, 0] += len(whole.files)
        whole.table = np.concatenate([whole.table, table])
        whole.files += index.files
        whole.rejects += index.rejects
        whole.damaged += index.damaged
    return whole


# --------------------------------------------------------------------------------------------- plan


def permutation(count: int, *seed: int) -> np.ndarray:
    """A random order of `count` things, the same with every version of NumPy."""
    # of NumPy's random numbers, only these raw bits are promised to stay
    return np.random.PCG64(seed).random_raw(count).argsort(kind="stable")


def pack_rows(lengths: np.ndarray, room: int, pool: int = 128) -> np.ndarray:
    """The row of each sample: a row takes the oldest of a pool, then always the longest that fits.

    The pool is refilled from the samples in their order.  So rows are full to a few tokens, and yet
    of mixed samples: best-fit decreasing over all samples fills rows no better, but with samples of
    like length, and from one such row a step the model learns markedly worse.

    Long data are cut into streams with a pool each, all of which place a sample at a time: 10
    million samples take seconds.  lengths: (samples,) from 1 to `room`.
    """
    count = len(lengths)
    # of 64 rows at least, so that the last rows of all streams are few
    streams = max(1, min(count // STREAM, int(lengths.sum()) // (64 * room)))
    columns = -(-count // streams)  # samples of a stream
    dtype = np.uint16 if room < 2**16 else np.int64
    sizes = np.zeros((columns + pool, streams), dtype)  # 0: no sample
    # a stream is a stretch of neighbours: what is packed from files reads them in their order
    sizes[:columns] = np.pad(lengths, (0, columns * streams - count)).reshape(streams, columns).T
    rows = np.empty((columns + pool, streams), dtype=np.int32)
    held = sizes[:pool].T.copy()  # (streams, pool) lengths
    column_of = np.tile(np.arange(pool, dtype=np.int32), (streams, 1))
    each, row, free = np.arange(streams), np.full(streams, -1), np.zeros(streams, dtype)

    for column in range(pool, columns + pool):
        choice = (held * (held <= free[:, None])).argmax(1)
        length = held[each, choice]
        none_fits = np.flatnonzero((length > free) | (length == 0))
        if len(none_fits):
            # open a row, with the oldest sample; a stream that has ended opens none
            age = np.where(held[none_fits] > 0, column_of[none_fits], columns + pool)
            choice[none_fits] = age.argmin(1)
            length[none_fits] = held[none_fits, choice[none_fits]]
            row[none_fits] += length[none_fits] > 0
            free[none_fits] = room
        rows[column_of[each, choice], each] = row
        free -= length
        held[each, choice] = sizes[column]
        column_of[each, choice] = column

    starts = np.cumsum(row + 1) - (row + 1)  # the first row of each stream
    row_of = (rows[:columns] + starts).T.ravel()[:count].astype(np.int64)
    if streams > 1:
        # for the last rows of a stream the pool was nearly empty: pack their samples once more
        last = np.flatnonzero((rows[:columns] > row - 3).T.ravel()[:count])
        row_of[last] = row_of.max() + 1 + pack_rows(lengths[last], room)
        _, row_of = np.unique(row_of, return_inverse=True)
    return row_of


def by_row(samples: np.ndarray, row_of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Samples in the order of their rows, and where each row starts; those of row -1 left out."""
    starts = np.bincount(row_of + 1).cumsum()
    in_order = samples[row_of.argsort(kind="stable")]
    return in_order[starts[0]:], starts - starts[0]


@dataclass(eq=False)
class FileData:
    """Training data from files.  An epoch has each sample once, in rows that are packed anew.

    Data of `data.py pack` keep their rows, if these have the same length.  If sources have weights,
    these are their shares in an epoch, which is as long as all sources together: one with a larger
    share is repeated, and none is begun again before its end.
    """

    index: Index  # of the samples
    tokenizer: Tokenizer  # with which they were measured
    seq_length: int  # tokens in a row
    seed: int  # of the order

    def __post_init__(self) -> None:
        """Raise ValueError if no sample of a source fits a row."""
        settings = self.index.settings
        self.sources = []  # numbers of the samples of each source that fit a row
        bounds = np.cumsum(settings.get("counts", []))[:-1]
        for source in np.split(np.arange(len(self.index.table)), bounds):
            self.sources.append(source[self.index.column("tokens")[source] <= self.seq_length])
            if not len(self.sources[-1]):
                raise ValueError(f"none of the {len(source)} samples fits a row of "
                                 f"{self.seq_length} tokens: raise --seq-length or lower "
                                 "--max-pixels")
        self.packed = settings.get("length") == self.seq_length  # then the rows are kept
        self.total = sum(map(len, self.sources))
        self.too_long = len(self.index.table) - self.total

    def samples_of(self, epoch: int) -> np.ndarray:
        """Numbers of the samples of an epoch, in random order."""
        weights = self.index.settings.get("weights") or [len(source) for source in self.sources]
        chosen = []
        for number, (source, weight) in enumerate(zip(self.sources, weights)):
            # a source is an endless stream of shuffled passes; epochs cut it into stretches
            size = max(1, round(weight / sum(weights) * self.total))
            # a source smaller than its share is passed through several times
            first, skipped = divmod(epoch * size, len(source))
            passes = range(first, first + -(-(skipped + size) // len(source)))
            order = [permutation(len(source), self.seed, number, which) for which in passes]
            chosen.append(source[np.concatenate(order)[skipped:skipped + size]])
        together = np.concatenate(chosen)
        return together[permutation(len(together), self.seed, len(self.sources), epoch)]

    @lru_cache(maxsize=2)  # a step may end in the next epoch  # noqa: B019
    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples of an epoch in the order of its rows, and where each row starts."""
        samples = self.samples_of(number)
        if self.packed:
            _, row_of = np.unique(self.index.column("row")[samples], return_inverse=True)
        else:
            row_of = pack_rows(self.index.column("tokens")[samples], self.seq_length)
        # the rows that are not full are the last: shuffle them
        shuffled = permutation(row_of.max() + 1, self.seed, len(self.sources) + 1, number)
        return by_row(samples, shuffled[row_of])

    @lru_cache(maxsize=None)  # noqa: B019
    def rows_in(self, epoch: int) -> int:
        """Number of rows of an epoch; the order of the samples changes it a little."""
        return len(self.epoch(epoch)[1]) - 1

    def loads(self, samples: np.ndarray | int) -> np.ndarray:
        """(samples, 6) numbers of LOADS; of one sample (6,)."""
        return self.index.table[samples, -len(LOADS):]

    def sample(self, number: int) -> Sample:
        """Read a sample.  If its record is bad by now, the sample is lost but keeps its length."""
        loads = self.loads(number).tolist()
        try:
            sample = encode(self.index.record(number), self.tokenizer,
                            self.index.settings["pixels"], number=number)
        except BAD_RECORD as error:
            # other ranks count on its tokens, so its place is kept, without holes and labels
            blank = torch.zeros(loads[0], dtype=torch.int64)
            return Sample(blank, blank + IGNORE, [], blank[:0].view(0, 3), (0, 0), "unknown",
                          number, str(error))
        if load_of(sample) != loads:
            raise ValueError(f"record {sample.name} has {len(sample.input_ids)} tokens, but had "
                             f"{loads[0]} when it was measured: its file has changed")
        return sample


@dataclass(eq=False)
class DrawnData:
    """Training data drawn by `assets/scenes.py`.  An epoch has new records and at least 16 rows."""

    data: str  # one of DRAWN
    tokenizer: Tokenizer  # of the texts
    seq_length: int  # tokens in a row
    seed: int  # of the records
    rows: int = 1  # of a step; an epoch has whole steps
    pixels: Pixels = PIXELS  # least and largest area of a picture
    too_long = 0  # samples, as in FileData

    @lru_cache(maxsize=2**11)  # 50 MB, two epochs of the default run  # noqa: B019
    def sample(self, number: int) -> Sample:
        """Draw a sample; seed and number decide it."""
        from assets.scenes import drawn_record  # here, because scenes.py imports this file
        record = drawn_record(self.data, self.seed, number)
        return encode(record, self.tokenizer, self.pixels, number=number)

    @lru_cache(maxsize=2**17)  # of an epoch whose samples are too many to keep  # noqa: B019
    def load(self, number: int) -> list[int]:
        """The numbers of LOADS of a sample."""
        return load_of(self.sample(number))

    @lru_cache(maxsize=2)  # noqa: B019
    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples of an epoch in the order of its rows, and where each row starts."""
        rows, first = self.rows_in(number), number * EPOCH_NUMBERS
        lengths: dict[int, int] = {}
        tokens = 0
        for sample in range(first, first + EPOCH_NUMBERS):
            length = self.load(sample)[0]
            if length <= self.seq_length:
                lengths[sample] = length
                tokens += length
            elif sample - first > 1000 > len(lengths):
                raise ValueError(f"hardly a drawn sample fits a row of {self.seq_length} tokens: "
                                 "raise --seq-length")
            if tokens >= rows * self.seq_length:
                break
        sizes = np.array(list(lengths.values()))
        # an epoch is short, and so is its pool, for mixed rows
        row_of = pack_rows(sizes, self.seq_length, pool=16)
        # of one row more than wanted, the emptiest are left out; the others are shuffled
        fullest = np.argsort(-np.bincount(row_of, sizes), kind="stable")[:rows]
        place = np.full(row_of.max() + 1, -1)
        place[fullest[permutation(len(fullest), self.seed, number)]] = np.arange(len(fullest))
        return by_row(np.array(list(lengths)), place[row_of])

    def rows_in(self, epoch: int) -> int:
        """Number of rows of an epoch."""
        return self.rows * -(-16 // self.rows)

    def loads(self, samples: np.ndarray) -> np.ndarray:
        """(samples, 6) numbers of LOADS."""
        return np.array([self.load(number) for number in samples.tolist()])


def deal(costs: list[float], ranks: int) -> list[list[int]]:
    """Deal items to ranks so that all ranks finish together.  Returns each rank's items.

    Each round deals the heaviest items that are left, one to each rank.  The rank with the smallest
    sum takes the heaviest.  So ranks that work at the same time have items of similar cost.
    """
    # costs 9 7 5 4 on two ranks:   round 1   rank 0 takes 9, rank 1 takes 7
    #                               round 2   rank 0 takes 4, rank 1 takes 5: sums 13 and 12
    dealt = [[] for _ in range(ranks)]
    sums = [0.0] * ranks
    heaviest_first = sorted(range(len(costs)), key=lambda item: -costs[item])
    for start in range(0, len(costs), ranks):
        lightest_first = sorted(range(ranks), key=lambda rank: sums[rank])
        for rank, item in zip(lightest_first, heaviest_first[start:start + ranks]):
            dealt[rank].append(item)
            sums[rank] += costs[item]
    return dealt


class RowOfStep(NamedTuple):
    """A row of this rank, and what all ranks do in the same step."""

    row: Any  # Row, or RowShare if ranks share a row
    sums: dict[str, float]  # over all rows of the step: samples, LOADS, costs
    balance: float  # mean cost over largest cost, of rows that ranks compute at the same time


@dataclass(eq=False)
class Rows(torch.utils.data.Dataset):
    """The rows of a rank, by number, for a DataLoader with batch_size=None.

    A step has `rows` rows of all ranks, and row n of a rank is in step n // (rows / ranks).  So the
    number of a step is the position of a run.  Data, seed and number decide a row; ranks and
    workers only decide who cuts it.  A rank reads no record of another rank's row.
    """

    data: FileData | DrawnData  # whose plan says which samples are in a row
    rows: int = 1  # of a step
    rank: int = 0  # this rank's number among those that train on different rows
    ranks: int = 1  # their count
    # loads (sums by the names of LOADS, an entry a row) -> costs by name; the first one is dealt
    cost: Callable[[dict], dict] = lambda loads: {"length": loads["tokens"]}
    # makes from a row's samples what a rank trains on: `lay_out` or `parallel.share_row`
    cut: Callable[[list[Sample]], Any] = lay_out

    def row(self, number: int) -> np.ndarray:
        """The numbers of the samples of a row, counted through all epochs."""
        epoch = 0
        while number >= self.data.rows_in(epoch):
            number -= self.data.rows_in(epoch)
            epoch += 1
        members, starts = self.data.epoch(epoch)
        return members[starts[number]:starts[number + 1]]

    @lru_cache(maxsize=1)  # a rank asks for its rows of a step one after another  # noqa: B019
    def step(self, number: int) -> tuple[list[np.ndarray], dict[str, float], float]:
        """The samples of this rank's rows in a step, the sums over all rows, and the balance."""
        rows = [self.row(i) for i in range(number * self.rows, (number + 1) * self.rows)]
        # (rows, 6); a row's load is the sum over its samples
        loads = np.array([self.data.loads(row).sum(0) for row in rows], dtype=np.float64)
        by_name = dict(zip(LOADS, loads.T))
        costs = self.cost(by_name)
        first = next(iter(costs.values())).tolist()
        dealt = deal(first, self.ranks)

        sums = {name: float(values.sum()) for name, values in (by_name | costs).items()}
        sums["samples"] = sum(map(len, rows))
        # All ranks compute their first rows at the same time, then their second rows, and so on.
        # Each time they wait for the slowest rank.
        slowest = [max(first[i] for i in together) for together in zip(*dealt)]
        balance = sum(first) / self.ranks / sum(slowest)
        return [rows[i] for i in dealt[self.rank]], sums, balance

    def __getitem__(self, number: int) -> RowOfStep:
        """Row `number` of this rank."""
        step, own = divmod(number, self.rows // self.ranks)
        rows, sums, balance = self.step(step)
        samples = [self.data.sample(i) for i in rows[own].tolist()]
        # on a CPU, neighbours of equal length share a call of attention: so in the order of the
        # sizes of pictures, then of tokens
        samples.sort(key=lambda one: (one.grid_thw.prod(1).tolist(), len(one.input_ids)))
        return RowOfStep(self.cut(samples), sums, balance)


# ---------------------------------------------------------------------------------- data.py inspect


def print_histogram(title: str, values: np.ndarray) -> None:
    """How many of the values lie between powers of two, with bars."""
    print(f"{title}: {values.min():,} to {values.max():,}, mean {values.mean():,.0f}")
    exponents, counts = np.unique(np.log2(np.maximum(values, 1)).astype(int), return_counts=True)
    for exponent, number in zip(exponents.tolist(), counts):
        bar = "#" * round(50 * number / counts.max())
        print(f"  {2**exponent:>10,} - {2**(exponent + 1) - 1:<10,} {number:>10,} {bar}")


def print_sample(number: int, sample: Sample, tokenizer: Tokenizer) -> None:
    """The text of a sample; what is learnt stands in brackets."""
    learnt = int((sample.labels >= 0).sum())
    grids = [grid[1:] for grid in sample.grid_thw.tolist()]
    print(f"\n{number} ({sample.name}): {len(sample.input_ids)} tokens, {learnt} learnt, "
          f"pictures of {grids} patches")
    pairs = zip(sample.input_ids.tolist(), sample.labels.tolist())
    for is_learnt, group in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        # a picture is shown as one of its many tokens
        text = re.sub(r"(<\|\w+_pad\|>)\1+", r"\1", text)
        print(f"[{text}]" if is_learnt else text, end="")
    print()


def write_sheet(samples: list[Sample], file: str) -> None:
    """A contact sheet of the pictures of samples, eight in a line."""
    pictures = [open_frames(image)[0] if isinstance(image, Video) else open_image(image)
                for sample in samples for image in sample.images]
    sheet = Image.new("RGB", (8 * 168, -(-len(pictures) // 8) * 168), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(ImageOps.pad(to_rgb(picture), (160, 160), color="white"),
                    (i % 8 * 168, i // 8 * 168))
    sheet.save(file)


def print_rejects(index: Index, every: bool) -> None:
    """What cannot be used, by its kind; with `every`, each record and file."""
    reasons = sorted((reject["reason"] for reject in index.rejects), key=reason_of)
    for kind, group in groupby(reasons, key=reason_of):
        first, *others = group
        print(f"rejected: {1 + len(others):,} {kind}, as in: {first}")
    for said in index.damaged:
        print(f"damaged: {said}")
    for reject in index.rejects if every else []:
        print(f"{reject['file']}[{reject['part']}]: {reject['reason']}")


def cost_of(model: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """A function from loads, by the names of LOADS, to FLOPs of a forward pass of a preset."""
    from model import PRESETS, forward_flops  # upward, for the commands alone
    if model not in PRESETS:
        raise ValueError(f"there is no --model {model!r}, only {', '.join(PRESETS)}")
    return lambda loads: {"flops": sum(forward_flops(PRESETS[model], loads).values())}


def inspect(flags: argparse.Namespace) -> None:
    """Print what data hold: counts, lengths, rows, what is rejected and, with --show, samples."""
    from convert import load_tokenizer  # upward, for this command alone
    tokenizer = load_tokenizer(Path(flags.checkpoint))
    pixels = (flags.min_pixels, flags.max_pixels)

    if flags.sources[0] in DRAWN:
        if flags.sources[1:]:
            raise ValueError(f"{flags.sources[0]} are drawn, and looked at alone, without "
                             f"{flags.sources[1]}")
        data = DrawnData(flags.sources[0], tokenizer, flags.length, 0, 16, pixels)
        members, _ = data.epoch(0)
        print(f"{len(members):,} of endless samples")
    else:
        files = source_files(*flags.sources)
        index = measure(files, tokenizer, flags.images, pixels, flags.workers,
                        decode_all if flags.decode else None,
                        None if flags.all or flags.decode else 10)
        if flags.all:
            for folder in sorted({file.parent for file in files}):
                if (folder / "index.json").is_file():
                    packed = Index.load(folder)
                    packed.leave_out_damaged(digests=True)
                    index.damaged += packed.damaged
        print(f"{len(index.table):,} samples of {len(files)} files, "
              f"{len(index.rejects):,} records rejected, {len(index.damaged)} files damaged")
        print_rejects(index, flags.all)
        if not len(index.table):
            return
        data = FileData(index, tokenizer, flags.length, 0)
        members = np.arange(len(index.table))

    tokens, _, labels, patches, _, images = data.loads(members).T
    print(f"{tokens.sum():,} tokens, {labels.sum() / tokens.sum():.1%} learnt; "
          f"{images.sum():,} pictures")
    print_histogram("tokens of a sample", tokens)
    if images.any():
        with_images = images > 0
        sizes = patches[with_images] * PATCH**2 // images[with_images]
        print_histogram("pixels of a picture, after resizing", sizes)
    count = data.rows_in(0)
    planned = data.loads(data.epoch(0)[0])[:, 0]
    print(f"an epoch: {len(planned):,} samples in {count:,} rows of {flags.length:,} tokens, "
          f"{planned.sum() / (count * flags.length):.2%} full")
    rows = Rows(data, min(64, max(1, count // 8) * 8), ranks=8, cost=cost_of(flags.model))
    print(f"FLOPs of a step of {rows.rows} rows of the {flags.model} on 8 ranks: the mean rank has "
          f"{rows[0].balance:.1%} of the slowest")
    if data.too_long:
        print(f"left out: {data.too_long:,} samples that are longer than a row")
    shown = [data.sample(int(number)) for number in members[:flags.show]]
    for number, sample in enumerate(shown):
        print_sample(number, sample, tokenizer)
    if flags.sheet:
        write_sheet(shown, flags.sheet)


# ------------------------------------------------------------------------------------- data.py pack


def check_packable(sample: Sample, length: int) -> None:
    """Reject a sample that fits no row, or that upstream's unpacked layout cannot hold."""
    if len(sample.input_ids) > length:
        raise ValueError(f"record {sample.name} has {len(sample.input_ids)} tokens, a row {length}")
    videos = [media.file for media in sample.images if isinstance(media, Video)]
    if 0 < len(videos) < len(sample.images):
        raise ValueError(f"record {sample.name}: pictures and videos together cannot be packed")
    # the videos of a shard are animations
    if any(isinstance(file, Path) and file.suffix.lower() not in ANIMATIONS for file in videos):
        raise ValueError(f"record {sample.name}: a film or a folder of frames cannot be packed: "
                         "make it an animated WebP")


def shard_fields(record: Record) -> dict[str, bytes]:
    """The members of a record in a shard, by name, in upstream's unpacked layout."""
    fields, kind = {}, "text"
    for i, media in enumerate(record["images"]):
        kind = "video" if isinstance(media, Video) else "image"
        content = content_of(media.file if kind == "video" else media)
        if not isinstance(content, bytes):
            content = Path(content).read_bytes()
        # a video of a shard is an animation, which opens as a picture
        ending = open_image(content, decode=False).format.lower()
        fields[f"{i}.{ending}"] = content
    about = {"id": record["id"], "texts": record["messages"], "media": kind, "name": list(fields)}
    # half a surrogate becomes \ud800, as JSON writes it
    text = json.dumps(about, ensure_ascii=False).encode(errors="backslashreplace")
    return {"json": text, **fields}


def write_shard(item: tuple[int, np.ndarray], index: Index, out: Path,
                ) -> tuple[dict, list[tuple]]:
    """Write the shard of this number and samples.

    Returns its entry in the index and, for each sample, the first four COLUMNS.
    """
    number, samples = item
    path = out / f"shard-{number:06}.tar"
    places = []
    # headers have no time and no owner, so the same samples make the same bytes
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for i, sample in enumerate(samples):
            start = tar.offset
            for name, content in shard_fields(index.record(sample)).items():
                member = tarfile.TarInfo(f"{number:06}-{i:06}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            places.append((number, start, tar.offset, 0))
    return {"file": path.name, **facts_of(path, digest=True)}, places


def plan_shards(row_of: np.ndarray) -> list[np.ndarray]:
    """The samples of each shard, in the order of their rows; a shard ends with a row."""
    order, starts = by_row(np.arange(len(row_of)), row_of)
    # a row is in the shard in which its first sample falls
    shard_of = np.repeat(starts[:-1] // SHARD, np.diff(starts))
    return np.split(order, np.flatnonzero(np.diff(shard_of)) + 1)


def pack(flags: argparse.Namespace) -> None:
    """Write the samples of all sources as shards of full rows, with an index; go on if stopped."""
    from convert import load_tokenizer  # upward, for this command alone
    out = Path(flags.out)
    if (out / "index.json").exists():
        raise ValueError(f"{out} is packed already")
    files = source_files(*flags.sources)
    cost = cost_of(flags.model)
    tokenizer = load_tokenizer(Path(flags.checkpoint))
    out.mkdir(parents=True, exist_ok=True)
    index = measure(files, tokenizer, flags.images, (flags.min_pixels, flags.max_pixels),
                    flags.workers, partial(check_packable, length=flags.length),
                    kept=out / f"measured-{flags.length}.partial")
    if index.damaged and not flags.skip_bad:
        raise ValueError(f"{len(index.damaged)} files are damaged; --skip-bad packs what is whole "
                         f"of them: {'; '.join(index.damaged)}")
    if not len(index.table):
        raise ValueError(f"no sample fits a row of {flags.length} tokens")
    row_of = pack_rows(index.column("tokens"), flags.length)
    shards = plan_shards(row_of)
    # shards of another plan must not be taken for those of this one
    written = in_order(partial(write_shard, index=index, out=out), list(enumerate(shards)),
                       flags.workers, "shards written", out / "written.partial",
                       [flags.length, index.settings, index.files])
    entries, tables = [], []
    for (entry, places), samples in zip(written, shards):
        # the lines of the samples, now with their places in the shard
        table = index.table[samples]
        table[:, :4] = places
        table[:, COLUMNS.index("row")] = row_of[samples]
        loads = dict(zip(LOADS, table[:, -len(LOADS):].sum(0).astype(float)))
        entries.append(entry | cost(loads) | {
            "samples": len(samples), "rows": len(np.unique(row_of[samples])),
            "tokens": int(loads["tokens"])})
        tables.append(table)
    settings = {**index.settings, "images": "", "length": flags.length, "model": flags.model}
    Index(entries, np.concatenate(tables), settings, index.rejects).save(out)
    for file in out.glob("*.partial"):
        file.unlink()
    rows = row_of.max() + 1
    print(f"{len(row_of):,} samples in {rows:,} rows of {flags.length:,} tokens, "
          f"{index.column('tokens').sum() / (rows * flags.length):.2%} full, {len(shards)} shards; "
          f"{len(index.rejects):,} rejected, see {out / 'rejects.jsonl'}")


# ---------------------------------------------------------------------------------- data.py balance


def plain_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def concepts_in(record: Record, concepts: set[str], longest: int) -> list[str]:
    """The concepts that a record's answers name, as one to `longest` words, in order."""
    answers = [str(turn["content"]) for turn in record["messages"] if turn["role"] == "assistant"]
    words = plain_words(" ".join(answers))
    phrases = {" ".join(words[i:i + size]) for i in range(len(words))
               for size in range(1, longest + 1)}
    return sorted(phrases & concepts)


def balance(flags: argparse.Namespace) -> None:
    """Choose --keep records so that rare concepts are as frequent as the captions allow.

    A record's weight is the sum of 1 / frequency over the concepts in its answers; records are
    drawn without putting back (the published data were balanced so, with concepts found by an
    embedding).  Records that name no concept are left out.  The lines are written as they are.
    """
    lines = Path(flags.concepts).read_text(encoding="utf-8").splitlines()
    concepts = {" ".join(plain_words(line)) for line in lines} - {""}
    if not concepts:
        raise ValueError(f"{flags.concepts} names no concept")
    longest = max(len(name.split()) for name in concepts)
    parts, matched = [], []
    for path in source_files(*flags.sources):
        if path.suffix != ".jsonl":
            raise ValueError(f"{path} is not .jsonl: balance records before they are in shards")
        for (start, end, _), record in zip(json_places(path), read_records(path)):
            found = concepts_in(record, concepts, longest)
            if found:
                parts.append(FilePart(str(path), start, end - start))
                matched.append(found)
    if not parts:
        raise ValueError(f"no record names a concept of {flags.concepts}")

    # the largest of log(u) / weight, u uniform, are drawn by weight, without putting back
    frequency = Counter(chain.from_iterable(matched))
    weights = np.array([sum(1 / frequency[name] for name in found) for found in matched])
    uniform = (np.random.PCG64(flags.seed).random_raw(len(weights)) + 1.0) / 2**64
    chosen = np.sort(np.argsort(-np.log(uniform) / weights, kind="stable")[:flags.keep])
    with open(flags.out, "xb") as out:
        out.writelines(content_of(parts[i]).strip() + b"\n" for i in chosen)

    after = Counter(chain.from_iterable(matched[i] for i in chosen))
    for title, counts in (("before", frequency), ("after", after)):
        times = sorted(counts.values())
        print(f"{title}: {len(times):,} of {len(concepts):,} concepts are named, the most frequent "
              f"{times[-1] / np.median(times):,.1f} times as often as the median")
    print(f"{len(chosen):,} of {len(parts):,} records that name a concept -> {flags.out}")


# ----------------------------------------------------------------------------------- python data.py

SHIPPED = str(Path(__file__).parent / "assets" / "tiny")


@dataclass(frozen=True)
class Reading:
    """Flags of `inspect` and `pack`."""

    checkpoint: str = SHIPPED  # directory whose tokenizer counts tokens
    images: str = ""  # directory of the pictures; default beside the JSON
    length: int = 8192  # tokens in a row
    min_pixels: int = MIN_PIXELS  # least area of a picture
    max_pixels: int = MAX_PIXELS  # largest area of a picture
    workers: int = os.cpu_count() or 1  # processes that read
    model: str = "4b"  # preset whose FLOPs are counted


@dataclass(frozen=True)
class Inspect:
    """Flags of `inspect` alone."""

    all: bool = False  # read all records, not 10,000; list all that are rejected
    decode: bool = False  # decode all pictures, too
    show: int = 0  # samples to print, what is learnt in brackets
    sheet: str = ""  # PNG to write, with the pictures of these samples


@dataclass(frozen=True)
class Pack:
    """Flags of `pack` alone."""

    out: str  # directory of the shards
    skip_bad: bool = False  # pack what is whole of damaged files


@dataclass(frozen=True)
class Balance:
    """Flags of `balance`."""

    concepts: str  # file with a concept a line
    out: str  # file of the chosen records
    keep: int = 10_000  # records to choose
    seed: int = 0  # of the choice


COMMANDS = {"inspect": (inspect, Reading, Inspect), "pack": (pack, Reading, Pack),
            "balance": (balance, Balance)}


def run(arguments: list[str]) -> None:
    """Read the flags of `python data.py` and do what they say."""
    if not arguments or arguments[0] not in COMMANDS:
        raise ValueError(f"usage: python data.py {{{','.join(COMMANDS)}}} SOURCE...")
    name = arguments[0]
    command, *configs = COMMANDS[name]
    parser = flag_parser(command.__doc__.splitlines()[0], arguments, prog=f"data.py {name}")
    parser.add_argument("sources", nargs="*" if name == "inspect" else "+", default=["questions"],
                        help="files, directories, globs or lists in braces of records")
    # a flag of another command is unknown, and so refused
    for config in configs:
        add_fields(parser, config)
    flags = parser.parse_args(arguments[1:])
    for key, value in vars(flags).items():
        least = 1 if key in ("length", "keep", "min_pixels", "max_pixels") else 0
        if isinstance(value, int) and value < least:
            raise ValueError(f"--{key.replace('_', '-')} must be at least {least}")
    command(flags)


# ------------------------------------------------------- helpers for the command lines of all files


def flag_parser(description: str, arguments: Sequence[str] = (),
                **options: Any) -> argparse.ArgumentParser:
    """A parser that raises ValueError with one sentence; argparse would print its usage.

    arguments: a flag that stands twice in them is refused; argparse would use the second.
    options: others of ArgumentParser, which passes its own to the parsers of subcommands.
    """
    def refuse(message: str) -> None:
        raise ValueError(message)

    # what follows -- is no flag
    words = takewhile(lambda word: word != "--", arguments)
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    for flag, times in Counter(flags).items():
        if times > 1:
            refuse(f"{flag} is given {times} times: once is meant")
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, **options)
    parser.error = refuse
    return parser


def add_fields(parser: argparse.ArgumentParser, config: type) -> None:
    """A flag for each field of a dataclass; the comment beside a field is the help of its flag."""
    comments = dict(re.findall(r"^    (\w+): .*#  ?(.*)$", getsource(config), re.M))
    for entry in fields(config):
        flag = f"--{entry.name.replace('_', '-')}"
        comment = comments[entry.name].replace("%", "%%")  # argparse formats with %
        # a flag of type bool takes no value: its presence means True
        options = {"action": "store_true"} if entry.type is bool else {"type": entry.type}
        if entry.default is True:
            options = {"action": argparse.BooleanOptionalAction}
        if isinstance(entry.default, tuple):
            options = {"nargs": "+"}
        required = entry.default is MISSING
        if not required:
            comment += f" (default {entry.default!r})"
        parser.add_argument(flag, default=entry.default, required=required, help=comment, **options)


def sentence_of(error: Exception) -> str:
    """What an error says.  That of a worker process says it in the last line of a traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\w*Error: ", "", lines[-1])


def refuse_in_one_sentence(script: str, command: Callable[[], None]) -> None:
    """Run a command.  An error that the user can cause ends it with one line and exit code 2."""
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"{script}: {sentence_of(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + 2, the number of the signal, as shells have it


def show_progress(done: int, total: int, what: str) -> None:
    """Redraw a bar, on a terminal only; at the end remove it.  The first rank speaks for all."""
    if sys.stderr.isatty() and os.environ.get("RANK", "0") == "0":
        bar = f"[{'#' * (30 * done // total):30}] {done}/{total} {what}" if done < total else ""
        print(f"\r\033[K{bar}", end="", file=sys.stderr, flush=True)


def choose_device(name: str) -> torch.device:
    """The device of this name, else a GPU if there is one.  ValueError if it is not there."""
    if not name:
        name = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(name)
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"there is no device {name} here: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of this name, else float32 on a CPU and bfloat16 on a GPU."""
    if not name:
        name = "float32" if device.type == "cpu" else "bfloat16"
    return getattr(torch, name)


if __name__ == "__main__":
    refuse_in_one_sentence("data.py", lambda: run(sys.argv[1:]))
