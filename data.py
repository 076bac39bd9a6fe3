"""Records -> packed rows: chat template, labels, packing, and the readers of data files.

In: records, which are conversations with pictures.  They are read from JSON files or WebDataset tar
shards, or drawn on the fly.  Out: `Row`, one packed row of tokens and patches for `model.py`.
Called by `parallel.py`, `train.py`, `sample.py`, `convert.py` and `assets/scenes.py`; calls
`vision.py` and `assets/scenes.py`.

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

The helpers for command lines, which other files share, stand last in this file.

Shapes: T tokens in a packed row, L tokens in a sample, S samples, P patches, I pictures.

Run `python data.py inspect` (default data) or `python data.py inspect --data PATH`: prints records,
their tokens with what is learnt, and how full rows are; --save DIR writes the pictures.  Tokens are
those of the tiny tokenizer.
"""

import argparse
import json
import random
import re
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, takewhile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor

from assets.scenes import drawn_records
from vision import (MALFORMED, MAX_PIXELS, MIN_PIXELS, Picture, image_to_patches, open_image,
                    patch_grid, visual_tokens)

SYSTEM_PROMPT = "You are a helpful assistant."
IGNORE = -100  # label of a token that is not learnt
SPECIAL_TOKENS = (  # in the order of their ids in the released vocabulary, from 151643 on
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)
# The tokens that delimit messages and pictures.  Their names inside a text always stay text.
STRUCTURE = {name for name in SPECIAL_TOKENS if not re.search("_ref_|box_|quad_", name)}
# Qwen cuts a text into these parts, and merges bytes only inside a part: contractions, words,
# single digits, symbols, spaces.
WORD_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SYSTEM_FILES = {"Thumbs.db", "desktop.ini"}  # Windows leaves these files in folders
BAD_JSON = (json.JSONDecodeError, UnicodeDecodeError, RecursionError)  # what json.loads raises

# {"id", "messages": [{"role", "content"}], "images": [picture, path or file content], "category"}
Record = dict

# The keys that this code uses of a record or turn in a file.  It ignores other keys, such as the
# name of a source, unless the words of a key say that the key would change what is learnt.  Then it
# refuses the record.
RECORD_KEYS = {"id", "image", "images", "messages", "conversations", "system"}
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


# ---------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE with Qwen's pre-tokenisation and special tokens, learnt from `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()

    # the 256 bytes are tokens from the start, so every text has tokens
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
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

    # the place of a picture between two texts; a text may be empty
    items = []
    for i, text in enumerate(texts):
        if i > 0:
            items.append({"type": "image"})
        if text:
            items.append({"type": "text", "text": text})
    return items


def check_messages(messages: list[dict]) -> None:
    """Raise ValueError with the offending value if this is not a conversation."""
    if not isinstance(messages, list):
        raise ValueError(f"the messages are {messages!r}, not a list")
    for message in messages:
        if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
            raise ValueError(f"{message!r} is not a message with role and content")
        if message["role"] not in ("system", "user", "assistant"):
            raise ValueError(f"a message has the role {message['role']!r}, "
                             "not system, user or assistant")
        # a string means a list with one text
        items = message["content"]
        if isinstance(items, str):
            items = [{"type": "text", "text": items}]
        if not isinstance(items, list):
            raise ValueError(f"a message has the content {items!r}, not text or a list of items")
        for item in items:
            check_item(item)


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


def render(messages: list[dict], visual_counts: list[int],
           generation_prompt: bool = False) -> Iterator[tuple[str, int, bool]]:
    """The published template as pieces (text or name of a special token, repeats, learnt).

    A piece with repeats = 0 is plain text.  Raises ValueError for a malformed message, and if the
    number of pictures differs from the number of places for them.
    """
    check_messages(messages)
    counts = iter(visual_counts)
    if messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, *messages]

    for i, message in enumerate(messages):
        # <|im_start|> role \n content <|im_end|>, and \n between two messages
        if i > 0:
            yield "\n", 0, False
        yield "<|im_start|>", 1, False
        yield f"{message['role']}\n", 0, False
        learnt = message["role"] == "assistant"

        for item in split_content(message, pictures=bool(visual_counts)):
            if item["type"] == "text":
                yield item["text"], 0, learnt
                continue
            count = next(counts, None)
            if count is None:
                raise ValueError("the text has more places for pictures than the "
                                 f"{len(visual_counts)} pictures there are")
            yield "<|vision_start|>", 1, False
            yield f"<|{item['type']}_pad|>", count, False
            yield "<|vision_end|>", 1, False

        # the end of an answer is learnt too: this token stops generation
        yield "<|im_end|>", 1, learnt

    if generation_prompt:
        yield "\n", 0, False
        yield "<|im_start|>", 1, False
        yield "assistant\n", 0, False
    if next(counts, None) is not None:
        raise ValueError("the text has fewer places for pictures than the "
                         f"{len(visual_counts)} pictures there are")


