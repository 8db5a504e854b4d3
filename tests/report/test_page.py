"""The page in a real headless Chromium: its content, its switches, its requests."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness.commands.command_line import main
from harness.report.page import VERDICTS
from harness.runs.logging.jsonl import read_log
from tests.report.conftest import HOSTILE

selenium = pytest.importorskip("selenium", reason="selenium is not installed")
from selenium import webdriver  # noqa: E402
from selenium.webdriver.chrome.service import Service  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync --disable-dev-shm-usage
--window-size=1200,900"""
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium or chromedriver is not installed"
)


@pytest.fixture(scope="module")
def page(study: Path, diverged: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a study and a diverged run, with hostile names in the path and the config."""
    folder = tmp_path_factory.mktemp("page")
    copied = shutil.copytree(study, folder / "a <b> & 'c'")
    (copied / "none").rename(copied / "<img src=x onerror=alert(1)>")
    to = folder / "new" / "report.html"
    assert main(["report", str(copied), str(diverged), "--to", str(to)]) == 0
    return to


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    os.environ["SE_OFFLINE"] = "true"  # the driver is given, so selenium must not search for one
    driver = webdriver.Chrome(options, Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: webdriver.Chrome, page: Path) -> Iterator[webdriver.Chrome]:
    """Open the page from disk; fail on any console message and any other request."""
    chromium.get("about:blank")
    for log in ("browser", "performance"):
        chromium.get_log(log)  # the browser's own start-up messages
    chromium.get(page.as_uri())
    yield chromium
    assert chromium.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in chromium.get_log("performance")]
    asked = {
        e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"
    }
    assert asked - {"data:,"} == {page.as_uri()}


def figure(browser: webdriver.Chrome, name: str) -> WebElement:
    found = browser.find_element(By.CSS_SELECTOR, f'svg[data-figure="{name}"]')
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", found)
    return found


def shown(browser: webdriver.Chrome, name: str) -> list[bool]:
    """Return whether each series of a figure is shown, in order."""
    series = figure(browser, name).find_elements(By.CSS_SELECTOR, ".series")
    return [one.value_of_css_property("display") != "none" for one in series]


def press(browser: webdriver.Chrome, text: str) -> WebElement:
    """Click the legend entry with that text."""
    buttons = browser.find_elements(By.CSS_SELECTOR, "#legend button")
    (button,) = [
        b
        for b in buttons
        if b.text.strip() == text and "seed" not in (b.get_attribute("class") or "")
    ]
    button.click()
    return button


def tip(browser: webdriver.Chrome) -> str:
    return browser.find_element(By.ID, "tip").text


def test_the_figures_hold_the_values_of_the_logs(browser, study):
    plots = json.loads(
        browser.execute_script("return document.getElementById('plots').textContent")
    )
    series = {s["name"]: s for s in plots["validation-error"]["series"]}
    for seed in (1, 2):
        lines = read_log(study / "gradual" / str(seed) / "log.jsonl")
        errors = [line["error"] for line in lines if line["event"] == "evaluation"]
        found = series[f"gradual, seed {seed}"]
        assert found["x"] == [1, 2, 3] and found["y"] == pytest.approx(errors, rel=1e-5)
    assert len(series) == 4 and len(shown(browser, "validation-error")) == 4
    headings = [h.text for h in browser.find_elements(By.TAG_NAME, "h2")]
    assert headings == [
        "What happened",
        "Error against epochs",
        "Learning rate",
        "Throughput",
        "Runs",
        "Config and environment",
    ]


def test_the_answer_says_mean_spread_and_difference(browser, study):
    errors = [
        json.loads((study / "gradual" / s / "status.json").read_text())["error"] for s in "12"
    ]
    mean, std = sum(errors) / 2, abs(errors[0] - errors[1]) / 2**0.5  # of two, n - 1
    rows = browser.find_elements(By.CSS_SELECTOR, ".answers tbody tr")
    (row,) = [r for r in rows if r.find_element(By.TAG_NAME, "th").text == "gradual"]
    cells = [cell.text for cell in row.find_elements(By.TAG_NAME, "td")]
    assert cells[1] == f"{mean:.2f} ± {std:.2f} %\nepoch 3"
    assert cells[2].startswith("60.00 ± 25.00 %")
    difference, verdict, basis = cells[3].split("\n", 2)
    assert difference == f"{mean - 60:+.2f}".replace("-", "−")
    assert verdict in VERDICTS.values()
    assert basis.startswith("Welch's t-test, 2 runs against 5: p = ") and "over 2 rows" in basis
    assert cells[5:8] == ["256", "8 × 32", "1"]
    happened = browser.find_element(By.ID, "happened").text
    assert "diverged at step 1: the loss is not finite" in happened


def test_hovering_tells_the_value_of_a_point(browser, study):
    press(browser, "none")
    assert not any(shown(browser, "validation-error"))
    seed = browser.find_element(By.CSS_SELECTOR, '#legend [aria-label="gradual, seed 2"]')
    seed.click()
    svg = figure(browser, "validation-error")
    series = svg.find_elements(By.CSS_SELECTOR, ".series")
    (visible,) = [one for one in series if one.is_displayed()]
    points = visible.find_element(By.TAG_NAME, "polyline").get_attribute("points").split()
    left, top = map(float, points[-1].split(","))
    box, size = svg.rect, svg.rect["width"] / 520
    ActionChains(browser).move_to_element_with_offset(
        svg, left * size - box["width"] / 2 - 3, top * size - box["height"] / 2 + 3
    ).perform()
    line = [
        x for x in read_log(study / "gradual" / "2" / "log.jsonl") if x["event"] == "evaluation"
    ]
    value = f"{line[-1]['error']:.4g}"
    assert tip(browser) == f"gradual, seed 2\nepochs 3: validation error {value} %"
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert not browser.find_element(By.ID, "tip").is_displayed()


def test_the_legend_switches_runs_on_and_off_in_all_figures(browser):
    names = ("training-error", "validation-error-late", "throughput")
    button = press(browser, "gradual")
    assert button.get_attribute("aria-pressed") == "false"
    for name in names:
        assert sorted(shown(browser, name)) == [False, False, True, True]
    assert press(browser, "gradual").get_attribute("aria-pressed") == "true"
    assert all(shown(browser, names[0]))
    press(browser, "none")
    assert not any(shown(browser, "warm-up"))
    press(browser, "all")
    assert all(shown(browser, "warm-up"))


def test_the_keys_go_from_point_to_point(browser):
    svg = figure(browser, "validation-error")
    svg.send_keys(Keys.ARROW_RIGHT)
    first = tip(browser)
    assert "epochs 1: validation error" in first
    svg.send_keys(Keys.ARROW_RIGHT)
    assert "epochs 2: validation error" in tip(browser)
    svg.send_keys(Keys.ARROW_LEFT)
    assert tip(browser) == first
    svg.send_keys(Keys.ESCAPE)
    assert not browser.find_element(By.ID, "tip").is_displayed()


def test_names_from_paths_and_configs_stay_text(browser):
    assert browser.title != "harmed"
    assert HOSTILE in browser.find_element(By.CSS_SELECTOR, ".answers").text
    assert "<img src=x onerror=alert(1)>, seed 1" in browser.find_element(By.ID, "runs").text
    assert browser.find_elements(By.TAG_NAME, "img") == []
    assert len(browser.find_elements(By.TAG_NAME, "script")) == 2  # the data, the page's own


def test_dark_is_dark_and_every_figure_has_its_words(browser):
    def background() -> str:
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor")

    def prefer(scheme: str) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    prefer("light")
    light = background()
    prefer("dark")
    dark = background()
    prefer("light")
    assert light == "rgb(246, 247, 249)" and dark == "rgb(15, 17, 20)"
    for svg in browser.find_elements(By.CSS_SELECTOR, "svg.plot"):
        assert "against epochs. Last values: " in (svg.get_attribute("aria-label") or "")


def test_it_is_not_wider_than_a_phone(browser):
    browser.set_window_size(500, 900)  # Chromium's least
    wide = browser.execute_script("return document.documentElement.scrollWidth - innerWidth")
    browser.set_window_size(1200, 900)
    assert wide <= 0
