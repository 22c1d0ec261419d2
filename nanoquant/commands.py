"""The commands ``generate`` and ``inspect``; the others have files of their own."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nanoquant.checkpoint import packed_skeleton, read_sizes
from nanoquant.checkpoint_files import read_json, verify_folder
from nanoquant.console import check_json_path, note, say, show_logs, table
from nanoquant.decoder import most_positions
from nanoquant.generate import check_prompts, generate
from nanoquant.generation_settings import GenerationSettings
from nanoquant.int8_activations import Int8Config, read_windows, use_int8_activations
from nanoquant.json_files import write_json
from nanoquant.methods import Size, sizes_summary
from nanoquant.model_folder import resolve_folder
from nanoquant.packed_layers import packed_modules, packed_size
from nanoquant.prompts import printer, read_prompts, speed_lines
from nanoquant.sizes import Sizes
from nanoquant.sources import device_of, find_model, load_model, load_tokenizer, weight_bytes


def generate_command(
    model: str,
    prompt: list[str] | None = None,
    prompts: str | None = None,
    device: str = "auto",
    json: str | None = None,
    int8_text: str | None = None,
    int8_error: float = Int8Config.most_error,
    **settings: Any,  # noqa: ANN401
) -> None:
    """Print continuations: of one prompt while it is made, of several each when it is complete.

    Args:
        model: folder or Hub name.
        prompt: text to continue; may be given several times.
        prompts: text file with one prompt a line, after those of --prompt.
        device: auto takes a GPU if there is one; cpu or cuda.
        json: file for every printed figure.
        int8_text: text like what the model will work on, as for evaluate. Packed linears whose error on it stays
            under --int8-error round their inputs to 8 bits, which is faster on a CPU.
        int8_error: largest relative error of a layer's outputs with --int8-text.
        settings: fields of GenerationSettings.

    Raises:
        ValueError: the folder, a text, a prompt or a setting is not usable.
    """
    int8 = Int8Config(most_error=int8_error)
    if int8_text is None and int8_error != Int8Config.most_error:
        raise ValueError("--int8-error needs --int8-text FILE, a text to measure the error on")
    chosen = GenerationSettings(**settings)
    texts = (prompt or []) + ([] if prompts is None else read_prompts(prompts))
    if not texts:
        raise ValueError("nothing to continue: give --prompt TEXT, --prompts FILE or both")
    check_prompts(texts)
    check_json_path(json)
    show_logs(verbose=False)
    folder, target = find_model(model), device_of(device)
    tokenizer = load_tokenizer(folder)
    windows = None if int8_text is None else read_windows(int8_text, tokenizer, int8)
    loaded, figures = load_model(folder, target), {}
    if windows is not None:
        readable = windows[:, : most_positions(loaded)]
        switched = use_int8_activations(loaded, readable, int8.most_error)
        note(switched.line())
        figures["int8"] = asdict(switched)
    done = generate(loaded, tokenizer, texts, chosen, printer(texts))
    for line in speed_lines(done):
        note(line)
    figures |= {"model": model, "prompts": texts, "settings": asdict(chosen)} | done.figures()
    write_json(json, figures)


def inspect_command(model: str, json: str | None = None) -> None:
    """Print sizes, ranks and recipe of a checkpoint without reading its weights.

    Args:
        model: folder or Hub name of a quantized model.
        json: file for every printed figure.

    Raises:
        ValueError: the folder is not a complete checkpoint.
    """
    check_json_path(json)
    folder = resolve_folder(model)
    sizes, kinds = read_sizes(folder), layer_kinds(folder)
    settings = read_json(folder / "config.json")["quantization_config"]
    say(sizes_table(sizes, weight_bytes(folder)))
    say()
    rows = [[kind, *map(str, values.values())] for kind, values in kinds.items()]
    say(table(rows, header=["layer", *next(iter(kinds.values()))] if kinds else ()))
    say()
    recipe = settings.get("recipe") or {}
    for line in recipe_lines(recipe):
        say(line)
    figures = {"sizes": sizes.to_dict(), "file_bytes": weight_bytes(folder), "layers": kinds}
    write_json(json, figures | {"recipe": recipe, "format_version": settings["format_version"]})


def sizes_table(sizes: Sizes, file_bytes: int) -> str:
    """The sizes; those that do not apply are left out."""
    rows = []
    if sizes.body_bits_per_weight is not None:
        rows.append(["bits per weight, body", f"{sizes.body_bits_per_weight:.4f}"])
        rows.append(["weights in quantized linears", f"{sizes.body_weights:,}"])
    if sizes.embedding_bits_per_weight is not None:
        bits = f"{sizes.embedding_bits_per_weight:.4f}"
        rows.append(["bits per weight, embedding and head", bits])
        rows.append(["weights in embedding and head", f"{sizes.embedding_weights:,}"])
    rows += [
        ["bits per weight, whole model", f"{sizes.model_bits_per_parameter:.4f}"],
        ["bytes on disk", f"{file_bytes:,}"],
        ["bytes resident", f"{sizes.bytes_resident:,}"],
        ["parameters", f"{sizes.parameters:,}"],
    ]
    return table(rows)


def layer_kinds(folder: Path) -> dict[str, dict[str, Any]]:
    """Shape, ranks or codebooks, and bits of the quantized linears, by the last parts of their names.

    Returns:
        "self_attn.q_proj" to its count, shape ("out x in"), smallest, mean and largest rank, or what codebooks it has
        how often, and bits per weight as stored.
    """
    groups: dict[str, list[tuple[int, int, Size, int]]] = defaultdict(list)
    for name, layer in packed_modules(packed_skeleton(folder, verify_folder(folder))).items():
        shape = layer.out_features, layer.in_features
        groups[kind_of(name)].append((*shape, packed_size(layer), layer.bits))
    return {kind: summary(layers) for kind, layers in groups.items()}


def kind_of(name: str) -> str:
    """Kind of a linear by its full name: self_attn.q_proj."""
    parts = name.split(".")
    kind = ".".join(part for part in parts[1:] or parts if not part.isdigit())
    return kind.removeprefix("layers.")


def summary(layers: list[tuple[int, int, Size, int]]) -> dict[str, Any]:
    """Count, shape, sizes and bits of layers (d_out, d_in, size, stored bits) of one kind."""
    shapes = sorted({f"{d_out} x {d_in}" for d_out, d_in, *_ in layers})
    bits = sum(bits for *_, bits in layers)
    return {
        "count": len(layers),
        "shape": ", ".join(shapes),
        **sizes_summary([size for *_, size, _ in layers]),
        "bits": round(bits / sum(d_out * d_in for d_out, d_in, *_ in layers), 4),
    }


def recipe_lines(recipe: dict[str, Any]) -> list[str]:
    """A recipe as "name: value" lines, one for each stage of the configuration."""
    lines = []
    for name, value in recipe.items():
        if not isinstance(value, dict):
            lines.append(f"{name}: {value}")
            continue
        plain = {key: item for key, item in value.items() if not isinstance(item, dict)}
        nested = {f"{name}.{key}": item for key, item in value.items() if isinstance(item, dict)}
        if plain:
            lines.append(
                f"{name}: " + ", ".join(f"{key}={_short(item)}" for key, item in plain.items())
            )
        lines += recipe_lines(nested)
    return lines


def _short(value: Any) -> str:  # noqa: ANN401
    """The value without digits that nobody reads."""
    return f"{value:.6g}" if isinstance(value, float) else repr(value)
