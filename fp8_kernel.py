"""FP8 training arithmetic in Triton: block-scaled quantisation, and the three products of a layer.

In: matrices in float32 or bfloat16.  Out: their numbers in 8 bits with a scale for each block;
products of such matrices, summed in float32; linear layers that compute with these products.
Called by `train.py` and `convert.py`; calls `attention_kernel.py`, which knows what a GPU can do.

The idea.  The format e4m3 has a sign, 4 bits of exponent and 3 of mantissa: numbers up to 448.
Rounding moves a number by a sixteenth of itself at most, and a number below 2^-6 by 2^-10 at most.
The numbers of a matrix differ by more orders of magnitude than that, the numbers of a small block
rarely do.  So each block b has a scale s_b of its own:

    amax_b = max |x_b|    s_b = amax_b / 448    q_b = e4m3(x_b (448 / amax_b))    x_b ~ s_b q_b

Activations and gradients have a scale for 128 numbers of a row: an outlier spoils one block only.
Weights have a scale for a square of 128 x 128, which W and W^T can share.  A linear layer takes
three products, and the blocks lie along the side that is summed:

    y  = x W^T       sum over K    x by rows          W by squares
    dx = dy W        sum over N    dy by rows         W^T by squares
    dW = dy^T x      sum over M    dy^T by rows       x^T by rows

So x and dy are quantised twice, along rows and along columns, by one kernel that reads them once.

The sum is cut every 128 numbers, for two reasons.  The scales change there.  And the FP8 units of a
GPU add up in 13 bits: they shift 32 products, and the sum so far, to the exponent of the largest,
and drop the bits below.  That happens 128 times in a sum over K = 4,096, but only 4 times in a
block.  So the sum of each block leaves the units, is scaled, and is added up in float32:

    y[m, n] = sum over blocks b of  s_x[m, b] s_W[n, b] (sum over k in b of q_x[m, k] q_W[n, k])

The recipe is that of DeepSeek-V3 (arXiv 2412.19437), section 3.3.  Master weights, gradients and
all layers that are not in FP8_LAYERS stay in 16 or 32 bits.

Shapes: M tokens, K inputs, N outputs of a layer; R rows, C columns of any matrix (in this file a
row is a row of a matrix); B blocks of 128 columns; X matrices of experts, one below the other.

Run `python fp8_kernel.py`: prints errors against float64; `python -m benchmarks.fp8`, timings.
"""

import sys
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from triton.tools.tensor_descriptor import TensorDescriptor

from attention_kernel import compute_capability, has_copy_engine, uses_kernels

BLOCK = 128  # numbers that share a scale, along the side that is summed
E4M3 = torch.float8_e4m3fn
E4M3_MAX = tl.constexpr(448.0)  # the largest number of the format
AMAX_FLOOR = tl.constexpr(1e-30)  # a block's amax is at least this: scales must not be 0
# The large matrices of the decoder: 3/4 of a training step's FLOPs at 4B, 5/6 at 8B, in samples of
# 600 tokens.  Not the ViT, 1,024 wide: a narrow product saves less time than quantising takes.  Not
# the merger, which few tokens pass.  Not head, router and norms: small differences decide there.
FP8_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Quantized(NamedTuple):
    """A matrix (R, C) in 8 bits, C a multiple of 128: values times the scales of their blocks."""

    values: Tensor  # (R, C) e4m3
    scales: Tensor  # float32: (R, B) for blocks of a row, (R / 128, B) for squares

    @property
    def height(self) -> int:
        """Rows that share a scale: 1 or 128."""
        return BLOCK if len(self.scales) < len(self.values) else 1

    def dequantize(self) -> Tensor:
        """The matrix (R, C) in float32: each value times the scale of its block."""
        blocks = self.values.float().unflatten(1, (-1, BLOCK))  # (R, B, 128)
        # a square's scale serves 128 rows, the last one's perhaps fewer
        scales = self.scales.repeat_interleave(self.height, dim=0)[:len(blocks)]  # (R, B)
        return (blocks * scales[:, :, None]).flatten(1)


# ------------------------------------------------------------------- step 1: in plain PyTorch


