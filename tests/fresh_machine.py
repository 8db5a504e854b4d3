"""The README's two commands on a fresh machine: a minimal Debian 12, in a chroot of its own.

    make test-fresh    (root, mmdebstrap, util-linux; 15 GB of disk)

The machine has the README's prerequisites, nothing else, and a clone of HEAD. It is unpacked for
each run and removed after it; build/fresh-machine keeps what takes long to get, the Debian image
and pip's downloads, and the commands' output. Package indexes, proxies and certificates are this
machine's. Where its pip has constraints, PIP_CONSTRAINT=/dev/null gets the newest packages.

The result goes to benchmarks/results/fresh_machine.json. Exit code 1 where a command fails.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = REPOSITORY / "build" / "fresh-machine"
RESULT = REPOSITORY / "benchmarks" / "results" / "fresh_machine.json"
SUITE = "bookworm"  # Debian 12
PREREQUISITES = ("python3-venv", "git", "make", "ca-certificates")
COMMANDS = ("make quickstart", "make test")
PROGRAMS = ("mmdebstrap", "unshare", "chroot", "mount", "git", "tar")
NAMESPACES = ("unshare", "--mount", "--pid", "--fork", "--kill-child")
CLONE = "root/harness"  # below the root of the fresh machine
# what a user of this machine has set for pip and for TLS
PIP_FILES = ("etc/pip.conf", "etc/xdg/pip", "root/.config/pip", "root/.pip")
SETTINGS = re.compile(r"PIP_\w+|SSL_CERT_\w+|\w+_CA_BUNDLE|\w+_proxy", re.IGNORECASE)
AUTHORITIES = "usr/local/share/ca-certificates"  # this machine's own, beside Debian's
# a path, on its own or in a file: URL
PATH = re.compile(r"(?:(?<=file://)|(?<![\w:/.-]))/[\w./+-]+")


def main() -> int:
    """Runs the commands, shows their output, and writes the result."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None]:
        print(f"error: not found: {', '.join(missing)}; apt install mmdebstrap git util-linux")
        return 2
    if os.geteuid() != 0:
        print("error: a chroot needs root; run it as root")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    BUILD.mkdir(parents=True, exist_ok=True)
    machine = Machine(BUILD / "root", debian_image())
    try:
        commit = machine.clone_head()
        commands = {command: machine.run(command) for command in COMMANDS}
        version = "import torch, platform; print(platform.python_version(), torch.__version__)"
        python, torch = machine.says(".venv/bin/python", "-c", version).split() or ("", "")
        debian = machine.says("cat", "/etc/debian_version")
    finally:
        machine.remove()
    result = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit,
        "debian": debian,
        "packages": PREREQUISITES,
        "python": python,
        "torch": torch,
        "cores": len(os.sched_getaffinity(0)),
        "commands": commands,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(RESULT.read_text())
    return int(any(command["exit_code"] for command in commands.values()))


def debian_image() -> Path:
    """A tar archive of Debian 12 with the prerequisites, built where there is none yet."""
    image = BUILD / f"{SUITE}.tar"
    if not image.exists():
        part = BUILD / f"{SUITE}.part.tar"
        options = ["--variant=minbase", f"--include={','.join(PREREQUISITES)}"]
        call("mmdebstrap", "--mode=root", *options, SUITE, part, *debian_sources())
        part.rename(image)
    return image


def debian_sources() -> list[Path]:
    """This machine's apt sources where it is the same Debian; else mmdebstrap's own (none)."""
    if f"VERSION_CODENAME={SUITE}" not in Path("/etc/os-release").read_text().split():
        return []
    sources = Path("/etc/apt/sources.list"), Path("/etc/apt/sources.list.d/debian.sources")
    return [path for path in sources if path.exists()]


