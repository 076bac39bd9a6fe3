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

The sum is cut every 128 numbers, for two reasons.  The scales change there.  And Hopper's tensor
cores add up FP8 in 13 bits: they shift 32 products, and the sum so far, to the exponent of the
largest, and drop the bits below.  That happens 128 times in a sum over K = 4,096, but only 4 times
in a block.  So the sum of each block leaves the cores, is scaled, and is added up in float32:

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
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from attention_kernel import (Block, Number, Pointer, compute_capability, give_scratch, specializes,
                              uses_kernels)

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


def quantize_reference(x: Tensor, height: int, width: int) -> Quantized:
    """The definition of `quantize_kernel`; R and C of the values are rounded up to whole blocks."""
    x = F.pad(x.float(), (0, -x.shape[1] % width, 0, -len(x) % height))
    # block i, j is blocks[i, :, j, :]
    blocks = x.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    amax = blocks.abs().amax((1, 3), keepdim=True)
    # a block with an infinity or a NaN has values 0 and scale NaN
    broken = ~(amax < torch.inf)
    amax = amax.clamp(min=AMAX_FLOOR.value)
    # torch computes `448 / amax` as 448 times a rounded inverse; the kernel rounds only once
    scaled = (blocks * (torch.full_like(amax, 448) / amax)).clamp(-448, 448)
    values = torch.where(broken, 0, scaled).flatten(2).flatten(0, 1).to(E4M3)
    scales = torch.where(broken, torch.nan, amax * (1 / 448))
    return Quantized(values, scales[:, 0, :, 0])


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
def scale_blocks(x: Block, AXIS: tl.constexpr):
    """Scales of the blocks of a tile, and the factors for their numbers; AXIS None: one block."""
    # without their sign, the bits of floats are in the order of their values; infinity and NaN,
    # the largest, have all bits of the exponent: one maximum finds amax and what is not finite
    bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS)
    amax = tl.maximum(bits.to(tl.float32, bitcast=True), AMAX_FLOOR)
    broken = bits >= 0x7F800000
    inverse = tl.where(broken, 0.0, tl.div_rn(E4M3_MAX, amax))
    return tl.where(broken, float("nan"), amax * (1 / E4M3_MAX)), inverse


@triton.jit
def cast(x: Block, inverse: Block):
    """x times inverse as e4m3; 0 in a broken block, whatever x is."""
    scaled = tl.minimum(tl.maximum(x * inverse, -E4M3_MAX), E4M3_MAX)
    return tl.where(inverse > 0, scaled, 0.0).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["rows", "tiles_of_matrix"])
