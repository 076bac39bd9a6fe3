"""From a picture to visual tokens: resize, cut into patches, RICE-ViT, patch merger.

In: a PIL picture, or the packed patches (P, 588) of many pictures.  Out: visual tokens (M, C),
which take their places among the decoder's token embeddings.
Called by `data.py`, `sample.py` and `assets/scenes.py` (pictures), `model.py` (the network),
`parallel.py`, `train.py` and `convert.py` (sizes, configuration); calls `attention_kernel.py`.

The idea.  A picture keeps its own resolution and shape: within wide limits, each side is only
rounded to a multiple of 28 pixels.  The picture is then cut into h x w patches of 14 x 14 pixels.
The patches of all pictures lie end to end in one tensor.  Each picture, or each *frame* of a video,
is one attention segment and has a class token in front.

Positions are rotary, in two dimensions.  With f_i = 10000^(-i / (E/4)), i = 0 .. E/4 - 1, the patch
at height y and column x turns its query and its key by the angles (y f_0, y f_1, ..., x f_0,
x f_1, ...).  The angles of the class token are learned.  After the last block the class tokens are
dropped, and the merger joins each block of 2 x 2 patches into one visual token.

Patches are in *merge order* from the start: the four patches of a block follow each other, so the
merger only reshapes.  For a picture of 4 x 4 patches, these are their places in the tensor:

             x = 0  1    2  3
    y = 0        0  1 |  4  5
    y = 1        2  3 |  6  7
                ------+------
    y = 2        8  9 | 12 13
    y = 3       10 11 | 14 15

Shapes: P patches, S segments (frames), D width of the ViT, C width of the decoder, H heads, E head
width, M = P / 4 visual tokens, I pictures.  grid_thw (I, 3): frames, height and width in patches.

Run `python vision.py PICTURE`: prints the sizes of the picture on its way to visual tokens.
"""

import io
import math
import struct
import sys
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from PIL.Image import Transpose
from torch import Tensor, nn

from attention_kernel import flash_attn_varlen_func

PATCH = 14  # pixels a side
MERGE = 2  # patches a side of a visual token
PATCH_NUMBERS = 3 * PATCH**2  # 588 numbers in a patch: channel, y, x
CELL = PATCH * MERGE  # 28 pixels a side of a visual token
# The released processor's limits on a picture: height * width, and longer / shorter side.
MIN_PIXELS = 56 * 56
MAX_PIXELS = 1600 * 1600
MAX_ASPECT = 200
ANIMATIONS = (".gif", ".webp", ".png")  # videos that Pillow opens; PyAV opens the others
VIDEO_FRAMES = 768  # at most
VIDEO_TOKENS = 0.9 * 128_000  # visual tokens of a video at most
# Mean and standard deviation of red, green and blue (0 to 1) in the pictures CLIP was trained on.
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)


class FilePart(NamedTuple):
    """A picture inside a larger file, such as a shard; it is read when it is opened."""

    file: str  # the larger file
    start: int  # byte
    size: int  # bytes


# Decoded, the path of a file, its content, or a part of a larger file.
Picture = Image.Image | str | Path | bytes | FilePart


class Video(NamedTuple):
    """A video among the pictures of a sample; its frames are opened by `open_frames`."""

    file: Picture  # of an animation; or the path of a folder of frames or of a film


def content_of(file: Picture) -> bytes | str | Path:
    """The bytes of a part of a larger file; anything else as it is."""
    if not isinstance(file, FilePart):
        return file
    with open(file.file, "rb") as larger:
        larger.seek(file.start)
        return larger.read(file.size)


def name_of(file: Picture, kind: str) -> str:
    """How a message calls a picture or a video: its path, or where it lies; bytes have no name."""
    if isinstance(file, FilePart):
        return f"{kind} in {file.file}"
    return kind if isinstance(file, bytes | Image.Image) else str(file)


def why_unreadable(error: Exception) -> str:
    """Why a file cannot be read.  Pillow's own sentence may hold an address of this process."""
    return "its format is unknown" if isinstance(error, UnidentifiedImageError) else str(error)


PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The end of a PNG without pixels: two empty chunks, each with its length, name and checksum.
PNG_END = b"\0\0\0\0IDAT\x35\xaf\x06\x1e\0\0\0\0IEND\xae\x42\x60\x82"
PngImagePlugin.MAX_TEXT_CHUNK = 2**26  # bytes of a text or colour profile; Pillow's limit is 2^20

# For a malformed file, Pillow raises OSError, SyntaxError or one of these.
MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, EOFError, OverflowError,
             NotImplementedError, struct.error, zlib.error, Image.DecompressionBombError)
UNREADABLE = (OSError, SyntaxError, RuntimeError, *MALFORMED)  # RuntimeError: AVIF

ORIENTATION = ExifTags.Base.Orientation
# (tag, type, count) of a valid entry in EXIF -> format of its number: 16 or 32 bits.
ORIENTATION_ENTRIES = {(ORIENTATION, 3, 1): "H", (ORIENTATION, 4, 1): "I"}
# Orientation -> the turn that makes a picture upright.  Orientation 1 is upright.
TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class VisionConfig:
    """RICE-ViT and merger; the defaults are the released ViT-L/14."""

    depth: int = 24  # transformer blocks
    embed_dim: int = 1024  # D
    num_heads: int = 16  # H
    intermediate_size: int = 4096  # width of the MLP
    text_hidden_size: int = 2560  # C, the decoder's width
    layer_norm_eps: float = 1e-5  # added to the variance
    released_class_token_shift: bool = False  # True repeats a slip of the released code, see strip

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


# ------------------------------------------------------------------------------- picture -> patches


def smart_resize(height: int, width: int, min_pixels: int = MIN_PIXELS,
                 max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Nearest (height, width) in multiples of 28 whose area lies between the limits, in pixels.

    A side is rounded half to even, as in the reference processor (Qwen2-VL): 42 x 70 -> 56 x 56.
    Raises ValueError if one side is more than 200 times the other.
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(f"a picture of {width} x {height} pixels is too narrow: "
                         f"the longer side may be at most {MAX_ASPECT} times the shorter")
    new_height = round(height / CELL) * CELL
    new_width = round(width / CELL) * CELL
    if new_height * new_width > max_pixels:
        # Rounding down keeps the area below the limit, but no side may become 0.
        shrink = math.sqrt(height * width / max_pixels)
        new_height = max(CELL, math.floor(height / shrink / CELL) * CELL)
        new_width = max(CELL, math.floor(width / shrink / CELL) * CELL)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / CELL) * CELL
        new_width = math.ceil(width * grow / CELL) * CELL
    return new_height, new_width


def without_pixels(file: BinaryIO) -> BinaryIO:
    """Copy a PNG without its pixels, which are skipped unread.  Return any other file as it is.

    A PNG may store its EXIF after the pixels, where Pillow finds it only by decoding them.
    """
    signature = file.read(len(PNG_SIGNATURE))
    if signature != PNG_SIGNATURE:
        file.seek(0)
        return file
    chunks = [signature]
    while True:
        # A chunk: size of the content (4 bytes), name (4), content, checksum (4).
        header = file.read(8)
        if len(header) < 8 or header.endswith(b"IEND"):
            break
        size, name = struct.unpack(">I4s", header)
        size += 4
        if name in (b"IDAT", b"acTL", b"fcTL", b"fdAT"):  # pixels, and an animation's frames
            file.seek(size, io.SEEK_CUR)
        else:
            chunks += [header, file.read(size)]
    return io.BytesIO(b"".join(chunks) + PNG_END)


def open_image(image: Picture, decode: bool = True) -> Image.Image:
    """Open a picture: the path of a file, or its content.  Without `decode`, read only the header.

    Raises ValueError with the file's name if the file is missing or cannot be read.
    """
    if isinstance(image, Image.Image):
        return image
    name = name_of(image, "a picture")
    try:
        image = content_of(image)
        file = io.BytesIO(image) if isinstance(image, bytes) else open(image, "rb")
        # Pillow warns about malformed metadata and large pictures; neither affects the pixels.
        with file, warnings.catch_warnings(action="ignore"):
            content = file if decode else without_pixels(file)
            with Image.open(content) as opened:
                if decode:
                    opened.load()
                else:
                    # Ask now: Pillow remembers the answer after the file is closed.
                    orientation(opened)
                return opened
    except FileNotFoundError:
        raise ValueError(f"there is no picture {name}") from None
    except UNREADABLE as error:
        raise ValueError(f"{name} cannot be read as a picture: {why_unreadable(error)}") from error