class Machine:
    """A fresh machine below the folder `root`, unpacked from `image`.

    Its processes are in namespaces of their own: they see no others, nobody else sees its mounts,
    and both vanish with the command.
    """

    def __init__(self, root: Path, image: Path) -> None:
        self.root = root
        self.remove()
        root.mkdir()
        call("tar", "--extract", f"--file={image}", f"--directory={root}", "--numeric-owner")
        self._settings = {key: text for key, text in os.environ.items() if SETTINGS.fullmatch(key)}
        self._take_settings()
        (downloads := BUILD / "pip-cache").mkdir(exist_ok=True)
        self._mounted = {downloads: root / "root/.cache/pip", Path("/dev"): root / "dev"}
        self._mounted |= {path: root / str(path)[1:] for path in self._named_by_pip()}
        for source, target in self._mounted.items():
            if source.is_dir():
                target.mkdir(parents=True, exist_ok=True)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()

    def remove(self) -> None:
        """Removes the folder; nothing is mounted below it where this process looks."""
        call("rm", "-rf", "--one-file-system", self.root)

    def clone_head(self) -> str:
        """Clones HEAD and returns its commit; uncommitted changes are not in it."""
        git = ["git", "-C", str(REPOSITORY)]
        if subprocess.check_output([*git, "status", "--porcelain"]):
            print("note: HEAD is tested, without what is not committed", flush=True)
        call("git", "clone", "--quiet", "--no-hardlinks", REPOSITORY, self.root / CLONE)
        return subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()

    def run(self, command: str) -> dict[str, Any]:
        """Runs a command of the README in the clone, and returns how it ended."""
        log = BUILD / f"{command.split()[-1]}.log"
        print(f"{command}, with its output in {log}", flush=True)
        begun_s = time.monotonic()
        with log.open("w", buffering=1) as kept, self._started(command.split()) as process:
            assert process.stdout is not None
            for line in process.stdout:
                kept.write(line)
                print(line, end="", flush=True)
        ended = {"exit_code": process.returncode, "seconds": round(time.monotonic() - begun_s)}
        return ended | outcomes(log.read_text())

    def says(self, *command: str) -> str:
        """What a command prints; empty where it fails."""
        with self._started(list(command)) as process:
            output, _ = process.communicate()
        return "" if process.returncode else output.strip()

    @contextmanager
    def _started(self, command: list[str]) -> Iterator[subprocess.Popen[str]]:
        """A process in the clone's folder; it does not outlive the block."""
        root = shlex.quote(str(self.root))
        binds = [shlex.join(map(str, pair)) for pair in self._mounted.items()]
        mounts = [f"--rbind {pair}" for pair in binds]
        mounts += [f"-t proc proc {root}/proc", f"-t tmpfs shm {root}/dev/shm"]
        inside = f"cd /{CLONE} && {shlex.join(command)}"
        lines = [*(f"mount {mount}" for mount in mounts)]
        lines.append(f"exec chroot {root} sh -c {shlex.quote(inside)}")
        environment = {"HOME": "/root", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        process = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "sh",
                "-ec",
                "\n".join(lines),
            ],
            env=environment | self._settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            yield process
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()

    def _take_settings(self) -> None:
        """pip's configuration, name servers and certificates of this machine."""
        home = str(Path.home())[1:]
        for name in (*PIP_FILES, "etc/resolv.conf", "etc/hosts", AUTHORITIES):
            source, target = Path("/", name.replace("root", home, 1)), self.root / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.exists():
                shutil.copy(source, target)
        call("chroot", self.root, "update-ca-certificates")

    def _named_by_pip(self) -> set[Path]:
        """What pip's settings name on this machine's disk, such as an index or a folder of wheels.

        Of each path the uppermost folder that the fresh machine lacks, as the pages of an index
        refer to files beside it.
        """
        texts = list(self._settings.values())
        for name in PIP_FILES:
            files = [self.root / name, *(self.root / name).glob("**/*")]
            texts += [path.read_text() for path in files if path.is_file()]
        found = set()
        for path in {Path(name) for name in PATH.findall("\n".join(texts))}:
            lacking = [p for p in (path, *path.parents) if not Path(self.root, str(p)[1:]).exists()]
            if path.exists() and lacking:
                found.add(lacking[-1])
        return found


def outcomes(output: str) -> dict[str, int]:
    """The counts of pytest's last line, such as `1 failed, 98 passed, 3 skipped in 61.02s`."""
    lines = re.findall(r"^=*\s*((?:\d+ \w+, )*\d+ \w+) in [\d.]+s", output, re.MULTILINE)
    pairs = [part.split() for part in lines[-1].split(", ")] if lines else []
    return {word: int(number) for number, word in pairs}


def call(*command: str | Path) -> None:
    """Runs a command that has to succeed; its output is shown."""
    subprocess.run(list(map(str, command)), check=True)


if __name__ == "__main__":
    sys.exit(main())
