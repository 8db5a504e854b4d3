"""ImageNet from small archives of the official layout: equal, killed, full, hostile, cut."""

import io
import os
import shutil
import signal
import subprocess
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from harness.data.prepare.imagenet import prepare_imagenet
from harness.data.prepare.prepared_folder import MARKER, PARTIAL, Counts
from tests.data.making import KILL_AT_RENAME, child, error_of, special, tar, tree

WNIDS = ("n01440764", "n02105855", "n04418357")
IDS = {7: WNIDS[0], 2: WNIDS[1], 5: WNIDS[2]}  # ILSVRC2012_ID, in another order than the names
TRUTH = (5, 7, 7, 2, 5, 2)
PER_CLASS = 4
SMALL = Counts(train=12, val=6, classes=3)  # 3 * PER_CLASS; the ground truth's six lines


def image(wnid: str, number: int) -> tuple[str, bytes]:
    """Any bytes do: images are copied, not decoded. 20,000 and more, none equal."""
    return f"{wnid}_{number}.JPEG", f"{wnid} {number} ".encode() * (1_000 + number)


def val_image(number: int) -> tuple[str, bytes]:
    return f"ILSVRC2012_val_{number:08d}.JPEG", f"validation {number} ".encode() * (2_000 + number)


def class_tar(wnid: str, *more) -> tuple[str, bytes]:
    return f"{wnid}.tar", tar(*(image(wnid, i) for i in range(PER_CLASS)), *more)


def train_tar(*more) -> bytes:
    return tar(*(class_tar(wnid) for wnid in WNIDS), *more)


def val_tar(*more) -> bytes:
    return tar(*(val_image(i) for i in range(1, 7)), *more)


def devkit_tar(*more, ids=IDS, truth=TRUTH) -> bytes:
    names = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children"]
    names += ["wordnet_height", "num_train_images"]
    # an inner node of the tree follows the leaves, as in the official file
    rows: list[tuple] = [(i, wnid, "w", "g", 0, [], 0, PER_CLASS) for i, wnid in ids.items()]
    rows += [(1001, "n00001740", "entity", "g", 2, [2, 7], 19, 0)]
    synsets = np.array([[row] for row in rows], dtype=[(name, object) for name in names])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth_name = "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt"
    return tar(
        special("ILSVRC2012_devkit_t12/data", tarfile.DIRTYPE),
        ("ILSVRC2012_devkit_t12/readme.txt", b"read me"),
        ("ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue()),
        (truth_name, "".join(f"{i}\n" for i in truth).encode()),
        *more,
        mode="w:gz",
    )


def write_archives(folder: Path, train=None, val=None, devkit=None) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "ILSVRC2012_img_train.tar").write_bytes(train or train_tar())
    (folder / "ILSVRC2012_img_val.tar").write_bytes(val or val_tar())
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit or devkit_tar())
    return folder


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    return write_archives(tmp_path / "archives")


def images_in_archives() -> dict[str, bytes]:
    """What the small archives must become, as `tree` gives it without the marker."""
    train = {f"train/{w}/{n}": c for w in WNIDS for n, c in (image(w, i) for i in range(4))}
    val = {}
    for i, class_id in enumerate(TRUTH, start=1):
        name, content = val_image(i)
        val[f"val/{IDS[class_id]}/{name}"] = content
    return train | val


def test_imagenet_files_equal_the_archives(tmp_path: Path, archives: Path) -> None:
    line = prepare_imagenet(tmp_path / "i", archives, expected=SMALL)
    assert line.endswith("imagenet: 12 training and 6 validation images of 3 classes")
    (archives / "ILSVRC2012_img_train.tar").unlink()  # not needed any more
    assert "prepared before" in prepare_imagenet(tmp_path / "i", archives, expected=SMALL)
    (tmp_path / "i" / MARKER).unlink()
    assert tree(tmp_path / "i") == images_in_archives()


CALL = "prepare_imagenet(Path(sys.argv[1]), Path(sys.argv[2]), expected=Counts(12, 6, 3))"