def exif_orientation(exif: bytes) -> int | None:
    """The orientation in a block of EXIF, or None.  Other entries may be malformed."""
    # An EXIF block is a TIFF header (byte order, place of the directory) and a directory: the
    # number of entries, then 12 bytes an entry: tag (2), type (2), count (4), value (4).
    tiff = exif.removeprefix(b"Exif\0\0")
    order = ">" if tiff.startswith(b"MM") else "<"
    try:
        directory = struct.unpack_from(order + "I", tiff, 4)[0]
        entries = struct.unpack_from(order + "H", tiff, directory)[0]
        for i in range(entries):
            place = directory + 2 + 12 * i
            entry = struct.unpack_from(order + "HHI", tiff, place)
            if entry in ORIENTATION_ENTRIES:
                number_format = order + ORIENTATION_ENTRIES[entry]
                return struct.unpack_from(number_format, tiff, place + 8)[0]
    except struct.error:  # the block is cut off
        pass
    return None


def orientation(image: Image.Image) -> int:
    """Orientation of a picture: 1 (upright) to 8, as in EXIF; 1 if the file says nothing valid.

    `patch_grid` and `to_rgb` both ask this function, so the grid always fits the pixels.
    """
    number = None
    exif = image.info.get("exif")
    if isinstance(exif, bytes):  # a PNG may hold a text under this name
        number = exif_orientation(exif)
    try:
        if number is None:
            # A TIFF's own tag, or XMP.  The `getexif` method of a PNG would decode the picture.
            with warnings.catch_warnings(action="ignore"):
                number = Image.Image.getexif(image).get(ORIENTATION)
    except UNREADABLE:
        return 1
    return number if isinstance(number, int) and number in TURNS else 1


