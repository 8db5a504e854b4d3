"""PyYAML's traps (1e-4 as text, silent duplicates, clock times, code) and broken files."""

import pytest

from harness.config.errors import ConfigError
from harness.config.loading import load_config
from harness.config.yaml import read_yaml, write_yaml


def refusal(text):
    """The one-line message with which a text is refused."""
    with pytest.raises(ConfigError) as caught:
        read_yaml(text, "x.yaml")
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("-1.5e3", -1500.0),
        (".5", 0.5),
        ("2.5e+1", 25.0),
        ("1.", 1.0),
    ],
)
def test_numbers_some_of_which_pyyaml_reads_as_text(text, value):
    read = read_yaml(f"lr: {text}", "x.yaml")["lr"]
    assert read == value and isinstance(read, float)


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("-12", -12), ("1_000", 1000), ("off", False)]
)
def test_whole_numbers_and_switches(text, value):
    read = read_yaml(text, "x.yaml")
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("text", ["4:00:00", "010", "0x10", "2020-01-01", "1e", "1e-4x", "."])
def test_clock_times_octals_and_dates_are_text(text):
    assert read_yaml(text, "x.yaml") == text


def test_a_duplicate_key_is_refused_with_its_lines():
    text = "seed: 1\nrun:\n  device: cpu\n  loader: memory\n  device: cuda\n"
    assert refusal(text) == "x.yaml: line 5: key 'device' is written twice (first on line 3)"
    assert refusal("a: 1\n'a': 2\n") == "x.yaml: line 2: key 'a' is written twice (first on line 1)"
    assert refusal("{b: {a: 1, a: 2}}").startswith("x.yaml: line 1: key 'a' is written twice")


def test_the_same_key_in_two_sections_is_no_duplicate():
    assert read_yaml("a: {x: 1}\nb: {x: 2}\n", "x.yaml") == {"a": {"x": 1}, "b": {"x": 2}}


def test_plain_values_only(tmp_path):
    mark = tmp_path / "executed"
    text = f"seed: !!python/object/apply:os.mkdir ['{mark}']\n"
    assert "line 1: could not determine a constructor" in refusal(text)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nrecipe: [1\n", "line 3: expected ',' or ']', but got '<stream end>'"),
        ("seed: 1\n  x: 2\n", "line 2: mapping values are not allowed here"),
        ("a: *b\n", "line 1: found undefined alias 'b'"),
        ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
        ("{[1]: 2}", "line 1: found unhashable key"),
        ("a: \x01\n", "broken YAML: unacceptable character #x0001"),
        ("a: !!int b\n", "broken YAML: invalid literal"),
        ("[" * 5000, "broken YAML: maximum recursion depth exceeded"),
    ],
)
def test_broken_yaml_is_one_line_with_its_place(text, message):
    assert refusal(text).startswith(f"x.yaml: {message}")


def test_what_is_written_is_read_back_equal():
    mapping = {
        "a": [1e-5, 3, True, None],
        "b": {"t": "1e-4", "u": "4:00:00", "v": "off", "w": "é: #"},
    }
    text = write_yaml(mapping)
    assert read_yaml(text, "x.yaml") == mapping
    assert text.splitlines()[0] == "a: [1.0e-05, 3, true, null]"


@pytest.mark.parametrize(
    ("text", "found"),
    [("", "an empty file"), ("# a\n", "an empty file"), ("- 1\n", "[1]"), ("a", "'a'")],
)
def test_a_file_without_keys(tmp_path, text, found):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == (
        f"{path}: expected sections of keys (expect, data, …), found {found}"
    )


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"nope.yaml: cannot be read: No such file"):
        load_config(tmp_path / "nope.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file in UTF-8"):
        load_config(tmp_path / "x.yaml")
