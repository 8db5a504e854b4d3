import pytest

from harness.execution.evaluation import Evaluation


def test_errors_in_percent():
    evaluation = Evaluation(correct=38, top5_correct=47, total=50, loss=1.0)
    assert evaluation.error == pytest.approx(24.0)  # 12 of 50
    assert evaluation.top5_error == pytest.approx(6.0)  # 3 of 50


def test_interval_is_wilsons():
    # p = 0.1, n = 100, z = 1.96: centre (0.1 + 3.8416/200) / (1 + 3.8416/100) = 0.11480,
    # half 1.96 * sqrt(0.09/100 + 3.8416/40000) / 1.038416 = 0.05957
    low, high = Evaluation(correct=90, top5_correct=90, total=100, loss=0.0).error_interval()
    assert low == pytest.approx(5.52, abs=0.01)
    assert high == pytest.approx(17.44, abs=0.01)
    assert Evaluation(10, 10, 10, 0.0).error_interval()[0] == 0.0
