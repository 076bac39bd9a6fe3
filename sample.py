"""Ask a checkpoint: pictures, videos and words -> an answer, in the terminal, in Python, in a chat.

In: `python sample.py IMAGE... PROMPT` (without IMAGE: plain text), `--chat`, or `--messages` with
a conversation as JSON on standard input.  Out: the answer on standard output; the checkpoint that
gave it on standard error.  In Python: `load_chat(DIR)(messages)`.
Called by people, and by `train.py` for its held-out questions; calls `convert.py`, `data.py`,
`model.py`, `vision.py` and `assets/scenes.py`.

The idea.  The prompt is encoded as in training, but ends with the header of an answer.  One pass
over it fills a cache of keys and values and gives the logits of the first token.  Each further
pass feeds the last token back to the model:

    y_1 = argmax p(. | x),   y_{n+1} = argmax p(. | x, y_1 ... y_n)

With a temperature, a token is drawn from the likely ones instead of the argmax.  The answer ends at
<|im_end|> or <|endoftext|>, at a stop string, after --max-new-tokens, or when the slot is full.

Several requests are answered together.  Each has a slot of the cache, and a pass takes a packed row
of the next tokens of all: whole prompts of different lengths, or one token each, without padding.
A finished conversation stays in its slot.  If the next prompt begins with the same tokens and
pictures, as the next turn of a chat does, only the rest of it is computed:

    in the slot    system, user: [picture] Where is the circle?, assistant: top right
    next prompt    system, user: [picture] Where is the circle?, assistant: top right, user: And ...
                   \\____________________ already computed ___________________/

Shapes: T tokens of the prompts, P patches, M = P / 4 visual tokens, C decoder width, V vocabulary.

Run `python sample.py assets/examples/scene.png "Where is the red circle?"`.  `--trace` prints the
prompt's way through the files, with shapes.
"""

import argparse
import base64
import binascii
import hashlib
import io
import json
import math
import os
import re
import select
import socket
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from assets.scenes import held_out_questions
from convert import load_checkpoint, newest_checkpoint
from data import (Record, add_fields, choose_device, choose_dtype, encode, flag_parser, load_json,
                  refuse_in_one_sentence)
from model import CachedKeys, KVCache, LlavaOneVision, sample_tokens
from vision import (MAX_PIXELS, MIN_PIXELS, Picture, Video, normalize_patches, open_image,
                    visual_tokens, UNREADABLE)

VIDEOS = {".mp4", ".mkv", ".mov", ".webm", ".avi"}  # films; animations say so themselves
DOWNLOAD = 2**26  # bytes of a picture from the net, at most
PAGE = Path(__file__).parent / "assets" / "page.html"
BODY = 2**25  # bytes of a request to the server, at most
AREA = 2**25  # pixels of a picture in such a request, at most
HERE = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:\d+)?")  # Host of a request from here
CONNECTIONS = 512  # of clients at a time


# ----------------------------------------------------------------------------------- what is asked


