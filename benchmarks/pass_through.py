"""A folder seen through FUSE: every operation is counted, can be delayed, and can fail.

    python -m benchmarks.pass_through FOLDER MOUNT STATE

is the process that serves it, until it is unmounted; use PassThrough. Needs /dev/fuse, libfuse 3
(apt install libfuse3-3) and mfusepy. What is read is not kept in the page cache, as on a network
file system whose client's cache is too small, unless `cached` is set.
"""

from __future__ import annotations

import ctypes.util
import errno
import importlib.util
import mmap
import os
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

KINDS = ("getattr", "open", "read", "release", "readdir")
# one 64-bit number each: counts by kind, the delay in µs, the error to raise and how often,
# and the bytes that a read returns at most (0: all)
FIELDS = (*KINDS, "delay_us", "error", "failures", "most_bytes")
PLACES = {name: 8 * place for place, name in enumerate(FIELDS)}
PATIENCE_S = 30.0


def missing() -> str:
    """What is missing here to mount anything; "" where nothing is."""
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        return "/dev/fuse cannot be used"
    if importlib.util.find_spec("mfusepy") is None:
        return "mfusepy is not installed"
    return "" if ctypes.util.find_library("fuse3") else "libfuse3 is not installed"


class State:
    """Numbers in a file that two processes share."""

    def __init__(self, path: Path) -> None:
        with open(path, "r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8 * len(FIELDS))

    def __getitem__(self, name: str) -> int:
        return struct.unpack_from("q", self._memory, PLACES[name])[0]

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("q", self._memory, PLACES[name], value)


class PassThrough:
    """Mounts `folder` on `mount`, served by another process, while the context is open."""

    def __init__(self, folder: Path, mount: Path, cached: bool = False) -> None:
        self.folder, self.mount, self._cached = folder, mount, cached
        self._state_path = mount.with_name(f"{mount.name}.state")

    def __enter__(self) -> PassThrough:
        self.mount.mkdir(parents=True, exist_ok=True)
        self._state_path.write_bytes(bytes(8 * len(FIELDS)))
        self._state = State(self._state_path)
        words = [self.folder, self.mount, self._state_path, *(["cached"] if self._cached else [])]
        command = [sys.executable, "-m", "benchmarks.pass_through", *map(str, words)]
        root = Path(__file__).parents[1]
        self._process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
        deadline_s = time.monotonic() + PATIENCE_S
        while not os.path.ismount(self.mount):
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self._process.kill()
                raise RuntimeError(f"{self.mount}: could not be mounted")
            time.sleep(0.02)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        subprocess.run(["umount", "-l", str(self.mount)], check=True)
        self._process.terminate()  # a file that is still open would keep it alive
        self._process.wait()

    def delay(self, ms: float) -> None:
        """Delays every operation from now on; operations wait together, not in a row."""
        self._state["delay_us"] = round(1000 * ms)

    def fail(self, error: int, times: int) -> None:
        """Makes the next `times` reads fail with an errno."""
        self._state["error"] = error
        self._state["failures"] = times

    def shorten(self, most_bytes: int) -> None:
        """Lets each read return so many bytes at most; 0: all."""
        self._state["most_bytes"] = most_bytes

    def operations(self) -> dict[str, int]:
        """How many operations there were so far, by kind."""
        return {kind: self._state[kind] for kind in KINDS}


def serve(folder: Path, mount: Path, state: State, cached: bool) -> None:
    """Serves `mount` until it is unmounted."""
    import mfusepy

    class Folder(mfusepy.Operations):
        use_ns = True

        def _operation(self, kind: str) -> None:
            state[kind] += 1  # under the interpreter's lock
            time.sleep(state["delay_us"] / 1e6)
            if kind == "read" and state["failures"] > 0:
                state["failures"] -= 1
                raise mfusepy.FuseOSError(state["error"])

        def getattr(self, path: str, fh: int | None = None) -> dict[str, int]:
            self._operation("getattr")
            try:
                found = os.stat(f"{folder}{path}")
            except OSError as error:
                raise mfusepy.FuseOSError(error.errno or errno.EIO) from None
            times = {f"st_{x}time": getattr(found, f"st_{x}time_ns") for x in "amc"}
            names = ("st_mode", "st_size", "st_nlink", "st_uid", "st_gid")
            return times | {name: getattr(found, name) for name in names}

        def readdir(self, path: str, fh: int) -> Sequence[str]:
            self._operation("readdir")
            return [".", "..", *os.listdir(f"{folder}{path}")]

        def open(self, path: str, flags: int) -> int:
            self._operation("open")
            return os.open(f"{folder}{path}", os.O_RDONLY)

        def read(self, path: str, size: int, offset: int, fh: int) -> bytes:
            self._operation("read")
            return os.pread(fh, min(size, state["most_bytes"] or size), offset)

        def release(self, path: str, fh: int) -> int:
            self._operation("release")
            os.close(fh)
            return 0

    mfusepy.FUSE(
        Folder(), str(mount), foreground=True, ro=True, direct_io=not cached, max_threads=64
    )


if __name__ == "__main__":
    source, target, shared, *rest = sys.argv[1:]
    serve(Path(source), Path(target), State(Path(shared)), cached=bool(rest))