def mark_pattern(tokenizer: Tokenizer, generation_prompt: bool) -> re.Pattern[str]:
    """Matches, as a group, a mark: a special token whose name in a text becomes its id.

    Tokens of STRUCTURE are no marks.  In a prompt there are no marks.
    """
    special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    # the longer name first: <loc_77> before a mark <loc_7
    marks = sorted(special - STRUCTURE, key=len, reverse=True)
    if generation_prompt or not marks:
        return re.compile("(?!)")  # matches nothing
    return re.compile(f"({'|'.join(map(re.escape, marks))})")


def text_tokens(text: str, tokenizer: Tokenizer, marks: re.Pattern[str]) -> list[int]:
    """Token ids of plain text; a name that `marks` matches becomes the id of its token."""
    ids = []
    # a split at a group keeps what it matches: text, mark, text, mark, ..., text
    for i, part in enumerate(marks.split(text)):
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
    marks = mark_pattern(tokenizer, generation_prompt)
    pieces = render(messages, visual_counts, generation_prompt)

    # Neighbouring texts are tokenised as one text, for example "user\n" and the question behind it.
    # "assistant\n" and the answer stay apart, because only the answer is learnt.
    for (repeats, learnt), group in groupby(pieces, key=lambda piece: piece[1:]):
        texts = [text for text, _, _ in group]
        if repeats == 0:
            tokens = text_tokens("".join(texts), tokenizer, marks)
        else:
            tokens = [tokenizer.token_to_id(name) for name in texts for _ in range(repeats)]
        ids += tokens
        labels += tokens if learnt else [IGNORE] * len(tokens)
    return ids, labels


# ---------------------------------------------------------------------------------- encode and pack


@dataclass(eq=False)  # pool.remove(sample) then looks for the object, and compares no tensors
class Sample:
    """One conversation, ready to be packed; its pictures are measured but not decoded."""

    input_ids: Tensor  # (L,) int64
    labels: Tensor  # (L,) the token itself where learnt, else -100
    images: list[Picture]
    grid_thw: Tensor  # (I, 3) int64, the patches that each picture will be cut into
    pixels: tuple[int, int]  # least and largest area of a picture
    name: str  # of the record, for messages

    def patches(self, i: int) -> Tensor:
        """Decode and cut picture i, (P, 588).  Raises ValueError with the record's name."""
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
        """Number of tokens that are learnt."""
        return int((self.targets >= 0).sum())

    def inputs(self, device: torch.device | str = "cpu") -> dict[str, Tensor | None]:
        """The arguments of `model(...)`; positions follow from cu_seqlens."""
        inputs = {}
        for name in ("input_ids", "cu_seqlens", "patches", "grid_thw"):
            tensor = getattr(self, name)
            inputs[name] = None if tensor is None else tensor.to(device, non_blocking=True)
        return inputs


def encode(record: Record, tokenizer: Tokenizer, min_pixels: int = MIN_PIXELS,
           max_pixels: int = MAX_PIXELS, generation_prompt: bool = False) -> Sample:
    """Tokenise a record and measure its pictures; pixel limits are on height * width.

    Raises ValueError, with the record's name, if the record is malformed or, in training, has
    nothing to learn.
    """
    name = str(record.get("id", "?"))
    try:
        # the size of a picture is in its file's header; pixels are not read here
        grids = [patch_grid(image, min_pixels, max_pixels) for image in record["images"]]
        grid_thw = torch.tensor(grids, dtype=torch.int64).view(-1, 3)  # (I, 3)
        counts = visual_tokens(grid_thw).tolist()
        ids, labels = chat_tokens(record["messages"], tokenizer, counts, generation_prompt)
        if not generation_prompt and all(label == IGNORE for label in labels):
            raise ValueError("it has no answer to learn")
    except ValueError as error:
        raise ValueError(f"record {name}: {error}") from error
    return Sample(torch.tensor(ids), torch.tensor(labels), record["images"], grid_thw,
                  (min_pixels, max_pixels), name)


