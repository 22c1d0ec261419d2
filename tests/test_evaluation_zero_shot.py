"""Zero-shot scores are those of lm-evaluation-harness; local rows, first questions, and what is refused."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from packed_models import pack_randomly
from tiny_models import tiny_llama, tiny_tokenizer

from nanoquant.evaluation import zero_shot as module
from nanoquant.evaluation.tasks import TASKS
from nanoquant.evaluation.zero_shot import check_tasks, mean_accuracy, zero_shot
from nanoquant.progress import Progress

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval, the extra eval, is not installed",
)

NOUNS = ("river", "stone", "light", "town", "sand", "wind", "salt", "moss", "iron")


def words(number):
    return f"{NOUNS[number % 9]} {NOUNS[number // 9 % 9]}"


def arc(number):
    options = {"text": [words(number + k) for k in range(4)], "label": list("ABCD")}
    answer = "ABCD"[number % 4]
    return {"id": str(number), "question": f"the {words(number)}", "choices": options} | {
        "answerKey": answer
    }


ROWS = {
    "boolq": lambda i: {"passage": words(i), "question": f"is it {words(i + 1)}", "label": i % 2},
    "piqa": lambda i: {
        "goal": words(i),
        "sol1": words(i + 3),
        "sol2": words(2 * i),
        "label": i % 2,
    },
    "hellaswag": lambda i: {
        "activity_label": words(i),
        "ctx_a": f"the {words(i)} [title]",
        "ctx_b": "it",
        "endings": [words(i + k) for k in range(4)],
        "label": str(i % 4),
    },
    "winogrande": lambda i: {
        "sentence": f"the {words(i)} met _ at noon",
        "option1": words(i + 1),
        "option2": words(i + 2),
        "answer": str(1 + i % 2),
    },
    "arc_easy": arc,
    "arc_challenge": lambda i: arc(5 * i + 2),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder with 12 questions of every task."""
    folder = tmp_path_factory.mktemp("data")
    for name, row in ROWS.items():
        (folder / name).mkdir()
        lines = (json.dumps(row(number)) + "\n" for number in range(12))
        (folder / name / f"{TASKS[name].splits[0]}.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def own_run(model, tokenizer, names, data, folder, limit=None, batch=1):
    """The harness's own run, by its own entry point, with its definitions and rows of ours."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    tasks = Path(lm_eval.__file__).parent / "tasks"
    for name in names:
        split = TASKS[name].splits[0]
        rows = data / name / f"{split}.jsonl"
        unused = "test" if split == "validation" else "validation"
        (folder / f"{name}.yaml").write_text(
            f"include: {tasks / TASKS[name].definition}\n"
            f"task: {name}\ndataset_path: json\ndataset_name: null\ntraining_split: null\n"
            f"{unused}_split: null\n"
            f"dataset_kwargs:\n  data_files:\n    {split}: {rows}\n  cache_dir: {folder / 'cache'}\n"
        )
    manager = lm_eval.tasks.TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
        tasks=list(names),
        task_manager=manager,
        num_fewshot=0,
        limit=limit,
    )


def scores(results):
    keys = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
    return [results[key] for key in keys]


@harness
def test_scores_are_those_of_the_harness_exactly(data, tokenizer, tmp_path):
    model = tiny_llama(dtype=torch.bfloat16, max_position_embeddings=256)
    found = zero_shot(model, tokenizer, list(TASKS), batch=1, data=str(data))
    own = own_run(model, tiny_tokenizer(), TASKS, data, tmp_path)
    for name in TASKS:
        figures = own["results"][name]
        keys = ("acc,none", "acc_stderr,none", "acc_norm,none", "acc_norm_stderr,none")
        assert scores(found[name][1]) == [figures.get(key) for key in keys], name
        samples = own["samples"][name]
        assert found[name][1]["per_question"] == [sample["acc"] for sample in samples]
        assert found[name][0]["version"] == own["versions"][name]
    assert len({found[name][1]["acc"] for name in TASKS}) > 2  # not the same by being trivial


@harness
def test_a_packed_model_is_scored_as_it_is_and_left_as_it_was(data, tokenizer, tmp_path):
    model = pack_randomly(tiny_llama(dtype=torch.bfloat16, max_position_embeddings=256))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pad = tokenizer.pad_token
    found = zero_shot(model, tokenizer, ["piqa"], batch=4, data=str(data))
    own = own_run(model, tiny_tokenizer(), ["piqa"], data, tmp_path, batch=4)
    assert found["piqa"][1]["acc"] == own["results"]["piqa"]["acc,none"]
    assert found["piqa"][1]["acc_norm"] == own["results"]["piqa"]["acc_norm,none"]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert tokenizer.pad_token == pad


@harness
def test_questions_takes_the_first_ones(data, tokenizer):
    model = tiny_llama(max_position_embeddings=256)
    whole = zero_shot(model, tokenizer, ["arc_easy"], data=str(data))["arc_easy"]
    first = zero_shot(model, tokenizer, ["arc_easy"], 5, data=str(data))["arc_easy"]
    assert first[1]["per_question"] == whole[1]["per_question"][:5]
    assert (first[0]["questions"], first[0]["of"], whole[0]["questions"]) == (5, 12, 12)


@harness
def test_settings_say_what_was_scored(data, tokenizer, tmp_path):
    (tmp_path / "arc_easy").mkdir()
    rows = (data / "arc_easy" / "test.jsonl").read_text()
    (tmp_path / "arc_easy" / "validation.jsonl").write_text(rows)
    model = tiny_llama(max_position_embeddings=256)
    test = zero_shot(model, tokenizer, ["arc_easy"], data=str(data))["arc_easy"][0]
    validation = zero_shot(model, tokenizer, ["arc_easy"], data=str(tmp_path))["arc_easy"][0]
    assert (test["split"], validation["split"]) == ("test", "validation")
    assert (test["fewshot"], test["batch"], test["harness"] > "0.4") == (0, 1, True)
    assert test["questions_sha256"] == validation["questions_sha256"]


class Counting(Progress):
    """Remembers phases and how far they came."""

    def __init__(self):
        super().__init__()
        self.phases = []

    def begin(self, name, total):
        self.phases.append([name, total, 0])

    def advance(self, done, note=""):
        self.phases[-1][2] += done


@harness
def test_progress_counts_sequences_and_the_harness_prints_nothing(data, tokenizer, capsys):
    progress = Counting()
    model = tiny_llama(max_position_embeddings=256)
    names = ["piqa", "hellaswag"]
    zero_shot(model, tokenizer, names, 6, data=str(data), progress=progress, label="dense ")
    assert progress.phases == [["dense piqa", 12, 12], ["dense hellaswag", 24, 24]]
    assert capsys.readouterr() == ("", "")


@harness
def test_rows_that_the_harness_can_not_use_are_named(data, tokenizer, tmp_path):
    (tmp_path / "piqa").mkdir()
    row = ROWS["piqa"](1) | {"label": 7}
    (tmp_path / "piqa" / "validation.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="piqa can't be loaded: IndexError"):
        zero_shot(tiny_llama(), tokenizer, ["piqa"], data=str(tmp_path))


def test_columns_are_checked_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: name)
    (tmp_path / "boolq").mkdir()
    row = {"passage": "a", "question": "b", "answer": True}
    (tmp_path / "boolq" / "validation.jsonl").write_text(json.dumps(row) + "\n")
    message = "lacks the columns label of the task boolq; found: answer, passage, question"
    with pytest.raises(ValueError, match=message):
        check_tasks(["boolq"], str(tmp_path))
    with pytest.raises(ValueError, match="no files of the split validation in piqa"):
        check_tasks(["piqa"], str(tmp_path))


def test_without_the_harness_the_install_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'nanoquant\[eval\]'"):
        zero_shot(tiny_llama(), None, ["piqa"])


def test_the_mean_weighs_tasks_alike():
    results = {
        "piqa": {"acc": 0.5, "acc_stderr": 0.03},
        "boolq": {"acc": 0.7, "acc_stderr": 0.04},
        "text": {"perplexity": 3.0},
    }
    mean = mean_accuracy(results)
    assert mean["tasks"] == ["piqa", "boolq"]
    assert (mean["acc"], mean["acc_stderr"]) == pytest.approx((0.6, 0.025))
    assert mean_accuracy({"text": {}}) is None
