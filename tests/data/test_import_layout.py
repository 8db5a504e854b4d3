"""`harness data import`: each well-known layout becomes train/CLASS and val/CLASS, or one line."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from harness.commands.command_line import main
from harness.data.check.folder import check_folder
from harness.data.prepare.imagenet import prepare_imagenet
from harness.data.prepare.import_layout import import_layout
from harness.data.prepare.layouts import recognise
from harness.data.prepare.prepared_folder import MARKER, PARTIAL
from tests.data.making import KILL_AT_RENAME, child, error_of, tree
from tests.data.test_imagenet_archives import IDS, TRUTH, WNIDS, devkit_tar

Save = Callable[[str], bytes]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Write an image of its own colour, in the format of its name; return its bytes."""
    colours = iter(range(10, 250, 3))

    def write(name: str) -> bytes:
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 9), (next(colours), 30, 200)).save(path)
        return path.read_bytes()

    return write


def imported(tmp_path: Path, *options: float) -> dict[str, bytes]:
    """Return the files of the new folder, whose counts `harness data check` confirms."""
    import_layout(tmp_path / "source", tmp_path / "new", *options)
    assert not check_folder(tmp_path / "new").failed
    (tmp_path / "new" / MARKER).unlink()
    return {
        name: content
        for name, content in tree(tmp_path / "new").items()
        if not name.startswith(".harness")
    }


def text(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / "source" / name).write_text(content)


