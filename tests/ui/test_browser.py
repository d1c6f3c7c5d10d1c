"""The tab in a real browser, against the stand-alone page: it follows, it rests when hidden, and names stay text."""

import re
import threading
import time
from pathlib import Path

import pytest
from support import standalone
from support.face_server import Served, chromium, package, playwright
from support.standalone import MadeUpTime, Standalone, made_up_report
from support.waiting import LONGEST_WAIT_SECONDS, wait_until

from lib_lora_guard.memory.nvml import GpuProcess, GpuProcesses
from lib_lora_guard.messages import Message
from lib_lora_guard.reporting.report import ApplyReport, LoraReport
from lib_lora_guard.settings import Language
from lib_lora_guard.ui import accordion

ROWS = "#lora_guard_panel .lg-line"
STATE = "#lora_guard_panel .lg-state"
HOSTILE = '<img src=x onerror="window.hacked = 1"><script>window.hacked = 2</script>'
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"]


@pytest.fixture(scope="module")
def browser():
    path = chromium()
    with playwright().sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=path, args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def host():
    return Standalone(time=MadeUpTime())


@pytest.fixture
def server(host):
    with Served(host.app) as served:
        yield served


ASKED = "/lora-guard/panel?"
"""What the panel asks for by itself, about once a second."""


def watch(page, broken=None):
    """Gathers in `page.problems` what goes wrong in a page, in `page.asked` what it asked for, and in `page.unanswered` what of
    that is under way.

    Its clock stands. Only the test lets time pass in it, so its timers do not depend on how fast the machine is.
    `broken`: What the test itself breaks, a pattern of the browser's complaint with the address.
    """
    page.problems, page.asked, page.unanswered = [], [], set()
    page.clock.install(time=0)
    page.clock.pause_at(1000)

    def asked(request):
        if ASKED in request.url:
            page.asked.append(request)
            page.unanswered.add(request)

    page.on("request", asked)
    page.on("response", lambda response: page.unanswered.discard(response.request))
    page.on("requestfailed", lambda request: page.unanswered.discard(request))

    def console(message):
        said = f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" and not (broken and re.search(broken, said)):
            page.problems.append(said)

    page.on("console", console)
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("dialog", lambda dialog: (page.problems.append(dialog.message), dialog.dismiss()))


@pytest.fixture
def open_page(browser, server):
    """Opens the page and watches it; nothing may go wrong in it, except what `broken` says."""
    contexts = []

    def open_(shown=True, path="/", broken=None, **options):
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **options})
        contexts.append(context)
        page = context.new_page()
        watch(page, broken)
        page.goto(server.url + path)
        if shown:
            page.click("#show_guard")
            page.wait_for_selector(STATE + "[data-state=live]")
        return page

    yield open_
    for context in contexts:
        assert [page.problems for page in context.pages] == [[] for page in context.pages]
        context.close()


def texts(page):
    return page.locator(ROWS + " .lg-text:visible").all_inner_texts()


def let_answer(page):
    """Waits until the server has answered all that the page asked."""
    wait_until(lambda: page.wait_for_timeout(10) or not page.unanswered, "the server did not answer", step_seconds=0)


def wait_for(page, selector):
    """Waits until it is there. A second of the page passes at once when the server has answered all that the page asked."""
    end, place = time.monotonic() + LONGEST_WAIT_SECONDS, page.locator(selector).first
    while not place.is_visible():
        assert time.monotonic() < end, f"there is no {selector}: {page.inner_text('body')[:2000]}"
        if not page.unanswered:
            page.clock.fast_forward(1000)
        let_answer(page)


def wait_for_line(page, text):
    wait_for(page, f"{ROWS} >> text={text}")


def asked_in(page, seconds):
    """Lets so many seconds of the page pass, and returns how often it asked in them. Each time it has its answer at once."""
    before = len(page.asked)
    for _ in range(10 * seconds):
        page.clock.run_for(100)
        if page.unanswered:
            let_answer(page)
    return len(page.asked) - before


def set_shown(page, shown):
    """Changes to the panel's tab, or to the other; the panel has seen it."""
    page.click("#show_guard" if shown else "#show_other")
    page.evaluate("""() => new Promise((seen) => {
        const watch = new IntersectionObserver(() => { watch.disconnect(); seen(); });
        watch.observe(document.getElementById("lora_guard_panel"));
    })""")


