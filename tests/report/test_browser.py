"""The pages in Chromium: they open without an error, the slider moves, zoom works, what is exported is right."""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
from builders.run_folders import PROMPTS, write_run
from PIL import Image

from rsaft_fast.report.blinded import Pair, blinded_page
from rsaft_fast.report.page import report_of
from rsaft_fast.report.preference import preference, read_answers
from rsaft_fast.report.sources import find_runs

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHECKPOINTS = 20
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
DESK = {"width": 1200, "height": 1000, "deviceScaleFactor": 1, "mobile": False}


@pytest.fixture(scope="module")
def browser():
    binary, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
    required = os.environ.get("RSAFT_BROWSER") == "required"
    if not required and (binary is None or driver is None):
        pytest.skip("needs Chromium and its driver: apt-get install chromium chromium-driver")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def look(browser, path: Path, size=DESK, scheme: str = "light") -> None:
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
    browser.get_log("browser")
    browser.get(path.as_uri())


def faults(browser) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def until(browser, script: str, seconds: float = 20):
    """The value of a script's expression, as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := browser.execute_script(f"return {script}")):
        assert time.monotonic() < end, f"{script} did not become true; {faults(browser)}"
        time.sleep(0.05)
    return value


def press(browser, selector: str, key: str) -> None:
    event = "new KeyboardEvent('keydown', {key: arguments[1], bubbles: true})"
    browser.execute_script(f"document.querySelector(arguments[0]).dispatchEvent({event})", selector, key)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Of a run with 20 checkpoints, pictures of 512x512, 2,000 updates."""
    folder = tmp_path_factory.mktemp("report")
    steps = [100 * n for n in range(CHECKPOINTS + 1)]
    names = ("reward", "reward_se", "held_out/judge", "held_out/judge_se", "s1", "image/dark", "diversity")
    values = {step: {name: random.random() for name in names} for step in steps}
    run = write_run(
        folder / "run", [random.random() for _ in range(2000)], values, [0, 100], [(500, "s1", "fell")], (512, 512)
    )
    for step in steps[2:]:
        shutil.copy(run / "samples" / "step_100.png", run / "samples" / f"step_{step}.png")
    path = folder / "report.html"
    path.write_text(report_of(find_runs([str(run)]), "A run"), encoding="utf-8")
    return path


