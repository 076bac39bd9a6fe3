"""Asking: answers do not depend on company, cache or streaming; chat, messages, evaluation."""

import base64
import io
import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from ranks import fast_command
from tokenizers import Tokenizer

import sample
from convert import load_checkpoint
from model import LlavaOneVision
from sample import (METRICS, Chat, Request, Settings, edit_distance, evaluate, held_out,
                    interval, load_chat, read_question, to_record)

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "assets" / "tiny"
EXAMPLES = ROOT / "assets" / "examples"


@pytest.fixture(scope="module")
def loaded() -> tuple[LlavaOneVision, Tokenizer]:
    return load_checkpoint(SHIPPED, torch.float32, torch.device("cpu"))


def conversations(count: int) -> list[list[dict]]:
    """Questions of all categories, in one order; with one picture, two or none."""
    questions = held_out(-(-count // 9))
    random.Random(0).shuffle(questions)
    asked = [question["messages"] for question in questions[:count - 1]]
    return [*asked, [{"role": "user", "content": "What is this?"}]]


def greedy(model: LlavaOneVision, tokenizer: Tokenizer, messages: list[dict], most: int) -> str:
    """The answer by passes over the whole sequence, without a cache."""
    request = Request(to_record(messages), tokenizer)
    ids = torch.tensor(request.ids)
    pictures = sample.join_cuts(request.pictures, ids.device)
    answer: list[int] = []
    stops = [tokenizer.token_to_id(name) for name in ("<|im_end|>", "<|endoftext|>")]
    while len(answer) < most:
        with torch.inference_mode():
            logits = model(ids, torch.tensor([0, len(ids)]), *pictures)
        token = logits[-1].argmax()
        if int(token) in stops:
            break
        answer.append(int(token))
        ids = torch.cat([ids, token[None]])
    return tokenizer.decode(answer, skip_special_tokens=False)


def test_answers_do_not_depend_on_company(loaded: tuple) -> None:
    """Without a cache, alone, streamed, and together in 1, 3 and 8 slots: the same words."""
    asked = conversations(20)
    expected = [greedy(*loaded, messages, 12) for messages in asked]
    assert len({*expected}) > 10
    settings = Settings(max_new_tokens=12)
    for slots in (1, 3, 8):
        engine = Chat(*loaded, 200, slots)
        requests = [Request(to_record(messages), loaded[1], settings) for messages in asked]
        assert engine.answers(requests) == expected
        # a second time, the prompts are in the slots already, or in the place of others
        again = [Request(to_record(messages), loaded[1], settings) for messages in asked[::-1]]
        assert engine.answers(again) == expected[::-1]
    alone = ["".join(Chat(*loaded, context=200, slots=1).stream(messages, max_new_tokens=12))
             for messages in asked]
    assert alone == expected


def test_requests_that_come_and_go(loaded: tuple) -> None:
    """Requests join at any pass, some are cancelled: the others' words stay, and slots are free."""
    asked = conversations(24)
    settings = Settings(max_new_tokens=12)
    engine, rng = Chat(*loaded, 200, 4), random.Random(1)
    requests = [Request(to_record(messages), loaded[1], settings) for messages in asked]
    cancelled = {*requests[5:24:6]}
    left = list(requests)
    while left or any(not request.reason for request in requests):
        for _ in range(rng.choice((0, 0, 1, 3))):
            if left:
                engine.submit(left.pop(0))
        engine.step()
        for request in cancelled:
            if rng.random() < 0.5:
                request.end("cancelled")
    engine.step()
    assert not engine.waiting and not any(slot.busy for slot in engine.slots)
    for messages, request in zip(asked, requests):
        if request not in cancelled:
            assert request.text == greedy(*loaded, messages, 12)


def test_the_next_turn_computes_only_what_is_new(loaded: tuple) -> None:
    """The picture of a chat passes the ViT once; another picture in its place passes it again."""
    chat, seen = Chat(*loaded, slots=1), []
    hook = loaded[0].visual.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    tokens = loaded[0].model.embed_tokens.register_forward_hook(
        lambda _, args, out: seen.append(-len(out)) if len(out) > 1 else None)
    scene, sign = (Image.open(EXAMPLES / name) for name in ("scene.png", "sign.png"))
    questions = ["Where is the red circle?", "How many objects are there?"]

    def computed(picture: Image.Image, history: list[dict]) -> tuple[list[dict], list[int]]:
        seen.clear()
        request = chat.request(history_and_turn(picture, history), max_new_tokens=8)
        chat.answers([request])
        found = list(seen)
        answer = {"role": "assistant", "content": request.text}
        assert request.text == greedy(*loaded, history_and_turn(picture, history), 8)
        return [*history_and_turn(picture, history), answer], found

    def history_and_turn(picture: Image.Image, history: list[dict]) -> list[dict]:
        content = [{"type": "text", "text": questions[len(history) // 2]}]
        if not history:
            content.insert(0, {"type": "image", "image": picture})
        return [*history, {"role": "user", "content": content}]

    history, first = computed(scene, [])
    length = len(chat.request(history_and_turn(scene, [])).ids)
    assert first == [-length, 9]
    _, second = computed(scene, history)
    assert len(second) == 1 and -30 < second[0] < 0  # the second question, and no picture
    # the same words about another picture: from its first hole on everything is new
    _, other = computed(sign, [])
    assert len(other) == 2 and other[1] == 6 and other[0] > -length
    hook.remove()
    tokens.remove()


def pieces_of(tokenizer: Tokenizer, ids: list[int], **settings: object) -> tuple[list[str], str]:
    """What a request gives out for these tokens, and why it has ended."""
    record = to_record([{"role": "user", "content": "x"}])
    request = Request(record, tokenizer, Settings(**settings))
    for token in ids:
        if not request.reason:
            request.take(token, [0], room=100)
    request.end("length")
    return list(iter(request.pieces.get, None)), request.reason


def test_streams_have_whole_characters_and_no_stop_strings(loaded: tuple) -> None:
    """Random texts of many alphabets: pieces never hold part of a character or of a stop."""
    tokenizer, rng = loaded[1], random.Random(0)
    for _ in range(60):
        letters = "abc .\n\u00e9\u4f60\U0001f642\U0001f468\u200d"
        text = "".join(rng.choice(letters) for _ in range(40))
        ids = tokenizer.encode(text).ids
        pieces, reason = pieces_of(tokenizer, ids)
        assert "".join(pieces) == text and reason == "length"
        assert all(piece and "\ufffd" not in piece for piece in pieces)
        begin = rng.randrange(30)
        stop = text[begin:begin + rng.randint(1, 4)]
        pieces, reason = pieces_of(tokenizer, ids, stop=(stop, "never there"))
        assert "".join(pieces) == text[:text.index(stop)] and reason == "stop"
    # an answer that ends within a character is shown as it is
    pieces, _ = pieces_of(tokenizer, tokenizer.encode("a\U0001f642").ids[:-1])
    assert "".join(pieces).startswith("a") and "".join(pieces).endswith("\ufffd")


def test_a_cache_beyond_memory_is_refused(loaded: tuple) -> None:
    with pytest.raises(ValueError, match="1000000000 x 4096 tokens of a cache do not fit"):
        Chat(*loaded, slots=10**9)


def test_draws_depend_on_the_seed_alone(loaded: tuple) -> None:
    """The same seed draws the same answer, whatever is answered beside it."""
    record = to_record(conversations(3)[0])
    drawn = {"temperature": 8.0, "top_k": 500, "top_p": 0.99, "max_new_tokens": 10}

    def answers(slots: int, seeds: list[int]) -> list[str]:
        requests = [Request(record, loaded[1], Settings(seed=seed, **drawn)) for seed in seeds]
        return Chat(*loaded, 200, slots).answers(requests)

    first = answers(1, [0, 1, 2, 3])
    assert answers(3, [3, 2, 1, 0]) == first[::-1] and len({*first}) == 4


def test_a_repetition_penalty_is_hugging_faces(loaded: tuple) -> None:
    """Logits of tokens that were there are divided, or multiplied where negative."""
    record = to_record([{"role": "user", "content": "abc"}])
    request = Request(record, loaded[1], Settings(repetition_penalty=2.0))
    here, there = request.ids[-1], 1023
    assert there not in request.ids
    logits = torch.full((1024,), -100.0)
    logits[[here, there]] = torch.tensor([3.0, 2.0])
    assert request.choose(logits, here) == there  # 3 / 2 < 2
    logits[[here, there]] = torch.tensor([-3.0, -5.0])
    assert request.choose(logits, here) == there  # -3 * 2 < -5
    logits[[here, there]] = torch.tensor([3.0, 1.0])
    assert request.choose(logits, here) == here


@pytest.mark.parametrize("settings, words", [
    ({"temperature": math.nan}, "temperature must be from 0"), ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"), ({"max_new_tokens": 0}, "max_new_tokens must be a whole number"),
    ({"max_new_tokens": 2.5}, "a whole number"), ({"seed": True}, "seed"), ({"seed": -1}, "seed"),
    ({"top_k": "5"}, "top_k"), ({"stop": ("a", "")}, "stop must be"), ({"stop": (3,)}, "stop")])
def test_settings_are_checked(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Settings(**settings)


def test_one_stop_string_is_not_its_letters() -> None:
    assert Settings(stop="abc").stop == Settings(stop=["abc"]).stop == ("abc",)


@pytest.mark.parametrize("flags, words", [
    (["x", "--serve", "70000"], "a port"), (["--serve", "-1"], "a port"),
    (["x", "--dtype", "int8"], "--dtype must be"), (["x", "--chat"], "one of --chat"),
    (["x", "--max-new-tokens", "0"], "--max-new-tokens must be"),
    (["--slots", "0", "x"], "--slots")])
def test_flags_are_checked(flags: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sample.parse_flags(flags)


def test_every_format_of_messages_is_read_alike(tmp_path: Path, loaded: tuple) -> None:
    """A path, a file URL, a PIL image, a data URL, in the parts of Hugging Face and OpenAI."""
    path = EXAMPLES / "scene.png"
    data = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    parts: Iterator[dict] = iter([
        {"type": "image", "image": str(path)}, {"type": "image", "image": f"file://{path}"},
        {"type": "image", "image": Image.open(path)}, {"type": "image", "image": path},
        {"type": "image", "url": data}, {"type": "image", "path": str(path)},
        {"type": "image_url", "image_url": {"url": data, "detail": "auto"}},
        {"type": "image_url", "image_url": str(path)}])
    found = []
    for part in parts:
        content = [part, {"type": "text", "text": "Where is the red circle?"}]
        request = Request(to_record([{"role": "user", "content": content}]), loaded[1])
        found.append((request.ids, request.pictures[0].digest))
    assert all(entry == found[0] for entry in found)


def user(*parts: object) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


@pytest.mark.parametrize("messages, words", [
    ([], "a list, not empty"), ("hi", "a list, not empty"), ([1], "no message"),
    ([{"role": "user"}], "no message"), ([{"role": "user", "content": "x", "name": "y"}], "alone"),
    ([{"role": "user", "content": 3}], "text or a list"), (user("x"), "no part of a message"),
    (user({"type": "audio", "audio": "a.mp3"}), "neither text nor"),
    (user({"type": "text"}), "neither text"), (user({"type": "image"}), "one source"),
    (user({"type": "text", "text": "x", "cache": 1}), "neither text"),
    (user({"type": "image", "image": "a", "url": "b"}), "one source"),
    (user({"type": "image", "image": "a", "resized_height": 28}), "one source"),
    (user({"type": "image", "image": ""}), "no picture"),
    (user({"type": "image", "image": 5}), "no picture"),
    (user({"type": "image", "image": "data:image/png,abc"}), "base64"),
    (user({"type": "image", "image": "data:image/png;base64,a*b"}), "base64"),
    ([{"role": "assistant", "content": "x"}], "the last message must be the user's")])
def test_malformed_messages_are_refused(messages: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        to_record(messages)


@pytest.mark.parametrize("source", ["/etc/hostname", "file:///etc/hostname", "http://127.0.0.1:9/",
                                    "a.png", Image.new("RGB", (9, 9)), 5, None])
def test_foreign_messages_name_no_files(source: object) -> None:
    """Those of a server's clients: data URLs and nothing else."""
    with pytest.raises(ValueError, match="data URLs"):
        to_record(user({"type": "image", "image": source}), local=False)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/a.png", "http://127.0.0.1:9/my cat.png"])
def test_a_url_that_cannot_be_fetched_is_named(url: str) -> None:
    with pytest.raises(ValueError, match=f"{url} cannot be fetched"):
        to_record(user({"type": "image", "image": url}))


def test_python_like_the_quick_start() -> None:
    """`load_chat(DIR)(messages)`, one conversation or several."""
    chat = load_chat(str(SHIPPED))
    messages = user({"type": "image", "image": str(EXAMPLES / "scene.png")},
                    {"type": "text", "text": "How many objects are there?"})
    assert chat(messages) == "3"
    assert chat([messages, messages[:1]], max_new_tokens=5) == ["3", "3"]
    assert chat.stream(messages, stop=("3",)).__iter__ and not "".join(
        chat.stream(messages, stop=("3",)))
    with pytest.raises(ValueError, match="the prompt has .* tokens, but there is room for 30"):
        load_chat(str(SHIPPED), context=30)(messages)


def animation(file: Path) -> Path:
    frames = [Image.open(EXAMPLES / name).convert("RGB") for name in ("scene.png", "sign.png")]
    frames[0].save(file, save_all=True, append_images=frames[1:] * 3, duration=500)
    return file


def test_a_chat_in_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture, loaded: tuple) -> None:
    """Pictures with a turn, a second turn, a video, what is refused, and a new beginning."""
    lines = iter([f"/image {EXAMPLES / 'scene.png'}", "How many objects are there?", "",
                  "Where is the red circle?", "/image nowhere.png", "/reset",
                  f"/image {animation(tmp_path / 'a.gif')}", "What is this?", "/quit", "never"])
    prompts = []

    def typed(prompt: str) -> str:
        prompts.append(prompt)
        return next(lines)

    monkeypatch.setattr("builtins.input", typed)
    chat = Chat(*loaded, slots=1)
    sample.converse(chat, Settings(max_new_tokens=8))
    said = capsys.readouterr()
    first, second, third = said.out.splitlines()
    assert (first, second) == ("3", "top right") and third
    assert "there is no picture nowhere.png" in said.err
    assert next(lines) == "never" and len(prompts) == 9
    assert chat.slots[0].request.pictures[0].grid[0, 0] > 1


def test_blank_pictures_of_other_shapes_are_told_apart(loaded: tuple) -> None:
    """Their patches are the same, but not their places in the picture."""
    chat = Chat(*loaded, slots=1)
    for size in ((84, 168), (168, 84)):
        messages = user({"type": "image", "image": Image.new("RGB", size, "white")},
                        {"type": "text", "text": "What is this?"})
        assert chat(messages, max_new_tokens=8) == greedy(*loaded, messages, 8)
    first, second = (Request(to_record(user({"type": "image", "image": Image.new("RGB", size)})),
                             loaded[1]).pictures[0] for size in ((84, 168), (168, 84)))
    assert first.patches.equal(second.patches) and first.digest != second.digest


def test_an_interrupted_pass_leaves_no_keys(loaded: tuple, monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture) -> None:
    """Ctrl-C while a prompt is computed: the chat goes on, and computes it again."""
    chat, real = Chat(*loaded, slots=1), loaded[0].next_logits
    messages = user({"type": "image", "image": str(EXAMPLES / "scene.png")},
                    {"type": "text", "text": "How many objects are there?"})

    def interrupted(*arguments: object, **pictures: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(loaded[0], "next_logits", interrupted)
    request = chat.request(messages)
    sample.say(chat, request)
    assert request.reason == "cancelled" and capsys.readouterr().out == "\n"
    monkeypatch.setattr(loaded[0], "next_logits", real)
    assert chat(messages) == "3"


def test_answers_that_nobody_reads_free_their_slots(loaded: tuple) -> None:
    """A stream that is not read to its end; several requests of which one is too long."""
    chat = Chat(*loaded, context=100, slots=2)
    chat.stop_ids = []
    messages = user({"type": "text", "text": "What is this?"})
    stream = chat.stream(messages, max_new_tokens=60)
    next(stream)
    stream.close()
    long = user({"type": "text", "text": "word " * 200})
    with pytest.raises(ValueError, match="the prompt has"):
        chat([messages, long], max_new_tokens=60)
    assert not chat.step()
    assert not chat.waiting and not any(slot.busy for slot in chat.slots)


def test_pictures_of_a_prompt_that_is_too_long_are_not_decoded(
        loaded: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.cut_patches", None)
    picture = {"type": "image", "image": str(EXAMPLES / "scene.png")}
    with pytest.raises(ValueError, match="the prompt has"):
        Chat(*loaded, context=50, slots=1)(user(*[picture] * 20))


def test_a_tiny_temperature_takes_the_likeliest(loaded: tuple) -> None:
    """In float32, 1e-46 is 0: nothing may be divided by it."""
    messages = conversations(3)[0]
    chat = Chat(*loaded, slots=1)
    for temperature in (1e-300, 1e-46, 1e-30):
        assert chat(messages, temperature=temperature, max_new_tokens=6) == chat(
            messages, max_new_tokens=6)


def test_a_damaged_picture_does_not_stay_in_a_chat(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture,
        loaded: tuple) -> None:
    """It is found when it is decoded, with the turn that it belongs to; the next turn goes on."""
    content = (EXAMPLES / "scene.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[:len(content) // 2])
    # a name that looks like a URL is a file's name all the same
    (tmp_path / "data:a b.png").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    lines = iter(["/image cut.png", "What is this?", "/image data:a b.png",
                  "How many objects are there?", "/quit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    sample.converse(Chat(*loaded, slots=1), Settings(max_new_tokens=8))
    said = capsys.readouterr()
    assert said.out == "3\n" and "record prompt" in said.err


def test_nulls_of_a_clients_message_are_absent() -> None:
    """As in `model_dump()` of an answer of OpenAI's package, appended to the messages."""
    answer = {"role": "assistant", "content": "3", "refusal": None, "annotations": None,
              "audio": None, "function_call": None, "tool_calls": None}
    turns = [*user({"type": "text", "text": "x"}), answer, *user({"type": "text", "text": "y"})]
    assert to_record(turns)["messages"][1] == {
        "role": "assistant", "content": [{"type": "text", "text": "3"}]}
    with pytest.raises(ValueError, match="alone"):
        to_record([{"role": "user", "content": "x", "tool_calls": [1]}])


def test_messages_on_standard_input(monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture) -> None:
    content = [{"type": "image", "image": str(EXAMPLES / "scene.png")},
               {"type": "text", "text": "How many objects are there?"}]
    stdin = io.TextIOWrapper(io.BytesIO(json.dumps(user(*content)).encode()))
    monkeypatch.setattr("sys.stdin", stdin)
    sample.run(*sample.parse_flags(["--messages", "--checkpoint", str(SHIPPED)]))
    assert capsys.readouterr().out == "3\n"


@pytest.mark.parametrize("metric, answer, wanted, score", [
    ("exact", " Top right. ", "top right", 1), ("exact", "top", "top right", 0),
    ("relaxed", "104", "100", 1), ("relaxed", "94.9%", "100", 0), ("relaxed", "1,040", "1000", 1),
    ("relaxed", "red", "Red", 1), ("relaxed", "0.1", "0", 0), ("relaxed", "-100", "100", 0),
    ("anls", "kitten", "sitten", 5 / 6), ("anls", "abcd", "wxyz", 0), ("anls", "", "", 1),
    ("choice", "(B) a cat", "B", 1), ("choice", "The answer is C.", "(c)", 1),
    ("choice", "A or B", "B", 0), ("choice", "cat", "C", 0), ("choice", "I think (D).", "D", 1),
    ("choice", "I'd say B", "B", 1), ("choice", "I", "I", 1), ("relaxed", "5%", "0.05", 1),
    ("relaxed", "5%", "5", 0), ("relaxed", "35 %", "36%", 1)])
def test_metrics(metric: str, answer: str, wanted: str, score: float) -> None:
    assert METRICS[metric](answer, wanted) == pytest.approx(score)


def test_edit_distance_is_the_definition() -> None:
    """Against the recursion it is defined by, on random words."""
    def distance(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1,
                   distance(a[1:], b[1:]) + (1 if a[0] != b[0] else 0))

    rng = random.Random(0)
    for _ in range(60):
        a, b = ("".join(rng.choice("abc") for _ in range(rng.randrange(6))) for _ in "ab")
        assert edit_distance(a, b) == distance(a, b)


def test_intervals_cover() -> None:
    """Of draws with a known share, about 95 of 100 intervals have it in them."""
    rng, share = random.Random(0), 0.8
    inside = 0
    for _ in range(400):
        low, high = interval([float(rng.random() < share) for _ in range(50)])
        assert 0 <= low < high <= 1
        inside += low <= share <= high
    assert 360 <= inside <= 396
    for count in range(1, 60):  # not -0.0 either
        assert f"{interval([0.0] * count)[0]:.1f}" == "0.0" and interval([1.0] * count)[1] <= 1


def test_an_evaluation_goes_on_where_it_stopped(tmp_path: Path, loaded: tuple) -> None:
    """The same scores in one run and in two; a question that was answered is not asked again."""
    questions = held_out(2)
    chat = Chat(*loaded, context=300, slots=4)
    settings = {"max_new_tokens": 12, "stop": ("\n",)}
    whole = evaluate(chat, questions, **settings)
    done = tmp_path / "predictions.jsonl"
    evaluate(chat, questions[:7], done, **settings)
    text = done.read_text()
    done.write_text(text + text.splitlines()[0][:30])  # the last line was cut
    assert evaluate(chat, questions, done, **settings) == whole
    entries = [json.loads(line) for line in done.read_text().splitlines()]
    assert [entry["id"] for entry in entries] == [question["id"] for question in questions]
    scores = [score for category in whole.values() for score in category]
    assert sum(entry["score"] for entry in entries) == sum(scores) > len(scores) / 2


def test_predictions_of_other_questions_are_refused(tmp_path: Path, loaded: tuple) -> None:
    """The file stays as it is, also one that holds no predictions."""
    chat, done = Chat(*loaded, context=300, slots=4), tmp_path / "predictions.jsonl"

    def asked(text: str, answer: str, **more: str) -> list[dict]:
        entry = {"id": 1, "question": text, "answer": answer, **more}
        return [read_question(entry, 1, tmp_path)]

    evaluate(chat, asked("What is this?", "x"), done, max_new_tokens=4)
    kept = done.read_text()
    for questions in (asked("What is that?", "x"), asked("What is this?", "y")):
        with pytest.raises(ValueError, match="another question"):
            evaluate(chat, questions, done, max_new_tokens=4)
    for changed in ({"checkpoint": "other"}, {"stop": ("x",)}):
        with pytest.raises(ValueError, match="checkpoint or settings"):
            evaluate(chat, asked("What is this?", "x"), done, **{"max_new_tokens": 4} | changed)
    chat.max_pixels = 28 * 28
    with pytest.raises(ValueError, match="checkpoint or settings"):
        evaluate(chat, asked("What is this?", "x"), done, max_new_tokens=4)
    assert done.read_text() == kept
    done.unlink()
    for name in ("red", "blue"):
        Image.new("RGB", (56, 56), name).save(tmp_path / f"{name}.png")
    evaluate(chat, asked("What is this?", "x", image="red.png"), done, max_new_tokens=4)
    with pytest.raises(ValueError, match="another question"):
        evaluate(chat, asked("What is this?", "x", image="blue.png"), done, max_new_tokens=4)
    for text in ('{"question": "x"}\n{"question', "[]\n", "no JSON\n"):
        done.write_text(text)
        with pytest.raises(ValueError, match="predictions.jsonl"):
            evaluate(chat, asked("What is this?", "x"), done, max_new_tokens=4)
        assert done.read_text() == text


def test_the_command_evaluates_a_file(tmp_path: Path) -> None:
    lines = [{"image": str(EXAMPLES / "scene.png"), "question": "How many objects are there?",
              "answer": ["three", "3"], "category": "count"},
             {"image": str(EXAMPLES / "scene.png"), "question": "Where is the red circle?",
              "answer": "top left", "category": "place", "metric": "anls"}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = fast_command(tmp_path, "sample.py", "--evaluate", "q.jsonl", "--predictions", "p.jsonl",
                        "--checkpoint", SHIPPED, "--max-new-tokens", "12")
    assert done.returncode == 0, done.stderr
    found = {line.split()[0]: float(line.split()[1]) for line in done.stdout.splitlines()}
    assert found["count"] == 100 and 0 < found["place"] < 100
    assert found["together"] == pytest.approx((100 + found["place"]) / 2, abs=0.1)
    assert len((tmp_path / "p.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("entry, words", [
    ([], "an object"), ({"question": "x", "answer": 3}, "answer must be"),
    ({"question": "x"}, "answer must be"), ({"question": "x", "answer": "y", "metric": "bleu"},
                                            "no metric 'bleu'"),
    ({"question": "x", "answer": "y", "weight": 2}, "no other keys"),
    ({"question": "x", "answer": []}, "answer must be"), ({"answer": "y"}, "question"),
    ({"question": "x", "answer": "y", "metric": []}, "no metric"),
    ({"question": "x", "answer": "y", "images": 5}, "images"),
    ({"question": "x", "answer": "y", "image": "a", "images": ["b"]}, "image"),
    ({"question": "x", "messages": [], "answer": "y"}, "question")])
def test_malformed_questions_are_refused(entry: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_question(entry, 1, Path())
