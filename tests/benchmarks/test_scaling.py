"""The scaling benchmark: real ranks, hosts with slow links, the fit, the documented forecast."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import forecast, hosts, scaling, scaling_model
from benchmarks.scaling_plot import draw

ROOT = Path(__file__).parents[2]
TINY = ["configs/quickstart.yaml", "recipe.minibatch=64", "run.micro_batch=32"]
needs_root = pytest.mark.skipif(bool(hosts.missing()), reason=hosts.missing() or "hosts")


def point(ranks: int, mbit_per_s: float, delay_ms: float = 0.0, step_s: float = 1.0) -> dict:
    return {
        "ranks": ranks,
        "mbit_per_s": mbit_per_s,
        "delay_ms": delay_ms,
        "alone_s": {"median": 0.24},
        "step_s": {"median": step_s, "quartile_1": 0.9 * step_s, "quartile_3": 1.1 * step_s},
    }


def test_two_ranks_scale_weakly_and_strongly(tmp_path: Path) -> None:
    out = tmp_path / "points.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--device", "cpu", "--repetitions", "2", "--block-seconds", "0.05"]
    command = [sys.executable, *launcher, "-m", "benchmarks.scaling_rank", *TINY, *options]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert {"cpu", "cores", "commit", "torch"} <= found.keys()
    rows = [(p["scaling"], p["ranks"], p["images"]) for p in found["points"]]
    assert rows == [("weak", 1, 32), ("strong", 1, 64), ("weak", 2, 64), ("strong", 2, 64)]
    for row in found["points"]:
        assert row["images_per_s"] == pytest.approx(row["images"] / row["step_s"]["median"])
        assert row["exposed_s"]["repetitions"] == 2


def test_efficiency_is_by_images_of_a_rank() -> None:
    points = [
        {"scaling": "weak", "ranks": 1, "images": 32, "step_s": {"median": 0.9}},
        {"scaling": "weak", "ranks": 4, "images": 128, "step_s": {"median": 1.0}},
        {"scaling": "strong", "ranks": 1, "images": 128, "step_s": {"median": 3.6}},
        {"scaling": "strong", "ranks": 4, "images": 128, "step_s": {"median": 1.2}},
    ]
    scaling.add_efficiency(points)
    # 0.9 s of 1.0 s; a quarter of 3.6 s of 1.2 s
    assert [p["efficiency"] for p in points] == pytest.approx([1, 0.9, 1, 0.75])


def test_the_predicted_step() -> None:
    """0.24 s of compute, the last 0.16 s backward; 4 buckets of 0.5 MiB, ready at 1/4, 2/4, …

    2 hosts, 8 MiB/s: each bucket crosses the link once, 0.0625 s; in quarters, whose way of 1 ms
    is hidden but for the last; and 1.5 ms: 0.065 s. They start at 0.04 s, one after the other, and
    end at 0.3 s: 0.14 s after the backward pass.
    """
    fitted = scaling_model.Fitted(latency_s=1e-3, rate=0.8, overhead_s=1.5e-3)
    mbit_per_s = 10 * 2**20 * 8 / 1e6  # of which 0.8
    predicted_s = scaling_model.predicted_step_s(point(2, mbit_per_s), fitted)
    assert predicted_s == pytest.approx(0.24 + 0.14)
    # on its way for 10 ms more: 0.075 s a bucket, 0.34 s in all
    delayed_s = scaling_model.predicted_step_s(point(2, mbit_per_s, delay_ms=10), fitted)
    assert delayed_s == pytest.approx(0.24 + 0.18)


def test_the_fit_finds_the_parameters_and_predicts_the_rest() -> None:
    true = scaling_model.Fitted(latency_s=2e-3, rate=0.93, overhead_s=4e-3)
    places = [(ranks, speed, 0.0) for ranks in (2, 3, 4) for speed in scaling.SPEEDS]
    points = [point(*place) for place in [*places, (4, 100.0, 5.0)]]
    for made in points:
        made["step_s"]["median"] = scaling_model.predicted_step_s(made, true)
    judged = scaling_model.judge(points)
    assert judged["fitted"] == pytest.approx(true.__dict__, rel=1e-3)
    assert judged["median_error_percent"] < 0.01
    fitted = [
        (row["ranks"], row["mbit_per_s"]) for row in judged["predictions"] if not row["held_out"]
    ]
    assert fitted == [(ranks, speed) for ranks in (2, 4) for speed in (10, 100, 1000)]
    points[4]["step_s"]["median"] *= 2  # a point that it was fitted to
    assert scaling_model.judge(points)["fitted"] != pytest.approx(true.__dict__, rel=1e-3)


@needs_root
def test_a_slow_link_delays_the_step_and_nothing_is_left(tmp_path: Path) -> None:
    out = tmp_path / "points.json"
    waits = ["-m", "benchmarks.scaling_rank", "--waits", "--ranks", "2", "--mbit-per-s", "50"]
    options = ["--repetitions", "2", "--block-seconds", "0.1", "--out", str(out)]
    with hosts.Hosts(2) as network:
        ranks = [
            network.start(
                rank,
                [sys.executable, *waits, *options],
                {"PYTHONPATH": str(ROOT)} | scaling.place(network, rank, 2),
            )
            for rank in range(2)
        ]
        assert [rank.wait(120) for rank in ranks] == [0, 0]
    (row,) = json.loads(out.read_text())["points"]
    assert row["alone_s"]["min"] >= 0.2  # it waits
    # 16.8 Mbit at 50 Mbit/s; 1 Mbit is a generous allowance for the shaper's burst
    assert row["step_s"]["min"] >= (16.8 - 1) / 50 + 0.2 / 3  # no gradient before the forward
    assert network.mark not in hosts.run("ip", "netns", "list")


@needs_root
def test_the_switch_delays_both_ways_and_a_failure_cleans_up() -> None:
    # a TCP connection is made in one round trip
    server = "import socket; s = socket.create_server(('', 5000)); print(1, flush=True); s.accept()"
    client = (
        "import socket, time; t = time.monotonic();"
        "socket.create_connection(('{}', 5000), 30); print(time.monotonic() - t)"
    )
    network = hosts.Hosts(2, delay_ms=30)
    with pytest.raises(KeyboardInterrupt), network:
        inside = ["ip", "netns", "exec", network.names[0], sys.executable, "-c", server]
        with subprocess.Popen(inside, stdout=subprocess.PIPE) as listening:
            assert listening.stdout and listening.stdout.readline() == b"1\n"
            inside = ["ip", "netns", "exec", network.names[1], sys.executable, "-c"]
            seconds = float(hosts.run(*inside, client.format(network.address(0))))
        assert seconds >= 2 * 0.03
        raise KeyboardInterrupt
    assert network.mark not in hosts.run("ip", "netns", "list")


def test_the_figure(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is in the bench extra")
    step = {"median": 1.0, "quartile_1": 0.9, "quartile_3": 1.2}
    network = [
        {"scaling": kind, "ranks": ranks, "images_per_s": 32.0 * ranks, "step_s": step}
        for kind in ("weak", "strong")
        for ranks in (1, 2)
    ]
    points = [point(ranks, speed) for ranks in (2, 3) for speed in (10.0, 100.0)]
    found = {"points": network, "hosts": points, "model": scaling_model.judge(points)}
    text = draw(found, tmp_path / "scaling.svg").read_text()
    assert text == draw(found, tmp_path / "again.svg").read_text()
    for words in ("weak scaling", "ideal", "10 Mbit/s", "efficiency", "images/s"):
        assert f"<!-- {words} -->" in text


def test_the_documented_errors_are_those_of_the_results() -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "scaling.json").read_text())
    judged = scaling_model.judge(results["hosts"])
    documented = (ROOT / "docs" / "scaling.md").read_text()
    assert judged["median_error_percent"] <= 15
    assert f"| step | {judged['median_error_percent']:.1f} % |" in documented
    exposed = judged["median_exposed_error_percent"]
    assert f"the step less its wait | {exposed:.1f} % |" in documented


def test_the_documented_forecast_is_what_the_model_gives() -> None:
    documented = (ROOT / "docs" / "scaling.md").read_text()
    for lines in forecast.TABLES:
        assert "\n".join(lines()) in documented
