"""Ask a checkpoint: pictures, videos and words -> an answer, in the terminal, in Python, in a chat.

In: `python sample.py IMAGE... PROMPT` (without IMAGE: plain text); `--messages`, a conversation as
JSON on standard input; `--chat`; `--serve PORT`; `--evaluate FILE`.  Out: the answer, a page and
OpenAI's API, or scores; on standard error, the checkpoint that is asked.  In Python:
`load_chat(DIR)(messages)`.
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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from assets.scenes import held_out_questions
from convert import load_checkpoint, newest_checkpoint
from data import (Record, add_fields, choose_device, choose_dtype, encode, flag_parser, load_json,
                  refuse_in_one_sentence, render)
from model import CachedKeys, KVCache, LlavaOneVision, sample_tokens
from vision import (MAX_PIXELS, MIN_PIXELS, Picture, Video, normalize_patches, open_image,
                    visual_tokens, UNREADABLE)

VIDEOS = {".mp4", ".mkv", ".mov", ".webm", ".avi"}  # films; animations say so themselves
DOWNLOAD = 2**26  # bytes of a picture from the net, at most
PAGE = Path(__file__).parent / "assets" / "page.html"
BODY = 2**25  # bytes of a request to the server, at most
AREA = 2**25  # pixels of a picture or video in such a request, at most
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
                  "top_p": (1e-9, 1.0), "repetition_penalty": (1e-3, 1e3), "seed": (0, 2**63 - 1)}
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            # type(), since for isinstance() true is an int; NaN fails the comparison
            if type(value) not in (int, type(most)) or not least <= value <= most:
                kind = "a whole number " if isinstance(most, int) else ""
                raise ValueError(f"{name} must be {kind}from {least:g} to {most:g}, it is "
                                 f"{value!r}")
        stop = texts_of(self.stop)
        if stop is None or "" in stop:
            raise ValueError(f"stop must be strings, none empty, it is {str(stop)[:80]}")
        object.__setattr__(self, "stop", tuple(stop))


def texts_of(value: Any) -> list[str] | None:
    """A text, or a list or tuple of texts, as a list; None for anything else."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
        return [*texts]
    return None


def read_source(source: Any, local: bool) -> Picture:
    """The picture that a message names: a data URL or, if `local`, a path, a URL or a PIL image.

    Raises ValueError if it cannot be had.
    """
    text = source if isinstance(source, str) else ""
    if text.startswith("data:"):
        content = text.partition(";base64,")[2]
        try:
            return base64.b64decode(content or "?", validate=True)  # ? is no base64
        except binascii.Error:
            raise ValueError("a data URL must be data:image/TYPE;base64, and the bytes in base64"
                             ) from None
    if not local:
        raise ValueError(f"pictures must come as data URLs, not as {str(source)[:80]!r}")
    if text.startswith(("http://", "https://")):
        try:
            with urllib.request.urlopen(source, timeout=30) as answer:
                content = answer.read(DOWNLOAD + 1)
        except (OSError, ValueError, HTTPException) as error:
            raise ValueError(f"{source} cannot be fetched: {error}") from error
        if len(content) > DOWNLOAD:
            raise ValueError(f"{source} has more than {DOWNLOAD:,} bytes")
        return content
    if text:
        return Path(text.removeprefix("file://"))
    if isinstance(source, Image.Image | Path):
        return source
    raise ValueError(f"{source!r} is no picture: give a path, a URL or a PIL image")


def read_part(part: Any, images: list[Picture | Video], local: bool) -> dict:
    """An item of a message's content, as `data.render` wants it; its picture joins `images`.

    In Hugging Face's formats {"type": "image", "image" or "url" or "path": SOURCE}, in OpenAI's
    {"type": "image_url", "image_url": {"url": SOURCE}}; "video" likewise.
    """
    kind = str(part.get("type")) if isinstance(part, dict) else ""
    if kind == "text" and part.keys() == {"type", "text"} and isinstance(part["text"], str):
        return part
    name = kind.removesuffix("_url")
    if name not in ("image", "video"):
        raise ValueError(f"{str(part)[:80]} is no part of a message, neither text nor image nor "
                         "video")
    keys = part.keys() - {"type"}
    if len(keys) != 1 or not keys <= {name, f"{name}_url", "url", "path"}:
        raise ValueError(f"a part of type {kind} must have one source and nothing else, it has "
                         f"{', '.join(sorted(keys))}")
    source = part[keys.pop()]
    # OpenAI's detail chooses a size, which here is --max-pixels for all pictures
    if isinstance(source, dict) and source.keys() <= {"url", "detail"}:
        source = source.get("url")
    picture = read_source(source, local)
    images.append(Video(picture) if name == "video" else picture)
    return {"type": name}


