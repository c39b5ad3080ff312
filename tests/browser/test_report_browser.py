"""The report of a real run in a real browser: run by `make test-browser`, after the quick start.

`LM_SAES_RUN` names the run's directory. A screenshot is left there as `report.png`.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking --no-first-run "
    "--disable-component-update --disable-sync --window-size=1440,1000 --force-color-profile=srgb"
)
CHARTS = {"losses", "explained-variance", "l0", "dead", "learning-rate", "throughput", "frequency", "downstream"}


def report_path() -> Path:
    path = Path(os.environ.get("LM_SAES_RUN", "results/quickstart"), "report.html").resolve()
    assert path.is_file(), f"{path} does not exist: run `make quickstart`, or name a run's directory in LM_SAES_RUN"
    return path


def program(*names: str) -> str:
    found = next((path for path in map(shutil.which, names) if path), None)
    assert found, f"none of {names} is installed: apt-get install chromium chromium-driver"
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = program("chromium", "google-chrome", "chromium-browser")
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(program("chromedriver")))
    try:
        driver.get(report_path().as_uri())
        WebDriverWait(driver, 60).until(lambda d: d.find_elements(By.CSS_SELECTOR, ".plot .main-svg"))
        yield driver
    finally:
        driver.quit()


def visible(browser: webdriver.Chrome, selector: str) -> list[Any]:
    """The matching elements that take up room on the page, as [id, width, height]."""
    return browser.execute_script(
        """return [...document.querySelectorAll(arguments[0])]
            .map((e) => [e.id, e.getBoundingClientRect().width, e.getBoundingClientRect().height])
            .filter(([, width, height]) => width > 0 && height > 0);""",
        selector,
    )


def test_every_chart_is_drawn(browser: webdriver.Chrome):
    charts = browser.find_elements(By.CSS_SELECTOR, ".plot")
    assert {chart.get_attribute("id") for chart in charts} == CHARTS
    for chart in charts:
        drawn = chart.find_element(By.CSS_SELECTOR, "svg.main-svg").size
        assert drawn["width"] > 200 and drawn["height"] > 150, chart.get_attribute("id")
    for name in CHARTS - {"frequency", "downstream"}:
        lines = browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map((path) => path.getTotalLength());",
            f"#{name} .scatterlayer path.js-line",
        )
        assert lines and max(lines) > 50, name
    for name in ("frequency", "downstream"):
        assert visible(browser, f"#{name} .barlayer .point path"), name


def test_latents_are_shown_with_their_snippets(browser: webdriver.Chrome):
    rows = browser.execute_script(
        """return [...document.querySelectorAll("tr.latent")].map((row) =>
            [...row.querySelectorAll("mark.peak")].filter((m) => m.offsetWidth > 0 && m.offsetHeight > 0).length);"""
    )
    assert sum(peaks > 0 for peaks in rows) >= 50
    colours = browser.execute_script(
        """const of = (e) => getComputedStyle(e).backgroundColor;
        return [of(document.querySelector("mark.peak")), of(document.querySelector("mark.peak").parentElement)];"""
    )
    assert colours[0] != colours[1]


def test_the_table_can_be_searched_sorted_and_opened_up(browser: webdriver.Chrome):
    rows = browser.find_elements(By.CSS_SELECTOR, "tr.latent")
    number = rows[-1].get_attribute("data-latent")
    search = browser.find_element(By.ID, "search")
    search.send_keys(number or "")
    assert rows[-1].is_displayed()
    search.send_keys(" no such text")
    assert not any(row.is_displayed() for row in rows)
    search.clear()
    search.send_keys(" ")
    assert all(row.is_displayed() for row in rows)

    browser.find_element(By.CSS_SELECTOR, "button[data-key=latent]").click()
    shown = browser.find_elements(By.CSS_SELECTOR, "tr.latent")
    numbers = [int(row.get_attribute("data-latent") or -1) for row in shown]
    assert numbers == sorted(numbers, reverse=True)
    browser.find_element(By.CSS_SELECTOR, "button[data-key=frequency]").click()

    def peaks() -> int:
        return len(visible(browser, "mark.peak"))

    before = peaks()
    Select(browser.find_element(By.ID, "per-latent")).select_by_value("all")
    assert peaks() > before
    Select(browser.find_element(By.ID, "per-latent")).select_by_value("n3")
    assert peaks() == before


def test_the_page_loads_nothing_complains_of_nothing_and_has_its_picture_taken(browser: webdriver.Chrome):
    browser.execute_script("scrollTo(0, 0)")
    height = browser.execute_script("return document.getElementById('latents').getBoundingClientRect().top + 1200")
    browser.set_window_size(1440, int(height))
    picture = report_path().with_name("report.png")
    assert browser.save_screenshot(str(picture)) and picture.stat().st_size > 20_000
    assert browser.get_log("browser") == []
    requests = [
        entry["message"] for entry in browser.get_log("performance") if 'Network.requestWillBeSent"' in entry["message"]
    ]
    assert not [message for message in requests if '"url":"http' in message]
