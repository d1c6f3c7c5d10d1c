"""What stands under an image and beside it, in a browser on a running Forge: lines, badge, accordion, paste-back, X/Y/Z plot.

    FORGE_ROOT=... FORGE_PYTHON=... LORA_GUARD_TEST_PORT=7914 $FORGE_PYTHON tests/real_forge/picture.py

Needs what face.py needs. It puts a broken file with markup for a name into models/Lora for as long as it runs.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from playwright.sync_api import sync_playwright

from real_forge.face import PANEL, apply, click_tab, open_settings, wait_for_start
from real_forge.reload_ui import ARGUMENTS, CHROMIUM, generate, open_page
from real_forge.run import link_extensions
from real_forge.server import FORGE, Server

HOSTILE = "<img src=x onerror=document.title='o' x"
"""A tag of the prompt ends at ">", so what would be markup is closed by the page's own next tag."""
GOOD, OF_ANOTHER_MODEL = "<lora:lg_sd15_a:0.8>", "<lora:lg_flux_a:1>"
ACCORDION = "#lora_guard_txt2img"
BADGE = f"{ACCORDION} .lora_guard_badge"
MODE_AXIS, STRENGTH_AXIS = "[LoRA Guard] LoRA mode", "[LoRA Guard] LoRA strength (times the prompt's)"


def badge(page, words, state):
    """Waits for what the badge says."""
    page.wait_for_function(
        "([s, words, state]) => { const b = document.querySelector(s);"
        " return b && b.textContent === words && b.dataset.state === state }",
        arg=[BADGE, words, state],
    )


def markup(page):
    """Where the hostile name became markup: the ids around it. Forge's own cards of LoRA files are not looked at."""
    return page.evaluate(
        "[...document.querySelectorAll('img[src=x]')].filter(e => !e.closest('.extra-network-pane')).map(e => { const ids = [];"
        " for (; e; e = e.parentElement) if (e.id) ids.push(e.id); return ids.join(' < ') })"
    )


def mode(page):
    return page.evaluate(f"document.querySelector('{ACCORDION}_mode input:checked').value")


def infotext(page):
    return page.inner_text("#html_info_txt2img")


def paste(page, text):
    page.fill("#txt2img_prompt textarea", text)
    page.click("#paste")
    page.wait_for_timeout(2500)


def requests_of(page, do):
    """What the page asks its server for while `do` runs."""
    seen = []

    def add(request):
        seen.append(request.url)

    page.on("request", add)
    do()
    page.remove_listener("request", add)
    return [url for url in seen if "/file=" not in url]


def look(page, forge, shot=None):
    open_page(page, forge.url)
    page.wait_for_selector(BADGE, state="attached")
    assert requests_of(page, lambda: page.wait_for_timeout(4000)) == [], "the closed accordion asks for nothing"
    assert page.inner_text(BADGE) == "", "no image yet"

    generate(page, "a cat")
    badge(page, "", "")
    assert "LoRA Guard" not in infotext(page) + page.inner_text("#html_log_txt2img"), "nothing when all is well"
    generate(page, f"a cat {GOOD}")
    badge(page, "active", "active")
    assert "LoRA Guard mode" not in infotext(page), "the usual mode is no field"

    # A name of markup, and a LoRA for another model.
    generate(page, f"a dog {GOOD} {OF_ANOTHER_MODEL} <lora:{HOSTILE}:1>")
    badge(page, "left out", "left_out")
    said = page.inner_text("#html_log_txt2img")
    print(said)
    assert said.count("lg_flux_a") == 1
    assert f"{HOSTILE}.safetensors NOT applied" in said
    assert markup(page) == [], markup(page)

    # The tab, and back.
    click_tab(page, "LoRA Guard")
    page.wait_for_selector(f"{PANEL} .lg-problem >> text={HOSTILE}")
    shown = page.inner_text(PANEL)
    assert shown.count(f"{HOSTILE}.safetensors") >= 3, "strip, row and log"
    assert markup(page) == [], markup(page)
    if shot is not None:
        page.locator(PANEL).screenshot(path=shot.with_name("hostile.png"))
    click_tab(page, "Txt2img")

    # The accordion: one request when it is opened, none while it is open.
    opened = requests_of(page, lambda: (page.click(f"{ACCORDION} .label-wrap"), page.wait_for_timeout(3000)))
    print("asked when opened:", opened)
    assert 1 <= len(opened) <= 3
    page.wait_for_selector(f"{ACCORDION} .lora_guard_state p")
    said = page.inner_text(f"{ACCORDION} .lora_guard_state")
    print(said)
    assert "Mode in Settings: Automatic." in said
    assert "lg_sd15_a" in said
    assert f"{HOSTILE}.safetensors was left out" in said
    assert markup(page) == [], markup(page)
    assert requests_of(page, lambda: page.wait_for_timeout(4000)) == []
    page.check(f"{ACCORDION}_mode input[value=Merge]")
    badge(page, "Merge: left out", "left_out")
    generate(page, f"a cat {GOOD}")
    badge(page, "Merge: active", "active")
    page.wait_for_function(
        "s => !document.querySelector(s).textContent.includes('left out')", arg=f"{ACCORDION} .lora_guard_state"
    )
    made = infotext(page)
    assert "LoRA Guard mode: Merge" in made
    assert 'LoRA Guard: "Merge' in made

    if shot is not None:
        page.locator(ACCORDION).screenshot(path=shot)

    # Pasted back.
    page.check(f"{ACCORDION}_mode input[value='fp16 LoRA']")
    paste(page, made)
    assert mode(page) == "Merge"
    assert "LoRA Guard" not in page.inner_text("#txt2img_override_settings_row"), "it has a place of its own"
    paste(page, "a cat\nSteps: 2, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64")
    assert mode(page) == "", "as in Settings"
    # An infotext from before there was the field.
    paste(page, 'a cat\nSteps: 2, Sampler: Euler, Seed: 1, Size: 64x64, LoRA Guard: "fp16 LoRA, 120 bypass"')
    assert mode(page) == "fp16 LoRA"


