"""Pictures of every kind become the same patches; sizes obey the limits."""

import io
import random
import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vision import CELL, image_to_patches, open_image, patch_grid, smart_resize, to_rgb

KINDS = ["JPEG", "PNG", "WEBP", "TIFF"]


def corner_picture() -> Image.Image:
    """28 x 56 pixels, white but for a red top-left corner."""
    image = Image.new("RGB", (28, 56), "white")
    image.paste("red", (0, 0, 14, 14))
    return image


def test_exif_orientation_is_applied() -> None:
    turned = corner_picture().transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6  # "turn me clockwise to look right"
    assert np.array_equal(to_rgb(turned), corner_picture())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "GIF"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_grid_is_known_from_the_header(kind: str, orientation: int) -> None:
    image = Image.new("RGB", (200, 100), "red")
    image.getexif()[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, kind, **({} if kind == "GIF" else {"exif": image.getexif()}))
    patches, grid = image_to_patches(open_image(file.getvalue()))
    assert patch_grid(file.getvalue()) == grid
    assert grid == ((1, 14, 8) if orientation >= 6 and kind != "GIF" else (1, 8, 14))


# ------------------------------------------------------------------------------- odd metadata


def entry(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """An entry of a TIFF directory, as in EXIF; kinds: 2 text, 3 short, 5 rational, 7 undefined."""
    return struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")


def exif(*entries: bytes, end: bytes = bytes(4)) -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + end


TURNED = entry(0x112, 3, 1, b"\6")  # orientation 6: turn clockwise by 90 degrees
ODD_EXIF = {  # what the file says, and whether the picture is turned
    "orientation 9": (exif(entry(0x112, 3, 1, b"\x09")), False),
    "orientation 255": (exif(entry(0x112, 3, 1, b"\xff")), False),
    "orientation 0": (exif(entry(0x112, 3, 1, b"\0")), False),
    "orientation 65535": (exif(entry(0x112, 3, 1, b"\xff\xff")), False),
    "orientation as text": (exif(entry(0x112, 2, 2, b"6")), False),
    "orientation undefined": (exif(entry(0x112, 7, 1, b"\6")), False),
    "orientation as a fraction": (exif(entry(0x112, 5, 1, b"\x1a"),
                                       end=struct.pack("<III", 0, 6, 1)), False),
    "width as text beside it": (exif(entry(0x100, 2, 4, b"112"), TURNED), True),
    "maker as a fraction": (exif(entry(0x10f, 5, 1, b"\x26"), TURNED,
                                 end=struct.pack("<III", 0, 1, 1)), True),
    "an unknown type beside it": (exif(entry(0x10e, 99, 1, b"x"), TURNED), True),
    "an offset outside of it": (exif(entry(0x10f, 2, 999, b"\xff\xff"), TURNED), True),
    "cut after two bytes": (b"Exif\0\0II", False),
    "no directory": (b"Exif\0\0II*\0\x08\0\0\0", False),
    "noise": (b"Exif\0\0" + bytes(range(64)), False),
    "as it should be": (exif(TURNED), True),
}


def picture_file(kind: str, metadata: bytes = b"", mode: str = "RGB") -> bytes:
    """A file of 112 x 56 pixels, red but for a white left half."""
    image = Image.new("RGB", (112, 56), "red")
    image.paste("white", (0, 0, 56, 56))
    file = io.BytesIO()
    more = {"exif": metadata} if metadata else {}
    image.convert(mode).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}), **more)
    return file.getvalue()


def same_grid(content: bytes) -> tuple[int, int, int]:
    """The grid of a picture's header, which must be that of its pixels; without a warning."""
    with warnings.catch_warnings(action="error"):
        grid = patch_grid(content)
        assert image_to_patches(open_image(content))[1] == grid
    return grid


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("name", ODD_EXIF)
def test_malformed_exif_does_not_spoil_a_picture(kind: str, name: str) -> None:
    """One reading for header and pixels: turned if there is a valid orientation."""
    metadata, turned = ODD_EXIF[name]
    content = picture_file(kind, metadata)
    assert same_grid(content) == ((1, 8, 4) if turned else (1, 4, 8))
    upright = to_rgb(open_image(content))
    first_half = np.asarray(upright)[:28, :28]
    assert first_half.min() > 200  # white: at the left, or turned at the top
    assert to_rgb(upright).size == upright.size  # turned once


@pytest.mark.parametrize("value, kind, turned", [
    (6, 3, True), (9, 3, False), (0, 3, False), (255, 3, False), (6, 4, True), (54, 2, False)])
def test_orientation_of_a_tiff(value: int, kind: int, turned: bool) -> None:
    """Its own tag, of any value and type; Pillow turns such a file itself."""
    file = io.BytesIO()
    image = Image.new("RGB", (112, 56), "red")
    image.save(file, "TIFF", tiffinfo={0x112: 1})
    content = bytearray(file.getvalue())
    at = content.index(struct.pack("<HH", 0x112, 3))
    content[at:at + 12] = entry(0x112, kind, 1, struct.pack("<I", value))
    assert same_grid(bytes(content)) == ((1, 8, 4) if turned else (1, 4, 8))


