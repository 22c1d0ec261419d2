"""The estimate as a whole: published architectures, work that is counted, time, what is refused."""

import json

import pytest
import torch
import transformers as tf
from command_line import call, refused
from tiny_models import tiny_llama, tiny_tokenizer
from torch.utils.flop_counter import FlopCounterMode

from nanoquant.admm import ADMMConfig, ADMMInitializer
from nanoquant.config import nanoquant_config
from nanoquant.estimate import machine
from nanoquant.estimate.estimate import SHARED
from nanoquant.estimate.limits import quantities
from nanoquant.estimate.machine import FASTEST
from nanoquant.estimate.operations import forward, iteration, student_forward
from nanoquant.estimate.subject import subject_of_folder
from nanoquant.estimate.terms import Use
from nanoquant.importance import Importance
from nanoquant.second_moment import Correlation

pytestmark = pytest.mark.usefixtures("untouched_process")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Rates are measured in no time, and badly."""
    monkeypatch.setattr(machine, "SECONDS", 1e-4)


def of(capsys, tmp_path, *arguments):
    file = tmp_path / "estimate.json"
    code, out, err = call(capsys, "estimate", *arguments, "--json", file)
    assert code == 0, err
    return json.loads(file.read_text()), out


PUBLISHED = {"llama-2-7b": 6_738_415_616, "llama-3.1-405b": 405_853_388_800}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_architecture_needs_no_file(name, tmp_path, capsys):
    found, out = of(capsys, tmp_path, name, "--machine", "h100", "--bits", "1.0")
    assert found["parameters"] == PUBLISHED[name]
    assert found["dense_bytes"] == 2 * PUBLISHED[name]
    (size,) = found["sizes"]
    assert 0.99 < size["body_bits_per_weight"] <= 1.0
    for text in ("self_attn.q_proj", "bits per weight, whole model", "calibrate", "model", "disk:"):
        assert text in out
    assert "assumed for an H100" in out


def test_a_small_model_takes_as_long_as_it_took_on_an_h200(tmp_path, capsys):
    """One run of the demo model; its last phase was stopped after 164 s."""
    flags = ["--machine", "h100", "--preset", "best", "--bits", "1.0"]
    flags += ["--importance.curvature", "inputs", "--model.epochs", "2"]
    seconds = of(capsys, tmp_path, "demo", *flags)[0]["seconds"]
    for phase, measured in {"calibrate": 5.6, "ranks": 42.9, "blocks": 70.4}.items():
        low, high = seconds[phase]
        assert low < measured < high, phase
    assert seconds["model"][1] > 164


def test_devices_divide_what_they_share(tmp_path, capsys):
    seconds = [
        of(capsys, tmp_path, "demo", "--machine", "h100", "--devices", n)[0]["seconds"]
        for n in (1, 8)
    ]
    for phase, (low, high) in seconds[0].items():
        times = 8 if phase in SHARED else 1
        assert seconds[1][phase] == pytest.approx([low / times, high / times])


def test_visits_of_dense_blocks_take_time_where_no_logits_are_kept(tmp_path, capsys):
    def model_phase(*flags):
        flags = ["--machine", "h100", "--model.batch", 4, "--model.windows", 64, *flags]
        return of(capsys, tmp_path, "llama-2-7b", *flags)[0]["seconds"]["model"][0]

    steps, looks = 64 / 4, nanoquant_config().model.held_out
    looks *= 1 + nanoquant_config().model.evaluations
    around = 2 * 32000 * 4096 + 4096  # embedding, head and the last norm are there all the time
    bytes_moved = 2 * (PUBLISHED["llama-2-7b"] - around) * (steps + looks)
    extra = model_phase("--run.offload") - model_phase()
    assert extra == pytest.approx(FASTEST * bytes_moved / 25e9)
    kept = ["--model.kept_logits", 8]
    assert 0 < model_phase(*kept, "--run.offload") - model_phase(*kept) < extra / 2


def test_blocks_of_the_teacher_run_once_a_window_where_its_states_are_kept(tmp_path, capsys):
    def phases(*flags):
        flags = ["--machine", "h100", "--model.batch", 4, "--model.windows", 64, *flags]
        found, _ = of(capsys, tmp_path, "llama-2-7b", "--model.epochs", 2, *flags)
        terms = found["memory"]["model"]["terms"]
        kept = [t["bytes"] for t in terms if t["name"] == "states of the teacher"]
        return found["seconds"]["model"][0], sum(kept)

    (once, kept), (every, none) = phases(), phases("--model.keep_states", "false")
    config = nanoquant_config().model
    states = (64 + config.held_out) * nanoquant_config().calibration.length * 4096 * 2
    assert (kept, none) == (states, 0)
    assert 0.7 * every < once < 0.95 * every
    assert phases("--run.activation_memory", "1MB")[1] == 1_000_000
    flags = ("--run.offload",), ("--run.offload", "--model.keep_states", "false")
    visits = [phases(*f)[0] - seconds for f, seconds in zip(flags, (once, every), strict=True)]
    looks = config.held_out * (1 + config.evaluations)
    assert visits[0] / visits[1] == pytest.approx((16 + config.held_out) / (2 * 16 + looks))
    seconds, states = phases("--devices", 2)
    assert states == 0 and seconds * 2 == pytest.approx(every)  # each meets other windows


@pytest.mark.parametrize("method", ["binary", "product"])
def test_a_language_model_inside_a_composite_is_estimated(method, tmp_path, capsys):
    text = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    eyes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    eyes |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    config = tf.Gemma3Config(text_config=text, vision_config=eyes, mm_tokens_per_image=4)
    tf.Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "dense")
    flags = ["--machine", "h100", "--context", 64, "--method", method, "--bits", 2]
    found, _ = of(capsys, tmp_path, tmp_path / "dense", *flags)
    (size,) = found["sizes"]
    assert all(name.startswith("model.language_model.layers.") for name in size["layers"])
    assert len(size["layers"]) == 14 and found["inference"]["activations"] > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--machine", "h200"], "machine must be here or h100, got 'h200'"),
        (["--devices", 0], "devices must be at least 1"),
        (["--context", 10**6], "context 1000000 goes beyond the 8192 positions"),
        (["--bits", "0.01"], "bits=0.01 can't be met"),
        (["--preset", "turbo"], "preset must be one of"),
        (["--bit", 1], "flags near --bit: --bits"),
    ],
)
def test_what_can_not_be_is_refused(flags, message, capsys):
    assert message in refused(capsys, "estimate", "demo", *flags)


def test_an_unknown_model_and_a_quantized_one_are_refused(place, finished, capsys):
    assert "there is no model 'llama-9'" in refused(capsys, "estimate", "llama-9")
    assert "quantized already" in refused(capsys, "estimate", place / "out")


def test_inference_at_a_context_counts_weights_cache_and_activations(tmp_path, capsys):
    short, long = (
        of(capsys, tmp_path, "demo", "--machine", "h100", "--context", n)[0]["inference"]
        for n in (512, 1024)
    )
    assert long["cache"] == 2 * short["cache"] == 30 * 2 * 3 * 64 * 2 * 1024
    assert long["weights"] == short["weights"] and long["activations"] > short["activations"]


@pytest.mark.parametrize("curvature", ["diagonal", "inputs", "both"])
def test_products_of_an_iteration_are_counted(curvature):
    d_out, d_in, rank = 96, 160, 40
    R = Correlation(torch.eye(d_in), torch.ones(d_in)) if curvature != "diagonal" else None
    L = Correlation(torch.eye(d_out), torch.ones(d_out)) if curvature == "both" else None
    importance = Importance(torch.ones(d_in), torch.ones(d_out), R, L)
    counts = []
    for k in (2, 3):
        with FlopCounterMode(display=False) as counter:
            ADMMInitializer(ADMMConfig(iterations=k))(torch.randn(d_out, d_in), importance, rank)
        counts.append(counter.get_total_flops())
    expected = iteration(d_out, d_in, rank, curvature, 5).full
    solved = {"diagonal": d_out + d_in, "inputs": d_out, "both": 0}[curvature]  # not counted there
    solved = 2.0 * rank**2 * solved + rank**3 / 3 * bool(solved) * (1 + (curvature == "diagonal"))
    assert counts[1] - counts[0] == pytest.approx(expected - solved, rel=0.1)


def test_operations_of_a_pass_are_counted(tmp_path):
    model = tiny_llama(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    config = nanoquant_config(2.0, budget={"rank_multiple": 8})
    q = quantities(subject_of_folder(tmp_path, config), config, Use(0))
    model.set_attn_implementation("eager")  # whose products are counted
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(32)[None], use_cache=False)
    assert counter.get_total_flops() == pytest.approx(32 * forward(q, 32), rel=0.02)
    latents = sum(q.given[n] * sum(shape) for n, shape in q.subject.shapes.items())
    dense = sum(d_out * d_in for d_out, d_in in q.subject.shapes.values())
    assert student_forward(q, 32) - forward(q, 32) == 2 * (latents - dense)


def test_blocks_take_the_time_of_their_own_windows_however_few_calibration_has(tmp_path, capsys):
    flags = ["--machine", "h100", "--calibration.windows", 16, "--block.dense_epochs", 1]
    few, many, most = (
        of(capsys, tmp_path, "demo", *flags, "--block.windows", n)[0]["seconds"]["blocks"][0]
        for n in (16, 32, 64)
    )
    assert many > few and most - many == pytest.approx(2 * (many - few))


def test_rates_of_this_machine_give_a_range_for_every_phase(tmp_path, capsys):
    tiny_llama(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    found, out = of(capsys, tmp_path, tmp_path / "dense", "--budget.rank_multiple", 8, "--bits", 2)
    assert all(0 < low < high for low, high in found["seconds"].values())
    assert "measured on this cpu" in out and found["rates"]["initializer"] > 0