def test_the_log_grows_while_an_image_is_made(open_page, host, monkeypatch):
    steps = threading.Semaphore(0)
    monkeypatch.setattr(host.time, "sleep", lambda seconds: seconds != host.step_seconds or steps.acquire())
    page = open_page()
    assert texts(page) == []
    assert "No LoRA has been applied yet" in page.inner_text("#lora_guard_panel")
    page.click("#generate")
    for done in (1, 9, 20):
        steps.release(done - len(texts(page)[1:]))
        wait_for_line(page, f"step {done} of 20")
        assert len(texts(page)) == done + 1, "where the image is not finished, its lines are here"
    lines = texts(page)
    assert [re.sub(r"^step (\d+) of 20$", r"\1", line) for line in lines[1:]] == [str(n) for n in range(1, 21)]
    assert "style.safetensors" in lines[0]
    table = page.locator("#lora_guard_panel table.lg-loras")
    assert table.locator("thead th[scope=col]").all_inner_texts() == [
        "LoRA", "Made for", "Rank", "Size", "Strength", "Applied", "Cost"
    ]  # fmt: skip
    cells = table.locator("tbody").nth(0).locator("tr").nth(0).locator("th, td").all_inner_texts()
    assert cells == ["style.safetensors", "Flux", "16", "38.0 MB", "0.8", "100 %", "42.0 MB · 25 ms"]
    details = table.locator("tbody").nth(0).locator(".lg-details")
    assert not details.is_visible()
    table.get_by_role("button", name="style.safetensors", exact=True).press("Enter")
    assert "290 beside the layer (bypass)" in details.inner_text()
    assert "text encoder, strength 0.8: 72 weights changed" in details.inner_text()
    host.left_out = {}
    wait_for(page, "table.lg-loras tbody:nth-of-type(2):last-child")
    assert details.is_visible(), "what the user has opened stays open when the rows are drawn anew"
    assert "not applied: made for SDXL" in table.locator("tbody.lg-refused").inner_text()
    assert page.locator("[role=meter]").count() == 2
    assert page.locator("[role=meter]").first.get_attribute("aria-valuetext") == "8.19 GB of 12.0 GB in use"


def test_memory_is_split_explained_and_sourced(open_page, host):
    host.reports = [made_up_report()]
    page = open_page()
    vram = page.locator(".lg-figure").first
    assert vram.locator(".lg-free").inner_text() == "3.81 GB free of 12.0 GB"
    assert vram.locator(".lg-amount").all_inner_texts() == [
        "this Forge 6.28 GB", "other programs and the driver 1.14 GB", "kept by torch, free for the next step 790 MB"
    ]  # fmt: skip
    assert "NVML" in vram.locator(".lg-source").inner_text()
    widths = [
        float(part.get_attribute("style").removeprefix("width: ").rstrip("%;"))
        for part in vram.locator(".lg-bar-used").all()
    ]
    assert widths == [52.3, 9.5, 6.4]
    step = page.locator(".lg-step").inner_text()
    assert step.startswith(
        "One step of the image model takes about 7.43 GB of VRAM: the model 5.62 GB + LoRAs beside it 331 MB + kept free for computing 1.49 GB"
    )
    assert "The other 730 MB of the model have no room there" in step
    programs = page.locator(".lg-programs").inner_text()
    assert (
        programs == "Other programs hold 850 MB of VRAM; closing them makes room: browser 640 MB, game launcher 210 MB"
    )


def test_all_numbers_stay_open_while_memory_changes(open_page, host):
    page = open_page()
    table = page.locator(".lg-numbers table")
    assert not table.is_visible()
    page.locator(".lg-numbers summary").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".lg-numbers table:visible")
    rows = table.locator("tr").all_inner_texts()
    assert any(re.match(r"VRAM held by torch\s+6\.74 GB\s+torch's CUDA allocator", row) for row in rows)
    assert any(re.match(r"pinned RAM\s+not known: CUDA has not been started yet", row) for row in rows)
    told = page.locator(".lg-figure").first.locator(".lg-free").inner_text()
    assert told == "3.81 GB free of 12.0 GB"
    host.vram_free_mb = 1900
    wait_for(page, ".lg-free >> text=1.86 GB free of 12.0 GB")
    assert table.is_visible()
    assert page.evaluate("document.activeElement.tagName") == "SUMMARY"


def test_a_hidden_tab_asks_nothing_and_catches_up_when_shown(open_page, host):
    page = open_page(shown=False)
    host.log.info("before anybody looked")
    assert asked_in(page, seconds=5) == 0
    set_shown(page, True)
    wait_for_line(page, "before anybody looked")
    for hide, show in (
        (lambda: set_shown(page, False), lambda: set_shown(page, True)),
        (lambda: page.evaluate(set_hidden("true")), lambda: page.evaluate(set_hidden("false"))),
    ):
        hide()
        said = f"said in the dark {len(page.asked)}"
        host.log.info(said)
        assert asked_in(page, seconds=5) == 0
        show()
        wait_for_line(page, said)
    assert 0 < host.asked <= len(page.asked)
    assert 2 <= asked_in(page, seconds=3) <= 3, "about once a second"


