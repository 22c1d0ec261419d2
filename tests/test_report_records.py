"""Evaluation records in a report: which are taken, and which share a panel of the perplexity plot."""

import json

import pytest
from run_folders import write_run

from nanoquant.report.command import make_sections
from nanoquant.report.config import ReportConfig
from nanoquant.report.content import Table
from nanoquant.report.evaluations import Point, own_points, record_points
from nanoquant.report.quality import drawn, front, perplexity_section
from nanoquant.report.run_files import read_run


def test_records_beside_the_run_and_given_ones_are_points(tmp_path, undrawn):
    folder = write_run(tmp_path / "out.run")
    (tmp_path / "out").mkdir()
    far = tmp_path / "far"
    far.mkdir()
    base = {"format": 1, "method": "nanoquant", "protocols": {}, "file_bytes": 1000}
    for file, model, value in (
        ("a", tmp_path / "out", 30.0),
        ("b", "other", 40.0),
        ("far/c", "rtn", 50.0),
        ("d", "out", None),
    ):
        results = {"wikitext2": {"perplexity": value}}
        (tmp_path / f"{file}.json").write_text(
            json.dumps(base | {"model": str(model), "results": results})
        )
    (tmp_path / "broken.json").write_text("{")
    run = read_run(folder)

    def table(**flags):
        section = make_sections(run, ReportConfig(folder=str(folder), spectra=0, **flags))[0]
        (found,) = [item for item in section.items if isinstance(item, Table)]
        return [row[-1] for row in found.rows if row[0] == "wikitext2"], section.missing

    assert table() == (
        ["30.0000"],
        ["d.json has no perplexity with bytes, so it is not in the plot."],
    )
    assert table(records=[str(far)])[0] == ["30.0000", "50.0000"]
    assert table(records=[str(tmp_path / "b.json")])[0] == ["30.0000", "40.0000"]
    with pytest.raises(ValueError, match="no evaluation record; give a file of nanoquant evaluate"):
        table(records=[str(folder / "run.json")])
    with pytest.raises(ValueError, match="can't be read as JSON"):
        table(records=[str(tmp_path / "absent.json")])


def test_perplexities_share_a_panel_only_where_their_tokens_are_the_same(tmp_path, undrawn):
    folder = write_run(tmp_path / "out.run")
    for file, digest, value in (("a", "x", 30.0), ("b", "x", 31.0), ("c", "y", 32.0)):
        settings = {"windows": 4, "length": 512, "data": file, "tokens_sha256": digest}
        record = {"format": 1, "method": "nanoquant", "model": "out", "file_bytes": None}
        record |= {"bits": {"bytes_on_disk": 1000}, "dense_model": "dense"}
        record |= {"protocols": {"text": settings}, "results": {"text": {"perplexity": value}}}
        record["dense"] = {"text": {"perplexity": 20.0}} if file == "a" else None
        (tmp_path / f"{file}.json").write_text(json.dumps(record))
    points, problems = record_points(read_run(folder), [])
    first, second = "text, 4 windows of 512 tokens", "text, 4 windows of 512 tokens, settings 2"
    assert problems == [] and [(p.protocol, p.method, p.bytes, p.perplexity) for p in points] == [
        (first, "nanoquant", 1000.0, 30.0),
        (first, "dense", 269_060_552.0, 20.0),
        (first, "nanoquant", 1000.0, 31.0),
        (second, "nanoquant", 1000.0, 32.0),
    ]


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"source": "text.txt", "seed": None}, "text.txt, 64 windows of 512 tokens"),
        ({"source": "text.txt", "seed": 1}, "text.txt, 64 windows of 512 tokens, settings 2"),
        ({"source": "b/text.txt"}, "text.txt, 64 windows of 512 tokens, settings 2"),
        ({"source": "b/other.txt"}, "other.txt, 64 windows of 512 tokens"),
    ],
)
def test_a_record_shares_the_panel_of_the_run_where_it_read_the_same_windows(
    tmp_path, undrawn, settings, label
):
    run = read_run(write_run(tmp_path / "out.run"))
    settings |= {"windows": 64, "length": 512, "tokens_sha256": "x"}
    record = {"format": 1, "method": "nanoquant", "model": "out", "file_bytes": 1000}
    record |= {"protocols": {"text": settings}, "results": {"text": {"perplexity": 30.0}}}
    (tmp_path / "a.json").write_text(json.dumps(record))
    (point,) = record_points(run, [])[0]
    assert {point.protocol for point in own_points(run)} == {"text.txt, 64 windows of 512 tokens"}
    assert point.protocol == label


def test_a_given_record_of_another_format_is_refused(tmp_path, undrawn):
    run = read_run(write_run(tmp_path / "out.run"))
    record = {"format": 2, "method": "nanoquant", "model": "out", "results": {}}
    (tmp_path / "a.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="has format 2; this version reads 1"):
        record_points(run, [str(tmp_path / "a.json")])


def test_the_front_is_what_nothing_smaller_beats():
    sizes = [(3, 20.0), (1, 90.0), (2, 95.0), (2, 40.0), (4, 20.0), (1, 99.0)]
    points = [Point("p", "m", "n", *size) for size in sizes]
    assert [(p.bytes, p.perplexity) for p in front(points)] == [(1, 90.0), (2, 40.0), (3, 20.0)]


def test_a_ruined_model_is_named_and_not_drawn(tmp_path, undrawn):
    run = read_run(write_run(tmp_path / "out.run"))
    for method, perplexity in (("int4", 40.0), ("rtn1", 1.1e6)):
        record = {"format": 1, "method": method, "model": "m", "file_bytes": 1000}
        record |= {"protocols": {"text": {}}, "results": {"text": {"perplexity": perplexity}}}
        (tmp_path / f"{method}.json").write_text(json.dumps(record))
    section = perplexity_section(run, [str(tmp_path / name) for name in ("int4.json", "rtn1.json")])
    caption = section.items[0].caption
    assert "Not drawn, above 100 times the best of their panel: rtn1, m 1.1e+06." in caption
    points = [Point("p", method, "m", 1, value) for method, value in (("a", 40.0), ("b", 4e3))]
    assert drawn(points) == points and drawn([*points, Point("p", "c", "m", 1, 4001.0)]) == points