def in_blocks(x: Tensor, height: int, width: int) -> Tensor:
    """x (R, C) as (R / height, height, C / width, width) in float32; zeros fill the last blocks."""
    below, right = -len(x) % height, -x.shape[1] % width
    x = x.float()
    if below or right:
        x = F.pad(x, (0, right, 0, below))
    return x.reshape(len(x) // height, height, x.shape[1] // width, width)


def amax_of(blocks: Tensor) -> Tensor:
    """The largest magnitude of each block, inf if a number is NaN.  At least 1e-30: it divides."""
    return blocks.abs().amax((1, 3)).nan_to_num(torch.inf, torch.inf).clamp(min=AMAX_FLOOR.value)


def scales_of(amax: Tensor) -> Tensor:
    """The scale of each block; NaN for a block with an infinity or a NaN."""
    return torch.where(amax < torch.inf, amax * (1 / 448), torch.nan)


def cast_blocks(blocks: Tensor, amax: Tensor) -> Tensor:
    """Blocks as an e4m3 matrix (R, C)."""
    # torch computes `448 / amax` as 448 times a rounded inverse; the kernel rounds only once
    inverse = torch.where(amax < torch.inf, torch.full_like(amax, 448) / amax, 0)
    scaled = (blocks * inverse[:, None, :, None]).clamp_(-448, 448)
    return scaled.flatten(2).flatten(0, 1).to(E4M3)


def quantize_reference(x: Tensor, height: int, width: int) -> Quantized:
    """The definition of `quantize_kernel`; R and C of the values are rounded up to whole blocks."""
    blocks = in_blocks(x, height, width)
    amax = amax_of(blocks)
    if amax.isinf().any():
        # such a block has values 0 and scale NaN: 0 times its infinity would be NaN, too
        blocks = torch.where(amax[:, None, :, None].isinf(), 0, blocks)
    return Quantized(cast_blocks(blocks, amax), scales_of(amax))


def matmul_reference(a: Quantized, b: Quantized, starts: Tensor | None) -> Tensor:
    """The definition of `fp8_matmul`, in float32."""
    whole_a, whole_b = a.dequantize(), b.dequantize()
    if starts is None:
        return whole_a @ whole_b.T
    bounds = (starts * BLOCK).tolist()
    groups = list(map(slice, bounds, bounds[1:]))
    if b.height == 1:  # groups of columns: X sums, each over its own columns
        return torch.cat([whole_a[:, group] @ whole_b[:, group].T for group in groups])
    # groups of rows: each is multiplied by its own matrix of b
    out = whole_a.new_zeros(len(whole_a), len(whole_b) // len(groups))
    for group, matrix in zip(groups, whole_b.chunk(len(groups))):
        out[group] = whole_a[group] @ matrix.T
    return out


# --------------------------------------------------------------------------- step 2: the kernels


@triton.jit
def scale_blocks(x, AXIS: tl.constexpr):
    """Scales of the blocks of a tile, and the factors for their numbers; AXIS None: one block."""
    magnitude = tl.abs(x)
    finite = magnitude < float("inf")  # neither infinite nor NaN
    amax = tl.maximum(tl.max(tl.where(finite, magnitude, 0.0), AXIS), AMAX_FLOOR)
    broken = tl.max(tl.where(finite, 0, 1), AXIS) > 0
    inverse = tl.where(broken, 0.0, tl.div_rn(E4M3_MAX, amax))
    return tl.where(broken, float("nan"), amax * (1 / E4M3_MAX)), inverse


@triton.jit
def cast(x, inverse):
    """x times inverse as e4m3; 0 in a broken block, whatever x is."""
    scaled = tl.minimum(tl.maximum(x * inverse, -E4M3_MAX), E4M3_MAX)
    return tl.where(inverse > 0, scaled, 0.0).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    x,                  # (R, C) float32 or bfloat16
    values, scales,     # out: (R, C) e4m3; (B, R), or (R / 128, B) for squares
    t_values, t_scales,  # out, of x transposed: (C, R rounded up to 128) e4m3; (R / 128, C)
    rows, columns,      # R; C, a multiple of 128
    SQUARE: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
):
    """A program casts a tile of 128 x 128 along its rows, with TRANSPOSED along columns as well."""
    tile, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tile * BLOCK + tl.arange(0, BLOCK)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    place = row[:, None] * columns + column
    numbers = tl.load(x + place, mask=inside[:, None], other=0.0).to(tl.float32)
    if SQUARE:
        scale, inverse = scale_blocks(numbers, None)
        tl.store(scales + tile * (columns // BLOCK) + block, scale)
        cast_numbers = cast(numbers, inverse)
    else:
        # 128 scales, one a row; stored side by side, since the product reads 128 rows of a block
        scale, inverse = scale_blocks(numbers, 1)
        tl.store(scales + block * rows + row, scale, mask=inside)
        cast_numbers = cast(numbers, inverse[:, None])
    tl.store(values + place, cast_numbers, mask=inside[:, None])
    if TRANSPOSED:
        # 128 scales, one a column.  The copy has no ragged end: zeros behind R add nothing to dW.
        rounded_rows = tl.cdiv(rows, BLOCK) * BLOCK
        scale, inverse = scale_blocks(numbers, 0)
        tl.store(t_scales + tile * columns + column, scale)
        along_columns = tl.trans(cast(numbers, inverse[None, :]))
        t_place = column[:, None].to(tl.int64) * rounded_rows + row
        tl.store(t_values + t_place, along_columns)


@triton.jit
def transpose_kernel(
    x, out,         # (X N, K) e4m3; out: (X K, N)
    rows, columns,  # N, K: multiples of 128
    BLOCK: tl.constexpr,
):
    """A program transposes a tile of 128 x 128 of one of X matrices."""
    matrix, index = tl.program_id(2), tl.arange(0, BLOCK).to(tl.int64)
    row = tl.program_id(0) * BLOCK + index
    column = tl.program_id(1) * BLOCK + index
    tile = tl.load(x + (matrix * rows + row)[:, None] * columns + column)
    tl.store(out + (matrix * columns + column)[:, None] * rows + row, tl.trans(tile))


@triton.jit
def tile_of_program(tiles_m, tiles_n, BAND: tl.constexpr):
    """Line and column of the output tile that this program computes.  Programs that run at the same
    time walk down a band of BAND lines: so they read the same rows of a and b from the cache."""
    program = tl.program_id(0)
    band, in_band = program // (BAND * tiles_n), program % (BAND * tiles_n)
    # BAND 2, tiles_m 3, tiles_n 4:   0 2 4 6
    #                                 1 3 5 7
    #                                 8 9 . .     the last band is lower
    lines = tl.minimum(tiles_m - band * BAND, BAND)
    return band * BAND + in_band % lines, in_band // lines


@triton.jit(do_not_specialize=["rows_a"])
def product_kernel(
    a, b,                   # (Ra, C), (Rb, C) e4m3, or descriptors of tiles of them
    scales_a, scales_b,     # (B, Ra); (B, Rb), or (Rb / 128, B) for squares
    out,                    # out: (Ra, columns_out); X of them, if `starts` cuts the sum
    starts,                 # (X + 1,) int32, in units of 128: where groups of rows or columns begin
    groups,                 # X
    rows_a, columns,        # Ra, C
    columns_out,            # Rb; Rb / X if each group of rows has a matrix of its own
    SQUARE: tl.constexpr,  # b is scaled by squares
    ROW_GROUPS: tl.constexpr, SUM_GROUPS: tl.constexpr,  # `starts` cuts the rows of a, or the sum
    GROUPS_ROOM: tl.constexpr,  # X rounded up to a power of 2
    DESCRIPTORS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr,
):
    """A program computes a tile of 128 x BLOCK_N of a b^T."""
    tile_m, tile_n = tile_of_program(tl.cdiv(rows_a, BLOCK), tl.cdiv(columns_out, BLOCK_N), BAND)
    index, index_n = tl.arange(0, BLOCK), tl.arange(0, BLOCK_N)
    first_a, first_b = tile_m * BLOCK, tile_n * BLOCK_N
    row_a, column_out = first_a + index, first_b + index_n
    first_out = first_a
    begin, end = 0, columns // BLOCK  # blocks to sum over
    wanted = True
    if ROW_GROUPS:
        # which group owns these rows: the number of groups that end at or before them
        group = tl.arange(0, GROUPS_ROOM)
        ends = tl.load(starts + group + 1, mask=group < groups, other=2**30)
        matrix = tl.sum((ends <= tile_m).to(tl.int32))
        wanted = matrix < groups  # nobody owns the rows behind the last group
        first_b += matrix * columns_out
    if SUM_GROUPS:
        # all groups use the same rows, but each sums over its own blocks, into a matrix of its own
        group = tl.program_id(1)
        begin, end = tl.load(starts + group), tl.load(starts + group + 1)
        first_out += group * rows_a
    if wanted:
        acc = tl.zeros((BLOCK, BLOCK_N), tl.float32)
        inside_a, inside_b = row_a < rows_a, column_out < columns_out
        at_a = row_a.to(tl.int64)[:, None] * columns + index
        at_b = (first_b + index_n).to(tl.int64)[:, None] * columns + index
        for block in range(begin, end):
            if DESCRIPTORS:  # reads zeros outside
                tile_a = a.load([first_a, block * BLOCK])
                tile_b = b.load([first_b, block * BLOCK])
            else:
                tile_a = tl.load(a + at_a + block * BLOCK, mask=inside_a[:, None], other=0.0)
                tile_b = tl.load(b + at_b + block * BLOCK, mask=inside_b[:, None], other=0.0)
            scale_a = tl.load(scales_a + block * rows_a + row_a, mask=inside_a, other=0.0)
            # 128 products, summed in 13 bits; as an argument of dot, `acc` would be cut as well
            product = tl.dot(tile_a, tile_b.T)
            if SQUARE:  # BLOCK_N divides 128: one scale for all of tile_b
                scale_b = tl.load(scales_b + first_b // BLOCK * (columns // BLOCK) + block)
                acc += product * (scale_a * scale_b)[:, None]
            else:
                at = scales_b + block * columns_out + column_out
                scale_b = tl.load(at, mask=inside_b, other=0.0)
                acc += product * (scale_a[:, None] * scale_b[None, :])
        place = (first_out + index).to(tl.int64)[:, None] * columns_out + column_out
        inside = inside_a[:, None] & inside_b[None, :]
        tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside)


# ------------------------------------------------------------------- launches, operators, their API

PRODUCT = {"BLOCK": BLOCK, "BAND": 8, "num_warps": 8, "num_stages": 3}
TILE_COLUMNS = {True: 128, False: 64}  # BLOCK_N with descriptors; without, 128 spills registers


def check_device(device: torch.device) -> None:
    """Raise ValueError for a GPU whose tensor cores know no FP8."""
    major, minor = compute_capability(device)
    if device.type == "cuda" and (major, minor) < (8, 9):
        raise ValueError(f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}) has no "
                         "FP8: it needs sm_89 (Ada), sm_90 (Hopper) or newer; use bfloat16")


@torch.library.custom_op("llava::quantize_fp8", mutates_args=())
def quantize_op(x: Tensor, square: bool, transposed: bool) -> list[Tensor]:
    """Values and scales as `quantize_kernel` writes them; of x transposed as well, if wanted."""
    if not uses_kernels(x):
        height = BLOCK if square else 1
        values, scales = quantize_reference(x, height, BLOCK)
        parts = [values[:len(x)], scales if square else scales.T]
        if transposed:
            values, scales = quantize_reference(x, BLOCK, 1)
            parts += [values.T, scales]
        return [part.contiguous() for part in parts]
    rows, columns = x.shape
    parts = empty_quantized(x, square, transposed)
    if rows:
        # the kernel has four outputs; without a transposed copy it does not touch the last two
        outputs = parts if transposed else [*parts, None, None]
        with torch.cuda.device_of(x):
            quantize_kernel[triton.cdiv(rows, BLOCK), columns // BLOCK](
                x.contiguous(), *outputs, rows, columns,
                SQUARE=square, TRANSPOSED=transposed, BLOCK=BLOCK, num_warps=8)
    return parts


@quantize_op.register_fake
def empty_quantized(x: Tensor, square: bool, transposed: bool) -> list[Tensor]:
    rows, columns = x.shape
    tiles, blocks = -(-rows // BLOCK), columns // BLOCK
    scales_shape = (tiles, blocks) if square else (blocks, rows)
    parts = [x.new_empty(x.shape, dtype=E4M3), x.new_empty(scales_shape, dtype=torch.float32)]
    if transposed:
        parts += [x.new_empty(columns, tiles * BLOCK, dtype=E4M3),
                  x.new_empty(tiles, columns, dtype=torch.float32)]
    return parts


@torch.library.custom_op("llava::matmul_fp8", mutates_args=())
def matmul_op(a: Tensor, scales_a: Tensor, b: Tensor, scales_b: Tensor, starts: Tensor | None,
              dtype: torch.dtype) -> Tensor:
    """`fp8_matmul` without its checks: by `product_kernel`, or by the reference on a CPU."""
    if not uses_kernels(a):
        exact = matmul_reference(Quantized(a, scales_a), Quantized(b, scales_b), starts)
        return exact.to(dtype)
    out = empty_product(a, scales_a, b, scales_b, starts, dtype)
    if not a.numel() or not b.numel():
        return out.zero_()  # sums of nothing
    rows_a, columns = a.shape
    # the kernel wants the scales of one block side by side: (B, R), not (R, B)
    square = len(scales_b) < len(b)
    if not square:
        scales_b = scales_b.T
    scales_a, scales_b = scales_a.T.contiguous(), scales_b.contiguous()
    # weights are squares, and `starts` says whose rows are whose; else it cuts the sum
    grouped = starts is not None
    groups = len(starts) - 1 if grouped else 1
    sums = len(out) // rows_a  # X if `starts` cuts the sum, else 1
    a, b = a.contiguous(), b.contiguous()
    descriptors = has_copy_engine(a)
    width = TILE_COLUMNS[descriptors]
    tiles = triton.cdiv(rows_a, BLOCK) * triton.cdiv(out.shape[1], width)
    if descriptors:
        a = TensorDescriptor.from_tensor(a, [BLOCK, BLOCK])
        b = TensorDescriptor.from_tensor(b, [width, BLOCK])
    with torch.cuda.device_of(out):
        product_kernel[tiles, sums](
            a, b, scales_a, scales_b, out, starts, groups, rows_a, columns, out.shape[1],
            SQUARE=square, ROW_GROUPS=grouped and square, SUM_GROUPS=grouped and not square,
            GROUPS_ROOM=triton.next_power_of_2(groups), DESCRIPTORS=descriptors,
            BLOCK_N=width, **PRODUCT)
    return out


@matmul_op.register_fake
def empty_product(a: Tensor, scales_a: Tensor, b: Tensor, scales_b: Tensor, starts: Tensor | None,
                  dtype: torch.dtype) -> Tensor:
    groups = 1 if starts is None else len(starts) - 1
    if len(scales_b) < len(b):
        return a.new_empty(len(a), len(b) // groups, dtype=dtype)
    return a.new_empty(groups * len(a), len(b), dtype=dtype)


@torch.library.custom_op("llava::transpose_fp8", mutates_args=())
def transpose_op(x: Tensor, matrices: int) -> Tensor:
    """e4m3 matrices (N, K), one below the other, each transposed to (K, N)."""
    rows, columns = len(x) // matrices, x.shape[1]
    if not uses_kernels(x):
        return x.view(matrices, rows, columns).transpose(1, 2).reshape(-1, rows).contiguous()
    out = empty_transposed(x, matrices)
    with torch.cuda.device_of(x):
        transpose_kernel[rows // BLOCK, columns // BLOCK, matrices](
            x, out, rows, columns, BLOCK=BLOCK, num_warps=8)
    return out


@transpose_op.register_fake
def empty_transposed(x: Tensor, matrices: int) -> Tensor:
    return x.new_empty(matrices * x.shape[1], len(x) // matrices)


def quantize_fp8(x: Tensor, square: bool = False,
                 transposed: bool = False) -> tuple[Quantized, Quantized | None]:
    """A matrix in e4m3, scaled by blocks of 128 numbers of a row, or by squares of 128 x 128.

    x: (R, C) float32 or bfloat16, C a multiple of 128.
    transposed: also return x transposed, scaled by *its* rows: (C, R rounded up to a multiple of
    128) with zeros behind R.
    A scale is the block's amax over 448.  An amax below 1e-30 counts as 1e-30: zeros stay zeros.
    A block with an infinity or a NaN has values 0 and scale NaN, so every sum with it is NaN.
    Raises ValueError on another shape or dtype, and for a GPU without FP8."""
    check_device(x.device)
    if x.dim() != 2 or x.shape[1] % BLOCK or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"FP8 takes a float32 or bfloat16 matrix with columns in multiples of "
                         f"{BLOCK}, not {x.dtype} of shape {tuple(x.shape)}")
    values, scales, *t_parts = quantize_op(x, square, transposed)
    scales = scales if square else scales.T
    along_columns = Quantized(t_parts[0], t_parts[1].T) if transposed else None
    return Quantized(values, scales), along_columns


def fp8_matmul(a: Quantized, b: Quantized, dtype: torch.dtype = torch.bfloat16,
               starts: Tensor | None = None) -> Tensor:
    """a (Ra, C) times b (Rb, C) transposed, summed in float32 -> (Ra, Rb) of `dtype`.

    starts: (X + 1,) int32, in units of 128, for X products at once.  If b is scaled by squares, it
    has X matrices, and the rows of a from starts[e] on belong to matrix e: -> (Ra, Rb / X), with
    undefined rows behind the last group.  Else starts cuts the sum into X sums: -> (X Ra, Rb).
    Raises ValueError on shapes that do not fit, and for a GPU without FP8."""
    if a.height != 1 or a.values.shape[1] != b.values.shape[1] or a.values.shape[1] % BLOCK:
        raise ValueError(f"need rows (Ra, C) and (Rb, C), C a multiple of {BLOCK}, a scaled by "
                         f"rows, got {tuple(a.values.shape)} and {tuple(b.values.shape)}")
    check_device(a.values.device)
    if starts is not None and starts.dtype != torch.int32:
        raise ValueError(f"starts must be int32, not {starts.dtype}")
    # a square must not belong to two matrices
    if starts is not None and b.height > 1 and len(b.values) % (BLOCK * (len(starts) - 1)):
        raise ValueError(f"{len(b.values)} rows are not {len(starts) - 1} matrices with rows in "
                         f"multiples of {BLOCK}")
    return matmul_op(*a, *b, starts, dtype)


# ------------------------------------------------------------------------------- layers of a model


class Groups(NamedTuple):
    """Moves tokens, sorted by expert, so that no block of 128 has tokens of two experts.

    With blocks of 4, counts 3, 0, 5:   a a a c c c c c   ->   a a a . | c c c c | c . . .
    starts 0, 1, 1, 3; places 0 1 2 4 5 6 7 8.  The counts stay on the GPU, so `room` suits any."""

    starts: Tensor | None  # (X + 1,) int32, begin of each expert, in units of 128
    places: Tensor | None  # (R,) where each token goes
    room: int  # tokens afterwards

    @classmethod
    def of(cls, counts: Tensor | None, rows: int) -> "Groups":
        """counts: (X,) tokens of each expert, `rows` together; None for a layer without experts."""
        if counts is None:
            return cls(None, None, rows)
        blocks = (counts + BLOCK - 1).div(BLOCK, rounding_mode="floor")
        starts = F.pad(blocks.cumsum(0), (1, 0))
        # all tokens of an expert move by the same distance: its new begin less its old one
        distance = starts[:-1] * BLOCK - (counts.cumsum(0) - counts)
        distance = distance.repeat_interleave(counts, output_size=rows)
        places = distance + torch.arange(rows, device=counts.device)
        room = (rows + len(counts) * (BLOCK - 1)) // BLOCK * BLOCK  # each expert may waste 127
        return cls(starts.int(), places, room)

    def spread(self, x: Tensor) -> Tensor:
        """Tokens (R, C) to their places (room, C), zeros between them."""
        if self.places is None:  # no experts
            return x
        return x.new_zeros(self.room, x.shape[1]).index_copy_(0, self.places, x)

    def collect(self, x: Tensor) -> Tensor:
        """The inverse of `spread`."""
        return x if self.places is None else x.index_select(0, self.places)


class Fp8Product(torch.autograd.Function):
    """x W^T by three FP8 products.  `weight` only receives the gradient; the numbers come from
    `values` and `scales`.  learn: keep x, in 8 bits, for the gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, values: Tensor, scales: Tensor,
                counts: Tensor | None, learn: bool) -> Tensor:
        groups = Groups.of(counts, len(x))
        x_rows, x_columns = quantize_fp8(groups.spread(x), transposed=learn)
        ctx.save_for_backward(values, scales, groups.starts, groups.places, *(x_columns or ()))
        ctx.room, ctx.dtypes = groups.room, (x.dtype, weight.dtype)
        y = fp8_matmul(x_rows, Quantized(values, scales), x.dtype, groups.starts)
        return groups.collect(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        values, scales, starts, places, *x_columns = ctx.saved_tensors
        groups = Groups(starts, places, ctx.room)
        learn = bool(x_columns)
        dy_rows, dy_columns = quantize_fp8(groups.spread(dy), transposed=learn)
        dx = dw = None
        if ctx.needs_input_grad[0]:
            # dx = dy W sums over N: the values and the squares of each W, transposed
            matrices = 1 if starts is None else len(starts) - 1
            t_scales = scales.unflatten(0, (matrices, -1)).transpose(1, 2).flatten(0, 1)
            turned = Quantized(transpose_op(values, matrices), t_scales)
            dx = groups.collect(fp8_matmul(dy_rows, turned, ctx.dtypes[0], starts))
        if learn:
            # dW = dy^T x sums over tokens, each expert over its own
            dw = fp8_matmul(dy_columns, Quantized(*x_columns), ctx.dtypes[1], starts)
        return dx, dw, None, None, None, None


class Fp8Linear(nn.Linear):
    """y = x W^T in FP8, without a bias.  Training changes the weight, which stays in 16 or 32 bits.

    The layer computes with `values` and `scales`, and lives one of two lives:
    1. A whole weight: `quantize_weights` fills values and scales after each step.
    2. FSDP: `quantize_weights` fills shard and all_scales.  Before each use FSDP gathers the
       shards, 8 bits a number in place of 16, and calls two hooks, which fill values and scales."""

    values: Tensor | None = None  # (N, K) e4m3; with expert parallelism, of this rank's experts
    scales: Tensor | None = None  # (N / 128, K / 128), one a square of `values`
    shard: Tensor | None = None  # FSDP: this rank's rows of the values, as uint8
    all_scales: Tensor | None = None  # FSDP: of all squares of the weight, the same on all ranks
    first_row = 0  # of the shard in the weight
    version = -1  # PyTorch's count of changes of the weight, when it was quantised

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """x: (..., K); or (R, K), sorted by expert, with counts (X,) of each expert's tokens: then
        the weight has X matrices."""
        assert self.values is not None, "call quantize_weights before the first forward pass"
        if self.all_scales is None and not torch.compiler.is_compiling():
            self.check_fresh()  # under FSDP its hook does
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        learn = torch.is_grad_enabled() and weight.requires_grad
        y = Fp8Product.apply(x.flatten(0, -2), weight, self.values, self.scales, counts, learn)
        return y.view(*x.shape[:-1], y.shape[1])

    def master(self) -> Tensor:
        """The tensor that the optimizer changes: the weight, or this rank's shard of it."""
        return self.weight._local_tensor if isinstance(self.weight, DTensor) else self.weight

    def check_fresh(self) -> None:
        """Refuse to compute with 8-bit numbers of an older weight."""
        assert self.version == self.master()._version, "a weight changed: call quantize_weights"

    # The second life.  FSDP cuts a weight between any two rows, here after 192 of 384:
    #     squares   0 ..... 127 | 128 ............. 255 | 256 ..... 383
    #     ranks     0 ................. 191 | 192 ................. 383
    # Each rank finds the amax of its part of a square, all ranks exchange these, and each casts its
    # own rows by the amax of the whole square.

    def whole_squares(self) -> Tensor:
        """This rank's rows in blocks, with zeros in place of rows that other ranks have."""
        local = self.weight.to_local()
        above = self.first_row % BLOCK  # rows of its first square that the rank before has
        if above:
            local = F.pad(local, (0, 0, above, 0))
        return in_blocks(local, BLOCK, BLOCK)

    def amax_of_shard(self) -> Tensor:
        """The amax of each square (N / 128, K / 128) over this rank's rows, the floor elsewhere."""
        chunk, = self.weight.__create_chunk_list__()  # as distributed checkpoints ask a DTensor
        self.first_row = chunk.offsets[0]
        part, square = amax_of(self.whole_squares()), self.first_row // BLOCK
        amax = part.new_full([size // BLOCK for size in self.weight.shape], AMAX_FLOOR.value)
        amax[square:square + len(part)] = part
        return amax

    def quantize_shard(self, amax: Tensor) -> None:
        """Cast this rank's rows.  amax: of each square (N / 128, K / 128), over all ranks' rows."""
        blocks = self.whole_squares()
        square, above = divmod(self.first_row, BLOCK)
        values = cast_blocks(blocks, amax[square:square + len(blocks)])
        self.shard = values[above:above + len(self.weight.to_local())].view(torch.uint8)
        self.all_scales = scales_of(amax)
        # FSDP asks the sharded tensor, not the module, what to gather in its place
        master = self.master()
        master.fsdp_pre_all_gather = self.fsdp_pre_all_gather
        master.fsdp_post_all_gather = self.fsdp_post_all_gather

    def fsdp_pre_all_gather(self, mesh: Any, outer_size: torch.Size, outer_stride: tuple,
                            module: nn.Module, mp_policy: Any) -> tuple[tuple[Tensor], None]:
        """What FSDP gathers: the shard, padded to the length of the longest.  outer_size: (N, K) of
        what it gathers; with expert parallelism, of this rank's experts."""
        self.check_fresh()
        rows, first = outer_size[0], 0
        if rows < len(self.weight):
            # the last dimension of the weight's mesh deals out experts
            first = self.weight.device_mesh.get_coordinate()[-1] * rows
        self.scales = self.all_scales[first // BLOCK:(first + rows) // BLOCK]
        missing = triton.cdiv(rows, mesh.size()) - len(self.shard)
        if missing > 0:
            self.shard = F.pad(self.shard, (0, 0, 0, missing))
        return (self.shard,), None

    def fsdp_post_all_gather(self, gathered: tuple[Tensor], metadata: None, dtype: torch.dtype, *,
                             out: Tensor | None = None) -> tuple[Tensor, tuple] | None:
        """FSDP needs a tensor to attach the gradient to; its numbers are never read."""
        if out is not None:  # from the second time on, FSDP gathers into the same memory
            return None
        # behind the weight's rows is what pads the last shard
        self.values = gathered[0][:len(self.scales) * BLOCK].view(E4M3)
        return placeholder(self.values, dtype), ()


PLACEHOLDERS: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def placeholder(values: Tensor, dtype: torch.dtype) -> Tensor:
    """NaNs, at least as many as `values` has numbers; one tensor for all layers, never read."""
    nans = PLACEHOLDERS.get((dtype, values.device))
    if nans is None or nans.numel() < values.numel():
        nans = values.new_full((values.numel(),), torch.nan, dtype=dtype)
        PLACEHOLDERS[dtype, values.device] = nans
    return nans


def convert_to_fp8(model: nn.Module) -> None:
    """Let the layers named in FP8_LAYERS compute in FP8; parameters keep their names.  Call it
    before FSDP shards the model.  Call `quantize_weights` when the weights are there, and after
    each change of them.  Raises ValueError naming a layer whose width FP8 cannot take."""
    layers = {path: layer for path, layer in model.named_modules()
              if path.split(".")[-1] in FP8_LAYERS and isinstance(layer, nn.Linear)}
    # check all before changing any: a refused model stays as it was
    for path, layer in layers.items():
        outputs = layer.out_features // getattr(layer, "matrices", 1)
        if layer.in_features % BLOCK or outputs % BLOCK:
            raise ValueError(f"{path} maps {layer.in_features} to {outputs} numbers; FP8 takes "
                             f"multiples of {BLOCK}")
        if layer.bias is not None:
            raise ValueError(f"{path} has a bias, FP8 layers have none")
    for path, layer in layers.items():
        model.set_submodule(path, Fp8Linear(layer.weight))


def quantize_shards(layers: list[Fp8Linear]) -> None:
    """Each rank quantises its rows, by the amax of whole squares; one message for all layers."""
    parts = [layer.amax_of_shard() for layer in layers]
    everything = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(everything, dist.ReduceOp.MAX)
    for layer, amax in zip(layers, everything.split([part.numel() for part in parts])):
        layer.quantize_shard(amax.view(-1, layer.weight.shape[1] // BLOCK))


@torch.no_grad()
def quantize_weights(model: nn.Module) -> None:
    """Quantise the weights of all FP8 layers, once after each change: all micro-batches of a step
    read the same weights.  Of a sharded model all ranks must call it.  Raises ValueError naming the
    layer if a weight is not finite."""
    layers = {name: x for name, x in model.named_modules() if isinstance(x, Fp8Linear)}
    sharded = [layer for layer in layers.values() if isinstance(layer.weight, DTensor)]
    if sharded:
        quantize_shards(sharded)
    finite = []
    for layer in layers.values():
        scales = layer.all_scales
        if layer not in sharded:
            layer.values, scales = quantize_fp8(layer.weight, square=True)[0]
            layer.scales = scales
        layer.version = layer.master()._version
        finite.append(scales.isfinite().all())
    # to look at a flag is to wait for the GPU: once for all layers, and on meta not at all
    if finite and not finite[0].is_meta and not torch.stack(finite).all():
        broken = next(name for name, good in zip(layers, finite) if not good)
        raise ValueError(f"the weights of {broken} are not finite")


# ------------------------------------------------------------------------------------------- errors


def fp8_of(weight: nn.Parameter) -> Fp8Linear:
    """A layer with this weight, quantised."""
    layer = Fp8Linear(weight)
    quantize_weights(layer)
    return layer


def error_cases(device: str) -> dict[str, tuple[Tensor, Tensor]]:
    """The factors a, b of the three products a b^T of a linear layer, by name.  One channel in a
    hundred of the activations is 30 times larger, as in real models."""
    torch.manual_seed(0)
    with torch.device(device):
        x, w = torch.randn(512, 1024), torch.randn(768, 1024)
        dy = torch.randn(512, 768)
    x[:, ::100] *= 30
    return {"y = x W'": (x, w), "dx = dy W": (dy, w.T.contiguous()),
            "dW = dy' x": (dy.T.contiguous(), x.T.contiguous())}


def layer_products(pairs: dict[str, tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The three products of `error_cases` as an FP8 layer computes them."""
    (x, w), (dy, _), _ = pairs.values()
    layer, inputs = fp8_of(nn.Parameter(w)), x.clone().requires_grad_()
    y = layer(inputs)
    return [y.detach(), *torch.autograd.grad(y, (inputs, layer.weight), dy)]


def relative_error(y: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact numbers."""
    return float((y - exact).norm() / exact.norm())


def main() -> None:
    """Print the errors of a layer's three products against float64, beside those of bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        check_device(torch.device(device))
    except ValueError as error:
        sys.exit(f"fp8_kernel.py: {error}")
    pairs = error_cases(device)
    exact = [a.double() @ b.double().T for a, b in pairs.values()]
    # the same products, as a layer in bfloat16 computes them
    plain = [a.bfloat16() @ b.bfloat16().T for a, b in pairs.values()]
    print(f"{'error against float64':24}" + "".join(f"{name:>13}" for name in pairs))
    for name, products in (("this file", layer_products(pairs)), ("bfloat16", plain)):
        errors = map(relative_error, products, exact)
        print(f"{name:24}" + "".join(f"{error:13.2e}" for error in errors))


if __name__ == "__main__":
    main()
