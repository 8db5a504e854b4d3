"""A package imports only packages below it, and no module imports itself through others."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the top to the bottom. A package may import those on later lines only.
LAYERS = {
    "harness": [
        *("__main__", "commands", "verify", "report", "preflight", "training", "distillation"),
        *("deployment", "execution", "drafts", "planning", "roll_call", "rank_card", "plug_ins"),
        "data",
        *(
            "models",
            "runs",
            "resilience",
            "recipe",
            "installed",
            "config",
            "rendezvous",
            "exact_sum",
            "distributed",
            "network_interface",
            "numa",
            "slurm_step",
            "startup",
        ),
        *("compat", "output_file", "atomic_file", "outcome", "errors"),
    ],
    "launch": [
        *("__main__", "study", "task", "status", "registry", "local", "slurm", "backend"),
        *("cluster_file", "run_output", "run_spec", "records"),
    ],
}


def modules(package: str) -> dict[str, Path]:
    """Dotted name -> file, of every module of a package."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """The modules among `known` that a file imports, inside functions and for type checkers too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in known else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


@pytest.mark.parametrize("package", LAYERS)
def test_every_module_has_a_layer(package):
    entries = {name.split(".")[1] for name in modules(package) if "." in name}
    assert entries - {"__init__"} == set(LAYERS[package])


@pytest.mark.parametrize("package", LAYERS)
def test_a_package_imports_lower_layers_only(package):
    level = {name: number for number, name in enumerate(LAYERS[package])}
    files = modules(package)
    for name, path in files.items():
        if name == package:
            continue
        own = name.split(".")[1]
        for other in imports(path, set(files)) - {package}:
            theirs = other.split(".")[1]
            assert own == theirs or level[own] < level[theirs], f"{path} imports {other}"


@pytest.mark.parametrize("package", LAYERS)
def test_no_module_imports_itself_through_others(package):
    files = modules(package)
    graph = {name: imports(path, set(files)) - {name} for name, path in files.items()}
    graph[package] = set()  # the top-level package loads its names lazily
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_harness_knows_nothing_of_the_launcher():
    for path in modules("harness").values():
        text = path.read_text()
        assert "submitit" not in text, path
        assert not imports(path, set(modules("launch"))), path


def test_the_recipe_knows_no_files_and_no_ranks():
    for path in (ROOT / "harness" / "recipe").glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text()))
        names = {
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        }
        assert not names & {"os", "pathlib", "subprocess", "torch.distributed"}, path
