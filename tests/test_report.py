"""The page and the PNGs of finished, unfinished, failed and damaged runs."""

import importlib.util
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from command_line import call, refused
from run_folders import KINDS, rows, write_head, write_rows, write_run, write_source

pytest.importorskip("matplotlib")

from PIL import Image

from nanoquant.report import style
from nanoquant.report.command import PLOTS
from nanoquant.report.content import short

BROWSER = next(filter(shutil.which, ("chromium", "chromium-browser", "google-chrome")), None)
HOSTILE = (
    "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>$\\frac\x1b[31m\ud800&amp;{{ 7 * 7 }}"
)


@pytest.fixture(autouse=True)
def quiet(untouched_process):
    """The command changes loggers of the process."""


@pytest.fixture
def coarse(monkeypatch):
    """Plots are drawn with few dots: for tests of whether they can be."""
    monkeypatch.setattr(style, "DOTS", 30)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """The page of a finished run whose dense source is beside it, and its folder."""
    from nanoquant.cli import main

    place = tmp_path_factory.mktemp("report")
    write_source(place / "dense")
    folder = write_run(place / "out.run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanoquant.report.command.say", lambda text: None)
        assert main(["report", str(place / "out")]) == 0
    return folder / "report"


class Reader(HTMLParser):
    """Tags with their attributes, and the text a reader sees."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.seen, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open:
            self.seen.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.seen).split())


def page_of(folder, capsys, *flags):
    """The page that the command makes of a run, as its reader sees it."""
    code, _, err = call(capsys, "report", folder, *flags)
    assert code == 0, err
    return Reader((folder / "report" / "report.html").read_text(encoding="utf-8"))


def test_every_plot_is_in_the_page_in_two_themes_and_beside_it_as_png(whole):
    page = Reader((whole / "report.html").read_text(encoding="utf-8"))
    images = [a for tag, a in page.tags if tag == "img"]
    dark = [a for tag, a in page.tags if tag == "source"]
    files = {file.stem for file in whole.glob("*.png")}
    assert files == set(PLOTS) and len(images) == len(dark) == len(PLOTS)
    assert all(len(a["alt"]) > 20 for a in images)
    for name in files:
        assert Image.open(whole / f"{name}.png").size[0] == int(style.WIDTH * style.DOTS)


def test_every_plot_has_a_caption_and_nothing_is_missing(whole):
    page = Reader((whole / "report.html").read_text(encoding="utf-8"))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("figcaption") == tags.count("figure") == len(PLOTS) + 1  # and the samples
    assert "Not shown" not in page.text and "could not be read" not in page.text


def test_the_page_needs_nothing_beside_it(whole):
    text = (whole / "report.html").read_text(encoding="utf-8")
    page = Reader(text)
    for _, attributes in page.tags:
        for key in ("src", "srcset"):
            assert attributes.get(key, "data:").startswith("data:")
        assert attributes.get("href", "#").startswith(("#", "data:"))
        assert not [key for key in attributes if key.startswith("on")]
    assert not {"script", "iframe", "object", "form"} & {tag for tag, _ in page.tags}
    assert "http:" not in text and "https:" not in text and "url(" not in text


def test_the_page_says_what_the_run_measured(whole):
    text = Reader((whole / "report.html").read_text(encoding="utf-8")).text
    for said in ("finished", "0.7999", "22.67 to 152.4", "269.1 to 67.4", "<b>the</b> river"):
        assert said in text
    for said in ("admm.iterations", "preset", "torch", "2.13.0", *KINDS):
        assert said in text


def test_with_hard_labels_curves_of_training_and_held_out_windows_do_not_compare(
    tmp_path, capsys, undrawn
):
    write_run(tmp_path / "a.run")
    assert "is overfitting" in page_of(tmp_path / "a.run", capsys).text
    write_run(tmp_path / "b.run", config={"model": {"hard_labels": 0.3}})
    text = page_of(tmp_path / "b.run", capsys).text
    assert "next tokens have 0.3 of the target, so the curves do not compare" in text
    assert "is overfitting" not in text


def test_links_lead_to_sections(whole):
    page = Reader((whole / "report.html").read_text(encoding="utf-8"))
    ids = {a["id"] for _, a in page.tags if "id" in a}
    links = [a["href"][1:] for tag, a in page.tags if tag == "a"]
    assert len(links) == 9 and set(links) <= ids


def test_the_same_input_gives_the_same_bytes_whatever_the_users_matplotlib_settings(
    whole, capsys, tmp_path
):
    import matplotlib

    again = tmp_path / "again"
    with matplotlib.rc_context({"figure.dpi": 30, "axes.facecolor": "red", "text.usetex": True}):
        assert call(capsys, "report", whole.parent, "--output", again)[0] == 0
    assert len(list(again.iterdir())) == len(PLOTS) + 1
    for file in again.iterdir():
        assert file.read_bytes() == (whole / file.name).read_bytes(), file.name


def test_a_run_that_was_killed_shows_what_there_is(tmp_path, capsys, coarse):
    folder = tmp_path / "out.run"
    write_head(folder, status="running", seconds={"load": 1.0})
    write_rows(folder, rows()[:40])
    file = folder / "metrics.jsonl"
    file.write_text(file.read_text()[:-20])
    page = page_of(folder, capsys)
    assert "not finished" in page.text and "it was killed" in page.text
    assert "cut off" in page.text and "No errors after model reconstruction" in page.text
    assert "the dense model 'dense' is not on this machine" in page.text
    assert (folder / "report" / "layer_errors.png").is_file()
    assert not (folder / "report" / "model_loss.png").exists()


def test_a_failed_run_says_why(tmp_path, capsys, undrawn):
    folder = tmp_path / "out.run"
    write_head(folder, status="failed")
    write_rows(folder, rows()[:1])
    page = page_of(folder, capsys)
    assert "The run failed: ValueError: the text has too few tokens" in page.text
    assert "No ranks" in page.text and "No perplexities" in page.text


@pytest.mark.parametrize("lost", ["run.json", "metrics.jsonl"])
def test_a_run_without_one_of_its_files_has_a_page_that_says_so(tmp_path, capsys, undrawn, lost):
    folder = write_run(tmp_path / "out.run")
    (folder / lost).unlink()
    page = page_of(folder, capsys)
    assert "What could not be read" in page.text and lost in page.text


def test_an_empty_metrics_file_and_head_have_a_page_of_reasons(tmp_path, capsys):
    folder = tmp_path / "out.run"
    folder.mkdir()
    (folder / "run.json").write_text("{}")
    (folder / "metrics.jsonl").touch()
    page = page_of(folder, capsys)
    assert "state unknown" in page.text and page.text.count("Not shown") == 9
    assert not list((folder / "report").glob("*.png"))


def test_the_command_tells_what_is_missing_and_where_the_page_is(tmp_path, capsys, undrawn):
    folder = write_run(tmp_path / "out.run")
    code, out, err = call(capsys, "report", folder, "--spectra", 0)
    assert code == 0 and str(folder / "report" / "report.html") in out and "11 plots" in out
    assert "nanoquant: No spectra: --spectra 0 leaves them out." in err


def test_a_png_of_an_earlier_report_does_not_outlive_its_figures(tmp_path, capsys, undrawn):
    folder = write_run(tmp_path / "out.run")
    assert call(capsys, "report", folder)[0] == 0
    (folder / "report" / "other.png").touch()
    write_rows(folder, [])
    assert call(capsys, "report", folder)[0] == 0
    found = {file.stem for file in (folder / "report").glob("*.png")}
    assert found == {"other", "perplexity", "phase_seconds"}


def test_an_empty_folder_is_refused(tmp_path, capsys):
    assert "has run.json or metrics.jsonl" in refused(capsys, "report", tmp_path)


def test_numbers_that_are_not_finite_leave_gaps_in_plots(tmp_path, capsys, coarse):
    folder = write_run(tmp_path / "out.run")
    found = rows()
    for place, row in enumerate(found):
        for key in row.keys() & {"error", "loss", "held_out", "memory_bytes", "flips", "rank"}:
            row[key] = (float("nan"), float("inf"), 1e300, row[key])[place % 4]
    write_rows(folder, found)
    write_head(folder, figures={"dense": {"perplexity": float("inf"), "file_bytes": 3}})
    page = page_of(folder, capsys)
    assert "left out as gaps" in page.text and "nan" not in re.findall(r"\w+", page.text)
    assert (folder / "report" / "layer_errors.png").is_file()


@pytest.mark.parametrize("value", [0, -1])
def test_unusual_numbers_can_be_drawn(tmp_path, capsys, coarse, value):
    folder = write_run(tmp_path / "out.run")
    keys = {"error", "loss", "rank", "memory_bytes", "flips", "seconds", "bits", "rate", "held_out"}
    write_rows(folder, [row | dict.fromkeys(row.keys() & keys, value) for row in rows()])
    write_head(folder, seconds={"load": value})
    page_of(folder, capsys)


def test_hostile_names_are_text_and_nothing_else(tmp_path, capsys, coarse):
    folder = write_run(tmp_path / "out.run", source=HOSTILE, output=HOSTILE)
    found = [row | {"phase": HOSTILE} if row["phase"] == "block" else row for row in rows(1)]
    for row in found:
        if row["layer"]:
            row["layer"] = row["layer"].replace("q_proj", HOSTILE)
    write_rows(folder, found)
    base = json.loads((folder / "run.json").read_text())
    base["figures"]["quantized"]["sample"] = base["figures"]["job"]["sample"] = HOSTILE
    base |= {"versions": {HOSTILE: HOSTILE}, "seconds": {HOSTILE: 3}, "config": {HOSTILE: {}}}
    base["figures"]["job"]["eval_text"] = HOSTILE
    (folder / "run.json").write_text(json.dumps(base))
    page = page_of(folder, capsys)
    assert not {"script"} & {tag for tag, _ in page.tags} and "<script>alert(1)" in page.text
    assert all(a["src"].startswith("data:") for tag, a in page.tags if tag == "img")
    assert not [key for _, a in page.tags for key in a if key.startswith("on")]
    assert "49" not in page.text and "\x1b" not in page.text and "&amp;" in page.text


def test_without_matplotlib_the_message_says_how_to_install_it(tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    folder = write_run(tmp_path / "out.run")
    assert "pip install 'nanoquant[plots]'" in refused(capsys, "report", folder)
    assert not (folder / "report").exists()


def test_an_output_that_is_a_file_is_refused_before_anything_is_drawn(tmp_path, capsys):
    folder = write_run(tmp_path / "out.run")
    (tmp_path / "file").touch()
    assert "is a file; give a folder" in refused(
        capsys, "report", folder, "--output", tmp_path / "file"
    )


def test_a_negative_number_of_spectra_is_refused(capsys):
    assert "spectra must be at least 0, got -1" in refused(capsys, "report", "x", "--spectra", -1)


def test_names_are_shortened_in_their_middle():
    assert short("a" * 100) == "a" * 19 + "..." + "a" * 18 and short(" a\n b\x1b") == "a b"


@pytest.mark.skipif(BROWSER is None, reason="needs a browser: chromium or google-chrome")
def test_a_browser_shows_the_page_without_a_word_on_its_console(whole, tmp_path):
    shot = tmp_path / "shot.png"
    flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --enable-logging=stderr --v=0"
    command = [BROWSER, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    command += [f"--screenshot={shot}", "--window-size=1000,6000"]
    url = (whole / "report.html").as_uri()
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "CONSOLE" not in done.stderr, done.stderr
    colors = {color for _, color in Image.open(shot).convert("RGB").getcolors(2**24)}
    yellow = (253, 231, 37)  # the bright end of the heat maps
    assert any(max(abs(a - b) for a, b in zip(c, yellow, strict=True)) < 4 for c in colors)
