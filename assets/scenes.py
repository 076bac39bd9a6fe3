"""The default data set: drawn scenes and shipped flags, with captions and questions about them.

In: a kind of records, a seed.  Out: endless records as `data.py` reads them from files.
Called by `data.py` and `train.py`; calls `data.py` for the shard of flags, `vision.py`.

Scenes are small pictures drawn on the fly: shapes on a board, a word and a number, a bar chart, two
of these side by side.  One scene in ten is held out by its content.  Flags come from `flags.tar`;
held out are sizes, side crops and backgrounds.
"""

import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vision import open_image

Record = dict  # as in data.py

COLOURS = {"red": (214, 39, 40), "green": (44, 150, 60), "blue": (40, 80, 220),
           "yellow": (240, 200, 20), "purple": (140, 50, 170), "orange": (250, 130, 20),
           "brown": (130, 80, 50), "black": (20, 20, 20)}
BACKGROUNDS = {"white": (255, 255, 255), "cream": (250, 240, 215), "mist": (220, 232, 240)}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
PLACES = ("top left", "top middle", "top right", "middle left", "center", "middle right",
          "bottom left", "bottom middle", "bottom right")
WORDS = ("sun", "cat", "dog", "tree", "fish", "moon", "bird", "star", "milk", "book", "door",
         "ship", "rain", "king", "lamp", "frog", "hand", "road", "salt", "wolf")
CATEGORIES = ("colour", "shape", "count", "position", "word", "number", "chart", "two pictures",
              "flag country", "flag continent", "flag colours")
FONT = ImageFont.load_default(size=24)


@dataclass(frozen=True)
class Scene:
    """A drawn picture, what a caption says of it, and questions by category."""

    facts: tuple  # everything that is asked about; decides whether the scene is held out
    draw: Callable[[random.Random], Image.Image]
    caption: str
    questions: list[tuple[str, str, str]]  # category, question, answer

    @property
    def held_out(self) -> bool:
        """One scene in ten is never trained on; which one depends on its facts alone."""
        return zlib.crc32(repr(self.facts).encode()) % 10 == 0


def draw_shape(draw: ImageDraw.ImageDraw, shape: str, colour: str, x: int, y: int, r: int) -> None:
    """One filled shape of radius r around (x, y), in pixels."""
    fill, box = COLOURS[colour], (x - r, y - r, x + r, y + r)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "ring":
        draw.ellipse(box, outline=fill, width=4)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    elif shape == "diamond":
        draw.polygon([(x, y - r), (x - r, y), (x, y + r), (x + r, y)], fill=fill)
    else:
        draw.rectangle((x - r, y - 3, x + r, y + 3), fill=fill)
        draw.rectangle((x - 3, y - r, x + 3, y + r), fill=fill)