def quantize_kernel(
    x: Pointer,               # (R, C) float32 or bfloat16
    values: Pointer, scales: Pointer,  # out: (R, C) e4m3; (B, R), or (R / 128, B) for squares
    # out, of each matrix transposed: (X C, N) e4m3; (X N / 128, C), or (X C / 128, N / 128) for
    # squares.  N: R / X, rounded up to 128
    t_values: Pointer, t_scales: Pointer,
    rows: Number, columns: Number,  # R; C, a multiple of 128
    tiles_of_matrix: Number,  # N / 128
    SQUARE: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
):
    """A program casts a tile of 128 x 128 along its rows, with TRANSPOSED along columns as well."""
    tile, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tile * BLOCK + tl.arange(0, BLOCK)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    place = row[:, None] * columns + column
    numbers = tl.load(x + place, mask=inside[:, None], other=0.0).to(tl.float32)
    # where the tile is in its matrix, and where the rows of the transposed matrix begin
    matrix, t_block = tile // tiles_of_matrix, tile % tiles_of_matrix
    t_row, t_column = matrix * columns + column, t_block * BLOCK + tl.arange(0, BLOCK)
    if SQUARE:
        # one scale, for the square and for its transpose
        scale, inverse = scale_blocks(numbers, None)
        tl.store(scales + tile * (columns // BLOCK) + block, scale)
        cast_numbers = cast(numbers, inverse)
        if TRANSPOSED:
            t_square = matrix * (columns // BLOCK) + block
            tl.store(t_scales + t_square * tiles_of_matrix + t_block, scale)
            along_columns = cast_numbers
    else:
        # 128 scales, one a row; stored side by side, since the product reads 128 rows of a block
        scale, inverse = scale_blocks(numbers, 1)
        tl.store(scales + block * rows + row, scale, mask=inside)
        cast_numbers = cast(numbers, inverse[:, None])
        if TRANSPOSED:
            # 128 scales, one a column
            scale, inverse = scale_blocks(numbers, 0)
            tl.store(t_scales + tile * columns + column, scale)
            along_columns = cast(numbers, inverse[None, :])
    tl.store(values + place, cast_numbers, mask=inside[:, None])
    if TRANSPOSED:
        # the copy has no ragged end: zeros behind R add nothing to dW
        t_place = t_row[:, None] * (tiles_of_matrix * BLOCK) + t_column
        tl.store(t_values + t_place, tl.trans(along_columns))


@triton.jit
def tile_of_program(tiles_m: Number, tiles_n: Number, BAND: tl.constexpr):
    """Line and column of the output tile that this program computes.  Programs that run at the same
    time walk down a band of BAND lines (GROUP_SIZE_M in Triton's tutorial): so they read the same
    rows of a and b from the cache."""
    program = tl.program_id(0)
    band, in_band = program // (BAND * tiles_n), program % (BAND * tiles_n)
    # BAND 2, tiles_m 3, tiles_n 4; programs:   0 2  4  6
    #                                           1 3  5  7
    #                                           8 9 10 11     the last band is lower
    lines = tl.minimum(tiles_m - band * BAND, BAND)
    return band * BAND + in_band % lines, in_band // lines


@triton.jit(do_not_specialize=["rows_a", "groups"])
def product_kernel(
    a: Pointer, b: Pointer,  # (Ra, C), (Rb, C) e4m3
    scales_a: Pointer, scales_b: Pointer,  # (B, Ra); (B, Rb), or (Rb / 128, B) for squares
    out: Pointer,          # out: (Ra, columns_out); X of them, if `starts` cuts the sum
    starts: Pointer,       # (X + 1,) int32, in units of 128: where groups of rows or columns begin
    groups: Number,        # X
    rows_a: Number, rows_b: Number, columns: Number,  # Ra, Rb, C
    columns_out: Number,   # Rb; Rb / X if each group of rows has a matrix of its own
    SQUARE: tl.constexpr,  # b is scaled by squares
    ROW_GROUPS: tl.constexpr, SUM_GROUPS: tl.constexpr,  # `starts` cuts the rows of a, or the sum
    SPECIALIZED: tl.constexpr,  # see attention_kernel.py
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr,
):
    """A program computes a tile of 128 x BLOCK_N of a b^T."""
    tile_m, tile_n = tile_of_program(tl.cdiv(rows_a, BLOCK), tl.cdiv(columns_out, BLOCK_N), BAND)
    first_a, first_b = tile_m * BLOCK, tile_n * BLOCK_N
    row_a, column_out = first_a + tl.arange(0, BLOCK), first_b + tl.arange(0, BLOCK_N)
    inside_a, inside_b = row_a < rows_a, column_out < columns_out
    first_out = first_a
    begin, end = 0, columns // BLOCK  # blocks to sum over
    if ROW_GROUPS:
        # which group owns these rows: the number of groups that end at or before them
        matrix = 0
        for first in range(0, groups, 128):
            group = first + tl.arange(0, 128)
            ends = tl.load(starts + group + 1, mask=group < groups, other=2**30)
            matrix += tl.sum((ends <= tile_m).to(tl.int32))
        end = tl.where(matrix < groups, end, 0)  # nobody owns the rows behind the last group
        first_b += matrix * columns_out
    if SUM_GROUPS:
        # all groups use the same rows, but each sums over its own blocks, into a matrix of its own
        begin, end = tl.load(starts + tl.program_id(1)), tl.load(starts + tl.program_id(1) + 1)
        first_out += tl.program_id(1) * rows_a

    # tiles behind the last row are zeros
    rows_of_a = tl.make_tensor_descriptor(a, [rows_a, columns], [columns, 1], [BLOCK, BLOCK])
    rows_of_b = tl.make_tensor_descriptor(b, [rows_b, columns], [columns, 1], [BLOCK_N, BLOCK])
    acc = tl.zeros((BLOCK, BLOCK_N), tl.float32)
    for block in tl.range(begin, end, warp_specialize=SPECIALIZED):
        tile_a = rows_of_a.load([first_a, block * BLOCK])
        tile_b = rows_of_b.load([first_b, block * BLOCK])
        scale_a = tl.load(scales_a + block * rows_a + row_a, mask=inside_a, other=0.0)
        # 128 products, summed in 13 bits; as an argument of dot, `acc` would be cut as well
        product = tl.dot(tile_a, tile_b.T)
        if SQUARE:  # BLOCK_N divides 128: one scale for all of tile_b
            scale_b = tl.load(scales_b + first_b // BLOCK * (columns // BLOCK) + block)
            acc += product * (scale_a * scale_b)[:, None]
        else:
            scale_b = tl.load(scales_b + block * columns_out + column_out, mask=inside_b, other=0.0)
            acc += product * (scale_a[:, None] * scale_b[None, :])
    place = (first_out + tl.arange(0, BLOCK)).to(tl.int64)[:, None] * columns_out + column_out
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=inside_a[:, None] & inside_b[None, :])


# ------------------------------------------------------------------- launches, operators, their API


def check_device(device: torch.device) -> None:
    """Raise ValueError for a GPU whose tensor cores know no FP8."""
    major, minor = compute_capability(device)
    if device.type == "cuda" and (major, minor) < (8, 9):
        raise ValueError(f"{torch.cuda.get_device_name(device)} (sm_{major}{minor}) has no "
                         "FP8: it needs sm_89 (Ada), sm_90 (Hopper) or newer; use bfloat16")


def product_options(major: int, specialized: bool) -> dict[str, object]:
    """How `product_kernel` is launched on a GPU whose compute capability has this first digit."""
    # without TMA, which needs no registers for addresses, 128 columns spill some
    return {"SPECIALIZED": specialized, "BLOCK": BLOCK, "BLOCK_N": 128 if major in (9, 10) else 64,
            "BAND": 8, "num_warps": 4 if specialized else 8, "num_stages": 3}


@torch.library.custom_op("llava::quantize_fp8", mutates_args=())
def quantize_op(x: Tensor, square: bool, transposed: bool, matrices: int) -> list[Tensor]:
    """Values and scales as `quantize_kernel` writes them; of x transposed as well, if wanted."""
    if not uses_kernels(x):
        values, scales = quantize_reference(x, BLOCK if square else 1, BLOCK)
        parts = [values[:len(x)], scales if square else scales.T]
        if transposed and square:  # (X N, K) -> (X K, N)
            parts += [part.unflatten(0, (matrices, -1)).transpose(1, 2).flatten(0, 1)
                      for part in (values, scales)]
        elif transposed:
            values, scales = quantize_reference(x, BLOCK, 1)
            parts += [values.T, scales]
        return [part.clone(memory_format=torch.contiguous_format) for part in parts]
    rows, columns = x.shape
    parts = empty_quantized(x, square, transposed, matrices)
    if rows:
        # the kernel has four outputs; without a transposed copy it does not touch the last two
        outputs = parts if transposed else [*parts, None, None]
        tiles = triton.cdiv(rows, BLOCK)
        with torch.cuda.device_of(x):
            quantize_kernel[tiles, columns // BLOCK](
                x.contiguous(), *outputs, rows, columns, tiles // matrices,
                SQUARE=square, TRANSPOSED=transposed, BLOCK=BLOCK, num_warps=8)
    return parts


@quantize_op.register_fake
def empty_quantized(x: Tensor, square: bool, transposed: bool, matrices: int) -> list[Tensor]:
    def pair(values: tuple[int, ...], scales: tuple[int, ...]) -> list[Tensor]:
        return [x.new_empty(values, dtype=E4M3), x.new_empty(scales, dtype=torch.float32)]

    rows, columns = x.shape
    tiles, blocks = -(-rows // BLOCK), columns // BLOCK
    parts = pair(x.shape, (tiles, blocks) if square else (blocks, rows))
    if transposed:
        in_matrix = tiles // matrices
        scales = (matrices * blocks, in_matrix) if square else (tiles, columns)
        parts += pair((matrices * columns, in_matrix * BLOCK), scales)
    return parts


@torch.library.custom_op("llava::matmul_fp8", mutates_args=())
def matmul_op(a: Tensor, scales_a: Tensor, b: Tensor, scales_b: Tensor, starts: Tensor | None,
              dtype: torch.dtype) -> Tensor:
    """The product by `product_kernel`, or by the reference on a CPU; its groups are of rows if b is
    scaled by squares, of columns if by rows."""
    if not uses_kernels(a):
        exact = matmul_reference(Quantized(a, scales_a), Quantized(b, scales_b), starts)
        return exact.to(dtype)
    out = empty_product(a, scales_a, b, scales_b, starts, dtype)
    if not a.numel() or not b.numel():
        return out.zero_()  # sums of nothing
    rows_a, columns = a.shape
    square, grouped = len(scales_b) < len(b), starts is not None
    # the kernel wants the scales of one block side by side: (B, R), not (R, B)
    if not square:
        scales_b = scales_b.T
    groups = len(starts) - 1 if grouped else 1
    sums = len(out) // rows_a  # X if `starts` cuts the sum, else 1
    options = product_options(compute_capability(a.device)[0], specializes(a))
    tiles = triton.cdiv(rows_a, BLOCK) * triton.cdiv(out.shape[1], options["BLOCK_N"])
    give_scratch(a.device)
    with torch.cuda.device_of(out):
        product_kernel[tiles, sums](
            a.contiguous(), b.contiguous(), scales_a.T.contiguous(), scales_b.contiguous(), out,
            starts, groups, rows_a, len(b), columns, out.shape[1],
            SQUARE=square, ROW_GROUPS=grouped and square, SUM_GROUPS=grouped and not square,
            **options)
    return out


@matmul_op.register_fake
def empty_product(a: Tensor, scales_a: Tensor, b: Tensor, scales_b: Tensor, starts: Tensor | None,
                  dtype: torch.dtype) -> Tensor:
    groups = 1 if starts is None else len(starts) - 1
    if len(scales_b) < len(b):
        return a.new_empty(len(a), len(b) // groups, dtype=dtype)
    return a.new_empty(groups * len(a), len(b), dtype=dtype)


def check_matrices(rows: int, matrices: int) -> None:
    """Raise ValueError if a square would belong to two of the matrices that share these rows."""
    if rows % (BLOCK * matrices):
        raise ValueError(f"{rows} rows are not {matrices} matrices with rows in multiples of "
                         f"{BLOCK}")


def quantize_fp8(x: Tensor, square: bool = False, transposed: bool = False,
                 matrices: int = 1) -> tuple[Quantized, Quantized | None]:
    """A matrix in e4m3, scaled by blocks of 128 numbers of a row, or by squares of 128 x 128.

    x: (R, C) float32 or bfloat16, C a multiple of 128.
    transposed: also return x transposed, scaled by *its* rows or by the same squares: (C, R rounded
    up to a multiple of 128) with zeros behind R.
    matrices: so many, X, lie one below the other in x; each is transposed by itself, to (X C, R/X).
    A scale is the block's amax over 448.  An amax below 1e-30 counts as 1e-30: zeros stay zeros.
    A block with an infinity or a NaN has values 0 and scale NaN, so every sum with it is NaN.
    Raises ValueError on another shape or dtype, and for a GPU without FP8."""
    check_device(x.device)
    if x.dim() != 2 or x.shape[1] % BLOCK or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"FP8 takes a float32 or bfloat16 matrix with columns in multiples of "
                         f"{BLOCK}, not {x.dtype} of shape {tuple(x.shape)}")
    if matrices > 1:
        check_matrices(len(x), matrices)
    values, scales, *t_parts = quantize_op(x, square, transposed, matrices)
    turned = None
    if transposed:
        turned = Quantized(t_parts[0], t_parts[1] if square else t_parts[1].T)
    return Quantized(values, scales if square else scales.T), turned


def fp8_matmul(a: Quantized, b: Quantized, dtype: torch.dtype = torch.bfloat16,
               starts: Tensor | None = None) -> Tensor:
    """a (Ra, C) times b (Rb, C) transposed, summed in float32 -> (Ra, Rb) of `dtype`.

    a is scaled by rows.  starts: (X + 1,) int32, in units of 128, for X products at once.
    If b is scaled by squares, it has X matrices one below the other, and the rows of a from
    starts[e] on meet matrix e: -> (Ra, Rb / X), with zeros after the last group.
    If b is scaled by rows, `starts` cuts the sum: -> (X Ra, Rb), one product below the other.
    Raises ValueError on shapes that do not fit, and for a GPU without FP8."""
    if a.height != 1 or a.values.shape[1] != b.values.shape[1] or a.values.shape[1] % BLOCK:
        raise ValueError(f"need rows (Ra, C) and (Rb, C), C a multiple of {BLOCK}, a scaled by "
                         f"rows, got {tuple(a.values.shape)} and {tuple(b.values.shape)}")
    check_device(a.values.device)
    if starts is not None:
        if starts.dtype != torch.int32 or len(starts) < 2:
            raise ValueError(f"starts must be two int32 at least, not {len(starts)} {starts.dtype}")
        if b.height > 1:  # by squares: matrices one below the other
            check_matrices(len(b.values), len(starts) - 1)
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
    """x W^T by three FP8 products.  learn: keep x, in 8 bits, for the gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts: Tensor | None, learn: bool) -> Tensor:
        groups = Groups.of(counts, len(x))
        x_rows, x_columns = quantize_fp8(groups.spread(x), transposed=learn)
        squares, _ = quantize_fp8(weight, square=True)
        ctx.save_for_backward(weight, groups.starts, groups.places, *(x_columns or ()))
        ctx.room, ctx.dtype = groups.room, x.dtype
        return groups.collect(fp8_matmul(x_rows, squares, x.dtype, groups.starts))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        weight, starts, places, *x_columns = ctx.saved_tensors
        groups = Groups(starts, places, ctx.room)
        dy_rows, dy_columns = quantize_fp8(groups.spread(dy), transposed=bool(x_columns))
        dx = dw = None
        if ctx.needs_input_grad[0]:
            # dx = dy W sums over N.  W^T is quantised again: to keep it would take memory.
            matrices = 1 if starts is None else len(starts) - 1
            _, turned = quantize_fp8(weight, square=True, transposed=True, matrices=matrices)
            dx = groups.collect(fp8_matmul(dy_rows, turned, ctx.dtype, starts))
        if x_columns:
            # dW = dy^T x sums over tokens, each expert over its own
            dw = fp8_matmul(dy_columns, Quantized(*x_columns), weight.dtype, starts)
        return dx, dw, None, None


class Fp8Linear(nn.Linear):
    """y = x W^T, without a bias, its three products in FP8.  The weight keeps its type and is what
    the optimizer trains; each pass quantises it again."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """x: (..., K); or (R, K), sorted by expert, with counts (X,) of each expert's tokens: then
        the weight has X matrices."""
        # with expert parallelism FSDP gathers this rank's experts only
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        learn = torch.is_grad_enabled() and weight.requires_grad
        y = Fp8Product.apply(x.flatten(0, -2), weight, counts, learn)
        return y.view(*x.shape[:-1], y.shape[1])


def convert_to_fp8(model: nn.Module) -> None:
    """Let the layers named in FP8_LAYERS compute in FP8; parameters keep their names.  Call it
    before FSDP shards the model.  Raises ValueError naming a layer whose width FP8 cannot take."""
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


# ------------------------------------------------------------------------------------------- errors


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
    layer, inputs = Fp8Linear(nn.Parameter(w)), x.clone().requires_grad_()
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
