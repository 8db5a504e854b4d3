"""The section `model` of the config: the network, its initial values, and fine-tuning."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from harness.config.section import Options, Section, Text, key

SMALL_RESNETS = ("resnet8", "resnet20", "resnet32", "resnet56")


class ModelConfig(Section):
    """The network and its initialization."""

    name: Text = key("Name of the network; docs/networks.md lists them and shows how to add one.")
    last_gamma: Annotated[int, Field(ge=0, le=1)] = key(
        "Initial γ of each residual block's last batch norm (section 5.1, table 2b).", 0
    )
    weights: Text | None = key(
        "Weights to start from, for fine-tuning: a state dict (.pt, .pth or .safetensors), a "
        "training script's checkpoint or a run folder; a classifier for another number of classes "
        "is re-initialized.",
        None,
    )
    width: Annotated[int, Field(ge=1, le=1024)] = key(
        "Channels of the first stage; only the small ResNets have it.", 16, unit="channels"
    )
    freeze: Literal["none", "backbone"] = key(
        "What of `weights` is not trained: backbone keeps everything before the classifier, with "
        "its running statistics.",
        "none",
    )
    options: Options = key("Further arguments of the network's builder, such as dropout: 0.", {})

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.freeze == "backbone" and self.weights is None:
            yield "freeze: backbone would never be trained; give weights, or set freeze: none"

    def meaningless(self) -> dict[str, str]:
        small = self.name in SMALL_RESNETS
        return {} if small else {"width": f"name: {self.name} ({', '.join(SMALL_RESNETS)} have it)"}
