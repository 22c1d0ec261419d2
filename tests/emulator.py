"""The CPU loops of another machine: cross-compiled, run by an emulator, called like the library of this one."""

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

from nanoquant_kernels.cpu_build import FLAGS, SOURCES, _names

DRIVER = Path(__file__).with_name("emulated.cpp")
BYTES = (4, 2, 2)
"""Of an element, by number of its type."""


def first_of(*names):
    """The first of these commands that is installed, or None."""
    return next(filter(None, map(shutil.which, names)), None)


def build(compiler, folder):
    """A static program with all loops, compiled by the flags of the library."""
    program = Path(folder, "emulated")
    files = [source for source in SOURCES if source.suffix == ".cpp"]
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
    command = [compiler, *flags, "-fopenmp", "-static"]
    command += [f"-I{SOURCES[0].parent}", DRIVER, *files, "-o", program]
    subprocess.run(command, check=True, capture_output=True)
    return program


class Library:
    """Stands in for ``cpu_build.library()``; every call goes to the emulated program."""

    def __init__(self, *command):
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def available_paths(self):
        return _names(struct.unpack("i", self._call("p", 4))[0])

    def available_int8_paths(self):
        return _names(struct.unpack("i", self._call("q", 4))[0])

    def nq_linear(self, *arguments):
        self._linear("l", *arguments)

    def nq_linear_int8(self, *arguments):
        self._linear("i", *arguments)

    def _linear(
        self, function, x, x_type, tokens, d_in, v, s2, s2_type, rank, u, s1, s1_type, d_out,
        bias, bias_type, y, path, threads,
    ):  # fmt: skip
        size = tokens * d_out * BYTES[x_type]
        self._call(
            function, size,
            (x, tokens * d_in * BYTES[x_type]), x_type, tokens, d_in,
            (v, rank * -(-d_in // 8)), (s2, d_in * BYTES[s2_type]), s2_type, rank,
            (u, d_out * -(-rank // 8)), (s1, d_out * BYTES[s1_type]), s1_type, d_out,
            (bias, d_out * BYTES[bias_type]), bias_type, (y, size), path, threads,
        )  # fmt: skip

    def nq_table(
        self, x, x_type, tokens, d, codes, bits, scales, scale_type, groups, zeros, n,
        bias, bias_type, y, path, threads,
    ):  # fmt: skip
        size = tokens * n * BYTES[x_type]
        self._call(
            "t", size,
            (x, tokens * d * BYTES[x_type]), x_type, tokens, d,
            (codes, n * d * bits // 8), bits, (scales, n * groups * BYTES[scale_type]), scale_type, groups,
            (zeros, n * groups), n, (bias, n * BYTES[bias_type]), bias_type, (y, size), path, threads,
        )  # fmt: skip

    def _call(self, function, size, *arguments):
        """Send numbers and arrays (address, bytes); what comes back, ``size`` bytes, goes to the last array."""
        message, last = [function.encode()], None
        for argument in arguments:
            address, length = argument if isinstance(argument, tuple) else (None, argument)
            if isinstance(argument, tuple) and address is None:
                length = -1
            message.append(struct.pack("q", length))
            if address is not None:
                message.append(ctypes.string_at(address, length))
                last = address
        self.process.stdin.write(b"".join(message))
        self.process.stdin.flush()
        answer = self.process.stdout.read(size)
        assert len(answer) == size, f"the emulated program ended with {self.process.wait()}"
        if last is not None:
            ctypes.memmove(last, answer, size)
        return answer
