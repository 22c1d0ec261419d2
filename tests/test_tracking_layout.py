"""Names and axes of series: phases and blocks are groups, layers are rows."""

import pytest

from nanoquant.tracking.layout import LAYER_COLUMNS, Layout


def points(layout, **record):
    record = {"t": 1.0, "block": None, "layer": None, "step": None} | record
    return [(point.values, point.axis, point.at) for point in layout.points(record)]


def test_steps_of_model_and_block_have_axes_of_their_own():
    layout = Layout()
    assert points(layout, phase="model", step=7, loss=2.5, rate=0.1, note="text") == [
        ({"model/loss": 2.5, "model/rate": 0.1}, "model/step", 7)
    ]
    assert points(layout, phase="block", block=3, step=2, stage="refine", loss=0.5) == [
        ({"block_03/loss": 0.5}, "block_03/step", 2)
    ]
    assert points(layout, phase="calibrate", seconds=2.0) == []


def test_layers_become_rows_and_means_of_their_block():
    layout = Layout()
    for layer, weights, error in (("a", 100, 0.2), ("b", 300, 0.4)):
        where = {"block": 1, "layer": layer}
        start = {"rank": 8, "bits": 1.0, "weights": weights, "error": error}
        assert points(layout, phase="initialize", **where, **start) == []
    assert points(layout, phase="block", block=1, layer="a", step=9, error=0.1) == []
    points(layout, phase="block", block=1, step=9, loss=0.5)
    points(layout, phase="model", layer="a", step=0, latent_counts=[1])
    first, last, depth = points(layout, phase="block", block=1, seconds=2.0)
    assert first == ({"block_01/error": pytest.approx(0.35)}, "block_01/step", 0)
    assert last == ({"block_01/error": pytest.approx(0.1)}, "block_01/step", 9)
    assert depth[0]["blocks/seconds"] == 2.0 and depth[1:] == ("blocks/block", 1)
    assert layout.rows()[0] == ["a", 1, 8, 1.0, 100, 0.2, 0.1, None, None]
    assert len(LAYER_COLUMNS) == len(layout.rows()[0])


def test_errors_after_the_model_phase_go_over_the_depth():
    layout = Layout()
    for block in (1, 0):
        points(layout, phase="model", block=block, layer=f"{block}.a", error=0.1 + block)
    found = [(point.values, point.at) for point in layout.after_model()]
    assert found == [({"blocks/error_after_model": v}, b) for v, b in ((0.1, 0), (1.1, 1))]
