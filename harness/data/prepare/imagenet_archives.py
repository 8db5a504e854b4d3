"""The three official archives of ImageNet (ILSVRC 2012), unpacked into class folders."""

import io
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from harness.data.prepare.archive import members, open_archive, read_member, refusal
from harness.data.prepare.prepared_folder import PreparedFolder
from harness.errors import UserError

TRAIN = "ILSVRC2012_img_train.tar"  # of 1000 archives WNID.tar, each of files WNID_NUMBER.JPEG
VAL = "ILSVRC2012_img_val.tar"  # of files ILSVRC2012_val_NUMBER.JPEG, without their classes
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_WNID = re.compile(r"n[0-9]{8}")


@dataclass(frozen=True)
class DevKit:
    """Facts from the development kit."""

    train_images: dict[str, int]  # by class (WNID)
    val_classes: list[str]  # WNID of validation images 1, 2, ...


def archive_paths(archives: Path) -> tuple[Path, Path, Path]:
    """Return the paths of train, val and development kit; raise UserError if any is missing."""
    paths = (archives / TRAIN, archives / VAL, archives / DEVKIT)
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{archives}: {', '.join(missing)} missing; download the archives from image-net.org "
            "(which requires an account) into this folder"
        )
    return paths


def fill_imagenet(prepared: PreparedFolder, archives: Path, images: int) -> None:
    """Gather train and val; files gathered earlier are not read again.

    images: the number in train and val together, for the progress bar.
    """
    train, val, devkit_path = archive_paths(archives)
    devkit = read_devkit(devkit_path)
    with tqdm(total=images, unit=" images", disable=None) as bar:
        _fill_val(prepared, val, devkit, bar)
        _fill_train(prepared, train, devkit, bar)
    os.sync()  # hours of work must be on disk before the marker


def read_devkit(path: Path) -> DevKit:
    """Read meta.mat and the ground truth, both by name and in memory."""
    wanted = {"meta.mat": b"", "ILSVRC2012_validation_ground_truth.txt": b""}
    with open_archive(path) as archive:
        for member in members(archive, path):
            folder, name = PurePosixPath(member.name).parts[-2:-1], Path(member.name).name
            if folder == ("data",) and name in wanted:
                wanted[name] = read_member(archive, path, member)
    meta, truth = wanted.values()
    wnids, train_images = _synsets(path, meta)
    try:
        val_classes = [wnids[int(line)] for line in truth.split()]
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: ground truth with an unknown class ({error})") from error
    return DevKit(train_images, val_classes)


def _synsets(path: Path, meta: bytes) -> tuple[dict[int, str], dict[str, int]]:
    """Return WNID by ILSVRC2012_ID and training images by WNID, for the 1000 classes only."""
    from scipy.io import loadmat  # takes half a second to import

    try:
        synsets = loadmat(io.BytesIO(meta))["synsets"].ravel()
        # the file also contains the inner nodes of the WordNet tree: only leaves are classes
        leaves = [s for s in synsets if s["num_children"].item() == 0]
        wnids = {int(s["ILSVRC2012_ID"].item()): str(s["WNID"].item()) for s in leaves}
        images = {str(s["WNID"].item()): int(s["num_train_images"].item()) for s in leaves}
    except Exception as error:  # scipy can raise nearly anything for a damaged file
        raise UserError(
            f"{path}: data/meta.mat is missing or damaged; download it again"
        ) from error
    for wnid in images:
        if not _WNID.fullmatch(wnid):
            raise UserError(f"{path}: data/meta.mat: class {wnid[:120]!a} is not a WNID")
    return wnids, images


def _fill_val(prepared: PreparedFolder, path: Path, devkit: DevKit, bar: tqdm) -> None:
    with open_archive(path) as archive:
        for name, member in _named_members(archive, path):
            match = re.fullmatch(r"ILSVRC2012_val_([0-9]{8})\.JPEG", name)
            if not match or not 1 <= int(match[1]) <= len(devkit.val_classes):
                raise refusal(path, member, "the development kit knows no such validation image")
            place = f"val/{devkit.val_classes[int(match[1]) - 1]}/{name}"
            if not prepared.holds(place, member.size):
                prepared.write(place, read_member(archive, path, member))
            bar.update()


def _fill_train(prepared: PreparedFolder, path: Path, devkit: DevKit, bar: tqdm) -> None:
    with open_archive(path) as archive:
        for name, member in _named_members(archive, path):
            wnid = name.removesuffix(".tar")
            if not name.endswith(".tar") or wnid not in devkit.train_images:
                raise refusal(path, member, "the development kit knows no class of this archive")
            images = devkit.train_images[wnid]
            if prepared.images(f"train/{wnid}") == images:
                bar.update(images)
                continue
            with open_archive(
                f"{path}/{member.name}", archive.extractfile(member)
            ) as class_archive:
                _gather_class(prepared, class_archive, f"{path}/{member.name}", wnid, bar)
            gathered = len(os.listdir(prepared.partial / wnid))
            if gathered != images:
                raise UserError(
                    f"{path}: {member.name} contains {gathered} images, but the development kit "
                    f"lists {images}; download the archive again"
                )
            prepared.rename(wnid, f"train/{wnid}")


def _gather_class(
    prepared: PreparedFolder, archive: tarfile.TarFile, path: str, wnid: str, bar: tqdm
) -> None:
    (prepared.partial / wnid).mkdir(exist_ok=True)
    for name, member in _named_members(archive, path):
        if not re.fullmatch(rf"{wnid}_[0-9]+\.JPEG", name):
            raise refusal(path, member, f"it is not an image of {wnid}")
        if not prepared.holds(f"{wnid}/{name}", member.size):
            prepared.write(f"{wnid}/{name}", read_member(archive, path, member))
        bar.update()


def _named_members(
    archive: tarfile.TarFile, path: Path | str
) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """Yield members with their bare names: repacked archives prefix them with `./` or `val/`.

    Raises a UserError that names the member if a name repeats, in whatever folders.
    """
    seen: set[str] = set()
    for member in members(archive, path):
        name = PurePosixPath(member.name).name
        if name in seen:
            raise refusal(path, member, "it occurs twice")
        seen.add(name)
        yield name, member