def user_turn(parts: list[dict], text: str) -> dict:
    """A message of the user: pictures, then words."""
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


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
        given = message.items() if isinstance(message, dict) else ()
        if {key for key, value in given if value is not None} != {"role", "content"}:
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


def check_size(image: Picture | Video) -> None:
    """Raise ValueError for a picture or video that cannot be read, or has more pixels than AREA."""
    moves = isinstance(image, Video)
    file = image.file if moves else image
    width, height = open_image(file, decode=False).size
    frames = 1
    if moves:
        # to count the frames of an animation, Pillow reads the whole file, but decodes none
        try:
            with Image.open(io.BytesIO(file)) as opened:
                frames = getattr(opened, "n_frames", 1)
        except UNREADABLE as error:
            raise ValueError(f"a video cannot be read: {error}") from error
    if frames * width * height > AREA:
        raise ValueError(f"a picture or video may have {AREA:,} pixels, one has {frames} times "
                         f"{width} x {height}")


# ------------------------------------------------------------------------------------- the answers


class Cut(NamedTuple):
    """A picture of a prompt, cut into patches."""

    first: int  # the place of its first hole
    digest: bytes  # tells it from another picture in the same place
    patches: Tensor  # (P, 588) uint8
    grid: Tensor  # (1, 3)


