"""Recover quality of a packed checkpoint on a text: LoRA beside it, or its own scales and norms.

python recipes/fine_tune.py CHECKPOINT OUT --text train.txt --eval_text test.txt --teacher DENSE    OUT: a peft folder
python recipes/fine_tune.py CHECKPOINT OUT --text train.txt --tune.train scales                    OUT: a checkpoint
"""

import sys
import time
from dataclasses import asdict
from math import exp
from pathlib import Path

from jsonargparse import ArgumentParser, set_parsing_settings

from nanoquant.adapters import save_adapter
from nanoquant.checkpoint import save_pretrained
from nanoquant.console import ConsoleProgress, check_json_path, quiet, say, show_logs, table
from nanoquant.data import bos_of, load_tokens, make_windows
from nanoquant.evaluation.perplexity import perplexity
from nanoquant.fine_tune_config import FineTuneConfig, FineTuneJob, split_windows
from nanoquant.fine_tuning import check_model, fine_tune
from nanoquant.hub.publish import write_card
from nanoquant.json_files import write_json
from nanoquant.output_folder import check_output_folder
from nanoquant.sources import device_of, find_model, load_model, load_tokenizer


def run(job, config):
    check_json_path(job.json)
    check_output_folder(job.output)
    source, device, begun = find_model(job.checkpoint), device_of("auto"), time.monotonic()
    tokenizer, model = load_tokenizer(source), load_model(source, device)
    teacher = job.teacher and load_model(find_model(job.teacher), device)
    check_model(model, config, teacher)
    bos, losses = bos_of(tokenizer), {}
    windows, held_out = split_windows(load_tokens(job.text, tokenizer), config, bos)
    test = held_out
    if job.eval_text is not None:
        tokens = load_tokens(job.eval_text, tokenizer)
        test = make_windows(tokens, config.length, job.eval_windows, bos)
    progress = ConsoleProgress([*(["dense"] if teacher else []), "before", "fine-tune", "after"])

    def measure(name, subject):
        with progress.phase(name, len(test)):
            found = perplexity(subject, test, progress=progress.step)
        losses[name] = found.nll.sum().item() / found.tokens

    def show(step, loss):
        progress.advance(1, f"loss {loss:.3f}")

    if teacher:
        measure("dense", teacher)
    measure("before", model)
    with progress.phase("fine-tune", config.epochs * -(-len(windows) // config.batch)):
        tuned, report = fine_tune(model, windows, held_out, config, teacher, on_step=show)
    measure("after", tuned)
    if config.train == "lora":
        save_adapter(tuned, job.output)
    else:
        tuning = asdict(config) | {"text": job.text, "teacher": job.teacher}
        recipe = model.config.quantization_config.recipe | {"fine_tuning": tuning}
        save_pretrained(model, job.output, source, tokenizer, recipe=recipe)
        write_card(job.output, record={}, anew=True)
    size = sum(file.stat().st_size for file in Path(job.output).glob("*.safetensors"))
    times = {"seconds": time.monotonic() - begun}
    return times | {"loss": losses, "bytes": size, "held_out": report.held_out}


def main(arguments):
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("checkpoint", "output"):
        parser.add_argument(name)
    parser.add_class_arguments(FineTuneJob, None, skip={"checkpoint", "output"})
    parser.add_class_arguments(FineTuneConfig, "tune")
    given = vars(parser.instantiate_classes(parser.parse_args(arguments)))
    config, job = given.pop("tune"), FineTuneJob(**given)
    found = run(job, config)
    write_json(job.json, found)
    rows = [[name, f"{loss:.4f}", f"{exp(loss):.2f}"] for name, loss in found["loss"].items()]
    say(table(rows, ["", "loss", "perplexity"]))
    say(f"{job.output}: {found['bytes']:,} bytes after {found['seconds'] / 60:.1f} minutes")


if __name__ == "__main__":
    quiet()
    show_logs(verbose=True)
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"fine_tune.py: error: {error}")
