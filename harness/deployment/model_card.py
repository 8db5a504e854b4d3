"""The model card: what was trained, on what, with which result, and what was not measured."""

from __future__ import annotations

from collections.abc import Iterator

from harness.config.loading import dump_config
from harness.data.sources.digest import combined_digest
from harness.deployment.network_facts import NetworkFacts

NOT_RECORDED = "not recorded beside the checkpoint"
SHOWN = 50  # class names


def render_card(facts: NetworkFacts) -> str:
    """Return README.md of a hub's folder."""
    config = facts.trained.config
    name, classes = config.model.name, config.data.classes
    lines = [
        *("---", "library_name: timm", "pipeline_tag: image-classification"),
        *("tags:", "- timm", "- image-classification", "---"),
        f"# {name}, {classes} classes",
        "",
        "Trained with the large-minibatch harness: one recipe, one curve on any number of ranks.",
        "",
        *_result(facts),
        *_use(facts),
        *_data(facts),
        "## Hardware and interruptions",
        "",
        *(f"- {line}" for line in (*_hardware(facts), *_interruptions(facts))),
        "",
        *_not_measured(facts),
        "## Recipe",
        "",
        *("```yaml", dump_config(config).rstrip(), "```"),
    ]
    return "\n".join(lines) + "\n"


def _result(facts: NetworkFacts) -> Iterator[str]:
    yield from ("## Result", "")
    if (evaluation := facts.evaluation) is None:
        yield f"The error of these weights is {NOT_RECORDED}."
    else:
        low, high = evaluation.error_interval()
        yield (
            f"Error {evaluation.error:.2f} % (95 % interval {low:.2f} to {high:.2f} %), "
            f"{evaluation.correct} of {evaluation.total} validation images correct."
        )
    config = facts.trained.config
    done, whole = facts.trained.step, config.total_steps
    yield f"After {done:,} of {whole:,} steps ({done / config.steps_per_epoch:g} epochs)."
    if facts.weights_sha256:
        yield f"SHA-256 of the weights at the end of the run: {facts.weights_sha256}."
    yield ""


def _use(facts: NetworkFacts) -> Iterator[str]:
    config = facts.trained.config
    data = config.data
    yield from ("## Use", "", "```python", "import timm, torch, torchvision", "")
    yield "model = timm.create_model('local-dir:FOLDER', pretrained=True).eval()"
    yield "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
    yield ""
    yield "# or with torchvision"
    yield "from safetensors.torch import load_file"
    yield f"model = torchvision.models.{config.model.name}(num_classes={data.classes})"
    yield from ("model.load_state_dict(load_file('FOLDER/model.safetensors'))", "```", "")
    yield (
        f"Images: RGB, short side resized to {data.resize} pixels (bilinear), central crop of "
        f"{data.crop}, mean {list(data.mean)}, std {list(data.std)}; EXIF rotation is not applied."
    )
    if names := facts.classes:
        more = f" and {len(names) - SHOWN} more, in config.json" if len(names) > SHOWN else ""
        yield f"Classes, in the order of the logits: {', '.join(names[:SHOWN])}{more}."
    else:
        yield f"The names of the classes are {NOT_RECORDED}."
    yield ""


def _data(facts: NetworkFacts) -> Iterator[str]:
    data, digests = facts.trained.config.data, facts.trained.class_digests
    yield from ("## Data", "")
    for split, images in (("train", data.train_images), ("val", data.val_images)):
        found = f"SHA-256 {combined_digest(digests[split])}" if split in digests else NOT_RECORDED
        yield f"- {split}: {images:,} images; digest of classes, names, labels and sizes: {found}"
    if data.unlabelled_images:
        yield f"- {data.unlabelled_images:,} further training images without labels"
    if weights := facts.trained.config.model.weights:
        yield f"- started from the weights `{weights}`, whose own data are not described here"
    if facts.trained.config.distill:
        yield "- taught by another network, whose own data are not described here"
    yield ""


def _hardware(facts: NetworkFacts) -> Iterator[str]:
    hardware = facts.environment.get("hardware", {})
    versions = facts.environment.get("versions", {})
    if not hardware:
        yield f"hardware: {NOT_RECORDED}"
        return
    gpu = f"{hardware.get('gpus')} × {hardware['gpu']}" if hardware.get("gpu") else "no GPU"
    yield f"{gpu}, {hardware.get('cpus')} CPUs ({hardware.get('cpu')}) on the node of rank 0"
    known = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    yield f"versions: {known}"


def _interruptions(facts: NetworkFacts) -> Iterator[str]:
    if not facts.starts:
        yield f"ranks and interruptions: {NOT_RECORDED}"
        return
    ranks = ", then ".join(
        f"{start.get('world_size')} from step {start['step']:,}" for start in facts.starts
    )
    yield f"ranks: {ranks}"
    resumed = len(facts.starts) - 1
    yield "not interrupted" if not resumed else f"interrupted and resumed {resumed} times"


def _not_measured(facts: NetworkFacts) -> Iterator[str]:
    yield from ("## Not measured", "")
    if facts.trained.step < facts.trained.config.total_steps:
        yield "- These weights are from the middle of a run; its end may be better."
    yield (
        "- Whether the validation images influenced choices, such as the learning rate or the "
        "checkpoint: the error on other images is then larger."
    )
    yield "- Errors on images from other sources, on damaged or unusual images, and by groups."
    yield "- How well the probabilities agree with the frequencies of errors (calibration)."
    yield ""
