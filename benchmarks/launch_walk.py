"""Launch every kernel without a GPU, to find launches that a GPU would refuse.

Run `python -m benchmarks.launch_walk [--break]`.

Triton compiles, handles arguments and launches here as for an H100, on tensors of the CPU; only the
CUDA driver is another one, `stub_driver.c`.  It runs nothing, but refuses the launches that
NVIDIA's would refuse.  What the kernels make descriptors of is checked against the rules of
Hopper's copy engine.  Prints what was launched; exit code 1, and the name of the case, at the first
refusal.  --break takes inputs as they are, also those of which no descriptor can be made: that must
be noticed.

What it cannot tell: whether the kernels read and write the right numbers, and how fast.  Needs a C
compiler and Python's headers, as Triton itself does.
"""

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor, nn
from triton.backends.nvidia import compiler, driver
from triton.runtime._allocation import NullAllocator

import attention_kernel
import fp8_kernel

Call = Callable[[], object]
Cases = Iterator[tuple[str, Call]]  # (name, what launches)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


# ------------------------------------------------------------ the driver, and a CPU that acts a GPU


def run_with_stub() -> int:
    """Compile the stub and run this module again where it is found in place of CUDA's driver."""
    with tempfile.TemporaryDirectory() as folder:
        headers = Path(driver.__file__).with_name("include")
        subprocess.run([os.environ.get("CC") or shutil.which("gcc") or "clang", "-shared", "-fPIC",
                        f"-I{headers}", "-Wl,-soname,libcuda.so.1", "-o",
                        f"{folder}/libcuda.so.1", Path(__file__).with_name("stub_driver.c")],
                       check=True)
        # a cache of its own, for what is compiled in haste and not for a GPU; the last variable is
        # what it would be, but for a warning
        environment = os.environ | {
            "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":"),
            "TRITON_LIBCUDA_PATH": folder, "TRITON_CACHE_DIR": f"{folder}/cache",
            "TRITON_INTERPRET": "0", "DISABLE_LLVM_OPT": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
        command = [sys.executable, "-m", "benchmarks.launch_walk", *sys.argv[1:]]
        return subprocess.run(command, env=environment).returncode


def replace(name: str, value: Callable) -> None:
    """Replace a function of the kernel files wherever it was imported."""
    for module in (attention_kernel, fp8_kernel):
        if hasattr(module, name):
            setattr(module, name, value)


def act_as_gpu() -> None:
    """Let tensors of the CPU pass for an H100's."""
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.current_device = lambda: 0
    torch._C._cuda_getCurrentRawStream = lambda device: 0
    triton.runtime.driver.set_active(driver.CudaDriver())
    # machine code is for who runs a kernel; `benchmarks/compile.py` looks at it
    compiler.CUDABackend.make_cubin = lambda *_: b"machine code"
    replace("uses_kernels", lambda x: True)
    replace("compute_capability", lambda device: (9, 0))
    torch.ops.aten._assert_async.msg = lambda *_: None  # of a verdict that no kernel gave
    backward = attention_kernel.triton_backward

    def in_another_thread(*arguments: object) -> tuple[Tensor, ...]:
        triton.set_allocator(NullAllocator())  # autograd's thread has none
        return backward(*arguments)
    replace("triton_backward", in_another_thread)


DESCRIBED = ("q", "k", "v", "grad", "out", "lse_delta", "a", "b")  # arguments of kernels
checked: Counter[int] = Counter()  # descriptors that the copy engine can follow, by thread


def check_descriptors(kernel: str, arguments: dict[str, object]) -> None:
    """Raise AssertionError for an address or a stride that the copy engine cannot follow: both are
    multiples of 16 bytes, and heads lie side by side."""
    for name in DESCRIBED:
        x = arguments.get(name)
        if not isinstance(x, Tensor) or kernel == "forward_kernel" and name == "out":
            continue  # what a kernel stores needs no descriptor
        assert name != "out" or x.is_contiguous(), f"{kernel}: out has the strides {x.stride()}"
        stride = arguments.get(f"{name}_stride", x.stride(-2))
        size = x.element_size()
        assert x.data_ptr() % 16 == 0, f"{kernel}: the address of {name} is {x.data_ptr()}"
        assert stride * size % 16 == 0, f"{kernel}: {name} has a stride of {stride * size} bytes"
        if f"{name}_stride" in arguments:
            nested = x.stride(1) == x.shape[2] and x.stride(0) == stride
            assert nested, f"{kernel}: {name} has the strides {x.stride()}"
        checked[threading.get_ident()] += 1


def check_launches() -> None:
    """Look at the arguments of every launch."""
    run = triton.JITFunction.run

    def checked_run(self: triton.JITFunction, *arguments: object, **options: object) -> object:
        check_descriptors(self.fn.__name__, dict(zip(self.arg_names, arguments)))
        return run(self, *arguments, **options)
    triton.JITFunction.run = checked_run


# ----------------------------------------------------------------- does the stub refuse anything?


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = [*((name, ctypes.c_uint) for name in (
        "grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint)]


def launch(stub: ctypes.CDLL, grid: tuple[int, int, int] = (2**31 - 1, 65535, 65535),
           threads: int = 1024, shared: int = 232448) -> int:
    """Ask for a launch; 0 if it is granted."""
    config = LaunchConfig(*grid, threads, 1, 1, shared)
    return stub.cuLaunchKernelEx(ctypes.byref(config), b"a kernel", None, None)


@triton.jit
def idle_kernel():
    pass


def check_stub(stub: ctypes.CDLL) -> None:
    """Raise AssertionError unless it keeps each of its rules, and what it refuses raises."""
    wrong = [{"grid": (0, 1, 1)}, {"grid": (2**31, 1, 1)}, {"grid": (1, 65536, 1)},
             {"grid": (1, 1, 65536)}, {"threads": 1056}, {"shared": 232449}]
    assert launch(stub) == 0
    for arguments in wrong:
        assert launch(stub, **arguments) != 0, f"the stub grants {arguments}"
    assert stub.stub_launches() == 1
    try:
        idle_kernel[(1, 65536)]()
    except RuntimeError as error:
        assert "idle_kernel on a grid of 1 x 65536 x 1" in str(error), error
    else:
        raise AssertionError("Triton does not raise what the stub refuses")


# ------------------------------------------------------------------------------------- attention


class Heads(NamedTuple):
    """Attention that is compiled once; the cases differ in what is not compiled in."""

    width: int
    heads: int
    groups: int
    dtype: torch.dtype
    mask: str  # full, causal or positions
    integer: torch.dtype = torch.int32  # of cu_seqlens and positions

    def __str__(self) -> str:
        return (f"{self.heads} heads, {self.groups} groups of {self.width}, {self.dtype}, "
                f"{self.mask}, {self.integer}").replace("torch.", "")


Tensors = tuple[Tensor, Tensor, Tensor]  # q (T, H, E), k and v (T, G, E)
# widths, ratios, types and masks; the specialized form of the forward pass, the plain one with
# positions and float32
SHAPES = [
    Heads(64, 2, 2, BF16, "full"), Heads(128, 8, 2, BF16, "causal", torch.int64),
    Heads(16, 2, 1, BF16, "causal"), Heads(32, 2, 2, FP16, "positions", torch.int64),
    Heads(32, 3, 1, BF16, "causal"), Heads(128, 14, 2, FP16, "positions"),
    Heads(64, 64, 1, BF16, "full", torch.int64), Heads(32, 2, 2, FP32, "causal")]
LAYOUTS: dict[str, tuple[list[int], list[int]]] = {  # lengths of the segments: queries, keys
    "packed": ([1, 130, 0, 77], [1, 130, 0, 77]), "empty ends": ([0, 50, 0], [0, 50, 0]),
    "more keys": ([3, 20, 0], [150, 20, 5]), "segments without keys": ([3, 20], [0, 25]),
    "no queries": ([0, 0], [4, 0]), "no keys": ([20], [0]), "no segments": ([], []),
    "300 segments": ([17] * 300, [17] * 300)}


def zeros(tokens: int, n: int, heads: Heads) -> Tensor:
    return torch.zeros(tokens, n, heads.width, dtype=heads.dtype)


def each(make: Callable[[int, int, Heads], Tensor], heads: Heads, tokens: int) -> Tensors:
    """q, k and v made alike, from numbers of tokens and heads."""
    return tuple(make(tokens, n, heads) for n in (heads.heads, heads.groups, heads.groups))


def spaced(room: int, tokens: int, n: int, heads: Heads) -> Tensor:
    """With numbers of somebody else behind each head."""
    whole = torch.zeros(tokens, n, heads.width + room, dtype=heads.dtype)
    return whole[..., :heads.width]


def in_one(heads: Heads, tokens: int) -> Tensors:
    """Parts of one product, as in the ViT."""
    sizes = [heads.heads, heads.groups, heads.groups]
    return zeros(tokens, sum(sizes), heads).split(sizes, dim=1)


def keys_in_one(heads: Heads, tokens: int) -> Tensors:
    """Keys and values that were gathered together, as by ranks that share a row."""
    both = zeros(tokens, 2 * heads.groups, heads)
    return zeros(tokens, heads.heads, heads), *both.chunk(2, dim=1)


def expanded(heads: Heads, tokens: int) -> Tensors:
    """All groups have the same keys and values."""
    k, v = (zeros(tokens, 1, heads).expand(-1, heads.groups, -1) for _ in range(2))
    return zeros(tokens, heads.heads, heads), k, v


def odd_step(tokens: int, n: int, heads: Heads) -> Tensor:
    """A stride from head to head, where there is but one head."""
    whole = zeros(tokens, n, heads)
    return whole.as_strided(whole.shape, (heads.width, 3, 1)) if n == 1 else whole


VIEWS: dict[str, Callable[[Heads, int], Tensors]] = {
    "in one": in_one, "k and v in one": keys_in_one, "k and v expanded": expanded,
    "heads outside": partial(each, lambda t, n, x: zeros(n, t, x).transpose(0, 1)),
    "spaced by 16": partial(each, partial(spaced, 16)),
    "from row 3 on": partial(each, lambda t, n, x: zeros(t + 3, n, x)[3:])}
AWKWARD = {  # each compiled for itself
    "spaced by 8": partial(each, partial(spaced, 8)),
    "spaced by 1": partial(each, partial(spaced, 1)),
    "odd addresses": partial(each, lambda t, n, x: torch.zeros(
        t * n * x.width + 1, dtype=x.dtype)[1:].view(t, n, -1)),
    "an odd step": partial(each, odd_step)}


def attend(qkv: Tensors, heads: Heads, lengths: list[int], lengths_k: list[int],
           learn: bool = True, grad: Tensor | None = None) -> None:
    """Forward and, to learn, backward; lengths of the segments in queries and keys."""
    cu_seqlens, cu_seqlens_k = (torch.tensor([0, *n]).cumsum(0).to(heads.integer)
                                for n in (lengths, lengths_k))
    positions = torch.arange(sum(lengths)).to(heads.integer) if heads.mask == "positions" else None
    qkv = [x.detach().requires_grad_(learn) for x in qkv]
    out = attention_kernel.flash_attn_varlen_func(
        *qkv, cu_seqlens, cu_seqlens_k, max(lengths, default=0), max(lengths_k, default=0),
        causal=heads.mask != "full", q_positions=positions)
    if learn:
        torch.autograd.grad(out, qkv, torch.zeros_like(out) if grad is None else grad)


def training(heads: Heads) -> Cases:
    for name, (queries, keys) in LAYOUTS.items():
        q = zeros(sum(queries), heads.heads, heads)
        k, v = (zeros(sum(keys), heads.groups, heads) for _ in range(2))
        yield name, partial(attend, (q, k, v), heads, queries, keys)
    for name, view in (VIEWS | (AWKWARD if heads.width == 16 else {})).items():
        yield name, partial(attend, view(heads, 70), heads, [70], [70])
    one = torch.zeros((), dtype=heads.dtype)
    for name, grad in (("of a sum", one.expand(70, heads.heads, heads.width)),
                       ("heads outside", zeros(heads.heads, 70, heads).transpose(0, 1))):
        yield f"gradient {name}", partial(
            attend, each(zeros, heads, 70), heads, [70], [70], grad=grad)


def decoding(heads: Heads) -> Cases:
    """A query for the keys of a cache, which are split among programs if there are few of them."""
    for segments, capacity in ((1, 4096), (3, 700), (300, 40)):
        k, v = torch.zeros(2, 5, segments * capacity, heads.groups, heads.width,
                           dtype=heads.dtype)[:, 3]  # those of a layer
        yield f"{segments} x {capacity} keys", partial(
            attend, (zeros(segments, heads.heads, heads), k, v), heads, [1] * segments,
            [capacity] * segments, learn=False)


# ------------------------------------------------------------------------------------------- FP8


def quantising() -> Cases:
    for dtype, square, transposed in ((BF16, False, True), (BF16, False, False),
                                      (BF16, True, True), (FP32, True, False)):
        for rows in (0, 1, 128, 129, 5000):
            for columns in (128, 384):
                x = torch.zeros(rows, columns, dtype=dtype)
                yield (f"{rows} x {columns}, {dtype}, square {square}, transposed {transposed}",
                       partial(fp8_kernel.quantize_fp8, x, square, transposed))


def multiply(rows: int, outputs: int, inputs: int, square: bool) -> None:
    a, b = torch.zeros(rows, inputs, dtype=BF16), torch.zeros(outputs, inputs)
    b = fp8_kernel.quantize_fp8(b if square else b.bfloat16(), square)[0]
    fp8_kernel.fp8_matmul(fp8_kernel.quantize_fp8(a)[0], b, BF16 if square else FP32)


def products() -> Cases:
    for rows, (outputs, inputs), square in itertools.product(
            (0, 1, 128, 129, 5000), ((128, 128), (384, 256)), (True, False)):
        yield (f"{rows} x {inputs} x {outputs}, {'squares' if square else 'rows'}",
               partial(multiply, rows, outputs, inputs, square))


def layer(inputs: int, outputs: int, counts: list[int] | None, rows: int, learn: bool) -> None:
    """Forward and backward of a layer, of experts if counts says how many rows each of them has."""
    weight = nn.Parameter(torch.zeros((1 if counts is None else len(counts)) * outputs, inputs))
    fast = fp8_kernel.Fp8Linear(weight.requires_grad_(learn))
    x = torch.zeros(rows, inputs, dtype=BF16, requires_grad=True)
    y = fast(x, *(() if counts is None else (torch.tensor(counts),)))
    torch.autograd.grad(y, [x, weight] if learn else x, torch.zeros_like(y))


def layers() -> Cases:
    for rows in (0, 1, 129, 1000):
        for learn in (True, False):
            yield f"{rows} rows, learn {learn}", partial(layer, 256, 384, None, rows, learn)
    for name, counts in {"4 experts": [1, 129, 0, 300], "one of 4": [0, 0, 0, 7],
                         "none of 4": [0] * 4, "128 experts": [0, 3] * 64,
                         "one of 128": [2000] + [0] * 127}.items():
        for learn in (True, False):
            yield f"{name}, learn {learn}", partial(layer, 128, 256, counts, sum(counts), learn)


# ---------------------------------------------------------------------------------------- the walk

GROUPS: dict[str, Callable[[], Cases]] = {
    **{f"attention, {heads}": partial(training, heads) for heads in SHAPES},
    **{f"decoding, {heads}": partial(decoding, heads) for heads in (
        Heads(128, 8, 2, BF16, "positions", torch.int64), Heads(32, 2, 2, FP32, "causal"))},
    "FP8, quantising": quantising, "FP8, products": products, "FP8, layers": layers}


def walk_group(stub: ctypes.CDLL, asked: Counter[int], title: str) -> tuple[int, int]:
    """Launch the cases of a group; how many launches were granted, and tensors described.  Raises
    RuntimeError naming the case if one is refused.  The stub counts for each thread."""
    thread, number = threading.get_ident(), 0
    before, described_before = stub.stub_launches(), checked[thread]
    for name, call in GROUPS[title]():
        number += 1
        triton.set_allocator(NullAllocator())
        try:
            call()
            # Triton does and says nothing if a grid is empty, or is 2^31 programs or more in all
            assert stub.stub_launches() - before == asked[thread], "a grid is empty or too large"
        except (AssertionError, RuntimeError, TypeError, ValueError) as error:
            raise RuntimeError(f"{title}: {name}: {error}") from error
    asked[thread] = 0
    launches, described = stub.stub_launches() - before, checked[thread] - described_before
    print(f"{title:63}{number:3} cases {launches:3} launches {described:3} described", flush=True)
    return launches, described


def walk(stub: ctypes.CDLL) -> None:
    """Launch all cases; exits at the first one that is refused."""
    asked: Counter[int] = Counter()  # launches that Triton was asked for, by thread
    triton.knobs.runtime.launch_enter_hook.add(lambda _: asked.update([threading.get_ident()]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # compiling is what takes the time
        try:
            granted = list(pool.map(partial(walk_group, stub, asked), GROUPS))
        except RuntimeError as error:
            pool.shutdown(cancel_futures=True)
            traceback.print_exc()
            sys.exit(str(error))
    launches, described = map(sum, zip(*granted))
    print(f"{launches} launches, {described} tensors described, all legal")


def main() -> None:
    if "TRITON_LIBCUDA_PATH" not in os.environ:
        sys.exit(run_with_stub())
    stub = ctypes.CDLL(f"{os.environ['TRITON_LIBCUDA_PATH']}/libcuda.so.1")
    act_as_gpu()
    check_stub(stub)
    if "--break" in sys.argv:
        replace("describable", lambda x: x)
    check_launches()
    walk(stub)


if __name__ == "__main__":
    main()
