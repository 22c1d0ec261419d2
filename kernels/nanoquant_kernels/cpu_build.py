"""Compile the C++ loops on first use, keep the result in a cache, and load it; None where that can't be done.

The cache is ``$NANOQUANT_CACHE``, else ``$XDG_CACHE_HOME/nanoquant``, else ``~/.cache/nanoquant``; a file is named by
what it was made from, so an update makes a new one. ``NANOQUANT_NO_EXTENSION=1`` switches the extension off; code that
torch.compile generates takes over then, and plain PyTorch where ``TORCH_COMPILE_DISABLE=1`` switches that off too.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)

SOURCES = [
    Path(__file__).with_name(name)
    for name in (
        *("cpu_kernels.cpp", "cpu_int8.cpp", "cpu_table.cpp", "cpu_product.cpp"),
        *("cpu_int8.h", "cpu_nibbles.h", "cpu_types.h"),
    )
]
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-std=c++11", "-shared", "-fPIC")
PATHS = ("plain", "avx2", "avx512", "neon")
"""Names of the instruction paths; the position is the number that the library takes."""


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded extension, compiled if need be; why there is none is logged once."""
    if os.environ.get("NANOQUANT_NO_EXTENSION", "") not in ("", "0"):
        return None
    try:
        loaded = ctypes.CDLL(str(_cached_file()))
    except OSError as error:
        logger.warning("packed layers run without their C++ loop on the CPU, slower: %s", error)
        return None
    number, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    loaded.nq_paths.restype = loaded.nq_int8_paths.restype = number
    for linear in (loaded.nq_linear, loaded.nq_linear_int8):
        linear.restype = None
        linear.argtypes = [
            *(pointer, number, size, size),  # x, tokens, d_in
            *(pointer, pointer, number, size),  # v, s2, rank
            *(pointer, pointer, number, size),  # u, s1, d_out
            *(pointer, number, pointer, number, number),  # bias, y, path, threads
        ]
    loaded.nq_table.restype = None
    loaded.nq_table.argtypes = [
        *(pointer, number, size, size),  # x, tokens, d
        *(pointer, number, pointer, number, size, pointer, size),  # codes, scales, groups, zeros, n
        *(pointer, number, pointer, number, number),  # bias, y, path, threads
    ]
    loaded.nq_product.restype = None
    loaded.nq_product.argtypes = [
        *(pointer, number, size, size),  # x, tokens, d_in
        *(pointer, number, pointer, number),  # indices and their widths
        *(pointer, pointer, number, size, size),  # codebooks, slabs, group
        *(pointer, number, size),  # scale, d_out
        *(pointer, number, pointer, number, number),  # bias, y, path, threads
    ]
    return loaded


@functools.cache
def available_paths() -> tuple[str, ...]:
    """Names of the paths that this machine can run, the fastest last; empty without the extension."""
    loaded = library()
    return () if loaded is None else _names(loaded.nq_paths())


@functools.cache
def available_int8_paths() -> tuple[str, ...]:
    """As :func:`available_paths`, of the loop over 8-bit activations; its "avx512" needs VNNI too."""
    loaded = library()
    return () if loaded is None else _names(loaded.nq_int8_paths())


def _names(bits: int) -> tuple[str, ...]:
    return tuple(name for number, name in enumerate(PATHS) if bits >> number & 1)


def _cached_file() -> Path:
    """The compiled library; OSError where there is none and none can be made."""
    key = hashlib.sha256(b"".join(source.read_bytes() for source in SOURCES))
    key.update(repr((FLAGS, platform.machine(), platform.system())).encode())
    name = f"cpu-{key.hexdigest()[:20]}.so"
    folder = _cache_folder()
    if not (folder / name).is_file():
        logger.info("compiling the CPU kernels, once, into %s", folder)
        _compile(folder / name)
    return folder / name


def _cache_folder() -> Path:
    """The cache if it can be written to (or holds files already), else a folder for this process alone."""
    base = os.environ.get("XDG_CACHE_HOME") or Path("~", ".cache").expanduser()
    folder = Path(os.environ.get("NANOQUANT_CACHE") or Path(base, "nanoquant"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        if folder.is_dir() and any(folder.glob("cpu-*.so")):
            return folder
        logger.warning(
            "the cache %s can't be written (%s); compiling for this process alone", folder, error
        )
        return _private_folder()


@functools.cache
def _private_folder() -> Path:
    import atexit

    folder = tempfile.mkdtemp(prefix="nanoquant-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _compile(target: Path) -> None:
    """Compile into ``target`` in one step, so that a killed or parallel run leaves no half of a file."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise OSError(f"there is no C++ compiler ({', '.join(COMPILERS)}, or one named by CXX)")
    files = [str(source) for source in SOURCES if source.suffix == ".cpp"]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".building-") as folder:
        built = Path(folder, target.name)
        for threads in (["-fopenmp"], []):  # not every clang brings OpenMP
            command = [*compiler.split(), *FLAGS, *threads, *files, "-o", str(built)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                os.replace(built, target)
                return
    raise OSError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")