@dataclass(frozen=True)
class Settings:
    """How an answer is generated; flags and fields of requests have these names."""

    max_new_tokens: int = 1024  # length of the answer at most
    temperature: float = 0.0  # 0 takes the likeliest token
    top_k: int = 0  # draw from so many of the likeliest tokens; 0: from all
    top_p: float = 1.0  # draw from the likeliest tokens of this total probability
    repetition_penalty: float = 1.0  # weakens tokens that were there already; 1: does not
    seed: int = 0  # of the draws
    stop: tuple[str, ...] = ()  # strings that end an answer, and are not part of it

    def __post_init__(self) -> None:
        """Raise ValueError for a value of the wrong type or out of range."""
        ranges = {"max_new_tokens": (1, 2**20), "temperature": (0, 1e6), "top_k": (0, 2**20),
                  "top_p": (1e-9, 1), "repetition_penalty": (1e-3, 1e3), "seed": (0, 2**63 - 1)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            kinds = (int, float) if isinstance(getattr(Settings, name), float) else (int,)
            # type(), since for isinstance() true is an int; NaN fails the comparison
            if type(value) not in kinds or not least <= value <= most:
                raise ValueError(f"{name} must be {'' if len(kinds) == 2 else 'a whole number '}"
                                 f"from {least:g} to {most:g}, it is {value!r}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop must be strings, none empty, it is {self.stop!r}")


def read_source(source: Any, local: bool) -> Picture:
    """The picture that a message names: a data URL or, if `local`, a path, a URL or a PIL image.

    Raises ValueError if it cannot be had.
    """
    if isinstance(source, str) and source.startswith("data:"):
        _, comma, content = source.partition(";base64,")
        try:
            if comma:
                return base64.b64decode(content, validate=True)
        except binascii.Error:
            pass
        raise ValueError("a data URL must be data:image/TYPE;base64, and the bytes in base64")
    if not local:
        raise ValueError(f"pictures must come as data URLs, not as {str(source)[:80]!r}")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(source, timeout=30) as answer:
                content = answer.read(DOWNLOAD + 1)
        except (OSError, ValueError) as error:
            raise ValueError(f"{source} cannot be fetched: {error}") from error
        if len(content) > DOWNLOAD:
            raise ValueError(f"{source} has more than {DOWNLOAD:,} bytes")
        return content
    if isinstance(source, Image.Image | Path):
        return source
    if isinstance(source, str) and source:
        return Path(source.removeprefix("file://"))
    raise ValueError(f"{source!r} is no picture: give a path, a URL or a PIL image")


def read_part(part: Any, images: list[Picture | Video], local: bool) -> dict:
    """An item of a message's content, as `data.render` wants it; its picture joins `images`.

    In Hugging Face's formats {"type": "image", "image" or "url" or "path": SOURCE}, in OpenAI's
    {"type": "image_url", "image_url": {"url": SOURCE}}; "video" likewise.
    """
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and part.keys() == {"type", "text"} and isinstance(part["text"], str):
        return part
    name = kind.removesuffix("_url") if isinstance(kind, str) else ""
    if name not in ("image", "video"):
        raise ValueError(f"{str(part)[:80]} is no part of a message, neither text nor image nor "
                         "video")
    sources = [part[key] for key in (name, f"{name}_url", "url", "path") if key in part]
    unknown = part.keys() - {"type", name, f"{name}_url", "url", "path"}
    if unknown or len(sources) != 1:
        raise ValueError(f"a part of type {kind} must have one source and nothing else, it has "
                         f"{', '.join(sorted(part.keys() - {'type'}))}")
    source = sources[0]
    if isinstance(source, dict) and source.keys() <= {"url", "detail"}:
        source = source.get("url")
    picture = read_source(source, local)
    images.append(Video(picture) if name == "video" else picture)
    return {"type": name}


def to_record(messages: Any, local: bool = True) -> Record:
    """A conversation as a record for `data.encode`.

    messages: [{"role", "content"}], content a text or a list of parts, see `read_part`.
    local: may parts name files and URLs?  Raises ValueError with the offending value.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("the messages must be a list, not empty")
    turns, images = [], []
    for message in messages:
        # OpenAI's package has fields without a value, such as "tool_calls": null
        given = isinstance(message, dict) and {key for key in message if message[key] is not None}
        if given != {"role", "content"}:
            raise ValueError(f"{str(message)[:80]} is no message with role and content alone")
        content = message["content"]
        # as a part, since in a text of its own `<image>` would be the place of a picture
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list):
            raise ValueError(f"the content of a message must be text or a list, not {content!r}")
        turns.append({"role": message["role"],
                      "content": [read_part(part, images, local) for part in parts]})
    if turns[-1]["role"] != "user":
        raise ValueError("the last message must be the user's")
    return {"messages": turns, "images": images, "id": "prompt"}


# ------------------------------------------------------------------------------------- the answers


class Cut(NamedTuple):
    """A picture of a prompt, cut into patches."""

    first: int  # the place of its first hole
    count: int  # holes
    digest: bytes  # of the patches: tells it from another picture in the same place
    patches: Tensor  # (P, 588) uint8
    grid: Tensor  # (1, 3)


class Request:
    """A prompt and its answer, which grows.  `pieces` has the text as it comes, then None."""

    def __init__(self, record: Record, tokenizer: Tokenizer, settings: Settings = Settings(),
                 max_pixels: int = MAX_PIXELS) -> None:
        """Encode the prompt.  Raises ValueError for what is malformed."""
        sample = encode(record, tokenizer, (MIN_PIXELS, max_pixels), generation_prompt=True)
        self.sample, self.tokenizer, self.settings = sample, tokenizer, settings
        self.ids: list[int] = sample.input_ids.tolist()
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.answer: list[int] = []  # tokens
        self.text = ""
        self.shown = 0  # characters
        self.reason = ""  # why it has ended: "stop", "length" or "cancelled"
        self.pieces: SimpleQueue[str | None] = SimpleQueue()

    @cached_property
    def pictures(self) -> list[Cut]:
        """The pictures of the prompt, decoded.  Raises ValueError if that is not possible."""
        sample, cuts = self.sample, []
        pads = [self.tokenizer.token_to_id(f"<|{kind}_pad|>") for kind in ("image", "video")]
        holes = torch.isin(sample.input_ids, torch.tensor(pads)).nonzero()[:, 0].tolist()
        counts = visual_tokens(sample.grid_thw).tolist()
        for i, count in enumerate(counts):
            patches, grid = sample.patches(i), sample.grid_thw[i:i + 1]
            # with the grid: blank pictures of 4 x 6 and of 6 x 4 patches have the same patches
            digest = hashlib.sha256(grid.numpy().tobytes() + patches.numpy().tobytes()).digest()
            cuts.append(Cut(holes[sum(counts[:i])], count, digest, patches, grid))
        return cuts

    def choose(self, logits: Tensor, likeliest: int) -> int:
        """The next token, from logits (V,)."""
        settings = self.settings
        # what is smaller becomes 0 in float32, and nothing can be divided by it
        temperature = settings.temperature if settings.temperature > 1e-30 else 0.0
        if temperature == 0 and settings.repetition_penalty == 1:
            return likeliest
        if settings.repetition_penalty != 1:
            logits = logits.float()
            seen = torch.tensor([*{*self.ids, *self.answer}], device=logits.device)
            there = logits[seen]
            # smaller in both cases: Hugging Face's rule
            weaker = torch.where(there > 0, there / settings.repetition_penalty,
                                 there * settings.repetition_penalty)
            logits = logits.index_copy(0, seen, weaker)
        logits = logits.cpu()  # the generator's numbers are the same with any device
        return int(sample_tokens(logits[None], temperature,
                                 min(settings.top_k, len(logits)), settings.top_p, self.generator))

    def take(self, token: int, stop_ids: Sequence[int], room: int) -> None:
        """Add a token to the answer, and give out the text that is certain by now.

        room: for more tokens in the slot.
        """
        if token in stop_ids:
            self.end("stop")
            return
        self.answer.append(token)
        # special tokens are part of an answer, for example those around a box
        self.text = self.tokenizer.decode(self.answer, skip_special_tokens=False)
        found = [at for at in map(self.text.find, self.settings.stop) if at >= 0]
        if found:
            self.text = self.text[:min(found)]
            self.end("stop")
        elif len(self.answer) >= self.settings.max_new_tokens or room < 1:
            self.end("length")
        # U+FFFD stands for a part of a character of several bytes: wait for the other bytes
        elif not self.text.endswith("\ufffd"):
            self.show(len(self.text) - self.possible_stop())

    def possible_stop(self) -> int:
        """Characters at the end of the text that may be the beginning of a stop string."""
        return max((n for stop in self.settings.stop for n in range(1, len(stop))
                    if self.text.endswith(stop[:n])), default=0)

    def show(self, end: int) -> None:
        """Give out the text up to a character."""
        if end > self.shown:
            self.pieces.put(self.text[self.shown:end])
            self.shown = end

    def end(self, reason: str) -> None:
        """The answer is complete."""
        if not self.reason:
            self.reason = reason
            self.show(len(self.text))
            self.pieces.put(None)


@dataclass
class Slot:
    """What a slot of the cache holds, and the request that uses it."""

    ids: list[int] = field(default_factory=list)  # tokens whose keys are there
    pictures: list[Cut] = field(default_factory=list)
    request: Request | None = None
    used: int = 0  # the pass that used it last

    def shared_with(self, request: Request) -> int:
        """How many tokens at the beginning of a prompt need not be computed again."""
        pairs = enumerate(zip(self.ids, request.ids))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(self.ids), len(request.ids)))
        # the last token is computed anyway: its logits are wanted
        shared = min(shared, len(request.ids) - 1)
        here = {(cut.first, cut.digest) for cut in self.pictures}
        for cut in request.pictures:
            whole = cut.first + cut.count <= shared
            if cut.first < shared and not (whole and (cut.first, cut.digest) in here):
                return cut.first
        return shared


class Engine:
    """Answers several requests at a time, each in a slot of a cache."""

    def __init__(self, model: LlavaOneVision, tokenizer: Tokenizer, slots: int,
                 capacity: int) -> None:
        self.model = model
        self.device = model.lm_head.weight.device
        self.cache = KVCache(model.config, slots, capacity, like=model.model.embed_tokens.weight)
        self.slots = [Slot() for _ in range(slots)]
        self.waiting: deque[Request] = deque()
        # <|im_end|> ends a turn of a conversation, <|endoftext|> a plain text
        self.stop_ids = [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
        self.passes = 0

    def submit(self, request: Request) -> None:
        """Queue a request.  Raises ValueError if its prompt does not fit a slot."""
        if len(request.ids) >= self.cache.capacity:
            raise ValueError(f"the prompt has {len(request.ids)} tokens, but there is room for "
                             f"{self.cache.capacity}, the model's context or --context")
        _ = request.pictures  # decoded here, not on the thread that runs the model
        self.waiting.append(request)

    def step(self) -> bool:
        """One pass of the model: over new prompts if there are any, else a token for each answer.

        Returns False if there is nothing to do.
        """
        for slot in self.slots:
            if slot.request is not None and slot.request.reason:
                slot.request = None  # ended, or cancelled from outside
        for _ in range(len(self.waiting)):  # meanwhile other threads may append
            request = self.waiting.popleft()
            if not request.reason:
                self.waiting.append(request)
        begun = self.place_waiting()
        chosen = begun or [i for i, slot in enumerate(self.slots) if slot.request is not None]
        if not chosen:
            return False
        self.passes += 1
        logits = self.forward(chosen)  # (S, V)
        likeliest = logits.argmax(-1).tolist()
        for i, number in enumerate(chosen):
            slot = self.slots[number]
            slot.used = self.passes
            token = slot.request.choose(logits[i], likeliest[i])
            slot.request.take(token, self.stop_ids, self.cache.capacity - len(slot.ids))
        return True

    def abandon(self, reason: str) -> None:
        """End all requests that are being answered."""
        for slot in self.slots:
            if slot.request is not None:
                slot.request.end(reason)
            slot.ids = []  # their keys may not be there

    def place_waiting(self) -> list[int]:
        """Give free slots to requests that wait; returns these slots, in rising order."""
        placed = []
        while self.waiting:
            free = [i for i, slot in enumerate(self.slots) if slot.request is None]
            if not free:
                break
            request = self.waiting.popleft()
            # the slot with the longest common beginning, of these the one unused for longest
            shared = {i: self.slots[i].shared_with(request) for i in free}
            best = max(free, key=lambda i: (shared[i], -self.slots[i].used))
            slot = self.slots[best]
            slot.request = request
            slot.ids = slot.ids[:shared[best]]
            slot.pictures = request.pictures
            placed.append(best)
        return sorted(placed)

    def forward(self, numbers: list[int]) -> Tensor:
        """Logits (S, V) behind the tokens that these slots lack: the rest of a prompt, or one."""
        slots = [self.slots[number] for number in numbers]
        starts = [len(slot.ids) for slot in slots]
        parts, cuts = [], []
        for slot, start in zip(slots, starts):
            parts.append((slot.request.ids + slot.request.answer)[start:])
            cuts += [cut for cut in slot.pictures if cut.first >= start]
        lengths = torch.tensor([len(part) for part in parts])
        ids = torch.tensor([token for part in parts for token in part])  # (T,)
        positions = torch.cat([torch.arange(start, start + len(part))
                               for start, part in zip(starts, parts)])  # (T,)
        pictures = {}
        if cuts:
            patches = torch.cat([cut.patches for cut in cuts]).to(self.device)
            pictures = {"patches": normalize_patches(patches),
                        "grid_thw": torch.cat([cut.grid for cut in cuts]).to(self.device)}
        keys = CachedKeys(self.cache, numbers, fresh=not any(starts))
        logits = self.model.next_logits(
            ids.to(self.device), F.pad(lengths.cumsum(0), (1, 0)).to(self.device),
            positions.to(self.device), keys, **pictures)
        # not before: a pass that was interrupted has left no keys
        for slot, part in zip(slots, parts):
            slot.ids = slot.ids + part
        return logits

    def stream(self, request: Request) -> Iterator[str]:
        """The answer in pieces of complete characters; other requests go on meanwhile."""
        self.submit(request)
        try:
            while True:
                while request.pieces.empty():
                    self.step()
                piece = request.pieces.get()
                if piece is None:
                    return
                yield piece
        finally:
            request.end("cancelled")  # if nobody reads on; else it has ended already

    def answers(self, requests: Sequence[Request]) -> list[str]:
        """The answers to several requests, computed together."""
        try:
            for request in requests:
                self.submit(request)
            while self.step():
                pass
        finally:
            for request in requests:
                request.end("cancelled")  # if one does not fit; else they have ended already
        return [request.text for request in requests]


def check_size(image: Picture | Video) -> None:
    """Raise ValueError if a small file holds more pixels than there may be memory for."""
    file = image.file if isinstance(image, Video) else image
    width, height = open_image(file, decode=False).size
    frames = 1
    if isinstance(image, Video):
        try:
            with Image.open(io.BytesIO(file)) as opened:
                frames = getattr(opened, "n_frames", 1)
        except UNREADABLE as error:
            raise ValueError(f"a video cannot be read: {error}") from error
    if frames * width * height > AREA:
        raise ValueError(f"a picture or video may have {AREA:,} pixels, one has {frames} times "
                         f"{width} x {height}")


class Chat:
    """Answers conversations: `chat(messages)`."""

    def __init__(self, model: LlavaOneVision, tokenizer: Tokenizer, context: int = 8192,
                 slots: int = 8, max_pixels: int = MAX_PIXELS) -> None:
        capacity = min(context, model.config.max_position_embeddings)
        self.engine = Engine(model, tokenizer, slots, capacity)
        self.tokenizer, self.max_pixels = tokenizer, max_pixels

    def request(self, messages: list[dict], local: bool = True, **settings: Any) -> Request:
        """A request for a conversation; settings: see Settings."""
        record = to_record(messages, local)
        for image in [] if local else record["images"]:
            check_size(image)
        return Request(record, self.tokenizer, Settings(**settings), self.max_pixels)

    def stream(self, messages: list[dict], **settings: Any) -> Iterator[str]:
        """The answer in pieces, as they come."""
        return self.engine.stream(self.request(messages, **settings))

    def __call__(self, messages: list, **settings: Any) -> Any:
        """The answer to a conversation; of a list of conversations, the list of answers."""
        if messages and isinstance(messages[0], list):
            return self.engine.answers([self.request(one, **settings) for one in messages])
        return "".join(self.stream(messages, **settings))


def find_directory(name: str) -> Path:
    """The directory of a checkpoint; OWNER/NAME is fetched from Hugging Face if it is no directory.

    Raises ValueError if it cannot be had.
    """
    if Path(name).is_dir() or name.count("/") != 1 or name.startswith((".", "/")):
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"there is no directory {name}; to fetch it, pip install huggingface_hub, "
                         f"or run `git clone https://huggingface.co/{name}`") from None
    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"{name} cannot be fetched: {error}") from error


def load_chat(path: str, device: str = "", dtype: str = "", **options: int) -> Chat:
    """A checkpoint, ready to answer; options: context, slots and max_pixels of Chat."""
    place = choose_device(device)
    model, tokenizer = load_checkpoint(find_directory(path), choose_dtype(dtype, place), place)
    return Chat(model, tokenizer, **options)


# -------------------------------------------------------------------------------------- evaluation


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of characters that make b from a."""
    line = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, line[0] = line[0], i
        for j, y in enumerate(b, 1):
            # x inserted, y inserted, or x replaced by y
            best = min(line[j] + 1, line[j - 1] + 1, before + (1 if x != y else 0))
            before, line[j] = line[j], best
    return line[-1]


def as_number(text: str) -> float | None:
    """The number that a text is, with commas between thousands or in per cent perhaps; or None."""
    text = plain(text).replace(",", "")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        return None
    if not math.isfinite(number):
        return None
    return number / 100 if text.endswith("%") else number


def plain(text: str) -> str:
    """A text without case, spaces around it and a full stop."""
    return text.strip().rstrip(".").lower()


def exact(answer: str, wanted: str) -> float:
    """Are the plain texts the same?"""
    return float(plain(answer) == plain(wanted))


def relaxed(answer: str, wanted: str) -> float:
    """As `exact`, but numbers may be 5 % apart: for charts.  Source: ChartQA (arXiv 2203.10244)."""
    number, target = as_number(answer), as_number(wanted)
    if number is None or not target:
        return exact(answer, wanted)
    return float(abs(number - target) <= 0.05 * abs(target))


def anls(answer: str, wanted: str) -> float:
    """1 - edit distance / length, below a half 0: for documents.  Source: arXiv 1907.00490."""
    a, b = plain(answer), plain(wanted)
    similarity = 1 - edit_distance(a, b) / max(len(a), len(b), 1)
    return similarity if similarity >= 0.5 else 0.0


def choice(answer: str, wanted: str) -> float:
    """Is the first capital that stands alone the wanted one?  "(B) a cat" and "I say B" are B."""
    found = re.search(r"(?!I[ '][a-z])\b[A-Z]\b", answer)
    return float(found is not None and found[0] == wanted.strip().strip("().").upper())


METRICS = {metric.__name__: metric for metric in (exact, relaxed, anls, choice)}


def is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def read_question(entry: Any, number: int, folder: Path) -> dict:
    """A question from a line of a file: `messages`, or `image` or `images` and `question`; `answer`
    (a text or several accepted ones); perhaps `id`, `category` and `metric`.
    Raises ValueError for what is wrong."""
    known = {"messages", "image", "images", "question", "answer", "id", "category", "metric"}
    if not isinstance(entry, dict) or not entry.keys() <= known:
        raise ValueError(f"it must be an object with no other keys than {', '.join(sorted(known))}")
    wanted = entry.get("answer")
    wanted = [wanted] if isinstance(wanted, str) else wanted
    if not wanted or not is_texts(wanted):
        raise ValueError("answer must be a text or a list of accepted texts")
    metric = entry.get("metric", "exact")
    if metric not in [*METRICS]:
        raise ValueError(f"there is no metric {metric!r}, only {', '.join(METRICS)}")
    if len(entry.keys() & {"messages", "question"}) != 1 or len(
            entry.keys() & {"messages", "image", "images"}) > 1:
        raise ValueError("it must have messages, or a question and perhaps image or images")
    messages = entry.get("messages")
    if messages is None:
        images = entry.get("images", entry.get("image", []))
        images = [images] if isinstance(images, str) else images
        if not is_texts(images):
            raise ValueError(f"image or images must be names of files, not {images!r}")
        parts = [{"type": "image", "image": folder / name} for name in images]
        parts.append({"type": "text", "text": entry["question"]})
        messages = [{"role": "user", "content": parts}]
    return {"id": str(entry.get("id", number)), "messages": messages, "answers": wanted,
            "metric": metric, "category": str(entry.get("category", "all"))}


def kept_of(question: dict) -> dict:
    """What a file of predictions keeps of a question: the texts of its messages, not the pictures.
    """
    texts = [part["text"] for turn in to_record(question["messages"])["messages"]
             for part in turn["content"] if part["type"] == "text"]
    return {**question, "messages": texts}


def read_predictions(done: Path, questions: list[dict]) -> dict[str, dict]:
    """The predictions in a file, by the ids of their questions; none if there is no file.

    Raises ValueError if they are not of these questions.
    """
    if not done.is_file():
        return {}
    content = done.read_bytes()
    whole = content.rfind(b"\n") + 1  # the last line may have been cut
    entries = [load_json(line, done) for line in content[:whole].splitlines()]
    if not all(isinstance(entry, dict) and "prediction" in entry for entry in entries):
        raise ValueError(f"{done} is there already, and holds no predictions")
    kept = {entry["id"]: entry for entry in entries}
    for question in questions:
        entry = kept.get(question["id"], {})
        if entry and {**entry, **kept_of(question)} != entry:
            raise ValueError(f"{done} has another question with the id {question['id']}")
    os.truncate(done, whole)
    return kept


def evaluate(chat: Chat, questions: list[dict], done: Path | None = None,
             **settings: Any) -> dict[str, list[float]]:
    """Ask questions; the scores of each category.

    done: a file that keeps the predictions, as JSON lines, so that a second run goes on.
    """
    kept = {} if done is None else read_predictions(done, questions)
    left = [question for question in questions if question["id"] not in kept]
    slots = len(chat.engine.slots)
    for start in range(0, len(left), slots):
        asked = left[start:start + slots]
        answers = chat([question["messages"] for question in asked], **settings)
        for question, answer in zip(asked, answers):
            metric = METRICS[question["metric"]]
            score = max(metric(answer, wanted) for wanted in question["answers"])
            entry = {**kept_of(question), "prediction": answer, "score": score}
            kept[question["id"]] = entry
            if done is not None:
                with open(done, "a") as file:
                    print(json.dumps(entry), file=file)
    scores: dict[str, list[float]] = {}
    for question in questions:
        scores.setdefault(question["category"], []).append(kept[question["id"]]["score"])
    return scores


def interval(scores: list[float]) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean of scores between 0 and 1."""
    z, count, mean = 1.96, len(scores), sum(scores) / len(scores)
    middle = (mean + z * z / (2 * count)) / (1 + z * z / count)
    spread = math.sqrt(mean * (1 - mean) / count + (z / (2 * count))**2)
    half = spread * z / (1 + z * z / count)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def held_out(per_category: int) -> list[dict]:
    """The held-out questions of the drawn data, for `evaluate`."""
    questions = []
    for category, records in held_out_questions(per_category).items():
        for record in records:
            pictures = iter(record["images"])
            *turns, answer = record["messages"]
            messages = [{"role": turn["role"], "content": [
                part if part["type"] == "text" else {"type": "image", "image": next(pictures)}
                for part in turn["content"]]} for turn in turns]
            questions.append({"id": record["id"], "messages": messages, "metric": "exact",
                              "answers": [answer["content"][0]["text"]], "category": category})
    return questions


# -------------------------------------------------------------------------------------- the server


class Refusal(Exception):
    """An answer to a client that is an error: its status of HTTP, and a sentence."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


# Fields of OpenAI's requests whose only value here is that of a request without them.
FIXED = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False,
         "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "logit_bias": {}}
# Fields that change no answer: who asks, and what OpenAI keeps.
IDLE = ("user", "safety_identifier", "store", "metadata", "service_tier", "prompt_cache_key")


def read_body(body: bytes, name: str) -> tuple[list, dict, bool, bool]:
    """Messages, settings, whether to stream and whether with usage, of a request's JSON.

    name: of the model.  Raises ValueError, or Refusal for another model.
    """
    content = load_json(body, "the body")
    if not isinstance(content, dict):
        raise ValueError("the body must be a JSON object")
    fields_given = {key: value for key, value in content.items() if value is not None}
    messages = fields_given.pop("messages", None)
    model = fields_given.pop("model", name)
    if model != name:
        raise Refusal(404, f"there is no model {str(model)[:80]!r}, only {name}")
    stream = fields_given.pop("stream", False)
    options = fields_given.pop("stream_options", {})
    usage = options.get("include_usage", False) if isinstance(options, dict) else None
    if type(stream) is not bool or type(usage) is not bool or options.keys() - {"include_usage"}:
        raise ValueError("stream and stream_options.include_usage must be true or false")
    for key, value in FIXED.items():
        if fields_given.pop(key, value) != value:
            raise ValueError(f"{key} can only be {json.dumps(value)}")
    for key in IDLE:
        fields_given.pop(key, None)
    if {"max_tokens", "max_completion_tokens"} <= fields_given.keys():
        raise ValueError("max_tokens and max_completion_tokens are two names of one thing")

    # OpenAI has two names for the length of an answer
    names = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
    names |= {entry.name: entry.name for entry in fields(Settings)}
    settings = {ours: fields_given.pop(key) for key, ours in names.items() if key in fields_given}
    stop = settings.pop("stop", [])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list):
        raise ValueError(f"stop must be a text or a list of texts, not {str(stop)[:80]}")
    settings["stop"] = tuple(stop)
    if fields_given:
        raise ValueError(f"there is no field {', '.join(sorted(fields_given))[:80]}")
    return messages, settings, stream, usage


