import pytest

from harness.config_errors import ConfigError
from launch.cluster import load_cluster
from launch.study import load_study, study_folder, study_runs

EXAMPLE = "configs/clusters/example.yaml"


def test_the_papers_warmups_are_fifteen_runs():
    cluster = load_cluster(EXAMPLE)
    folder = study_folder("configs/studies/warmup.yaml", cluster.folder)
    runs = study_runs(
        "configs/studies/warmup.yaml", folder, ("recipe.label_smoothing=0.1",), cluster
    )
    assert len({run.run for run in runs}) == len({run.name for run in runs}) == 15
    first = runs[0]
    assert (first.name, str(first.run)) == ("none-1", "/shared/runs/studies/warmup/none/1")
    assert (first.config.recipe.warmup, first.config.expect.error) == ("none", 24.84)
    assert [run.config.seed for run in runs] == [s for s in (1, 2, 3, 4, 5) for _ in range(3)]
    assert {run.config.recipe.label_smoothing for run in runs} == {0.1}
    # the cluster file's run: reaches every one
    assert {run.config.run.data_root for run in runs} == {"/shared/imagenet"}


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


def test_a_wrong_key_in_a_variant_is_refused(tmp_path, small):
    path = tmp_path / "study.yaml"
    path.write_text(f"base: {small()}\nseeds: [1]\nvariants: {{a: {{set: {{recipe.epoch: 3}}}}}}")
    with pytest.raises(
        ConfigError, match=r"recipe\.epoch: unknown key, did you mean recipe\.epochs"
    ):
        study_runs(path, tmp_path)