def lay_out(samples: list[Sample], cut: bool = True) -> Row:
    """Lay samples end to end; with `cut`, also decode their pictures and cut them into patches."""
    # The label of a token is the target of the token before it:
    #     input_ids  <|im_start|>  assistant  \n    A    cat         <|im_end|>
    #     labels     -100          -100       -100  A    cat         <|im_end|>
    #     targets    -100          -100       A     cat  <|im_end|>  -100
    targets = [F.pad(s.labels[1:], (0, 1), value=IGNORE) for s in samples]
    lengths = torch.tensor([len(s.input_ids) for s in samples])  # (S,)

    grid_thw = torch.cat([s.grid_thw for s in samples])
    if len(grid_thw) == 0:
        grid_thw = None
    # a patch has 588 * 4 bytes, a visual token 9.4 kB, a row of 8,192 visual tokens 77 MB
    patches = None
    if cut and grid_thw is not None:
        patches = torch.cat([s.patches(i) for s in samples for i in range(len(s.images))])
    return Row(
        input_ids=torch.cat([s.input_ids for s in samples]), targets=torch.cat(targets),
        cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)), patches=patches, grid_thw=grid_thw,
        names=[s.name for s in samples])


def take_row(pool: list[Sample], seq_length: int) -> list[Sample]:
    """Move a row's samples out of the pool: the oldest, then always the longest that fits."""
    row = []
    free = seq_length
    choice = pool[0]
    while choice is not None:
        pool.remove(choice)
        row.append(choice)
        free -= len(choice.input_ids)
        fitting = [s for s in pool if len(s.input_ids) <= free]
        choice = max(fitting, key=lambda s: len(s.input_ids), default=None)
    return row


def plan_rows(samples: Iterator[Sample], seq_length: int,
              pool_size: int = 64) -> Iterator[tuple[list[Sample], int]]:
    """Choose the samples of each row of at most `seq_length` tokens, from a pool that is refilled.

    With 64 samples to choose from, rows are full to a few tokens and no sample waits for ever.
    Yields the samples of a row, and how many samples were skipped since the previous row because
    they are longer than a row.  Raises ValueError if 1,000 samples are skipped without a row.
    """
    pool = []
    waiting = 0  # tokens in the pool
    skipped = 0
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

        # 64 short samples may not fill a row; with tokens for two rows there is a choice to the end
        if len(pool) >= pool_size and waiting >= 2 * seq_length:
            row = take_row(pool, seq_length)
            waiting -= sum(len(s.input_ids) for s in row)
            yield row, skipped
            skipped = 0

    # the stream has ended: empty the pool
    while pool:
        yield take_row(pool, seq_length), skipped
        skipped = 0


# --------------------------------------------------------------------------------- dealing to ranks


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


# ------------------------------------------------------------------------------- records from files


def is_list_of(values: Any, entry_type: type) -> bool:
    """Whether `values` is a list and all its entries are of this type."""
    return isinstance(values, list) and all(isinstance(value, entry_type) for value in values)