class Server(ThreadingHTTPServer):
    """The page and OpenAI's API, on a thread for each connection; one thread runs the model."""

    daemon_threads = True
    request_queue_size = 256  # connections that wait to be accepted

    def __init__(self, host: str, port: int, chat: Chat, name: str, queue: int = 64) -> None:
        self.chat, self.name, self.queue = chat, name, queue
        self.wake = threading.Event()  # there is work for the model
        self.decoders = threading.Semaphore(2)  # pictures are decoded two at a time
        self.connections = threading.Semaphore(CONNECTIONS)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        self.local = host in ("127.0.0.1", "::1", "localhost")
        threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        """Answer requests for ever."""
        engine = self.chat.engine
        while True:
            self.wake.wait()
            self.wake.clear()
            try:
                while engine.step():
                    pass
            except RuntimeError as error:  # as of a GPU that has no memory left
                print(f"sample.py: {error}", file=sys.stderr)
                engine.abandon("error")
                self.wake.set()  # others may wait

    def begin(self, messages: list, settings: dict) -> Request:
        """Queue a request.  Raises ValueError if it is malformed, Refusal if the queue is full."""
        with self.decoders:
            # asked here, so that no more than two at a time are let in
            if len(self.chat.engine.waiting) >= self.queue:
                raise Refusal(429, f"{self.queue} requests are waiting already: try again later")
            request = self.chat.request(messages, local=False, **settings)
            self.chat.engine.submit(request)
        self.wake.set()
        return request

    def process_request(self, request: socket.socket, address: Any) -> None:
        """Serve a connection in a thread of its own, or close it if there are too many."""
        if not self.connections.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, address)

    def process_request_thread(self, request: socket.socket, address: Any) -> None:
        """Serve a connection to its end."""
        try:
            super().process_request_thread(request, address)
        finally:
            self.connections.release()

    def handle_error(self, request: socket.socket, address: Any) -> None:
        """A connection that breaks is no event."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, address)


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 30  # seconds that a client may be silent

    def handle_one_request(self) -> None:
        """As in the base class, but a request must arrive within a minute."""
        self.late = threading.Timer(60, self.connection.shutdown, [socket.SHUT_RD])
        self.late.start()
        try:
            super().handle_one_request()
        finally:
            self.late.cancel()

    def log_message(self, *arguments: object) -> None:
        """Say nothing about each request."""

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answer with an error as OpenAI's API does: of ours, or of the base class."""
        kind = "invalid_request_error" if code < 500 else "server_error"
        # cut, since it may quote what was sent
        error = {"message": (message or "?")[:400], "type": kind, "param": None, "code": code}
        self.close_connection = True  # what is left of the request was not read
        self.send_json({"error": error}, code)
        # a connection that closes over unread bytes is reset, and the answer may be lost
        self.connection.shutdown(socket.SHUT_WR)
        end = time.monotonic() + 2
        while time.monotonic() < end and self.connection.recv(2**16):
            pass

    def send_json(self, content: dict, status: int = 200) -> None:
        """Answer with JSON."""
        self.send(json.dumps(content).encode(), "application/json", status)

    def send(self, content: bytes, kind: str, status: int = 200) -> None:
        """Answer with a whole body."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_GET(self) -> None:  # noqa: N802
        """The page, or the list of models."""
        path = self.path.partition("?")[0]
        if path == "/":
            self.send(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path == "/v1/models":
            model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "local"}
            self.send_json({"object": "list", "data": [model]})
        else:
            self.send_error(404, "there are /, /v1/models and /v1/chat/completions")

    do_HEAD = do_GET  # `send` leaves out the body

    def do_POST(self) -> None:  # noqa: N802
        """An answer, whole or in pieces."""
        try:
            messages, settings, stream, usage = read_body(self.read(), self.server.name)
            self.late.cancel()  # the request has arrived; the answer may take longer
            request = self.server.begin(messages, settings)
        except ValueError as error:
            self.send_error(400, str(error))
        except Refusal as error:
            self.send_error(error.status, str(error))
        else:
            try:
                self.answer(request, stream, usage)
            finally:
                request.end("cancelled")  # if the client has gone; else it has ended already

    def read(self) -> bytes:
        """The body of a request.  Raises Refusal if it is not one that may be read."""
        if self.path != "/v1/chat/completions":
            raise Refusal(404, "there is only /v1/chat/completions to post to")
        origin = self.headers.get("Origin")
        host = self.headers.get("Host", "")
        # A page of another site could ask through the browser of somebody who is here, also with a
        # name that was made to lead to this machine.
        foreign = self.server.local and not HERE.fullmatch(host)
        if origin and (foreign or origin.partition("://")[2] != host):
            raise Refusal(403, f"requests from pages of {origin[:80]} are not answered")
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit():
            raise Refusal(411, "a request must have a Content-Length")
        if int(length) > BODY:
            raise Refusal(413, f"a request may have {BODY:,} bytes, this one has {length[:20]}")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise Refusal(408, "the request ended before its Content-Length")
        return body

    def answer(self, request: Request, stream: bool, usage: bool) -> None:
        """Send an answer as it comes, or when it is complete."""
        about = {"id": f"chatcmpl-{id(request):x}", "created": int(time.time()),
                 "model": self.server.name}
        chunk = about | {"object": "chat.completion.chunk"}
        if stream:
            self.close_connection = True  # the end of the connection is the end of the answer
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
        while (piece := self.next_piece(request)) is not None:
            if stream:
                delta = {"role": "assistant", "content": piece}
                self.event(chunk, [{"index": 0, "delta": delta, "finish_reason": None}])
        tokens = {"prompt_tokens": len(request.ids), "completion_tokens": len(request.answer),
                  "total_tokens": len(request.ids) + len(request.answer)}
        if request.reason == "error" and stream:
            self.wfile.write(b'data: {"error": {"message": "the model could not answer"}}\n\n')
        elif stream:
            self.event(chunk, [{"index": 0, "delta": {}, "finish_reason": request.reason}])
            if usage:
                self.event(chunk | {"usage": tokens}, [])
        if stream:
            self.wfile.write(b"data: [DONE]\n\n")
            return
        if request.reason == "error":
            self.send_error(500, "the model could not answer")
            return
        message = {"role": "assistant", "content": request.text}
        choice = {"index": 0, "message": message, "finish_reason": request.reason}
        self.send_json(about | {"object": "chat.completion", "choices": [choice], "usage": tokens})

    def event(self, chunk: dict, choices: list[dict]) -> None:
        """Send a piece of a streamed answer."""
        self.wfile.write(f"data: {json.dumps(chunk | {'choices': choices})}\n\n".encode())

    def next_piece(self, request: Request) -> str | None:
        """Wait for the next piece of an answer.  Raises ConnectionError if the client has gone."""
        while True:
            # readable without a byte to read: closed
            readable, _, _ = select.select([self.connection], [], [], 0)
            if readable and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionAbortedError
            try:
                return request.pieces.get(timeout=0.5)
            except Empty:
                pass  # it may still come


# ------------------------------------------------------------------------------------ the terminal


def trace(model: LlavaOneVision, request: Request) -> None:
    """Print the shapes of the prompt, then those of each station of the next forward pass."""

    def show(file: str, what: str, shape: Sequence[int]) -> None:
        print(f"  {file:20} {what:45}({', '.join(f'{n:,}' for n in shape)})", file=sys.stderr)

    def station(module: nn.Module, file: str, what: str) -> None:
        # the hook removes itself: later passes, of one token each, print nothing
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            show(file, what, out.shape)
            handle.remove()
        handle = module.register_forward_hook(hook)

    show("data.py", "encode: token ids of the prompt", [len(request.ids)])
    if request.pictures:
        patches = sum(len(cut.patches) for cut in request.pictures)
        show("vision.py", "image_to_patches: patches of the pictures", [patches, 588])
    # without pictures the ViT does not run, so its stations print nothing
    visual = model.visual
    station(visual.patch_embed, "vision.py", "patch_embed: a vector per patch")
    station(visual.pre_layernorm, "vision.py", "class tokens in front of each picture")
    station(visual.blocks[-1], "vision.py", f"after {len(visual.blocks)} blocks")
    station(visual.merger, "vision.py", "merger: visual tokens, placed in their holes")
    decoder = model.model
    attention = decoder.layers[0].self_attn
    station(decoder.embed_tokens, "model.py", "embed_tokens: a vector per token")
    station(attention.q_proj, "model.py", "first layer: all query heads")
    station(attention.k_proj, "model.py", "first layer: all key heads")
    station(attention, "model.py", "first layer: attention, after o_proj")
    station(decoder.norm, "model.py", f"after {len(decoder.layers)} layers")
    station(model.lm_head, "model.py", "logits of the first word")


def media_part(path: str) -> dict:
    """A file as a part of a message: a video if it is a folder, a film or an animation."""
    moves = os.path.isdir(path) or Path(path).suffix.lower() in VIDEOS
    if not moves:
        open_image(path, decode=False)  # refuses what is no picture
        with Image.open(path) as opened:
            # a photograph of a telephone may hold a second picture, but does not move
            moves = opened.format in ("GIF", "WEBP", "PNG") and opened.is_animated
    kind = "video" if moves else "image"
    return {"type": kind, kind: Path(path)}  # a text may be a URL


def say(engine: Engine, request: Request) -> None:
    """Print an answer as it comes; Ctrl-C ends it."""
    try:
        for piece in engine.stream(request):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        request.end("cancelled")
    print()


def ask(flags: argparse.Namespace, settings: Settings) -> None:
    """Answer one prompt, from the command line or, as messages, from standard input."""
    if flags.messages:
        messages = load_json(sys.stdin.buffer.read(), "standard input")
    else:
        *files, prompt = flags.inputs
        parts = [*map(media_part, files), {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": parts}]
    record = to_record(messages)
    # the pictures first: a wrong file is refused before the model is loaded
    for image in record["images"]:
        if not isinstance(image, Video):
            open_image(image, decode=False)
    model, tokenizer = load(flags)
    request = Request(record, tokenizer, settings, flags.max_pixels)
    # prompt and answer share the context
    capacity = min(model.config.max_position_embeddings,
                   len(request.ids) + settings.max_new_tokens)
    engine = Engine(model, tokenizer, 1, capacity)
    if flags.trace:
        trace(model, request)
    started = time.monotonic()
    say(engine, request)
    if flags.trace:
        print(f"  answered in {time.monotonic() - started:.2f} s", file=sys.stderr)


def converse(chat: Chat, settings: Settings) -> None:
    """A conversation in the terminal.  Lines are turns of the user, or begin with a command."""
    print("/image PATH shows a picture or video with the next turn, /reset begins anew, /quit ends",
          file=sys.stderr)
    messages: list[dict] = []
    parts: list[dict] = []  # of the next turn
    while True:
        try:
            line = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/reset":
                messages, parts = [], []
            elif command == "/image":
                parts.append(media_part(rest.strip()))
            elif line:
                turn = {"role": "user", "content": [*parts, {"type": "text", "text": line}]}
                parts = []  # a damaged picture would spoil the next turn, too
                request = Request(to_record([*messages, turn]), chat.tokenizer, settings,
                                  chat.max_pixels)
                say(chat.engine, request)
                messages += [turn, {"role": "assistant", "content": request.text}]
        except ValueError as error:
            print(error, file=sys.stderr)


def evaluate_file(chat: Chat, file: Path, done: Path | None, settings: Settings) -> None:
    """Ask the questions of a JSON-lines file, and print scores with 95 % intervals."""
    questions = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        place = f"{file}, line {number}"
        entry = load_json(line, place)
        try:
            question = read_question(entry, number, file.parent)
            to_record(question["messages"])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        questions.append(question)
    if len({question["id"] for question in questions}) < len(questions) or not questions:
        raise ValueError(f"{file} must have questions with different ids")
    settings_by_name = {entry.name: getattr(settings, entry.name) for entry in fields(Settings)}
    scores = evaluate(chat, questions, done, **settings_by_name)
    every = [score for category in scores.values() for score in category]
    for name, values in {**scores, "together": every}.items():
        low, high = interval(values)
        print(f"{name:30} {100 * sum(values) / len(values):6.1f} %  "
              f"({100 * low:.1f} to {100 * high:.1f}, {len(values):,} questions)")


def load(flags: argparse.Namespace) -> tuple[LlavaOneVision, Tokenizer]:
    """The checkpoint that the flags name, else the newest; says which it is."""
    if flags.checkpoint:
        checkpoint, origin = find_directory(flags.checkpoint), "as told"
    else:
        checkpoint, origin = newest_checkpoint()
    device = choose_device(flags.device)
    loaded = load_checkpoint(checkpoint, choose_dtype(flags.dtype, device), device)
    print(f"checkpoint: {checkpoint} ({origin})", file=sys.stderr)
    return loaded


def parse_flags(arguments: list[str]) -> tuple[argparse.Namespace, Settings]:
    """The command's flags; raises ValueError for a value out of range."""
    parser = flag_parser("Ask about pictures.", arguments)
    parser.usage = "python sample.py [flags] IMAGE... PROMPT"
    parser.add_argument("inputs", nargs="*", metavar="IMAGE... PROMPT",
                        help="files of pictures and videos, then the question")
    parser.add_argument("--chat", action="store_true", help="a conversation in the terminal")
    parser.add_argument("--messages", action="store_true",
                        help="answer messages, as JSON on standard input")
    parser.add_argument("--serve", type=int, default=0, metavar="PORT",
                        help="a page to chat in, and OpenAI's API under /v1")
    parser.add_argument("--host", default="127.0.0.1",
                        help="address that --serve listens on, default 127.0.0.1, this machine")
    parser.add_argument("--evaluate", default="", metavar="FILE",
                        help="ask the questions of a JSON-lines file, and print scores")
    parser.add_argument("--predictions", default="", metavar="FILE",
                        help="where --evaluate keeps its answers, to go on if it is interrupted")
    parser.add_argument("--checkpoint", default="", help="directory in the released layout, or "
                        "OWNER/NAME at Hugging Face; default: the newest of runs/, else the "
                        "checkpoint of this project")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS,
                        help=f"largest area of a picture, default {MAX_PIXELS:,}")
    parser.add_argument("--context", type=int, default=8192,
                        help="tokens of a conversation at most, default 8192")
    parser.add_argument("--slots", type=int, default=8,
                        help="conversations that are answered together, default 8")
    parser.add_argument("--device", default="", help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--dtype", default="", choices=["", "float32", "bfloat16"],
                        help="default: bfloat16 on a GPU, else float32 (twice the memory)")
    parser.add_argument("--trace", action="store_true",
                        help="print the prompt's way through the files, with shapes")
    add_fields(parser, Settings)

    # "intermixed": a flag may stand between the pictures and the prompt
    flags = parser.parse_intermixed_args(arguments)
    settings = Settings(**{entry.name: getattr(flags, entry.name) for entry in fields(Settings)})
    ways = [name for name in ("chat", "messages", "serve", "evaluate", "inputs")
            if getattr(flags, name)]
    if len(ways) != 1:
        raise ValueError("give pictures and a prompt, or one of --chat, --messages, --serve, "
                         "--evaluate")
    if not 0 <= flags.serve < 2**16:
        raise ValueError(f"--serve must be a port from 1 to 65535, it is {flags.serve}")
    if flags.max_pixels < MIN_PIXELS or flags.context < 2 or flags.slots < 1:
        raise ValueError(f"--max-pixels must be at least {MIN_PIXELS}, --context 2, --slots 1")
    # `Path.is_file` raises an error for a long prompt; os.path.isfile answers False
    if flags.inputs and os.path.isfile(flags.inputs[-1]):
        raise ValueError(f"the prompt is missing: {flags.inputs[-1]} is a file")
    return flags, settings


def run(flags: argparse.Namespace, settings: Settings) -> None:
    if flags.inputs or flags.messages:
        ask(flags, settings)
        return
    model, tokenizer = load(flags)
    slots = 1 if flags.chat else flags.slots
    chat = Chat(model, tokenizer, flags.context, slots, flags.max_pixels)
    if flags.chat:
        converse(chat, settings)
    elif flags.serve:
        name = Path(flags.checkpoint or "llava-onevision-1.5").absolute().name
        server = Server(flags.host, flags.serve, chat, name)
        print(f"http://{flags.host}:{flags.serve}/ is a page to chat in, and /v1 OpenAI's API for "
              f"the model {name}", file=sys.stderr, flush=True)
        server.serve_forever()
    else:
        done = Path(flags.predictions) if flags.predictions else None
        evaluate_file(chat, Path(flags.evaluate), done, settings)


def main() -> None:
    refuse_in_one_sentence("sample.py", lambda: run(*parse_flags(sys.argv[1:])))


if __name__ == "__main__":
    main()