def join_cuts(cuts: list[Cut], device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """What the model takes of pictures: patches (P, 588), normalised, and grid_thw (I, 3)."""
    if not cuts:
        return None, None
    patches = torch.cat([cut.patches for cut in cuts]).to(device)
    return normalize_patches(patches), torch.cat([cut.grid for cut in cuts]).to(device)


class Request:
    """A prompt and its answer, which grows.  `pieces` has the text as it comes, then None."""

    def __init__(self, record: Record, tokenizer: Tokenizer, settings: Settings = Settings(),
                 max_pixels: int = MAX_PIXELS) -> None:
        """Encode the prompt.  Raises ValueError for what is malformed."""
        self.record = record
        self.sample = encode(record, tokenizer, (MIN_PIXELS, max_pixels), generation_prompt=True)
        self.tokenizer, self.settings = tokenizer, settings
        self.ids: list[int] = self.sample.input_ids.tolist()
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.answer: list[int] = []  # tokens
        self.text = ""
        self.shown = 0  # characters
        self.reason = ""  # why it has ended: "stop", "length", "cancelled" or "error"
        self.pieces: SimpleQueue[str | None] = SimpleQueue()

    @cached_property
    def pictures(self) -> list[Cut]:
        """The pictures of the prompt, decoded.  Raises ValueError if that is not possible."""
        cuts = []
        pads = [self.tokenizer.token_to_id(f"<|{kind}_pad|>") for kind in ("image", "video")]
        holes = [place for place, token in enumerate(self.ids) if token in pads]
        for i, grid in enumerate(self.sample.grid_thw[:, None]):
            patches = self.sample.patches(i)
            # with the grid: blank pictures of 4 x 6 and of 6 x 4 patches have the same patches
            digest = hashlib.sha256(grid.numpy().tobytes() + patches.numpy().tobytes()).digest()
            cuts.append(Cut(holes[0], digest, patches, grid))
            holes = holes[int(visual_tokens(grid)):]
        return cuts

    def choose(self, logits: Tensor, likeliest: int) -> int:
        """The next token, from logits (V,)."""
        settings = self.settings
        if settings.temperature == 0 and settings.repetition_penalty == 1:
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
        top_k = min(settings.top_k, len(logits))
        return int(sample_tokens(logits[None], settings.temperature, top_k, settings.top_p,
                                 self.generator))

    def take(self, token: int, stop_ids: list[int], room: int) -> None:
        """Add a token to the answer, and give out the text that is certain by now.

        room: for more tokens in the slot.
        """
        if token in stop_ids:
            self.end("stop")
            return
        self.answer.append(token)
        # special tokens are part of an answer, for example those around a box
        self.text = self.tokenizer.decode(self.answer, skip_special_tokens=False)
        stops = self.settings.stop
        found = [at for at in map(self.text.find, stops) if at >= 0]
        if found:
            self.text = self.text[:min(found)]
            self.end("stop")
        elif len(self.answer) >= self.settings.max_new_tokens or room < 1:
            self.end("length")
        # U+FFFD stands for a part of a character of several bytes: wait for the other bytes
        elif not self.text.endswith("\ufffd"):
            # the end of the text may be the beginning of a stop string
            possible = [n for stop in stops for n in range(1, len(stop))
                        if self.text.endswith(stop[:n])]
            self.show(len(self.text) - max(possible, default=0))

    def show(self, end: int) -> None:
        """Give out the text up to a character."""
        if end > self.shown:
            self.pieces.put(self.text[self.shown:end])
            self.shown = end

    def end(self, reason: str) -> None:
        """The answer is complete, or nobody wants it any more.  Only the first reason counts."""
        if not self.reason:
            self.reason = reason
            self.show(len(self.text))
            self.pieces.put(None)


@dataclass
class Slot:
    """A slot of the cache: its last request, and how far the request's keys are there."""

    number: int  # of the slot, from 0
    request: Request | None = None  # the one that it answers, or answered last
    filled: int = 0  # tokens of its prompt and answer
    used: float = 0.0  # when a pass used it last

    @property
    def busy(self) -> bool:
        return self.request is not None and not self.request.reason

    @property
    def ids(self) -> list[int]:
        return self.request.ids + self.request.answer

    def shared_with(self, request: Request) -> int:
        """How many tokens at the beginning of a prompt need not be computed again."""
        if self.request is None:
            return 0
        # the last token of the prompt is computed anyway: its logits are wanted
        shared = len(os.path.commonprefix([self.ids[:self.filled], request.ids[:-1]]))
        here = {(cut.first, cut.digest) for cut in self.request.pictures}
        # all pictures have the same ids, so that another one is found by its digest
        others = [cut.first for cut in request.pictures if (cut.first, cut.digest) not in here]
        return min([shared, *others])


class Chat:
    """Answers conversations, several at a time, each in a slot of a cache: `chat(messages)`."""

    def __init__(self, model: LlavaOneVision, tokenizer: Tokenizer, context: int = 8192,
                 slots: int = 8, max_pixels: int = MAX_PIXELS) -> None:
        self.model, self.tokenizer, self.max_pixels = model, tokenizer, max_pixels
        self.capacity = min(context, model.config.max_position_embeddings)
        try:
            self.cache = KVCache(model.config, slots, self.capacity,
                                 like=model.model.embed_tokens.weight)
        except RuntimeError as error:  # of PyTorch's allocators
            raise ValueError(f"{slots} x {self.capacity} tokens of a cache do not fit into memory: "
                             "lower --slots, --context or --max-new-tokens") from error
        self.slots = [*map(Slot, range(slots))]
        self.waiting: deque[Request] = deque()
        # <|im_end|> ends a turn of a conversation, <|endoftext|> a plain text
        self.stop_ids = [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]

    def request(self, messages: list[dict], local: bool = True, **settings: Any) -> Request:
        """A request for a conversation; settings: see Settings."""
        record = to_record(messages, local)
        if not local:
            # a small file may hold more pixels than there is memory for
            for image in record["images"]:
                check_size(image)
        return Request(record, self.tokenizer, Settings(**settings), self.max_pixels)

    def submit(self, request: Request) -> None:
        """Queue a request.  Raises ValueError if its prompt does not fit a slot."""
        if len(request.ids) >= self.capacity:
            raise ValueError(f"the prompt has {len(request.ids)} tokens, but there is room for "
                             f"{self.capacity}: the model's context is "
                             f"{self.model.config.max_position_embeddings}, --context may be less")
        _ = request.pictures  # decoded here, not on the thread that runs the model
        self.waiting.append(request)

    def step(self) -> bool:
        """One pass of the model: over new prompts if there are any, else a token for each answer.

        Returns False if there is nothing to do.
        """
        slots = self.place_waiting() or [slot for slot in self.slots if slot.busy]
        if not slots:
            return False
        logits = self.forward(slots)  # (S, V)
        for slot, scores, best in zip(slots, logits, logits.argmax(-1).tolist()):
            token = slot.request.choose(scores, best)
            slot.request.take(token, self.stop_ids, self.capacity - slot.filled)
        return True

    def place_waiting(self) -> list[Slot]:
        """Give free slots to requests that wait; returns these slots, in rising order."""
        placed = []
        for _ in range(len(self.waiting)):  # meanwhile other threads may append
            request = self.waiting.popleft()
            if request.reason:
                continue  # it was cancelled
            free = [slot for slot in self.slots if not slot.busy]
            if not free:
                self.waiting.append(request)
                continue
            # the slot with the longest common beginning, of these the one unused for longest
            best = max(free, key=lambda slot: (slot.shared_with(request), -slot.used))
            best.filled = best.shared_with(request)
            best.request = request
            placed.append(best)
        return sorted(placed, key=lambda slot: slot.number)

    def forward(self, slots: list[Slot]) -> Tensor:
        """Logits (S, V) behind the tokens that these slots lack: the rest of a prompt, or one."""
        device = self.cache.k.device
        ids, positions = [], []
        cuts, lengths = [], [0]
        for slot in slots:
            rest = range(slot.filled, len(slot.ids))
            ids += slot.ids[slot.filled:]
            positions += rest
            lengths.append(len(rest))
            cuts += [cut for cut in slot.request.pictures if cut.first >= slot.filled]
        keys = CachedKeys(self.cache, [slot.number for slot in slots],
                          fresh=not any(slot.filled for slot in slots))
        logits = self.model.next_logits(
            torch.tensor(ids, device=device), torch.tensor(lengths, device=device).cumsum(0),
            torch.tensor(positions, device=device), keys, *join_cuts(cuts, device))
        # not before: a pass that was interrupted has left no keys
        for slot in slots:
            slot.filled = len(slot.ids)
            slot.used = time.monotonic()
        return logits

    def pieces(self, request: Request) -> Iterator[str]:
        """The answer in pieces of complete characters; other requests go on meanwhile."""
        def next_piece() -> str | None:
            while request.pieces.empty():
                self.step()
            return request.pieces.get()

        self.submit(request)
        try:
            yield from iter(next_piece, None)
        finally:
            request.end("cancelled")  # if nobody reads on; else it has ended already

    def answers(self, requests: list[Request]) -> list[str]:
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

    def stream(self, messages: list[dict], **settings: Any) -> Iterator[str]:
        """The answer to a conversation in pieces, as they come."""
        return self.pieces(self.request(messages, **settings))

    def __call__(self, messages: list, **settings: Any) -> Any:
        """The answer to a conversation; of a list of conversations, the list of answers."""
        if messages and isinstance(messages[0], list):
            return self.answers([self.request(one, **settings) for one in messages])
        return "".join(self.stream(messages, **settings))


def find_directory(name: str) -> Path:
    """The directory of a checkpoint; OWNER/NAME is fetched from Hugging Face if it is no directory.

    Raises ValueError if it cannot be had.
    """
    if Path(name).is_dir() or name.count("/") != 1 or name.startswith((".", "/")):
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(name))
    except ImportError:
        raise ValueError(f"there is no directory {name}; to fetch it, pip install huggingface_hub, "
                         f"or run `git clone https://huggingface.co/{name}`") from None
    except (OSError, ValueError) as error:
        first, _, _ = str(error).partition("\n")  # of several lines, it says what happened
        raise ValueError(f"{name} cannot be fetched: {first}") from error


