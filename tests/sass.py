"""Machine code of Triton kernels without a GPU: compiled ahead of time, taken apart by tools that Triton carries."""

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass
class Code:
    """The instructions of a kernel's largest loop, by name, and what it takes."""

    loop: list[str]
    registers: int
    stack: int

    def count(self, *names):
        return sum(op.split(".")[0] in names for op in self.loop)


@functools.cache
def need_architecture(arch):
    """Skip the test where the tools that Triton carries do not know an architecture such as 120."""
    for tool in (get_ptxas(arch).path, TOOLS / "cuobjdump"):
        done = subprocess.run([tool, "--help"], capture_output=True, text=True)
        if f"sm_{arch}" not in done.stdout:
            pytest.skip(f"{Path(tool).name} of Triton {triton.__version__} knows no sm_{arch}")


def compile_kernel(function, types, constants, arch, warps, stages=3, aligned=()):
    """Compile for an architecture such as 86; pointers and the integers in ``aligned`` are multiples of 16."""
    need_architecture(arch)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    hints = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or name in aligned
    }
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=hints)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def disassemble(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text, usage = (
            subprocess.run([TOOLS / tool, flag, file.name], capture_output=True, text=True).stdout
            for tool, flag in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    labels, code = {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*\.(L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            code.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1].strip()))
    loops = [
        code[labels[jump[1]] : end + 1]
        for end, text in enumerate(code)
        if (jump := re.search(r"BRA.*`\(\.(L_x_\d+)\)", text)) and labels[jump[1]] < end
    ]
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    return Code(max(loops, key=len), int(registers), int(stack))
