"""Records know where they belong, and a run without a recorder keeps none."""

from nanoquant.recorder import UNRECORDED, BlockRecorder


class Kept:
    """A recorder that keeps records in a list."""

    wanted = True

    def __init__(self):
        self.records = []

    def record(self, phase, **metrics):
        self.records.append({"phase": phase, **metrics})


def test_a_block_adds_its_index_and_full_names():
    kept = Kept()
    recorder = BlockRecorder(kept, 3, {"q_proj": "model.layers.3.q_proj"})
    recorder.record("block", step=1, loss=0.5)
    recorder.record("initialize", layer="q_proj", error=0.1)
    assert kept.records[0] == {"phase": "block", "block": 3, "layer": None, "step": 1, "loss": 0.5}
    assert kept.records[1]["layer"] == "model.layers.3.q_proj" and recorder.wanted


def test_nothing_is_wanted_without_a_recorder():
    UNRECORDED.record("model", step=1, loss=0.5)
    assert not UNRECORDED.wanted and not BlockRecorder(UNRECORDED, 0, {}).wanted
