"""Verdicts compared with SciPy's own tests and hand calculations, and their error rates."""

import numpy as np
import pytest
from scipy import stats

from harness.report.groups import group_runs
from harness.report.verdicts import holm, p_values, verdicts
from tests.report.test_groups import TABLE_1, run


def verdict_of(errors, val_images=50000, **expect):
    """The verdict of one group of runs; `expect` changes the paper's row, 23.74 ± 0.09 of 5."""
    known = {key: value for key, value in (TABLE_1 | expect).items() if value is not None}
    every = {"expect": known, "val_images": val_images}
    runs = [run(error, seed, **every) for seed, error in enumerate(errors)] or [run(None, **every)]
    (found,) = verdicts(group_runs(runs))
    return found


def test_p_is_that_of_scipys_tests():
    ours, theirs = [1.94, 1.39, 1.11, 0.56, 0.5], [2.0, 1.1, 1.5, 2.2]
    welch = stats.ttest_ind(ours, theirs, equal_var=False).pvalue
    m, mean, std = len(theirs), np.mean(theirs), np.std(theirs, ddof=1)
    assert p_values(ours, mean, std, m, 0.28) == pytest.approx(welch, rel=1e-12)
    # of one run: its t, by hand
    one = 2 * stats.t.sf(abs(3.9 - mean) / (std * np.sqrt(1 + 1 / m)), m - 1)
    assert p_values([3.9], mean, std, m, 0.28) == pytest.approx(one, rel=1e-12)


@pytest.mark.parametrize(
    ("errors", "expect", "kind"),
    [
        # 2.776 (t of 4 degrees of freedom) * 0.09 * sqrt(1.2) = 0.2737: 23.466 to 24.014
        ([24.01], {}, "within"),
        ([24.02], {}, "higher"),
        ([23.46], {}, "lower"),
        ([23.9, 24.0, 24.1, 23.95, 24.05], {}, "higher"),
        ([23.7, 23.8, 23.75, 23.65, 23.85], {}, "within"),
        ([23.84, 24.0], {}, "within"),  # +0.18, by two runs only
        ([], {}, ""),
        ([99.0], {"std": None}, ""),
        ([99.0], {"runs": None}, ""),
        ([99.0], {"std": None, "runs": 1}, ""),
    ],
)
def test_verdicts_by_hand(errors, expect, kind):
    assert verdict_of(errors, **expect).kind == kind


def test_the_basis_names_test_runs_p_and_the_weakness_of_one_run():
    one = verdict_of([23.9]).basis
    assert one.startswith("1 run against 5: p = 0.18; 95 % prediction interval 23.47 to 24.01 %")
    assert "one run gives a wide interval" in one
    assert verdict_of([23.7, 23.9]).basis.startswith("Welch's t-test, 2 runs against 5: p = 0.")
    assert verdict_of([23.7], std=None).basis == "no verdict: expect has no std"
    assert verdict_of([23.7], std=None, runs=None).basis.endswith("no std and no runs")
    assert verdict_of([]).basis == "no finished run"
    (without,) = verdicts(group_runs([run(23.7, expect=None)]))
    assert (without.kind, without.basis) == ("", "no expectation for this recipe")


def test_no_spread_is_one_image():
    """360 images: 0.278 points each. 2.776 * 0.278 * sqrt(1.2) = 0.845 around 1.0."""
    assert verdict_of([1.8], 360, error=1.0, std=0.0).kind == "within"
    assert verdict_of([1.9], 360, error=1.0, std=0.0).kind == "higher"
    assert "one image, 0.28 points" in verdict_of([1.8], 360, error=1.0, std=0.0).basis
    third = 100 / 360 * 3  # equal errors, whose std is 0 but for rounding
    assert verdict_of([third] * 3, 360, error=0.6, std=0.0).kind == "within"
    assert verdict_of([1.0] * 3, 360, error=5.0, std=0.0).kind == "lower"
    assert p_values([1.0] * 3, 1.0, 0.0, 3, 0.28) == 1.0


def test_holm_by_hand():
    """Of .01, .04, .03: 3 * .01, then 2 * .03, then the larger of .04 and that."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0] and holm([]) == []


def test_a_difference_that_is_significant_alone_may_not_be_among_many_rows():
    """24.02 alone is just outside; among ten rows it may be chance. Untested rows do not count."""
    alone = [run(24.02, variant="a"), run(99.0, variant="b", expect=None)]
    assert [v.kind for v in verdicts(group_runs(alone))] == ["higher", ""]
    study = [run(24.02, variant="a")] + [run(23.74, variant=str(i)) for i in range(9)]
    first, *others = verdicts(group_runs(study))
    assert first.kind == "within" and "by Holm over 10 rows" in first.basis
    assert {v.kind for v in others} == {"within"}
    study[0] = run(25.5, variant="a")
    assert verdicts(group_runs(study))[0].kind == "higher"


@pytest.mark.parametrize("image", [None, 0.28, 2.0])
def test_how_often_verdicts_are_wrong(image):
    """The expected mean and std are those of 5 runs themselves. `image`: errors come in steps of so
    many points, with std 0.5 about the quickstart's, and as coarse as four std."""
    dice, trials, sigma = np.random.default_rng(1), 40_000, 0.5

    def draw(runs, mean):
        errors = dice.normal(mean, sigma, (trials, runs))
        return errors if image is None else np.round(errors / image) * image

    expected = draw(5, 20.0)
    known = expected.mean(-1), expected.std(-1, ddof=1), 5, image or 1e-6
    for runs in range(1, 6):
        assert np.mean(p_values(draw(runs, 20.0), *known) <= 0.05) <= 0.07, runs
    if image is None or image < sigma:
        assert np.mean(p_values(draw(5, 20.0 + 2 * sigma), *known) > 0.05) <= 0.30
