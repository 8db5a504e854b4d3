"""`harness data`: make, pack and check folders of images."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from harness.commands.parsing import Subparsers
from harness.errors import FAILED, FINISHED


def add(commands: Subparsers) -> None:
    """Add the command to the parser."""
    data = commands.add_parser("data", help="make, pack and check folders of images")
    kinds = data.add_subparsers(
        required=True, metavar="digits|cifar10|imagenet|import|pack|check", dest="kind"
    )
    digits = kinds.add_parser("digits", help="scikit-learn's 1,797 handwritten digits")
    digits.add_argument(
        "--labelled", type=float, default=1.0, metavar="SHARE", help="the rest goes to unlabelled/"
    )
    cifar10 = kinds.add_parser("cifar10", help="downloaded by torchvision, or from an archive")
    cifar10.add_argument("--archive", type=Path, metavar="FILE")
    imagenet = kinds.add_parser("imagenet", help="from the official archives")
    imagenet.add_argument("--archives", type=Path, required=True, metavar="DIR")
    imported = kinds.add_parser("import", help="from another layout (tiny-imagenet, Kaggle, …)")
    imported.add_argument("source", type=Path, metavar="SOURCE")
    imported.add_argument(
        "--val", type=float, metavar="SHARE", help="share to hold out, if there is no val"
    )
    packed = kinds.add_parser("pack", help="into tar archives, for run.data_format=tar")
    packed.add_argument("--to", type=Path, required=True, metavar="OUT", help="folder to write to")
    packed.add_argument("--shards", type=int, metavar="N", help="archives of each split, default 1")
    check = kinds.add_parser("check", help="find what training refuses, skips or fails on")
    check.add_argument(
        "--json", action="store_true", help="list all findings, not only the first 20 of each kind"
    )
    for kind in (digits, cifar10, imagenet, imported, packed, check):
        kind.add_argument("folder", type=Path, metavar="DIR")
    data.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code."""
    if options.kind == "check":
        return _check(options)
    if options.kind == "import":
        from harness.data.prepare.import_layout import import_layout

        print(import_layout(options.source, options.folder, options.val))
        return FINISHED
    if options.kind == "pack":
        from harness.data.prepare.pack import pack

        print(pack(options.folder, options.to, options.shards))
        return FINISHED
    from harness.data.prepare.cifar10 import prepare_cifar10
    from harness.data.prepare.digits import prepare_digits
    from harness.data.prepare.imagenet import prepare_imagenet

    if options.kind == "digits":
        print(prepare_digits(options.folder, options.labelled))
    elif options.kind == "cifar10":
        print(prepare_cifar10(options.folder, options.archive))
    else:
        print(prepare_imagenet(options.folder, options.archives))
    return FINISHED


def _check(options: argparse.Namespace) -> int:
    from harness.data.check.folder import check_folder

    report = check_folder(options.folder)
    print(json.dumps(report.as_json(), indent=2) if options.json else report)
    return FAILED if report.failed else FINISHED