def choose_checkpoint(name: str) -> tuple[Path, str]:
    """The directory of this name, else the newest checkpoint; and a line that says which it is."""
    path, origin = (find_directory(name), "as told") if name else newest_checkpoint()
    return path, f"checkpoint: {path} ({origin})"


def load_chat(path: str | Path, device: str = "", dtype: str = "", **options: int) -> Chat:
    """A checkpoint, ready to answer; options: context, slots and max_pixels of Chat."""
    place = choose_device(device)
    loaded = load_checkpoint(find_directory(str(path)), choose_dtype(dtype, place), place)
    return Chat(*loaded, **options)


# -------------------------------------------------------------------------------------- evaluation


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of characters that make b from a."""
    line = [*range(len(b) + 1)]  # from the beginning of a so far to each beginning of b
    for x in a:
        above, line = line, [line[0] + 1]
        for j, y in enumerate(b):
            # x deleted, y inserted, or x replaced by y
            replaced = above[j] if x == y else above[j] + 1
            line.append(min(above[j + 1] + 1, line[j] + 1, replaced))
    return line[-1]


def as_number(text: str) -> float:
    """The number that a text is, with commas between thousands or in per cent perhaps; else NaN."""
    text = plain(text).replace(",", "")
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        return math.nan
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
    if not target or not math.isfinite(number - target):
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


def read_question(entry: Any, number: int, folder: Path) -> dict:
    """A question from a line of a file: `messages`, or `question` and perhaps `image` or `images`;
    `answer` (a text or several accepted ones); perhaps `id`, `category` and `metric`.
    Raises ValueError for what is wrong."""
    known = {"messages", "image", "images", "question", "answer", "id", "category", "metric"}
    if not isinstance(entry, dict) or not entry.keys() <= known:
        raise ValueError(f"it must be an object with no other keys than {', '.join(sorted(known))}")
    asked = entry.keys() & {"messages", "question", "image", "images"}
    if asked not in ({"messages"}, {"question"}, {"question", "image"}, {"question", "images"}):
        raise ValueError("it must have messages, or a question and perhaps image or images")
    answers = texts_of(entry.get("answer"))
    if not answers:
        raise ValueError("answer must be a text or a list of accepted texts")
    metric = entry.get("metric", "exact")
    if metric not in [*METRICS]:
        raise ValueError(f"there is no metric {metric!r}, only {', '.join(METRICS)}")

    messages = entry.get("messages")
    if "question" in entry:
        images = texts_of(entry.get("images", entry.get("image", [])))
        if images is None:
            raise ValueError("image or images must be names of files")
        parts = [{"type": "image", "image": folder / name} for name in images]
        messages = [user_turn(parts, entry["question"])]
    to_record(messages)  # raises ValueError if it is none
    return {"id": str(entry.get("id", number)), "messages": messages, "answers": answers,
            "metric": metric, "category": str(entry.get("category", "all"))}


def read_predictions(file: Path, asked: list[dict]) -> list[dict]:
    """The lines of a file of predictions.  Raises ValueError if they are of other questions."""
    if not file.is_file():
        return []
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1  # the last line may have been cut
    kept = [load_json(line, file) for line in content[:whole].splitlines()][:len(asked)]
    for number, (entry, about) in enumerate(zip(kept, asked), 1):
        if not isinstance(entry, dict) or not about.items() <= entry.items():
            raise ValueError(f"{file}, line {number} is of another question, checkpoint or "
                             "settings")
    os.truncate(file, whole)
    return kept


def evaluate(chat: Chat, questions: list[dict], done: str | Path = os.devnull,
             checkpoint: str = "", **settings: Any) -> dict[str, list[float]]:
    """Ask questions; the scores of each category.

    done: a file that keeps the predictions, as JSON lines, so that a second run goes on; with them
    it keeps `checkpoint`, the model's name, and the settings, which must then be the same.
    """
    asked = []
    all_settings = settings | {"max_pixels": chat.max_pixels,
                               "dtype": str(chat.model.lm_head.weight.dtype)}
    settings_read = json.loads(json.dumps(all_settings))  # as a file gives them back: no tuples
    for question in questions:
        # of the messages the texts and the names of pictures, to know the question again
        record = to_record(question["messages"])
        texts = [part.get("text") for turn in record["messages"] for part in turn["content"]]
        files = [str(image) for image in record["images"] if isinstance(image, Path)]
        asked.append({**question, "messages": texts, "files": files, "checkpoint": checkpoint,
                      "settings": settings_read})
    done = Path(done or os.devnull)
    kept = read_predictions(done, asked)
    with open(done, "a") as file:
        while len(kept) < len(questions):
            group = slice(len(kept), len(kept) + len(chat.slots))
            messages = [question["messages"] for question in questions[group]]
            for about, answer in zip(asked[group], chat(messages, **settings)):
                metric = METRICS[about["metric"]]
                score = max(metric(answer, wanted) for wanted in about["answers"])
                kept.append({**about, "prediction": answer, "score": score})
                print(json.dumps(kept[-1]), file=file, flush=True)
    scores: dict[str, list[float]] = {}
    for entry in kept:
        scores.setdefault(entry["category"], []).append(entry["score"])
    return scores


def interval(scores: list[float]) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean of scores between 0 and 1."""
    mean = sum(scores) / len(scores)
    a = 1.96**2 / len(scores)
    middle = (mean + a / 2) / (1 + a)
    half = math.sqrt(a * mean * (1 - mean) + a * a / 4) / (1 + a)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def held_out(per_category: int) -> list[dict]:
    """The held-out questions of the drawn data, for `evaluate`."""
    questions = []
    for category, records in held_out_questions(per_category).items():
        for record in records:
            asked, answer = record["messages"]
            # pictures stand before the words
            parts = [{"type": "image", "image": image} for image in record["images"]]
            messages = [user_turn(parts, asked["content"][-1]["text"])]
            questions.append({"id": record["id"], "messages": messages, "metric": "exact",
                              "answers": [answer["content"][0]["text"]], "category": category})
    return questions


