"""The walk of docs/own_data.md: from a folder of photos to a model in use."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from harness.models.cifar_resnet import CifarResNet

PAGE = Path(__file__).parents[1] / "docs" / "own_data.md"


@pytest.mark.soak  # ten commands
def test_the_commands_of_the_page(digits, tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (commands,) = re.findall(r"```\n(harness data import.*?)```", PAGE.read_text(), re.DOTALL)
    for name in ("3", "5", "8"):
        folder = tmp_path / "photos" / f"a {name}"
        folder.mkdir(parents=True)
        for number, file in enumerate(sorted((digits / "train" / name).iterdir())):
            image = Image.open(file).convert("RGB").resize((40 + number % 13, 50 - number % 17))
            image.save(folder / f"{number:03}.{('jpg', 'png', 'webp')[number % 3]}")
    image.save(tmp_path / "new.webp")
    save_file(CifarResNet(20, num_classes=10, width=8).state_dict(), tmp_path / "start.safetensors")
    printed = ""
    for command in commands.splitlines():
        words = command.split(" > ")
        done = subprocess.run(
            [sys.executable, "-m", *words[0].split()], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stderr)
        if len(words) == 2:
            (tmp_path / words[1]).write_text(done.stdout)
        printed += done.stdout
    assert printed.count("classifier fc, which is re-initialized (10 classes there, 3 here)") == 2
    assert "mostly taken for" in printed and re.search(r"new\.webp: a \d ", printed)
    assert "onnxruntime predicts the same classes as PyTorch" in printed
    assert (tmp_path / "report.html").stat().st_size > 10_000
    rows = (tmp_path / "predictions.confusion.csv").read_text().splitlines()
    assert rows[0] == "label,a 3,a 5,a 8" and len(rows) == 4
    status = json.loads((tmp_path / "runs" / "photos" / "status.json").read_text())
    assert status["state"] == "finished"