def patch_grid(image: Picture | Video, min_pixels: int = MIN_PIXELS,
               max_pixels: int = MAX_PIXELS) -> tuple[int, int, int]:
    """The grid into which `cut_patches` will cut a picture; reads only the file's header.

    A video has limits of its own, and its frames are decoded.
    """
    if isinstance(image, Video):
        frames = open_frames(image)
        return len(frames), *patch_grid(frames[0], *video_limits(len(frames)))[1:]
    image = open_image(image, decode=False)
    width, height = image.size
    # If the orientation is a TIFF's own tag, Pillow already gives the upright size.
    upright = image.format == "TIFF" and image.tag_v2.get(ORIENTATION) in TURNS
    if orientation(image) >= 5 and not upright:  # 5 to 8 swap height and width
        width, height = height, width
    height, width = smart_resize(height, width, min_pixels, max_pixels)
    return 1, height // PATCH, width // PATCH


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn a picture upright, put it on white where it is transparent, and convert it to RGB."""
    image.load()
    turn = TURNS.get(orientation(image))
    if turn is not None:
        image = image.transpose(turn)

    clear = image.info.get("transparency")  # the colour that stands for transparency
    if clear is not None:
        image = image.copy()  # the caller's picture keeps its metadata
    if isinstance(clear, str):  # a PNG's text under this name
        del image.info["transparency"]
    elif isinstance(clear, tuple) and max(clear) > 255:
        # The colour has 16 bits a channel; Pillow keeps the upper 8 bits of each pixel.
        image.info["transparency"] = tuple(value >> 8 for value in clear)

    if image.mode.startswith("I;16"):
        # Pillow would clip 16-bit grey to 255.  Scale it: 65535 / 257 = 255.
        grey = np.asarray(image)
        scaled = (grey // 257).astype(np.uint8)
        if isinstance(clear, int):
            scaled[grey == clear] = 255
        image = Image.fromarray(scaled)
    elif image.mode in ("I", "F"):
        raise ValueError(f"a picture's numbers are of mode {image.mode}, whose scale is unknown: "
                         "save it with 8 or 16 bits a channel")
    elif image.has_transparency_data:  # an alpha channel or a transparent colour
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    image.info = {}  # the old orientation is no longer true
    return image


def cut_patches(image: Picture | Video, min_pixels: int = MIN_PIXELS,
                max_pixels: int = MAX_PIXELS) -> tuple[Tensor, tuple[int, int, int]]:
    """Resize and cut a picture: patches (P, 588) uint8, and the grid (1, h, w) in patches.

    Patches are in merge order, each as (channel, y, x).  All numbers equal the released processor's
    bit for bit (with Pillow below 13, whose bicubic filter the checkpoints were trained with).
    Of a video, all frames are cut: the grid is (t, h, w).
    """
    if isinstance(image, Video):
        frames = open_frames(image)
        cut = [cut_patches(frame, *video_limits(len(frames))) for frame in frames]
        grids = {grid for _, grid in cut}
        if len(grids) > 1:
            name = name_of(image.file, "a video")
            raise ValueError(f"the frames of {name} are not of one size")
        return torch.cat([patches for patches, _ in cut]), (len(frames), *cut[0][1][1:])

    image = open_image(image)
    # nearly all pictures are upright and RGB: they need no copy
    if image.mode != "RGB" or orientation(image) != 1 or "transparency" in image.info:
        image = to_rgb(image)
    height, width = smart_resize(image.height, image.width, min_pixels, max_pixels)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    h, w = height // PATCH, width // PATCH
    pixels = np.asarray(image).reshape(h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH, 3)
    # From (block y, patch y, pixel y, block x, patch x, pixel x, channel)
    # to   (block y, block x, patch y, patch x, channel, pixel y, pixel x):
    patches = pixels.transpose(0, 3, 1, 4, 6, 2, 5).reshape(h * w, PATCH_NUMBERS)
    return torch.from_numpy(patches), (1, h, w)


def normalize_patches(patches: Tensor) -> Tensor:
    """Patches (P, 588) uint8 -> float32, the numbers that the ViT takes, on the same device."""
    # a patch has 196 numbers of red, then of green, then of blue
    mean = torch.tensor(CLIP_MEAN, device=patches.device).repeat_interleave(PATCH**2)  # (588,)
    std = torch.tensor(CLIP_STD, device=patches.device).repeat_interleave(PATCH**2)
    return (patches.float() / 255 - mean) / std


def image_to_patches(image: Image.Image, min_pixels: int = MIN_PIXELS,
                     max_pixels: int = MAX_PIXELS) -> tuple[Tensor, tuple[int, int, int]]:
    """Resize, cut and normalise one picture: patches (P, 588) float32, grid (1, h, w)."""
    patches, grid = cut_patches(image, min_pixels, max_pixels)
    return normalize_patches(patches), grid


# -------------------------------------------------------------------------------- video -> pictures


def video_limits(frames: int) -> tuple[int, int]:
    """Least and largest area of a frame, in pixels, as Qwen's video reader has them."""
    # a video may have 90 % of 128,000 visual tokens, shared by its frames, two by two
    per_frame = VIDEO_TOKENS * CELL**2 / frames * 2
    least = 128 * CELL**2
    return least, int(max(min(768 * CELL**2, per_frame), 1.05 * least))


