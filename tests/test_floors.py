"""The floors of the house: an upper may import a lower one, never the other way."""

import ast
from collections.abc import Collection
from pathlib import Path

import pytest

HARNESS = Path(__file__).parents[1] / "harness"
# from the ground to the roof; names on one line do not import each other unless listed later
FLOORS = [
    ["errors", "atomic_file", "startup", "communication", "host_memory", "provenance"],
    ["process_identity", "unfailing_output"],
    ["config_errors", "output_file", "slurm_step"],
    ["strict_yaml"],
    ["config"],
    ["stages", "recipe"],
    ["models"],
    ["data", "prediction", "lr_picture"],
    ["plan", "distributed", "interrupt", "checkpoint", "compilation"],
    ["run_ownership"],
    ["metrics", "run_folder", "rendezvous", "graphs"],
    ["roll_call", "watchdog"],
    ["objective"],
    ["step"],
    ["evaluate", "micro_batch"],
    ["graph_trial"],
    ["journal"],
    ["trained", "profiling", "headline"],
    ["teacher"],
    ["run", "soft_targets"],
    ["train"],
    ["verify", "report"],
    ["cli"],
    ["__main__"],
]
LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}


LAUNCH = HARNESS.parent / "launch"
LAUNCH_FLOORS = [
    ["cluster", "job", "records", "code_copy"],
    ["task"],
    ["wanted", "status"],
    ["slurm", "study", "local"],
    ["__main__"],
]
LAUNCH_LEVEL = {name: level for level, floor in enumerate(LAUNCH_FLOORS) for name in floor}


def imported(file: Path, package: str = "harness", rooms_of: Collection[str] = LEVEL) -> set[str]:
    """The rooms of a package that a file imports, also inside functions."""
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith(f"{package}.")}
    return rooms & set(rooms_of)


def test_every_room_has_its_floor():
    rooms = {path.stem if path.is_file() else path.name for path in HARNESS.iterdir()}
    assert rooms - {"__init__", "__pycache__", "VERSION", "py"} == LEVEL.keys()


@pytest.mark.parametrize("room", sorted(LEVEL))
def test_a_room_imports_lower_floors_only(room):
    path = HARNESS / room
    files = list(path.glob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files
    for file in files:
        for other in imported(file) - {room}:
            assert LEVEL[other] < LEVEL[room], f"{file} imports harness.{other}"


def test_the_launcher_has_floors_too_and_the_harness_knows_nothing_of_it():
    assert {path.stem for path in LAUNCH.glob("*.py")} - {"__init__"} == LAUNCH_LEVEL.keys()
    for room, level in LAUNCH_LEVEL.items():
        for other in imported(LAUNCH / f"{room}.py", "launch", LAUNCH_LEVEL):
            assert LAUNCH_LEVEL[other] < level, f"launch.{room} imports launch.{other}"
    for file in HARNESS.rglob("*.py"):
        assert not imported(file, "launch", LAUNCH_LEVEL), file


def test_only_the_launcher_knows_submitit_and_the_recipe_knows_no_files():
    for file in HARNESS.rglob("*.py"):
        assert "submitit" not in file.read_text(), file
    for file in (HARNESS / "recipe").glob("*.py"):
        tree = ast.parse(file.read_text())
        modules = {
            alias.name for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names
        }
        assert not modules & {"os", "pathlib", "subprocess", "torch.distributed"}, file
