"""Malformed records, pictures and shards are named, and nothing else is lost; packing is exact."""

import gzip
import io
import json
import random
import signal
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features
from ranks import resident
from tokenizers import Tokenizer

import data
from convert import load_tokenizer
from data import COLUMNS, FileData, Index, Rows, decode_all, measure, open_index
from vision import MAX_PIXELS, MIN_PIXELS, open_image, patch_grid, to_rgb

LENGTH = 512


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(Path("assets/tiny"))


@pytest.fixture
def alarm() -> Iterator[None]:
    """Stop what would go on for ever."""
    def stop(*_: Any) -> None:
        raise TimeoutError("it takes too long")
    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------- pictures


def file_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(width: int, height: int, pixels: bytes = b"") -> bytes:
    """A PNG whose header claims a size."""
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
              (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part)) + name + part + struct.pack(">I", zlib.crc32(name + part))
        for name, part in chunks)


# one half dark, the other light, with some noise
NOISE = np.random.default_rng(0).integers(0, 12, (84, 56))
GREY = (NOISE + 40 + 160 * (np.arange(56) > 28)).astype(np.uint8)
PICTURE = Image.fromarray(GREY).convert("RGB")
FRAMES = {"save_all": True, "append_images": [PICTURE.transpose(Image.Transpose.ROTATE_180)]}
JPEG, PNG, WEBP = (file_of(PICTURE, kind) for kind in ("JPEG", "PNG", "WEBP"))
SIDEWAYS = Image.Exif()
SIDEWAYS[0x0112] = 6
HEALTHY = {
    "plain.jpg": JPEG, "plain.png": PNG, "plain.webp": WEBP, "really a png.jpg": PNG,
    "cmyk.jpg": file_of(PICTURE.convert("CMYK"), "JPEG"),
    "deep.png": file_of(Image.fromarray(GREY.astype(np.uint16) * 257), "PNG"),
    "palette.png": file_of(PICTURE.quantize(32), "PNG"),
    "moves.gif": file_of(PICTURE, "GIF", **FRAMES),
    "moves.webp": file_of(PICTURE, "WEBP", **FRAMES),
    "turned.jpg": file_of(PICTURE.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=SIDEWAYS),
}
TINY = {f"one pixel.{kind}": file_of(Image.new("L", (1, 1)), kind) for kind in ("png", "jpeg")}
BAD_HEADERS = {
    "empty.jpg": b"", "empty.png": b"", "empty.webp": b"", "cut.webp": WEBP[:len(WEBP) // 2],
    "header cut.jpg": JPEG[:100], "header cut.png": PNG[:20], "header cut.webp": WEBP[:20],
    "bomb.png": png_of(60000, 60000), "no width.png": png_of(0, 28), "flat.png": png_of(28, 0),
    "narrow.png": file_of(Image.new("L", (1, 400)), "PNG"),
    "low.png": file_of(Image.new("L", (400, 1)), "PNG"),
    "text.png": b"This is no picture.\n", "zeros.jpg": bytes(3000),
}
BAD_BODIES = {  # whose headers are whole
    "cut.jpg": JPEG[:-200], "cut.png": PNG[:len(PNG) // 2],
    "flipped.png": PNG[:1000] + bytes([PNG[1000] ^ 255]) + PNG[1001:],
    "nearly empty.png": png_of(300, 300, zlib.compress(bytes(500))),
    "no scale.tif": file_of(PICTURE.convert("F"), "TIFF"),
}
if features.check("avif"):
    AVIF = HEALTHY["plain.avif"] = file_of(PICTURE, "AVIF")
    BAD_HEADERS |= {"cut.avif": AVIF[:99], "no item.avif": AVIF.replace(b"av01", b"none")}
    start = AVIF.index(b"mdat") + 4
    BAD_BODIES["zeros.avif"] = AVIF[:start] + bytes(len(AVIF) - start)
PICTURES = HEALTHY | TINY | BAD_HEADERS | BAD_BODIES


@pytest.mark.parametrize("name", HEALTHY)
def test_odd_pictures_are_read_as_they_look(name: str) -> None:
    found = np.asarray(to_rgb(open_image(HEALTHY[name])), dtype=float)
    assert np.abs(found - np.asarray(PICTURE)).mean() < 5
    assert patch_grid(HEALTHY[name]) == patch_grid(PICTURE) == (1, 6, 4)


# ----------------------------------------------------------------------------------------- records


def talk(*turns: Any) -> list[dict]:
    """Turns in LLaVA's words: human, gpt, ..."""
    return [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]


def record_of(name: str, *pictures: str, answer: str = "Halves.", **changes: Any) -> dict:
    """A LLaVA record with pictures."""
    turns = talk("<image>" * len(pictures) + "What is this?", answer)
    return {"id": name, "conversations": turns, "images": list(pictures), **changes}


def item(**entries: Any) -> dict:
    """What makes a record ask with this item."""
    return {"conversations": [], "images": [], "messages": [
        {"role": "user", "content": [entries]}, {"role": "assistant", "content": "That."}]}


BAD_RECORDS = {  # what is changed in a record with one picture
    "missing file": {"images": ["nowhere.png"]}, "a folder": {"images": ["."]},
    "NUL in a path": {"images": ["a\0.png"]}, "images is a number": {"images": 3},
    "surplus picture": {"images": ["plain.png"] * 2},
    "missing picture": {"conversations": talk("<image><image>", "Two.")},
    "answer null": {"conversations": talk("<image>", None)},
    "answer is a number": {"conversations": talk("<image>", 3)},
    "answer is no text": {"conversations": talk("<image>", [{"type": "text", "text": 3}])},
    "half a surrogate": {"conversations": talk("<image>", "\ud800")},
    "only human turns": {"conversations": talk("<image>")},
    "item without a picture": item(type="image"), "item's path": item(type="image", image=3),
    "item's paths": item(type="image", image=["plain.png"]), "item's type": item(type=["image"]),
}
BAD_LINES = {
    "cut": b'{"id": "a", "conversations": [{"from": "hum', "not UTF-8": b'{"id": "\xff\xfe"}',
    "nested": b"[" * 100_000, "NUL": b'{"id": "a"\0}', "long number": b'{"id": %s}' % (b"9" * 5000),
    "no object": b"[1]",
}
Members = list[tuple[str, bytes]]


def members_of(name: str, *pictures: str, answer: str = "Halves.", **changes: Any) -> Members:
    """A record in upstream's unpacked layout."""
    fields = {f"{i}_{picture}": PICTURES[picture] for i, picture in enumerate(pictures)}
    about = {"id": name, "texts": record_of(name, *pictures, answer=answer)["conversations"],
             "name": list(fields), "media": "image" if fields else "text", **changes}
    return [(f"{name}.json", json.dumps(about).encode()),
            *((f"{name}.{field}", content) for field, content in fields.items())]


BAD_MEMBERS: dict[str, Callable[[Members], Members]] = {  # of the members of a healthy record
    "twice": lambda both: [*both, both[1]],
    "interleaved": lambda both: [(name.replace(".", f"{key}.", 1), content)
                                 for name, content in both for key in "ab"],
    "no json": lambda both: both[1:], "no picture": lambda both: both[:1],
    "name without a place": lambda both: [(both[0][0], both[0][1].replace(b"<image>", b""))],
    **{f"json {kind}": lambda both, line=line: [(both[0][0], line), both[1]]
       for kind, line in BAD_LINES.items()},
}


def block(name: str, content: bytes = b"", **header: Any) -> bytes:
    """A member of a tar; `header` replaces what its header says."""
    info = tarfile.TarInfo(name)
    for key, value in {"size": len(content), **header}.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


def tar_of(members: Members) -> bytes:
    """A tar as `tarfile` writes it, ending with 1 to 11 kB of zeros."""
    content = b"".join(block(*member) for member in members) + bytes(1024)
    return content + bytes(-len(content) % tarfile.RECORDSIZE)


def write_source(path: Path, bad_kinds: list[str], expected: dict[str, tuple[str, str]]) -> Path:
    """Write 500 healthy and 50 malformed records; `expected` gets their kinds and places, by id."""
    pictures = [*HEALTHY, *TINY, ""]
    kinds = [*(pictures[i % len(pictures)] for i in range(500)),
             *(bad_kinds[i % len(bad_kinds)] for i in range(50))]
    random.Random(path.name).shuffle(kinds)
    entries = []
    for number, kind in enumerate(kinds):
        name = f"{path.stem}{number:04}"
        expected[name] = kind, f"{path}[{number}]"
        used = [kind] if kind in PICTURES else ["plain.png"] if kind else []
        if path.suffix == ".tar":
            members = members_of(name, *used)
            entries += BAD_MEMBERS[kind](members) if kind in BAD_MEMBERS else members
        else:
            entries.append(BAD_LINES.get(kind) or json.dumps(
                record_of(name, *used) | BAD_RECORDS.get(kind, {})).encode())
    path.write_bytes(tar_of(entries) if path.suffix == ".tar" else b"\n".join(entries)
                     if path.suffix == ".jsonl" else b"[" + b",\n".join(entries) + b"]")
    return path


def test_malformed_inputs_are_named(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """200 among 2,000: each is named, by its header or by decoding; the others come once each."""
    for name, content in PICTURES.items():
        (tmp_path / name).write_bytes(content)
    expected: dict[str, tuple[str, str]] = {}
    pictures = [*BAD_HEADERS, *BAD_BODIES]
    files = [write_source(tmp_path / name, kinds, expected)
             for name, kinds in (("a.jsonl", [*pictures, *BAD_RECORDS, *BAD_LINES]),
                                 ("b.json", [*pictures, *BAD_RECORDS]),
                                 ("c.tar", [*pictures, *BAD_MEMBERS]),
                                 ("d.tar", [*BAD_MEMBERS, *pictures]))]
    before = resident("VmRSS")
    index, decoded = measure(files, tokenizer), measure(files, tokenizer, check=decode_all)
    rows = Rows(FileData(index, tokenizer, LENGTH, 0))
    delivered, lost, most = Counter(), {}, 0
    for number in range(rows.data.rows_in(0)):
        row = rows[number].row
        delivered.update(name for i, name in enumerate(row.names) if i not in row.lost)
        lost |= {row.names[i]: reason for i, reason in row.lost.items()}
        most = max(most, resident("VmRSS"))
    assert most - before < 2**29

    broken = {name for name, (kind, _) in expected.items() if kind in BAD_BODIES}
    healthy = {name for name, (kind, _) in expected.items() if kind in ("", *HEALTHY, *TINY)}
    bad = expected.keys() - broken - healthy
    assert len(healthy) == 2000 and len(bad) + len(broken) == 200
    for found, wanted in ((index, bad), (decoded, bad | broken)):
        named = Counter()
        for reject in found.rejects:
            # a record is named by its id or, where that is not known, by its place
            names = [name for name in wanted if name in reject["reason"]
                     or expected[name][1] in reject["reason"]]
            assert len(names) == 1, reject
            named.update(names)
        assert [expected[name] for name in wanted - named.keys()] == found.damaged == []
        # of two samples that are interleaved, all four members are rejected
        assert {(expected[name][0], count) for name, count in named.items() if count > 1} == {
            ("interleaved", 4)}
    assert delivered == Counter(healthy)
    assert lost.keys() == broken and all(name in reason for name, reason in lost.items())


# ------------------------------------------------------------------------------------------ shards


NAMES = [f"s{i:02}" for i in range(30)]
MEMBERS = [member for name in NAMES for member in members_of(name, "plain.png")]
WHOLE = tar_of(MEMBERS)
HEAD, BODY, NEXT, END = (sum(len(block(*member)) for member in MEMBERS[:count])
                         for count in (20, 21, 22, 60))  # HEAD, BODY: members of sample 10


def picture_10(content: bytes = b"", **header: Any) -> bytes:
    """The shard with another picture of sample 10."""
    return WHOLE[:BODY] + block(MEMBERS[21][0], content, **header) + WHOLE[NEXT:]


DAMAGES = {  # the shard, and how many of its first samples are whole
    "cut inside a member": (WHOLE[:BODY + 700], 10), "cut in a header": (WHOLE[:HEAD + 100], 10),
    "cut between samples": (WHOLE[:HEAD], 10), "cut between members": (WHOLE[:BODY], 10),
    "cut before its end": (WHOLE[:END], 30),
    "checksum": (WHOLE[:BODY] + b"?" + WHOLE[BODY + 1:], 10),
    "header of zeros": (WHOLE[:HEAD] + bytes(512) + WHOLE[HEAD + 512:], 10),
    "zeros from a sample on": (WHOLE[:HEAD] + bytes(len(WHOLE) - HEAD), 10),
    "zeros from a picture on": (WHOLE[:BODY] + bytes(len(WHOLE) - BODY), 10),
    "empty": (b"", 0), "zeros": (bytes(20480), 0), "compressed": (gzip.compress(WHOLE), 0),
    "1 TB": (picture_10(size=2**40), 10), "2^80 bytes": (picture_10(size=2**80), 10),
    "-512 bytes": (picture_10(size=-512), 10),
    "1 TB of a long name": (picture_10(size=2**40, type=tarfile.GNUTYPE_LONGNAME), 10),
    "1 TB of attributes": (picture_10(size=2**40, type=tarfile.XHDTYPE), 10),
    "wrong attributes": (picture_10(b"25 GNU.sparse.map=1,x,2\n", type=tarfile.XHDTYPE), 10),
    "symbolic link": (picture_10(type=tarfile.SYMTYPE, linkname="/etc/passwd"), 30),
    "hard link": (picture_10(type=tarfile.LNKTYPE, linkname=MEMBERS[1][0]), 30),
}


def names_in(index: Index) -> list[str]:
    return [index.record(i)["id"] for i in range(len(index.table))]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shards_are_found(damage: str, tmp_path: Path, tokenizer: Tokenizer,
                                  alarm: None) -> None:
    """By name; and what stands before the damage is used."""
    content, count = DAMAGES[damage]
    path = tmp_path / "shard.tar"
    path.write_bytes(content)
    index = measure([path], tokenizer)
    said = index.damaged + [reject["reason"] for reject in index.rejects]
    assert names_in(index) == [name for name in NAMES[:count] if "link" not in damage
                               or name != NAMES[10]]
    assert any(str(path) in sentence for sentence in said)
    assert index.damaged or "link" in damage and "s10: it lacks its member" in said[0]


def test_names_that_lead_outside_write_nothing(tmp_path: Path, tokenizer: Tokenizer,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    path = folder / "shard.tar"
    outside = [(f"../../{name}", content) for name, content in members_of("x", "plain.png")]
    path.write_bytes(tar_of([*outside, *MEMBERS]))
    index = measure([path], tokenizer)
    # read or named, but not passed over
    assert names_in(index) == ["x", *NAMES] or "../../x" in str(index.rejects + index.damaged)
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize("source", ["pipe:cat x", "pipe:cat x.tar", "{shard.tar,pipe:cat x.tar}"])
def test_a_source_is_no_command(source: str, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("shard.tar").write_bytes(WHOLE)
    with pytest.raises(ValueError, match="pipe:cat x"):
        data.source_files(source)


# ----------------------------------------------------------------------------------------- packing


def pack(out: Path, *sources: Path, workers: int = 0, length: int = LENGTH) -> dict[str, bytes]:
    """What `data.py pack` writes."""
    data.run(["pack", *map(str, sources), "--out", str(out), "--length", str(length), "--workers",
              str(workers)])
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """A file j of 40 records, and a shard s of 30; of each, 5 cannot be used and 6 are too long."""
    monkeypatch.setattr(data, "SHARD", 20)
    monkeypatch.setattr(data, "CHUNK", 10)
    (tmp_path / "plain.png").write_bytes(PNG)
    (tmp_path / "j.jsonl").write_text("".join(json.dumps(record_of(
        f"j{i:02}", *["nowhere.png" if i == 5 else "plain.png"][:i % 3],
        answer="long " * 600 if i == 6 else f"Number {i}.")) + "\n" for i in range(40)))
    (tmp_path / "s.tar").write_bytes(tar_of([member for i, name in enumerate(NAMES)
        for member in members_of(name, *["text.png" if i == 5 else "plain.png"][:i % 3],
                                 answer="long " * (600 if i == 6 else i))]))
    return [tmp_path / "j.jsonl", tmp_path / "s.tar"]


def test_packed_shards_are_checked(sources: list[Path], tmp_path: Path,
                                   tokenizer: Tokenizer) -> None:
    out = tmp_path / "out"
    pack(out, *sources)
    whole = {path: path.read_bytes() for path in sorted(out.glob("*.tar"))}
    (first, content), (second, other), *_ = whole.items()
    entries = json.loads((out / "index.json").read_text())["files"]
    place = content.index(PNG) + 100
    flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1:]
    for word, changed in (("", {}), ("bytes", {first: content[:-2000]}), ("missing", {first: None}),
                          ("sha256", {first: flipped}), ("", {first: other, second: content})):
        for path, now in (whole | changed).items():
            path.unlink(missing_ok=True)
            if now is not None:
                path.write_bytes(now)
        index = open_index([str(out)], tokenizer, "", (MIN_PIXELS, MAX_PIXELS), 0)
        index.leave_out_damaged(digests=True)
        said = index.damaged
        assert all(any(str(path) in words and word in words for words in said) for path in changed)
        assert bool(said) == bool(changed)
        if index.damaged:
            with pytest.raises(ValueError, match=first.name):
                index.check(skip_bad=False)
        index.check(skip_bad=True)
        # nothing is read from what is damaged
        damaged = [path for path in changed if any(str(path) in words for words in index.damaged)]
        assert len(names_in(index)) == sum(entry["samples"] for entry in entries
                                           if out / entry["file"] not in damaged)
    for broken in (b"", (out / "index.npy").read_bytes()[:-100], b"x" * 500):
        (out / "index.npy").write_bytes(broken)
        with pytest.raises(ValueError, match=str(out)):
            Index.load(out)


def interrupted(out: Path, *sources: Path, length: int = LENGTH) -> None:
    """Pack until the second shard is half written."""
    write = data.write_shard

    def stop(item: tuple, **more: Any) -> Any:
        if item[0] == 1:
            (out / "shard-000001.tar").write_bytes(b"half")
            raise KeyboardInterrupt
        return write(item, **more)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(data, "write_shard", stop)
        pack(out, *sources, length=length)


def test_pack_is_deterministic_and_resumes(sources: list[Path], tmp_path: Path) -> None:
    """Each record is in one row or named as rejected; workers and interruptions change no byte."""
    whole = pack(tmp_path / "0", *sources)
    for workers in (1, 2):
        assert pack(tmp_path / f"{workers}", *sources, workers=workers) == whole
    again = tmp_path / "again"
    interrupted(again, *sources)
    measured, shard = again / f"measured-{LENGTH}.partial", again / "shard-000000.tar"
    measured.write_bytes(measured.read_bytes()[:-50])  # in the middle of a line
    written = shard.stat().st_mtime_ns
    assert pack(again, *sources) == whole and shard.stat().st_mtime_ns == written

    index = Index.load(tmp_path / "0")
    assert sum(name.endswith(".tar") for name in whole) == len(index.files) >= 3
    tokens, row = (index.table[:, COLUMNS.index(name)] for name in ("tokens", "row"))
    assert np.bincount(row, tokens).max() <= LENGTH and np.bincount(row).min() > 0
    reasons = [json.loads(line)["reason"] for line in whole["rejects.jsonl"].splitlines()]
    ids = [*(f"j{i:02}" for i in range(40)), *NAMES]
    named = [name for reason in reasons for name in ids if name in reason]
    assert sorted([*names_in(index), *named]) == ids
    assert sorted(named) == ["j05", "j06", "s05", "s06"]
    assert sum("tokens" in reason for reason in reasons) == 2


@pytest.mark.parametrize("other", ["length", "sources"])
def test_shards_of_another_plan_are_not_used(other: str, sources: list[Path],
                                             tmp_path: Path) -> None:
    """Written for rows of another length, or from other sources: refused or written anew."""
    whole, again = pack(tmp_path / "whole", *sources), tmp_path / "again"
    interrupted(again, *(reversed(sources) if other == "sources" else sources),
                length=256 if other == "length" else LENGTH)
    try:
        assert pack(again, *sources) == whole
    except ValueError as error:
        assert str(again) in str(error)


@pytest.mark.parametrize("key, name", [("\udce4", "x"), ("x", "\ud800")])
def test_names_that_are_no_unicode(key: str, name: str, tmp_path: Path,
                                   tokenizer: Tokenizer) -> None:
    """Latin-1 in a shard and half a surrogate in JSON: can be packed, and named in a message."""
    (_, about), _ = members_of(name, "plain.png")
    (tmp_path / "s.tar").write_bytes(tar_of([
        (f"{key}.json", about), (f"{key}.0_plain.png", PNG), (f"{key}1.json", about),
        (f"{key}2.json", about), (f"{key}2.0_plain.png", b"text")]))
    pack(tmp_path / "out", tmp_path / "s.tar")
    assert len(names_in(Index.load(tmp_path / "out"))) == 1
    rejects = measure([tmp_path / "s.tar"], tokenizer).rejects
    assert len(rejects) == 2 and "".join(reject["reason"] for reject in rejects).encode()
