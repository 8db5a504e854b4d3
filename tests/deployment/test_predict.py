"""`harness predict` sees what `harness eval` sees."""

import csv

from PIL import Image


def test_predictions_are_those_of_eval(run, digits, tmp_path, output_of):
    file = tmp_path / "p.csv"
    output_of("eval", run, "--predictions", file)
    with file.open() as stream:
        expected = {row["path"]: row for row in csv.DictReader(stream)}
    found = output_of("predict", run, digits / "val", "--json", "--top", 2)
    assert len(found) == 360
    for one in found:
        row = expected[one["path"].removeprefix(f"{digits / 'val'}/")]
        first, second = one["classes"]
        assert (first["class"], second["class"]) == (row["prediction"], row["top2"])
        assert f"{first['probability']:.6f}" == row["probability"]


def test_one_image_of_another_format_and_size(run, digits, tmp_path, output_of):
    image = tmp_path / "photo.webp"
    digit = Image.open(next((digits / "val" / "7").iterdir())).convert("RGB")
    digit.resize((93, 41)).save(image, lossless=True)
    png = tmp_path / "photo.png"
    digit.resize((93, 41)).save(png)
    lines = output_of("predict", run, image, png, "--top", 20).splitlines()
    assert [line.partition(": ")[0] for line in lines] == [str(image), str(png)]
    first, second = (line.partition(": ")[2] for line in lines)
    assert first == second and first.count(" %") == 10  # all classes there are
    shares = [float(part.split()[1]) for part in first.split(", ")]
    assert abs(sum(shares) - 100) < 0.6  # each is rounded to a tenth


def test_mistakes_are_one_line(run, tmp_path, refusal_of):
    assert "no such image or folder" in refusal_of("predict", run, tmp_path / "x.jpg")
    assert "no images in it" in refusal_of("predict", run, tmp_path)
    (tmp_path / "a.txt").write_text("text")
    assert "a.txt: not an image" in refusal_of("predict", run, tmp_path / "a.txt")
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(8))
    assert "a.heic: HEIC, not JPEG" in refusal_of("predict", run, tmp_path / "a.heic")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    assert "a.png: cannot be decoded" in refusal_of("predict", run, tmp_path / "a.png")
    assert "--top 0: at least 1" in refusal_of("predict", run, tmp_path / "a.png", "--top", 0)
