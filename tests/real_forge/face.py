"""The face in a browser, on a running Forge: settings, an image whose log is watched, Reload UI, Chinese; with screenshots.

    FORGE_ROOT=... FORGE_PYTHON=... LORA_GUARD_TEST_PORT=7913 $FORGE_PYTHON tests/real_forge/face.py [--pictures docs]

Needs playwright in FORGE_PYTHON and Debian's chromium (CHROMIUM names another), and for the Chinese picture a font that has
the characters (Debian: fonts-wqy-microhei). docs/hosts.md says what FORGE_ROOT needs.
"""

import argparse
import io
import json
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from PIL import Image
from playwright.sync_api import sync_playwright

from real_forge.reload_ui import ARGUMENTS, CHROMIUM, open_page
from real_forge.run import link_extensions
from real_forge.server import Server

LORAS = "<lora:lg_sd15_a:0.8> <lora:lg_sd15_b:-0.5> <lora:lg_flux_a:1>"
"""The third is for another model, so that there is something to refuse."""
LINES = "#lora_guard_panel .lg-line"
LIVE = "#lora_guard_panel .lg-state[data-state=live]"
STEPS = 60
EDGE = 10
"""Pixels around a picture."""
SETTING = "#setting_lora_guard_{}"


def click_tab(page, name, inside="#tabs"):
    page.locator(f"{inside} > .tab-nav > button", has_text=name).first.click()


def open_guard(page):
    click_tab(page, "LoRA Guard")
    page.wait_for_selector(LIVE)


def open_settings(page):
    click_tab(page, "Settings")
    click_tab(page, "LoRA Guard", "#settings")
    page.wait_for_selector(SETTING.format("mode") + ":visible")


def apply(page, changed):
    page.click("#settings_submit")
    page.wait_for_selector(f"#settings_result:has-text('{changed}')", timeout=30_000)


def choose(page, setting, value):
    page.check(f"{SETTING.format(setting)} input[value='{value}']")


def start_image(page):
    click_tab(page, "Txt2img")
    steps = page.locator("#txt2img_steps input[type=number]")
    steps.fill(str(STEPS))
    steps.press("Tab")
    page.fill("#txt2img_prompt textarea", f"a cat {LORAS}")
    page.click("#txt2img_generate")


def is_working(url):
    with urllib.request.urlopen(url + "/sdapi/v1/progress?skip_current_image=true", timeout=30) as answer:
        state = json.load(answer)
    return bool(state["state"]["job_count"]) or state["progress"] > 0


def watch(page, url):
    """`(lines while the image was made, lines after it)`, as the page showed them."""
    seen, end = [], time.monotonic() + 240
    while time.monotonic() < end:
        shown = page.locator(LINES).count()
        working = is_working(url)
        seen.append((working, shown))
        if not working and any(was for was, _ in seen):
            page.wait_for_timeout(2500)
            during = [count for was, count in seen if was]
            return during, page.locator(LINES).count()
        page.wait_for_timeout(150)
    raise TimeoutError(f"the image was not finished: {seen[-5:]}")


def wait_for_start(forge, times):
    """Until the web UI was started that often; "Reload UI" is one of them."""
    end = time.monotonic() + 180
    while forge.console().count("Startup time:") < times:
        if time.monotonic() > end:
            raise TimeoutError("the web UI did not come back in 3 minutes")
        time.sleep(0.5)


def asked(page, seconds):
    """How often the page asked the guard within `seconds`."""
    requests = []
    page.on("request", lambda request: requests.append(request.url) if "/lora-guard/" in request.url else None)
    page.wait_for_timeout(1000 * seconds)
    return len(requests)


def picture(page, pictures, name, selector, height=1150):
    if pictures is None:
        return
    page.set_viewport_size({"width": 1180, "height": height})
    page.wait_for_timeout(800)
    box = page.locator(selector).first.bounding_box()
    clip = {
        "x": box["x"] - EDGE,
        "y": box["y"] - EDGE,
        "width": box["width"] + 2 * EDGE,
        "height": box["height"] + 2 * EDGE,
    }
    shot = Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")
    # Text on flat colours: 256 of them are enough, and a third of the bytes.
    shot.quantize(256, method=Image.Quantize.MAXCOVERAGE).save(pictures / name, optimize=True)
    print(f"{name}: {(pictures / name).stat().st_size // 1024} kB")