XMP = (b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/>'
       b'</rdf:RDF></x:xmpmeta>')


@pytest.mark.parametrize("kind", KINDS)
def test_orientation_in_xmp(kind: str) -> None:
    file, image = io.BytesIO(), Image.new("RGB", (112, 56), "red")
    if kind == "PNG":
        about = b"XML:com.adobe.xmp" + bytes(5) + XMP
        content = picture_file("PNG")
        content = content[:33] + chunk(b"iTXt", about) + content[33:]
    else:
        image.save(file, kind, **({"tiffinfo": {700: XMP}} if kind == "TIFF" else {"xmp": XMP}))
        content = file.getvalue()
    assert same_grid(content) == (1, 8, 4)


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG."""
    check = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + check


@pytest.mark.parametrize("metadata", [
    chunk(b"eXIf", exif(TURNED)[6:]),
    chunk(b"iTXt", b"XML:com.adobe.xmp" + bytes(5) + XMP),
    chunk(b"tEXt", b"note\0" + b"a" * 3000) + chunk(b"eXIf", exif(TURNED)[6:]),
    chunk(b"eXIf", exif(entry(0x100, 2, 4, b"112"), TURNED)[6:]),
], ids=["exif", "xmp", "text and exif", "odd exif"])
@pytest.mark.parametrize("pixels", [1, 3])
def test_metadata_of_a_png_may_stand_behind_its_pixels(metadata: bytes, pixels: int) -> None:
    """However many chunks the pixels have."""
    content = picture_file("PNG")
    at = content.index(b"IDAT") - 4
    size = int.from_bytes(content[at:at + 4])
    data = content[at + 8:at + 8 + size]
    step = -(-len(data) // pixels)
    cut = b"".join(chunk(b"IDAT", data[i:i + step]) for i in range(0, len(data), step))
    assert same_grid(content[:at] + cut + metadata + content[-12:]) == (1, 8, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2**10, 2**21, 2**23])
def test_text_and_profiles_of_megabytes(kind: str, size: int) -> None:
    """The pixels are small and fine, so the file is read."""
    file, image = io.BytesIO(), Image.new("RGB", (112, 56), "red")
    profile = bytes(size)
    if kind == "WEBP" or kind == "JPEG" and size > 2**22:
        profile = bytes(min(size, 2**20))
    image.save(file, kind, icc_profile=profile)
    content = file.getvalue()
    if kind == "PNG":
        content = (content[:33] + chunk(b"zTXt", b"note\0\0" + zlib.compress(b"a" * size))
                   + chunk(b"tEXt", b"text\0" + b"b" * size) + content[33:])
    assert same_grid(content) == (1, 4, 8)


def grey_png(depth: int, transparent: int | None, colours: int = 1) -> bytes:
    """A ramp from black to white, of 1 (grey) or 3 channels with `depth` bits."""
    ramp = np.linspace(0, 2**depth - 1, 56 * 56).astype(f">u{depth // 8}").reshape(56, 56)
    lines = b"".join(b"\0" + np.repeat(row, colours).tobytes() for row in ramp)
    clear = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent) * colours)
    header = struct.pack(">IIBBBBB", 56, 56, depth, 0 if colours == 1 else 2, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + clear
            + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("grey", [0.0, 0.25, 0.5, 1.0])
def test_a_transparent_grey(depth: int, colours: int, grey: float) -> None:
    """What has that grey is white; all else is as without it."""
    value = round(grey * (2**depth - 1))
    plain, clear = (np.asarray(to_rgb(open_image(grey_png(depth, v, colours)))).astype(int)
                    for v in (None, value))
    assert 126 < plain.mean() < 129
    same = plain == clear
    near = abs(plain - 255 * grey) <= 1  # what an 8-bit reading of the grey may mean
    assert (same | near).all() and (clear[~same] == 255).all()


@pytest.mark.parametrize("kind", ["I;16", "I;16B"])
def test_sixteen_bit_tiff(kind: str) -> None:
    ramp = np.linspace(0, 65535, 56 * 56).astype("<u2" if kind == "I;16" else ">u2").reshape(56, 56)
    file = io.BytesIO()
    Image.frombytes(kind, (56, 56), ramp.tobytes()).save(file, "TIFF")
    assert 126 < np.asarray(to_rgb(open_image(file.getvalue()))).mean() < 129


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("size, fits", [((10000, 9500), True), ((14000, 13000), False)])
def test_very_large_pictures(kind: str, size: tuple[int, int], fits: bool, tmp_path: Path) -> None:
    """Up to Pillow's limit they are read, without a warning; beyond it the file is named."""
    file = tmp_path / f"huge.{kind.lower()}"
    Image.new("1", size).save(file, **({"compression": "group4"} if kind == "TIFF" else {}))
    with warnings.catch_warnings(action="error"):
        if fits:
            assert patch_grid(file)[1] > 100
        for read in (() if fits else (patch_grid, open_image)):
            with pytest.raises(ValueError, match=r"huge\.\w+ cannot be read as .*exceeds"):
                read(file)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [
    lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b[:10], lambda b: b"GIF89a" + b[6:],
    lambda b: b[:8] + bytes(len(b) - 8), lambda b: bytes(reversed(b))],
    ids=["half", "empty", "ten bytes", "another signature", "zeros", "reversed"])
