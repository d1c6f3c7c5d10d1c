"""The face in a browser, on a running Forge: settings, an image whose log is watched, buttons, a phone in the dark, Reload UI,
Chinese; with screenshots.

    FORGE_ROOT=... FORGE_PYTHON=... LORA_GUARD_TEST_PORT=7913 $FORGE_PYTHON tests/real_forge/face.py [--pictures docs]

Needs playwright in FORGE_PYTHON and Debian's chromium (CHROMIUM names another), and for the Chinese picture a font that has
the characters (Debian: fonts-wqy-microhei). With axe-playwright-python it asks axe-core too. docs/hosts.md says what
FORGE_ROOT needs.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from playwright.sync_api import sync_playwright
from support.small_picture import save

from real_forge.reload_ui import ARGUMENTS, CHROMIUM, open_page
from real_forge.run import link_extensions
from real_forge.server import Server

LORAS = "<lora:lg_sd15_a:0.8> <lora:lg_sd15_b:-0.5> <lora:lg_flux_a:1>"
"""The third is for another model, so that there is something to refuse."""
PANEL = "#lora_guard_panel"
LINES = f"{PANEL} .lg-line"
LIVE = f"{PANEL} .lg-state[data-state=live]"
PHONE = 320
"""Pixels of a narrow page."""
STEPS = 60
EDGE = 10
"""Pixels around a picture."""
NOT_UP = 404
"""The status of an address that is not added yet, during "Reload UI"."""
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


def status(address, **headers):
    """The HTTP status of a harmless question."""
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def picture(page, pictures, name, selector, width=1180):
    """Takes a picture of all of an element."""
    if pictures is None:
        return
    page.set_viewport_size({"width": width, "height": 1000})
    page.evaluate("window.scrollTo(0, 0); document.activeElement?.blur()")
    page.wait_for_timeout(800)
    box = page.locator(selector).first.bounding_box()
    page.set_viewport_size({"width": width, "height": max(1000, round(box["y"] + box["height"]) + 2 * EDGE)})
    page.wait_for_timeout(800)
    box = page.locator(selector).first.bounding_box()
    left, top = max(0, box["x"] - EDGE), max(0, box["y"] - EDGE)
    right = min(width, box["x"] + box["width"] + EDGE)
    clip = {"x": left, "y": top, "width": right - left, "height": box["y"] + box["height"] + EDGE - top}
    save(page.screenshot(clip=clip), pictures / name)


def check_access(page):
    """What axe-core has to say of the panel under the host's own theme: nothing serious."""
    package = importlib.util.find_spec("axe_playwright_python")
    if package is None:
        print("axe-core NOT ASKED: axe-playwright-python is not installed")
        return
    page.evaluate((Path(package.origin).parent / "axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("s => axe.run(s)", PANEL)
    serious = [
        (one["id"], [node["html"] for node in one["nodes"]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]
    print(f"axe-core: {len(found['passes'])} rules passed, serious: {serious}")
    assert len(found["passes"]) > 10, "it has looked at something"
    assert serious == []


def use_buttons(page, pictures):
    """Each button says what came of it, and "Will it fit?" answers in words."""
    panel = page.locator(PANEL)
    said = []
    for name in ("Free VRAM", "Free RAM", "Forget corrections"):
        before = panel.locator(".lg-told").text_content()
        panel.get_by_role("button", name=name).click()
        page.wait_for_function(
            "([s, before]) => !['', '…', before].includes(document.querySelector(s).textContent)",
            arg=[f"{PANEL} .lg-told", before],
        )
        said.append(panel.locator(".lg-told").text_content())
    print(*said, sep="\n")
    assert not any("did not" in one for one in said), said
    panel.locator(".lg-fit summary").click()
    for name, wanted in (("checkpoint", "rand_sd15_tiny"), ("fit_loras", "lg_sd15_a")):
        page.wait_for_selector(f"{PANEL} select[name={name}]")
        names = panel.locator(f"select[name={name}] option").all_text_contents()
        panel.locator(f"select[name={name}]").select_option(next(one for one in names if wanted in one))
    panel.get_by_role("button", name="Calculate").click()
    page.wait_for_selector(f"{PANEL} .lg-answer:is([data-level=good], [data-level=warning], [data-level=bad])")
    answer = panel.locator(".lg-answer").inner_text()
    print(answer)
    assert "This machine's card or RAM cannot be read" in answer, "images are made on the CPU"
    picture(page, pictures, "face-fit.png", f"{PANEL} .lg-doings")
    check_access(page)


def on_a_phone(browser, url, pictures):
    """In the dark, 320 pixels wide: nothing of the panel lies outside."""
    page = browser.new_page(viewport={"width": PHONE, "height": 800})
    page.set_default_timeout(90_000)
    page.goto(f"{url}/?__theme=dark", wait_until="domcontentloaded")
    page.wait_for_selector("#txt2img_prompt textarea")
    page.wait_for_timeout(3000)
    open_guard(page)
    assert page.evaluate("document.body.classList.contains('dark')")
    page.locator(f"{PANEL} .lg-fold").first.click()
    outside = page.evaluate(
        "([s, width]) => [...document.querySelectorAll(s + ' *')].filter(e => e.offsetParent &&"
        " e.getBoundingClientRect().right > width + 1 && !e.closest('.lg-log')).map(e => e.className || e.tagName)",
        [PANEL, PHONE],
    )
    picture(page, pictures, "face-phone.png", PANEL, PHONE)
    assert outside == [], outside
    check_access(page)
    page.close()


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
            page.on(
                "console",
                lambda said: problems.append(f"{said.text} {said.location}") if said.type == "error" else None,
            )
            page.on(
                "response",
                lambda told: (
                    problems.append(f"lora_guard: {told.status} {told.url}")
                    if "/lora-guard/" in told.url and told.status >= 400 and told.status != NOT_UP
                    else None
                ),
            )
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
    for path in ("/lora-guard/panel", "/lora-guard/v1/status"):
        assert status(forge.url + path) == 200, path
        assert status(forge.url + path, Host="another.example:7860") == 403, f"{path} under another site's name"

    open_settings(page)
    picture(page, pictures, "face-settings.png", "#settings_lora_guard")
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
    on_a_phone(page.context.browser, forge.url, pictures)

    click_tab(page, "Txt2img")
    said = page.inner_text("#html_log_txt2img")
    print(said)
    assert said.count("lg_flux_a") == 1, "the LoRA for another model is named once under the image"
    assert 'LoRA Guard: "Merge' in page.inner_text("#txt2img_results"), "the infotext says what was done"
    picture(page, pictures, "face-image.png", "#txt2img_results")

    open_guard(page)
    use_buttons(page, pictures)

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
    check_access(page)
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
    # As a new user finds it; nothing is applied.
    choose(page, "mode", "Automatic")
    page.uncheck(SETTING.format("expandable_segments") + " input")
    picture(page, pictures, "face-settings-zh.png", "#settings_lora_guard")
    assert asked(page, 3) == 0, "nobody looks at the tab"


if __name__ == "__main__":
    main()