def set_hidden(value):
    return f"""() => {{
        Object.defineProperty(document, "hidden", {{ configurable: true, get: () => {value} }});
        document.dispatchEvent(new Event("visibilitychange"));
    }}"""


def test_the_log_goes_on_after_a_restart_of_the_server(browser):
    first, second = Standalone(), Standalone()
    context = browser.new_context()
    page = context.new_page()
    watch(page, broken="ERR_(CONNECTION_REFUSED|EMPTY_RESPONSE|CONNECTION_RESET).*/lora-guard/panel")
    with Served(first.app) as server:
        port = server.port
        first.log.info("of the first server")
        first.log.info("its second line")
        page.goto(server.url)
        page.click("#show_guard")
        wait_for_line(page, "its second line")
    wait_for(page, STATE + "[data-state=waiting]")
    assert re.match(r"The server has not answered since \d\d:\d\d:\d\d\. All numbers", page.inner_text(".lg-headline"))
    assert page.locator(".lg-strip").get_attribute("data-level") == "bad"
    with Served(second.app, port):
        wait_for(page, ".lg-divider")
        # Its first line has a number that the page has seen from the first server.
        second.log.info("of the second server")
        wait_for_line(page, "of the second server")
        assert page.locator(ROWS).all_inner_texts()[2] == "—— Forge was started again ——"
        assert texts(page) == ["of the first server", "its second line", "of the second server"]
        second.log.info("and on")
        wait_for_line(page, "and on")
        assert texts(page)[-2:] == ["of the second server", "and on"]
        assert page.problems == []
        context.close()


def test_hostile_names_are_text(open_page, host, monkeypatch):
    monkeypatch.setattr(standalone, "MADE_UP_PROGRAMS", GpuProcesses((GpuProcess(1, HOSTILE + "{size}", 900 << 20),)))
    name = HOSTILE + "\u202egnp.exe\x07\n\u2028"
    good = LoraReport(name, 1.0, used=1, modes={HOSTILE: 1}, reasons={HOSTILE: {HOSTILE}})
    bad = LoraReport(HOSTILE, float("nan"), refused=HOSTILE)
    host.reports = [ApplyReport(HOSTILE, [good, bad], 0, 0, 1.0, HOSTILE)]
    host.left_out = {name + "2": HOSTILE}
    host.log.error("%s", name)
    page = open_page()
    wait_for_line(page, "onerror")
    page.wait_for_timeout(500)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#lora_guard_panel :is(img, script)").count() == 0
    shown = HOSTILE + "?gnp.exe???"
    assert page.locator("#lora_guard_panel .lg-loras tbody th").all_inner_texts() == [shown, HOSTILE, shown + "2"]
    assert texts(page) == [shown]
    assert page.locator("#lora_guard_panel .lg-refused .lg-why-not").first.inner_text() == f"not applied: {HOSTILE}"
    problems = page.locator(".lg-problem span").all_inner_texts()
    assert problems == [f"{HOSTILE} was left out: {HOSTILE}", f"{shown}2 was left out: {HOSTILE}", shown]
    assert page.inner_text(".lg-programs").endswith(f"makes room: {HOSTILE}{{size}} 900 MB")


def test_chinese_by_the_browser_and_by_the_setting(open_page, host):
    host.reports = [made_up_report()]
    host.log.info("%s", Message("host.updated", {"version": "0.1.0"}))
    page = open_page(locale="zh-CN")
    wait_for_line(page, "LoRA Guard 已更新")
    panel = page.inner_text("#lora_guard_panel")
    assert "正在使用的 LoRA" in panel
    assert "强度" in panel
    assert "Strength" not in panel
    host.language = Language.ENGLISH
    wait_for_line(page, "LoRA Guard was updated")
    assert len(texts(page)) == 1, "the log is told anew, not twice"
    assert "LoRAs in use" in page.inner_text("#lora_guard_panel")
    host.language = Language.CHINESE
    wait_for_line(page, "LoRA Guard 已更新")


