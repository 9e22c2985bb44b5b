"""What the attention kernel costs in instructions, registers and memory, without a GPU.

    python -m evals.bench.kernel_cost

Compiles the kernels for a GPU architecture with Triton's own assembler and reads the machine code:
instructions of the loop over packed tokens, per element decoded, and what a program takes:
registers a thread, bytes of stack a thread (spilled), bytes of shared memory. At full bandwidth
b-bit codes arrive at (bytes/s) * 8 / (b + 16 / d) elements a second. The lanes of an H200 issue 128
instructions per processor and clock, and 64 of those of its integer pipe (look-ups, shifts, logic,
comparisons): the column "issue bound" is the share of the bandwidth at which the slower of the two
would end it. (Not counted: shared memory, which may end it sooner.)
"""

from __future__ import annotations

import collections
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .common import exit_with, new_parser, require_triton

if TYPE_CHECKING:
    from rotorquant_hf.attention.triton_attention import Tiling

# An H200: processors, clock, and the bandwidth of a large copy as published for such machines.
PROCESSORS, CLOCK, BANDWIDTH = 132, 1.755e9, 4.3e12
SHARED = 228 << 10  # bytes of shared memory of a processor
# What the integer pipe (ALU) of sm_80 to sm_90 takes, which issues every second cycle.
_ALU = {
    *("PRMT", "LOP3", "PLOP3", "SHF", "LEA", "SEL", "SGXT", "IADD3", "ISETP", "VIADD", "VIMNMX"),
    *("FMNMX", "FSEL", "FSETP", "F2FP", "I2FP", "P2R"),
}
# Selectors of `prmt` that put together what was looked up, or widen it (`kernels/lookup.py`).
_LOOK_UP = re.compile("0x6240|0x4240")
_FLOATS = {"scale", "softcap", "key_unit", "sign_unit", "centroid_unit"}


@dataclass(frozen=True)
class Cost:
    """What a compiled kernel takes.

    Attributes:
        registers: per thread. spilled: bytes of stack per thread. shared: bytes per program.
        instructions: of the whole kernel. loop: of the loop over packed tokens.
    """

    registers: int
    spilled: int
    shared: int
    instructions: int
    loop: collections.Counter[str]

    @property
    def cycles(self) -> float:
        """Of a processor at least, for the loop in one warp: it has four issuers and ALUs."""
        alu = sum(count for name, count in self.loop.items() if name in _ALU)
        return max(self.loop.total() / 4, alu / 2)


def compile_kernel(
    kernel: Any,
    pointers: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int | None],
    arch: int,
) -> Cost:
    """Compile a kernel for CUDA architecture `arch` (90 for an H200).

    Args:
        pointers: element types of the pointers. constants: the compile-time arguments. All other
            arguments are integers, strides of packed and full-precision tensors divisible by 16.
        options: num_warps and num_stages, as far as the launch gives them.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rotorquant_hf.kernels.launch import FUSED

    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    unknown = {*kernel.do_not_specialize, *kernel.do_not_specialize_on_alignment}
    for i, name in enumerate(kernel.arg_names):
        aligned = name in pointers or re.fullmatch(r"stride_[krsv]\w+", name)
        if aligned and name not in unknown:
            attributes[(i,)] = [["tt.divisibility", 16]]
        if name in pointers:
            signature[name] = "*" + pointers[name]
        elif name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = "fp32" if name in _FLOATS else "i32"
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options=FUSED | options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run("cuobjdump", "--dump-resource-usage", file.name)
        code = _run("nvdisasm", "-c", file.name)
    instructions, loops = _parse(code)
    # The loop over packed tokens is the one that looks up by `prmt`, or else the longest.
    packed = [x for x in loops if any(y.startswith("PRMT") and _LOOK_UP.search(y) for y in x)]
    loop = max(packed or loops or [[]], key=len)
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[0])
    return Cost(
        registers,
        stack,
        compiled.metadata.shared,
        len(instructions),
        collections.Counter(_mnemonic(x) for x in loop),
    )


def _run(tool: str, *args: str) -> str:
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    command = [str(folder / tool), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _parse(code: str) -> tuple[list[str], list[list[str]]]:
    """All instructions, and those of every loop."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?);", line):
            instructions.append(instruction[1])
    loops = []
    for i, text in enumerate(instructions):
        target = re.search(r"BRA.*?(\.L_x_\d+)", text)
        if target and labels.get(target[1], i) < i:
            loops.append(instructions[labels[target[1]] : i + 1])
    return instructions, loops


def _mnemonic(instruction: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0].split(".")[0]


