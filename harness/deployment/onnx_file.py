"""A trained network as an ONNX file that takes pixels, compared with PyTorch on real images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.data.batch_plan import BatchPlan
from harness.data.render import Renderer
from harness.data.sampling import resizes
from harness.deployment.network_facts import gather_facts
from harness.deployment.test_images import load_test_images, load_validation, warn
from harness.errors import UserError
from harness.execution.preprocess import Preprocess
from harness.execution.trained_model import TrainedModel
from harness.models.registry import build_plain
from harness.output_file import write_output
from harness.recipe.minibatch import AUTO_MICRO_BATCH

if TYPE_CHECKING:
    from harness.config.schema import Config

CHECKED = 64  # images
CPU = torch.device("cpu")
TOLERANCE = 1e-3  # of the largest logit: rounding in float32, summed over the layers
INSTALL = "pip install -e '.[onnx]'"


class PixelNetwork(nn.Module):
    """A network with its normalization: uint8 RGB images (B, 3, H, W) to logits (B, K)."""

    def __init__(self, network: nn.Module, config: Config) -> None:
        super().__init__()
        self.network = network
        preprocess = Preprocess(config, CPU)
        self.register_buffer("mean", preprocess.mean.float())
        self.register_buffer("scale", preprocess.scale.float())
        self.mean: Tensor
        self.scale: Tensor

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images.to(torch.float32) - self.mean) * self.scale)


def export_onnx(trained: TrainedModel, file: Path, data: Path | None) -> str:
    """Write an ONNX file with a dynamic batch, after comparing it with PyTorch; return a line.

    The comparison is on validation images, or on those in the folder `data`. Raises UserError
    where the extra is not installed, RuntimeError where the results differ.
    """
    _check_installed()
    pixels, what = _images(trained, data)
    network = build_plain(trained.config).float()
    network.load_state_dict(trained.model.state_dict(), strict=True)
    model = PixelNetwork(network, trained.config).eval()
    content = _convert(model, pixels[:2], gather_facts(trained).metadata())
    difference = _compare(model, content, pixels)
    write_output(file, "--to", content)
    name = trained.config.model.name
    return (
        f"{file}: {name}, uint8 RGB images (batch, 3, {pixels.shape[2]}, {pixels.shape[3]}) to "
        f"logits, from {trained.checkpoint}\n"
        f"onnxruntime predicts the same classes as PyTorch for {what}; logits differ by at most "
        f"{difference:.1e}"
    )


def _check_installed() -> None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"ONNX export needs {error.name}: {INSTALL}") from None


def _convert(model: PixelNetwork, example: Tensor, metadata: dict[str, str]) -> bytes:
    program: Any = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
    )
    proto = program.model_proto
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value)
    content: bytes = proto.SerializeToString()
    return content


def _compare(model: PixelNetwork, content: bytes, pixels: Tensor) -> float:
    """Return the largest difference between onnxruntime's logits and PyTorch's."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (theirs,) = session.run(None, {"images": pixels.numpy()})
    with torch.no_grad():
        ours: NDArray[np.float32] = model(pixels).numpy()
    difference = float(np.abs(ours - theirs).max())
    if (ours.argmax(1) != theirs.argmax(1)).any() or difference > TOLERANCE * np.abs(ours).max():
        raise RuntimeError(f"onnxruntime's logits differ from PyTorch's by up to {difference:.3g}")
    return difference


def _images(trained: TrainedModel, data: Path | None) -> tuple[Tensor, str]:
    """Return pixels, uint8 (B, 3, crop, crop), and what they are."""
    config = trained.config
    try:
        source = load_validation(trained) if data is None else load_test_images(trained, data)
    except UserError as error:
        if data is not None:
            raise
        warn(f"not checked on validation images: {error}; --data DIR names others")
        crop = config.data.crop
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(0, 256, (CHECKED, 3, crop, crop), generator=generator)
        return noise.to(torch.uint8), f"{CHECKED} images of noise"
    count = min(CHECKED, len(source))
    ids = np.linspace(0, len(source) - 1, count).round().astype(np.int64)  # of all classes
    plan = BatchPlan(config, source.first(0), source, 0, 1, AUTO_MICRO_BATCH, False)
    spec = resizes(ids, source.heights[ids], source.widths[ids], config.data)
    return Renderer(config, plan)(spec).images.contiguous(), f"{count} images of {source.location}"