def test_filter_copy_download_and_pause(open_page, host):
    for level in ("debug", "info", "warning", "error"):
        getattr(host.log, level)("a line of level %s", level)
    page = open_page(permissions=["clipboard-read", "clipboard-write"], accept_downloads=True)
    wait_for_line(page, "level error")
    assert len(texts(page)) == 4
    page.get_by_label("Show").first.select_option("warning")
    assert texts(page) == ["a line of level warning", "a line of level error"]
    page.get_by_role("button", name="Copy", exact=True).click()
    page.wait_for_selector("text=Copied")
    stamp = r"\d\d:\d\d:\d\d"
    expected = rf"{stamp} warning: a line of level warning\n{stamp} error: a line of level error\n"
    assert re.fullmatch(expected, page.evaluate("navigator.clipboard.readText()"))
    with page.expect_download() as download:
        page.click("text=Download")
    assert re.fullmatch(r"lora-guard-\d{4}-\d\d-\d\d-\d\d-\d\d-\d\d\.txt", download.value.suggested_filename)
    with open(download.value.path(), encoding="utf-8") as file:
        assert re.fullmatch(expected, file.read())
    # In a page that is not secure (http in a local network) there is no clipboard: the old way has to do.
    page.evaluate("navigator.clipboard.writeText('') ")
    page.evaluate("Object.defineProperty(navigator.clipboard, 'writeText', { value: () => Promise.reject() })")
    page.get_by_role("toolbar").get_by_role("button", name=re.compile("Copy|Copied")).click()
    wait_until(lambda: re.fullmatch(expected, page.evaluate("navigator.clipboard.readText()")), "nothing was copied")
    page.click("text=Pause")
    page.wait_for_selector(STATE + "[data-state=paused]")
    host.log.error("said in a pause")
    assert asked_in(page, seconds=5) == 0
    page.click("text=Resume")
    wait_for_line(page, "said in a pause")


def test_the_log_follows_its_end_until_the_reader_scrolls_up(open_page, host):
    for number in range(1100):
        host.log.info("line %d is here", number)
        host.log.debug("between")
    page = open_page()
    wait_for_line(page, "line 1099 is here")
    assert page.locator(ROWS).count() == 2000, "the oldest rows are let go"
    gap = (
        "() => { const l = document.querySelector('.lg-lines'); return l.scrollHeight - l.scrollTop - l.clientHeight }"
    )
    assert page.evaluate(gap) < 2
    page.evaluate("document.querySelector('.lg-lines').scrollTop = 300")
    page.wait_for_selector(".lg-newest:visible")
    page.evaluate("window.mark = [...document.querySelectorAll('.lg-line')].find(r => r.offsetTop >= 300)")
    host.log.info("while the reader reads")
    wait_for_line(page, "while the reader reads")
    assert page.evaluate(gap) > 1000
    set_shown(page, False)
    set_shown(page, True)
    assert page.evaluate(gap) > 1000, "still where the reader was"
    page.click(".lg-newest")
    assert page.evaluate(gap) < 2
    assert not page.is_visible(".lg-newest")
    host.log.info("followed again")
    wait_for_line(page, "followed again")
    assert page.evaluate(gap) < 2


def test_a_line_said_again_takes_the_place_of_the_first(open_page, host):
    page = open_page()
    host.log.info("the same")
    wait_for_line(page, "the same")
    for _ in range(3):
        host.log.info("the same")
    host.log.info("another")
    wait_for_line(page, "another")
    assert texts(page) == ["the same (x4)", "another"]


def test_the_page_says_when_the_login_is_missing(open_page, host):
    page = open_page(broken="401.*/lora-guard/panel")
    host.app.auth = {"somebody": "password"}
    wait_for(page, STATE + "[data-state=log_in]")
    assert page.inner_text(STATE) == "not logged in; reload the page"
    host.app.auth = None
    wait_for(page, STATE + "[data-state=live]")


@pytest.mark.parametrize(("width", "theme"), [(340, "dark"), (1500, "light")])
def test_narrow_and_wide_windows(open_page, host, width, theme):
    host.reports = [made_up_report()]
    host.reports[0].loras[0].label = "a_very_long_name_without_any_space_in_it_" * 3 + ".safetensors"
    host.log.info("word " * 100)
    page = open_page(path=f"/?__theme={theme}", viewport={"width": width, "height": 700})
    wait_for_line(page, "word")
    page.locator(".lg-numbers summary").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for name in ("Pause", "Copy", "Download"):
        button = page.get_by_role("button", name=name, exact=True).bounding_box()
        assert 0 <= button["x"] < button["x"] + button["width"] <= width
    assert page.get_by_role("log").get_attribute("aria-label") == "Log"
    page.get_by_role("button", name="Pause").focus()
    page.keyboard.press("Enter")
    assert page.locator(STATE).get_attribute("data-state") == "paused"


