"""Flags and YAML become the configuration of the library."""

import dataclasses

import pytest

from nanoquant import parsers
from nanoquant.commands import generate_command, inspect_command
from nanoquant.config import PRESETS, preset_config
from nanoquant.generation_settings import GenerationSettings
from nanoquant.interchange.command import import_command
from nanoquant.json_files import flat
from nanoquant.methods import ProductConfig


def settings(*flags):
    """Configuration of the quantize command for these flags."""
    return parsers.parse_quantize(["MODEL", "OUT", "--text", "TEXT", *flags])[1]


@pytest.mark.parametrize(
    "parser",
    [
        parsers.quantize_parser(),
        parsers.evaluate_parser(),
        parsers.command_parser("generate", generate_command, ""),
        parsers.command_parser("inspect", inspect_command, ""),
        parsers.bench_parser(),
    ],
    ids=["quantize", "evaluate", "generate", "inspect", "bench"],
)
def test_help_explains_every_flag(parser):
    unexplained = [action.dest for action in parser._actions if not action.help]
    assert unexplained == []


def test_flags_reach_every_field_of_the_configuration():
    flags = {action.dest for action in parsers.quantize_parser()._actions}
    fields = set(flat(PRESETS["fast"]().to_dict())) - {"step"}
    assert fields <= flags


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_alone_gives_the_configuration_of_the_library(preset):
    assert settings("--preset", preset) == PRESETS[preset]()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_for_a_method_is_the_same_by_flags_by_yaml_and_in_python(preset, tmp_path):
    expected = preset_config(preset, "product")
    assert settings("--preset", preset, "--method", "product") == expected
    (tmp_path / "run.yaml").write_text(f"method: product\npreset: {preset}\n")
    assert settings("--config", str(tmp_path / "run.yaml")) == expected


