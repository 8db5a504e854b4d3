from pathlib import Path

import pytest

from harness.config.errors import ConfigError
from harness.config.loading import load_config
from harness.errors import UserError
from launch.cluster_file import load_cluster
from launch.run_spec import RunSpec, teachers_of, with_teachers
from launch.study import load_study, study_folder, study_runs

EXAMPLE = "configs/clusters/example.yaml"


def test_the_papers_warmups_are_twenty_runs():
    cluster = load_cluster(EXAMPLE)
    folder = study_folder("configs/studies/warmup.yaml", cluster.folder)
    runs = study_runs(
        "configs/studies/warmup.yaml", folder, ("recipe.label_smoothing=0.1",), cluster
    )
    assert len({run.run for run in runs}) == len({run.name for run in runs}) == 20
    second = runs[1]
    assert (second.name, str(second.run)) == ("none-1", "/shared/runs/studies/warmup/none/1")
    assert second.config.recipe.warmup == "none"
    assert {run.config.expect for run in runs} == {None}  # the paper smooths no labels
    assert [run.config.seed for run in runs] == [s for s in (1, 2, 3, 4, 5) for _ in range(4)]
    assert {run.config.recipe.label_smoothing for run in runs} == {0.1}
    # the cluster file's run: reaches every one
    assert {run.config.run.data_root for run in runs} == {"/shared/imagenet"}
    runs = study_runs("configs/studies/warmup.yaml", folder, ("run.precision=float32",), cluster)
    assert [run.config.expect.error for run in runs[:4]] == [23.60, 24.84, 25.88, 23.74]


def expected(path, *typed):
    """The expected error of each variant."""
    runs = study_runs(path, Path("runs/x"), typed)
    return [run.config.expect and run.config.expect.error for run in runs]


def test_a_variant_expects_what_it_says_or_what_its_recipe_shares_with_the_base(tmp_path, small):
    """`small` expects 50 %."""
    path = tmp_path / "study.yaml"
    variants = """
  same: {set: {}}
  machine: {set: {run.log_every_steps: 1, recipe.epochs: 3}}
  other: {set: {recipe.epochs: 4}}
  stated: {set: {recipe.epochs: 4}, expect: {error: 60.0, source: here}}
"""
    path.write_text(f"base: {small()}\nseeds: [1]\nvariants:{variants}")
    assert expected(path) == [50.0, 50.0, None, 60.0]
    assert expected(path, "run.device=cpu") == [50.0, 50.0, None, 60.0]
    assert expected(path, "recipe.momentum=0.9") == [50.0, 50.0, None, 60.0]  # as it is
    assert expected(path, "recipe.momentum=0.8") == [None] * 4
    assert expected(path, "recipe.momentum=0.8", "expect.error=70") == [70.0] * 4