# Renames of an uninterrupted call: 1 the source's record, 2 to 7 validation images, then four
# images and their class, three times (12 and 17 and 22 are classes), 23 train, 24 val, 25 marker.
@pytest.mark.parametrize("n", [1, 5, 10, 12, 22, 24, 25])
def test_imagenet_continues_after_sigkill(tmp_path: Path, archives: Path, n: int) -> None:
    folder = tmp_path / "i"
    killed = child(CALL, folder, archives, before=KILL_AT_RENAME.format(n=n))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (folder / MARKER).exists()
    done = {path.name: path.stat() for path in folder.rglob("*.JPEG")}
    renames_of_images = [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16, 18, 19, 20, 21]
    assert len(done) == sum(i < n for i in renames_of_images)

    prepare_imagenet(folder, archives, expected=SMALL)
    for path in folder.rglob("*.JPEG"):
        if path.name in done:  # the same file, not another one of the same content
            kept, now = done[path.name], path.stat()
            assert (now.st_ino, now.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    assert (folder / MARKER).exists() and not (folder / PARTIAL).exists()
    (folder / MARKER).unlink()
    assert tree(folder) == images_in_archives()


@pytest.mark.counts_files
def test_imagenet_takes_25_renames(tmp_path: Path, archives: Path) -> None:
    result = child(CALL, tmp_path / "i", archives, before=KILL_AT_RENAME.format(n=26))
    assert "12 training and 6 validation" in result.stdout and result.returncode == 0


# Images have 20,000 bytes and more, so the limit cuts the first one in the middle of its write.
LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))"


def test_imagenet_half_written_file_never_counts(tmp_path: Path, archives: Path) -> None:
    default = "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"
    killed = child(CALL, tmp_path / "i", archives, before=default + LIMIT)
    assert killed.returncode == -signal.SIGXFSZ, killed.stderr
    assert (tmp_path / "i" / PARTIAL / "half").stat().st_size == 9000
    prepare_imagenet(tmp_path / "i", archives, expected=SMALL)
    (tmp_path / "i" / MARKER).unlink()
    assert tree(tmp_path / "i") == images_in_archives()


def test_imagenet_file_cut_by_a_power_loss_is_made_again(tmp_path: Path, archives: Path) -> None:
    child(CALL, tmp_path / "i", archives, before=KILL_AT_RENAME.format(n=11))
    for path in (tmp_path / "i").rglob("*.JPEG"):  # all validation images, three of a class
        os.truncate(path, 100)
    prepare_imagenet(tmp_path / "i", archives, expected=SMALL)
    (tmp_path / "i" / MARKER).unlink()
    assert tree(tmp_path / "i") == images_in_archives()


@pytest.mark.counts_files
def test_imagenet_failed_write_is_one_line(tmp_path: Path, archives: Path) -> None:
    failed = child(CALL, tmp_path / "i", archives, before=LIMIT)
    assert failed.stdout.startswith("UserError ") and "File too large" in failed.stdout
    assert failed.stdout.count("\n") == 1 and failed.stderr == ""
    prepare_imagenet(tmp_path / "i", archives, expected=SMALL)


