"""A cache of the teacher's logits against the live teacher, on the digits."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import load_config
from harness.commands.command_line import main
from harness.data.loaders.choice import open_loader
from harness.data.sampling import crops, permutation
from harness.distillation.logit_cache import all_shards, open_teacher
from harness.distillation.logit_rows import Rows
from harness.distributed import world_from_environment
from harness.errors import UserError
from harness.runs.logging.jsonl import read_log
from harness.training.ready_rank import prepare
from harness.training.setup import train
from tests.conftest import harness
from tests.distilling import one_line
from tests.test_train import assert_same, final_weights

FLOAT64 = {"run__precision": "float64"}


@pytest.fixture(scope="module")
def cache(teacher, digits, tmp_path_factory):
    """Two crop epochs in float32, of a teacher in float64."""
    import yaml

    from tests.conftest import SMALL

    folder = tmp_path_factory.mktemp("cache")
    mapping = SMALL | {"run": SMALL["run"] | {"data_root": str(digits)}}
    mapping |= {"distill": {"teacher": str(teacher), "precision": "float64"}}
    path = folder / "student.yaml"
    path.write_text(yaml.safe_dump(mapping))
    words = ["cache", str(path), f"distill.cache={folder}/cache", "--epochs", "2"]
    assert main([*words, "--dtype", "float32"]) == 0
    return folder / "cache"


@pytest.fixture
def own_cache(cache, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(cache, tmp_path / "cache"))


def test_shards_cover_every_image_of_every_epoch():
    # 40,000 = 2 * 16,384 + 7,232
    spans = [(shard.epoch, shard.first, shard.end) for shard in all_shards(2, 40_000)]
    assert spans == [
        (0, 0, 16384), (0, 16384, 32768), (0, 32768, 40000),
        (1, 0, 16384), (1, 16384, 32768), (1, 32768, 40000),
    ]  # fmt: skip


def test_rows_keep_all_logits_or_the_largest_and_one_for_the_others():
    logits = torch.tensor([[1.0, 5.0, -2.0, 4.0, 0.0]])
    everything = Rows(5, "float32", None)
    assert everything.decode(everything.encode(logits, 4.0)).tolist() == logits.tolist()
    top = Rows(5, "float16", 2)
    rows = top.encode(logits, 1.0)
    assert rows["classes"].tolist() == [[1, 3]]
    # log((e^1 + e^-2 + e^0) / 3) = log(3.8536 / 3) = 0.2504
    other = pytest.approx(0.2504, abs=1e-3)
    assert top.decode(rows).tolist() == [[other, 5.0, other, 4.0, other]]
    # ImageNet: 1000 logits of 2 bytes; or 10 classes and logits of 2 bytes each, and the others'
    assert Rows(1000, "float16", None).type.itemsize * 1_281_167 == 2_562_334_000
    assert Rows(1000, "float16", 10).type.itemsize == 10 * (2 + 2) + 2


@pytest.mark.parametrize("temperature", [0.01, 1.0, 2.0, 4.0, 1000.0])
def test_the_largest_have_their_true_targets_at_the_caches_temperature(temperature):
    # exp(z / T) = 80, 18 and eight times 1/4: 80 of 80 + 18 + 2 = 0.8, 18 of them 0.18. With the
    # mean logit of the others it would be 80 of 80 + 9 (18 / 4^8)^(1/9) = 80 of 83.6: 0.957
    weights = torch.tensor([[0.25, 18.0, 0.25, 80.0, *[0.25] * 6]], dtype=torch.float64)
    logits = (temperature * weights.log()).float()
    for top, kept in ((1, {3: 0.8}), (2, {3: 0.8, 1: 0.18})):
        rows = Rows(10, "float32", top)
        decoded = torch.from_numpy(rows.decode(rows.encode(logits, temperature)))
        targets = (decoded / temperature).softmax(1)[0].tolist()
        for number, target in enumerate(targets):
            rest = (1 - sum(kept.values())) / (10 - top)
            assert target == pytest.approx(kept.get(number, rest), rel=1e-4)


def test_logits_that_float16_cannot_hold_are_refused():
    for logits in ([[7e4, 0.0, 0.0]], [[0.0, -7e4, -7e4]]):  # a kept one, then the others'
        with pytest.raises(UserError, match="does not fit float16"):
            Rows(3, "float16", 1).encode(torch.tensor(logits), 1.0)


def test_a_student_of_the_cache_is_that_of_the_live_teacher(student, cache, tmp_path, monkeypatch):
    """Three epochs of crops 0, 1, 0 in orders 0, 1, 2; on other micro-batches than the cache's."""
    changes = FLOAT64 | {"run__micro_batch": 96}
    cached = load_config(student(precision="float64", cache=str(cache), changes=changes))
    live = load_config(student(precision="float64", changes=changes))
    train(cached, tmp_path / "cached")
    monkeypatch.setattr("harness.training.ready_rank.crop_epochs", lambda config: 2)
    train(live, tmp_path / "live")
    assert_same(final_weights(tmp_path / "live"), final_weights(tmp_path / "cached"), 1e-10)
    live_losses, cached_losses = (
        [x["loss"] for x in read_log(tmp_path / name / "log.jsonl") if x["event"] == "train"]
        for name in ("live", "cached")
    )
    assert live_losses == pytest.approx(cached_losses, rel=1e-9)