def words_of(key: str) -> list[str]:
    """Words of a key, lower case and singular: "videoPaths" and "video_paths" give video, path."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", key)] or [""]
    # "loss" is singular already
    return [word if word in LEARNING_WORDS else word.removesuffix("s") for word in words]


def refuse_unused(raw: dict, used: set[str], origin: str) -> None:
    """Raise ValueError for a key that is not used but would change what is learnt.

    raw: a record or a turn, as a file has it.  origin: file and number or key of the record.
    """
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
            raise ValueError(f"{origin}: the key {key!r} is not supported, but would change what "
                             "is learnt; remove it or the record")


def check_turn(turn: dict, origin: str) -> None:
    """Raise ValueError for content of a turn that training would ignore."""
    role = turn.get("role", turn.get("from"))
    # A flag may say what this code does anyway: answers are learnt, other turns are not.  In JSON
    # the flag is true or 1, and in Python both are equal to True.
    learnt = role in ("assistant", "gpt")
    agreeing = {key for key in ("weight", "loss", "train", "trainable") if turn.get(key) == learnt}
    refuse_unused(turn, TURN_KEYS | agreeing, origin)

    items = turn.get("content", turn.get("value"))
    if not isinstance(items, list):
        items = [{"type": "text", "text": items}]
    for item in items:
        if not isinstance(item, dict):
            continue  # check_messages will refuse it
        unused = [key for key in item if key not in ("type", "text") and item[key]]
        if unused:
            raise ValueError(f"{origin}: an item of a turn has {unused[0]!r}, only type and text "
                             "are supported: pictures are named in images")
        # in an answer, <video> is text
        text = item.get("text") if role in ("user", "human") else None
        if item.get("type") == "video" or isinstance(text, str) and OTHER_MEDIA.search(text):
            raise ValueError(f"{origin}: there is a video or a sound in a turn, only pictures are "
                             "supported")


def normalize_record(raw: dict, images: list[Path | bytes], origin: str) -> Record:
    """A record from any of the field's schemas: `messages`, LLaVA's `conversations`, or `texts`.

    The key `system` may hold a system prompt.  Raises ValueError with the record's origin.
    """
    schemas = [key for key in ("messages", "conversations", "texts") if raw.get(key)]
    if not schemas:
        raise ValueError(f"{origin} has neither messages nor conversations")
    if len(schemas) > 1:
        raise ValueError(f"{origin} has {' and '.join(schemas)}: which is meant?")
    schema = schemas[0]
    turns = raw[schema]
    if not is_list_of(turns, dict):
        raise ValueError(f"{origin}: {schema} is not a list of turns")
    for turn in turns:
        check_turn(turn, origin)

    # LLaVA has other names for the same keys and roles
    if schema == "conversations":
        roles = {"human": "user", "gpt": "assistant"}
        try:
            turns = [{"role": roles.get(turn["from"], turn["from"]), "content": turn["value"]}
                     for turn in turns]
        except (KeyError, TypeError):
            raise ValueError(f"{origin}: conversations is not a list of from and value") from None

    system = raw.get("system")
    if system:
        if not isinstance(system, str) or turns[0].get("role") == "system":
            raise ValueError(f"{origin}: system is {system!r}, it must be the text of the only "
                             "system prompt")
        turns = [{"role": "system", "content": system}, *turns]
    return {"id": raw.get("id", origin), "messages": turns, "images": images}


def record_of_json(raw: dict, folder: Path, origin: str) -> Record:
    """The record that an entry of a JSON file describes; picture paths are relative to `folder`."""
    refuse_unused(raw, RECORD_KEYS, origin)
    if raw.get("texts"):
        raise ValueError(f"{origin} has texts, which are for shards: name them messages")
    if raw.get("image") and raw.get("images"):
        raise ValueError(f"{origin} has image and images: which is meant?")
    # either key may hold one path or a list of paths
    paths = raw.get("images") or raw.get("image") or []
    if isinstance(paths, str):
        paths = [paths]
    if not is_list_of(paths, str):
        raise ValueError(f"{origin}: {paths!r} is not a picture's path or a list of them")
    return normalize_record(raw, [folder / path for path in paths], origin)


def read_json(path: Path) -> list[Record]:
    """Records of a .json list or of a .jsonl file."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # without the mark that Windows puts first
        if path.suffix == ".jsonl":
            # JSON allows U+2028 inside a text, and splitlines() would cut there
            entries = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            entries = json.loads(text)
    except BAD_JSON as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not is_list_of(entries, dict):
        raise ValueError(f"{path} is not a list of records")
    return [record_of_json(raw, path.parent, f"{path}[{i}]") for i, raw in enumerate(entries)]


def record_of_shard(fields: dict[str, bytes], origin: str) -> Record:
    """The record of a shard's members with the same key; fields: their contents by name."""
    if "json" not in fields:
        raise ValueError(f"{origin} lacks its member 'json'")
    try:
        raw = json.loads(fields["json"])
    except BAD_JSON as error:
        raise ValueError(f"{origin}: its json is not valid: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{origin}: its json is not an object")
    refuse_unused(raw, SHARD_KEYS, origin)
    if raw.get("media") not in (None, "image", "text"):
        raise ValueError(f"{origin}: its media are {raw['media']!r}, only image and text are "
                         "supported")

    # `name` has the order of the places for pictures; the members may have another order
    names = raw.get("name") or []
    if not is_list_of(names, str):
        raise ValueError(f"{origin}: name is {names!r}, not a list of members")
    for name in names:
        if name not in fields:
            raise ValueError(f"{origin} lacks its member {name!r}")
    return normalize_record(raw, [fields[name] for name in names], origin)


