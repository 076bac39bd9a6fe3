"""Thousands of damaged files: each is read as usual, or refused in one sentence that names it.

Run `python -m benchmarks.fuzz [--count N]`: prints one line of counts.  Anything else
than a ValueError of one sentence, a second of work, much memory, or a file opened outside of the
checkpoint's directory is printed with the number of the mutant, and the exit code is 1.
"""

import argparse
import json
import math
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models

import convert
from data import SPECIAL_TOKENS
from model import ModelConfig, meta_model
from vision import VisionConfig

SECONDS = 1.0  # of processor time that reading a small mutant may take
HANG = 10.0  # seconds of the clock after which it is interrupted
MEMORY = 500_000  # KB that a mutant may add to the peak of the process
SENTENCE = 1000  # letters of an error message, at most
Change = Callable[[random.Random, bytes], bytes]
Mutation = Callable[[random.Random, Path], None]
DENSE = ModelConfig(
    hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=4, rope_theta=1e4, vocab_size=16, max_position_embeddings=64,
    image_token_id=14, video_token_id=15,
    vision=VisionConfig(depth=1, embed_dim=8, num_heads=2, intermediate_size=8, text_hidden_size=8))
MIXED = replace(DENSE, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=8)
# names that lead a reader out of its directory, or to no file; {} is the directory with the decoys
LEADING_OUT = ("../outside/{name}", "{outside}/{name}", "./../outside/{name}", "inner/../{name}",
               "../{folder}/{name}", "/dev/zero", "/dev/stdin", "/proc/self/environ", "..", ".", "",
               "/", "{name}\0", "{name}\n", "\x1b[2J", "~", "a" * 300, "\ud800", "file:{name}",
               "model.safetensors/", "config.json", "-", "NUL", "{name} ")
DTYPES = ("BOOL", "F4", "F6_E2M3", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16",
          "BF16", "I32", "F32", "C64", "F64", "I64", "f32", "XX", "")
# values for any place of a JSON file, as they are written
VALUES = ("0", "-1", "1", "2", "3", "1000", "1048576", "1048577", "1000000000", "2147483648",
          "9223372036854775807", "18446744073709551616", "1" + "0" * 400, "1" * 5000, "1.5", "2.0",
          "1e18", "1e308", "1e999", "-1e999", "-0.0", "1e-320", "NaN", "Infinity", "-Infinity",
          "true", "false", "null", "{}", "[]", "[[]]", "[0, 8]", "[8, 0]", "[-1]", "[8, 8, 8]",
          '{"a": 1}', '""', '"x"', '"two\\nlines"', '"\\u0000"', '"\\ud800"', '"\\u001b[2J"',
          f'"{"long " * 20_000}"', "tru", "'x'", "", "0x10", "[" * 100_000, '{"a":' * 100_000,
          "[" * 100_000 + "]" * 100_000, "[" * 200 + "]" * 200)


class Found(NamedTuple):
    """What came of a number of mutants."""

    mutants: int
    refused: int
    valid: int  # read as usual
    seconds: float  # of the slowest
    failures: list[str]  # everything else


class Hang(BaseException):
    """Raised by the clock; no handler of an ordinary error sees it."""


# ------------------------------------------------------------------------ small whole checkpoints