# -------------------------------------------------------------------------------------- the server


class Refusal(ValueError):
    """An error of a client with its own status of HTTP: Refusal(status, sentence)."""


# Fields of OpenAI's requests whose only value here is that of a request without them.
FIXED = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False,
         "response_format": {"type": "text"}, "tools": [], "tool_choice": "none", "logit_bias": {}}
WITH_USAGE = [{}, {"include_usage": False}, {"include_usage": True}]  # stream_options
# Fields that change no answer: who asks, and what OpenAI keeps.
IDLE = {"user", "safety_identifier", "store", "metadata", "service_tier", "prompt_cache_key"}


def read_body(body: bytes, name: str) -> tuple[list, dict, bool, bool]:
    """Messages, settings, whether to stream and whether with usage, of a request's JSON.

    name: of the model.  Raises ValueError.
    """
    content = load_json(body, "the body")
    if not isinstance(content, dict):
        raise ValueError("the body must be a JSON object")
    given = {key: value for key, value in content.items() if value is not None and key not in IDLE}
    for key, value in {"model": name, **FIXED}.items():
        if given.pop(key, value) != value:
            raise ValueError(f"{key} can only be {json.dumps(value)}")
    # what is left in the end must be settings
    messages = given.pop("messages", None)
    stream = given.pop("stream", False)
    options = given.pop("stream_options", {})
    if type(stream) is not bool or options not in WITH_USAGE:
        raise ValueError("stream and stream_options.include_usage must be true or false")

    for key in ("max_tokens", "max_completion_tokens"):
        if key not in given:
            continue
        if "max_new_tokens" in given:
            raise ValueError(f"{key} is another name of a field that is there already")
        given["max_new_tokens"] = given.pop(key)
    unknown = given.keys() - vars(Settings())
    if unknown:
        raise ValueError(f"there is no field {', '.join(sorted(unknown))[:80]}")
    return messages, given, stream, bool(options.get("include_usage"))


