"""The regression check, on figures whose verdict a person worked out."""

import json
import sys

import pytest

from benchmarks import check
from benchmarks.conditions import benchmark_parser


def spread(low: float, median: float, high: float) -> dict[str, float]:
    return {"quartile_1": low, "median": median, "quartile_3": high}


@pytest.mark.parametrize(
    ("new", "old", "higher_is_better", "worse"),
    [
        # 0.90 is below 0.95, and 1.00 above 0.93
        (spread(0.88, 0.90, 0.93), spread(0.95, 1.00, 1.02), True, True),
        (spread(0.88, 0.90, 0.93), spread(0.95, 1.00, 1.02), False, False),
        (spread(0.88, 0.90, 1.01), spread(0.95, 1.00, 1.02), True, False),  # varies too much now
        (spread(0.88, 0.90, 0.93), spread(0.89, 1.00, 1.02), True, False),  # varied too much then
        (spread(1.04, 1.06, 1.07), spread(0.98, 1.00, 1.02), False, True),
        (spread(1.04, 1.06, 1.07), spread(0.98, 1.00, 1.02), True, False),
        (spread(1.04, 1.04, 1.05), spread(0.98, 1.00, 1.02), False, False),  # by 4 % only
        (spread(0.93, 0.94, 0.95), spread(0.98, 1.00, 1.02), True, True),  # by 6 %
        (spread(1.0, 1.0, 1.0), spread(1.0, 1.0, 1.0), True, False),
    ],
)
def test_worse_is_beyond_the_spread_of_both(new, old, higher_is_better, worse):
    assert check.is_worse(new, old, higher_is_better) == worse


def result(ratio: dict, seconds: dict, cost: dict) -> dict:
    loops = [{"loop": "bare", "ratio": ratio, "block_s": seconds, "cost_ratio": cost}]
    return {"commit": "abc", "torch": "2", "cases": [{"case": "resnet8", "loops": loops}]}


def test_ratios_are_found_by_their_names_and_times_are_not():
    found = list(check.figures(result(spread(1, 2, 3), spread(4, 5, 6), spread(7, 8, 9))))
    assert found == [
        ("resnet8, bare: ratio", True, spread(1, 2, 3)),
        ("resnet8, bare: cost_ratio", False, spread(7, 8, 9)),
    ]


@pytest.mark.parametrize(("median", "code"), [(0.99, 0), (0.80, 1)])
def test_exit_code_and_lines(tmp_path, monkeypatch, capsys, median, code):
    committed, new = tmp_path / "committed", tmp_path / "new"
    same = spread(1, 1, 1)
    for folder, middle in ((committed, 1.0), (new, median)):
        folder.mkdir()
        content = result(spread(middle - 0.02, middle, middle + 0.02), same, same)
        (folder / "step.json").write_text(json.dumps(content))
    monkeypatch.setattr(check, "RESULTS", committed)
    monkeypatch.setattr(sys, "argv", ["check", str(new)])
    with pytest.raises(SystemExit) as ended:
        check.main()
    assert ended.value.code == code
    out = capsys.readouterr().out
    assert ("WORSE" in out) == bool(code) and "resnet8, bare: ratio" in out


def test_nothing_to_compare_is_an_error(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        check.main()
    assert ended.value.code == 2 and "run python -m benchmarks first" in capsys.readouterr().out


def test_every_committed_result_has_figures_or_none_that_are_ratios():
    names = {path.stem for path in check.RESULTS.glob("*.json")}
    assert {"step", "loaders", "bookkeeping"} <= names
    for name in ("step", "loaders", "bookkeeping"):
        content = json.loads((check.RESULTS / f"{name}.json").read_text())
        labels = [label for label, _, _ in check.figures(content)]
        assert labels and len(labels) == len(set(labels)), name


@pytest.mark.parametrize("text", ["1", "0", "-3", "many"])
def test_a_spread_needs_two_repetitions(text, capsys):
    parser = benchmark_parser("Something.", repetitions=6)
    assert parser.parse_args(["--repetitions", "2"]).repetitions == 2
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--repetitions", text])
    assert ended.value.code == 2
    assert f"{text}: give 2 or more" in capsys.readouterr().err


def test_a_folder_of_results_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys):
    parser = benchmark_parser("Something.", repetitions=6)
    folder = tmp_path / "new" / "results"
    assert parser.parse_args(["--write", str(folder)]).write == folder and folder.is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit):
        parser.parse_args(["--write", str(tmp_path / "file")])
    assert "file: cannot be written" in capsys.readouterr().err
    assert list(folder.iterdir()) == []
