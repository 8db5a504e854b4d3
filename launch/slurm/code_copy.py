"""The copy of the code that submitted jobs run, so that what is queued does not change."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from harness.errors import UserError
from harness.runs.environment import COMMIT, code_commit, package_files

PACKAGES = ("harness", "launch")
# python -m puts the working directory, often the checkout, before all else on Python's path;
# python FOLDER puts the folder there (python -P, which does neither, is not in Python 3.10)
START = b'''\
"""python FOLDER MODULE ...: as python -m MODULE ..., with the code of this folder."""

import runpy
import sys

sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
'''


@dataclass(frozen=True)
class CodeCopy:
    """A copy of the code in `folder`, named after its content.

    `files` holds the bytes by relative names.
    """

    folder: Path
    files: dict[str, bytes] = field(repr=False)

    @classmethod
    def of_this_code(cls, records: Path, plug_ins: tuple[str, ...] = ()) -> CodeCopy:
        """Return a copy below `records` of the code as it is now, not written yet.

        `plug_ins` are the modules of further packages to copy.
        """
        files = {
            name: path.read_bytes()
            for package in (*PACKAGES, *plug_ins)
            for name, path in package_files(package)
        }
        # git does not know it: the copy is in no repository, or in another one
        files[f"harness/{COMMIT}"] = f"{code_commit() or ''}\n".encode()
        files["__main__.py"] = START
        digest = hashlib.sha256()
        for name, content in sorted(files.items()):
            digest.update(f"{name}\0{hashlib.sha256(content).hexdigest()}\n".encode())
        return cls(records.absolute() / f"code-{digest.hexdigest()[:12]}", files)

    def write(self) -> None:
        """Write the copy, whole or not at all; an existing one is used again.

        Raises UserError where it cannot be written, or where the one there was changed.
        """
        temporary = self.folder.with_name(f".{self.folder.name}.{os.getpid()}.tmp")
        try:
            if not self.folder.exists():
                for name, content in self.files.items():
                    path = temporary / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                    path.chmod(0o444)
                temporary.rename(self.folder)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # made at the same moment
                raise UserError(
                    f"{self.folder.parent}: cannot be written: {error.strerror}; "
                    "take another folder"
                ) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._check()

    def _check(self) -> None:
        for name, content in self.files.items():
            path = self.folder / name
            if not path.is_file() or path.read_bytes() != content:
                raise UserError(
                    f"{path}: was changed or removed since it was copied; remove {self.folder}, "
                    "and cancel the jobs that were to start from it"
                )