def test_the_report_of_twenty_checkpoints_is_small_and_opens_at_once(browser, report):
    assert report.stat().st_size < 10e6
    # The page's own time on the processor, until the first charts are there: other processes may hold the cores.
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    look(browser, report)
    until(browser, "document.querySelector('.plot').dataset.drawn")
    metrics = {m["name"]: m["value"] for m in browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
    assert 0.05 < metrics["TaskDuration"] < 2
    assert faults(browser) == []
    for place in browser.execute_script("return [...document.querySelectorAll('.plot')]"):
        browser.execute_script(
            "arguments[0].closest('details')?.setAttribute('open', ''); arguments[0].scrollIntoView()", place
        )
    until(browser, "[...document.querySelectorAll('.plot')].every((plot) => plot.dataset.drawn)")
    assert faults(browser) == []


def test_the_slider_shows_each_step_and_zoom_is_shared(browser, report):
    look(browser, report)
    last = browser.execute_script("return [...document.querySelectorAll('img[data-column=run]')].map((one) => one.src)")
    move = "const s = document.getElementById('step'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    shown = "return [...document.querySelectorAll('img[data-column=%s]')].map((one) => one.src)"
    browser.execute_script(move, 0)
    before = browser.execute_script(shown % "before")
    assert len(before) == len(PROMPTS) and browser.execute_script(shown % "run") == before != last
    browser.execute_script(move, 3)
    assert browser.execute_script("return document.getElementById('step-shown').textContent") == "300"
    assert before != browser.execute_script(shown % "run")
    browser.execute_script(move, CHECKPOINTS)
    assert browser.execute_script(shown % "run") == last

    until(browser, "document.querySelectorAll('.plot[data-drawn]').length > 1")
    ranges = "[...rsaft.figures.values()].map((one) => [one.x_range.start, one.x_range.end])"
    start, end = browser.execute_script(f"return {ranges}")[0]
    press(browser, ".plot", "+")
    zoomed = browser.execute_script(f"return {ranges}")
    width = end - start
    assert zoomed[0] == pytest.approx([start + width / 4, end - width / 4]) and zoomed[1] == zoomed[0]
    press(browser, ".plot", "ArrowRight")
    assert browser.execute_script(f"return {ranges}")[1] == pytest.approx([start + 0.35 * width, end - 0.15 * width])
    press(browser, ".plot", "0")
    assert browser.execute_script(f"return {ranges}")[0] == pytest.approx([start, end])
    # As with a mouse: from a quarter to three quarters of the first chart.
    from selenium.webdriver import ActionChains

    plot = browser.find_element("css selector", ".plot")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", plot)
    wide = plot.size["width"]
    drag = ActionChains(browser).move_to_element_with_offset(plot, -wide / 4, 0).click_and_hold()
    drag.move_by_offset(wide / 4, 0).move_by_offset(wide / 4, 0).release().perform()
    until(browser, f"{ranges}[0][1] - {ranges}[0][0] < {0.7 * width}")
    assert faults(browser) == []


def test_a_phone_the_dark_and_no_scripts_are_served(browser, report):
    look(browser, report, PHONE, "dark")
    until(browser, "document.querySelector('.plot').dataset.drawn")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= PHONE["width"]
    style = "return getComputedStyle(document.body)."
    ink, paper = (browser.execute_script(style + name) for name in ("color", "backgroundColor"))
    brightness = lambda colour: sum(map(int, re.findall(r"\d+", colour)[:3]))  # noqa: E731
    assert brightness(ink) > 600 and brightness(paper) < 100
    axis = "[...rsaft.figures.values()][0].below[0].major_label_text_color"
    dark = browser.execute_script(f"return {axis}")
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    )
    until(browser, f"{axis} !== '{dark}'")
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        look(browser, report, PHONE)
        still = browser.find_element("css selector", "noscript img")
        assert still.is_displayed() and still.size["height"] > 300
        assert not browser.find_element("css selector", "#step").is_displayed()
        assert len(browser.find_elements("css selector", "img[data-column]")) == 2 * len(PROMPTS)
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_blinded_comparison_exports_what_was_chosen(browser, tmp_path):
    from selenium.webdriver import Keys

    # The first set is redder; whoever always takes the redder picture prefers it.
    count = 11
    pairs = [
        Pair(f'prompt {n}, "quoted"', Image.new("RGB", (20, 20), (200, n, 0)), Image.new("RGB", (20, 20), (20, n, 0)))
        for n in range(count)
    ]
    names = ("Rot, rouge", "grün")
    path = tmp_path / "ab.html"
    path.write_text(blinded_page(pairs, names, seed=random.randrange(10**6)), encoding="utf-8")
    look(browser, path, PHONE, "dark")
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)})
    redness = (
        "const image = document.querySelector(`#${arguments[0]} img`), canvas = document.createElement('canvas');"
        "const context = canvas.getContext('2d'); context.drawImage(image, 0, 0);"
        "return image.complete ? context.getImageData(0, 0, 1, 1).data[0] : 0"
    )
    expected = {}
    for index in range(count):
        until(browser, "[...document.querySelectorAll('.ab img')].every((one) => one.complete)")
        redder = max(("left", "right"), key=lambda side: browser.execute_script(redness, side))
        prompt = browser.execute_script("return document.getElementById('prompt').textContent")
        choice = {0: "tie", 1: "right" if redder == "left" else "left"}.get(index, redder)
        expected[prompt] = (choice, redder)
        if index == 5:  # a slip, taken back
            press(browser, "body", "ArrowDown")
            assert browser.execute_script("return document.getElementById('done').textContent") == "6"
            press(browser, "body", "Backspace")
        keys = {"tie": Keys.ARROW_DOWN, "left": Keys.ARROW_LEFT, "right": Keys.ARROW_RIGHT}
        browser.find_element("css selector", "body").send_keys(keys[choice])
    browser.refresh()  # and goes on where it was
    assert browser.execute_script("return document.getElementById('done').textContent") == str(count)
    browser.execute_script("document.getElementById('export').click()")
    end = time.monotonic() + 20
    while not (tmp_path / "answers.csv").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    answers = read_answers(tmp_path / "answers.csv")
    assert sorted(answer.pair for answer in answers) == list(range(count))
    for answer in answers:
        assert answer.prompt == pairs[answer.pair].prompt
        choice, redder = expected[answer.prompt]
        assert answer.choice == choice and {"left": answer.left, "right": answer.right}[redder] == names[0]
    found = preference(answers)
    browser.execute_script("document.getElementById('reveal').click()")
    result = browser.execute_script("return {...document.getElementById('result').dataset}")
    assert {names[0]: found.losses, names[1]: found.wins} == {"Rot, rouge": count - 2, "grün": 1}
    assert (int(result["wins"]), int(result["losses"]), int(result["ties"])) == (1, count - 2, 1)
    assert [float(result["low"]), float(result["high"])] == pytest.approx([found.low, found.high])
    assert "Rot, rouge is preferred" in browser.execute_script("return document.getElementById('result').textContent")
    assert faults(browser) == []
