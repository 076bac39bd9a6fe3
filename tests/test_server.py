"""The server: OpenAI's API under load and under attack, and the page in a real browser."""

import base64
import http.client
import io
import itertools
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from ranks import resident

from convert import load_checkpoint
from sample import BODY, Chat, Server, Slot, held_out

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "assets" / "tiny"
EXAMPLES = ROOT / "assets" / "examples"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which(
    "google-chrome")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    loaded = load_checkpoint(SHIPPED, torch.float32, torch.device("cpu"))
    server = Server("127.0.0.1", 0, Chat(*loaded, context=512, slots=8), "tiny", queue=300)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def data_url(image: Image.Image | Path) -> str:
    if isinstance(image, Path):
        image = Image.open(image)
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def question(text: str, image: Image.Image | Path | None = None, **fields: object) -> dict:
    content = [{"type": "text", "text": text}]
    if image is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": data_url(image)}})
    return {"messages": [{"role": "user", "content": content}], **fields}


def post(server: Server, body: dict | bytes, path: str = "/v1/chat/completions",
         headers: dict | None = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request("POST", path, content, headers or {})
    reply = connection.getresponse()
    text = reply.read()
    connection.close()
    if reply.headers["Content-Type"] == "text/event-stream":
        lines = [line for line in text.decode().split("\n\n") if line]
        assert lines.pop() == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
        return reply.status, [json.loads(line[6:]) for line in lines]
    return reply.status, json.loads(text)


def answer_of(reply: dict | list[dict]) -> str:
    if isinstance(reply, dict):
        return reply["choices"][0]["message"]["content"]
    return "".join(choice["delta"].get("content", "") for chunk in reply
                   for choice in chunk["choices"])


def wait_until_idle(server: Server) -> None:
    """All slots are free, and nothing waits."""
    end = time.monotonic() + 20
    engine = server.chat
    while time.monotonic() < end:
        if not engine.waiting and not any(slot.busy for slot in engine.slots):
            return
        time.sleep(0.05)
    raise AssertionError("a slot is stuck")


def test_whole_and_streamed_answers_are_those_of_python(server: Server) -> None:
    """With usage, finish reasons and stop strings, as OpenAI's clients expect them."""
    scene = EXAMPLES / "scene.png"
    status, whole = post(server, question("How many objects are there?", scene, model="tiny"))
    assert status == 200 and answer_of(whole) == "3"
    assert whole["choices"][0]["finish_reason"] == "stop" and whole["object"] == "chat.completion"
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] > 30
    asked = question("Where is the red circle?", scene)
    status, chunks = post(server, {**asked, "stream": True,
                                   "stream_options": {"include_usage": True}})
    assert status == 200 and answer_of(chunks) == "top right" and len(chunks) >= 4
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 2
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    status, cut = post(server, {**asked, "max_tokens": 1, "n": 1, "user": "me", "seed": None})
    assert (answer_of(cut), cut["choices"][0]["finish_reason"]) == ("top", "length")
    status, stopped = post(server, {**asked, "stop": " right"})
    assert (answer_of(stopped), stopped["choices"][0]["finish_reason"]) == ("top", "stop")


def test_two_hundred_at_once(server: Server) -> None:
    """All are answered as alone or told to come again; memory stays, slots are free afterwards."""
    questions = held_out(3)
    bodies = []
    for entry in questions:
        content = [part if part["type"] == "text" else
                   {"type": "image_url", "image_url": {"url": data_url(part["image"])}}
                   for part in entry["messages"][0]["content"]]
        bodies.append({"messages": [{"role": "user", "content": content}], "max_tokens": 8})
    expected = [answer_of(post(server, body)[1]) for body in bodies]
    assert len({*expected}) > 8
    before = resident("VmRSS")
    work = [(number, number % 3 == 0) for number in range(200)]

    def ask(number: int, stream: bool) -> tuple[int, str]:
        status, reply = post(server, bodies[number % len(bodies)] | {"stream": stream})
        return status, answer_of(reply) if status == 200 else reply["error"]["message"]

    with ThreadPoolExecutor(200) as threads:
        found = list(threads.map(lambda one: ask(*one), work))
    for (number, _), (status, text) in zip(work, found):
        assert status in (200, 429)
        assert status == 429 or text == expected[number % len(bodies)]
    assert sum(status == 200 for status, _ in found) >= 100
    wait_until_idle(server)
    assert resident("VmRSS") - before < 300e6


