"""The quickstart's error over seeds, and the digests of its weights: not a measurement of time.

    python -m benchmarks.quickstart [--seeds 1 2 3 4 5] [--ranks 2] [--write]

Sums are exact, so on a CPU of the recorded kind, with the recorded versions, the digests are the
same for any number of ranks and however busy the machine is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.conditions import RESULTS, results_folder, write_results

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"


def train(seed: int, ranks: int, folder: Path) -> dict[str, Any]:
    """Train one seed; return its error, digest and conditions. Raises CalledProcessError."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *launcher, "-m", "harness", "train", str(CONFIG), f"seed={seed}"]
    subprocess.run([*command, "--out", str(folder)], check=True, capture_output=True, cwd=ROOT)
    status, environment = (
        json.loads((folder / name).read_text()) for name in ("status.json", "environment.json")
    )
    return {
        "seed": seed,
        "error": status["error"],
        "weights_sha256": status["weights_sha256"],
        "exact": environment["exact"],
        "versions": environment["versions"],
    }


def main() -> None:
    """Print a row for each seed; --write stores them in benchmarks/results/quickstart.json."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument(
        "--write", nargs="?", type=results_folder, const=RESULTS, metavar="FOLDER", help="see above"
    )
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            row = train(seed, options.ranks, Path(folder) / f"seed-{seed}")
            print(f"seed {seed}: error {row['error']:.2f} %, weights {row['weights_sha256'][:12]}")
            rows.append(row)
    errors = [row["error"] for row in rows]
    spread = f" ± {statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    print(f"error {statistics.mean(errors):.2f}{spread} %")
    if options.write:
        print(write_results("quickstart", {"ranks": options.ranks, "runs": rows}, options.write))


if __name__ == "__main__":
    main()
