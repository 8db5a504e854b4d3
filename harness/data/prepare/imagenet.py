"""ImageNet as image folders, from its official archives."""

from pathlib import Path

from harness.data.prepare.imagenet_archives import archive_paths, fill_imagenet
from harness.data.prepare.layouts import recognise
from harness.data.prepare.prepared_folder import Counts, PreparedFolder, prepare
from harness.errors import UserError

IMAGENET = Counts(train=1_281_167, val=50_000, classes=1_000)


def prepare_imagenet(folder: Path, archives: Path, *, expected: Counts = IMAGENET) -> str:
    """Prepare ImageNet from the folder with the official train, val and development kit archives.

    Images keep their names and bytes. Continues where an earlier call stopped. Returns the line to
    print. Raises UserError for a missing, damaged or hostile archive, for unexpected counts and for
    a folder in use.
    """

    def fill(prepared: PreparedFolder) -> Counts:
        try:
            archive_paths(archives)
        except UserError as error:
            if archives.is_dir() and (layout := recognise(archives)):
                raise UserError(f"{error}; {layout.advice(archives)}") from None
            raise
        fill_imagenet(prepared, archives, expected.train + expected.val)
        return expected

    return prepare(folder, "imagenet", fill)