class Server(ThreadingHTTPServer):
    """The page and OpenAI's API, on a thread for each connection; one thread runs the model."""

    request_queue_size = 256  # connections that wait to be accepted

    def __init__(self, host: str, port: int, chat: Chat, name: str, queue: int = 64) -> None:
        self.chat, self.name, self.queue = chat, name, queue
        self.wake = threading.Event()  # there is work for the model
        self.decoders = threading.Semaphore(2)  # pictures are decoded two at a time
        self.connections = threading.Semaphore(CONNECTIONS)
        self.local = host in ("127.0.0.1", "::1", "localhost")
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), Handler)
        threading.Thread(target=self.work, daemon=True).start()

    def work(self) -> None:
        """Answer requests for ever."""
        while True:
            self.wake.wait()
            self.wake.clear()
            try:
                while self.chat.step():
                    pass
            except RuntimeError as error:  # as of a GPU that has no memory left
                print(f"sample.py: {error}", file=sys.stderr)
                for slot in self.chat.slots:
                    if slot.busy:
                        slot.request.end("error")
                self.wake.set()  # others may wait

    def begin(self, messages: list, settings: dict) -> Request:
        """Queue a request.  Raises ValueError if it is malformed, or the queue is full."""
        with self.decoders:
            # asked here, so that no more than two at a time are let in
            if len(self.chat.waiting) >= self.queue:
                raise Refusal(429, f"{self.queue} requests are waiting already: try again later")
            request = self.chat.request(messages, local=False, **settings)
            self.chat.submit(request)
        self.wake.set()
        return request

    def process_request(self, request: socket.socket, address: Any) -> None:
        """Serve a connection in a thread of its own; if there are too many, the next one waits."""
        self.connections.acquire()
        super().process_request(request, address)

    def process_request_thread(self, request: socket.socket, address: Any) -> None:
        super().process_request_thread(request, address)
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
        self.send({"error": error}, status=code)
        # a connection that closes over unread bytes is reset, and the answer may be lost
        self.connection.shutdown(socket.SHUT_WR)
        end = time.monotonic() + 2
        while time.monotonic() < end and self.connection.recv(2**16):
            pass

    def send(self, content: dict | bytes, kind: str = "application/json",
             status: int = 200) -> None:
        """Answer with a whole body, which a HEAD leaves out."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self) -> None:  # noqa: N802
        """The page, or the list of models."""
        path = self.path.partition("?")[0]
        if path == "/":
            self.send(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path == "/v1/models":
            model = {"id": self.server.name, "object": "model", "created": 0, "owned_by": "local"}
            self.send({"object": "list", "data": [model]})
        else:
            self.send_error(404, "there are /, /v1/models and /v1/chat/completions")

    do_HEAD = do_GET

    def do_POST(self) -> None:  # noqa: N802
        """An answer, whole or in pieces."""
        try:
            messages, settings, stream, usage = read_body(self.read(), self.server.name)
            self.late.cancel()  # the request has arrived; the answer may take longer
            request = self.server.begin(messages, settings)
        except Refusal as error:
            self.send_error(*error.args)
            return
        except ValueError as error:
            self.send_error(400, str(error))
            return
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
        if not length.isdecimal():
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
                 "model": self.server.name, "object": "chat.completion"}
        if stream:
            about["object"] = "chat.completion.chunk"
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            # the end of the connection is the end of the answer
            self.send_header("Connection", "close")
            self.end_headers()
        while (piece := self.next_piece(request)) is not None:
            if stream:
                delta = {"role": "assistant", "content": piece}
                choice = {"index": 0, "delta": delta, "finish_reason": None}
                self.event(about | {"choices": [choice]})

        tokens = {"prompt_tokens": len(request.ids), "completion_tokens": len(request.answer),
                  "total_tokens": len(request.ids) + len(request.answer)}
        choice = {"index": 0, "finish_reason": request.reason}
        failure = "the model could not answer"
        if stream:
            last = {"choices": [choice | {"delta": {}}]}
            if request.reason == "error":
                last = {"error": {"message": failure}}
            self.event(about | last)
            if usage:
                self.event(about | {"choices": [], "usage": tokens})
            self.wfile.write(b"data: [DONE]\n\n")
        elif request.reason == "error":
            self.send_error(500, failure)
        else:
            choice["message"] = {"role": "assistant", "content": request.text}
            self.send(about | {"choices": [choice], "usage": tokens})

    def event(self, content: dict) -> None:
        """Send a piece of a streamed answer."""
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())

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


@dataclass(frozen=True)
class Flags:
    """What the command does.  IMAGE... PROMPT, or one of the first four, says what is asked."""

    chat: bool = False  # a conversation in the terminal
    messages: bool = False  # answer messages, as JSON on standard input
    serve: int = 0  # port of a page to chat in, and of OpenAI's API under /v1
    evaluate: str = ""  # file of JSON lines: ask its questions, and print scores
    host: str = "127.0.0.1"  # address that --serve listens on; 127.0.0.1 is for this machine alone
    predictions: str = os.devnull  # where --evaluate keeps its answers, to go on if interrupted
    checkpoint: str = ""  # directory, or OWNER/NAME at Hugging Face; else runs/'s newest, or ours
    max_pixels: int = MAX_PIXELS  # largest area of a picture
    context: int = 8192  # tokens of a conversation at most
    slots: int = 8  # conversations that are answered together
    device: str = ""  # else cuda if there is a GPU, else cpu
    dtype: str = ""  # float32 or bfloat16; else bfloat16 on a GPU, float32 on a CPU
    trace: bool = False  # print the prompt's way through the files, with shapes

    def __post_init__(self) -> None:
        """Raise ValueError for a value out of range."""
        if not 0 <= self.serve < 2**16:
            raise ValueError(f"--serve must be a port from 1 to 65535, it is {self.serve}")
        if self.max_pixels < MIN_PIXELS or self.context < 2 or self.slots < 1:
            raise ValueError(f"--max-pixels must be at least {MIN_PIXELS}, --context 2, --slots 1")
        if self.dtype not in ("", "float32", "bfloat16"):
            raise ValueError(f"--dtype must be float32 or bfloat16, it is {self.dtype}")


@torch.inference_mode()
def trace(model: LlavaOneVision, request: Request) -> None:
    """Print the eight stops of a prompt's way, with shapes and the first numbers."""
    def stop(place: str, x: Tensor | None = None, words: str = "") -> None:
        """Print a stop; of a tensor x, the shape and the first numbers before the words."""
        if x is not None:
            shape = ", ".join(f"{n:,}" for n in x.shape)
            numbers = "".join(f"{n:8.2f}" for n in x.flatten()[:3].tolist())
            words = f"({shape})".ljust(12) + numbers + words
        print(place, words, file=sys.stderr)

    messages, ids = request.record["messages"], request.ids
    counts = visual_tokens(request.sample.grid_thw).tolist()
    text = "".join(f"{piece} x {repeats} " if repeats > 1 else piece for piece, repeats, _ in
                   render(messages, counts, generation_prompt=True))
    stop("1 record         sample.py to_record       ",
         words=f"pictures: {len(counts)}, messages: {len(messages)}")
    stop("2 messages       data.py render            ", words=repr(text))
    stop("3 tokens, labels data.py encode            ",
         words=f"({len(ids)},)  {' '.join(map(str, ids[:8]))} ..., labels in answers alone")

    device = model.lm_head.weight.device
    patches, grid_thw = join_cuts(request.pictures, device)
    if counts:
        stop("4 patches        vision.py image_to_patches", patches)
        # without pictures the ViT does not run
        stop("5 visual tokens  vision.py RiceViT         ", model.visual(patches, grid_thw))
    x = model.embed(torch.tensor(ids, device=device), patches, grid_thw)  # (T, C)
    holes = [f"{cut.first} to {cut.first + count - 1}"
             for cut, count in zip(request.pictures, counts)]
    stop("6 placed         model.py embed            ", x,
         f"  visual tokens {', '.join(holes) or 'none'}")
    hook = model.model.layers[0].self_attn.register_forward_hook(
        lambda module, arguments, out: stop("7 attention      model.py SelfAttention    ", out))
    edges = torch.tensor([0, len(ids)], device=device)
    logits = model.lm_head(model.model(x, edges, wanted=edges[1:] - 1))  # (1, V)
    hook.remove()
    likely = logits[0].float().softmax(-1).topk(3)
    words = [f"{request.tokenizer.decode([i])!r} {p:.2f}"
             for p, i in zip(likely.values.tolist(), likely.indices.tolist())]
    loss = -math.log(likely.values[0])
    stop("8 loss, token    model.py Head             ", logits,
         f"  {', '.join(words)}; loss {loss:.3f} if the first is right")


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


