"""The kinds of findings of `harness data check`, and what each means for training."""

from __future__ import annotations

from dataclasses import dataclass

HUGE_BYTES = 64 * 2**20  # size of the decoded RGB image: 22.4 million pixels

# severities; all except NOTED make the check fail
REFUSED, LEFT_OUT, DAMAGED, NOTED = "refused by training", "left out", "damaged", "noted"

UNREADABLE = "cannot be read"
EMPTY_SPLIT = "no images in the split"
EMPTY_CLASS = "class without images"
ONE_SIDED = "class in one of train and val only"
SAME_CLASS = "class names equal but for Unicode form"

OTHER_FORMAT = "another format"
MISNAMED = "JPEG or PNG that is not named so"
BROKEN_LINK = "link that leads nowhere"
SUBFOLDER = "images in a subfolder"
LOOSE = "image outside of the class folders"
HIDDEN = "hidden image"
PACKED = "archive or table, perhaps of images"

UNDECODABLE = "cannot be decoded"
DAMAGED_INSIDE = "damaged inside, though it decodes"

LEAKED = "same bytes in val and in training"
TWO_CLASSES = "same bytes in two classes"
SAME_BYTES = "same bytes"
SAME_BUT_CASE = "names equal but for case"
SAME_BUT_FORM = "names equal but for Unicode form"

HUGE = "huge"
PNG_AS_JPEG = "PNG by content, JPEG by name"
JPEG_AS_PNG = "JPEG by content, PNG by name"
CMYK, GRAY, PALETTE, ALPHA = "CMYK", "gray", "palette", "with alpha"
DEEP, ROTATED = "16-bit", "EXIF-rotated"
NO_IMAGE = "no image"
UNUSED_FOLDER = "folder that is not read"


@dataclass(frozen=True)
class Kind:
    """A kind of finding: what it means for training, and its severity (one of the four above)."""

    meaning: str
    counts_as: str = NOTED


# all kinds, in the order of the report
KINDS = {
    UNREADABLE: Kind("make it readable", REFUSED),
    EMPTY_SPLIT: Kind("there is nothing to train or evaluate on", REFUSED),
    EMPTY_CLASS: Kind("add images (.jpg, .jpeg, .png) or remove the folder", REFUSED),
    ONE_SIDED: Kind("both need the same classes under the same names", REFUSED),
    SAME_CLASS: Kind("they look alike but are two classes: merge or rename them", REFUSED),
    OTHER_FORMAT: Kind("not trained on; `harness data import` converts it to PNG", LEFT_OUT),
    MISNAMED: Kind("rename it to .jpg, .jpeg or .png", LEFT_OUT),
    BROKEN_LINK: Kind("repair or remove it", LEFT_OUT),
    SUBFOLDER: Kind("images belong directly in the folder of their class: move them up", LEFT_OUT),
    LOOSE: Kind("move it into the folder of its class", LEFT_OUT),
    HIDDEN: Kind("its name begins with a dot: rename or remove it", LEFT_OUT),
    PACKED: Kind("unpack or remove it", LEFT_OUT),
    UNDECODABLE: Kind(
        "training stops there, or uses another image with data.on_bad_image=skip", DAMAGED
    ),
    DAMAGED_INSIDE: Kind("trained on as it is: download it again", DAMAGED),
    LEAKED: Kind("the validation error is partly measured on training images"),
    TWO_CLASSES: Kind("one of the labels is wrong"),
    SAME_BYTES: Kind("an image that counts several times"),
    SAME_BUT_CASE: Kind("one file on case-insensitive file systems"),
    SAME_BUT_FORM: Kind("NFC and NFD: one file on systems that do not distinguish them"),
    HUGE: Kind(f"more than {HUGE_BYTES // 2**20} MiB as RGB: uses much memory"),
    PNG_AS_JPEG: Kind("trained on"),
    JPEG_AS_PNG: Kind("trained on"),
    CMYK: Kind("converted to RGB"),
    GRAY: Kind("repeated as RGB"),
    PALETTE: Kind("converted to RGB"),
    ALPHA: Kind("alpha is dropped"),
    DEEP: Kind("the upper 8 bits are used"),
    ROTATED: Kind("the rotation is not applied, as in PIL"),
    NO_IMAGE: Kind("not read"),
    UNUSED_FOLDER: Kind("only train/, val/ and unlabelled/ are, without hidden or system folders"),
}


@dataclass(frozen=True)
class Finding:
    """One finding. `path` is relative to the data folder; `detail` may be empty."""

    kind: str
    path: str
    detail: str = ""
