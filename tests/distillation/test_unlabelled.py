"""Images without labels: the soft term only, in the index, the sampling and every loader."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import load_config
from harness.data.dataset import open_dataset
from harness.data.loaders.choice import open_loader
from harness.data.sampling import permutation
from harness.data.sources.folder import open_folder
from harness.distributed import world_from_environment
from harness.errors import UserError
from harness.runs.logging.jsonl import read_log
from harness.training.metrics import Metrics
from harness.training.ready_rank import prepare
from harness.training.setup import train
from tests.distilling import TENTH, one_line


@pytest.fixture
def config(student, tenth):
    """A student of 1437 images, 143 of them labelled."""

    def load(*overrides, root=tenth, **changes):
        changes = TENTH | {"run__data_root": str(root)} | changes
        return load_config(student(changes=changes), overrides)

    return load


def test_their_ids_follow_the_labelled_ones(config, tenth):
    train_index, _ = open_dataset(config())
    labelled, unlabelled = open_folder(tenth, "train"), open_folder(tenth, "unlabelled")
    assert (len(labelled), len(unlabelled), len(train_index)) == (143, 1294, 1437)
    assert train_index.labels[:143].tolist() == labelled.labels.tolist()
    assert set(train_index.labels[143:].tolist()) == {-1}
    assert train_index.name(142) == labelled.name(142)
    assert train_index.name(143) == str(tenth / "unlabelled" / "0000.png")
    assert train_index.relative_path(143) == "unlabelled/0000.png"
    assert train_index.widths[143] == 8 and Path(train_index.name(1436)).is_file()
    # kept beside the data, and not scanned again
    assert (tenth / ".harness-index-unlabelled.npz").exists()
    # a folder that is not asked for is not read
    plain = config("data.unlabelled_images=0", recipe__minibatch=128, recipe__warmup_epochs=1)
    assert len(open_dataset(plain)[0]) == 143


def test_the_sampling_runs_over_all_of_them(config):
    batch_plan, config = prepare(config(), world_from_environment("cpu"))
    assert config.steps_per_epoch == 1437 // 256  # N / kn, not labelled / kn
    assert batch_plan.step_ids(0).tolist() == permutation(1, 0, 1437)[:256].tolist()


@pytest.mark.parametrize("name", ["memory", "reference", "dali"])
def test_every_loader_brings_them(config, tenth, name):
    if name == "dali":
        pytest.importorskip("nvidia.dali")
    batch_plan, config = prepare(config("run.loader_threads=0"), world_from_environment("cpu"))
    loader = open_loader(config, batch_plan, name, 0, False)
    batch = next(loader.train(0))
    loader.close()
    ids = batch.ids.numpy()
    assert sorted(ids) == sorted(permutation(1, 0, 1437)[:256])
    assert batch.labels.tolist() == batch_plan.train.labels[ids].tolist()
    assert ((batch.labels == -1).numpy() == (ids >= 143)).all()
    loader = open_loader(config, batch_plan, "memory", 0, False)
    difference = next(loader.train(0)).images.int() - batch.images.int()
    loader.close()
    assert difference.abs().float().mean() <= (1.0 if name == "dali" else 0.0)


def test_the_error_counts_labelled_images_and_the_share_is_of_each_step():
    metrics = Metrics(torch.device("cpu"), minibatch=4)
    logits = torch.tensor([[2.0, 0.0]] * 4)  # class 0
    for step, labels in enumerate([[0, 1, -1, -1], [0, -1, -1, -1]]):
        metrics.add_micro_batch(torch.tensor(1.0), logits, torch.tensor(labels))
        metrics.end_step(step)
    reading = metrics.read()
    assert reading.labelled_shares == [0.5, 0.25]
    assert reading.error == pytest.approx(100 / 3)  # one of three is wrong


def test_the_labelled_share_of_each_step_is_in_the_log(config, tmp_path):
    run = config("recipe.epochs=1", "recipe.milestones=[]")
    train(run, tmp_path / "run")
    log = read_log(tmp_path / "run" / "log.jsonl")
    shares = [s for line in log if line["event"] == "train" for s in line["labelled_shares"]]
    order = permutation(1, 0, 1437)[: 5 * 256].reshape(5, 256)
    assert shares == [float(np.mean(ids < 143)) for ids in order]


def test_without_a_soft_term_they_are_refused_and_the_hard_term_is_divided_by_kn(config, tmp_path):
    # a teacher whose word has no weight: the loss is Σ over the labelled images / kn, that is
    # (their share) times their mean cross entropy, which is ln 10 for a network that knows nothing
    run = config("distill.soft_weight=1e-12", "distill.hard_weight=1.0", "recipe.epochs=1",
                 "recipe.milestones=[]", "run.log_every_steps=1")  # fmt: skip
    train(run, tmp_path / "run")
    log = read_log(tmp_path / "run" / "log.jsonl")
    first = next(line for line in log if line["event"] == "train")
    assert first["loss"] == pytest.approx(first["labelled_shares"][0] * np.log(10), rel=0.1)


def test_what_is_wrong_with_the_folder_is_told(config, tenth, small, tmp_path, capsys):
    line = one_line(capsys, "train", small(), "data.unlabelled_images=9")
    assert "data.unlabelled_images: such images have the soft term of distill only" in line
    with pytest.raises(UserError, match=r"1294 images, but data\.unlabelled_images is 1000"):
        open_dataset(config("data.unlabelled_images=1000"))
    root = Path(shutil.copytree(tenth, tmp_path / "digits"))
    (root / "unlabelled" / "0007.png").write_bytes(b"no image")
    (root / ".harness-index-unlabelled.npz").unlink()  # an image that was changed in its place
    with pytest.raises(UserError, match=r"unlabelled/0007\.png: cannot be decoded"):
        open_dataset(config(root=root))
    open_dataset(config("data.on_bad_image=skip", root=root))
    shutil.rmtree(root / "unlabelled")
    for _ in range(2):
        with pytest.raises(UserError, match=r"unlabelled: no images .* set data\.unlabelled_im"):
            open_dataset(config(root=root))
        (root / "unlabelled").mkdir(exist_ok=True)  # missing, then empty