def test_imagenet_disk_full_is_one_line_and_continues(tmp_path: Path, archives: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount += ['mount -t tmpfs -o size=200k full "$0" && exec "$@"', str(disk)]
    try:
        subprocess.run([*mount, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this machine lets a user mount no small disk")
    grow = "os.system(f'mount -o remount,size=4m {Path(sys.argv[1]).parent}')\n"
    result = child(CALL, disk / "i", archives, after=f"{grow}print({CALL})", under=mount)
    first, second = result.stdout.splitlines()
    assert first.startswith("UserError ") and "No space left on device" in first
    assert second.endswith("12 training and 6 validation images of 3 classes")


@pytest.mark.parametrize("prefix", ["./", "val/", "./ILSVRC2012_img_val/"])
def test_imagenet_from_archives_packed_again(tmp_path: Path, prefix: str) -> None:
    def packed(*files: tuple[str, bytes]) -> list[tuple[str, bytes]]:
        return [(prefix + name, content) for name, content in files]

    inner = {wnid: tar(*packed(*(image(wnid, i) for i in range(4)))) for wnid in WNIDS}
    classes = packed(*((f"{wnid}.tar", content) for wnid, content in inner.items()))
    images = packed(*map(val_image, range(1, 7)))
    archives = write_archives(tmp_path / "archives", train=tar(*classes), val=tar(*images))
    prepare_imagenet(tmp_path / "i", archives, expected=SMALL)
    (tmp_path / "i" / MARKER).unlink()
    assert tree(tmp_path / "i") == images_in_archives()
    twice = val_image(1)[0], b"another"
    write_archives(archives, val=tar(*images, twice))
    message = error_of(prepare_imagenet, tmp_path / "j", archives, expected=SMALL)
    assert f"member {twice[0]!a} refused: it occurs twice" in message


def test_imagenet_that_lost_files_is_completed(tmp_path: Path, archives: Path) -> None:
    call = partial(prepare_imagenet, tmp_path / "i", archives, expected=SMALL)
    call()
    for path in (f"train/{WNIDS[0]}/{image(WNIDS[0], 1)[0]}", f"val/{IDS[5]}/{val_image(1)[0]}"):
        (tmp_path / "i" / path).unlink()
    shutil.rmtree(tmp_path / "i" / "train" / WNIDS[2])
    (archives / "ILSVRC2012_img_train.tar").rename(tmp_path / "away.tar")
    message = error_of(call)
    assert "has lost files: 7 training and 5 validation images of 2 classes left" in message
    assert "of 12 training and 6 validation images of 3 classes; " in message
    assert "ILSVRC2012_img_train.tar missing" in message
    (tmp_path / "away.tar").rename(archives / "ILSVRC2012_img_train.tar")
    assert call().endswith("imagenet: 12 training and 6 validation images of 3 classes")
    (tmp_path / "i" / MARKER).unlink()
    assert tree(tmp_path / "i") == images_in_archives()


SPARSE = tarfile.TarInfo("n01440764_9.JPEG")  # one byte that would become 10**12
SPARSE.pax_headers = {"GNU.sparse.size": str(10**12), "GNU.sparse.map": "0,1"}
HOSTILE: dict[str, tuple[str | tarfile.TarInfo, bytes]] = {
    "absolute": ("/tmp/escaped.JPEG", b"x"),
    "dotdot": ("../../escaped.JPEG", b"x"),
    "dotdot inside": ("n01440764/../../../escaped.JPEG", b"x"),
    "newline": ("n01440764_9\n.JPEG", b"x"),
    "escape": ("n01440764_9\x1b[2J.JPEG", b"x"),
    "symlink": special("n01440764_9.JPEG", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": special("n01440764_9.JPEG", tarfile.LNKTYPE, "../escaped"),
    "fifo": special("n01440764_9.JPEG", tarfile.FIFOTYPE),
    "device": special("n01440764_9.JPEG", tarfile.CHRTYPE),
    "folder out": special("../escaped", tarfile.DIRTYPE),
    "sparse": (SPARSE, b"x"),
    "unknown": ("virus.exe", b"x"),
    "not ASCII digits": ("n01440764_٣.JPEG", b"x"),
}


# other files than images are in the development kit, and are never written
HARMLESS = {("devkit", "unknown"), ("devkit", "not ASCII digits")}
PLACES = [(w, k) for w in ("train", "class", "val", "devkit") for k in HOSTILE]


@pytest.mark.parametrize("where, kind", [pair for pair in PLACES if pair not in HARMLESS])
def test_imagenet_refuses_hostile_members(tmp_path: Path, where: str, kind: str) -> None:
    header, _ = member = HOSTILE[kind]
    archives = write_archives(
        tmp_path / "archives",
        train=train_tar(member) if where == "train" else None,
        val=val_tar(member) if where == "val" else None,
        devkit=devkit_tar(member) if where == "devkit" else None,
    )
    if where == "class":
        classes = class_tar(WNIDS[0], member), class_tar(WNIDS[1]), class_tar(WNIDS[2])
        write_archives(archives, train=tar(*classes))
    before = tree(tmp_path)
    message = error_of(prepare_imagenet, tmp_path / "i", archives, expected=SMALL)
    name = header if isinstance(header, str) else header.name
    assert f"member {name!a} refused" in message
    assert not (tmp_path / "i" / MARKER).exists()
    outside = {n: c for n, c in tree(tmp_path).items() if not n.startswith("i/")}
    assert outside == before and not Path("/tmp/escaped.JPEG").exists()


def test_imagenet_refuses_a_member_that_comes_twice(tmp_path: Path) -> None:
    twice = image(WNIDS[0], 0)[0], b"another"
    first = class_tar(WNIDS[0], twice), class_tar(WNIDS[1]), class_tar(WNIDS[2])
    archives = write_archives(tmp_path / "archives", train=tar(*first))
    call = partial(prepare_imagenet, tmp_path / "i", archives, expected=SMALL)
    assert "n01440764.tar: member 'n01440764_0.JPEG' refused: it occurs twice" in error_of(call)


def test_imagenet_refuses_a_hostile_class_name_in_the_development_kit(tmp_path: Path) -> None:
    devkit = devkit_tar(ids={**IDS, 2: "../../n02105855"})
    archives = write_archives(tmp_path / "archives", devkit=devkit)
    message = error_of(prepare_imagenet, tmp_path / "i", archives, expected=SMALL)
    assert "'../../n02105855' is not a WNID" in message
    assert set(tmp_path.iterdir()) == {archives}


def test_imagenet_checks_against_the_official_counts(tmp_path: Path, archives: Path) -> None:
    message = error_of(prepare_imagenet, tmp_path / "i", archives)
    assert "1,281,167 training and 50,000 validation images of 1,000 classes" in message
    assert not (tmp_path / "i/train").exists() and not (tmp_path / "i" / MARKER).exists()


def test_imagenet_names_a_missing_archive(tmp_path: Path, archives: Path) -> None:
    (archives / "ILSVRC2012_img_val.tar").unlink()
    message = error_of(prepare_imagenet, tmp_path / "i", archives)
    assert "ILSVRC2012_img_val.tar missing" in message and "img_train" not in message
    assert list(tmp_path.iterdir()) == [archives]


def test_imagenet_names_what_is_missing_in_archives(tmp_path: Path, archives: Path) -> None:
    call = partial(prepare_imagenet, tmp_path / "i", archives, expected=SMALL)
    short_class = f"{WNIDS[2]}.tar", tar(image(WNIDS[2], 0), image(WNIDS[2], 1))
    train = tar(class_tar(WNIDS[0]), class_tar(WNIDS[1]), short_class)
    write_archives(archives, train=train, val=tar(*(val_image(i) for i in range(1, 6))))
    assert "n04418357.tar contains 2 images, but the development kit lists 4" in error_of(call)
    write_archives(archives, train=tar(class_tar(WNIDS[0]), class_tar(WNIDS[1])))
    assert "in only one of train and val: n04418357" in error_of(call)
    write_archives(archives)  # the complete ones: the folder is repaired
    assert "12 training and 6 validation" in call()


def test_imagenet_counts_validation_images(tmp_path: Path) -> None:
    archives = write_archives(tmp_path / "a", val=tar(*(val_image(i) for i in range(1, 6))))
    message = error_of(prepare_imagenet, tmp_path / "i", archives, expected=SMALL)
    assert "but has 12 training and 5 validation images of 3 classes" in message


@pytest.mark.parametrize("name", ["img_train.tar", "img_val.tar", "devkit_t12.tar.gz"])
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.6])
def test_imagenet_cut_archive(tmp_path: Path, archives: Path, name: str, share: float) -> None:
    path = archives / f"ILSVRC2012_{name}"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    call = partial(prepare_imagenet, tmp_path / "i", archives, expected=SMALL)
    assert path.name in error_of(call)
    path.write_bytes(whole)
    assert "12 training" in call()


def test_imagenet_ground_truth_of_an_unknown_class(tmp_path: Path) -> None:
    archives = write_archives(tmp_path / "archives", devkit=devkit_tar(truth=(5, 7, 1001)))
    message = error_of(prepare_imagenet, tmp_path / "i", archives, expected=SMALL)
    assert "unknown class (1001)" in message
