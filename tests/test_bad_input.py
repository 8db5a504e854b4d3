"""What bad input gets: one clear line, exit code 2, nothing half-written."""

import shutil

import pytest

from harness import load_config
from harness.errors import UserError
from harness.runs.logging.jsonl import read_log
from harness.training.setup import train
from tests.conftest import harness


def expect_refusal(config, tmp_path, match: str) -> None:
    out = tmp_path / "never"
    with pytest.raises(UserError, match=match) as caught:
        train(load_config(config), out)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_one_line_and_code_2_on_the_command_line(small, tmp_path):
    finished = harness("train", small(run__data_root="nowhere"), "--out", tmp_path / "never")
    assert finished.returncode == 2
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    assert line.startswith("error: ") and "nowhere" in line
    assert not (tmp_path / "never").exists()


def test_ranks_that_fail_alike_do_not_all_speak(small, tmp_path):
    finished = harness("train", small(run__data_root="nowhere"), "--out", tmp_path / "no", ranks=2)
    assert finished.returncode == 2
    assert len(finished.stderr.splitlines()) == 1


def test_a_network_that_cannot_be_trained_on_such_crops(small, tmp_path):
    """n = 1 where the last stage is 1 x 1: refused before there is a run folder."""
    crop = {"data__crop": 4, "data__resize": 4}
    one = {"recipe__minibatch": 8, "recipe__worker_batch": 1, "run__micro_batch": 8}
    expect_refusal(small(**crop, **one), tmp_path, "resnet8 cannot be trained on 4 × 4 pixels")


def test_missing_and_empty_data_folders(small, tmp_path):
    expect_refusal(small(run__data_root=str(tmp_path / "missing")), tmp_path, "missing")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    expect_refusal(small(run__data_root=str(tmp_path / "empty")), tmp_path, "empty")


def test_a_class_without_images(small, own_digits, tmp_path):
    (own_digits / "train" / "new").mkdir()
    expect_refusal(small(run__data_root=str(own_digits)), tmp_path, "new")


def test_classes_that_differ_between_train_and_val(small, own_digits, tmp_path):
    (own_digits / "val" / "7").rename(own_digits / "val" / "seven")
    expect_refusal(small(run__data_root=str(own_digits)), tmp_path, "seven")


def test_other_counts_than_the_configs(small, own_digits, tmp_path):
    next((own_digits / "train" / "3").glob("*.png")).unlink()
    expect_refusal(small(run__data_root=str(own_digits)), tmp_path, "1436")


def test_more_ranks_than_workers(small, tmp_path):
    finished = harness(
        "train", small(recipe__minibatch=32), "--out", tmp_path / "never", ranks=2
    )  # fmt: skip
    assert finished.returncode == 2 and "only 1 workers" in finished.stderr


def damage(folder, split: str) -> tuple:
    """Cuts the pixels of an image short; its header stays readable."""
    path = sorted((folder / split / "3").glob("*.png"))[0]
    content = path.read_bytes()
    path.write_bytes(content[:45])
    return path


@pytest.mark.parametrize("loader", ["memory", "reference"])
def test_an_image_that_cannot_be_decoded_is_named(small, own_digits, tmp_path, loader):
    path = damage(own_digits, "train")
    config = small(run__data_root=str(own_digits), run__loader=loader)
    finished = harness("train", config, "--out", tmp_path / "run")
    assert finished.returncode == 2, finished.stderr
    assert str(path) in finished.stderr and "Traceback" not in finished.stderr


@pytest.mark.parametrize("loader", ["memory", "reference"])
def test_skip_replaces_it_alike_on_any_number_of_ranks(small, own_digits, tmp_path, loader):
    damage(own_digits, "train")
    config = small(
        run__data_root=str(own_digits), run__loader=loader, data__on_bad_image="skip"
    )  # fmt: skip
    replaced = []
    for ranks in (1, 2):
        out = tmp_path / f"run{ranks}"
        finished = harness("train", config, "--out", out, ranks=ranks)
        assert finished.returncode == 0, finished.stderr
        log = read_log(out / "log.jsonl")
        replaced.append(
            [
                (r["step"], r["bad_image_id"], r["by_image_id"])
                for r in log
                if r["event"] == "replaced"
            ]
        )
    assert 2 <= len(replaced[0]) <= 3  # once an epoch, but for the places that are not used
    assert replaced[0] == replaced[1]


def test_in_evaluation_a_bad_image_always_fails(small, own_digits, tmp_path):
    path = damage(own_digits, "val")
    config = small(run__data_root=str(own_digits), data__on_bad_image="skip")
    finished = harness("train", config, "--out", tmp_path / "run")
    assert finished.returncode == 2 and str(path) in finished.stderr


def test_a_folder_that_is_no_run_folder_and_one_that_cannot_be_written(small, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="no run folder"):
        train(load_config(small()), tmp_path / "mine", resume=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        train(load_config(small()), tmp_path / "file" / "run")


def test_a_stale_index_is_noticed(small, own_digits, tmp_path):
    config = small(run__data_root=str(own_digits))
    train(load_config(config), tmp_path / "first")
    shutil.rmtree(own_digits / "val" / "0")
    expect_refusal(config, tmp_path, "0")