def test_tiny_imagenet(tmp_path: Path, save: Save) -> None:
    expected, lines = {}, []
    for wnid in WNIDS:
        for i in range(2):
            file = f"{wnid}_{i}.JPEG"
            expected[f"train/{wnid}/{file}"] = save(f"train/{wnid}/images/{file}")
        text(tmp_path, f"train/{wnid}/{wnid}_boxes.txt", "")
        expected[f"val/{wnid}/val_{wnid}.JPEG"] = save(f"val/images/val_{wnid}.JPEG")
        lines.append(f"val_{wnid}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    save("test/images/test_0.JPEG")
    text(tmp_path, "val/val_annotations.txt", "".join(lines))
    text(tmp_path, "wnids.txt", "\n".join(WNIDS))
    before = tree(tmp_path / "source")
    assert imported(tmp_path) == expected
    assert tree(tmp_path / "source") == before  # never moved
    text(tmp_path, "val/val_annotations.txt", "".join(lines[1:]))
    message = error_of(import_layout, tmp_path / "source", tmp_path / "other")
    assert f"val_{WNIDS[0]}.JPEG (and 0 more): has no class in" in message
    text(tmp_path, "val/val_annotations.txt", "".join([*lines, "val_9.JPEG\tn01440764\t0\n"]))
    assert "'val_9.JPEG' is not in" in error_of(
        import_layout, tmp_path / "source", tmp_path / "other"
    )
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("labels", ["LOC_val_solution.csv", "ILSVRC2012_devkit_t12.tar.gz"])
@pytest.mark.parametrize("base", ["ILSVRC/Data/CLS-LOC/", ""])
def test_imagenet_with_a_flat_val(tmp_path: Path, save: Save, base: str, labels: str) -> None:
    expected, rows = {}, ["ImageId,PredictionString"]
    for wnid in WNIDS:
        expected[f"train/{wnid}/{wnid}_18.JPEG"] = save(f"{base}train/{wnid}/{wnid}_18.JPEG")
    for number, class_id in enumerate(TRUTH, start=1):
        name, wnid = f"ILSVRC2012_val_{number:08d}", IDS[class_id]
        expected[f"val/{wnid}/{name}.JPEG"] = save(f"{base}val/{name}.JPEG")
        rows.append(f"{name},{wnid} 1 2 3 4 {wnid} 5 6 7 8")
    message = error_of(import_layout, tmp_path / "source", tmp_path / "new")
    assert "put Kaggle's LOC_val_solution.csv or image-net.org's ILSVRC2012_devkit" in message
    if labels.endswith("csv"):
        text(tmp_path, labels, "\n".join([rows[0], *reversed(rows[1:])]))  # Kaggle's is unordered
    else:
        (tmp_path / "source" / labels).write_bytes(devkit_tar())
    assert imported(tmp_path) == expected


def test_hugging_faces_imagenet_unpacked(tmp_path: Path, save: Save) -> None:
    expected = {}
    for wnid in WNIDS:
        for split, name in (
            ("train", f"{wnid}_10026_{wnid}.JPEG"),
            ("validation", f"ILSVRC2012_val_00000293_{wnid}.JPEG"),
        ):
            place = f"{split.removesuffix('idation')}/{wnid}/{name}"
            expected[place] = save(f"{split}/{name}")
    assert imported(tmp_path) == expected


def test_kaggles_table_and_a_share_held_out(tmp_path: Path, save: Save) -> None:
    contents = {f"{i:03d}": save(f"train/{i:03d}.jpg") for i in range(30)}
    save("test/900.jpg")
    rows = [f"{name},{'cat' if int(name) < 20 else 'dog'}" for name in contents]
    text(tmp_path, "labels.csv", "\n".join(["id,breed", *rows]))
    message = error_of(import_layout, tmp_path / "source", tmp_path / "new")
    assert "no validation images; --val 0.1 holds out a tenth of each class" in message
    result = imported(tmp_path, 0.2)
    places = [name.rsplit("/", 1)[0] for name in result]
    counts = {place: places.count(place) for place in places}
    assert counts == {"train/cat": 16, "train/dog": 8, "val/cat": 4, "val/dog": 2}
    assert {Path(name).stem: content for name, content in result.items()} == contents
    assert all(("cat" in name) == (int(Path(name).stem) < 20) for name in result)
    text(tmp_path, "labels.csv", "\n".join(["id,breed", *rows, "003,dog"]))
    again = partial(import_layout, tmp_path / "source", tmp_path / "other", 0.2)
    assert "003 has two classes, cat and dog" in error_of(again)
    text(tmp_path, "labels.csv", "\n".join(["id,height", *rows]))
    assert "no column of classes (label, …); found id, height" in error_of(again)
    text(tmp_path, "labels.csv", "id,breed\n../../etc/passwd,cat\n")
    assert error_of(again)


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_hugging_faces_metadata(tmp_path: Path, save: Save, kind: str) -> None:
    expected = {}
    for split, name in (("train", "train"), ("val", "test")):
        rows = []
        for label in ("a cat", "dog"):
            file = f"{label[-3:]}.png"
            expected[f"{split}/{label}/{file}"] = save(f"{name}/{file}")
            rows.append({"file_name": file, "label": label})
        lines = ["file_name,label", *(f"{row['file_name']},{row['label']}" for row in rows)]
        lines = lines if kind == "csv" else [json.dumps(row) for row in rows]
        text(tmp_path, f"{name}/metadata.{kind}", "\n".join(lines) + "\n")
    assert imported(tmp_path) == expected


def test_one_table_of_both_splits(tmp_path: Path, save: Save) -> None:
    names = ["train/1.png", "train/2.png", "test/1.png", "test/2.png"]
    contents = [save(name) for name in names]
    rows = [f"{name},{label}" for name, label in zip(names, ["cat", "dog"] * 2, strict=True)]
    text(tmp_path, "metadata.csv", "\n".join(["file_name,label", *rows]))
    text(tmp_path, "README.md", "no image, and so without a class")
    places = ["train/cat/1.png", "train/dog/2.png", "val/cat/1.png", "val/dog/2.png"]
    assert imported(tmp_path) == dict(zip(places, contents, strict=True))


def test_other_formats_become_pngs_of_the_same_pixels(
    tmp_path: Path, photo: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    source, pixels = tmp_path / "source", {}
    for split, offset in (("train", 0), ("valid", 9)):
        place = source / split / os.fsdecode(b"caf\xe9")  # Latin-1
        place.mkdir(parents=True)
        for number, (suffix, options) in enumerate(
            {"webp": {"lossless": True}, "bmp": {}, "tiff": {}, "png": {}, "JPG.txt": {}}.items()
        ):
            image, file = photo(number + offset, 31, 23), place / f"x.{suffix}"
            image.save(file, "JPEG" if suffix == "JPG.txt" else None, **options)
            with Image.open(file) as stored:
                new = {"png": "x.png", "JPG.txt": "x.JPG.txt.jpg"}.get(suffix, f"x.{suffix}.png")
                split_name = "val" if split == "valid" else split
                pixels[f"{split_name}/{place.name}/{new}"] = np.asarray(stored.convert("RGB"))
        frames = [photo(30 + offset, 20, 20), photo(41 + offset, 20, 20)]
        frames[0].save(place / "two.gif", save_all=True, append_images=frames[1:])
        with Image.open(place / "two.gif") as stored:
            pixels[f"{split_name}/{place.name}/two.gif.png"] = np.asarray(stored.convert("RGB"))
        photo(3 + offset, 20, 20).convert("CMYK").save(place / "print.tif")
        with Image.open(place / "print.tif") as stored:
            pixels[f"{split_name}/{place.name}/print.tif.png"] = np.asarray(stored.convert("RGB"))
        (place / "readme.txt").write_text("photographs")
    assert main(["data", "import", str(source), str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert "7 training and 7 validation images of 1 classes" in out[0]
    assert out[1].startswith("left out: 2 files that are not images, such as ")
    for name, expected in pixels.items():
        with Image.open(tmp_path / "new" / name) as stored:
            assert stored.format == ("JPEG" if name.endswith(".jpg") else "PNG")
            assert np.array_equal(np.asarray(stored.convert("RGB")), expected), name
    assert len(pixels) == 14 and not check_folder(tmp_path / "new").failed
    linked = [file for file in (tmp_path / "new").rglob("*.*") if file.stat().st_nlink == 2]
    assert len(linked) == 4  # the PNGs and JPEGs take no room


def test_killed_then_imported_again(tmp_path: Path, save: Save) -> None:
    for split in ("train", "val"):
        for name in ("cat/1.jpg", "cat/2.webp", "dog/1.bmp"):
            save(f"{split}/{name}")
    new, straight = tmp_path / "new", tmp_path / "straight"
    call = "import_layout(Path(sys.argv[1]), Path(sys.argv[2]))"
    before = "from harness.data.prepare.import_layout import import_layout\n"
    # renames: the source's record, two links, then four PNGs
    killed = child(call, tmp_path / "source", new, before=before + KILL_AT_RENAME.format(n=5))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (new / MARKER).exists() and (new / PARTIAL).exists()
    for folder in (new, straight):
        line = import_layout(tmp_path / "source", folder)
        assert line.endswith("3 training and 3 validation images of 2 classes")
    assert tree(new) == tree(straight)
    assert "prepared before" in import_layout(tmp_path / "source", new)
    (new / "val" / "dog" / "1.bmp.png").unlink()
    assert "has lost files" in import_layout(tmp_path / "source", new)
    assert tree(new) == tree(straight)


def test_what_is_not_understood_is_one_line(tmp_path: Path, save: Save) -> None:
    source = tmp_path / "source"
    call = partial(import_layout, source, tmp_path / "new")
    assert "no such folder" in error_of(call)
    source.mkdir()
    assert "unknown layout" in error_of(call)
    for split in ("train", "val"):
        save(f"{split}/cat/1.jpg")
    for inside in (source, source / "new", tmp_path):
        assert "must be outside" in error_of(import_layout, source, inside)
    assert "has validation images; omit --val 0.5" in error_of(call, 0.5)
    faults: dict[str, tuple[bytes, str]] = {
        "train/cat/x.heic": (b"\0\0\0\x18ftypheic" + bytes(9), "HEIC, not JPEG, PNG, WebP"),
        "train/cat/x.jpg": (b"", "unknown image format"),
        "train/cat/x.webp": (b"RIFF\x24\0\0\0WEBPVP8 cut", "cannot be decoded"),
        "train/x.jpg": (b"x", "not in a class folder"),
        "train/cat/more/x.jpg": (b"x", "a folder inside a class"),
        "train/dog/x.jpg": (
            (source / "val/cat/1.jpg").read_bytes(),
            "in only one of train and val",
        ),
    }
    for name, (content, reason) in faults.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
        message = error_of(call)
        assert reason in message and not (tmp_path / "new" / MARKER).exists()
        (source / name).unlink()
        if not any((source / name).parent.iterdir()):
            (source / name).parent.rmdir()
    (source / "train/cat/x.jpg").symlink_to("/nowhere")
    assert "x.jpg: cannot be read: No such file" in error_of(call)


def test_too_little_room_is_found_before(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    for split in ("train", "val"):
        save(f"{split}/cat/1.bmp")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    assert "0 MB free" in error_of(import_layout, tmp_path / "source", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "files, advice",
    [
        (["data/train-00000-of-00294.parquet"], "parquet is not supported"),
        (["train_images_0.tar.gz", "val_images.tar.gz"], "unpack train_images_*.tar.gz"),
        (["ILSVRC2012_img_train.tar"], "`harness data imagenet NEW --archives"),
    ],
)
def test_recognised_and_not_imported(tmp_path: Path, files: list[str], advice: str) -> None:
    for file in files:
        (tmp_path / "source" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / file).touch()
    assert advice in error_of(import_layout, tmp_path / "source", tmp_path / "new")
    layout = recognise(tmp_path / "source")
    assert layout is not None and layout.files is None
    if "ILSVRC2012" not in files[0]:
        assert advice in error_of(prepare_imagenet, tmp_path / "new", tmp_path / "source")
    assert not (tmp_path / "new").exists()
