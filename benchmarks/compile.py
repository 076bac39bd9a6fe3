"""Compile the kernels of attention (default) or FP8, for GPUs that need not be here; print a table.

Run `python -m benchmarks.compile [attention|fp8 [90|89|80 ...]] [--common]`.

--common: of attention only the causal masks, 21 of 53 configurations.

sm_90: Hopper, H100; sm_89: Ada; sm_80: Ampere, A100, which has no FP8: that is refused, and said.
Per configuration: registers of a thread, spilled loads and stores, shared memory, matrix
instructions (HGMMA and for FP8 QGMMA: Hopper's; HMMA, QMMA: the older ones), asynchronous copies
(UTMALDG: Hopper's copy engine, LDGSTS: the older ones), stores of single bytes.  Exit code 1 if one
spills, is too large, stores bytes or lacks its instruction.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompilationError

import attention_kernel
import fp8_kernel

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_KIB = {80: 99, 89: 99, 90: 227}  # what one program may use; 80: on its kin, sm_86
INSTRUCTIONS = ("HGMMA", "QGMMA", "HMMA", "QMMA", "UTMALDG", "LDGSTS", "STG.E.U8")
COMMON = "--common"
KERNELS = {"forward": "forward_kernel", "decode": "forward_kernel", "dq": "dq_kernel",
           "dkdv": "dkdv_kernel", "table": "tile_table_kernel"}
STRIDES = tuple(f"{x}_{of}" for x in "qkv" for of in ("token", "head"))
TYPES = {"cu_seqlens": "*i64", "cu_seqlens_q": "*i64", "cu_seqlens_k": "*i64",
         "q_positions": "*i64", "table": "*i32", "lse": "*fp32", "delta": "*fp32", "scale": "fp32",
         "tokens_q": "i32", "tokens_k": "i32", "segments": "i32", "slots": "i32",
         "split_keys": "i32"} | dict.fromkeys(STRIDES, "i32")
# multiples of 16, if a kernel may specialise on them
ALIGNED = ("rows", "columns", "columns_out", *STRIDES)
FP8 = {"quantize rows": ("bf16", "fp32"), "quantize square": ("bf16", "fp32"),
       "transpose": ("fp8e4nv",), "product square": ("bf16", "fp32"), "product rows": ("fp32",),
       "product square, experts": ("bf16",), "product rows, experts": ("bf16", "fp32")}


def configurations(capability: int) -> Iterator[tuple[str, str, str, int, int, str]]:
    """(kernel, architecture, dtype, width, heads per group, mask) of all that can be launched."""
    common = "hopper" if capability == 90 else "ampere"
    attend = [name for name in KERNELS if name != "table"]
    masks = ("causal",) if COMMON in sys.argv else ("full", "causal", "explicit")
    for target, dtype in ((common, "bf16"), ("float32", "fp32")):
        for kernel, (width, ratio), mask in itertools.product(
                attend, ((64, 1), (128, 4)), masks):
            yield kernel, target, dtype, width, ratio, mask
    for kernel in attend:  # float16, an odd width, a ratio that is no power of 2
        yield kernel, common, "fp16", 96, 5, "causal"
    yield "table", common, "bf16", 128, 4, "causal"  # it has no tiles of its own: the forward's


def tile_of(kernel: str, target: str, width: int) -> attention_kernel.Tile:
    return attention_kernel.tile_for("forward" if kernel == "table" else kernel, target, width)


def compile_one(kernel: str, target: str, dtype: str, width: int, ratio: int, mask: str,
                capability: int) -> dict[str, int]:
    """Registers, spills, shared KiB and counts of instructions of one compiled configuration."""
    function = getattr(attention_kernel, KERNELS[kernel])
    tile = tile_of(kernel, target, width)
    block_e = triton.next_power_of_2(width)
    descriptors = target == "hopper" and (kernel != "dkdv" or ratio & (ratio - 1) == 0)
    constants = {"R": ratio, "E": width, "BLOCK_E": block_e, "BLOCK_M": tile.BLOCK_M,
                 "BLOCK_N": tile.BLOCK_N, "CAUSAL": mask != "full", "EXPLICIT": mask == "explicit",
                 "DESCRIPTORS": descriptors, "ROWS": ratio, "BLOCK": tile.BLOCK_M,
                 "LAST_FIRST": True}
    types = dict(TYPES)
    if descriptors and kernel == "dkdv":
        block = f"tensordesc<{dtype}[{tile.BLOCK_M // ratio},{ratio},{block_e}]>"
        types |= {"q": block, "grad": block}
    elif descriptors:
        types |= dict.fromkeys("kv", f"tensordesc<{dtype}[{tile.BLOCK_N},1,{block_e}]>")
    types = {name: types.get(name, f"*{dtype}") for name in function.arg_names}
    return build(function, types, constants, tile.num_warps, tile.num_stages, capability)


def build(function: triton.JITFunction, types: dict[str, str], constants: dict[str, object],
          warps: int, stages: int, capability: int) -> dict[str, int]:
    """Compile a kernel and count; of `constants` those that it has are used."""
    constants = {name: constants[name] for name in function.arg_names if name in constants}
    signature = {name: "constexpr" if name in constants else types[name]
                 for name in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names)
               if signature[name].startswith("*")
               or name in ALIGNED and not function.params[i].do_not_specialize}
    index = {(function.arg_names.index(name),): value for name, value in constants.items()}
    built = triton.compile(
        ASTSource(function, signature, index, aligned), target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([TOOLS / tool[0], *tool[1:], file.name], check=True,
                                      capture_output=True, text=True).stdout
                       for tool in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    counts = {name: len(re.findall(rf"\b{re.escape(name)}\b", code)) for name in INSTRUCTIONS}
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
            "shared": -(-built.metadata.shared // 1024), **counts}


def compile_fp8(name: str, dtype: str, capability: int) -> dict[str, int]:
    """A kernel of fp8_kernel.py; dtype: of what it reads, or of a product."""
    kernel, _, variant = name.partition(" ")
    function = getattr(fp8_kernel, f"{kernel}_kernel")
    descriptors = capability >= 90
    columns = fp8_kernel.TILE_COLUMNS[descriptors]
    a, b = (f"tensordesc<fp8e4nv[{rows},{fp8_kernel.BLOCK}]>" if descriptors else "*fp8e4nv"
            for rows in (fp8_kernel.BLOCK, columns))
    constants = {
        "BLOCK": fp8_kernel.BLOCK, "BAND": fp8_kernel.PRODUCT["BAND"], "GROUPS_ROOM": 128,
        "DESCRIPTORS": descriptors, "BLOCK_N": columns, "SQUARE": "square" in variant,
        "TRANSPOSED": variant == "rows", "ROW_GROUPS": variant == "square, experts",
        "SUM_GROUPS": variant == "rows, experts"}
    types = {name: "i32" for name in function.arg_names} | {
        name: "*fp32" for name in ("scales", "t_scales", "scales_a", "scales_b")} | {
        name: "*fp8e4nv" for name in ("values", "t_values")} | {
        "starts": "*i32", "x": f"*{dtype}", "out": f"*{dtype}", "a": a, "b": b}
    return build(function, types, constants, 8, fp8_kernel.PRODUCT["num_stages"], capability)


def faults(row: dict[str, int], capability: int, matrix: str | None) -> str:
    """What is wrong with a compiled configuration that should use a matrix instruction, if any."""
    found = ["spills"] if row["spills"] else []
    if row["shared"] > SHARED_KIB[capability]:
        found.append("does not fit shared memory")
    if row["STG.E.U8"]:
        found.append("stores single bytes")
    if matrix and not row[matrix]:
        found.append(f"no {matrix}")
    return ", ".join(found)


def attention_rows(capability: int) -> Iterator[tuple[str, dict[str, int], str]]:
    """(description, counts, faults) of each configuration."""
    for kernel, target, dtype, width, ratio, mask in configurations(capability):
        row = compile_one(kernel, target, dtype, width, ratio, mask, capability)
        tile = tile_of(kernel, target, width)
        matrix = {"float32": None, "ampere": "HMMA", "hopper": "HGMMA"}[target]
        if kernel == "decode" and target == "hopper":
            matrix = "HMMA"  # 16 rows: HGMMA takes 64
        yield (f"{kernel:8} {capability:3} {dtype:5} {width:3} {ratio:2} {mask:9}"
               f"{f'{tile.BLOCK_M}x{tile.BLOCK_N}':>8} {tile.num_warps:2} {tile.num_stages:2}",
               row, faults(row, capability, None if kernel == "table" else matrix))


def fp8_rows(capability: int) -> Iterator[tuple[str, dict[str, int], str]]:
    """The same of the FP8 kernels."""
    matrix = "QGMMA" if capability >= 90 else "QMMA"
    for name, dtypes in FP8.items():
        for dtype in dtypes:
            row = compile_fp8(name, dtype, capability)
            columns = (fp8_kernel.TILE_COLUMNS[capability >= 90] if name.startswith("product")
                       else fp8_kernel.BLOCK)
            yield (f"{name:23} {capability:3} {dtype:8}{f'128x{columns}':>8}  8  3", row,
                   faults(row, capability, matrix if name.startswith("product") else None))


def refusal(capability: int) -> Iterator[tuple[str, dict[str, int], str]]:
    """Nothing, if FP8 cannot be compiled, but for saying why."""
    try:
        compile_fp8("quantize rows", "bf16", capability)
    except CompilationError as error:
        print(f"FP8 on sm_{capability}: {str(error).splitlines()[-1]}")
        return
    counts = dict.fromkeys(("registers", "spills", "shared", *INSTRUCTIONS), 0)
    yield f"FP8 on sm_{capability}", counts, "is not refused"


def main() -> None:
    arguments = [word for word in sys.argv[1:] if word != COMMON]
    wrong, (kind, *capabilities) = 0, arguments or ["attention"]
    tables = {"attention": {90: attention_rows, 80: attention_rows},
              "fp8": {90: fp8_rows, 89: fp8_rows, 80: refusal}}[kind]
    print(f"Triton {triton.__version__}")
    print(f"{'kernel, sm, dtype':21}{'E, R, mask':12}{'block':>6}{'warps, stages':>14}"
          f"{'regs':>6} {'spills':>6} {'KiB':>4}" + "".join(f"{name:>9}" for name in INSTRUCTIONS))
    for capability in [int(x) for x in capabilities] or tables:
        for text, row, fault in tables[capability](capability):
            wrong += bool(fault)
            print(f"{text:53}" + f"{row['registers']:6} {row['spills']:6} {row['shared']:4}"
                  + "".join(f"{row[name]:9}" for name in INSTRUCTIONS) + f"  {fault}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