def plot(forge):
    """The axes over the API: each cell's infotext tells its mode and its strengths, the plot's those that were written."""
    (info,) = [
        one for one in forge.call("/sdapi/v1/script-info") if one["name"] == "x/y/z plot" and not one["is_img2img"]
    ]
    axes = info["args"][0]["choices"]
    assert axes.count(MODE_AXIS) == axes.count(STRENGTH_AXIS) == 1
    args = [one.get("value") for one in info["args"]]
    args[:9] = [axes.index(MODE_AXIS), "Automatic, Merge", [], axes.index(STRENGTH_AXIS), "0, 0.5-1 [2]", [], 0, "", []]
    args[10] = True  # lone images
    args[-1] = True  # values as text
    body = {"prompt": f"a cat {GOOD}", "steps": 2, "width": 64, "height": 64, "seed": 1, "sampler_name": "Euler"}
    answer = forge.call("/sdapi/v1/txt2img", {**body, "script_name": "x/y/z plot", "script_args": args})
    grid, *cells = json.loads(answer["info"])["infotexts"]
    print(grid)
    assert f"a cat {GOOD}" in grid
    assert MODE_AXIS in grid
    found = [(cell.split("<lora:lg_sd15_a:")[1].split(">")[0], "LoRA Guard mode: Merge" in cell) for cell in cells]
    assert found == [(strength, merged) for strength in ("0", "0.4", "0.8") for merged in (False, True)], found
    assert len(set(answer["images"][-6:])) >= 3, "a strength shows in the picture"

    accordion = {"alwayson_scripts": {"LoRA Guard": {"args": ["Merge"]}}}
    staying = {**accordion, "override_settings_restore_afterwards": False}
    option = {"override_settings": {"lora_guard_mode": "Merge"}}
    for how, merged in (({}, False), (accordion, True), (staying, True), ({}, False), (option, True), ({}, False)):
        answer = forge.call("/sdapi/v1/txt2img", {**body, **how})
        assert ("LoRA Guard mode: Merge" in json.loads(answer["info"])["infotexts"][0]) is merged, how


def main(server=Server, link=link_extensions, settings=None):
    """`settings`: what the host's config needs to start."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--picture", type=Path, help="file for a screenshot of the accordion")
    shot = parser.parse_args().picture
    link()
    hostile = FORGE / "models" / "Lora" / f"{HOSTILE}.safetensors"
    problems = []
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps({"sd_model_checkpoint": "rand_sd15_tiny.safetensors", **(settings or {})}))
        hostile.write_bytes(b"no LoRA")
        try:
            with server(Path(folder) / "web.log", ["--ui-settings-file", str(config)], web=True) as forge:
                page = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS).new_page()
                page.set_default_timeout(90_000)
                page.on("pageerror", lambda error: problems.append(str(error)))
                try:
                    look(page, forge, shot)
                    plot(forge)
                    reload_and_switch_off(page, forge)
                except Exception:
                    print(forge.console()[-3000:])
                    raise
        finally:
            hostile.unlink()
    ours = [problem for problem in problems if "lora_guard" in problem]
    assert not ours, ours
    print("Under the image and beside it: all as it should be")


def reload_and_switch_off(page, forge):
    page.evaluate("document.querySelector('#settings_restart_gradio').click()")
    wait_for_start(forge, 2)
    open_page(page, forge.url)
    assert page.locator(ACCORDION).count() == 1
    plot(forge)
    open_settings(page)
    page.uncheck("#setting_lora_guard_enable input")
    apply(page, "lora_guard_enable")
    click_tab(page, "Txt2img")
    page.click(f"{ACCORDION} .label-wrap")
    badge(page, "off", "off")


if __name__ == "__main__":
    main()