def test_the_strip_says_what_is_going_on_and_keeps_problems_until_they_are_closed(open_page, host):
    host.crash = ["the last run was cut off while the VAE was decoding the image"]
    host.timeline.begin_image()
    host.timeline.enter("sampling_step", standalone.levels(8000, 16000))
    host.reports, host.steps, host.left_out = [made_up_report()], (6, 30), {"xl.safetensors": "made for SDXL"}
    page = open_page()
    strip = page.locator(".lg-strip")
    assert page.inner_text(".lg-headline") == "flux1-dev-bnb-nf4-v2: step 7 of 30"
    assert strip.get_attribute("data-level") == "bad"
    assert page.locator(".lg-problem span").all_inner_texts() == [
        "the last run was cut off while the VAE was decoding the image",
        "pose_xl.safetensors was left out: made for SDXL, this is Flux; use a LoRA for Flux",
        "xl.safetensors was left out: made for SDXL",
    ]
    host.reports, host.steps, host.left_out = [], (7, 30), {}
    wait_for(page, ".lg-headline >> text=step 8 of 30")
    assert page.locator(".lg-problem").count() == 3, "gone from the server, not closed by the user"
    page.locator(".lg-problem .lg-close").first.press("Enter")
    assert strip.get_attribute("data-level") == "warning"
    page.reload()
    page.click("#show_guard")
    wait_for(page, ".lg-headline >> text=step 8 of 30")
    assert (page.locator(".lg-problem").count(), strip.get_attribute("data-level")) == (0, "good")
    # A night of images that fail leaves no endless list.
    host.left_out = {f"a{n}.safetensors": "gone" for n in range(40)}
    wait_for(page, ".lg-problem >> text=a39.safetensors")
    host.left_out = {f"b{n}.safetensors": "gone" for n in range(10)}
    wait_for(page, ".lg-problem >> text=b9.safetensors")
    said = page.locator(".lg-problem span").all_inner_texts()
    assert (len(said), said[0][:3], said[-10][:2]) == (29, "a21", "b0"), "the closed one is the 30th"


def told_at(page, chart, from_the_right):
    """What a chart says at so many pixels from its right end."""
    box = chart.bounding_box()
    page.mouse.move(box["x"] + box["width"] - from_the_right, box["y"] + 50)
    return page.inner_text(".lg-tip:visible")


def test_the_curve_has_phases_the_promise_the_peak_and_a_point_to_read(open_page, host):
    host.generate(3)
    host.log.info("of the first image")
    page = open_page()
    assert "The curve begins" not in page.inner_text(".lg-curve")
    assert page.inner_text(".lg-peak") == "Image 1: 9.20 GB measured at most, 8.40 GB promised, of 12.0 GB"
    vram, ram = page.locator(".lg-chart").all()
    assert page.locator(".lg-chart-head").all_inner_texts() == [
        "VRAM\n6.93 GB of 12.0 GB, the limit of the card (red line)",
        "RAM\n16.5 GB of 32.0 GB, all that this machine has (red line)",
    ]
    assert (vram.locator(".lg-promised").count(), ram.locator(".lg-promised").count()) == (1, 0)
    vram.focus()
    page.keyboard.press("Home")
    assert re.search(r"^\d\d:\d\d:\d\d, image 1, load: VRAM 1.27 GB of 12.0 GB$", page.inner_text(".lg-tip"))
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    assert page.inner_text(".lg-tip").endswith("image 1, load: VRAM 5.96 GB of 12.0 GB")
    page.keyboard.press("End")
    assert vram.get_attribute("aria-valuetext").endswith("between: VRAM 6.93 GB of 12.0 GB, 8.40 GB promised")
    for chart, at_the_end in ((ram, "RAM 16.5 GB of 32.0 GB"), (vram, "VRAM 6.93 GB of 12.0 GB, 8.40 GB promised")):
        assert told_at(page, chart, from_the_right=1).endswith(f", image 1, between: {at_the_end}")
    # The peak of the decoding and what is left after it are of one moment.
    assert told_at(page, vram, from_the_right=3).endswith("between: VRAM 9.20 GB of 12.0 GB, 8.40 GB promised")
    host.generate(1)
    wait_for(page, ".lg-peak >> text=Image 2")
    assert page.locator(".lg-chart").first.locator(".lg-image-number").all_text_contents()[0] == "1"
    assert [row for row in page.locator(ROWS).all_inner_texts() if "——" in row] == ["—— image 1 ——", "—— image 2 ——"]
    # Without a card the legend has RAM's line alone.
    assert page.locator(".lg-curve-legend li:visible").count() == 6
    without_card = page.evaluate(
        """() => { const curve = new loraGuard.Curve((name) => name, {});
        const samples = [[1, 0, 1, "load", null, 5, null], [2, 1, 1, "steps", null, 6, null]];
        curve.add({ samples, images: [], vram_total_mb: null, ram_total_mb: 10 });
        return [curve.promised.hidden, curve.element.className, curve.place.childNodes.length]; }"""
    )
    assert without_card == [True, "lg-curve lg-without-vram", 1]


