"""Compile the kernels of attention (default) or FP8, for GPUs that need not be here; print a table.

Run `python -m benchmarks.compile [attention|fp8 [90|89|80 ...]] [--common]`.

--common: of attention only the causal masks, 24 of 58 configurations for sm_90, 21 of 53 for sm_80.

sm_90: Hopper, H100; sm_89: Ada; sm_80: Ampere, A100, which has no FP8: that is refused, and said.
Per configuration: registers of a thread, spilled loads and stores, shared memory; of the loop over
blocks the instructions that a warp passes in a full block (what a branch jumps over, as the mask
is, not counted; of a kernel without a loop all) and the waits until all matrix products are done
(DEPBAR); matrix instructions (HGMMA and for FP8 QGMMA: Hopper's; HMMA, QMMA: the older ones) and
asynchronous copies (UTMALDG: Hopper's copy engine, LDGSTS: the older ones) in all; moves of
registers between warps (USETMAXREG: specialized forms have them); stores of single bytes.  Exit
code 1 if one spills, is too large or too long, stores bytes or lacks its instruction.
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
INSTRUCTIONS = ("HGMMA", "QGMMA", "HMMA", "QMMA", "UTMALDG", "LDGSTS", "USETMAXREG", "STG.E.U8")
MATRIX = ("HGMMA", "QGMMA", "HMMA", "QMMA")
COMMON = "--common"
KERNELS = {"specialized": "forward_kernel", "forward": "forward_kernel", "decode": "forward_kernel",
           "dq": "dq_kernel", "dkdv": "dkdv_kernel"}
TYPES = {"cu_seqlens_q": "*i64", "cu_seqlens_k": "*i64", "q_positions": "*i64", "lse": "*fp32",
         "lse_delta": "*fp32", "scale": "fp32"}
# pointers without an entry above are of the case's type, all other arguments integers
POINTERS = ("q", "k", "v", "grad", "out", "dq", "dk", "dv")
# multiples of 16, if a kernel may specialise on them
ALIGNED = ("columns", "columns_out", "rows_b", "q_stride", "k_stride", "v_stride", "grad_stride")
FP8 = {"quantize rows": ("bf16", "fp32"), "quantize square": ("bf16", "fp32"),
       "product square": ("bf16", "fp32"), "product rows": ("fp32",),
       "product square, experts": ("bf16",), "product rows, experts": ("bf16", "fp32")}
# instructions that a block may take on Hopper: (kernel, width) of attention in 16 bits; FP8
LIMITS = {("specialized", 64): 620, ("specialized", 128): 680, ("dq", 64): 270, ("dq", 128): 310,
          ("dkdv", 64): 420, ("dkdv", 128): 300, "quantize rows": 2150, "product square": 150,
          "product rows": 230}
# float32 of width 128, which checks use and training does not, may spill so many: a product of
# float32 keeps 128 numbers of both factors in registers
SPILLS = {("dkdv", "float32", 128, 90): 6, ("dkdv", "float32", 128, 80): 2}


def configurations(capability: int) -> Iterator[tuple[str, str, str, int, int, str]]:
    """(kernel, architecture, dtype, width, heads per group, mask) of all that can be launched."""
    common = "hopper" if capability == 90 else "ampere"
    masks = ("causal",) if COMMON in sys.argv else ("full", "causal", "explicit")
    for target, dtype in ((common, "bf16"), ("float32", "fp32")):
        for kernel, (width, ratio), mask in itertools.product(KERNELS, ((64, 1), (128, 4)), masks):
            # queries with positions of their own take the plain form
            if kernel != "specialized" or (target == "hopper" and mask != "explicit"):
                yield kernel, target, dtype, width, ratio, mask
    for kernel in KERNELS:  # float16, narrow heads, a ratio that is no power of 2
        if kernel != "specialized" or common == "hopper":
            yield kernel, common, "fp16", 32, 5, "causal"
    yield "dkdv", common, "bf16", 16, 2, "causal"


def compile_one(kernel: str, target: str, dtype: str, width: int, ratio: int, mask: str,
                capability: int) -> dict[str, int]:
    """Registers, spills, shared KiB and counts of instructions of one compiled configuration."""
    function = getattr(attention_kernel, KERNELS[kernel])
    tile = attention_kernel.tile_for(kernel, target, width)
    specialized, decode = kernel == "specialized", kernel == "decode"
    groups, heads = 2, 1
    if specialized and dtype == "bf16":  # float16 with one head a program, as in short rows
        heads = attention_kernel.HEADS_PER_PROGRAM
    constants = {"H": groups if decode else ratio * groups, "G": groups, "E": width,
                 "STACKED": ratio if decode else 1, "MASK": mask, "SPECIALIZED": specialized,
                 "HEADS_PER_PROGRAM": heads, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N}
    types = dict.fromkeys(function.arg_names, "i32") | dict.fromkeys(POINTERS, f"*{dtype}") | TYPES
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
            "shared": -(-built.metadata.shared // 1024), **counts, **of_a_block(code)}


def parse(code: str) -> tuple[list[str], dict[int, int]]:
    """The instructions of disassembled code, and for those that branch to a label, where to."""
    instructions, labels = [], {}
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.search(r"/\*[0-9a-f]+\*/\s+(.*?);", line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(instruction[1])
    targets = {}
    for i, instruction in enumerate(instructions):
        branch = re.search(r"\bBRA.*`\((\.L_x_\d+)\)", instruction)
        if branch and branch[1] in labels:
            targets[i] = labels[branch[1]]
    return instructions, targets


def shortest_way(instructions: list[str], targets: dict[int, int], begin: int,
                 end: int) -> int | None:
    """The fewest instructions from `begin` to the one at `end`; None if no way stays between."""
    fewest: dict[int, int] = {end: 1}
    for i in range(end - 1, begin - 1, -1):
        ways = []
        if i not in targets or instructions[i].startswith("@"):  # goes on, perhaps
            ways.append(fewest.get(i + 1))
        if targets.get(i, -1) > i:  # jumps ahead
            ways.append(fewest.get(targets[i]))
        known = [way for way in ways if way is not None]
        if known:
            fewest[i] = 1 + min(known)
    return fewest.get(begin)


def of_a_block(code: str) -> dict[str, int]:
    """`block`, the fewest instructions on a way through the innermost loop with products, and
    `waits` in it; without such a loop all instructions, and no waits."""
    instructions, targets = parse(code)
    products = [any(name in x for name in MATRIX) for x in instructions]
    loops = [(to, at) for at, to in targets.items() if to <= at and any(products[to:at + 1])]
    for begin, end in sorted(loops, key=lambda loop: loop[1] - loop[0]):
        block = shortest_way(instructions, targets, begin, end)
        if block is not None:  # None: rarely run code behind the loop, which jumps back into it
            waits = sum("DEPBAR" in x and "gsb0, 0x0" in x for x in instructions[begin:end + 1])
            return {"block": block, "waits": waits}
    return {"block": len(instructions), "waits": 0}


def compile_fp8(name: str, dtype: str, capability: int) -> tuple[str, dict[str, int]]:
    """Block and warps, and counts, of a kernel of fp8_kernel.py; dtype: of what it reads, or of a
    product."""
    kernel, _, variant = name.partition(" ")
    function = getattr(fp8_kernel, f"{kernel}_kernel")
    options = {"BLOCK": fp8_kernel.BLOCK, "num_warps": 8, "num_stages": 3}
    if kernel == "product":
        options = fp8_kernel.product_options(capability // 10, capability == 90)
    warps, stages = options.pop("num_warps"), options.pop("num_stages")
    constants = options | {
        "SQUARE": "square" in variant, "TRANSPOSED": True,
        "ROW_GROUPS": variant == "square, experts", "SUM_GROUPS": variant == "rows, experts"}
    types = {name: "i32" for name in function.arg_names} | {
        name: "*fp32" for name in ("scales", "t_scales", "scales_a", "scales_b")} | {
        name: "*fp8e4nv" for name in ("values", "t_values", "a", "b")} | {
        "starts": "*i32", "x": f"*{dtype}", "out": f"*{dtype}"}
    row = build(function, types, constants, warps, stages, capability)
    columns = options.get("BLOCK_N", fp8_kernel.BLOCK)
    return f"{f'128x{columns}':>8} {warps:2} {stages:2}", row


def faults(row: dict[str, int], capability: int, matrix: str | None, limit: int | None,
           specialized: bool, spills: int = 0) -> str:
    """What is wrong with a compiled configuration that should use a matrix instruction, if any."""
    found = ["spills"] if row["spills"] > spills else []
    if row["shared"] > SHARED_KIB[capability]:
        found.append("does not fit shared memory")
    if row["STG.E.U8"]:
        found.append("stores single bytes")
    if matrix and not row[matrix]:
        found.append(f"no {matrix}")
    if specialized and not row["USETMAXREG"]:
        found.append("not specialized")
    if limit and row["block"] > limit:
        found.append(f"more than {limit} instructions")
    return ", ".join(found)


def attention_rows(capability: int) -> Iterator[tuple[str, dict[str, int], str]]:
    """(description, counts, faults) of each configuration."""
    for kernel, target, dtype, width, ratio, mask in configurations(capability):
        row = compile_one(kernel, target, dtype, width, ratio, mask, capability)
        tile = attention_kernel.tile_for(kernel, target, width)
        matrix = {"float32": None, "ampere": "HMMA", "hopper": "HGMMA"}[target]
        if kernel == "decode" and target == "hopper":
            matrix = "HMMA"  # 16 rows: HGMMA takes 64
        limit = LIMITS.get((kernel, width)) if target == "hopper" and mask != "explicit" else None
        yield (f"{kernel:11} {capability:3} {dtype:5} {width:3} {ratio:2} {mask:9}"
               f"{f'{tile.BLOCK_M}x{tile.BLOCK_N}':>8} {tile.num_warps:2} {tile.num_stages:2}",
               row, faults(row, capability, matrix, limit, kernel == "specialized",
                           SPILLS.get((kernel, target, width, capability), 0)))


def fp8_rows(capability: int) -> Iterator[tuple[str, dict[str, int], str]]:
    """The same of the FP8 kernels."""
    matrix = "QGMMA" if capability >= 90 else "QMMA"
    for name, dtypes in FP8.items():
        limit = LIMITS.get(name.partition(",")[0]) if capability >= 90 else None
        for dtype in dtypes:
            launch, row = compile_fp8(name, dtype, capability)
            is_product = name.startswith("product")
            yield (f"{name:26} {capability:3} {dtype:8}{launch}", row, faults(
                row, capability, matrix if is_product else None, limit,
                is_product and capability == 90))


def refusal(capability: int) -> Iterator[tuple[str, dict[str, int], str]]:
    """Nothing, if FP8 cannot be compiled, but for saying why."""
    try:
        compile_fp8("quantize rows", "bf16", capability)
    except CompilationError as error:
        print(f"FP8 on sm_{capability}: {str(error).splitlines()[-1]}")
        return
    counts = dict.fromkeys(("registers", "spills", "shared", "block", "waits", *INSTRUCTIONS), 0)
    yield f"FP8 on sm_{capability}", counts, "is not refused"


def main() -> None:
    arguments = [word for word in sys.argv[1:] if word != COMMON]
    wrong, (kind, *capabilities) = 0, arguments or ["attention"]
    tables = {"attention": {90: attention_rows, 80: attention_rows},
              "fp8": {90: fp8_rows, 89: fp8_rows, 80: refusal}}[kind]
    print(f"Triton {triton.__version__}")
    print(f"{'kernel, sm, dtype':24}{'E, R, mask':12}{'block':>6}{'warps, stages':>14}"
          f"{'regs':>6} {'spills':>6} {'KiB':>4} {'block':>6} {'waits':>5}"
          + "".join(f"{name:>11}" for name in INSTRUCTIONS))
    for capability in [int(x) for x in capabilities] or tables:
        for text, row, fault in tables[capability](capability):
            wrong += bool(fault)
            print(f"{text:56}" + f"{row['registers']:6} {row['spills']:6} {row['shared']:4} "
                  f"{row['block']:6} {row['waits']:5}"
                  + "".join(f"{row[name]:11}" for name in INSTRUCTIONS) + f"  {fault}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