def shard_members(path: Path) -> Iterator[tuple[str, str, bytes]]:
    """(key, field, content) of each member of a shard: a/b.0_x.png has key a/b, field 0_x.png."""
    with tarfile.open(path) as tar:
        for member in tar:
            folder, slash, file = member.name.rpartition("/")
            key, dot, field = file.partition(".")
            # not the files that systems add: macOS's ._* and .DS_Store have an empty key
            hidden = any(part.startswith(".") and part != "." for part in folder.split("/"))
            if member.isfile() and key and dot and not hidden and file not in SYSTEM_FILES:
                yield folder + slash + key, field, tar.extractfile(member).read()


def read_tar(path: Path) -> Iterator[Record]:
    """Records of a WebDataset shard in the quick start's unpacked layout, one after another.

    Neighbouring members with the same key are one record: a `json` with `texts` and the `name`s of
    the pictures, and the pictures themselves.
    """
    try:
        for key, members in groupby(shard_members(path), key=lambda member: member[0]):
            fields = {field: content for _, field, content in members}
            yield record_of_shard(fields, f"{path}:{key}")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is no shard of samples: {error}") from error


# ------------------------------------------------------------------------------- streams of records


def file_records(path: Path, seed: int) -> Iterator[Record]:
    """Endless records of a file: JSON in a new random order each epoch, a shard as it is."""
    if path.suffix not in (".json", ".jsonl", ".tar"):
        raise ValueError(f"{path} is neither .json, .jsonl nor .tar nor captions, questions, mixed")
    if not path.is_file():
        raise ValueError(f"there is no data file {path}")
    rng = random.Random(seed)
    listed = [] if path.suffix == ".tar" else read_json(path)
    while True:
        # one epoch; a shard may be larger than the memory, so each epoch reads it again
        records = read_tar(path) if path.suffix == ".tar" else rng.sample(listed, len(listed))
        empty = True
        for record in records:
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

    rows: list[Any]  # of this rank: Row, or RowShare if ranks share a row
    sums: dict[str, float]  # over all ranks: tokens, labels, samples, images, skipped, costs
    balance: float  # mean cost over largest cost, of rows that ranks compute at the same time


class PackedRows(torch.utils.data.IterableDataset):
    """Endless steps of `rows` packed rows, for a DataLoader with batch_size=None.

    Every rank reads every record, but decodes only the pictures it trains on.  So the rows of a
    step are the same for any number of ranks, and can be dealt by their cost.  All ranks must have
    the same files.
    rank, ranks: among the ranks that train on different rows, this rank's number and their count.
    cost: the costs of a row by name, known without its patches; the first cost decides the dealing.
    cut: makes from a row's samples what a rank trains on: `lay_out` or `parallel.share_row`.
    """

    def __init__(self, data: str, tokenizer: Tokenizer, seq_length: int, seed: int,
                 max_pixels: int = MAX_PIXELS, rows: int = 1, rank: int = 0, ranks: int = 1,
                 cost: Callable[[Row], dict[str, float]] | None = None,
                 cut: Callable[[list[Sample]], Any] = lay_out) -> None:
        self.data, self.seed = data, seed
        self.tokenizer, self.max_pixels = tokenizer, max_pixels
        self.seq_length, self.rows = seq_length, rows
        self.rank, self.ranks = rank, ranks
        self.cost = cost or (lambda row: {"length": float(len(row.input_ids))})
        self.cut = cut

    def __iter__(self) -> Iterator[Step]:
        """Steps without end; worker w of n takes every n-th record, from record w on."""
        first, workers = 0, 1
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            first, workers = worker.id, worker.num_workers
        records = islice(record_stream(self.data, self.seed), first, None, workers)
        samples = (encode(record, self.tokenizer, max_pixels=self.max_pixels) for record in records)
        planned = plan_rows(samples, self.seq_length)
        while True:
            step = list(islice(planned, self.rows))
            yield self.step_of([row for row, _ in step], sum(skipped for _, skipped in step))

    def step_of(self, rows: list[list[Sample]], skipped: int) -> Step:
        """A step for this rank: its own rows are cut, all rows are counted."""
        measured = [lay_out(row, cut=False) for row in rows]
        costs = [self.cost(row) for row in measured]
        first_costs = [next(iter(cost.values())) for cost in costs]
        dealt = deal(first_costs, self.ranks)

        sums = {"tokens": sum(len(row.input_ids) for row in measured),
                "labels": sum(row.labels for row in measured),
                "samples": sum(len(row) for row in rows),
                "images": sum(len(sample.images) for row in rows for sample in row),
                "skipped": skipped}
        for name in costs[0]:
            sums[name] = sum(cost[name] for cost in costs)

        # All ranks compute their first rows at the same time, then their second rows, and so on.
        # Each time they wait for the slowest rank.
        slowest = [max(first_costs[i] for i in together) for together in zip(*dealt)]
        balance = sum(first_costs) / self.ranks / sum(slowest)
        return Step([self.cut(rows[i]) for i in dealt[self.rank]], sums, balance)


