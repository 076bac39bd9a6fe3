"""The default data set: drawn scenes and shipped flags, with captions and questions about them.

In: `captions`, `questions` or `mixed`, a seed and a number.  Out: the record of this number, of the
form in which `data.py` reads records from files; and the tiny tokenizer.
Called by `data.py`, `sample.py` and `train.py`; calls `vision.py`, and `data.py` for the flags.

The idea.  A scene is a small picture that is drawn on the fly: shapes on a board, a word and a
number, or a bar chart.  One conversation about scenes in five has two pictures.  One scene in ten
is held out for the test; a hash of its content decides.  Flags come from `flags.tar`, and each is
drawn at many sizes.  The test has other sizes, crops and backgrounds than training.

Shapes: a scene has 84 x 84 or 84 x 56 pixels, and a visual token covers 28 x 28 pixels.  So each
cell of a board has its own visual token.

Run `python data.py inspect --show 4 --sheet FILE.png`: prints records and draws their pictures.
"""

import random
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from data import SPECIAL_TOKENS, read_records, render
from vision import open_image

Record = dict  # as in data.py
Question = tuple[str, str, str]  # category, question, answer

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 20),
    "purple": (140, 50, 170),
    "orange": (250, 130, 20),
    "brown": (130, 80, 50),
    "black": (20, 20, 20),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "cream": (250, 240, 215),
    "mist": (220, 232, 240),
}
SHAPES = "circle square triangle cross diamond ring".split()
PLACES = ("top left, top middle, top right, middle left, center, middle right, bottom left, "
          "bottom middle, bottom right".split(", "))
WORDS = ("sun cat dog tree fish moon bird star milk book door ship rain king lamp frog hand road "
         "salt wolf".split())
CATEGORIES = ("colour, shape, count, position, word, number, chart, two pictures, flag country, "
              "flag continent, flag colours".split(", "))
GREY = (200, 200, 200)
FONT = ImageFont.load_default(size=24)
# Qwen cuts a text into these parts, and merges bytes only inside a part: contractions, words,
# single digits, symbols, spaces.
WORD_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
                r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


# ------------------------------------------------------------------------------------------- scenes


@dataclass(frozen=True)
class Scene:
    """A picture that can be drawn, its caption, and questions about it."""

    facts: tuple  # all content that questions ask for; decides whether the scene is held out
    draw: Callable[[random.Random], Image.Image]  # sizes and shifts vary
    things: list[tuple[str, ...]]  # the words of the caption, those of a thing together
    questions: list[Question]  # in no order that matters

    @property
    def held_out(self) -> bool:
        """Whether the scene is one of the tenth that is never trained on; facts alone decide."""
        return zlib.crc32(repr(self.facts).encode()) % 10 == 0


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, fill: tuple[int, int, int],
               x: int, y: int, r: int) -> None:
    """One filled shape of radius r around (x, y), in pixels."""
    # y grows downwards
    left, right = x - r, x + r
    top, bottom = y - r, y + r
    box = (left, top, right, bottom)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=4)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        corners = [(x, top), (left, bottom), (right, bottom)]
        draw.polygon(corners, fill=fill)
    elif shape == "diamond":
        corners = [(x, top), (left, y), (x, bottom), (right, y)]
        draw.polygon(corners, fill=fill)
    else:
        # a cross is two bars of seven pixels
        draw.rectangle((left, y - 3, right, y + 3), fill=fill)
        draw.rectangle((x - 3, top, x + 3, bottom), fill=fill)