def say(chat: Chat, request: Request) -> None:
    """Print an answer as it comes; Ctrl-C ends it."""
    try:
        for piece in chat.pieces(request):
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()


def ask(inputs: list[str], flags: Flags, settings: Settings) -> None:
    """Answer one prompt, from the command line or, as messages, from standard input."""
    if flags.messages:
        messages = load_json(sys.stdin.buffer.read(), "standard input")
    else:
        *files, prompt = inputs
        messages = [user_turn([*map(media_part, files)], prompt)]
    record = to_record(messages)
    # the pictures first: a wrong file is refused before a checkpoint is fetched and loaded
    for image in record["images"]:
        if not isinstance(image, Video):
            open_image(image, decode=False)
    path, said = choose_checkpoint(flags.checkpoint)
    device = choose_device(flags.device)
    model, tokenizer = load_checkpoint(path, choose_dtype(flags.dtype, device), device)
    request = Request(record, tokenizer, settings, flags.max_pixels)
    # prompt and answer share the context
    chat = Chat(model, tokenizer, len(request.ids) + settings.max_new_tokens, slots=1)
    if flags.trace:
        trace(model, request)
    started = time.monotonic()
    say(chat, request)
    print(said, file=sys.stderr)
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
                turn = user_turn(parts, line)
                parts = []  # a damaged picture would spoil the next turn, too
                request = chat.request([*messages, turn], **vars(settings))
                say(chat, request)
                messages += [turn, {"role": "assistant", "content": request.text}]
        except ValueError as error:
            print(error, file=sys.stderr)


