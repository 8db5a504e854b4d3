"""What `make test-fresh` reads in a command's output, and copies of this machine's settings."""

from tests import fresh_machine


def test_the_counts_of_pytests_last_line():
    log = (
        "2 passed in 1.00s\nF..\n3 failed, 1021 passed, 14 skipped, 2 errors in 61.02s (0:01:01)\n"
    )
    found = {"failed": 3, "passed": 1021, "skipped": 14, "errors": 2}
    assert fresh_machine.outcomes(log) == found
    assert fresh_machine.outcomes("make: *** [Makefile:22: test] Error 1\n") == {}


def test_folders_that_pip_is_sent_to_are_found():
    text = "index-url = https://host/simple\nfind-links = /a/wheels\n  file:///b/pypi/simple\n"
    assert fresh_machine.PATH.findall(text) == ["/a/wheels", "/b/pypi/simple"]


def test_which_variables_reach_the_fresh_machine():
    names = ["PIP_INDEX_URL", "https_proxy", "NO_PROXY", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"]
    assert all(map(fresh_machine.SETTINGS.fullmatch, names))
    others = ["PATH", "PYTHONPATH", "OMP_NUM_THREADS", "HOME", "VIRTUAL_ENV"]
    assert not any(map(fresh_machine.SETTINGS.fullmatch, others))
