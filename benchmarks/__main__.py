"""All benchmarks that this machine can run, with few repetitions, written to build/benchmarks.

    python -m benchmarks [--images FOLDER] [--only step memory …]

`python -m benchmarks.check` then compares with the committed figures. Those are measured
one by one, with each benchmark's default repetitions and `--write`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.check import NEW

# few repetitions: about a quarter of an hour in total on 2 free cores
ARGUMENTS = {
    "step": ["--starts", "3", "--repetitions", "4", "--block-seconds", "0.3"],
    "memory": ["--repetitions", "2"],
    "startup": ["--repetitions", "2"],
    "bookkeeping": ["--repetitions", "4"],
    "interruption": ["--repetitions", "2"],
    "sampling": ["--repetitions", "5"],
    "scaling": ["--repetitions", "3", "--block-seconds", "0.5"],
    "loaders": ["--repetitions", "3"],
}


def main() -> None:
    """Run each benchmark in its own process; return exit code 1 if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of JPEGs for the loaders")
    parser.add_argument("--only", nargs="*", choices=ARGUMENTS, default=list(ARGUMENTS))
    options = parser.parse_args()
    failed = []
    for name in options.only:
        print(f"== {name}", flush=True)
        arguments = ARGUMENTS[name]
        if name == "loaders":
            if options.images is None:
                print("not run: needs a folder of JPEGs: make bench IMAGES=FOLDER")
                continue
            arguments = [str(options.images), *arguments]
        command = [sys.executable, "-m", f"benchmarks.{name}", *arguments, "--write", str(NEW)]
        if subprocess.run(command).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
        sys.exit(1)


if __name__ == "__main__":
    main()