def attention_cost(
    d: int = 128,
    key_bits: int = 3,
    value_bits: int = 3,
    signs: int = 0,
    rows: int = 4,
    dtype: torch.dtype = torch.bfloat16,
    arch: int = 90,
    **options: Any,
) -> tuple[Cost, Tiling]:
    """The attention kernel for `rows` query rows, with the default tiling.

    Args:
        options: MASK, CAUSAL, SOFTCAP of the kernel.
    """
    from rotorquant_hf.attention.triton_attention import Device, choose_tiling
    from rotorquant_hf.kernels.attend import attend_kernel

    half = dtype != torch.float32
    operand = torch.float16 if half else torch.float32
    device = Device(PROCESSORS, SHARED)
    bits = key_bits, value_bits
    tiling = choose_tiling(rows, 8, 1 << 20, (d, d), bits, device, operand, signs > 0)
    model, decoded = ("bf16", "fp16") if half else ("fp32", "fp32")
    pointers = dict.fromkeys(["p_q", "p_sink_k", "p_sink_v", "p_recent_k", "p_recent_v"], model)
    pointers |= dict.fromkeys(["p_rotated", "p_projected", "p_ktable", "p_vtable"], decoded)
    if tiling.integers:
        pointers["p_rotated"] = "i8"
    pointers |= dict.fromkeys(["p_kcodes", "p_ksigns", "p_vcodes"], "u8")
    pointers |= dict.fromkeys(["p_kscale", "p_knorm", "p_vscale"], "fp16")
    pointers |= dict.fromkeys(["p_lengths", "p_kwords", "p_vwords"], "i32")
    pointers |= dict.fromkeys(["p_factors", "p_sums", "p_stats"], "fp32")
    constants: dict[str, Any] = {"MASK": 0, "CAUSAL": False, "SOFTCAP": False} | options
    pointers["p_mask"] = "u8" if constants["MASK"] == 1 else model
    constants |= {
        "stride_qd": 1,
        "D_K": d,
        "D_V": d,
        "K_BITS": key_bits,
        "V_BITS": value_bits,
        "SIGNS": signs,
        "PTX": half,
        "DIRECT": tiling.direct,
        "INTEGERS": tiling.integers,
        "PAIRS": tiling.pairs,
        "BLOCK_M": tiling.block_m,
        "BLOCK_N": tiling.block_n,
        "EXACT_N": tiling.exact_n,
        "EXACT_STAGES": tiling.exact_stages or tiling.stages,
    }
    launch = {
        "num_warps": tiling.warps,
        "num_stages": tiling.stages,
        "maxnreg": tiling.registers,
    }
    return compile_kernel(attend_kernel, pointers, constants, launch, arch), tiling


def other_costs(d: int, signs: int = 0, arch: int = 90) -> dict[str, Cost]:
    """The kernels before and after attention, and the ring's, for head dim `d`."""
    from rotorquant_hf.kernels.combine import combine_kernel, combine_options
    from rotorquant_hf.kernels.push import push_kernel, push_options
    from rotorquant_hf.kernels.queries import prepare_kernel, prepare_options

    floats = [
        "p_channel_scale",
        "p_mean",
        "p_rotation",
        "p_projection",
        "p_factors",
        "p_sums",
        "p_stats",
    ]
    pointers = dict.fromkeys(floats, "fp32")
    pointers |= dict.fromkeys(["p_q", "p_sink_logits", "p_out"], "bf16")
    pointers |= dict.fromkeys(["p_k", "p_v", "p_ring_k", "p_ring_v"], "bf16")
    pointers |= {"p_rotated": "fp16", "p_projected": "fp16", "p_state": "i32"}
    found = {}
    prepare = {"MEAN": True, "HALF": True, "BITS": 0}
    for name, kernel, constants in (
        ("prepare", prepare_kernel, prepare | prepare_options(d, signs)),
        ("combine", combine_kernel, {"MEAN": True, "SINKS": True} | combine_options(d, 4)),
        ("push", push_kernel, push_options(d, d)),
    ):
        options = ("num_warps", "num_stages")
        launch = {name: constants.pop(name) for name in options if name in constants}
        known = {k: v for k, v in pointers.items() if k in kernel.arg_names}
        found[name] = compile_kernel(kernel, known, constants, launch, arch)
    return found


def main(argv: list[str] | None = None) -> None:
    """Print a Markdown table, a row per head dim and width."""
    parser = new_parser(__doc__)
    add = parser.add_argument
    add("--arch", type=int, default=90, help="CUDA architecture (80: A100, 90: H100 and H200)")
    add("--head-dim", type=int, nargs="+", default=[64, 128, 256], help="elements of a head")
    add("--bits", type=int, nargs="+", default=[2, 3, 4, 8], help="per element of keys and values")
    args = parser.parse_args(argv)
    require_triton(parser)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler: run this without it")
    import triton

    print(f"triton {triton.__version__}, sm_{args.arch}, 4 query rows, bfloat16\n")
    print("| d | bits | instructions/element | issue bound | registers | spilled | shared |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for d in args.head_dim:
        for bits in args.bits:
            cost, tiling = attention_cost(d, bits, bits, arch=args.arch)
            elements = tiling.block_n * 2 * d
            lanes = cost.loop.total() * 32 * tiling.warps / elements
            arriving = BANDWIDTH * 8 / (bits + 16 / d)
            bound = PROCESSORS * CLOCK * elements / (cost.cycles * tiling.warps) / arriving
            print(
                f"| {d} | {bits} | {lanes:.2f} | {min(bound, 1):.0%} | {cost.registers} | "
                f"{cost.spilled} | {cost.shared:,} |"
            )


if __name__ == "__main__":
    exit_with(main)