def test_the_crops_of_a_cache_come_again_in_another_order(student, cache):
    path = student(precision="float64", cache=str(cache), changes=FLOAT64)
    batch_plan, config = prepare(load_config(path), world_from_environment("cpu"))
    windows = next(batch_plan.training(10))  # the first step of epoch 2, the third, of 5 steps each
    assert sorted(windows.ids) == sorted(permutation(1, 2, 1437)[:256])
    sizes = batch_plan.train.heights[windows.ids], batch_plan.train.widths[windows.ids]
    expected = crops(1, 0, windows.ids, *sizes, config.data)
    for side in ("top", "left", "height", "width"):
        assert getattr(windows, side).tolist() == getattr(expected, side).tolist()
    assert windows.top.tolist() != crops(1, 2, windows.ids, *sizes, config.data).top.tolist()


@pytest.mark.parametrize(("options", "kept"), [(["--dtype", "float16"], 10), (["--top", "3"], 3)])
def test_float16_and_the_largest_lose_so_much(student, cache, tmp_path, options, kept):
    small = tmp_path / "small"
    path = student(precision="float64", cache=str(small), changes=FLOAT64)
    assert main(["cache", str(path), "--epochs", "1", *options]) == 0
    logits = []
    for folder in (cache, small):
        config = load_config(path, [f"distill.cache={folder}"])
        world = world_from_environment("cpu")
        batch_plan, config = prepare(config, world)
        loader = open_loader(config, batch_plan, "memory", 0, False)
        logits.append(open_teacher(config, batch_plan, world)(0, next(loader.train(0))))
        loader.close()
    full, less = (x.topk(kept).values for x in logits)
    # 11 bits of logits below 32: half of 2^-6
    assert 0 < (full - less).abs().max() <= 2**-7
    # a target p moves by at most p (1 - p) <= 1/4 of twice that over T = 4
    targets, theirs = ((x / 4).softmax(1).gather(1, logits[0].topk(kept).indices) for x in logits)
    assert (targets - theirs).abs().max() <= 2**-7 * 2 / 4 / 4
    assert torch.equal(logits[0].argmax(1), logits[1].argmax(1))


def test_two_ranks_write_what_one_writes_and_go_on_where_it_stopped(
    student, cache, tmp_path, capsys
):
    path = student(precision="float64", cache=str(tmp_path / "two"))
    words = ["cache", path, "--epochs", 2, "--dtype", "float32"]
    out = harness(*words, ranks=2)
    assert out.returncode == 0, out.stderr
    # 2 epochs * 1437 images * 10 logits * 4 bytes = 0.115 MB, told first
    assert out.stdout.splitlines()[0].endswith("two: 2 epochs of 1,437 images, 0.1 MB")
    one, two = (json.loads((c / "manifest.json").read_text()) for c in (cache, tmp_path / "two"))
    shards = [shard.name for shard in all_shards(2, 1437)]
    for name in shards:
        np.testing.assert_allclose(
            np.load(cache / name), np.load(tmp_path / "two" / name), rtol=1e-6, atol=1e-6
        )
    assert one["evaluation"].pop("loss") == pytest.approx(two["evaluation"].pop("loss"))
    assert one | {"shards": None} == two | {"shards": None}
    # interrupted before the last shard: only that is computed again
    kept = (tmp_path / "two" / shards[0]).stat().st_mtime_ns
    (tmp_path / "two" / f"{shards[1]}.sha256").unlink()
    (tmp_path / "two" / "manifest.json").unlink()
    assert "is not finished" in one_line(capsys, "train", path, "--out", tmp_path / "run")
    assert main([str(word) for word in words]) == 0
    assert (tmp_path / "two" / shards[0]).stat().st_mtime_ns == kept
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["epochs"] == 2
    # the same folder for another cache
    assert "holds another cache" in one_line(capsys, "cache", path, "--epochs", 3)


