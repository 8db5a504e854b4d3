"""Translates the recipe of another training script into a config, and says what gets lost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from harness.drafts.arguments import Arguments, Recorded, getter, read_arguments
from harness.drafts.draft import Draft
from harness.drafts.from_folder import FolderFacts, inspect_folder
from harness.errors import UserError
from harness.models.registry import find_family
from harness.models.torchvision_networks import RESNETS

IMAGENET = {"train_images": 1_281_167, "val_images": 50_000, "classes": 1000}
# arguments that change no result, or whose meaning is in others
HOUSEKEEPING = """
backend bench cache_dataset checkpoint_hist class_map data data_dir data_path dataset
dataset_download device dist_backend dist_url distributed epoch_repeats eval_metric experiment fuser
gpu input_key local_rank log_interval log_wandb model_dtype no_prefetcher output output_dir pin_mem
print_freq rank recovery_interval resume save_images seed start_epoch target_key torchcompile
torchscript train_split val_split validation_batch_size wandb_project wandb_tags workers world_size
worker_seeding use_deterministic_algorithms use_multi_epochs_loader use_v2
"""


@dataclass
class Translation:
    """A config's values, and lines on what maps, what differs in meaning and what is missing.

    `used` are the arguments that a line or a value stands for.
    """

    arguments: Arguments
    values: dict[str, dict[str, object]] = field(
        default_factory=lambda: {"data": {}, "model": {}, "recipe": {}, "run": {}}
    )
    maps: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)

    def set(self, key: str, value: object, *names: str) -> None:
        """Set the dotted `key`, for the arguments `names`."""
        section, _, last = key.partition(".")
        self.values[section][last] = value
        self.used |= {*names}
        given = ", ".join(f"{n} {self.arguments[n]}" for n in names if n in self.arguments)
        theirs = given or ("the default" if names else "derived")
        self.maps.append(f"{theirs} -> {key}: {value}")

    def differ(self, line: str, *names: str) -> None:
        """Note what differs in meaning, for the arguments `names`."""
        self.differs.append(line)
        self.used |= {*names}

    def missing(self) -> list[str]:
        """Return the arguments that are in effect and have no counterpart."""
        return [
            f"{name}: {value}"
            for name, value in self.arguments.items()
            if name not in self.used.union(HOUSEKEEPING.split())
            and value not in (None, False, 0, "", [])
            and value != "none"
        ]


def draft_from(file: Path, folder: Path | None, model: str | None, ranks: int | None) -> str:
    """Return a config for the arguments in `file`, as `ranks` ranks ran them, on `folder`.

    Without a folder, the counts are ImageNet's. Raises UserError.
    """
    recorded = read_arguments(file)
    translation = Translation(recorded.values)
    facts = inspect_folder(folder) if folder else None
    _data(translation, facts, recorded)
    _model(translation, recorded, model)
    world_size = ranks or 1
    _minibatch_and_lr(translation, recorded, world_size)
    _decay(translation, recorded)
    _optimizer(translation, recorded)
    _augmentation(translation, recorded)
    _differences_of_program(translation, recorded)
    notes = [f"From {file}, the arguments of {recorded.name} on {world_size} ranks (--ranks)."]
    for title, lines in (
        ("Maps:", translation.maps),
        ("Differs in meaning:", translation.differs),
        ("No counterpart:", translation.missing()),
    ):
        notes += [title, *(f"  {line}" for line in lines or ["nothing"])]
    where = folder or "ImageNet's counts; give DATA_DIR for those of other images"
    title = f"{translation.values['model']['name']} on {where}, drafted by `harness init --from`"
    return Draft(title, translation.values, notes=tuple(notes)).render(None)


def _data(translation: Translation, facts: FolderFacts | None, recorded: Recorded) -> None:
    number = getter(recorded.values)
    classes = int(number("num_classes", 0))
    if facts is None:
        if classes not in (0, IMAGENET["classes"]):
            raise UserError(f"--from: num_classes is {classes}, so give DATA_DIR, to be counted")
        translation.values["data"] |= IMAGENET
    else:
        counts = (facts.train_images, facts.val_images, len(facts.classes))
        translation.values["data"] |= dict(zip(IMAGENET, counts, strict=True))
        translation.values["run"]["data_root"] = str(facts.folder)
    translation.used.add("num_classes")
    if recorded.program == "timm":
        crop = int(number("img_size", 224))
        share = number("crop_pct", 0.875)
        translation.set("data.crop", crop, "img_size")
        translation.set("data.resize", math.floor(crop / share), "crop_pct")
        for name in ("mean", "std"):
            if isinstance(value := recorded.values.get(name), list):
                translation.set(f"data.{name}", value, name)
        return
    crop, evaluated = int(number("train_crop_size", 224)), int(number("val_crop_size", 224))
    translation.set("data.crop", crop, "train_crop_size", "val_crop_size")
    resize = max(int(number("val_resize_size", 256)), crop)
    translation.set("data.resize", resize, "val_resize_size")
    if crop != evaluated:
        translation.differ(f"val_crop_size {evaluated}: data.crop is for training, too: {crop}")


def _model(translation: Translation, recorded: Recorded, model: str | None) -> None:
    name = model or str(recorded.values.get("model", "resnet18"))
    find_family(name)
    translation.set("model.name", name, "model")
    if recorded.program == "torchvision" and name in RESNETS:
        translation.set("model.last_gamma", 1)
    for key in ("pretrained", "initial_checkpoint", "weights"):
        if recorded.values.get(key):
            translation.differ(
                f"{key} {recorded.values[key]}: set model.weights to a file of these weights", key
            )


def _minibatch_and_lr(translation: Translation, recorded: Recorded, ranks: int) -> None:
    values, number = recorded.values, getter(recorded.values)
    timm = recorded.program == "timm"
    images = int(number("batch_size", 128 if timm else 32))
    minibatch = images * ranks * int(number("grad_accum_steps", 1))
    translation.set("recipe.minibatch", minibatch, "batch_size", "grad_accum_steps")
    worker = minibatch if values.get("sync_bn") else images
    translation.set("recipe.worker_batch", worker, "batch_size", "sync_bn")
    translation.set("recipe.epochs", int(number("epochs", 300 if timm else 90)), "epochs")
    lr, used = number("lr", 0.0 if timm else 0.1), {"lr"}
    if not lr:  # timm scales it
        base_size, rule = number("lr_base_size", 256), values.get("lr_base_scale") or "linear"
        ratio = minibatch / base_size
        lr = number("lr_base", 0.1) * (math.sqrt(ratio) if rule == "sqrt" else ratio)
        used |= {"lr_base", "lr_base_size", "lr_base_scale"}
    warm = number("warmup_epochs", 5) if timm else number("lr_warmup_epochs", 0)
    start = number("warmup_lr", 1e-5) if timm else lr * number("lr_warmup_decay", 0.01)
    names = {"warmup_epochs", "warmup_lr", "lr_warmup_epochs", "lr_warmup_decay"}
    translation.used.update(names, {"lr_warmup_method", "warmup_prefix"})
    reference = minibatch
    if warm:
        # the ramp starts at the reference lr, which belongs to a smaller reference minibatch
        reference = min(max(round(minibatch * start / lr), 1), minibatch)
        translation.set("recipe.warmup_epochs", max(round(warm), 1), *(names & values.keys()))
        translation.differ("warm-up: here the lr rises every step, there every epoch")
    translation.set("recipe.reference_lr", lr * reference / minibatch, *sorted(used))
    translation.set("recipe.reference_minibatch", reference)


def _decay(translation: Translation, recorded: Recorded) -> None:
    values, number = recorded.values, getter(recorded.values)
    timm, epochs = recorded.program == "timm", int(translation.values["recipe"]["epochs"])  # type: ignore[call-overload]
    name = "sched" if timm else "lr_scheduler"
    kind = str(values.get(name, "cosine" if timm else "steplr")).lower()
    lowest = "min_lr" if timm else "lr_min"
    if kind in ("cosine", "cosineannealinglr"):
        translation.set("recipe.decay", "cosine", name)
        if number(lowest, 0):
            translation.differ(f"{lowest} {values[lowest]}: here the cosine falls to 0", lowest)
        return
    translation.used.update({name, lowest, "lr_gamma", "decay_rate"})
    factor = number("decay_rate" if timm else "lr_gamma", 0.1)
    if kind in ("steplr", "step"):
        size = "decay_epochs" if timm else "lr_step_size"
        width = max(int(number(size, 90 if timm else 30)), 1)
        places = list(range(width, epochs, width))
    elif kind == "multistep" and isinstance(values.get("decay_milestones"), list):
        size, places = "decay_milestones", [int(place) for place in values["decay_milestones"]]  # type: ignore[attr-defined]
        places = [place for place in places if place < epochs]
    else:
        places, size = [], name
        translation.differ(f"{name} {kind}: here the lr stays; choose recipe.decay yourself")
    translation.set("recipe.milestones", places, size)
    translation.set("recipe.decay_factor", factor, "decay_rate" if timm else "lr_gamma")


def _optimizer(translation: Translation, recorded: Recorded) -> None:
    values, number = recorded.values, getter(recorded.values)
    timm = recorded.program == "timm"
    name = str(values.get("opt", "sgd")).lower()
    if name in ("sgd", "sgd_nesterov", "sgd-nesterov", "nesterov", "momentum"):
        nesterov = name != "momentum" if timm else "nesterov" in name
        translation.set("recipe.nesterov", nesterov, "opt")
    else:
        translation.differ(f"opt {name}: here it is SGD; its learning rate is for {name}", "opt")
    translation.set("recipe.momentum", number("momentum", 0.9), "momentum")
    decay = "weight_decay" if timm or "weight_decay" in values else "wd"
    translation.set("recipe.weight_decay", number(decay, 2e-5 if timm else 1e-4), decay)
    smoothing = "smoothing" if timm else "label_smoothing"
    translation.set("recipe.label_smoothing", number(smoothing, 0.1 if timm else 0.0), smoothing)
    if values.get("amp"):
        dtype = str(values.get("amp_dtype", "float16"))
        translation.set("run.precision", dtype, "amp", "amp_dtype", "amp_impl")


def _augmentation(translation: Translation, recorded: Recorded) -> None:
    values, number = recorded.values, getter(recorded.values)
    for theirs, ours in (("scale", "crop_area"), ("ratio", "crop_ratio")):
        if isinstance(value := values.get(theirs), list):
            translation.set(f"data.{ours}", value, theirs)
    flip = number("hflip", 0.5)
    translation.set("data.flip", flip > 0, "hflip")
    if flip not in (0.0, 0.5):
        translation.differ(f"hflip {flip:g}: here half of the images are flipped", "hflip")
    interpolation = values.get("train_interpolation") or values.get("interpolation") or "bilinear"
    if interpolation != "bilinear":
        names = ("train_interpolation", "interpolation")
        translation.differ(f"interpolation {interpolation}: here bilinear", *names)
    translation.used.update({"interpolation", "train_interpolation"})


def _differences_of_program(translation: Translation, recorded: Recorded) -> None:
    """Note what holds for every run of the program."""
    if recorded.program == "timm":
        translation.differ("weight decay: timm spares all biases, γ and β; here γ and β alone")
    elif recorded.values.get("norm_weight_decay") != 0:
        translation.differ("weight decay: torchvision's includes γ and β of batch norm; here not")
    translation.differ("batch norm: here over worker_batch images, on any number of ranks")
    translation.differ("an epoch: here floor(N / minibatch) steps, the rest is left out")
    translation.differ("initial values and random crops: drawn otherwise")
