"""Compile every kernel configuration that ships, for GPUs that need not be here, and print a table.

Usage: python tests/compile_kernels.py [90|80 ...]      (sm_90: Hopper, H100; sm_80: Ampere, A100)

Per configuration: registers of a thread, spilled loads and stores, shared memory, matrix
instructions (HGMMA: Hopper's, HMMA: the older ones), asynchronous copies (UTMALDG: Hopper's copy
engine, LDGSTS: the older ones).  Exit code 1 if one spills, is too large, or lacks its instruction.
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
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
import attention_kernel  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_KIB = {80: 99, 90: 227}  # what one program may use; 80: on its consumer kin, sm_86 and 89
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS")
KERNELS = {"forward": "forward_kernel", "decode": "forward_kernel", "dq": "dq_kernel",
           "dkdv": "dkdv_kernel", "table": "tile_table_kernel"}
TYPES = {"cu_seqlens": "*i64", "cu_seqlens_q": "*i64", "cu_seqlens_k": "*i64",
         "q_positions": "*i64", "table": "*i32", "lse": "*fp32", "delta": "*fp32", "scale": "fp32",
         "tokens_q": "i32", "tokens_k": "i32", "segments": "i32", "slots": "i32",
         "split_keys": "i32"}


def configurations(capability: int) -> Iterator[tuple[str, str, str, int, int, str]]:
    """(kernel, architecture, dtype, width, heads per group, mask) of all that can be launched."""
    common = "hopper" if capability == 90 else "ampere"
    attend = [name for name in KERNELS if name != "table"]
    for target, dtype in ((common, "bf16"), ("float32", "fp32")):
        for kernel, (width, ratio), mask in itertools.product(
                attend, ((64, 1), (128, 4)), ("full", "causal", "explicit")):
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
    constants = {name: constants[name] for name in function.arg_names if name in constants}
    types = dict(TYPES)
    if descriptors and kernel == "dkdv":
        block = f"tensordesc<{dtype}[{tile.BLOCK_M // ratio},{ratio},{block_e}]>"
        types |= {"q": block, "grad": block}
    elif descriptors:
        types |= dict.fromkeys("kv", f"tensordesc<{dtype}[{tile.BLOCK_N},1,{block_e}]>")
    signature = {name: "constexpr" if name in constants else types.get(name, f"*{dtype}")
                 for name in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(function.arg_names)
               if signature[name].startswith("*")}
    index = {(function.arg_names.index(name),): value for name, value in constants.items()}
    built = triton.compile(
        ASTSource(function, signature, index, aligned), target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.num_warps, "num_stages": tile.num_stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage, code = (subprocess.run([TOOLS / tool[0], *tool[1:], file.name], check=True,
                                      capture_output=True, text=True).stdout
                       for tool in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c")))
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
    return {"registers": int(re.search(r"REG:(\d+)", usage)[1]),
            "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
            "shared": -(-built.metadata.shared // 1024), **counts}


def faults(kernel: str, target: str, capability: int, row: dict[str, int]) -> str:
    """What is wrong with a compiled configuration, or nothing."""
    found = ["spills"] if row["spills"] else []
    if row["shared"] > SHARED_KIB[capability]:
        found.append("does not fit shared memory")
    matrix = {"float32": None, "ampere": "HMMA", "hopper": "HGMMA"}[target]
    matrix = None if kernel == "table" else matrix
    if kernel == "decode" and target == "hopper":
        matrix = "HMMA"  # 16 rows: HGMMA takes 64
    if matrix and not row[matrix]:
        found.append(f"no {matrix}")
    return ", ".join(found)


def main() -> None:
    wrong = 0
    print(f"Triton {triton.__version__}")
    print(f"{'kernel':8} {'sm':>3} {'dtype':5} {'E':>3} {'R':>2} {'mask':9}{'block':>8}"
          f" {'warps':>6} {'stages':>6} {'regs':>5} {'spills':>6} {'KiB':>4}"
          + "".join(f"{name:>9}" for name in INSTRUCTIONS))
    for capability in [int(x) for x in sys.argv[1:]] or SHARED_KIB:
        for kernel, target, dtype, width, ratio, mask in configurations(capability):
            row = compile_one(kernel, target, dtype, width, ratio, mask, capability)
            tile, fault = tile_of(kernel, target, width), faults(
                kernel, target, capability, row)
            wrong += bool(fault)
            print(f"{kernel:8} {capability:3} {dtype:5} {width:3} {ratio:2} {mask:9}"
                  f"{f'{tile.BLOCK_M}x{tile.BLOCK_N}':>8} {tile.num_warps:6} {tile.num_stages:6} "
                  f"{row['registers']:5} {row['spills']:6} {row['shared']:4}"
                  + "".join(f"{row[name]:9}" for name in INSTRUCTIONS) + f"  {fault}", flush=True)
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