def sampled_frames(total: int, fps: float) -> list[int]:
    """Numbers of the frames that stand for a video: two a second, an even number, 4 to 768."""
    most = min(VIDEO_FRAMES, total) // 2 * 2
    wanted = min(max(total / fps * 2, 4), most, total)
    count = max(1, int(wanted) // 2 * 2)
    return [round(i * (total - 1) / max(1, count - 1)) for i in range(count)]


def open_frames(video: Video) -> list[Image.Image]:
    """The sampled frames of an animated GIF or WebP, a folder of pictures, or a film.

    Raises ValueError with the file's name.
    """
    file = content_of(video.file)
    if isinstance(file, bytes):
        return animation_frames(io.BytesIO(file), video)
    path = Path(file)
    if path.is_dir():
        # somebody has sampled these frames already: two a second
        pictures = sorted(part for part in path.iterdir() if not part.name.startswith("."))
        if not pictures:
            raise ValueError(f"{path} holds no frames")
        return [open_image(pictures[i]) for i in sampled_frames(len(pictures), 2.0)]
    if path.suffix.lower() in ANIMATIONS:
        return animation_frames(path, video)
    return film_frames(path)


def animation_frames(file: BinaryIO | Path, video: Video) -> list[Image.Image]:
    """The sampled frames of an animated picture, each on white where it is transparent."""
    try:
        with Image.open(file) as opened:
            opened.load()  # a WebP says only then how long a frame is shown
            total = getattr(opened, "n_frames", 1)
            # milliseconds that the first frame is shown; browsers show it 100 if the file says 0
            duration = opened.info.get("duration") or 100
            frames = []
            for i in sampled_frames(total, 1000 / duration):
                opened.seek(i)
                frames.append(to_rgb(opened))
            return frames
    except UNREADABLE as error:
        name = name_of(video.file, "a video")
        raise ValueError(f"{name} cannot be read as a video: {why_unreadable(error)}") from error


def film_frames(path: Path) -> list[Image.Image]:
    """The sampled frames of a video file, decoded by PyAV."""
    if not path.is_file():
        raise ValueError(f"there is no video {path}")
    try:
        import av
    except ImportError:
        raise ValueError(f"{path} needs a package that is not here: pip install av") from None
    try:
        with av.open(str(path)) as film:
            stream = film.streams.video[0]
            total = stream.frames or sum(1 for _ in film.decode(stream))
            chosen = set(sampled_frames(total, float(stream.average_rate)))
            # frames are decoded one after another, and only those chosen are kept
            film.seek(0)
            decoded = enumerate(film.decode(stream))
            frames = [frame.to_image() for i, frame in decoded if i in chosen]
            if not frames:
                raise ValueError("it has no frames")
            return frames
    except (av.error.FFmpegError, ZeroDivisionError, *UNREADABLE) as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error


# ------------------------------------------------------------------------------ sizes and positions


def frame_sizes(grid_thw: Tensor) -> Tensor:
    """Patches of each frame, (S,).  A picture has one frame, a video several of one size."""
    return torch.repeat_interleave(grid_thw[:, 1] * grid_thw[:, 2], grid_thw[:, 0])


def visual_tokens(grid_thw: Tensor) -> Tensor:
    """Visual tokens of each picture, (I,): one for four patches."""
    return grid_thw.prod(dim=1) // MERGE**2


def patch_positions(grid_thw: Tensor) -> Tensor:
    """Position (y, x) of every patch in its frame, for patches in merge order: (P, 2) int64."""
    sizes = frame_sizes(grid_thw)  # (S,)
    start = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)  # (P,)
    index = torch.arange(len(start), device=start.device) - start  # (P,)
    width = torch.repeat_interleave(grid_thw[:, 2], grid_thw.prod(dim=1))  # (P,)
    # Blocks are in raster order, and so are the patches inside a block.
    block, inside = index // MERGE**2, index % MERGE**2
    across = width // MERGE  # blocks side by side
    y = block // across * MERGE + inside // MERGE
    x = block % across * MERGE + inside % MERGE
    return torch.stack([y, x], dim=1)  # (P, 2)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + E/2}) of every head by the token's angles, in fp32.

    x: (T, H, E); cos, sin: (T, 1, E/2).  Returns the type of x.
    """
    # A turn by the angle a: (u, v) -> (u cos a - v sin a, v cos a + u sin a).
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.to(x.dtype)


# -------------------------------------------------------------------------------------- the network


class PatchEmbed(nn.Module):
    """A 14 x 14 convolution of stride 14 without bias; on cut patches it is one matrix product."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.embed_dim, PATCH, PATCH, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1))  # (P, D)


