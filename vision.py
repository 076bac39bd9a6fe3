"""From a picture to visual tokens: resize, cut into patches, RICE-ViT, patch merger.

In: a PIL picture, or the packed patches (P, 588) of many.  Out: visual tokens (M, C), M = P / 4,
ready to stand among the decoder's token embeddings.
Called by `data.py` (pictures -> patches) and `model.py` (patches -> tokens); calls
`attention_kernel.py`.

The idea.  A picture keeps its shape ("native resolution"): it is resized only to the nearest
multiple of 28 pixels and cut into h x w patches of 14 x 14.  Patches of all pictures stand in one
row, each picture (each *frame* of a video) being one attention segment with a class token in front.
Position is rotary in two dimensions: with f_i = 10000^(-i / (E/4)), i = 0 .. E/4 - 1, the patch at
row r, column c turns its query and key by the angles (r f_0, r f_1, ..., c f_0, c f_1, ...); the
class token's angles are learned.  After the blocks the class tokens go, and the merger joins each
2 x 2 block of patches into one token of the decoder's width.

To make that join a plain reshape, patches are in *merge order* from the start: the 2 x 2 blocks in
raster order, inside a block top-left, top-right, bottom-left, bottom-right.

    columns  0 1   2 3
    row 0    0 1 | 4 5         a picture of 4 x 4 patches and the place of each in the packed row
    row 1    2 3 | 6 7
             ----+-----
    row 2    8 9 | 12 13
    row 3   10 11| 14 15

Shapes: P patches, S segments (frames), D width of the ViT, C width of the decoder, H heads, E head
width, M = P / 4 visual tokens, I pictures.  grid_thw (I, 3): frames, patch rows, patch columns.

Run `python vision.py PICTURE`: prints what becomes of it, with shapes.
"""

import io
import math
import struct
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, PngImagePlugin
from torch import Tensor, nn

from attention_kernel import flash_attn_varlen_func

PATCH = 14  # pixels a side
MERGE = 2  # patches a side of a visual token
PATCH_NUMBERS = 3 * PATCH**2  # 588 numbers of a patch: channel, y, x
CELL = PATCH * MERGE  # pixels a side of a visual token; picture sides become multiples of it
MIN_PIXELS = 56 * 56  # the released processor's limits on height * width
MAX_PIXELS = 1600 * 1600
MAX_ASPECT = 200
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

Picture = Image.Image | str | Path | bytes  # decoded, a file's path, or a file's content

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes of text or colour profile; Pillow's own limit is 2^20
# What Pillow's decoders raise for a malformed file, beside its own OSError and SyntaxError.
MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError,
             NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError)
# EXIF orientation -> what makes the picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class VisionConfig:
    """RICE-ViT and merger; the defaults are the released ViT-L/14."""

    depth: int = 24  # transformer blocks
    embed_dim: int = 1024  # D
    num_heads: int = 16  # H
    intermediate_size: int = 4096  # width of the MLP
    text_hidden_size: int = 2560  # C, the decoder's width
    layer_norm_eps: float = 1e-5
    released_class_token_shift: bool = False  # True repeats a slip of the released code, see strip

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


# ------------------------------------------------------------------------------- picture -> patches


def smart_resize(height: int, width: int, min_pixels: int = MIN_PIXELS,
                 max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Nearest (height, width) in multiples of 28 whose area lies between the limits, in pixels.

    Rounds half to even, as the reference processor (Qwen2-VL) does: 42 x 70 -> 56 x 56.
    Raises ValueError if one side is more than 200 times the other.

    >>> smart_resize(480, 640)
    (476, 644)
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"a picture of {width} x {height} pixels is too narrow: "
                         f"the longer side may be at most {MAX_ASPECT} times the shorter")
    rows, columns = round(height / CELL), round(width / CELL)
    if rows * columns * CELL**2 > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (max(1, math.floor(x / shrink / CELL)) for x in (height, width))
    elif rows * columns * CELL**2 < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(x * grow / CELL) for x in (height, width))
    return rows * CELL, columns * CELL


