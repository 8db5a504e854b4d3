import pickle
from pathlib import Path

import pytest
import torch

from harness.errors import UserError
from harness.runs.checkpoint import (
    DamagedCheckpoint,
    checkpoint_key,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from tests.conftest import start_ranks


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


@pytest.mark.parametrize("checksum", ["its checksum", "none"])
@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "another file"])
def test_damaged_is_reported_and_the_next_newest_taken(tmp_path, damage, checksum):
    older, newer = save(tmp_path, 1, 5), save(tmp_path, 1, 10)
    content = newer.read_bytes()
    if damage == "empty":
        newer.write_bytes(b"")
    elif damage == "truncated":
        newer.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        # a CRC knows nothing of the padding between records, which is never read either
        weight = content.index(torch.arange(4.0).numpy().tobytes())
        place = weight if checksum == "none" else len(content) // 2
        newer.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        torch.save({"fc.weight": torch.ones(2)}, newer)  # such as an exported state dict
    if checksum == "none":
        newer.with_suffix(".sha256").unlink()
    reports: list[str] = []
    found = newest_checkpoint(tmp_path, reports.append)
    assert found is not None and found[0] == older and found[1]["step"] == 5
    assert len(reports) == 1 and newer.name in reports[0]


@pytest.mark.parametrize("sidecar", [None, "", "cut off", "\0" * 64])
def test_without_a_checksum_the_archives_crc_decides_and_a_line_says_so(tmp_path, sidecar):
    """Purged, not copied, or emptied by a crash of the file system."""
    save(tmp_path, 1, 5)
    path = save(tmp_path, 1, 10)
    if sidecar is None:
        path.with_suffix(".sha256").unlink()
    else:
        path.with_suffix(".sha256").write_text(sidecar)
    reports: list[str] = []
    found = newest_checkpoint(tmp_path, reports.append)
    assert found is not None and found[0] == path
    assert torch.equal(found[1]["weight"], torch.arange(4.0))
    (line,) = reports
    assert line.startswith(f"{path}: ") and line.endswith("verified by the archive's CRC only")


def test_a_flipped_bit_of_any_record_is_found_without_a_checksum(tmp_path):
    """torch.load alone reads the altered number without a word."""
    path = save(tmp_path, 1, 5)
    path.with_suffix(".sha256").unlink()
    content = bytearray(path.read_bytes())
    place = bytes(content).index(torch.arange(4.0).numpy().tobytes())
    content[place + 13] ^= 1  # of the last of the four float32
    path.write_bytes(content)
    assert torch.load(path)["weight"][3] != 3.0
    with pytest.raises(DamagedCheckpoint, match=r"record .*data/0 does not match its CRC"):
        load_checkpoint(path)


@pytest.mark.parametrize("checksums", [True, False])
def test_where_none_is_valid_the_folder_is_refused_and_left_as_it_is(tmp_path, checksums):
    for step in (5, 10):
        path = save(tmp_path, 1, step)
        path.write_bytes(path.read_bytes()[:-1])
        if not checksums:
            path.with_suffix(".sha256").unlink()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        UserError, match=r"none of its 2 checkpoints is valid \(newest: .*-00000010"
    ):
        newest_checkpoint(tmp_path, lambda text: None)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_under_another_name_is_no_empty_folder(tmp_path):
    assert newest_checkpoint(tmp_path / "not made yet", print) is None
    assert newest_checkpoint(tmp_path, print) is None
    (tmp_path / "checkpoint-001-00000005.sha256").touch()  # written first, killed before the rest
    assert newest_checkpoint(tmp_path, print) is None
    save(tmp_path, 1, 10).rename(tmp_path / "best.pt")
    with pytest.raises(UserError, match=r"holds best\.pt"):
        newest_checkpoint(tmp_path, print)


def test_a_folder_that_cannot_be_read_is_no_empty_folder(tmp_path):
    (tmp_path / "checkpoints").write_text("a file, so that listing it fails for root, too")
    with pytest.raises(UserError, match="Not a directory"):
        newest_checkpoint(tmp_path / "checkpoints", print)


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


def steps_of(folder: Path) -> list[tuple[int, int]]:
    return [checkpoint_key(path) for path in list_checkpoints(folder)]


def test_an_older_incarnations_checkpoints_stay_until_a_newer_one_has_passed_them(tmp_path):
    """Incarnation 2 resumed at step 5, as steps 10 and 15 could not be read for a while."""
    for step in (5, 10, 15):
        save(tmp_path, 1, step)
    kept = {}
    for step in (8, 12, 15, 16):
        save(tmp_path, 2, step)
        prune_checkpoints(tmp_path, keep=1, best_step=None)
        kept[step] = steps_of(tmp_path)
    assert kept == {
        8: [(2, 8), (1, 15), (1, 10)],
        12: [(2, 12), (1, 15)],
        15: [(2, 15), (1, 15)],
        16: [(2, 16)],
    }


def test_what_lies_ahead_takes_no_place_of_those_to_be_kept(tmp_path):
    for key in [(1, 5), (1, 10), (2, 30), (3, 15)]:
        save(tmp_path, *key)
    prune_checkpoints(tmp_path, keep=2, best_step=None)
    assert steps_of(tmp_path) == [(3, 15), (2, 30), (1, 10)]


def test_a_checkpoint_without_its_checksum_is_not_the_harness_to_remove(tmp_path):
    for step in (5, 10, 15):
        save(tmp_path, 1, step)
    (tmp_path / "checkpoint-001-00000005.sha256").unlink()
    prune_checkpoints(tmp_path, keep=1, best_step=None)
    assert steps_of(tmp_path) == [(1, 15), (1, 5)]


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


LOAD = """
import sys
from pathlib import Path
from harness.distributed import process_group, world_from_environment
from harness.errors import UserError
from tests.conftest import start_ranks
from harness.rendezvous import rendezvous
from harness.training.resume import load_alike

world = world_from_environment("cpu")
with process_group(world, rendezvous(world, 60), 60) as control:
    for paths in sys.argv[1:]:  # of rank 0 and of rank 1, as two nodes with disks of their own
        try:
            print(load_alike(Path(paths.split(":")[world.rank]), control)["step"], flush=True)
        except UserError as error:
            print(error, flush=True)
"""


def test_ranks_that_would_restore_different_files_are_refused_alike(tmp_path):
    a, b, same, lost = (tmp_path / name for name in ("a.pt", "b.pt", "same.pt", "lost.pt"))
    save_checkpoint(a, {"step": 3})
    save_checkpoint(b, {"step": 4})
    save_checkpoint(same, {"step": 3})
    ranks = start_ranks(2, ["-c", LOAD, f"{a}:{same}", f"{a}:{b}", f"{a}:{lost}"])
    outputs = [rank.communicate()[0].splitlines() for rank in ranks]
    assert outputs[0] == outputs[1]
    restored, other, missing = outputs[0]
    assert restored == "3"
    assert other.startswith(f"{b}: on ") and "all ranks share it" in other
    assert missing.startswith(f"{lost}: No such file")
