"""Weights & Biases: an offline run holds everything, and no server and no key can stop a run."""

import socket
import threading
import time

import pytest
from wandb_files import read_back

from nanoquant.tracking import dashboard
from nanoquant.tracking.dashboard import WandbSink, answers, has_key
from nanoquant.tracking.folder import RunFolder
from nanoquant.tracking.tracker import RunTracker

wandb = pytest.importorskip("wandb")
ABOUT = {"source": "models/dense", "output": "runs/small", "job": {"sample": "the"}}
ABOUT |= {"config": {"preset": "fast"}, "versions": {"torch": "2"}, "status": "running"}
FIGURES = {
    "dense": {"sample": "river", "perplexity": 20.0},
    "quantized": {"sample": "stone", "sizes": {"body_bits_per_weight": 1.0}},
    "excess_nats_per_token": 0.5,
}


@pytest.fixture
def no_key(monkeypatch, tmp_path):
    """Neither a key nor settings of the user; wandb reads its environment anew."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def server(monkeypatch):
    """A server that takes connections; ``speak`` is what it says to a GET, nothing by default."""
    listening, held = socket.create_server(("127.0.0.1", 0)), []

    def serve():
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            held.append(connection)
            if server.speak and connection.recv(3) == b"GET":
                connection.sendall(server.speak)

    class server:
        speak = b""
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

    threading.Thread(target=serve, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", server.url)
    yield server
    listening.close()


def small_run(folder):
    """A run of one block with two layers and a short training, recorded to wandb."""
    tracker = RunTracker(folder, [WandbSink(folder)])
    with tracker.following():
        tracker.record("evaluate", model="dense", perplexity=20.0)
        for layer, error in (("a", 0.2), ("b", 0.4)):
            where = {"block": 3, "layer": layer}
            tracker.record("initialize", **where, rank=8, weights=100, bits=1.0, error=error)
        tracker.record("block", block=3, step=0, stage="refine", loss=0.7)
        tracker.record("block", block=3, seconds=1.5)
        tracker.record("model", layer="a", step=0, latent_edges=[0, 1, 2], latent_counts=[3, 4])
        for step in range(4):
            tracker.record("model", step=step, loss=2.0 - step / 4, rate=0.1)
        tracker.record("model", step=4, flips=0.01)
        tracker.record("model", block=3, layer="a", error=0.1)
        folder.update(figures=FIGURES, seconds={"blocks": 1.5})
    return tracker


def test_an_offline_run_holds_series_axes_tables_summary_and_the_checkpoint(tmp_path, no_key):
    folder = RunFolder(tmp_path / "small.run", ABOUT)
    assert small_run(folder).sinks
    found = read_back(folder.path)
    series = found["series"]
    assert series["model/loss"] == [2.0, 1.75, 1.5, 1.25] and series["model/step"][:2] == [0, 0]
    assert series["block_03/error"] == [pytest.approx(0.3)] and series["blocks/block"] == [3, 3]
    assert series["latents/a/values"] == [[3, 4]] and series["tables/layers/nrows"] == [2]
    assert found["axes"]["model/loss"] == "model/step"
    assert found["axes"]["block_03/loss"] == "block_03/step"
    assert found["axes"]["blocks/seconds"] == "blocks/block"
    summary = found["summary"]
    assert (summary["dense/perplexity"], summary["run/excess_nats_per_token"]) == (20.0, 0.5)
    assert (summary["seconds/blocks"], summary["run/status"]) == (1.5, "finished")
    assert series["tables/samples/nrows"] == [1]
    assert [artifact.name for artifact in found["artifacts"] if artifact.type == "model"] == [
        "small"
    ]
    assert folder.content["wandb"] == {"id": found["id"], "project": "nanoquant", "mode": "offline"}


def test_a_run_that_was_not_finished_goes_on_under_its_id(tmp_path, no_key):
    first = RunFolder(tmp_path / "small.run", ABOUT)
    first.update(status="failed", wandb={"id": "abc123"})
    folder = RunFolder(tmp_path / "small.run", ABOUT)
    WandbSink(folder).run.finish()
    assert folder.content["wandb"]["id"] == read_back(folder.path)["id"] == "abc123"


@pytest.mark.parametrize("speak", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"])
def test_a_server_that_never_answers_leaves_an_offline_run(
    speak, server, tmp_path, no_key, monkeypatch, caplog
):
    server.speak = speak
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(dashboard, "INIT_SECONDS", 2.0)
    monkeypatch.setattr(dashboard, "ANSWER_SECONDS", 1.0)
    begun, folder = time.monotonic(), RunFolder(tmp_path / "small.run", ABOUT)
    small_run(folder)
    assert time.monotonic() - begun < 30
    assert folder.content["wandb"]["mode"] == "offline" and folder.content["status"] == "finished"
    assert "`wandb sync` sends it later" in caplog.text and server.url in caplog.text
    assert list(folder.path.glob("wandb/offline-run-*/*.wandb"))


def test_answers_means_any_answer_in_time(server):
    assert not answers(server.url, seconds=0.3)
    server.speak = b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
    assert answers(server.url, seconds=5)
    assert not answers("http://127.0.0.1:9", seconds=5) and not answers("no address", seconds=5)


def test_a_key_is_found_in_the_environment_and_where_login_leaves_it(no_key, tmp_path, monkeypatch):
    assert not has_key("https://wandb.example")
    (tmp_path / "netrc").write_text("machine wandb.example\n login user\n password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert has_key("https://wandb.example") and not has_key("https://other.example")
    monkeypatch.setenv("WANDB_API_KEY", "key")
    assert has_key("https://other.example")