def small_tensors(config: ModelConfig, fp8: bool) -> convert.Tensors:
    """Random tensors of a released checkpoint; the decoder's matrices in FP8 with their scales."""
    model = meta_model(config)
    for name, names in convert.released_names(model).items():
        lines, *rest = model.get_parameter(name).shape
        for piece in names:
            tensor = torch.randn(lines // len(names), *rest).bfloat16()
            if fp8 and name.startswith("model.layers.") and name.endswith("_proj.weight"):
                yield piece, tensor.to(torch.float8_e4m3fn)
                yield piece + convert.SCALES, torch.ones(1, 1)
            else:
                yield piece, tensor


def write_small(folder: Path) -> list[Path]:
    """Checkpoints in one file and in several, dense and mixed, plain and in FP8."""
    words = {f"word {number}": number for number in range(2)}
    tokenizer = Tokenizer(models.BPE(words, []))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    paths = []
    file_bytes = convert.FILE_BYTES  # the size of files is set for a while
    for name, config, fp8, size in (("dense", DENSE, False, 5e9), ("parts", DENSE, False, 4e3),
                                    ("mixed", MIXED, False, 4e3), ("dense-fp8", DENSE, True, 5e9),
                                    ("mixed-fp8", MIXED, True, 4e3)):
        about = convert.config_json(config, torch.bfloat16)
        if fp8:
            about["quantization_config"] = convert.FP8_SETTINGS
        convert.FILE_BYTES = size
        convert.write_directory(folder / name, small_tensors(config, fp8), {
            "config.json": about, "tokenizer.json": tokenizer.to_str()})
        paths.append(folder / name)
    convert.FILE_BYTES = file_bytes
    # decoys: a name that leads here would be read as a whole checkpoint
    (folder / "outside").mkdir()
    for file in folder.glob("*/model*.safetensors"):
        (folder / "outside" / file.name).write_bytes(file.read_bytes())
    return paths


# --------------------------------------------------------------------------------------- mutations
# A Change takes a source of random choices and the bytes of a file, and returns other bytes.  A
# Mutation takes such a source and a file, and may change all of its directory.


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    """Up to four times: overwrite, insert, delete or repeat a few bytes anywhere."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place, length = rng.randrange(len(changed) + 1), rng.choice([1, 1, 2, 8, 100])
        noise = rng.choice([rng.randbytes(length), b"\0" * length, b"\xff" * length,
                            bytes(rng.choices(b'{}[]",:0123456789-eE.\\', k=length)),
                            bytes(changed[place:place + length])])
        end = place + rng.choice([0, length])
        changed[place:end] = rng.choice([noise, noise, b""])
    return bytes(changed)


def change_end(rng: random.Random, content: bytes) -> bytes:
    """Cut a file off, or append to it."""
    if rng.random() < 0.6:
        return content[:rng.choice([0, 1, 7, 8, 9, rng.randrange(len(content) + 1),
                                    len(content) - 1, len(content) - 2])]
    return content + rng.choice([b"\0", b" ", b"\n", b"}", rng.randbytes(100), content])


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def change_json(rng: random.Random, content: bytes) -> bytes:
    """Replace, remove, double or rename one or two values of a JSON file."""
    whole, inserted = json.loads(content), {}
    for number in range(rng.choice([1, 1, 1, 2])):
        found = list(places(whole))
        if not found:
            break
        container, key = rng.choice(found)
        depth = rng.choice([900, 950, rng.randint(900, 1000)])
        value = rng.choice([*VALUES, "[" * depth + "]" * depth, json.dumps(rng.choice(DTYPES))])
        action = rng.choice(["replace"] * 6 + ["remove", "double", "rename"])
        if action == "remove":
            del container[key]
        elif action == "rename" and isinstance(container, dict):
            container[rng.choice([key + "x", key.upper(), "model." + key, "", "a\nb", "x" * 99999,
                                  "__metadata__", "\ud800"])] = container.pop(key)
        else:
            # a word that is replaced in the text, since the value may be no JSON
            if action == "double" and isinstance(container, dict):
                value = f"{value}, {json.dumps(key)}: {json.dumps(container[key])}"
            container[key] = f"<{number}>"
            inserted[f'"<{number}>"'] = value
    text = json.dumps(whole, indent=rng.choice([None, 2]))
    for word, value in inserted.items():
        text = text.replace(word, value)
    return text.encode("utf-8", "surrogatepass")


def encoded(header: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + rest


def split(content: bytes) -> tuple[bytes, bytes]:
    """The JSON header of a safetensors file, and the numbers behind it."""
    end = 8 + struct.unpack("<Q", content[:8])[0]
    return content[8:end], content[end:]


def header_length(rng: random.Random, content: bytes) -> bytes:
    """Another length of the header: random, near the true one, or a power of two."""
    length, = struct.unpack("<Q", content[:8])
    near = max(0, length + rng.choice([-8, -1, 1, 8, len(content), -length]))
    power = 2 ** rng.randrange(64)
    length = rng.choice([near, power, power - 1, 2**64 - 1, 100_000_000, 100_000_001,
                         rng.randrange(2**64), rng.randrange(len(content))])
    return struct.pack("<Q", length) + content[8:]


def header_bytes(rng: random.Random, content: bytes) -> bytes:
    header, rest = split(content)
    return encoded(change_bytes(rng, header), rest)


def header_json(rng: random.Random, content: bytes) -> bytes:
    header, rest = split(content)
    return encoded(change_json(rng, header), rest)


def header_tensor(rng: random.Random, content: bytes) -> bytes:
    """Another type, shape, place or name of a tensor, of a kind that a writer could have meant."""
    header, rest = split(content)
    header = json.loads(header)
    names = [name for name in header if name != "__metadata__"]
    name, other = rng.choice(names), rng.choice(names)
    tensor, shape = header[name], header[name]["shape"]
    begin, end = tensor["data_offsets"]
    action = rng.choice(["type", "shape", "offsets", "name", "swap", "same size"])
    if action == "type":
        tensor["dtype"] = rng.choice(DTYPES)
    elif action == "shape":
        tensor["shape"] = rng.choice([
            shape[::-1], [*shape, 1], [1, *shape], shape[1:], [], [0], [-1], [2**62], [2**63],
            [2**32, 2**32], [0, 2**63], [True, *shape], [1.0, *shape], [shape], str(shape)])
    elif action == "offsets":
        tensor["data_offsets"] = rng.choice([
            [end, begin], [begin, end + 1], [begin - 1, end], header[other]["data_offsets"],
            [begin, 2**63], [2**64 - 8, 2**64 - 1], [begin, begin], [0, len(rest)], [begin], [],
            [begin, end, end], [float(begin), float(end)]])
    elif action == "swap":
        header[name], header[other] = header[other], header[name]
    elif action == "same size":
        # numbers of half the width, twice as many, or the same bits read as another type
        tensor["dtype"] = rng.choice(["F16", "I16", "U16", "BF16"])
        tensor["shape"] = rng.choice([shape, shape[::-1], [math.prod(shape)]])
    else:
        header[rng.choice([f"model.{name}", name.replace("model.", "model.language_model."), "",
                           name + convert.SCALES, name + "\n", "\x1b[2J" + name, "\0", name * 2000,
                           name.upper()])] = header.pop(name)
    return encoded(json.dumps(header).encode(), rest)


def index_names(rng: random.Random, file: Path) -> None:
    """The name of a file in an index becomes one that leads somewhere else."""
    index = json.loads(file.read_text())
    name = rng.choice(list(index["weight_map"].values()))
    leading = rng.choice(LEADING_OUT).format(
        name=name, folder=file.parent.name, outside=file.parent.parent / "outside")
    for key, value in index["weight_map"].items():
        # a name that only some tensors have makes the index contradict the files
        if value == name and rng.random() < 0.95:
            index["weight_map"][key] = leading
    file.write_text(json.dumps(index))


def special_file(rng: random.Random, file: Path) -> None:
    """Something else stands in the place of a file, or nothing."""
    other = rng.choice(["nothing", "directory", "pipe", "circle", "nowhere", "endless", "decoy"])
    file.unlink()
    if other == "directory":
        file.mkdir()
    elif other == "pipe":
        os.mkfifo(file)
    elif other == "decoy":
        # a file of another name; whoever may write links here may copy the files as well
        file.symlink_to(rng.choice(sorted(file.parent.iterdir())).name)
    elif other != "nothing":
        targets = {"circle": file.name, "nowhere": "no-such-file", "endless": "/dev/zero"}
        file.symlink_to(targets[other])


def many(rng: random.Random, file: Path) -> None:
    """A huge number in config.json, and a tensor whose name says that it is so."""
    config = json.loads(file.read_text())
    section, key, part = rng.choice([
        ("text_config", "num_hidden_layers", "layers.1."), ("vision_config", "depth", "blocks.0."),
        ("text_config", "num_experts", "experts.2.")])
    number = 10 ** rng.randrange(2, 12)
    config[section][key] = number
    file.write_text(json.dumps(config))
    weights = rng.choice(sorted(file.parent.glob("model*.safetensors")))
    header, rest = split(weights.read_bytes())
    last = f"{part.partition('.')[0]}.{number - 1}."
    weights.write_bytes(encoded(header.replace(part.encode(), last.encode()), rest))


def rewritten(change: Change) -> Mutation:
    """The mutation that changes the bytes of a file."""
    def mutate(rng: random.Random, file: Path) -> None:
        file.write_bytes(change(rng, file.read_bytes()))
    mutate.__name__ = change.__name__
    return mutate


# the files that a mutation is for; a mutation that stands here twice is made twice as often
WEIGHTS, CONFIG, TOKENIZER = "model*.safetensors", "config.json", "tokenizer.json"
KINDS = [
    (WEIGHTS, rewritten(header_length)), (WEIGHTS, rewritten(header_bytes)),
    (WEIGHTS, rewritten(header_json)), (WEIGHTS, rewritten(header_json)),
    (WEIGHTS, rewritten(header_tensor)), (WEIGHTS, rewritten(header_tensor)),
    (WEIGHTS, rewritten(change_end)), (CONFIG, rewritten(change_bytes)),
    (CONFIG, rewritten(change_json)), (CONFIG, rewritten(change_json)),
    (CONFIG, rewritten(change_json)), (CONFIG, rewritten(change_end)), (CONFIG, many),
    (convert.INDEX, rewritten(change_bytes)), (convert.INDEX, rewritten(change_json)),
    (convert.INDEX, index_names), (convert.INDEX, index_names),
    ("*", special_file), (TOKENIZER, rewritten(change_bytes)), (TOKENIZER, rewritten(change_json))]


# ------------------------------------------------------------------------------------- the verdict

WATCHERS: list[list[Path]] = []  # each gets the files that are opened


def note_open(event: str, arguments: tuple) -> None:
    """An audit hook: Python tells of each file that it opens."""
    if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
        for opened in WATCHERS:
            opened.append(Path(os.fsdecode(arguments[0])))


sys.addaudithook(note_open)  # for good: a hook cannot be removed


@contextmanager
def watched() -> Iterator[list[Path]]:
    """Yields a list that gets the files opened meanwhile; a hang is interrupted."""
    def interrupt(number: int, frame: Any) -> None:
        raise Hang(f"still busy after {HANG} seconds")

    # safetensors opens files in Rust, of which Python does not tell
    def noted_open(file: Path, **options: Any) -> Any:
        opened.append(Path(file))
        return original(file, **options)

    opened: list[Path] = []
    original, convert.safe_open = convert.safe_open, noted_open
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, HANG)
    WATCHERS.append(opened)
    try:
        yield opened
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        WATCHERS.remove(opened)
        signal.signal(signal.SIGALRM, before)
        convert.safe_open = original


def read(folder: Path) -> str:
    """Read a checkpoint as the project does.  Returns the refusal, or "" if all of it is valid."""
    try:
        # calls read_config, load_tokenizer, check_tokenizer, find_checkpoint and load_model
        convert.load_checkpoint(folder, torch.bfloat16, torch.device("cpu"))
    except ValueError as error:
        sentence = str(error)
        assert str(folder) in sentence, f"names no file: {sentence[:300]!r}"
        assert sentence.isprintable(), f"is no single line: {sentence[:300]!r}"
        assert len(sentence) < SENTENCE, f"is {len(sentence)} letters long: {sentence[:300]!r}"
        return sentence
    return ""


def verdict(folder: Path) -> tuple[str, float]:
    """Read a mutant: "" or its refusal, and seconds.  Raises whatever must not happen."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    with watched() as opened:
        refusal = read(folder)
    seconds = time.process_time() - started
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert seconds < SECONDS, f"took {seconds:.1f} seconds"
    assert grown < MEMORY, f"took {grown} KB"
    outside = [str(file) for file in opened if os.path.abspath(file.parent) != str(folder)]
    assert not outside, f"opened {outside}"
    return refusal, seconds


def damaged_headers(count: int) -> Found:
    """Damage a file of a small checkpoint in `count` ways, and read the checkpoint each time."""
    with tempfile.TemporaryDirectory() as name:
        healthy = {}
        for folder in write_small(Path(name)):
            assert read(folder) == ""  # also imports what is imported late
            healthy[folder] = {file.name: file.read_bytes() for file in folder.iterdir()}
        files = {pattern: [file for folder in healthy for file in sorted(folder.glob(pattern))]
                 for pattern, _ in KINDS}

        refused, slowest, failures = 0, 0.0, []
        for number in range(count):
            rng = random.Random(number)
            pattern, mutate = KINDS[number % len(KINDS)]
            file = rng.choice(files[pattern])
            mutate(rng, file)
            try:
                refusal, seconds = verdict(file.parent)
                slowest = max(slowest, seconds)
                refused += refusal != ""
            except KeyboardInterrupt:
                raise
            except BaseException:  # a panic of a library in Rust is no Exception
                failures.append(f"mutant {number}, {mutate.__name__} of {file.parent.name}/"
                                f"{file.name}:\n{traceback.format_exc()}")
            # the directory as it was
            shutil.rmtree(file.parent)
            file.parent.mkdir()
            for file_name, content in healthy[file.parent].items():
                (file.parent / file_name).write_bytes(content)
    return Found(count, refused, count - refused - len(failures), slowest, failures)


def main() -> None:
    """Read mutants, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50_000, help="mutants")
    torch.set_num_threads(1)  # tensors this small are faster so
    found = damaged_headers(parser.parse_args().count)
    for failure in found.failures:
        print(failure.encode("ascii", "backslashreplace").decode())
    print(f"{found.mutants:,} mutants: {found.refused:,} refused, {found.valid:,} read as valid, "
          f"{len(found.failures):,} failed; the slowest took {found.seconds:.3f} seconds")
    sys.exit(bool(found.failures))


if __name__ == "__main__":
    main()