class Attention(nn.Module):
    """Attention inside each frame, in both directions."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.embed_dim, 3 * config.embed_dim)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim)

    def forward(self, x: Tensor, cu_seqlens: Tensor, max_seqlen: int, cos: Tensor,
                sin: Tensor) -> Tensor:
        # One product gives [q | k | v], each with the heads side by side.
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (P + S, 3, H, E)
        q, k, v = qkv.unbind(1)  # (P + S, H, E)
        q = apply_rope(q, cos, sin)
        k = apply_rope(k, cos, sin)
        out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return self.proj(out.flatten(1))  # (P + S, D)


class Mlp(nn.Module):
    """Two linear layers with the exact (erf) GELU between them."""

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
        return x + self.mlp(self.norm2(x))  # (P + S, D)


class Merger(nn.Module):
    """Four neighbouring patches -> one visual token of the decoder's width."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = MERGE**2 * config.embed_dim
        self.ln_q = nn.LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(),
                                 nn.Linear(width, config.text_hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        # Merge order: the four patches of a visual token already lie side by side.
        x = self.ln_q(x).view(-1, MERGE**2 * x.shape[-1])  # (M, 4 D)
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
        self.class_pos_emb = nn.Parameter(torch.empty(1, config.head_dim // 2))  # angles
        self.pre_layernorm = nn.LayerNorm(config.embed_dim, config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.merger = Merger(config)

    def rope(self, grid_thw: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles of every token, (P + S, 1, E/2) each; order as in `forward`."""
        half = self.config.head_dim // 2
        # E/4 frequencies, from 1 down to 10000^(4/E - 1), turn with y; the same E/4 turn with x.
        powers = torch.arange(0, half, 2, device=grid_thw.device, dtype=torch.float32) / half
        angles = patch_positions(grid_thw)[..., None] * 10000.0**-powers  # (P, 2, E/4)
        class_angles = self.class_pos_emb.float().expand(len(order) - len(angles), half)  # (S, E/2)
        angles = torch.cat([class_angles, angles.flatten(1)])  # (P + S, E/2)
        angles = angles.index_select(0, order)[:, None]  # (P + S, 1, E/2)
        return angles.cos(), angles.sin()

    def strip(self, x: Tensor, segment: Tensor) -> Tensor:
        """Drop the class tokens: (P + S, D) -> (P, D).

        The released code drops only the first class token and then takes P tokens, so later
        segments are shifted.  `released_class_token_shift` repeats this slip.
        """
        index = torch.arange(1, len(segment) + 1, device=x.device)
        if not self.config.released_class_token_shift:
            index = index + segment  # each earlier segment has a class token, too
        return x.index_select(0, index)  # (P, D)

    def forward(self, patches: Tensor, grid_thw: Tensor) -> Tensor:
        """patches (P, 588) and grid_thw (I, 3) int64 -> (M, C)."""
        sizes = frame_sizes(grid_thw)  # (S,)
        frames = torch.arange(len(sizes), device=patches.device)  # (S,)
        segment = torch.repeat_interleave(frames, sizes)  # (P,)
        cu_seqlens = F.pad((sizes + 1).cumsum(0), (1, 0))  # (S + 1,), with class tokens

        # Each class token goes in front of its frame: [c0 c1 p0 p0 p1 p1] -> [c0 p0 p0 c1 p1 p1].
        # A stable sort by frame gives this order.
        order = torch.cat([frames, segment]).argsort(stable=True)  # (P + S,)
        class_tokens = self.class_embedding.expand(len(sizes), -1)  # (S, D)
        x = self.patch_embed(patches.to(self.class_embedding.dtype))  # (P, D)
        x = torch.cat([class_tokens, x]).index_select(0, order)  # (P + S, D)
        x = self.pre_layernorm(x)

        cos, sin = self.rope(grid_thw, order)
        # An upper bound is enough; the exact length would have to come from the GPU.
        max_seqlen = len(patches) + 1
        for block in self.blocks:
            x = block(x, cu_seqlens, max_seqlen, cos, sin)
        return self.merger(self.strip(x, segment))  # (M, C)


def main() -> None:
    """Print how a picture is resized and cut."""
    # as `data.refuse_in_one_sentence`, but this file imports nothing above itself
    try:
        if len(sys.argv) != 2:
            raise ValueError("usage: python vision.py PICTURE")
        image = open_image(sys.argv[1])
        patches, grid = image_to_patches(image)
    except ValueError as error:
        print(f"vision.py: {error}", file=sys.stderr)
        sys.exit(2)
    h, w = grid[1:]
    print(f"{sys.argv[1]}: {image.width} x {image.height} pixels, {image.mode}")
    print(f"resized to {w * PATCH} x {h * PATCH}, {h} x {w} patches: {tuple(patches.shape)}")
    print(f"visual tokens: {len(patches) // MERGE**2}")


if __name__ == "__main__":
    main()