@pytest.mark.parametrize("asked", ["--help", "--print_config"])
def test_help_and_printed_settings_are_those_of_the_preset(asked, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("preset: best\n")
    rate = {"--help": "preset best", "--print_config": "latent_lr: 0.01\n"}[asked]
    file = ["--config", f"{tmp_path}/run.yaml"]
    for flags in (["--preset", "best", asked], [asked, "--preset=best"], [*file, asked]):
        with pytest.raises(SystemExit):
            parsers.parse_quantize(["MODEL", "OUT", *flags])
        assert rate in capsys.readouterr().out, flags


def test_the_first_argument_is_explained_as_its_command_takes_it():
    parser = parsers.command_parser("import", import_command, "")
    helps = {action.dest: action.help for action in parser._actions}
    assert helps["model"].startswith(".pt or .safetensors file")


def test_codebooks_are_given_as_a_list():
    found = settings("--method", "product", "--product.group", "8", "--product.codebooks", "[8,6]")
    assert found.product == ProductConfig(group=8, codebooks=(8, 6))


def test_flags_override_yaml_and_yaml_overrides_the_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: paper\nadmm:\n  iterations: 7\nblock:\n  windows: 3\n")
    config = settings("--config", str(file), "--block.windows", "5", "--bits", "0.8")
    paper = PRESETS["paper"]()
    assert (config.preset, config.block.dense_epochs) == ("paper", paper.block.dense_epochs)
    assert (config.admm.iterations, config.block.windows, config.budget.bits) == (7, 5, 0.8)


def test_bits_is_short_for_the_budget():
    assert settings("--bits", "0.55") == settings("--budget.bits", "0.55")


@pytest.mark.parametrize("yaml", ["bits: 0.7", "budget: {bits: 0.7}"])
def test_what_comes_later_wins_for_bits_by_either_name(yaml, tmp_path):
    (tmp_path / "run.yaml").write_text(yaml)
    file = ["--config", str(tmp_path / "run.yaml")]
    assert settings(*file).budget.bits == 0.7
    for flag in (["--bits", "0.8"], ["--bits=0.8"], ["--budget.bits", "0.8"]):
        assert settings(*file, *flag).budget.bits == 0.8
        assert settings(*flag, *file).budget.bits == 0.7
    assert settings("--bits", "1.2", "--budget.bits", "1.1").budget.bits == 1.1
    assert settings("--budget.bits", "1.1", "--bits", "1.2").budget.bits == 1.2


def test_one_yaml_with_two_different_bits_is_refused(tmp_path):
    (tmp_path / "run.yaml").write_text("bits: 0.7\nbudget: {bits: 1.0}\n")
    with pytest.raises(ValueError, match="bits 0.7 and budget.bits 1.0 disagree"):
        settings("--config", str(tmp_path / "run.yaml"))


def test_dashes_and_underscores_are_the_same_and_switches_need_no_value():
    arguments = ["MODEL", "OUT", "--text", "TEXT", "--verbose", "--sample=my-town"]
    job, config = parsers.parse_quantize([*arguments, "--block.dense-epochs", "9"])
    assert (job.verbose, job.sample, config.block.dense_epochs) == (True, "my-town", 9)


def test_a_prompt_may_be_given_several_times_and_is_never_read_as_yaml():
    texts = ["the river", "null", '["a"]', "- a\n- b", "--bits", "a=b", "3"]
    flags = [flag for text in texts[::2] for flag in ("--prompt", text)]
    flags += [f"--prompt={text}" for text in texts[1::2]]
    parser = parsers.command_parser("generate", generate_command, "")
    assert parsers.parse(parser, ["MODEL", *flags]).prompt == texts[::2] + texts[1::2]
    with pytest.raises(ValueError, match="prompt"):
        parsers.parse(parser, ["MODEL", "--prompt"])


def test_texts_given_several_times_are_a_mixture_and_replace_those_of_a_yaml(tmp_path):
    def text(*flags):
        return parsers.parse_quantize(["MODEL", "OUT", *flags])[0].text

    file = tmp_path / "run.yaml"
    file.write_text("text: [a.txt=2, b.jsonl=1]\n")
    assert text("--text", "null") == "null"
    assert text("--text", "a.txt=1", "--text=b=c.txt") == ["a.txt=1", "b=c.txt"]
    assert text("--config", str(file)) == ["a.txt=2", "b.jsonl=1"]
    assert text("--config", str(file), "--text", "x", "--text", "y") == ["x", "y"]
    assert text("--text", "x", "--config", str(file)) == ["a.txt=2", "b.jsonl=1"]
    assert text("--text", "x", "--config", str(file), "--text", "y") == "y"
    file.write_text("text: a.txt\n")
    assert text("--config", str(file)) == "a.txt"


def test_settings_of_generate_are_those_of_its_dataclass():
    parser = parsers.command_parser("generate", generate_command, "")
    values = vars(parsers.parse(parser, ["MODEL", "--options", '{"repetition_penalty": 1.1}']))
    fields = {field.name: values[field.name] for field in dataclasses.fields(GenerationSettings)}
    assert GenerationSettings(**fields) == GenerationSettings(options={"repetition_penalty": 1.1})
    with pytest.raises(ValueError, match="flags near --temprature: --temperature"):
        parsers.parse(parser, ["MODEL", "--temprature", "1"])


@pytest.mark.parametrize(
    "text", ["party 🎉.txt", 'a "b" \\ c.txt', "null", "\x7f\u2028.txt", "你好.txt"]
)
def test_names_of_texts_may_hold_anything(text):
    job, _ = parsers.parse_quantize(["M", "O", "--text", text])
    assert job.text == text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds None; it must map names of settings"),
        ("[1]", r"holds \[1\]; it must map"),
        ("admm: 5", "admm is 5; it takes a mapping of its fields"),
        ("admm: null", "admm is None; it takes a mapping of its fields"),
        ("source: other", "source is 'other', but the command says 'M'"),
    ],
)
def test_yaml_that_says_something_else_is_named(content, words, tmp_path):
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(ValueError, match=words):
        parsers.parse_quantize(["M", "O", "--text", "x", "--config", str(tmp_path / "c.yaml")])


def test_a_seed_that_no_generator_takes_is_refused():
    with pytest.raises(ValueError, match="seed must be 0 to"):
        parsers.parse_quantize(["M", "O", "--text", "x", "--run.seed", str(2**63)])
