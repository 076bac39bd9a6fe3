"""FP8 training arithmetic in Triton: block-scaled quantisation, and the three products of a layer.

In: matrices in float32 or bfloat16.  Out: the same in 8 bits with a scale for each block; their
product, accumulated in float32; linear layers that compute so.
Called by `train.py` and `convert.py`; takes from `attention_kernel.py` when kernels are used and
how they are timed, and for its benchmark a layer from `model.py`.

The idea.  e4m3 has a sign, 4 bits of exponent and 3 of mantissa: numbers up to 448, rounded by a
sixteenth of themselves at most, down to 2^-6, and by 2^-10 below.  The numbers of a matrix differ
by more than that, but those of a small block seldom do, so each block has a scale of its own:

    s_b = max |x_b| / 448        q_b = e4m3(x_b (448 / max |x_b|))        x_b ~ s_b q_b

Activations and gradients have one for 128 numbers of a row: an outlier spoils its own block alone.
Weights have one for a square of 128 x 128, which serves along either side.  A linear layer takes
three products, and blocks lie along the side that is summed:

    y  = x W^T       sum over K    x by rows          W by squares
    dx = dy W        sum over N    dy by rows         W^T by squares
    dW = dy^T x      sum over M    dy^T by rows       x^T by rows

So x and dy are quantised twice, along rows and along columns, by one kernel that reads them once.
Tensor cores add up 8-bit products with fewer bits than float32 has.  They get one block at a time;
blocks are scaled and added outside of them, in float32:

    y[m, n] = sum over blocks b of  s_x[m, b] s_W[n, b] (sum over k in b of q_x[m, k] q_W[n, k])

Source of the recipe: DeepSeek-V3 (arXiv 2412.19437), section 3.3.  What stays in 16 or 32 bits:
masters of the weights, gradients, and every layer that is not in FP8_LAYERS.

Weights change once a step but are read in each of its micro-batches, so `quantize_weights` is
called after each step.  Under FSDP the ranks tell each other the largest numbers of all squares,
each quantises the rows it holds, and 8 bits a weight are gathered, not 16.

Shapes: M tokens, K inputs and N outputs of a layer, R rows and C columns of any matrix, B blocks of
128 columns, X matrices of experts, one above the other.

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
LARGEST, FLOOR = tl.constexpr(448.0), tl.constexpr(1e-30)  # of e4m3; a block's least `largest`
# The decoder's large matrices: 3/4 of a training step's FLOPs at 4B, 5/6 at 8B, in samples of 600
# tokens.  Not the ViT, of width 1,024: quantising costs a pass over the numbers, and the narrower
# the product, the less there is to win it back.  Not the merger, which few rows pass; not head,
# router (`gate`) and norms, where small differences decide.
FP8_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Quantized(NamedTuple):
    """A matrix (R, C) in 8 bits, C a multiple of 128: values times the scales of their blocks."""

    values: Tensor  # (R, C) e4m3
    scales: Tensor  # float32, (R, B) for 128 numbers of a row, (R / 128, B) for squares

    @property
    def height(self) -> int:
        """Rows that share a scale: 1 or 128."""
        return BLOCK if len(self.scales) < len(self.values) else 1

    def dequantize(self) -> Tensor:
        """The matrix (R, C) in float32.

        e4m3's bits are those of a float16 behind two more bits of exponent, whose numbers are 2^-8
        as large; its NaN, which is never there, would not be one.  On a CPU this is ten times as
        fast as a conversion.
        """
        bits = self.values.view(torch.int8).to(torch.int16)  # sign extended to the left
        blocks = ((bits << 7) & ~(1 << 14)).view(torch.float16).float().unflatten(1, (-1, BLOCK))
        scales = (self.scales * 256).repeat_interleave(self.height, 0)[:len(blocks), :, None]
        return (blocks * scales).flatten(1)


# ------------------------------------------------------------------- step 1: in plain PyTorch


def in_blocks(x: Tensor, height: int, width: int) -> Tensor:
    """x (R, C) as (R / height, height, C / width, width), zeros where it ends before its blocks."""
    below, right = -len(x) % height, -x.shape[1] % width
    x = F.pad(x.float(), (0, right, 0, below)) if below or right else x.float()
    return x.reshape(len(x) // height, height, x.shape[1] // width, width)


def largest_of(blocks: Tensor) -> Tensor:
    """The largest magnitude of each block, inf if one is NaN; at least 1e-30, to be divided by."""
    return blocks.abs().amax((1, 3)).nan_to_num(torch.inf, torch.inf).clamp(min=FLOOR.value)


def scales_of(largest: Tensor) -> Tensor:
    return torch.where(largest < torch.inf, largest * (1 / 448), torch.nan)


def cast_blocks(blocks: Tensor, largest: Tensor) -> Tensor:
    """Blocks, given their largest numbers, as an e4m3 matrix (R, C)."""
    # `448 / largest` would be the inverse times 448, rounded twice; the kernel divides once
    inverse = torch.where(largest < torch.inf, torch.full_like(largest, 448) / largest, 0)
    scaled = (blocks * inverse[:, None, :, None]).clamp_(-448, 448)
    return scaled.flatten(2).flatten(0, 1).to(E4M3)


def quantize_reference(x: Tensor, height: int, width: int) -> Quantized:
    """The definition of what `quantize_kernel` does, with blocks of height x width; R and C of the
    values are rounded up to whole blocks."""
    blocks = in_blocks(x, height, width)
    largest = largest_of(blocks)
    if largest.isinf().any():
        blocks = torch.where(largest[:, None, :, None].isinf(), 0, blocks)
    return Quantized(cast_blocks(blocks, largest), scales_of(largest))


def matmul_reference(a: Quantized, b: Quantized, starts: Tensor | None) -> Tensor:
    """The definition of `fp8_matmul`, in float32."""
    whole_a, whole_b = a.dequantize(), b.dequantize()
    if starts is None:
        return whole_a @ whole_b.T
    bounds = (starts * BLOCK).tolist()
    parts = [slice(*pair) for pair in zip(bounds, bounds[1:])]
    if b.height == 1:
        return torch.cat([whole_a[:, part] @ whole_b[:, part].T for part in parts])
    out = whole_a.new_zeros(len(whole_a), len(whole_b) // len(parts))
    for part, matrix in zip(parts, whole_b.chunk(len(parts))):
        out[part] = whole_a[part] @ matrix.T
    return out


# --------------------------------------------------------------------------- step 2: the kernels


@triton.jit
def scale_blocks(x, AXIS: tl.constexpr):
    """Scales of the blocks of a tile, and what their numbers are multiplied by; AXIS None: one."""
    finite = tl.abs(x) < float("inf")  # neither infinite nor NaN
    largest = tl.maximum(tl.max(tl.where(finite, tl.abs(x), 0.0), AXIS), FLOOR)
    broken = tl.max(tl.where(finite, 0, 1), AXIS) > 0
    inverse = tl.where(broken, 0.0, tl.div_rn(LARGEST, largest))
    return tl.where(broken, float("nan"), largest * (1 / LARGEST)), inverse


@triton.jit
def cast(x, inverse):
    """x times inverse as e4m3; 0 where the block is broken, whatever x is."""
    scaled = tl.minimum(tl.maximum(x * inverse, -LARGEST), LARGEST)
    return tl.where(inverse > 0, scaled, 0.0).to(tl.float8e4nv)


@triton.jit(do_not_specialize=["rows"])
def quantize_kernel(
    x,                  # (R, C) float32 or bfloat16
    values, scales,     # out: (R, C) e4m3; (B, R), or (R / 128, B) for squares
    t_values, t_scales,  # out, of x transposed: (C, R rounded up to 128) e4m3; (R / 128, C)
    rows, columns,      # R; C, a multiple of 128
    SQUARE: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
):
    """A program casts a tile of 128 x 128: along rows, and if wanted along columns as well."""
    tile, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, column = tile * BLOCK + tl.arange(0, BLOCK), block * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    numbers = tl.load(x + row[:, None] * columns + column, mask=inside[:, None], other=0.0)
    numbers = numbers.to(tl.float32)
    if SQUARE:
        scale, inverse = scale_blocks(numbers, None)
        tl.store(scales + tile * (columns // BLOCK) + block, scale)
        cast_numbers = cast(numbers, inverse)
    else:
        scale, inverse = scale_blocks(numbers, 1)
        tl.store(scales + block * rows + row, scale, mask=inside)
        cast_numbers = cast(numbers, inverse[:, None])
    tl.store(values + row[:, None] * columns + column, cast_numbers, mask=inside[:, None])
    if TRANSPOSED:
        room = tl.cdiv(rows, BLOCK) * BLOCK
        scale, inverse = scale_blocks(numbers, 0)
        tl.store(t_scales + tile * columns + column, scale)
        along_columns = tl.trans(cast(numbers, inverse[None, :]))
        tl.store(t_values + column[:, None].to(tl.int64) * room + row, along_columns)


@triton.jit
def transpose_kernel(
    x, out,         # (X N, K) e4m3; out: (X K, N)
    rows, columns,  # N, K: multiples of 128
    BLOCK: tl.constexpr,
):
    """A program turns a tile of 128 x 128 of one of X matrices."""
    row, column, matrix = tl.program_id(0) * BLOCK, tl.program_id(1) * BLOCK, tl.program_id(2)
    index = tl.arange(0, BLOCK).to(tl.int64)
    tile = tl.load(x + (matrix * rows + row + index)[:, None] * columns + column + index)
    place = (matrix * columns + column + index)[:, None] * rows + row + index
    tl.store(out + place, tl.trans(tile))


@triton.jit(do_not_specialize=["rows_a"])
def product_kernel(
    a, b,                   # (Ra, C), (Rb, C) e4m3, or descriptors of tiles of them
    scales_a, scales_b,     # (B, Ra); (B, Rb), or (Rb / 128, B) for squares
    out,                    # out: (Ra, columns_out), X times that if sums are cut in groups
    starts,                 # (X + 1,) int32, in units of 128: where groups of rows or columns begin
    groups,                 # X
    rows_a, columns,        # Ra, C
    columns_out,            # Rb, or Rb / X where groups of rows have a matrix each
    SQUARE: tl.constexpr,  # the scales of b
    ROW_GROUPS: tl.constexpr, SUM_GROUPS: tl.constexpr,  # what `starts` cuts, if anything
    GROUPS_ROOM: tl.constexpr,  # X rounded up to a power of 2
    DESCRIPTORS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BAND: tl.constexpr,
):
    """A program computes a tile of 128 x BLOCK_N of a b^T.  Tiles are handed out in bands of BAND
    rows of them, so that those computed at the same time read the same rows of a and b."""
    tiles_m, tiles_n = tl.cdiv(rows_a, BLOCK), tl.cdiv(columns_out, BLOCK_N)
    program = tl.program_id(0)
    band = program // (BAND * tiles_n)
    band_rows = tl.minimum(tiles_m - band * BAND, BAND)
    tile_m = band * BAND + program % (BAND * tiles_n) % band_rows
    tile_n = program % (BAND * tiles_n) // band_rows

    index, index_n = tl.arange(0, BLOCK), tl.arange(0, BLOCK_N)
    row_a, row_b = tile_m * BLOCK + index, tile_n * BLOCK_N + index_n
    first_a, first_b, first_out = tile_m * BLOCK, tile_n * BLOCK_N, tile_m * BLOCK
    block, end = 0, columns // BLOCK
    wanted = True
    if ROW_GROUPS:
        group = tl.arange(0, GROUPS_ROOM)
        ends = tl.load(starts + group + 1, mask=group < groups, other=2**30)
        matrix = tl.sum((ends <= tile_m).to(tl.int32))
        wanted = matrix < groups  # behind the last group are rows of nobody
        first_b += matrix * columns_out
    if SUM_GROUPS:
        group = tl.program_id(1)
        block, end = tl.load(starts + group), tl.load(starts + group + 1)
        first_out += group * rows_a
    if wanted:
        acc = tl.zeros((BLOCK, BLOCK_N), tl.float32)
        inside_a, inside_b = row_a < rows_a, row_b < columns_out
        at_a = (first_a + index).to(tl.int64)[:, None] * columns + index
        at_b = (first_b + index_n).to(tl.int64)[:, None] * columns + index
        for number in range(block, end):
            if DESCRIPTORS:  # reads zeros outside
                tile_a = a.load([first_a, number * BLOCK])
                tile_b = b.load([first_b, number * BLOCK])
            else:
                tile_a = tl.load(a + at_a + number * BLOCK, mask=inside_a[:, None], other=0.0)
                tile_b = tl.load(b + at_b + number * BLOCK, mask=inside_b[:, None], other=0.0)
            scale_a = tl.load(scales_a + number * rows_a + row_a, mask=inside_a, other=0.0)
            product = tl.dot(tile_a, tile_b.T)
            if SQUARE:
                scale_b = tl.load(scales_b + first_b // BLOCK * (columns // BLOCK) + number)
                acc += product * (scale_a * scale_b)[:, None]
            else:
                scale_b = tl.load(scales_b + number * columns_out + row_b, mask=inside_b, other=0.0)
                acc += product * (scale_a[:, None] * scale_b[None, :])
        place = (first_out + index).to(tl.int64)[:, None] * columns_out + row_b
        tl.store(out + place, acc.to(out.dtype.element_ty),
                 mask=inside_a[:, None] & inside_b[None, :])


# ------------------------------------------------------------------- launches, operators, their API

PRODUCT = {"BLOCK": BLOCK, "BAND": 8, "num_warps": 8, "num_stages": 3}
TILE_COLUMNS = {True: 128, False: 64}  # with tensor descriptors and without, where 128 would spill


def check_device(device: torch.device) -> None:
    """Raise ValueError for a GPU whose tensor cores know no FP8."""
    if device.type == "cuda" and (found := compute_capability(device)) < (8, 9):
        raise ValueError(f"{torch.cuda.get_device_name(device)} (sm_{found[0]}{found[1]}) has no "
                         "FP8: it needs sm_89 (Ada), sm_90 (Hopper) or newer; use bfloat16")


@torch.library.custom_op("llava::quantize_fp8", mutates_args=())
def quantize_op(x: Tensor, square: bool, transposed: bool) -> list[Tensor]:
    """Values and scales as the kernel lays them out; those of x transposed, if wanted."""
    rows, columns = x.shape
    if not uses_kernels(x):
        values, scales = quantize_reference(x, BLOCK if square else 1, BLOCK)
        found = [values[:rows], scales if square else scales.T]
        if transposed:
            values, scales = quantize_reference(x, BLOCK, 1)
            found += [values.T, scales]
        return [part.contiguous() for part in found]
    found = empty_quantized(x, square, transposed)
    tiles = triton.cdiv(rows, BLOCK), columns // BLOCK
    if rows:
        with torch.cuda.device_of(x):
            quantize_kernel[tiles](
                x.contiguous(), *found, *(() if transposed else (None, None)), rows, columns,
                SQUARE=square, TRANSPOSED=transposed, BLOCK=BLOCK, num_warps=8)
    return found


@quantize_op.register_fake
def empty_quantized(x: Tensor, square: bool, transposed: bool) -> list[Tensor]:
    rows, columns = x.shape
    tiles, blocks = -(-rows // BLOCK), columns // BLOCK
    found = [x.new_empty(rows, columns, dtype=E4M3),
             x.new_empty((tiles, blocks) if square else (blocks, rows), dtype=torch.float32)]
    if transposed:
        found += [x.new_empty(columns, tiles * BLOCK, dtype=E4M3),
                  x.new_empty(tiles, columns, dtype=torch.float32)]
    return found


@torch.library.custom_op("llava::matmul_fp8", mutates_args=())
def matmul_op(a: Tensor, scales_a: Tensor, b: Tensor, scales_b: Tensor, starts: Tensor | None,
              dtype: torch.dtype) -> Tensor:
    if not uses_kernels(a):
        return matmul_reference(Quantized(a, scales_a), Quantized(b, scales_b), starts).to(dtype)
    out = empty_product(a, scales_a, b, scales_b, starts, dtype)
    if not a.numel() or not b.numel():
        return out.zero_()
    square, groups = len(scales_b) < len(b), 1 if starts is None else len(starts) - 1
    cut_sums, descriptors = starts is not None and not square, has_copy_engine(a)
    width = TILE_COLUMNS[descriptors]
    tiles = triton.cdiv(len(a), BLOCK) * triton.cdiv(out.shape[1], width)
    a, b = a.contiguous(), b.contiguous()
    sources = [TensorDescriptor.from_tensor(x, [rows, BLOCK]) if descriptors else x
               for x, rows in ((a, BLOCK), (b, width))]
    with torch.cuda.device_of(a):
        product_kernel[(tiles, groups if cut_sums else 1)](
            *sources, scales_a.T.contiguous(),
            (scales_b if square else scales_b.T).contiguous(), out, starts, groups, len(a),
            a.shape[1], out.shape[1], SQUARE=square, SUM_GROUPS=cut_sums,
            ROW_GROUPS=starts is not None and square, GROUPS_ROOM=triton.next_power_of_2(groups),
            DESCRIPTORS=descriptors, BLOCK_N=width, **PRODUCT)
    return out


@matmul_op.register_fake
def empty_product(a: Tensor, scales_a: Tensor, b: Tensor, scales_b: Tensor, starts: Tensor | None,
                dtype: torch.dtype) -> Tensor:
    groups, square = 1 if starts is None else len(starts) - 1, len(scales_b) < len(b)
    shape = (len(a), len(b) // groups) if square else (groups * len(a), len(b))
    return a.new_empty(shape, dtype=dtype)


@torch.library.custom_op("llava::transpose_fp8", mutates_args=())
def transpose_op(x: Tensor, matrices: int) -> Tensor:
    """e4m3 matrices (N, K), one above the other, each transposed to (K, N)."""
    rows, columns = len(x) // matrices, x.shape[1]
    if not uses_kernels(x):
        return x.view(matrices, rows, columns).transpose(1, 2).reshape(-1, rows).contiguous()
    out = x.new_empty(matrices * columns, rows)
    with torch.cuda.device_of(x):
        transpose_kernel[(rows // BLOCK, columns // BLOCK, matrices)](
            x, out, rows, columns, BLOCK=BLOCK, num_warps=8)
    return out


@transpose_op.register_fake
def _(x: Tensor, matrices: int) -> Tensor:
    return x.new_empty(matrices * x.shape[1], len(x) // matrices)


def quantize_fp8(x: Tensor, square: bool = False,
                 transposed: bool = False) -> tuple[Quantized, Quantized | None]:
    """A matrix in e4m3, scaled by blocks of 128 numbers of a row, or by squares of 128 x 128.

    x: (R, C) float32 or bfloat16, C a multiple of 128.
    transposed: return that of x transposed, too, scaled by *its* rows: (C, R rounded up to a
    multiple of 128), zeros behind R.

    A scale is the block's largest magnitude (or 1e-30 if that is more: zeros stay zeros) over 448.
    A block with an infinity or a NaN has values 0 and scale NaN, so every sum with it is NaN.
    Raises ValueError on another shape or dtype, and for a GPU without FP8.
    """
    check_device(x.device)
    if x.dim() != 2 or x.shape[1] % BLOCK or x.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"FP8 takes a float32 or bfloat16 matrix with columns in multiples of "
                         f"{BLOCK}, not {x.dtype} of shape {tuple(x.shape)}")
    values, scales, *other = quantize_op(x, square, transposed)
    rows = Quantized(values, scales if square else scales.T)
    return rows, Quantized(other[0], other[1].T) if other else None


def fp8_matmul(a: Quantized, b: Quantized, dtype: torch.dtype = torch.bfloat16,
               starts: Tensor | None = None) -> Tensor:
    """a (Ra, C) times b (Rb, C) transposed, accumulated in float32 -> (Ra, Rb) of `dtype`.

    a has scales of rows, b of rows or squares.
    starts: (X + 1,) int32, in units of 128, for X products at once.  With b by squares it says
    which rows of a belong to each of X matrices in b, one above the other: (Ra, Rb / X), and
    nothing in particular in rows behind the last.  With b by rows it cuts the sum: (X Ra, Rb).
    Raises ValueError on shapes that do not fit, and for a GPU without FP8.
    """
    if a.height != 1 or a.values.shape[1] != b.values.shape[1] or a.values.shape[1] % BLOCK:
        raise ValueError(f"need rows (Ra, C) and (Rb, C), C a multiple of {BLOCK}, a scaled by "
                         f"rows, got {tuple(a.values.shape)} and {tuple(b.values.shape)}")
    check_device(a.values.device)
    if starts is not None and starts.dtype != torch.int32:
        raise ValueError(f"starts must be int32, not {starts.dtype}")
    if starts is not None and b.height > 1 and len(b.values) % (BLOCK * (len(starts) - 1)):
        raise ValueError(f"{len(b.values)} rows are not {len(starts) - 1} matrices with rows in "
                         f"multiples of {BLOCK}")
    return matmul_op(*a, *b, starts, dtype)


# ------------------------------------------------------------------------------- layers of a model


class Groups(NamedTuple):
    """Rows sorted by the matrix they belong to, spread so that each one's begin at a multiple of
    128; how many there are is known on the GPU alone, so there is room for the most."""

    starts: Tensor  # (X + 1,) int32, first of each, in units of 128
    places: Tensor  # (R,) where each row goes
    room: int  # rows afterwards

    @classmethod
    def of(cls, counts: Tensor, rows: int) -> "Groups":
        """counts: (X,) rows of each, `rows` together."""
        starts = F.pad((counts + BLOCK - 1).div(BLOCK, rounding_mode="floor").cumsum(0), (1, 0))
        skipped = starts[:-1] * BLOCK - (counts.cumsum(0) - counts)
        places = skipped.repeat_interleave(counts, output_size=rows)
        places = places + torch.arange(rows, device=counts.device)
        room = (rows + len(counts) * (BLOCK - 1)) // BLOCK * BLOCK
        return cls(starts.int(), places, room)

    def spread(self, x: Tensor) -> Tensor:
        return x.new_zeros(self.room, x.shape[1]).index_copy_(0, self.places, x)


class Fp8Product(torch.autograd.Function):
    """x W^T by three FP8 products.  W is there twice: as `weight`, which gets the gradient and is
    not looked at, and quantised.  counts: rows of x for each of X matrices in W, see Fp8Linear.
    learn: keep x for the gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, values: Tensor, scales: Tensor,
                counts: Tensor | None, learn: bool) -> Tensor:
        groups = None if counts is None else Groups.of(counts, len(x))
        starts, places, ctx.room = groups or (None, None, 0)
        ctx.matrices, ctx.dtypes = 1 if counts is None else len(counts), (x.dtype, weight.dtype)
        rows, columns = quantize_fp8(groups.spread(x) if groups else x, transposed=learn)
        ctx.save_for_backward(values, scales, starts, places, *(columns or ()))
        y = fp8_matmul(rows, Quantized(values, scales), x.dtype, starts)
        return y.index_select(0, places) if groups else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        values, scales, starts, places, *columns = ctx.saved_tensors
        groups = None if starts is None else Groups(starts, places, ctx.room)
        rows, dy_columns = quantize_fp8(groups.spread(dy) if groups else dy,
                                        transposed=bool(columns))
        dx = dw = None
        if ctx.needs_input_grad[0]:
            turned = scales.unflatten(0, (ctx.matrices, -1)).transpose(1, 2).flatten(0, 1)
            dx = fp8_matmul(rows, Quantized(transpose_op(values, ctx.matrices), turned),
                            ctx.dtypes[0], starts)
            dx = dx.index_select(0, places) if groups else dx
        if columns:
            dw = fp8_matmul(dy_columns, Quantized(*columns), ctx.dtypes[1], starts)
        return dx, dw, None, None, None, None


