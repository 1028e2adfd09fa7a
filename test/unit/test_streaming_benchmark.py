"""Every part of the streaming benchmark runs, on so little that nothing can be said about its figures."""

import json

import pytest
import torch

from benchmarks import streaming

PARTS = {
    "ablation": ["--circuit", "24", "--seeds", "5", "6", "--variants", "default"],
    "circuit": ["--frames", "24", "--seeds", "5"],
    "endurance": ["--frames", "130", "--lap", "20", "--span", "10", "--age", "10"],
    "query": ["--repeats", "2"],
    "relocalise": ["--frames", "40", "--rounds", "0.1"],
}


def run(part, *arguments):
    streaming.main([part, "--width", "160", *arguments])


@pytest.fixture(autouse=True)
def slow_camera(monkeypatch):
    """Few frames go a small part of the way round, and the number of threads is what it was afterwards."""
    circuit, threads = streaming.circuit, torch.get_num_threads()
    monkeypatch.setattr(streaming, "circuit", lambda frames, _, *rest: circuit(frames, frames / 400, *rest))
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("part", PARTS)
def test_part_runs(part, capsys):
    run(part, *PARTS[part])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last["part"] == part
    assert last["figures"]


@pytest.mark.parametrize("wrong", [["--span", "850"], ["--frames", "2000"]])
def test_endurance_says_what_does_not_fit(wrong):
    with pytest.raises(SystemExit, match=wrong[1]):
        run("endurance", *wrong)


def test_tracking_times_frames_and_whole_windows(capsys):
    run("tracking", "--frames", "120")
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    for row in rows.values():
        assert 0 < row["frame_ms"] < row["window_ms"]
    network = rows["network query"]
    assert 0 < network["query_ms"] < network["solve_ms"] < network["window_ms"]