# ----------------------------------------------------------------------------------- python data.py


def drawn_texts(seed: int) -> Iterator[str]:
    """Texts of 8,000 drawn records and their templates, for training the tiny tokenizer."""
    for data in ("captions", "questions"):
        for record in islice(drawn_records(data, seed), 4000):
            pieces = render(record["messages"], [1] * len(record["images"]))
            yield from (text for text, repeats, _ in pieces if repeats == 0)


def inspect(data: str, count: int, seq_length: int, save: str) -> None:
    """Print records with what is learnt in brackets, then how full packed rows are."""
    tokenizer = train_tokenizer(drawn_texts(0), 1024)
    for number, record in enumerate(islice(record_stream(data, 0), count)):
        sample = encode(record, tokenizer)
        learnt = int((sample.labels >= 0).sum())
        grids = [grid[1:] for grid in sample.grid_thw.tolist()]
        print(f"\n{number}: {len(sample.input_ids)} tokens, {learnt} learnt, "
              f"pictures of {grids} patches")
        pairs = zip(sample.input_ids.tolist(), sample.labels.tolist())
        for is_learnt, group in groupby(pairs, key=lambda pair: pair[1] != IGNORE):
            text = "".join(tokenizer.decode([token], skip_special_tokens=False)
                           for token, _ in group)
            if is_learnt:
                text = f"[{text}]"
            print(text, end="")
        print()
        for i, image in enumerate(record["images"]):
            if save:
                Path(save).mkdir(parents=True, exist_ok=True)
                open_image(image).save(Path(save) / f"{number}-{i}.png")

    # one step of 50 rows, on one rank
    step = next(iter(PackedRows(data, tokenizer, seq_length, seed=0, rows=50)))
    full = step.sums["tokens"] / (len(step.rows) * seq_length)
    print(f"\n{len(step.rows)} rows of {seq_length}: {step.sums['samples']} samples, "
          f"{full:.1%} full")


def run() -> None:
    """Read the flags of `python data.py` and do what they say."""
    parser = flag_parser("Look at training data.", sys.argv[1:])
    parser.add_argument("command", choices=["inspect"])
    parser.add_argument("--data", default="questions", help="captions, questions, mixed or a file")
    parser.add_argument("--count", type=int, default=4, help="records to print")
    parser.add_argument("--seq-length", type=int, default=1024, help="tokens in a row")
    parser.add_argument("--save", default="", help="directory for the records' pictures")
    flags = parser.parse_args()
    if flags.count < 0 or flags.seq_length < 1:
        raise ValueError("--count must not be negative, --seq-length must be positive")
    inspect(flags.data, flags.count, flags.seq_length, flags.save)


# ------------------------------------------------------- helpers for the command lines of all files


def flag_parser(description: str, arguments: Sequence[str] = ()) -> argparse.ArgumentParser:
    """A parser that raises ValueError with one sentence; argparse would print its usage.

    arguments: a flag that stands twice in them is refused; argparse would use the second.
    """
    def refuse(message: str) -> None:
        raise ValueError(message)

    # what follows -- is no flag
    words = takewhile(lambda word: word != "--", arguments)
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    for flag, times in Counter(flags).items():
        if times > 1:
            refuse(f"{flag} is given {times} times: once is meant")
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.error = refuse
    return parser


def refuse_in_one_sentence(script: str, command: Callable[[], None]) -> None:
    """Run a command.  An error that the user can cause ends it with one line and exit code 2."""
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"{script}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + 2, the number of the signal, as shells have it


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
    refuse_in_one_sentence("data.py", run)