def test_the_teachers_error_comes_from_the_manifest(student, cache, teacher, tmp_path):
    train(load_config(student(precision="float64", cache=str(cache))), tmp_path / "run")
    line = read_log(tmp_path / "run" / "log.jsonl")[1]
    theirs = [line for line in read_log(teacher / "log.jsonl") if line["event"] == "evaluation"]
    assert (line["event"], line["error"]) == ("teacher", theirs[-1]["error"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=2", "seed"),
        ("data.crop_area=[0.5, 1.0]", "crop_area"),
        ("data.flip=true", "flip"),
        ("distill.precision=float32", "precision"),
    ],
)
def test_a_foreign_cache_is_refused(student, cache, override, key, capsys):
    path = student(precision="float64", cache=str(cache))
    line = one_line(capsys, "train", path, override)
    assert f"is of another {key} (" in line and "harness cache" in line


def test_the_largest_serve_their_own_temperature_and_all_logits_any(
    student, cache, tmp_path, capsys
):
    top = tmp_path / "top"
    path = student(precision="float64", cache=str(top), temperature=2.0, changes=FLOAT64)
    assert main(["cache", str(path), "--epochs", "1", "--top", "3"]) == 0
    batch_plan, config = prepare(load_config(path), world_from_environment("cpu"))
    world = world_from_environment("cpu")
    assert open_teacher(config, batch_plan, world) is not None
    line = one_line(capsys, "train", path, "distill.temperature=4.0")
    assert "is of another temperature (2.0, here 4.0); make it again with `harness cache`" in line
    manifest = json.loads((top / "manifest.json").read_text())
    del manifest["temperature"]  # as those were whose other classes have the mean of their logits
    (top / "manifest.json").write_text(json.dumps(manifest))
    line = one_line(capsys, "train", path)
    assert "of another temperature (not recorded, here 2.0); make it again with `harness" in line
    for temperature in (1.0, 20.0):
        overrides = [f"distill.cache={cache}", f"distill.temperature={temperature}"]
        assert open_teacher(load_config(path, overrides), batch_plan, world) is not None


def test_a_cache_of_another_teacher_is_refused(student, own_cache, capsys):
    manifest = json.loads((own_cache / "manifest.json").read_text())
    (own_cache / "manifest.json").write_text(json.dumps(manifest | {"teacher": "0123"}))
    path = student(precision="float64", cache=str(own_cache))
    assert "is of another teacher (0123, here " in one_line(capsys, "train", path)


def test_a_cache_of_other_data_is_refused_with_the_first_difference(
    student, own_cache, own_digits, capsys
):
    first = sorted((own_digits / "train" / "9").iterdir())[0]
    first.rename(first.with_name("x.png"))
    root = f"run.data_root={own_digits}"
    path = student(precision="float64", cache=str(own_cache))
    difference = f"the images of class 9 differ between the cache and {own_digits}/train"
    options = ["--epochs", 2, "--dtype", "float32"]
    for words in (["train", path, root], ["cache", path, root, *options]):
        assert f"was made from other data: {difference}; make it" in one_line(capsys, *words)
    (own_cache / "plan.json").write_text("{torn")
    assert "holds another cache" in one_line(capsys, "cache", path, root, *options)


def test_a_cache_without_digests_is_still_filled_and_read(student, own_cache, capsys):
    for file in ("plan.json", "manifest.json"):
        former = json.loads((own_cache / file).read_text())
        del former["class_digests"]
        (own_cache / file).write_text(json.dumps(former, indent=2))
    path = student(precision="float64", cache=str(own_cache))
    assert "is of another seed (" in one_line(capsys, "train", path, "seed=2")
    words = ["cache", str(path), "--epochs", "2", "--dtype", "float32"]
    assert main(words) == 0  # nothing is computed again


def test_a_damaged_cache_is_refused(student, own_cache, tmp_path, capsys):
    path = student(precision="float64", cache=str(own_cache))
    shard = own_cache / all_shards(2, 1437)[1].name
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert f"{shard}: is damaged" in one_line(capsys, "train", path)
    shard.unlink()
    assert f"{shard}: No such file" in one_line(capsys, "train", path)
    (own_cache / "manifest.json").write_text("{")
    assert "manifest.json: is damaged" in one_line(capsys, "train", path)
    path = student(precision="float64", cache=str(tmp_path / "none"))
    assert "no cache (No such file" in one_line(capsys, "train", path)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--epochs", "0"], "--epochs 0: at least 1"),
        (["--epochs", "1", "--top", "10"], "--top 10: give 1 to 9"),
        (["--epochs", "1", "distill.cache=null"], "write the folder to fill in distill.cache"),
    ],
)
def test_mistakes_of_the_command_are_one_line(student, tmp_path, words, message, capsys):
    path = student(cache=str(tmp_path / "cache"))
    assert message in one_line(capsys, "cache", path, *words)
    assert not (tmp_path / "cache").exists()