def objects_scene(rng: random.Random) -> Scene:
    """One to five shapes on a 3 x 3 board: colour, shape, position, counting."""
    background = rng.choice(list(BACKGROUNDS))
    objects = [(cell, rng.choice(list(COLOURS)), rng.choice(SHAPES))
               for cell in sorted(rng.sample(range(9), rng.randint(1, 5)))]

    def draw(rng: random.Random) -> Image.Image:
        image = Image.new("RGB", (84, 84), BACKGROUNDS[background])
        for cell, colour, shape in objects:
            x, y = (28 * i + 14 + rng.randint(-2, 2) for i in (cell % 3, cell // 3))
            draw_shape(ImageDraw.Draw(image), shape, colour, x, y, rng.randint(9, 11))
        return image

    shapes = [shape for _, _, shape in objects]
    colours = [colour for _, colour, _ in objects]
    questions = [("count", "How many objects are there?", str(len(objects)))]
    for shape in rng.sample(SHAPES, 2) + rng.sample(shapes, 1):
        questions.append(("count", f"How many {shape}s are there?".replace("crosss", "crosses"),
                          str(shapes.count(shape))))
    taken = {}
    for cell, colour, shape in objects:
        taken[cell] = f"{colour} {shape}"
        if shapes.count(shape) == 1:
            questions += [("colour", f"What colour is the {shape}?", colour),
                          ("position", f"Where is the {shape}?", PLACES[cell])]
        if colours.count(colour) == 1:
            questions.append(("shape", f"Which shape is {colour}?", shape))
        if [(c, s) for _, c, s in objects].count((colour, shape)) == 1:
            questions.append(("position", f"Where is the {colour} {shape}?", PLACES[cell]))
    for cell in rng.sample(range(9), 1) + rng.sample(list(taken), 1):
        questions.append(("position", f"What is at the {PLACES[cell]}?",
                          taken.get(cell, "nothing")))
    caption = ", ".join(f"{colour} {shape} {PLACES[cell]}" for cell, colour, shape in objects)
    return Scene(("objects", background, *objects), draw, caption, questions)


def sign_scene(rng: random.Random) -> Scene:
    """A word above a number, or below it: reading."""
    background = rng.choice(list(BACKGROUNDS))
    word, number = rng.choice(WORDS), str(rng.randint(10, 99))
    ink_word, ink_number = rng.choice(list(COLOURS)), rng.choice(list(COLOURS))
    lines = [(word, ink_word), (number, ink_number)]
    if rng.random() < 0.5:
        lines.reverse()

    def draw(rng: random.Random) -> Image.Image:
        image = Image.new("RGB", (84, 56), BACKGROUNDS[background])
        for i, (text, ink) in enumerate(lines):
            x, y = 12 + rng.randint(-2, 2), 28 * i + 14 + rng.randint(-1, 1)
            ImageDraw.Draw(image).text((x, y), text, COLOURS[ink], FONT, anchor="lm")
        return image

    questions = [("word", "Which word is printed?", word),
                 ("number", "Which number is printed?", number),
                 ("colour", "What colour is the word?", ink_word),
                 ("colour", "What colour is the number?", ink_number)]
    caption = ", ".join(f"{ink} {text}" for text, ink in lines)
    return Scene(("sign", background, *lines), draw, caption, questions)


def chart_scene(rng: random.Random) -> Scene:
    """Two or three bars, one to five units high: reading a chart."""
    colours = rng.sample(list(COLOURS), rng.randint(2, 3))
    heights = [rng.randint(1, 5) for _ in colours]

    def draw(rng: random.Random) -> Image.Image:
        image = Image.new("RGB", (84, 84), BACKGROUNDS["white"])
        draw = ImageDraw.Draw(image)
        for unit in range(6):
            draw.line((0, 78 - 14 * unit, 84, 78 - 14 * unit), fill=(200, 200, 200))
        for i, (colour, height) in enumerate(zip(colours, heights)):
            x = 28 * i + 7 + rng.randint(-2, 2)
            draw.rectangle((x, 78 - 14 * height, x + 13, 78), fill=COLOURS[colour])
        return image

    questions = [("chart", f"How high is the {colour} bar?", str(height))
                 for colour, height in zip(colours, heights)]
    for word, extreme in (("highest", max(heights)), ("lowest", min(heights))):
        if heights.count(extreme) == 1:
            questions.append(("chart", f"Which bar is the {word}?",
                              colours[heights.index(extreme)]))
    caption = ", ".join(f"{colour} bar {height}" for colour, height in zip(colours, heights))
    return Scene(("chart", *zip(colours, heights)), draw, caption, questions)


# Objects ask for most; digits are learnt last, and by chance not at all if signs are rarer.
SCENES = (objects_scene, objects_scene, sign_scene, sign_scene, chart_scene)


def draw_scene(rng: random.Random, held_out: bool) -> Scene:
    """A random scene of the training set or of the held-out tenth."""
    while True:
        scene = rng.choice(SCENES)(rng)
        if scene.held_out == held_out:
            return scene


def scene_questions(rng: random.Random, held_out: bool, most: int) -> Record:
    """One scene, or two side by side (one record in five), with up to `most` questions."""
    scenes = [draw_scene(rng, held_out) for _ in range(2 if rng.random() < 0.2 else 1)]
    images = [scene.draw(rng) for scene in scenes]
    if len(scenes) == 1:
        return conversation(rng, images, scenes[0].questions, most)
    questions = [("two pictures", f"{question[:-1]} in the {place} picture?", answer)
                 for place, scene in zip(("first", "second"), scenes)
                 for _, question, answer in scene.questions]
    return conversation(rng, images, questions, most)


def scene_caption(rng: random.Random, held_out: bool) -> Record:
    """One scene, told in full: every word of it is a label."""
    scene = draw_scene(rng, held_out)
    return caption_record(scene.draw(rng), scene.caption, "scene caption")


# -------------------------------------------------------------------------------------------- flags

WIDTHS = range(48, 104)  # pixels; every seventh is held out, and so are crops and backgrounds:
CROPS = (0.0, 0.02, 0.05)  # share cut off each side, a flag's file being 100 pixels wide
HELD_OUT_CROPS = (0.01, 0.035)  # of left and right; heights differ, and pixels would coincide
HELD_OUT_BACKGROUNDS = ((200, 180, 140), (90, 120, 110), (60, 50, 80), (235, 225, 245))


def read_flags() -> list[Record]:
    """The shipped flags, pictures decoded."""
    from data import read_tar  # here, since data.py imports this file
    flags = list(read_tar(Path(__file__).parent / "flags.tar"))
    for flag in flags:
        flag["images"] = [open_image(flag["images"][0]).convert("RGBA")]
    return flags


def flag_picture(rng: random.Random, flag: Image.Image, held_out: bool) -> Image.Image:
    """The flag at some size, a little cropped, on a plain background."""
    width = rng.choice([w for w in WIDTHS if (w % 7 == 0) == held_out])
    sides = HELD_OUT_CROPS if held_out else CROPS
    left, top, right, bottom = (rng.choice(crops) for crops in (sides, CROPS, sides, CROPS))
    background = rng.choice(HELD_OUT_BACKGROUNDS if held_out else
                            [*COLOURS.values(), *BACKGROUNDS.values()])
    w, h = flag.size
    flag = flag.crop((w * left, h * top, w * (1 - right), h * (1 - bottom)))
    flag = flag.resize((width, round(width * h / w)), Image.Resampling.BILINEAR)
    margins = [rng.randint(0, 8) for _ in range(4)]
    size = (flag.width + margins[0] + margins[1], flag.height + margins[2] + margins[3])
    image = Image.new("RGBA", size, background)
    image.alpha_composite(flag, (margins[0], margins[2]))
    return image.convert("RGB")


def flag_questions(rng: random.Random, flag: Record, held_out: bool, most: int) -> Record:
    """A picture of the flag with up to `most` of the questions that the shard has about it."""
    turns = flag["messages"]
    questions = [(flag_category(question["content"]), question["content"].removeprefix("<image>\n"),
                  answer["content"]) for question, answer in zip(turns[::2], turns[1::2])]
    image = flag_picture(rng, flag["images"][0], held_out)
    return conversation(rng, [image], questions, most)


def flag_category(question: str) -> str:
    """The category of a question of the shard, by the word that it asks for."""
    return "flag " + next(word for word in ("country", "continent", "colours") if word in question)


def flag_caption(rng: random.Random, flag: Record, held_out: bool) -> Record:
    """A picture of the flag with all three answers as its caption."""
    country, continent, colours = (turn["content"] for turn in flag["messages"][1::2])
    return caption_record(flag_picture(rng, flag["images"][0], held_out),
                          f"flag of {country}, {continent}, {colours}", "flag caption")


# ------------------------------------------------------------------------------------------ records


def conversation(rng: random.Random, images: list[Image.Image],
                 questions: list[tuple[str, str, str]], most: int) -> Record:
    """Up to `most` of the questions in random order, pictures in front of the first."""
    questions = list(dict.fromkeys(questions))  # each once
    chosen = rng.sample(questions, min(most, len(questions)))
    messages = []
    for i, (_, question, answer) in enumerate(chosen):
        content = [{"type": "text", "text": question}]
        messages += [{"role": "user", "content": content if i else
                      [{"type": "image"}] * len(images) + content},
                     {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    return {"messages": messages, "images": images, "category": chosen[0][0]}


def caption_record(image: Image.Image, caption: str, category: str) -> Record:
    """The form of upstream's stages 1 and 1.5: the user's turn is the picture and nothing else."""
    return {"messages": [{"role": "user", "content": [{"type": "image"}]},
                         {"role": "assistant", "content": [{"type": "text", "text": caption}]}],
            "images": [image], "category": category}


def drawn_records(kind: str, seed: int, held_out: bool = False, most: int = 5,
                    flag_share: float = 0.45) -> Iterator[Record]:
    """Endless `captions`, `questions`, or both `mixed`, over drawn scenes and flags.

    The stream depends on the arguments alone; `most` limits the questions of one conversation.
    """
    flags, rng = read_flags(), random.Random(f"{kind} {seed} {held_out}")
    for number in count():
        captions = kind == "captions" or kind == "mixed" and rng.random() < 0.35
        if rng.random() < flag_share:
            flag = rng.choice(flags)
            record = (flag_caption(rng, flag, held_out) if captions else
                      flag_questions(rng, flag, held_out, most))
        else:
            record = (scene_caption(rng, held_out) if captions else
                      scene_questions(rng, held_out, most))
        yield {"id": f"{kind} {number}", **record}


def held_out_questions(per_category: int) -> dict[str, list[Record]]:
    """The test set: single questions about held-out scenes and flags, always the same ones."""
    chosen: dict[str, list[Record]] = {category: [] for category in CATEGORIES}
    for record in drawn_records("questions", seed=0, held_out=True, most=1):
        if len(chosen[record["category"]]) < per_category:
            chosen[record["category"]].append(record)
        if all(len(records) == per_category for records in chosen.values()):
            return chosen
