"""The development kit of ImageNet (ILSVRC 2012): classes, and those of the validation images."""

import io
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from harness.data.prepare.archive import members, open_archive, read_member
from harness.errors import UserError

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
_WNID = re.compile(r"n[0-9]{8}")


@dataclass(frozen=True)
class DevKit:
    """Facts from the development kit."""

    train_images: dict[str, int]  # by class (WNID)
    val_classes: list[str]  # WNID of validation images 1, 2, ...


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
