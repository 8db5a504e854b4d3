"""The three official archives of ImageNet (ILSVRC 2012), unpacked into class folders."""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from harness.data.prepare.archive import members, open_archive, read_member, refusal
from harness.data.prepare.imagenet_devkit import DEVKIT, DevKit, read_devkit
from harness.data.prepare.prepared_folder import PreparedFolder
from harness.errors import UserError

TRAIN = "ILSVRC2012_img_train.tar"  # of 1000 archives WNID.tar, each of files WNID_NUMBER.JPEG
VAL = "ILSVRC2012_img_val.tar"  # of files ILSVRC2012_val_NUMBER.JPEG, without their classes


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