def test_a_full_queue_says_so(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "queue", 0)
    status, reply = post(server, question("x"))
    assert status == 429 and "try again later" in reply["error"]["message"]


def test_a_client_that_leaves_frees_its_slot(server: Server,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Streamed or not: the answer is not computed to its end."""
    engine = server.chat
    step = engine.step
    monkeypatch.setattr(engine, "stop_ids", [])  # answers never end by themselves
    monkeypatch.setattr(engine, "step", lambda: time.sleep(0.01) or step())
    for stream in (True, False):
        body = json.dumps(question("What is this?", stream=stream, max_tokens=400)).encode()
        with socket.create_connection(("127.0.0.1", server.server_port)) as client:
            client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body) + body)
            end = time.monotonic() + 10
            while not any(slot.busy for slot in engine.slots) and time.monotonic() < end:
                time.sleep(0.005)
            request, = (slot.request for slot in engine.slots if slot.busy)
        wait_until_idle(server)
        assert request.reason == "cancelled" and len(request.answer) < 400


def bad_bodies(rng: random.Random) -> Iterator[bytes | dict]:
    """Bodies that must be refused: broken JSON, wrong types, bombs, foreign pictures, and so on."""
    good = question("What is this?", EXAMPLES / "scene.png")
    text = json.dumps(good).encode()
    junk: list[object] = [None, True, -1, 1e400, 10**30, "", "x" * 1000, [], [[]], {}, {"a": {}},
                          "\x00\x1b[2J", "\ud800"]
    bomb = Image.new("1", (9000, 9000))
    wide = Image.new("RGB", (4000, 4))
    while True:
        yield text[:rng.randrange(len(text) - 1)]
        yield b"[" * rng.randrange(1, 200_000)
        yield bytes(rng.randrange(256) for _ in range(200))
        value = rng.choice(junk)
        yield {**good, rng.choice(["temprature", "image", "functions", "audio", "__class__"]): 1}
        yield {**good, "messages": value if value is not None else 3}
        yield {**good, "temperature": rng.choice([-1, "hot", [], {}, 1e9, True])}
        yield {**good, "max_tokens": rng.choice([0, -5, 1.5, "many", 10**12, [], False])}
        yield {**good, "stop": rng.choice([3, [3], {}, [""], [["a"]]])}
        yield {**good, "stream": rng.choice(["yes", 1, []])}
        yield {**good, "n": rng.choice([0, 2, "1"])}
        yield {**good, "model": rng.choice(["gpt-4", 3, ["tiny"]])}
        yield {"messages": [{"role": rng.choice(["tool", "robot", 3, None]), "content": "x"}]}
        yield {"messages": [{"role": "user", "content": rng.choice([*junk[:5], [[]]])}] * 2}
        part = {"type": "image_url", "image_url": {"url": rng.choice(
            ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.png", "../assets/x.png",
             "ftp://a/b", "data:image/png;base64,", "data:image/png;base64,!!!", "data:,x",
             "data:image/png;base64," + base64.b64encode(b"no picture").decode(), 7, None])}}
        yield {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]}
        if rng.random() < 0.1:
            yield question("?", rng.choice([bomb, wide]))
            yield question("word " * 3000)
        deep: object = "x"
        for _ in range(rng.randrange(50, 500)):
            deep = [deep]
        yield {"messages": [{"role": "user", "content": deep}]}


def test_five_hundred_bad_requests(server: Server) -> None:
    """A status of 4xx and one sentence each; no trace, no stuck slot, and good ones go on."""
    rng = random.Random(0)
    before, opened = resident("VmRSS"), []

    def note(event: str, arguments: tuple) -> None:
        if watching and event == "open" and isinstance(arguments[0], str | Path):
            opened.append(str(arguments[0]))
        if watching and event == "socket.connect":
            opened.append(str(arguments[1]))

    watching = False
    sys.addaudithook(note)
    bodies = list(itertools.islice(bad_bodies(rng), 500))

    def send(body: dict | bytes) -> tuple[int, str]:
        status, reply = post(server, body)
        return status, reply["error"]["message"] if status != 200 else str(reply)

    watching = True
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(send, bodies))
    watching = False
    for body, (status, message) in zip(bodies, found):
        assert 400 <= status < 500, (status, message, str(body)[:300])
        assert message and "Traceback" not in message and "\n" not in message, (message, body)
        assert len(message) < 400, message
    # but Pillow's own modules, which it reads when it meets a format; and our own connections
    strange = [name for name in opened if str(server.server_port) not in name
               and Path(Image.__file__).parent not in Path(name).parents]
    assert not strange, strange
    wait_until_idle(server)
    assert resident("VmRSS") - before < 300e6
    assert answer_of(post(server, question("How many objects are there?",
                                           EXAMPLES / "scene.png"))[1]) == "3"


@pytest.mark.parametrize("head, status", [
    (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n", 411),
    (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n", 411),
    (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n", 413),
    (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000
     + b"\r\n\r\n", 400),
    (b"POST /../../etc/passwd HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}", 404),
    (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 404),
    (b"GET /" + b"a" * 70000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
    (b"DELETE /v1/models HTTP/1.1\r\nHost: x\r\n\r\n", 501),
    (b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nOrigin: http://evil.example\r\n"
     b"Content-Length: 2\r\n\r\n{}", 403)])
def test_bad_heads_are_refused(server: Server, head: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as client:
        client.sendall(head)
        reply = http.client.HTTPResponse(client)
        reply.begin()
        assert reply.status == status
        assert json.loads(reply.read())["error"]["message"]


def test_a_body_that_is_too_long_is_refused_while_it_is_sent(server: Server) -> None:
    status, reply = post(server, b"x" * (BODY + 1))
    assert status == 413 and "may have" in reply["error"]["message"]


def test_slow_and_cut_connections_hold_nothing(server: Server,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that send half a request and wait, or go: others are answered meanwhile."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n{\"me"
    clients = []
    for number in range(60):
        client = socket.create_connection(("127.0.0.1", server.server_port))
        client.sendall(head[:10 + number])
        clients.append(client)
    for client in clients[::2]:
        client.close()
    assert post(server, question("What is this?", max_tokens=3))[0] == 200
    # the others are told when they stop sending
    clients[-1].shutdown(socket.SHUT_WR)
    for client in clients[1::2]:
        client.close()
    wait_until_idle(server)


def test_an_error_of_the_model_ends_every_answer(server: Server,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in slots are told; those that wait are answered, although nobody asks after them."""
    engine, failed = server.chat, threading.Event()
    forward = engine.forward

    def out_of_memory(slots: list[Slot]) -> torch.Tensor:
        if failed.is_set():
            return forward(slots)
        time.sleep(0.5)  # meanwhile the others begin to wait
        failed.set()
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(engine, "forward", out_of_memory)
    with ThreadPoolExecutor(20) as threads:
        found = list(threads.map(lambda number: post(server, question(
            "What is this?", max_tokens=3, stream=number % 2 == 0)), range(20)))
    assert {status for status, _ in found} <= {200, 500}
    last = [reply[-1] if isinstance(reply, list) else reply for _, reply in found]
    told = [reply for reply in last if "error" in reply]
    assert 1 <= len(told) <= 8
    assert all(reply["error"]["message"] == "the model could not answer" for reply in told)
    failed.clear()
    assert post(server, question("What is this?"))[0] == 500
    wait_until_idle(server)


def test_the_queue_is_limited_while_pictures_are_decoded(server: Server,
                                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Many who come at once are told, not only those who come later; those who leave are gone."""
    engine, request, step = server.chat, server.chat.request, server.chat.step
    longest = [0]

    def slow_request(*arguments: Any, **settings: Any) -> Any:
        time.sleep(0.1)
        return request(*arguments, **settings)

    def slow_step() -> bool:
        longest[0] = max(longest[0], len(engine.waiting))
        time.sleep(0.2)
        return step()

    monkeypatch.setattr(server, "queue", 3)
    monkeypatch.setattr(server.chat, "request", slow_request)
    monkeypatch.setattr(engine, "step", slow_step)
    with ThreadPoolExecutor(40) as threads:
        body = question("What is this?", max_tokens=4)
        found = [status for status, _ in threads.map(lambda _: post(server, body), range(40))]
    assert longest[0] <= 4 and {*found} == {200, 429}
    wait_until_idle(server)

    monkeypatch.setattr(engine, "stop_ids", [])
    body = json.dumps(question("What is this?", max_tokens=400)).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    clients = []
    for number in range(len(engine.slots) + 3):
        clients.append(socket.create_connection(("127.0.0.1", server.server_port)))
        clients[-1].sendall(head % len(body) + body)
        end = time.monotonic() + 10
        while time.monotonic() < end and number >= len(engine.waiting) + sum(
                slot.busy for slot in engine.slots):
            time.sleep(0.01)
    assert post(server, question("What is this?"))[0] == 429
    for client in clients[-3:]:
        client.close()
    time.sleep(2)
    assert not engine.waiting
    for client in clients:
        client.close()
    wait_until_idle(server)


def test_a_long_animation_is_refused_before_it_is_decoded(server: Server) -> None:
    """60 frames of 4 million pixels are few bytes, but much memory."""
    frames = [Image.new("L", (2000, 2000), shade) for shade in range(60)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    url = "data:image/gif;base64," + base64.b64encode(file.getvalue()).decode()
    part = {"type": "video_url", "video_url": {"url": url}}
    body = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}]}
    status, reply = post(server, body)
    assert status == 400 and "pixels" in reply["error"]["message"]
    cut = "data:image/gif;base64," + base64.b64encode(file.getvalue()[:9000]).decode()
    part["video_url"]["url"] = cut
    status, reply = post(server, body)
    assert status == 400 and len(reply["error"]["message"]) < 500


def test_heads_without_a_body(server: Server) -> None:
    """HEAD is GET without the body, and the connection goes on; a query does not matter."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    for path in ("/", "/?from=here", "/v1/models"):
        connection.request("HEAD", path)
        reply = connection.getresponse()
        assert reply.status == 200 and int(reply.headers["Content-Length"]) > 50
        assert reply.read() == b""
    connection.request("GET", "/v1/models")
    assert json.loads(connection.getresponse().read())["data"][0]["id"] == "tiny"
    connection.close()


@pytest.mark.parametrize("host, origin, status", [
    ("127.0.0.1:1", "http://127.0.0.1:1", 200), ("localhost:1", "http://localhost:1", 200),
    ("[::1]", "http://[::1]", 200), ("evil.example:1", "http://evil.example:1", 403),
    ("127.0.0.1:1", "http://127.0.0.1:2", 403), ("127.0.0.1:1", "null", 403)])
def test_pages_of_other_sites_are_not_answered(server: Server, host: str, origin: str,
                                               status: int) -> None:
    """Nor one whose name was made to lead to this machine (DNS rebinding)."""
    assert post(server, question("What is this?", max_tokens=2),
                headers={"Host": host, "Origin": origin})[0] == status


def test_addresses_of_ipv6() -> None:
    loaded = load_checkpoint(SHIPPED, torch.float32, torch.device("cpu"))
    try:
        server = Server("::1", 0, Chat(*loaded, context=64, slots=1), "tiny")
    except OSError:
        pytest.skip("this machine has no IPv6")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection("::1", server.server_port, timeout=30)
    connection.request("GET", "/v1/models")
    assert connection.getresponse().status == 200
    connection.close()
    server.shutdown()
    server.server_close()


def test_what_other_programs_send(server: Server) -> None:
    """Bodies of lmms-eval, VLMEvalKit, LangChain and OpenAI's package, with their empty fields."""
    scene = EXAMPLES / "scene.png"
    image = {"type": "image_url", "image_url": {"url": data_url(scene), "detail": "low"}}
    text = {"type": "text", "text": "How many objects are there?"}
    turns = [{"role": "user", "content": [image, text]}]
    system = {"role": "system", "content": "You are a helpful assistant."}
    for body in ({"messages": turns, "max_tokens": 16, "temperature": 0, "model": "tiny"},
                 {"messages": [system, *turns], "n": 1, "max_tokens": 16, "temperature": 0.0,
                  "stop": None, "presence_penalty": 0.0, "frequency_penalty": 0.0},
                 {"messages": turns, "stream": False, "max_completion_tokens": 16, "logit_bias": {},
                  "logprobs": False, "top_p": 1, "store": False, "metadata": None,
                  "response_format": {"type": "text"}, "service_tier": "auto"}):
        status, reply = post(server, body)
        assert status == 200 and answer_of(reply).strip(), reply
    status, reply = post(server, {"messages": turns, "max_tokens": 3, "max_completion_tokens": 4})
    assert status == 400 and "max_completion_tokens" in reply["error"]["message"]


# --------------------------------------------------------------------------------- in a browser


class Browser:
    """A headless Chromium, driven by its DevTools protocol through a pair of pipes."""

    def __init__(self, folder: str) -> None:
        # Chromium reads commands from file 3 and writes to file 4, each ending with a zero byte
        to_browser, self.commands = os.pipe()
        self.events, from_browser = os.pipe()

        def files() -> None:
            os.dup2(to_browser, 3)
            os.dup2(from_browser, 4)

        self.process = subprocess.Popen(
            [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
             "--disable-dev-shm-usage", "--remote-debugging-pipe", f"--user-data-dir={folder}"],
            preexec_fn=files, pass_fds=(3, 4), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL)
        os.close(to_browser)
        os.close(from_browser)
        self.rest, self.number = b"", 0

    def call(self, method: str, session: str = "", **arguments: object) -> dict:
        """Send a command, and wait for its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": arguments}
        if session:
            message["sessionId"] = session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                self.rest += os.read(self.events, 2**20)
            line, _, self.rest = self.rest.partition(b"\0")
            reply = json.loads(line)
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]

    def open(self, url: str) -> "Tab":
        """Open a page in a new tab."""
        target = self.call("Target.createTarget", url=url)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = Tab(self, session)
        tab.wait("document.readyState == 'complete' && !!document.getElementById('send')")
        return tab

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.events)


class Tab:
    """A page in a browser."""

    def __init__(self, browser: Browser, session: str) -> None:
        self.call: Callable[..., dict] = lambda method, **arguments: browser.call(
            method, session, **arguments)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression gives."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + 30
        while not self.value(expression):
            assert time.monotonic() < end, expression
            time.sleep(0.02)

    def ask(self, text: str) -> None:
        """Type a question, as with a keyboard, and Enter."""
        self.call("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter",
                      windowsVirtualKeyCode=13)

    def paste(self, file: Path) -> None:
        """Paste a picture."""
        content = base64.b64encode(file.read_bytes()).decode()
        self.value(f"""(() => {{
            const bytes = Uint8Array.from(atob("{content}"), c => c.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "a.png", {{type: "image/png"}}));
            document.dispatchEvent(new ClipboardEvent("paste", {{clipboardData: data}}));
        }})()""")
        self.wait("document.querySelectorAll('#waiting img').length > 0")

    def answers(self) -> list[str]:
        return self.value("[...document.querySelectorAll('.answer')].map(e => e.textContent)")

    def wait_for_answer(self, count: int) -> None:
        self.wait(f"document.querySelectorAll('.answer').length == {count} && "
                  "document.getElementById('stop').disabled")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_in_a_browser(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture, a streamed answer, a second turn, stop, two tabs at once, a phone's width."""
    engine = server.chat
    step, pause = engine.step, [0.0]

    def slow_step() -> bool:
        time.sleep(pause[0])
        return step()

    def broken(numbers: list[int]) -> None:
        raise RuntimeError("no memory is left")

    monkeypatch.setattr(engine, "step", slow_step)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        browser = Browser(folder)
        try:
            url = f"http://127.0.0.1:{server.server_port}/"
            tab, other = browser.open(url), browser.open(url)
            tab.call("Page.bringToFront")
            tab.paste(EXAMPLES / "scene.png")
            tab.ask("How many objects are there?")
            tab.wait_for_answer(1)
            assert tab.answers() == ["3"]
            assert "tokens/s" in tab.value("document.querySelector('.rate').textContent")
            tab.ask("Where is the red circle?")  # the second turn, about the same picture
            tab.wait_for_answer(2)
            assert tab.answers() == ["3", "top right"]

            # words appear while the answer is computed, and it can be stopped
            monkeypatch.setattr(engine, "stop_ids", [])
            pause[0] = 0.1
            tab.ask("What is this?")
            tab.wait("document.querySelectorAll('.answer').length == 3")
            tab.wait("document.querySelectorAll('.answer')[2].textContent.length > 3")
            assert not tab.value("document.getElementById('stop').disabled")
            tab.value("document.getElementById('stop').click()")
            tab.wait_for_answer(3)
            wait_until_idle(server)
            monkeypatch.undo()

            # a new conversation while the old one is answered: nothing of the old one stays
            monkeypatch.setattr(engine, "stop_ids", [])
            monkeypatch.setattr(engine, "step", slow_step)
            tab.ask("What is that?")
            tab.wait("document.querySelectorAll('.answer').length == 4")
            tab.wait("document.querySelectorAll('.answer')[3].textContent.length > 3")
            assert tab.value("document.getElementById('log').ariaBusy") == "true"
            tab.value("document.getElementById('reset').click()")
            wait_until_idle(server)
            monkeypatch.undo()
            assert tab.value("messages.length") == 0 and tab.answers() == []

            # pictures stay in their order, can be removed, and what fails can be asked again
            tab.value("""(() => {
                const file = (size, kind) => new File([new Uint8Array(size)], "x", {type: kind});
                addPictures([file(2e7, "image/heic"), file(9, "image/png"), file(1, "text/plain")]);
            })()""")
            tab.ask("What is broken?")  # waits for the pictures
            tab.wait("document.querySelectorAll('.error').length == 1 && !running")
            assert tab.value("pictures.map(entry => entry.url.length < 100)") == [False, True]
            assert tab.value("document.getElementById('text').value") == "What is broken?"
            tab.value("document.getElementById('text').value = ''")
            for left in (1, 0):
                tab.value("document.querySelector('#waiting button').click()")
                assert tab.value("pictures.length") == left
            tab.ask("What is this?")
            tab.wait("document.querySelector('.rate') && !running")
            assert tab.value("messages.length") == 2

            # an error of the model is shown
            monkeypatch.setattr(engine, "forward", broken)
            tab.ask("What is this?")
            tab.wait("document.querySelectorAll('.error').length == 2")
            assert "could not answer" in tab.value(
                "[...document.querySelectorAll('.error')].pop().textContent")
            monkeypatch.undo()

            # two tabs at once
            other.paste(EXAMPLES / "sign.png")
            tab.value("document.getElementById('reset').click()")
            tab.paste(EXAMPLES / "scene.png")
            texts = ["Which number is printed in the picture?", "How many objects are there?"]
            for page, text in zip((other, tab), texts):
                page.value(f"document.getElementById('text').value = '{text}'")
                page.value("document.getElementById('form').requestSubmit()")
            tab.wait_for_answer(1)
            other.wait_for_answer(1)
            alone = answer_of(post(server, question(texts[0], EXAMPLES / "sign.png"))[1])
            assert tab.answers() == ["3"] and other.answers() == [alone]

            # nothing is wider than a telephone's screen
            tab.call("Emulation.setDeviceMetricsOverride", width=360, height=700,
                     deviceScaleFactor=2, mobile=True)
            tab.wait("document.documentElement.scrollWidth <= 360")
            shot = base64.b64decode(tab.call("Page.captureScreenshot")["data"])
            out = Path(os.environ.get("SCREENSHOTS", folder)) / "page.png"
            out.write_bytes(shot)
            assert Image.open(out).size[0] == 720
        finally:
            browser.close()