def test_a_student_expects_its_error_of_the_teacher_that_its_file_names(tmp_path, small):
    quick = small("teacher.yaml")
    base = small("student.yaml", model__width=2)
    base.write_text(f"{base.read_text()}distill: {{teacher: {quick}, precision: float32}}")
    path = tmp_path / "study.yaml"
    stated = "stated: {set: {recipe.epochs: 4}, expect: {error: 60.0, source: here}}"
    path.write_text(f"base: {base}\nseeds: [1]\nvariants: {{same: {{set: {{}}}}, {stated}}}")
    assert expected(path) == [50.0, 60.0]
    assert expected(path, "teacher.run.device=cpu", "teacher.seed=3") == [50.0, 60.0]
    assert expected(path, "teacher.recipe.momentum=0.8") == [None, None]
    assert expected(path, "distill.temperature=2") == [None, None]
    single = with_teachers(base, [], Path("runs"), load_config)
    assert single.config.expect.error == 50.0 and single.config.distill.teacher == "runs/teacher"
    changed = with_teachers(base, ["teacher.recipe.momentum=0.8"], Path("runs"), load_config)
    assert changed.config.expect is None and changed.teacher.config.expect is None


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("base: a\nseeds: [1]\nvariant: {a: {}}", "variant: unknown key, did you mean variants?"),
        (
            "base: a\nseeds: []\nvariants: {a: {}}",
            "seeds: expected one or more different ones, found []",
        ),
        ("base: a\nseeds: [-1]\nvariants: {a: {}}", "seeds.0: expected at least 0"),
        ("base: a\nseeds: [1]\nvariants: {}", "variants: there is none"),
        ("base: a\nseeds: [1]", "variants: there is none"),
        ("base: a\nseeds: [1]\ngrid: 3", "grid: expected names and values, found 3"),
        ("base: a\nseeds: [1]\ngrid: {seed: 1}", "grid.seed: expected a list of different values"),
        ("base: a\nseeds: [1]\ngrid: {b: []}", "grid.b: expected a list of different values"),
        ("base: a\nseeds: [1]\ngrid: {b: [1, 1]}", "grid.b: expected a list of different values"),
        ("base: a\nseeds: [1]\ngrid: {b: [x y, x/y]}", "grid: there are two variants b-x-y; name"),
        (f"base: a\nseeds: [1]\ngrid: {{b: [{'x' * 199}]}}", "x is too long for a folder; name"),
        (
            "base: a\nseeds: [1]\nvariants: {b-1: {}}\ngrid: {b: [1]}",
            "grid: there are two variants b-1; name them yourself",
        ),
        ("base: a\nseeds: [1]\nvariants: {a: {sets: {}}}", "variants.a: sets: unknown key"),
        ("base: a\nseeds: [1]\nvariants: {a: {expect: {std: 1}}}", "variants.a: expect.error"),
        ("base: a\nseeds: [1]\nvariants: {a/b: {}}", "variants.a/b: a variant's name becomes"),
    ],
)
def test_mistakes_in_a_study(tmp_path, text, part):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_study(path)
    assert part in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_a_grid_is_all_combinations_beside_the_named_variants(tmp_path, small):
    path = tmp_path / "study.yaml"
    path.write_text(
        f"""
base: {small()}
seeds: [1, 2]
variants: {{short: {{set: {{recipe.epochs: 4}}}}}}
grid:
  recipe.minibatch: [256, 512]
  recipe.warmup: [constant, gradual]
  recipe.milestones: [[1, 2], []]
  recipe.weight_decay: [0.001]
"""
    )
    runs = study_runs(path, Path("runs/x"))
    one_seed = runs[:9]
    assert [run.config.seed for run in runs] == [1] * 9 + [2] * 9
    assert [run.run.parent.name for run in one_seed[:3]] == [
        "short",
        "minibatch-256_warmup-constant_milestones-1-2",
        "minibatch-256_warmup-constant_milestones-empty",
    ]
    recipes = [run.config.recipe for run in one_seed[1:]]
    assert {recipe.weight_decay for recipe in recipes} == {0.001}  # not in the names: all have it
    assert [(r.minibatch, r.warmup, r.milestones) for r in recipes] == [
        (kn, warmup, milestones)
        for kn in (256, 512)
        for warmup in ("constant", "gradual")
        for milestones in ((1, 2), ())
    ]
    # the base expects 50 %, and one combination may be the base itself
    path.write_text(f"base: {small()}\nseeds: [1]\ngrid: {{recipe.epochs: [3, 4]}}")
    assert expected(path) == [50.0, None]


def test_a_wrong_key_in_a_variant_is_refused(tmp_path, small):
    path = tmp_path / "study.yaml"
    path.write_text(f"base: {small()}\nseeds: [1]\nvariants: {{a: {{set: {{recipe.epoch: 3}}}}}}")
    with pytest.raises(
        ConfigError, match=r"recipe\.epoch: unknown key, did you mean recipe\.epochs"
    ):
        study_runs(path, tmp_path)


def test_teachers_come_once_each_before_its_student():
    # a chain of three: grandmother, mother, two children
    config = load_config("configs/quickstart.yaml")
    grandmother = RunSpec("grandmother", Path("runs/g"), config)
    mother = RunSpec("mother", Path("runs/m"), config, teacher=grandmother)
    children = [RunSpec(name, Path("runs") / name, config, teacher=mother) for name in ("a", "b")]
    assert teachers_of([*children, RunSpec("alone", Path("runs/c"), config)]) == [
        grandmother,
        mother,
    ]


def test_two_teachers_in_one_folder_are_refused():
    one, other = (load_config("configs/quickstart.yaml", [f"seed={seed}"]) for seed in (1, 2))
    students = [
        RunSpec(name, Path(name), config, teacher=RunSpec("teacher", Path("runs/t"), config))
        for name, config in (("a", one), ("b", other))
    ]
    with pytest.raises(UserError, match=r"runs/t: two teachers would be trained in it \(seed"):
        teachers_of(students)
