"""Builds sdist and wheel, installs the wheel alone into a new environment, and uses it far from the repository.

    python tests/wheel_smoke.py

What nanoquant builds on comes from the environment that runs this, over a .pth file, so nothing is downloaded;
nanoquant itself comes from the wheel, which is checked. It fails unless
``nanoquant --help`` takes less than LONGEST seconds.
"""

import os
import site
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import venv
import zipfile
from pathlib import Path

from command_line import SMALL, WORDS

ROOT = Path(__file__).parent.parent
ALONE = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
"""The environment without what could lead to the sources."""
LONGEST = 3.0
"""Seconds of ``nanoquant --help``, the first time."""
WHERE = "import nanoquant, nanoquant_kernels; print(nanoquant.__file__); print(nanoquant_kernels.__file__)"
MAKE = """
import sys, torch
from tiny_models import tiny_llama, tiny_tokenizer
tiny_llama(dtype=torch.bfloat16).save_pretrained("dense")
tiny_tokenizer().save_pretrained("dense")
"""
GENERATE = """
import nanoquant, torch
with torch.no_grad():
    print(nanoquant.load("out").generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False).tolist())
"""


def build(folder):
    """The wheel, after a look at what it and the sdist hold: all files of the packages, and nothing else."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {name for top, path in PACKAGES.items() for name in files_of(top, path)}
    assert held == expected, sorted(held ^ expected)
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    absent = {"pyproject.toml", "README.md", "LICENSE", "nanoquant/cli.py"} - names
    assert not absent, absent
    return wheel


PACKAGES = {
    "nanoquant": ROOT / "nanoquant",
    "nanoquant_kernels": ROOT / "kernels" / "nanoquant_kernels",
}


def files_of(top, path):
    """Files of a package as a wheel names them; what Python and compilers left there is none."""
    for file in path.rglob("*"):
        if (
            file.is_file()
            and "__pycache__" not in file.parts
            and file.suffix not in (".so", ".pyc")
        ):
            yield f"{top}/{file.relative_to(path).as_posix()}"


def install(wheel, folder):
    """Programs of a new environment with the wheel, and all else from here."""
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    command += ["--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run(command, check=True, env=ALONE, cwd=folder)
    purelib = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    (purelib / "others.pth").write_text(
        "\n".join({sysconfig.get_path("purelib"), *site.getsitepackages()})
    )
    return folder / "bin"


def seconds(command, **options):
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **options)
    return time.perf_counter() - began


def smoke(programs, place):
    """Use what is installed, in an empty folder: help, a small quantization, and text from its checkpoint."""
    options = {"cwd": place, "env": ALONE}
    python, nanoquant = str(programs / "python"), str(programs / "nanoquant")
    where = subprocess.run(
        [python, "-c", WHERE], check=True, stdout=subprocess.PIPE, text=True, **options
    )
    inside = [Path(line).is_relative_to(programs.parent) for line in where.stdout.split()]
    assert inside == [True, True], where.stdout
    cold, warm = (seconds([nanoquant, "--help"], **options) for _ in range(2))
    print(f"nanoquant --help: {cold:.2f} s the first time, {warm:.2f} s again")
    assert cold < LONGEST, f"more than {LONGEST} seconds"
    models = ALONE | {"PYTHONPATH": str(ROOT / "tests")}
    subprocess.run([python, "-c", MAKE], check=True, cwd=place, env=models)
    (place / "text.txt").write_text(WORDS * 100)
    command = [nanoquant, "quantize", "dense", "out", "--text", "text.txt", *SMALL]
    print(f"nanoquant quantize: {seconds([*command, '--sample', 'the river'], **options):.1f} s")
    print(f"nanoquant inspect: {seconds([nanoquant, 'inspect', 'out'], **options):.1f} s")
    command = [nanoquant, "generate", "out", "--prompt", "the river", "--max-new-tokens", "4"]
    print(f"nanoquant generate: {seconds(command, **options):.1f} s")
    subprocess.run([python, "-c", GENERATE], check=True, **options)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(prefix="wheel-") as temporary:
        place = Path(temporary, "elsewhere")
        place.mkdir()
        smoke(install(build(Path(temporary, "dist")), Path(temporary, "venv")), place)
