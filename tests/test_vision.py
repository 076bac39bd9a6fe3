"""Pictures of every kind become the same patches; sizes obey the limits."""

import io
import random

import numpy as np
import pytest
from PIL import Image

from vision import CELL, image_to_patches, open_image, patch_grid, smart_resize, to_rgb


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