class Fp8Linear(nn.Linear):
    """y = x W^T without a bias, in FP8; the weight stays what it was and is what is trained.

    `quantize_weights` fills `values` (N, K) and `scales` (N / 128, K / 128).  Of a weight that FSDP
    shards, it fills `shard`, this rank's rows of the values, and `all_scales`; FSDP gathers the
    shards instead of the weight, and with that sets values and scales to those of the weight as
    this rank uses it: all of it, or with expert parallelism the rows of its own experts.
    """

    values: Tensor | None = None
    scales: Tensor | None = None
    shard: Tensor | None = None
    all_scales: Tensor | None = None
    first_row = 0  # of the shard
    version = -1  # of the weight that was quantised

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight

    def forward(self, x: Tensor, counts: Tensor | None = None) -> Tensor:
        """x: (..., K); or (R, K) with counts (X,): W has X matrices, one above the other, and each
        is for so many of the rows."""
        assert self.values is not None, "call quantize_weights before the first forward pass"
        if self.all_scales is None and not torch.compiler.is_compiling():
            self.check_fresh()  # else FSDP has asked for it
        weight = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        learn = torch.is_grad_enabled() and weight.requires_grad
        y = Fp8Product.apply(x.flatten(0, -2), weight, self.values, self.scales, counts, learn)
        return y.view(*x.shape[:-1], y.shape[1])

    def master(self) -> Tensor:
        """The weight, or the shard of it that FSDP asks what to gather."""
        return self.weight._local_tensor if isinstance(self.weight, DTensor) else self.weight

    def check_fresh(self) -> None:
        """PyTorch counts the changes of a tensor."""
        assert self.version == self.master()._version, "a weight changed: call quantize_weights"

    def largest_of_shard(self) -> Tensor:
        """The largest number of each square (N / 128, K / 128) among the rows of this rank."""
        chunk, = self.weight.__create_chunk_list__()  # what distributed checkpoints ask it, too
        self.first_row, (rows, columns) = chunk.offsets[0], self.weight.shape
        whole = self.weight.to_local().new_full((rows // BLOCK, columns // BLOCK), FLOOR.value,
                                                dtype=torch.float32)
        part = largest_of(self.whole_squares())
        square = self.first_row // BLOCK
        whole[square:square + len(part)] = part
        return whole

    def whole_squares(self) -> Tensor:
        """The rows of this rank, in blocks; zeros for those of their first square it lacks."""
        local, above = self.weight.to_local(), self.first_row % BLOCK
        return in_blocks(F.pad(local, (0, 0, above, 0)) if above else local, BLOCK, BLOCK)

    def quantize_shard(self, largest: Tensor) -> None:
        """largest: of each square (N / 128, K / 128) among the rows of all ranks."""
        blocks, square = self.whole_squares(), self.first_row // BLOCK
        above, rows = self.first_row % BLOCK, len(self.weight.to_local())
        values = cast_blocks(blocks, largest[square:square + len(blocks)])
        self.shard = values[above:above + rows].view(torch.uint8)
        self.all_scales = scales_of(largest)
        asked = self.master()
        asked.fsdp_pre_all_gather = self.fsdp_pre_all_gather
        asked.fsdp_post_all_gather = self.fsdp_post_all_gather

    def fsdp_pre_all_gather(self, mesh: Any, outer_size: torch.Size, outer_stride: tuple,
                            module: nn.Module, mp_policy: Any) -> tuple[tuple[Tensor], None]:
        """What is gathered: the shard, padded to the size of the longest.  outer_size: (N, K), or
        with expert parallelism, whose ranks are the last dimension of the weight's mesh, less."""
        self.check_fresh()
        rows, first = outer_size[0], 0
        if rows < len(self.weight):
            first = self.weight.device_mesh.get_coordinate()[-1] * rows
        self.scales = self.all_scales[first // BLOCK:(first + rows) // BLOCK]
        longest = -(-rows // mesh.size())
        if len(self.shard) < longest:
            self.shard = F.pad(self.shard, (0, 0, 0, longest - len(self.shard)))
        return (self.shard,), None

    def fsdp_post_all_gather(self, gathered: tuple[Tensor], metadata: None, dtype: torch.dtype, *,
                             out: Tensor | None = None) -> tuple[Tensor, tuple] | None:
        """FSDP wants a tensor to be the weight, for its gradient: one that is not looked at."""
        if out is not None:  # from the second time on it fills the same memory
            return None
        rows = len(self.scales) * BLOCK
        self.values = gathered[0][:rows].view(E4M3)
        return placeholder(self.values.numel(), dtype, self.values.device), ()


PLACEHOLDERS: dict[tuple[torch.dtype, torch.device], Tensor] = {}


def placeholder(numbers: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """At least so many NaNs; all layers are given the same ones."""
    found = PLACEHOLDERS.get((dtype, device))
    if found is None or found.numel() < numbers:
        found = torch.full((numbers,), torch.nan, dtype=dtype, device=device)
        PLACEHOLDERS[dtype, device] = found
    return found


def convert_to_fp8(model: nn.Module) -> None:
    """Let the layers named in FP8_LAYERS compute in FP8: `nn.Linear` without a bias, or several of
    their matrices one above the other (`model.GroupedLinear`).  Parameters and their names stay.

    Before FSDP shards the model.  Call `quantize_weights` when the weights are there and after each
    change of them.  Raises ValueError naming the layer if one has a width FP8 cannot take.
    """
    found = {path: layer for path, layer in model.named_modules()
             if path.split(".")[-1] in FP8_LAYERS and isinstance(layer, nn.Linear)}
    for path, layer in found.items():
        outputs = layer.out_features // getattr(layer, "matrices", 1)
        if layer.in_features % BLOCK or outputs % BLOCK:
            raise ValueError(f"{path} maps {layer.in_features} to {outputs} numbers; FP8 takes "
                             f"multiples of {BLOCK}")
        if layer.bias is not None:
            raise ValueError(f"{path} has a bias, FP8 layers have none")
    for path, layer in found.items():
        model.set_submodule(path, Fp8Linear(layer.weight))


def quantize_shards(layers: list[Fp8Linear]) -> None:
    """Each rank quantises its rows, knowing the largest numbers of whole squares."""
    parts = [layer.largest_of_shard() for layer in layers]
    everything = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(everything, dist.ReduceOp.MAX)
    for layer, part in zip(layers, everything.split([part.numel() for part in parts])):
        layer.quantize_shard(part.view(-1, layer.weight.shape[1] // BLOCK))


@torch.no_grad()
def quantize_weights(model: nn.Module) -> None:
    """Quantise the weights of all FP8 layers from their masters, once after each change of them.

    Of a sharded model all ranks must call it.  Raises ValueError naming the layer if a weight is
    not finite.
    """
    layers = {name: x for name, x in model.named_modules() if isinstance(x, Fp8Linear)}
    if sharded := [layer for layer in layers.values() if isinstance(layer.weight, DTensor)]:
        quantize_shards(sharded)
    finite = []
    for layer in layers.values():
        if layer not in sharded:
            layer.values, layer.scales = quantize_fp8(layer.weight, square=True)[0]
        layer.version = layer.master()._version
        scales = layer.scales if layer.all_scales is None else layer.all_scales
        finite.append(scales.isfinite().all())
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
    """The factors a, b of the products a b' of a linear layer; one channel in a hundred of the
    activations is much larger than the others, as in real ones."""
    torch.manual_seed(0)
    x, w, dy = (torch.randn(*shape, device=device) for shape in ((512, 1024), (768, 1024),
                                                                (512, 768)))
    x[:, ::100] *= 30
    return {"y = x W'": (x, w), "dx = dy W": (dy, w.T.contiguous()),
            "dW = dy' x": (dy.T.contiguous(), x.T.contiguous())}


def layer_products(pairs: dict[str, tuple[Tensor, Tensor]]) -> list[Tensor]:
    """The three products of `error_cases` as an FP8 layer computes them."""
    (x, w), (dy, _), _ = pairs.values()
    layer, inputs = fp8_of(nn.Parameter(w)), x.clone().requires_grad_()
    y = layer(inputs)
    return [y.detach(), *torch.autograd.grad(y, (inputs, layer.weight), dy)]


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Root mean square of the error over that of the exact numbers."""
    return float((found - exact).norm() / exact.norm())


def main() -> None:
    """Print the errors of a layer's three products against float64, beside those of bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        check_device(torch.device(device))
    except ValueError as error:
        sys.exit(f"fp8_kernel.py: {error}")
    pairs = error_cases(device)
    exact = [a.double() @ b.double().T for a, b in pairs.values()]
    plain = [a.bfloat16() @ b.bfloat16().T for a, b in pairs.values()]
    print(f"{'error against float64':24}" + "".join(f"{name:>13}" for name in pairs))
    for name, found in (("this file", layer_products(pairs)), ("bfloat16", plain)):
        print(f"{name:24}" + "".join(f"{relative_error(y, true):13.2e}"
                                     for y, true in zip(found, exact)))


if __name__ == "__main__":
    main()
