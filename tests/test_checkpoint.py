import pickle
from pathlib import Path

import pytest
import torch

from harness.checkpoint import (
    DamagedCheckpoint,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)


def save(folder: Path, incarnation: int, step: int) -> Path:
    path = checkpoint_path(folder, incarnation, step)
    save_checkpoint(path, {"step": step, "weight": torch.arange(4.0)})
    return path


def test_round_trip_leaves_no_temporary_file(tmp_path):
    path = save(tmp_path, 1, 5)
    assert torch.equal(load_checkpoint(path)["weight"], torch.arange(4.0))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "checkpoint-001-00000005.pt",
        "checkpoint-001-00000005.sha256",
    ]


def test_newest_is_by_incarnation_then_step(tmp_path):
    for incarnation, step in [(1, 10), (2, 5), (1, 20), (10, 1)]:
        save(tmp_path, incarnation, step)
    names = [path.stem for path in list_checkpoints(tmp_path)]
    assert names == [
        "checkpoint-010-00000001",
        "checkpoint-002-00000005",
        "checkpoint-001-00000020",
        "checkpoint-001-00000010",
    ]


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "no checksum"])
def test_damaged_is_reported_and_the_next_newest_taken(tmp_path, damage):
    older, newer = save(tmp_path, 1, 5), save(tmp_path, 1, 10)
    content = newer.read_bytes()
    if damage == "empty":
        newer.write_bytes(b"")
    elif damage == "truncated":
        newer.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        middle = len(content) // 2
        newer.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        newer.with_suffix(".sha256").unlink()
    reports: list[str] = []
    found = newest_checkpoint(tmp_path, reports.append)
    assert found is not None and found[0] == older and found[1]["step"] == 5
    assert len(reports) == 1 and newer.name in reports[0]


class Hostile:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_that_carries_code_is_refused_without_running_it(tmp_path):
    witness = tmp_path / "witness"
    path = checkpoint_path(tmp_path, 1, 5)
    save_checkpoint(path, {"weight": Hostile(witness)})
    with pytest.raises(DamagedCheckpoint):
        load_checkpoint(path)
    assert not witness.exists()
    pickle.loads(pickle.dumps(Hostile(witness)))  # the trap does work
    assert witness.exists()


def test_the_last_few_and_the_best_are_kept(tmp_path):
    for step in (5, 10, 15, 20, 25):
        save(tmp_path, 1, step)
    prune_checkpoints(tmp_path, keep=2, best_step=10)
    assert [path.name[-11:-3] for path in list_checkpoints(tmp_path)] == [
        "00000025",
        "00000020",
        "00000010",
    ]
    assert len(list(tmp_path.iterdir())) == 6  # each with its checksum


def test_a_write_that_fails_leaves_the_older_checkpoint_and_no_torn_file(tmp_path):
    older = save(tmp_path, 1, 5)
    newer = checkpoint_path(tmp_path, 1, 10)
    newer.mkdir()  # the rename onto it fails
    with pytest.raises(OSError):
        save_checkpoint(newer, {"step": 10})
    newer.rmdir()
    found = newest_checkpoint(tmp_path, lambda text: None)
    assert found is not None and found[0] == older
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]