def main(server=Server, link=link_extensions, settings=None):
    """`settings`: what the host's config needs to start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pictures", type=Path, help="folder for the screenshots")
    pictures = parser.parse_args().pictures
    link()
    problems = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps({"sd_model_checkpoint": "rand_sd15_tiny.safetensors", **(settings or {})}))
        with server(Path(folder) / "web.log", ["--ui-settings-file", str(config)], web=True) as forge:
            page = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS).new_page(
                viewport={"width": 1180, "height": 1000}
            )
            page.set_default_timeout(90_000)
            page.on("pageerror", lambda error: problems.append(str(error)))
            try:
                look(page, forge, config, pictures)
            except Exception:
                print(forge.console()[-3000:])
                raise
    ours = [problem for problem in problems if "lora_guard" in problem]
    assert not ours, ours
    print("The face: all as it should be")


def look(page, forge, config, pictures):
    open_page(page, forge.url)
    assert asked(page, 3) == 0, "nobody looks at the tab"

    open_settings(page)
    picture(page, pictures, "face-settings.png", "#settings_lora_guard", height=1500)
    choose(page, "mode", "Merge")
    apply(page, "lora_guard_mode")
    assert json.loads(config.read_text())["lora_guard_mode"] == "Merge"

    open_guard(page)
    before = page.locator(LINES).count()
    start_image(page)
    open_guard(page)
    during, after = watch(page, forge.url)
    print(
        f"lines: {before} before the image, {during[0]} ... {during[-1]} while it was made ({len(during)} looks), {after} after"
    )
    assert before < during[-1]
    panel = page.inner_text("#lora_guard_panel")
    print(panel)
    for part in ("Merge: ", "lg_sd15_a", "lg_sd15_b", "VRAM", "RAM"):
        assert part in panel, part
    page.locator("#lora_guard_panel .lg-fold").first.click()
    assert "(merge)" in page.inner_text("#lora_guard_panel .lg-details:visible")
    assert "image 1" in panel
    assert page.locator("#lora_guard_panel .lg-chart").count() >= 1, "the curve of the image"
    assert "rand_sd15_tiny is loaded" in page.inner_text("#lora_guard_panel .lg-headline")
    assert "lg_flux_a" in page.inner_text("#lora_guard_panel .lg-problems")
    picture(page, pictures, "face-tab.png", "#lora_guard_panel")

    click_tab(page, "Txt2img")
    said = page.inner_text("#html_log_txt2img")
    print(said)
    assert said.count("lg_flux_a") == 1, "the LoRA for another model is named once under the image"
    assert 'LoRA Guard: "Merge' in page.inner_text("#txt2img_results"), "the infotext says what was done"
    picture(page, pictures, "face-image.png", "#txt2img_results", height=1500)

    open_settings(page)
    page.check(SETTING.format("expandable_segments") + " input")
    apply(page, "lora_guard_expandable_segments")
    open_guard(page)
    page.wait_for_selector("#lora_guard_panel >> text=/not available here/")

    open_settings(page)
    choose(page, "language", "zh")
    apply(page, "lora_guard_language")
    open_guard(page)
    page.wait_for_selector("#lora_guard_panel >> text=正在使用的 LoRA")
    lines = page.locator(LINES).count()
    assert lines > 0
    picture(page, pictures, "face-tab-zh.png", "#lora_guard_panel")

    page.evaluate("document.querySelector('#settings_restart_gradio').click()")
    wait_for_start(forge, 2)
    open_page(page, forge.url)
    assert page.locator("#tabs > .tab-nav > button", has_text="LoRA Guard").count() == 1
    open_guard(page)
    page.wait_for_function("([s, n]) => document.querySelectorAll(s).length >= n", arg=[LINES, lines])
    start_image(page)
    open_guard(page)
    watch(page, forge.url)
    click_tab(page, "Settings")
    click_tab(page, "LoRA Guard", "#settings")
    assert "启用 LoRA Guard" in page.inner_text("#column_settings_lora_guard")
    picture(page, pictures, "face-settings-zh.png", "#settings_lora_guard", height=1500)
    assert asked(page, 3) == 0, "nobody looks at the tab"


if __name__ == "__main__":
    main()