def without_pixels(file: BinaryIO) -> BinaryIO:
    """The chunks of a PNG without its pixels, which are skipped unread.

    A PNG may have its EXIF behind the pixels.  Pillow finds it there only after decoding them.
    """
    chunks = [file.read(len(PNG_SIGNATURE))]
    while len(header := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", header)
        if kind == b"IEND":
            break
        if kind in (b"IDAT", b"acTL", b"fcTL", b"fdAT"):  # pixels, and those of an animation
            file.seek(size + 4, io.SEEK_CUR)  # the 4 bytes are the checksum
        else:
            chunks += [header, file.read(size + 4)]
    for kind in (b"IDAT", b"IEND"):  # both empty
        chunks.append(struct.pack(">I4sI", 0, kind, zlib.crc32(kind)))
    return io.BytesIO(b"".join(chunks))


def open_image(image: Picture, decode: bool = True) -> Image.Image:
    """Open a picture given as a path or as a file's content; without `decode`, its header alone.

    Raises ValueError naming the file if it is missing or unreadable.
    """
    if isinstance(image, Image.Image):
        return image
    name = "a picture of the shard" if isinstance(image, bytes) else image
    try:
        # Pillow warns of malformed metadata and of large pictures; neither concerns the pixels
        with (io.BytesIO(image) if isinstance(image, bytes) else open(image, "rb") as file,
              warnings.catch_warnings(action="ignore")):
            is_png = file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE
            file.seek(0)
            with Image.open(file if decode or not is_png else without_pixels(file)) as opened:
                if decode:
                    opened.load()
                else:
                    orientation(opened)  # is remembered: the file is about to be closed
                return opened
    except FileNotFoundError:
        raise ValueError(f"there is no picture {name}") from None
    except (OSError, SyntaxError, *MALFORMED) as error:
        raise ValueError(f"{name} cannot be read as a picture: {error}") from error


def exif_orientation(exif: bytes) -> int | None:
    """The orientation in a block of EXIF, if it has one, whatever its other entries are."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = ">" if tiff.startswith(b"MM") else "<"
    try:
        first, = struct.unpack_from(f"{order}I", tiff, 4)
        entries, = struct.unpack_from(f"{order}H", tiff, first)
        for at in range(first + 2, first + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", tiff, at)
            if tag == ExifTags.Base.Orientation and kind in (3, 4) and count == 1:
                number = "H" if kind == 3 else "I"  # of 16 or of 32 bits
                return struct.unpack_from(order + number, tiff, at + 8)[0]
    except struct.error:  # it is cut off
        pass
    return None


def orientation(image: Image.Image) -> int:
    """How a picture lies, 1 (upright) to 8 as EXIF counts; 1 where the file says nothing valid.

    The one reading of it, for headers and for pixels.
    """
    exif = image.info.get("exif")  # or a text of that name
    found = exif_orientation(exif) if isinstance(exif, bytes) else None
    try:
        if found is None:  # a TIFF's own tag, or XMP
            with warnings.catch_warnings(action="ignore"):
                # not PNG's own getexif, which would decode the picture
                found = Image.Image.getexif(image).get(ExifTags.Base.Orientation)
    except (OSError, SyntaxError, *MALFORMED):
        return 1
    return found if isinstance(found, int) and found in TURNS else 1


def patch_grid(image: Picture, min_pixels: int = MIN_PIXELS,
               max_pixels: int = MAX_PIXELS) -> tuple[int, int, int]:
    """The grid that `image_to_patches` will cut a picture into, known from the file's header."""
    image = open_image(image, decode=False)
    width, height = image.size
    # Pillow gives the size of a TIFF upright already, if the tag for it is a TIFF's own
    upright = image.format == "TIFF" and image.tag_v2.get(ExifTags.Base.Orientation) in TURNS
    if orientation(image) >= 5 and not upright:
        width, height = height, width
    height, width = smart_resize(height, width, min_pixels, max_pixels)
    return 1, height // PATCH, width // PATCH


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB: EXIF orientation applied, transparency laid on white."""
    image.load()
    if (turn := TURNS.get(orientation(image))) is not None:
        image = image.transpose(turn)
        # what says how it lay is no longer true
        image.info = {key: image.info[key] for key in ("transparency",) if key in image.info}
    clear = image.info.get("transparency")  # a colour that stands for transparency
    if isinstance(clear, str) or isinstance(clear, tuple) and max(clear) > 255:
        # a text of that name; or a colour of 16 bits, of which the pixels have the upper 8
        image = image.copy()
        del image.info["transparency"]
        if isinstance(clear, tuple):
            image.info["transparency"] = tuple(value >> 8 for value in clear)
    if image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip rather than scale
        grey = np.asarray(image)
        white = grey == (-1 if clear is None else clear)
        image = Image.fromarray(np.where(white, 255, grey // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"a picture's numbers are of mode {image.mode}, whose scale is unknown: "
                         "save it with 8 or 16 bits a channel")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def image_to_patches(image: Image.Image, min_pixels: int = MIN_PIXELS,
                     max_pixels: int = MAX_PIXELS) -> tuple[Tensor, tuple[int, int, int]]:
    """Resize, normalise and cut one picture.

    Returns patches (P, 588) float32 in merge order, the columns being (channel, y, x) of a patch,
    and the grid (1, rows, columns) in patches.  Equal to the released processor bit for bit before
    normalisation (Pillow below 13, whose bicubic filter the checkpoints were trained with).
    """
    image = to_rgb(image)
    height, width = smart_resize(image.height, image.width, min_pixels, max_pixels)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) / 255  # (height, width, 3)
    pixels = (pixels - CLIP_MEAN) / CLIP_STD
    rows, columns = height // PATCH, width // PATCH
    blocks = pixels.reshape(rows // 2, 2, PATCH, columns // 2, 2, PATCH, 3)
    patches = blocks.transpose(0, 3, 1, 4, 6, 2, 5)  # block row, column, y, x, channel, py, px
    return torch.from_numpy(patches.reshape(rows * columns, -1)), (1, rows, columns)


# --------------------------------------------------------------------------------- rotary positions


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + E/2}) of every head by the token's angles; in fp32, cast back.

    x: (T, H, E); cos, sin: (T, 1, E/2).
    """
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def patch_positions(grid_thw: Tensor) -> Tensor:
    """Row and column of every patch of a packed row in merge order, (P, 2) int64."""
    sizes = grid_thw.prod(dim=1)
    rows, columns = (torch.repeat_interleave(grid_thw[:, i], sizes) for i in (1, 2))  # (P,) each
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    index = (torch.arange(len(starts), device=starts.device) - starts) % (rows * columns)
    block, inside = index // 4, index % 4
    return torch.stack([block // (columns // 2) * 2 + inside // 2,
                        block % (columns // 2) * 2 + inside % 2], dim=1)


def frame_sizes(grid_thw: Tensor) -> Tensor:
    """Patches of each frame, (S,): a picture is one frame, a video grid_thw[i, 0] of one size."""
    return torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])


def visual_tokens(grid_thw: Tensor) -> Tensor:
    """Visual tokens of each picture, (I,): one for four patches."""
    return grid_thw.prod(dim=1) // MERGE**2


# -------------------------------------------------------------------------------------- the network


class PatchEmbed(nn.Module):
    """A 14 x 14 convolution of stride 14 without bias, which on cut patches is one product."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, PATCH, PATCH, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1))  # (P, D)


class Attention(nn.Module):
    """Bidirectional attention inside each frame; q, k, v from one product, laid out [q | k | v]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, cos: Tensor,
                sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(1)  # (P + S, H, E)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return self.proj(out.flatten(1))  # (P + S, D)


class Mlp(nn.Module):
    """Two layers with the exact (erf) GELU between them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.embed_dim, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.attn = Attention(config)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, cos: Tensor,
                sin: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x), cu_seqlens, max_seqlen, cos, sin)
        return x + self.mlp(self.norm2(x))


class Merger(nn.Module):
    """Four neighbouring patches -> one visual token of the decoder's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = MERGE**2 * config.embed_dim
        self.ln_q = nn.LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(),
                                 nn.Linear(width, config.text_hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        x = self.ln_q(x).view(-1, MERGE**2 * x.shape[-1])  # (M, 4 D): merge order makes it a view
        return self.mlp(x)  # (M, C)


class RiceViT(nn.Module):
    """Packed patches of any number of pictures -> visual tokens.

    Source: RICE (arXiv 2507.20025), as used by LLaVA-OneVision-1.5 (arXiv 2509.23661).
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.class_embedding = nn.Parameter(torch.empty(config.embed_dim))
        self.class_pos_emb = nn.Parameter(torch.empty(1, config.head_dim // 2))  # RoPE angles
        self.pre_layernorm = nn.LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def rope(self, grid_thw: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every token's angles, class tokens included: (P + S, 1, E/2) each."""
        half = self.config.head_dim // 2
        powers = torch.arange(0, half, 2, device=grid_thw.device, dtype=torch.float32) / half
        angles = patch_positions(grid_thw)[..., None] * 10000.0**-powers  # (P, 2, E/4)
        frames = int(grid_thw[:, 0].sum())
        class_angles = self.class_pos_emb.float().expand(frames, half)
        angles = torch.cat([class_angles, angles.flatten(1)]).index_select(0, order)
        return angles.cos()[:, None], angles.sin()[:, None]

    def strip(self, x: Tensor, segment: Tensor) -> Tensor:
        """Drop the class tokens: (P + S, D) -> (P, D).

        The released modeling code forgets that each class token moved all later rows by one, so its
        segments after the first are shifted; `released_class_token_shift` does the same.
        """
        offset = 1 if self.config.released_class_token_shift else segment + 1
        return x.index_select(0, torch.arange(len(segment), device=x.device) + offset)

    def forward(self, patches: Tensor, grid_thw: Tensor) -> Tensor:
        """patches (P, 588) and grid_thw (I, 3) int64 -> (M, C)."""
        sizes = frame_sizes(grid_thw)  # (S,)
        frames = len(sizes)
        segment = torch.repeat_interleave(torch.arange(frames, device=patches.device), sizes)
        cu_seqlens = F.pad((sizes + 1).cumsum(0), (1, 0))  # (S + 1,), class tokens counted
        # sources are stacked [class tokens; patches]; order[i] is the source of packed row i
        patch_rows = torch.arange(len(patches), device=patches.device)
        order = torch.empty(len(patches) + frames, dtype=torch.int64, device=patches.device)
        order[cu_seqlens[:-1]] = torch.arange(frames, device=patches.device)
        order[patch_rows + segment + 1] = patch_rows + frames

        x = self.patch_embed(patches.to(self.class_embedding.dtype))
        x = torch.cat([self.class_embedding.expand(frames, -1), x]).index_select(0, order)
        x = self.pre_layernorm(x)  # (P + S, D)
        cos, sin = self.rope(grid_thw, order)
        max_seqlen = len(x) - len(cu_seqlens) + 2  # an upper bound that asks the GPU nothing
        for block in self.blocks:
            x = block(x, cu_seqlens, max_seqlen, cos, sin)
        return self.merger(self.strip(x, segment))


def main() -> None:
    try:
        if len(sys.argv) != 2:
            raise ValueError("usage: python vision.py PICTURE")
        image = open_image(sys.argv[1])
        patches, grid = image_to_patches(image)
    except ValueError as error:
        print(f"vision.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{sys.argv[1]}: {image.width} x {image.height} pixels, {image.mode}")
    print(f"resized to {grid[2] * PATCH} x {grid[1] * PATCH}, "
          f"{grid[1]} x {grid[2]} patches: {tuple(patches.shape)}")
    print(f"visual tokens: {len(patches) // MERGE**2}")


if __name__ == "__main__":
    main()