def test_damaged_files_are_named(kind: str, change: Callable, tmp_path: Path) -> None:
    """In one sentence, whatever Pillow raises for them."""
    file = tmp_path / "broken.img"
    file.write_bytes(change(picture_file(kind)))
    with pytest.raises(ValueError, match=r"broken\.img cannot be read as a picture"):
        image_to_patches(open_image(file))


# -------------------------------------------------------------------------------- colours and sizes


def test_transparency_is_laid_on_white() -> None:
    image = corner_picture().convert("RGBA")
    image.putalpha(Image.fromarray(np.where(np.arange(56)[:, None] < 14, 255, 0).astype(
        np.uint8).repeat(28, axis=1)))
    assert np.array_equal(to_rgb(image), corner_picture())
    half = to_rgb(Image.new("RGBA", (1, 1), (0, 0, 0, 51)))
    assert half.getpixel((0, 0)) == (204, 204, 204)


@pytest.mark.parametrize("mode", ["P", "L", "1", "CMYK", "RGBA", "LA"])
def test_modes(mode: str) -> None:
    assert to_rgb(Image.new("RGB", (4, 4), "white").convert(mode)).getpixel((1, 1)) == (255,) * 3


def test_sixteen_bit_grey_is_scaled() -> None:
    image = Image.fromarray(np.full((4, 4), 128 * 257, dtype=np.uint16))
    assert to_rgb(image).getpixel((0, 0)) == (128, 128, 128)


def test_merge_order_of_patches() -> None:
    """A red corner of 2 x 2 patches is the first four rows: blocks stand together."""
    image = corner_picture().resize((56, 112), Image.Resampling.NEAREST)  # 4 columns, 8 rows
    patches, grid = image_to_patches(image)
    assert grid == (1, 8, 4)
    red = patches[:, :196].mean(dim=1) - patches[:, 196:392].mean(dim=1) > 0.5
    assert red.nonzero().flatten().tolist() == [0, 1, 2, 3]


def test_resize_table() -> None:
    table = {(42, 70): (56, 56), (480, 640): (476, 644), (10, 10): (56, 56), (1, 200): (28, 812),
             (2000, 2000): (1596, 1596)}
    assert {size: smart_resize(*size) for size in table} == table


def test_resize_properties() -> None:
    """Sides are multiples of 28; the area keeps the limits, the shape about its aspect."""
    rng = random.Random(0)
    for _ in range(500):
        height, width = (round(10 ** rng.uniform(0.7, 3.6)) for _ in range(2))
        if max(height, width) > 20 * min(height, width):
            continue
        rows, columns = smart_resize(height, width)
        assert rows % CELL == columns % CELL == 0
        assert 3136 <= rows * columns <= 2_560_000
        if min(rows, columns) > 10 * CELL:
            assert abs(np.log(rows * width / (columns * height))) < 0.1


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pictures_of_unknown_scale_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode {mode}"):
        to_rgb(Image.new(mode, (4, 4)))


def test_too_narrow() -> None:
    with pytest.raises(ValueError, match="2001 x 10"):
        smart_resize(10, 2001)


@pytest.mark.parametrize("frames", [2, 3, 5])
@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP", "TIFF"])
def test_animations_are_their_first_picture(kind: str, frames: int) -> None:
    colours = ("red", "white", "blue", "green", "black")
    first, *others = (Image.new("RGB", (112, 56), colour) for colour in colours[:frames])
    file = io.BytesIO()
    first.save(file, kind, save_all=True, append_images=others)
    assert same_grid(file.getvalue()) == (1, 4, 8)
    red, _, blue = to_rgb(open_image(file.getvalue())).getpixel((3, 3))
    assert red > 200 and blue < 50


@pytest.mark.parametrize("end", [-12, -4])
def test_a_png_may_end_behind_its_pixels(end: int) -> None:
    assert same_grid(picture_file("PNG")[:end]) == (1, 4, 8)


@pytest.mark.parametrize("keyword", [b"exif", b"transparency", b"xmp", b"icc_profile"])
@pytest.mark.parametrize("kind", [b"tEXt", b"zTXt", b"iTXt"])
def test_texts_with_the_names_of_metadata(keyword: bytes, kind: bytes) -> None:
    """Pillow keeps the texts of a PNG beside its own notes, under their keywords."""
    between = {b"tEXt": b"\0", b"zTXt": b"\0\0", b"iTXt": bytes(5)}[kind]
    text = zlib.compress(b"any text") if kind == b"zTXt" else b"any text"
    content = picture_file("PNG")
    content = content[:33] + chunk(kind, keyword + between + text) + content[33:]
    assert same_grid(content) == (1, 4, 8)
