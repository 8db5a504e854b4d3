"""What torchrun's summary of failures says of a rank that ended with an error."""

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from harness.commands import command_line as cli
from harness.errors import record_for_torchrun


@pytest.fixture
def summary(tmp_path, monkeypatch):
    """Returns torchrun's own rendering of the error file."""
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))

    def render():
        failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(path))
        return ChildFailedError("harness", {0: failure}).format_msg()

    return render


def cause(summary):
    """The lines from torchrun's "traceback : " on, down to the frame."""
    return summary.partition("traceback : ")[2].splitlines()[:-1]


def test_a_mistake_is_one_line_in_torchruns_summary(summary, capsys, tmp_path):
    assert cli.main(["train", str(tmp_path / "no.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"error: {cause(summary())[0]}" == line and len(cause(summary())) == 1


def test_so_is_a_wrong_option(summary, capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "no.yaml", "--resumed"])
    assert cause(summary()) == ["unrecognized arguments: --resumed"]
    assert "unrecognized arguments: --resumed" in capsys.readouterr().err


def test_of_a_bug_it_is_the_last_line_of_the_traceback(summary, monkeypatch):
    def broken(options):
        raise ValueError("wrong\nin two lines")

    monkeypatch.setattr("harness.commands.train.run", broken)
    with pytest.raises(ValueError):
        cli.main(["train", "no.yaml"])
    assert cause(summary()) == ["ValueError: wrong in two lines"]


def test_the_first_error_of_a_rank_is_kept(summary):
    record_for_torchrun("the disk is full")
    record_for_torchrun("interrupted")
    assert cause(summary()) == ["the disk is full"]


def test_without_torchrun_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)
    record_for_torchrun("the disk is full")
    assert list(tmp_path.iterdir()) == []