def objects_scene(rng: random.Random) -> Scene:
    """One to five shapes on a 3 x 3 board: colour, shape, position, counting."""
    background = rng.choice(list(BACKGROUNDS))
    number = rng.randint(1, 5)
    # of few kinds, so that there is something to count: of six, most would be there once or never
    kinds = rng.sample(SHAPES, rng.randint(1, 3))
    objects = []
    for cell in sorted(rng.sample(range(9), number)):
        colour = rng.choice(list(COLOURS))
        objects.append((cell, colour, rng.choice(kinds)))

    def draw(rng: random.Random) -> Image.Image:
        image = Image.new("RGB", (84, 84), BACKGROUNDS[background])
        canvas = ImageDraw.Draw(image)
        # the lines of the board: what a patch shows says where on the board it is
        for at in (28, 56):
            canvas.line((at, 0, at, 84), fill=GREY, width=2)
            canvas.line((0, at, 84, at), fill=GREY, width=2)
        for cell, colour, shape in objects:
            # cells are numbered like words on a page, three in a line
            x = 28 * (cell % 3) + 14 + rng.randint(-2, 2)
            y = 28 * (cell // 3) + 14 + rng.randint(-2, 2)
            radius = rng.randint(9, 11)
            draw_shape(canvas, shape, COLOURS[colour], x, y, radius)
        return image

    things = [(colour, shape, PLACES[cell]) for cell, colour, shape in objects]
    # the shift and size of a shape are no facts: no answer depends on them
    facts = ("objects", background, *objects)
    return Scene(facts, draw, things, object_questions(rng, objects))


def object_questions(rng: random.Random, objects: list[tuple[int, str, str]]) -> list[Question]:
    """Questions about objects, each a (cell, colour, shape)."""
    shapes = [shape for _, _, shape in objects]
    colours = [colour for _, colour, _ in objects]
    names = {cell: f"{colour} {shape}" for cell, colour, shape in objects}
    number = Counter([*shapes, *colours, *names.values()])

    # ask for the number of two random shapes, which may be 0, and of all shapes in the picture
    questions = [("count", "How many objects are there?", str(len(objects)))]
    for shape in dict.fromkeys(rng.sample(SHAPES, 2) + shapes):
        plural = "crosses" if shape == "cross" else f"{shape}s"
        questions.append(("count", f"How many {plural} are there?", str(number[shape])))

    # words name an object only if they fit no other object
    for cell, colour, shape in objects:
        name = names[cell]
        if number[shape] == 1:
            questions.append(("colour", f"What colour is the {shape}?", colour))
            questions.append(("position", f"Where is the {shape}?", PLACES[cell]))
        if number[colour] == 1:
            questions.append(("shape", f"Which shape is {colour}?", shape))
        if number[name] == 1:
            questions.append(("position", f"Where is the {name}?", PLACES[cell]))

    # one cell of all nine, often an empty cell, and one cell with an object
    for cell in rng.sample(range(9), 1) + rng.sample(list(names), 1):
        name = names.get(cell, "nothing")
        questions.append(("position", f"What is at the {PLACES[cell]}?", name))
    return questions


def sign_scene(rng: random.Random) -> Scene:
    """A word above a number, or below it: reading."""
    background = rng.choice(list(BACKGROUNDS))
    word = rng.choice(WORDS)
    number = str(rng.randint(10, 99))
    word_ink = rng.choice(list(COLOURS))
    number_ink = rng.choice(list(COLOURS))
    lines = [(word, word_ink), (number, number_ink)]
    if rng.random() < 0.5:
        lines.reverse()

    def draw(rng: random.Random) -> Image.Image:
        image = Image.new("RGB", (84, 56), BACKGROUNDS[background])
        canvas = ImageDraw.Draw(image)
        for i, (text, ink) in enumerate(lines):
            # a line is 28 pixels high; "lm" puts the middle of the text's left edge at (x, y)
            x = 12 + rng.randint(-2, 2)
            y = 28 * i + 14 + rng.randint(-1, 1)
            canvas.text((x, y), text, COLOURS[ink], FONT, anchor="lm")
        return image

    questions = [("word", "Which word is printed?", word),
                 ("number", "Which number is printed?", number),
                 ("colour", "What colour is the word?", word_ink),
                 ("colour", "What colour is the number?", number_ink)]
    things = [(ink, text) for text, ink in lines]
    facts = ("sign", background, *lines)
    return Scene(facts, draw, things, questions)


def chart_scene(rng: random.Random) -> Scene:
    """Two or three bars, one to five units high: reading a chart."""
    number = rng.randint(2, 3)
    colours = rng.sample(list(COLOURS), number)
    heights = [rng.randint(1, 5) for _ in colours]
    bars = list(zip(colours, heights))

    def draw(rng: random.Random) -> Image.Image:
        image = Image.new("RGB", (84, 84), BACKGROUNDS["white"])
        canvas = ImageDraw.Draw(image)
        # grey lines for 0 to 5 units; a unit is 14 pixels, and 0 lies at y = 78
        for unit in range(6):
            y = 78 - 14 * unit
            canvas.line((0, y, 84, y), fill=GREY)
        for i, (colour, height) in enumerate(bars):
            x = 28 * i + 7 + rng.randint(-2, 2)
            top = 78 - 14 * height
            canvas.rectangle((x, top, x + 13, 78), fill=COLOURS[colour])
        return image

    questions = [("chart", f"How high is the {colour} bar?", str(height))
                 for colour, height in bars]
    # "the highest" needs a bar that no other bar equals
    extremes = {"highest": max(heights), "lowest": min(heights)}
    for word, extreme in extremes.items():
        if heights.count(extreme) == 1:
            colour = colours[heights.index(extreme)]
            questions.append(("chart", f"Which bar is the {word}?", colour))
    things = [(f"{colour} bar", str(height)) for colour, height in bars]
    return Scene(("chart", *bars), draw, things, questions)


# Kinds of scenes in captions, and in the test.  With fewer signs digits are learnt late, or never.
SCENES = (objects_scene, objects_scene, sign_scene, sign_scene, chart_scene)
# In questions of the training set: what is asked about objects needs the most practice.
ASKED_SCENES = (objects_scene, objects_scene, objects_scene, sign_scene, chart_scene)


def draw_scene(rng: random.Random, held_out: bool, kinds: tuple[Callable, ...] = SCENES) -> Scene:
    """A random scene of the training set or of the held-out tenth."""
    while True:
        scene = rng.choice(kinds)(rng)
        if scene.held_out == held_out:
            return scene


def scene_questions(rng: random.Random, held_out: bool, most: int) -> Record:
    """One scene, or two as two pictures (one record in five), with up to `most` questions."""
    number = 2 if rng.random() < 0.2 else 1
    kinds = SCENES if held_out else ASKED_SCENES
    scenes = [draw_scene(rng, held_out, kinds) for _ in range(number)]
    images = [scene.draw(rng) for scene in scenes]
    if number == 1:
        return conversation(rng, images, scenes[0].questions, most)

    # "Where is the ring?" -> "Where is the ring in the second picture?"
    questions = []
    for place, scene in zip(("first", "second"), scenes):
        for _, question, answer in scene.questions:
            question = f"{question[:-1]} in the {place} picture?"
            questions.append(("two pictures", question, answer))
    return conversation(rng, images, questions, most)


def scene_caption(rng: random.Random, held_out: bool) -> Record:
    """One scene with its full description."""
    scene = draw_scene(rng, held_out)
    return caption_record(rng, scene.draw(rng), scene.things, "scene caption")


# -------------------------------------------------------------------------------------------- flags

# Width of a flag in pixels.  Multiples of 7 are held out.
WIDTHS = range(48, 104)
# Share of a flag that is cut off each side.  A flag's file is 100 pixels wide, so held-out shares
# cut other columns of pixels than those of training.  Heights differ: at top and bottom a
# held-out crop could cut the same pixels as a training crop, so there are none.
CROPS = (0.0, 0.02, 0.05)
HELD_OUT_CROPS = (0.01, 0.035)
HELD_OUT_BACKGROUNDS = [
    (200, 180, 140),
    (90, 120, 110),
    (60, 50, 80),
    (235, 225, 245),
]


@cache
def read_flags() -> list[Record]:
    """The shipped flags, with their pictures decoded."""
    flags = list(read_records(Path(__file__).parent / "flags.tar"))
    for flag in flags:
        image = open_image(flag["images"][0])
        flag["images"] = [image.convert("RGBA")]
    return flags


def flag_picture(rng: random.Random, flag: Image.Image, held_out: bool) -> Image.Image:
    """The flag at a random size, a little cropped, on a plain background."""
    widths = [width for width in WIDTHS if (width % 7 == 0) == held_out]
    side_crops = CROPS
    backgrounds = [*COLOURS.values(), *BACKGROUNDS.values()]
    if held_out:
        side_crops = HELD_OUT_CROPS
        backgrounds = HELD_OUT_BACKGROUNDS

    # the order of the draws decides every picture of the data set
    width = rng.choice(widths)
    left = rng.choice(side_crops)
    top = rng.choice(CROPS)
    right = rng.choice(side_crops)
    bottom = rng.choice(CROPS)
    background = rng.choice(backgrounds)

    w, h = flag.size
    box = (w * left, h * top, w * (1 - right), h * (1 - bottom))
    height = round(width * h / w)
    flag = flag.crop(box).resize((width, height), Image.Resampling.BILINEAR)

    # margins of up to 8 pixels: left, right, top, bottom
    x = rng.randint(0, 8)
    right_margin = rng.randint(0, 8)
    y = rng.randint(0, 8)
    bottom_margin = rng.randint(0, 8)
    size = (x + width + right_margin, y + height + bottom_margin)
    image = Image.new("RGBA", size, background)
    image.alpha_composite(flag, (x, y))
    return image.convert("RGB")


def flag_questions(rng: random.Random, flag: Record, held_out: bool, most: int) -> Record:
    """A picture of the flag with up to `most` of the shard's questions about it."""
    turns = flag["messages"]
    questions = []
    # turns alternate: question, answer, question, answer, ...
    for question, answer in zip(turns[::2], turns[1::2]):
        text = question["content"].removeprefix("<image>\n")
        questions.append((flag_category(text), text, answer["content"]))
    image = flag_picture(rng, flag["images"][0], held_out)
    return conversation(rng, [image], questions, most)


def flag_category(question: str) -> str:
    """The category of a question of the shard: the question names the fact that it asks for."""
    facts = ("country", "continent", "colours")
    return "flag " + next(fact for fact in facts if fact in question)


def flag_caption(rng: random.Random, flag: Record, held_out: bool) -> Record:
    """A picture of the flag with all three answers as its caption."""
    country, continent, colours = [turn["content"] for turn in flag["messages"][1::2]]
    things = [(f"flag of {country}",), (continent,), (colours,)]
    image = flag_picture(rng, flag["images"][0], held_out)
    return caption_record(rng, image, things, "flag caption")


# ------------------------------------------------------------------------------------------ records


def message(role: str, text: str, images: int = 0) -> dict:
    """A message: the places of its pictures, then its text."""
    content = [{"type": "image"}] * images
    if text:
        content.append({"type": "text", "text": text})
    return {"role": role, "content": content}


def conversation(rng: random.Random, images: list[Image.Image], questions: list[Question],
                 most: int) -> Record:
    """Up to `most` of the questions in random order, pictures in front of the first question."""
    questions = list(dict.fromkeys(questions))  # each once, in a fixed order
    chosen = rng.sample(questions, min(most, len(questions)))
    messages = []
    places = len(images)
    for _, question, answer in chosen:
        messages.append(message("user", question, places))
        messages.append(message("assistant", answer))
        places = 0  # of the turns that follow
    category = chosen[0][0]
    return {"messages": messages, "images": images, "category": category}


def caption_record(rng: random.Random, image: Image.Image, things: list[tuple[str, ...]],
                   category: str) -> Record:
    """The form of upstream's stages 1 and 1.5: the user's turn is the picture and nothing else.

    Each word of a caption has a label.  Things and the words of a thing come in any order.  In a
    fixed order the model learns to go from one thing to the next, and hardly to find a thing by a
    word.  Questions need the second.
    """
    things = rng.sample(things, len(things))
    caption = ", ".join(" ".join(rng.sample(words, len(words))) for words in things)
    messages = [message("user", "", images=1), message("assistant", caption)]
    return {"messages": messages, "images": [image], "category": category}


def draw_record(rng: random.Random, data: str, flags: list[Record], held_out: bool = False,
                most: int = 3, flag_share: float = 0.45) -> Record:
    """A record of `captions`, `questions`, or both `mixed`, about a drawn scene or a flag.

    The arguments alone decide the record.  A conversation has at most `most` questions: with fewer
    a row has more pictures.
    """
    # only mixed data take a random number for this choice
    captions = data == "captions"
    if data == "mixed":
        captions = rng.random() < 0.35
    if rng.random() < flag_share:
        flag = rng.choice(flags)
        if captions:
            return flag_caption(rng, flag, held_out)
        return flag_questions(rng, flag, held_out, most)
    if captions:
        return scene_caption(rng, held_out)
    return scene_questions(rng, held_out, most)


def drawn_record(data: str, seed: int, number: int) -> Record:
    """Training record `number` of `captions`, `questions` or `mixed`."""
    rng = random.Random(f"{data} {seed} {number}")
    return {"id": f"{data} {number}", **draw_record(rng, data, read_flags())}


def held_out_questions(per_category: int) -> dict[str, list[Record]]:
    """The test set: single questions about held-out scenes and flags, the same in every run."""
    chosen = {category: [] for category in CATEGORIES}
    rng = random.Random("questions 0 True")
    flags = read_flags()
    for number in count():
        record = draw_record(rng, "questions", flags, held_out=True, most=1)
        record["id"] = f"held-out question {number}"
        # with one question a record, the category of the record is that of its question
        records = chosen[record["category"]]
        if len(records) < per_category:
            records.append(record)
        missing = [name for name, records in chosen.items() if len(records) < per_category]
        if not missing:
            return chosen


# ---------------------------------------------------------------------------------------- tokenizer


def drawn_texts(seed: int) -> Iterator[str]:
    """Texts of 8,000 drawn records and their templates, for training the tiny tokenizer."""
    for data in ("captions", "questions"):
        for number in range(4000):
            record = drawn_record(data, seed, number)
            pieces = render(record["messages"], [1] * len(record["images"]))
            yield from (text for text, repeats, _ in pieces if repeats == 0)


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