def read_questions(file: Path) -> list[dict]:
    """The questions of a JSON-lines file.  Raises ValueError with the line."""
    questions = []
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line.strip():  # as editors leave at the end
            continue
        place = f"{file}, line {number}"
        entry = load_json(line, place)
        try:
            questions.append(read_question(entry, number, file.parent))
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    if not questions:
        raise ValueError(f"{file} has no questions")
    return questions


def print_scores(chat: Chat, questions: list[dict], done: str, checkpoint: Path,
                 settings: Settings) -> None:
    """Ask questions, and print scores by category, with 95 % intervals."""
    scores = evaluate(chat, questions, done, str(checkpoint.resolve()), **vars(settings))
    every = [score for category in scores.values() for score in category]
    for name, values in {**scores, "together": every}.items():
        low, high = interval(values)
        print(f"{name:30} {100 * sum(values) / len(values):6.1f} %  "
              f"({100 * low:.1f} to {100 * high:.1f}, {len(values):,} questions)")


def parse_flags(arguments: list[str]) -> tuple[list[str], Flags, Settings]:
    """The pictures and the prompt, and the flags.  Raises ValueError for what is wrong."""
    parser = flag_parser("Ask about pictures.", arguments)
    parser.usage = "python sample.py [flags] IMAGE... PROMPT"
    parser.add_argument("inputs", nargs="*", metavar="IMAGE... PROMPT",
                        help="files of pictures and videos, then the question")
    add_fields(parser, Flags)
    add_fields(parser, Settings)
    # "intermixed": a flag may stand between the pictures and the prompt
    given = vars(parser.parse_intermixed_args(arguments))
    inputs = given.pop("inputs")
    flags = Flags(**{name: given.pop(name) for name in vars(Flags())})
    try:
        settings = Settings(**given)
    except ValueError as error:
        name, _, rest = str(error).partition(" ")
        raise ValueError(f"--{name.replace('_', '-')} {rest}") from None

    ways = [inputs, flags.chat, flags.messages, flags.serve, flags.evaluate]
    if len([way for way in ways if way]) != 1:
        raise ValueError("give pictures and a prompt, or one of --chat, --messages, --serve, "
                         "--evaluate")
    # `Path.is_file` raises an error for a long prompt; os.path.isfile answers False
    if inputs and os.path.isfile(inputs[-1]):
        raise ValueError(f"the prompt is missing: {inputs[-1]} is a file")
    return inputs, flags, settings


def run(inputs: list[str], flags: Flags, settings: Settings) -> None:
    if inputs or flags.messages:
        ask(inputs, flags, settings)
        return
    # a wrong file is refused before the model is loaded
    questions = read_questions(Path(flags.evaluate)) if flags.evaluate else []
    slots = 1 if flags.chat else flags.slots
    path, said = choose_checkpoint(flags.checkpoint)
    chat = load_chat(path, flags.device, flags.dtype, context=flags.context, slots=slots,
                     max_pixels=flags.max_pixels)
    print(said, file=sys.stderr)
    if flags.chat:
        converse(chat, settings)
    elif flags.serve:
        name = Path(flags.checkpoint or "llava-onevision-1.5").absolute().name
        server = Server(flags.host, flags.serve, chat, name)
        host = f"[{flags.host}]" if ":" in flags.host else flags.host
        print(f"http://{host}:{flags.serve}/ is a page to chat in, and /v1 OpenAI's API for "
              f"the model {name}", file=sys.stderr, flush=True)
        server.serve_forever()
    else:
        print_scores(chat, questions, flags.predictions, path, settings)


def main() -> None:
    refuse_in_one_sentence("sample.py", lambda: run(*parse_flags(sys.argv[1:])))


if __name__ == "__main__":
    main()