def test_a_chosen_point_stays_while_samples_arrive(open_page, host):
    host.generate(3)
    page = open_page()
    vram = page.locator(".lg-chart").first
    vram.focus()
    page.keyboard.press("Home")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    chosen = page.inner_text(".lg-tip")
    assert chosen.endswith("image 1, load: VRAM 5.96 GB of 12.0 GB")
    host.generate(1)
    wait_for(page, ".lg-peak >> text=Image 2")
    assert (page.inner_text(".lg-tip:visible"), vram.get_attribute("aria-valuetext")) == (chosen, chosen)
    place = "() => { const c = document.querySelector('.lg-chart .lg-cursor'); return [c.style.display, +c.getAttribute('x1')] }"
    shown, x = page.evaluate(place)
    assert shown == ""
    assert page.locator(".lg-tip").bounding_box()["x"] == pytest.approx(vram.bounding_box()["x"] + x + 6, abs=1)
    page.keyboard.press("ArrowRight")
    assert ", image 1, between: VRAM 6.88 GB of 12.0 GB" in page.inner_text(".lg-tip"), "the one behind it, not the end"
    page.keyboard.press("Escape")
    host.generate(1)
    wait_for(page, ".lg-peak >> text=Image 3")
    assert not page.is_visible(".lg-tip"), "closed stays closed"
    assert page.evaluate(place)[0] == "none"
    box = vram.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 3, box["y"] + 50)
    chosen = page.inner_text(".lg-tip:visible")
    host.generate(1)
    wait_for(page, ".lg-peak >> text=Image 4")
    page.wait_for_timeout(100)
    assert page.inner_text(".lg-tip:visible") == chosen
    assert page.evaluate(place)[0] == ""
    page.mouse.move(0, 0)
    assert not page.is_visible(".lg-tip")


EXPLAINED = {
    *("VRAM", "RAM", "this Forge", "other programs and the driver", "kept by torch, free for the next step"),
    *("the model", "LoRAs beside it", "kept free for computing", "everything else", "page file (swap) left"),
    *("Every number and where it comes from", "measured", "promised", "load", "encode", "steps", "decode", "LoRA mode"),
    *("LoRA", "Made for", "Rank", "Size", "Strength", "Applied", "Cost", "Kind", "290 beside the layer (bypass)"),
    *("Free VRAM", "Free RAM", "Forget corrections", "Copy for a bug report", "Will it fit?", "Calculate"),
    *("Search", "Resume", "Copy", "Download", "why?", "↓ To the newest line", "×"),
    *("Checkpoint", "LoRAs (several with Ctrl)", "Show"),
}
"""Words of the page with an explanation, beside those with a number in them."""
TERMS = """() => [...document.querySelectorAll("#lora_guard_panel :is(.lg-term, [data-tip], button, select, input, summary, [role=meter])")]
    .filter((one) => !one.matches(".lg-fold"))
    .map((one) => {
        const word = one.matches("label") ? one.firstChild.textContent.trim() : one.textContent || one.placeholder || one.role;
        const from = one.closest("[data-tip]"), stop = one.control || one, box = document.getElementById("lora_guard_tip");
        const term = { word, tip: from ? from.dataset.tip : "", isStop: stop.tabIndex >= 0 };
        if (!one.checkVisibility() || one.closest("[hidden]")) return { ...term, isHidden: true };
        document.activeElement.blur();
        stop.focus();
        const told = box.hidden ? "" : box.textContent, isTold = stop.getAttribute("aria-describedby") === box.id;
        stop.dispatchEvent(new KeyboardEvent("keydown", { key: "Escape", bubbles: true }));
        return { ...term, told, isTold, isClosed: box.hidden };
    })"""


@pytest.mark.parametrize("locale", ["en", "zh-CN"])
def test_every_term_is_explained_to_the_pointer_and_the_keyboard(open_page, host, locale):
    host.generate(1)
    host.log.info("%s", Message("memory.shrunk", {"size_mb": 730.0, "model": "KModel"}))
    page = open_page(locale=locale)
    page.locator(".lg-fold").first.click()
    page.locator(".lg-fit summary").click()
    page.wait_for_selector(".lg-form select")
    page.click(".lg-pause")
    page.hover("nav")
    terms = page.evaluate(TERMS)
    shown = [term for term in terms if "isHidden" not in term]
    assert [term for term in terms if not term["tip"] or not term["isStop"]] == []
    wrong = [term for term in shown if (term["told"], term["isTold"], term["isClosed"]) != (term["tip"], True, True)]
    assert wrong == []
    assert len(shown) > 50
    if locale == "en":
        tips = {term["word"]: term["tip"] for term in terms}
        assert EXPLAINED - set(tips) == set()
        assert tips["kept by torch, free for the next step"] == (
            "VRAM that torch has got from the driver and does not use now. Other programs see it as taken; the next step "
            "uses it first. Source of the number: torch's CUDA allocator."
        )
    else:
        assert [term for term in terms if not re.search("[\u4e00-\u9fff]", term["tip"])] == []


