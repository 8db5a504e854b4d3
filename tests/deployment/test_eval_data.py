"""`harness eval --data`: any images, by the names of their classes, and its tables."""

import csv
import shutil
from collections import Counter

import pytest
from PIL import Image

from harness.runs.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint


def table(file):
    with file.open() as stream:
        return list(csv.reader(stream))


def test_the_same_images_give_the_same_result(run, digits, output_of):
    own = output_of("eval", run, "--json")
    assert own["total"] == 360
    for folder in (digits / "val", digits):
        assert output_of("eval", run, "--data", folder, "--json") == own


def test_flat_images_beside_a_csv(run, digits, tmp_path, output_of):
    rows = ["file,class"]
    for file in sorted((digits / "val").glob("*/*.png")):
        name = f"{file.parent.name}-{file.name}"
        shutil.copyfile(file, tmp_path / name)
        rows.append(f"{name},{file.parent.name}")
    (tmp_path / "labels.csv").write_text("\n".join(rows))
    result = output_of("eval", run, "--data", tmp_path, "--json")
    assert result == output_of("eval", run, "--json")


def test_other_formats_and_a_subset_of_classes(run, digits, tmp_path, output_of, capsys):
    for class_name, suffix in (("3", "webp"), ("8", "bmp")):
        (tmp_path / class_name).mkdir()
        for file in sorted((digits / "val" / class_name).iterdir())[:20]:
            place = tmp_path / class_name / f"{file.stem}.{suffix}"
            Image.open(file).convert("RGB").save(place, lossless=True)
    (tmp_path / "3" / "notes.txt").write_text("not an image")
    own, other = tmp_path / "own.csv", tmp_path / "other.csv"
    output_of("eval", run, "--predictions", own)
    text = output_of("eval", run, "--data", tmp_path, "--predictions", other)
    assert " of 40 images correct" in text
    predicted = {row[0].partition(".")[0]: row[2:] for row in table(own)}
    rows = table(other)
    assert rows[0][:6] == ["path", "label", "prediction", "probability", "top2", "probability2"]
    assert len(rows[0]) == 12 and len(rows) == 41
    for row in rows[1:]:
        assert row[2:] == predicted[row[0].partition(".")[0]], "the pixels, so the same numbers"


def test_class_errors_and_confusion_are_those_of_the_predictions(run, digits, tmp_path, output_of):
    file = tmp_path / "p.csv"
    text = output_of("eval", run, "--predictions", file)
    pairs = Counter((row[1], row[2]) for row in table(file)[1:])
    header, *matrix = table(tmp_path / "p.confusion.csv")
    assert header == ["label", *map(str, range(10))]
    for label, *counts in matrix:
        assert [int(count) for count in counts] == [pairs[label, str(k)] for k in range(10)]
    for name, images, wrong, error, taken_for in table(tmp_path / "p.classes.csv")[1:]:
        assert int(images) == len(list((digits / "val" / name).iterdir()))
        missed = {k: pairs[name, str(k)] for k in range(10) if str(k) != name}
        assert int(wrong) == sum(missed.values())
        assert float(error) == pytest.approx(100 * int(wrong) / int(images))
        most = max(missed.values())
        assert missed[int(taken_for)] == most if most else taken_for == ""
        (line,) = [line for line in text.splitlines() if line.startswith(f"{name} ")]
        assert line.split()[:3] == [name, images, f"{float(error):.2f}"]
    classes = output_of("eval", run, "--predictions", file, "--json")["classes"]
    assert sum(one["images"] for one in classes.values()) == 360


def test_probabilities_fall_and_are_shares(run, tmp_path, output_of):
    file = tmp_path / "p.csv"
    output_of("eval", run, "--predictions", file)
    for row in table(file)[1:]:
        shares = [float(share) for share in row[3::2]]
        assert len({*row[2::2]}) == 5
        assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1 + 1e-5


def test_numbers_for_names_are_positions(run, digits, tmp_path, output_of, capsys):
    """As in ImageNet-V2: folders 0 to 999 for the classes in their order."""
    payload = load_checkpoint(list_checkpoints(run / "checkpoints")[0])
    names = [f"digit-{k}" for k in "abcdefghij"]
    checkpoint = tmp_path / "checkpoint-001-00000015.pt"
    save_checkpoint(checkpoint, payload | {"class_names": names})
    expected = output_of("eval", run, "--json")
    file = tmp_path / "p.csv"
    words = ["eval", checkpoint, "--data", digits / "val", "--predictions", file, "--json"]
    found = output_of(*words)
    assert {key: found[key] for key in expected} == expected
    assert {row[1] for row in table(file)[1:]} == {*names}


def test_mistakes_are_one_line(run, digits, tmp_path, refusal_of):
    assert "nowhere: no such folder" in refusal_of("eval", run, "--data", tmp_path / "nowhere")
    assert "no class folders and no CSV" in refusal_of("eval", run, "--data", tmp_path)
    (tmp_path / "ten").mkdir()
    assert "no images in it" in refusal_of("eval", run, "--data", tmp_path)
    shutil.copyfile(next((digits / "val" / "1").iterdir()), tmp_path / "ten" / "x.png")
    line = refusal_of("eval", run, "--data", tmp_path)
    assert "class ten is none of the network's 10 classes" in line
    both = ["--data", tmp_path, f"run.data_root={digits}"]
    assert "both name images" in refusal_of("eval", run, *both)
    (tmp_path / "ten").rename(tmp_path / "1")
    (tmp_path / "1" / "y.jpg").write_bytes(b"\xff\xd8\xff no image")
    assert "y.jpg: cannot be decoded" in refusal_of("eval", run, "--data", tmp_path)
    (tmp_path / "1" / "y.jpg").write_bytes(b"RIFF....WEBP no image")
    assert "y.jpg: cannot be decoded" in refusal_of("eval", run, "--data", tmp_path)
    few = ["eval", run, f"run.data_root={digits}", "data.val_images=359"]
    assert "360 images, but data.val_images is 359" in refusal_of(*few)
