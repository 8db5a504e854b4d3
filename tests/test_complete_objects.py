"""Objects are complete when constructed: code assigns no attribute of another object."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
OWN = {"self", "cls", "ctx"}  # ctx: where autograd keeps what a backward pass needs
# file -> targets that may be assigned, with the reason
ALLOWED = {
    # PyTorch's settings, within a context manager that restores them or a program's own process
    "harness/execution/precision.py": {"setting.fp32_precision"},
    "harness/execution/determinism.py": {
        *("cudnn.deterministic", "cudnn.benchmark", "memory.fill_uninitialized_memory"),
    },
    "harness/training/exact_gradients.py": {"parameter.grad"},  # where optimizers look for it
    "harness/runs/logging/tensorboard.py": {"threading.excepthook"},  # restored by close
    "harness/resilience/unfailing_output.py": {"sys.stdout", "sys.stderr"},  # restored at its end
    # batch norm's buffers become views of one tensor
    "harness/models/ghost_batch_norm.py": {
        *("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
    },
    "harness/models/fused_blocks.py": {"module.__class__"},  # a block keeps its parameters
    # settings of libraries' own objects, made and finished in one place
    "harness/commands/parsing.py": {"options.overrides"},
    "harness/data/prepare/pack.py": {"member.size"},
}


def foreign_assignments(text: str) -> set[str]:
    """`owner.attribute` of each assignment whose owner is not the object itself."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For | ast.comprehension):
            targets = [node.target]
        else:
            continue
        for target in targets:
            for part in ast.walk(target):
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
                    owner = ast.unparse(part.value)
                    if owner not in OWN:
                        found.add(ast.unparse(part))
    return found


def test_the_search_finds_what_it_should():
    assert foreign_assignments("self.x = 1\ncls.y += 1\nx = 2\nx[0] = 3") == set()
    found = foreign_assignments("run.done, self.step.part = 1, 2\nstep.n += 1\nself.a.b: int = 1")
    assert found == {"run.done", "self.step.part", "step.n", "self.a.b"}
    assert foreign_assignments("for run.x in y: pass") == {"run.x"}


def test_no_attribute_of_another_object_is_assigned():
    for package in ("harness", "launch"):
        for path in sorted((ROOT / package).rglob("*.py")):
            file = str(path.relative_to(ROOT))
            foreign = foreign_assignments(path.read_text()) - ALLOWED.get(file, set())
            assert not foreign, f"{file}: {', '.join(sorted(foreign))}"


def test_what_is_allowed_exists():
    for file, targets in ALLOWED.items():
        assert targets & foreign_assignments((ROOT / file).read_text()), file