def test_a_term_in_focus_stays_explained_while_its_number_changes(open_page, host):
    page = open_page()
    free = page.locator(".lg-free").first
    free.focus()
    assert page.inner_text(".lg-tip:visible") == "8.19 GB of 12.0 GB in use"
    host.vram_free_mb = 1900
    wait_for(page, ".lg-tip:visible >> text=10.1 GB of 12.0 GB in use")
    assert page.evaluate("document.activeElement.className") == "lg-term lg-free"
    page.keyboard.press("Escape")
    host.vram_free_mb = 3900
    wait_for(page, ".lg-free >> text=3.81 GB free")
    assert not page.is_visible(".lg-tip"), "closed stays closed"
    assert page.evaluate("document.activeElement.className") == "lg-term lg-free"


def test_a_line_explains_itself_and_the_search_finds_it(open_page, host):
    host.log.info("%s", Message("memory.shrunk", {"size_mb": 730.0, "model": "KModel"}))
    host.log.info("another line")
    page = open_page()
    wait_for_line(page, "another")
    page.get_by_role("button", name="why?").press("Enter")
    assert "moving 730 MB of KModel takes less time" in page.inner_text(".lg-why")
    page.get_by_label("Search").fill("ANOTHER")
    assert texts(page) == ["another line"]
    host.log.info("a third one")
    host.log.info("another again")
    wait_for_line(page, "again")
    assert texts(page) == ["another line", "another again"]
    page.get_by_label("Search").fill("")
    assert len(texts(page)) == 4


def test_the_buttons_say_what_came_of_them(open_page, host):
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    for name, did in (("Free VRAM", "free_vram"), ("Free RAM", "free_ram"), ("Forget corrections", "forget")):
        page.get_by_role("button", name=name).press("Enter")
        page.wait_for_selector(f".lg-told >> text={did} was done")
    assert host.done == ["free_vram", "free_ram", "forget"]
    host.log.info("%s", Message("host.left_out", {"name": "/home/me/secret.safetensors", "why": "a prompt"}))
    page.get_by_role("button", name="Copy for a bug report").click()
    page.wait_for_selector(".lg-told >> text=Copied")
    report = page.evaluate("navigator.clipboard.readText()")
    assert re.match(r"LoRA Guard: [0-9.]+\n\ninfo: ", report)
    assert "secret" not in report
    assert "prompt" not in report


def test_will_it_fit_asks_with_names_of_the_lists(open_page, host):
    page = open_page(broken="401.*/lora-guard/panel")
    page.locator(".lg-fit summary").press("Enter")
    page.get_by_label("Checkpoint").select_option("sdxl")
    page.get_by_label("LoRAs (several").select_option(["style", "pose_xl"])
    page.get_by_role("button", name="Calculate").press("Enter")
    page.wait_for_selector(".lg-answer[data-level=good] >> text=sdxl with pose_xl, style")
    host.app.auth = {"somebody": "password"}
    page.get_by_role("button", name="Free RAM").click()
    page.wait_for_selector(".lg-told >> text=The server did not carry it out (HTTP 401)")
    host.app.auth = None


@pytest.mark.parametrize(
    ("path", "options"),
    [
        ("/?__theme=dark", {"viewport": {"width": 320, "height": 800}}),
        ("/", {"locale": "zh-CN", "viewport": {"width": 2560, "height": 1200}}),
    ],
    ids=["dark-phone", "light-wide-chinese"],
)
def test_axe_finds_nothing_serious_and_nothing_overflows(open_page, host, path, options):
    axe = playwright_axe()
    host.crash = ["the last run was cut off"]
    host.generate(3)
    host.log.info("%s", Message("memory.shrunk", {"size_mb": 730.0, "model": "KModel"}))
    page = open_page(path=path, broken="ERR_FAILED.*/lora-guard/panel", **options)
    wait_for(page, ".lg-link")
    page.locator(".lg-link").first.click()
    for fold in page.locator(".lg-fold").all():
        fold.click()
    page.locator(".lg-fit summary").click()
    page.wait_for_selector(".lg-form select")
    page.locator(".lg-form .lg-button").click()
    page.wait_for_selector(".lg-answer p")
    page.mouse.move(0, 0)  # axe scrolls, and what comes under the pointer would show its own
    page.locator(".lg-figure .lg-term").first.focus()
    assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
    page.evaluate(axe)
    found = axe_run(page)
    assert serious(found) == []
    assert len(found["passes"]) > 10, "it has looked at something"
    page.route("**/lora-guard/panel?*", lambda route: route.abort())
    wait_for(page, "#lora_guard_panel.lg-gone")
    assert page.is_visible(".lg-tip")
    gone = axe_run(page, runOnly=["color-contrast"])
    assert serious(gone) == []
    for part in (".lg-tip", ".lg-why", ".lg-answer", ".lg-why-not", ".lg-refused", ".lg-headline", ".lg-state"):
        assert page.locator(part + ":visible").count(), f"{part} is not open"
    for looked in (found, gone):
        colours = [check for one in looked["passes"] for check in one["nodes"] if one["id"] == "color-contrast"]
        seen = " ".join(str(check["target"]) + check["html"] for check in colours)
        for part in ("lg-tip", "lg-why", "lg-answer", "lg-why-not", "lg-headline"):
            assert part in seen, f"axe has not looked at {part}"
    # A server that is gone takes the colours away; axe does not see that.
    greys = [[grey(check["any"][0]["data"][name]) for name in ("fgColor", "bgColor")] for check in colours]
    assert len(greys) > 30
    assert [pair for pair in greys if (max(pair) + 0.05) / (min(pair) + 0.05) < 4.5] == []


def axe_run(page, **options):
    """What axe finds. Its own timers need a few milliseconds of the page; the panel asks for nothing in them."""
    page.evaluate(
        """(options) => {
        window.found = null;
        axe.run("#lora_guard_panel", options).then((found) => { window.found = found; }, (error) => { window.found = String(error); });
    }""",
        options,
    )
    wait_until(lambda: page.clock.run_for(1) or page.evaluate("found !== null"), "axe has not come to an end")
    return page.evaluate("found")


def serious(found):
    """What axe finds that keeps a reader out."""
    return [
        (one["id"], [node["html"] for node in one["nodes"]])
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def grey(colour):
    """The luminance of a colour under the CSS filter `grayscale(1)`."""
    red, green, blue = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    level = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4


ACCORDION = """(told) => {
    const add = (parent, tag, attributes, text = "") => {
        const made = Object.assign(document.createElement(tag), attributes, { textContent: text });
        parent.append(made);
        return made;
    };
    for (const id of ["html_info_txt2img", "html_log_txt2img"]) add(document.body, "div", { id });
    const accordion = add(document.body, "div", { id: "lora_guard_txt2img" });
    const name = add(accordion, "button", { className: "label-wrap" });
    add(name, "span", {}, "LoRA Guard");
    name.addEventListener("click", () => name.classList.toggle("open"));
    add(accordion, "div", {}).innerHTML = told;
    window.asked = 0;
    add(accordion, "button", { id: "lora_guard_txt2img_opened" }).addEventListener("click", () => { window.asked += 1; });
    window.gradioApp = () => document;
    window.onUiLoaded = (start) => start();
}"""
"""The parts of the WebUI's page that the accordion's script reads, with the button that gradio sends to the server."""


def test_the_accordion_asks_nothing_while_it_is_closed(open_page):
    page = open_page(shown=False)
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.evaluate(ACCORDION, accordion.place("en"))
    page.add_script_tag(path=standalone.ROOT / "javascript" / "lora_guard_accordion.js")

    def image(summary):
        page.evaluate("(said) => { html_info_txt2img.textContent = said }", f"Steps: 30, LoRA Guard: {summary}")
        page.clock.run_for(1000)
        return page.inner_text(".lora_guard_badge"), page.evaluate("asked")

    assert image("style bypass") == ("active", 0)
    assert image('"style bypass, without pose (made for SDXL)"') == ("left out", 0)
    for _ in range(2):  # opened, and closed again at once
        page.click("#lora_guard_txt2img .label-wrap")
    page.clock.run_for(1000)
    assert (page.evaluate("asked"), requests) == (0, [])
    page.click("#lora_guard_txt2img .label-wrap")
    page.clock.run_for(1000)
    assert page.evaluate("asked") == 1
    assert image("style bypass") == ("active", 2)


def playwright_axe():
    """The script of axe-core."""
    return (Path(package("axe_playwright_python").__file__).parent / "axe.min.js").read_text(encoding="utf-8")
