"""The tab's address: what it answers, and to whom. Through a real server on the loopback."""

import re
import sys
import urllib.parse
from pathlib import Path

import pytest
from support.face_server import Served
from support.standalone import ROOT, Standalone

from lib_lora_guard.messages import Message
from lib_lora_guard.messages.catalogue import TEXTS
from lib_lora_guard.settings import Language
from lib_lora_guard.ui.language import reader_language
from lib_lora_guard.ui.panel import PAGE_LINES, labels
from lib_lora_guard.ui.route import PATH, add_route

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import panel_poll


@pytest.fixture
def host():
    return Standalone()


@pytest.fixture
def server(host):
    with Served(host.app) as served:
        yield served


@pytest.fixture
def ask(server):
    def ask_(headers=None, **query):
        return server.get(f"{PATH}?{urllib.parse.urlencode(query)}", **(headers or {}))

    return ask_


def test_the_first_answer_has_everything_and_the_next_only_what_is_new(host, ask):
    host.log.warning("one")
    status, headers, first = ask()
    assert (status, headers["Cache-Control"], headers["X-Content-Type-Options"]) == (200, "no-store", "nosniff")
    assert headers["Content-Type"].startswith("application/json")
    assert first["known"] is False
    assert first["labels"]["strength"] == "Strength"
    assert [(line["number"], line["row"], line["level"], line["text"]) for line in first["lines"]] == [
        (1, 1, "warning", "one")
    ]
    host.log.info("two")
    known = {"boot": first["boot"], "language": first["language"]}
    _, _, second = ask(since=1, **known)
    assert second["known"] is True
    assert "labels" not in second
    assert [line["text"] for line in second["lines"]] == ["two"]
    assert ask(since=2, **known)[2]["lines"] == []
    assert set(second["status"]) == {
        "mode",
        "enabled",
        "version",
        "headline",
        "problems",
        "models",
        "loras",
        "memory",
        "step",
        "programs",
        "allocator",
    }


def test_another_boot_or_language_starts_from_the_beginning(host, ask):
    host.log.info("%s", Message("host.updated", {"version": "1"}))
    first = ask()[2]
    for query in (
        {"boot": "of yesterday", "language": "en"},
        {"boot": first["boot"], "language": "zh"},
        {"boot": first["boot"], "language": "xx"},
    ):
        told = ask(since=1, **query)[2]
        assert told["known"] is False
        assert len(told["lines"]) == 1
    told = ask({"Accept-Language": "zh-CN,zh;q=0.9,en;q=0.8"})[2]
    assert told["language"] == "zh"
    assert told["lines"][0]["text"].startswith("LoRA Guard 已更新")
    assert told["labels"]["strength"] == "强度"
    host.language = Language.ENGLISH
    assert ask({"Accept-Language": "zh-CN"})[2]["language"] == "en"


def test_long_logs_come_in_pieces(host, ask):
    for number in range(PAGE_LINES + 3):
        host.log.info("line %d", number)
        host.ring.flush()
    first = ask()[2]
    assert first["more"] is True
    assert len(first["lines"]) == PAGE_LINES
    rest = ask(since=first["lines"][-1]["number"], boot=first["boot"], language="en")[2]
    assert rest["more"] is False
    assert rest["lines"][-1]["text"] == f"line {PAGE_LINES + 2}"


@pytest.mark.parametrize("since", ["", "abc", "-1", "1e3", "٣", "9" * 400, "99999999999999999999", "\x00"])
def test_a_number_that_is_none_does_no_harm(host, ask, since):
    host.log.info("here")
    status, _, told = ask(since=since)
    assert status == 200
    assert len(told["lines"]) == 1


def test_without_a_login_every_request_is_answered(ask):
    assert ask()[0] == 200


def test_with_a_login_only_its_cookies_get_it(host, ask):
    """gradio's way of keeping logins."""
    host.app.auth, host.app.tokens, host.app.cookie_id = {"me": "secret"}, {"token": "me"}, "ID"
    status, headers, told = ask()
    assert (status, told, headers["Cache-Control"]) == (401, {"error": "not logged in"}, "no-store")
    for cookie in (
        "access-token-ID=wrong",
        "access-token-OTHER=token",
        "access-token-ID=",
        "token",
        "access-token=token",
    ):
        assert ask({"Cookie": cookie})[0] == 401
    assert ask({"Cookie": "access-token-ID=token"})[0] == 200
    assert ask({"Cookie": "access-token-unsecure-ID=token"})[0] == 200
    assert ask({"Cookie": "access-token-ID=old; access-token-unsecure-ID=token"})[0] == 200


def test_a_login_with_unknown_cookies_admits_no_one(host, ask):
    host.app.auth = {"me": "secret"}
    assert ask({"Cookie": "access-token-=None; access-token-unsecure-="})[0] == 401


def test_a_login_by_function_is_asked(host, ask):
    host.app.auth_dependency = lambda request: request.headers.get("x-user")
    assert ask()[0] == 401
    assert ask({"X-User": "me"})[0] == 200


@pytest.mark.parametrize(
    ("site", "status"), [("same-origin", 200), ("none", 200), ("cross-site", 403), ("same-site", 403)]
)
def test_pages_of_other_sites_get_nothing(ask, site, status):
    assert ask({"Sec-Fetch-Site": site})[0] == status


def test_the_address_is_added_once(host):
    before = len(host.app.routes)
    add_route(host.app, None)
    assert len(host.app.routes) == before


def test_labels_are_complete_in_both_languages():
    english, chinese = labels("en"), labels("zh")
    assert set(english) == set(chinese) == {k[len("panel.label.") :] for k in TEXTS if k.startswith("panel.label.")}
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "javascript").glob("*.js"))
    begun = tuple(re.findall(r'"([a-z_]+_)" \+', source))
    for name in english:
        assert f'"{name}"' in source or name.startswith(begun), f"{name} is not used by the page"


@pytest.mark.parametrize(
    ("wanted", "hints", "language"),
    [
        (Language.CHINESE, ("en-US",), "zh"),
        (Language.ENGLISH, ("zh_CN",), "en"),
        (Language.AUTO, ("zh_CN", "en-US"), "zh"),
        (Language.AUTO, ("zh-Hans (Stable)", None), "zh"),
        (Language.AUTO, ("Chinese-All", None), "zh"),
        (Language.AUTO, ("None", "zh-CN,zh;q=0.9"), "zh"),
        (Language.AUTO, ("None", "de-DE,de;q=0.9,zh;q=0.1"), "en"),
        (Language.AUTO, ("ja_JP", "zh-CN"), "en"),
        (Language.AUTO, (None, "*"), "en"),
        (Language.AUTO, (), "en"),
    ],
)
def test_the_readers_language(wanted, hints, language):
    assert reader_language(wanted, *hints) == language


def test_the_last_error_of_the_log_is_a_problem_until_another_comes(host, ask):
    assert ask()[2]["status"]["problems"] == []
    host.log.warning("no error")
    host.log.error("%s", Message("everyday.not_carried_out"))
    host.log.info("and on")
    (problem,) = ask()[2]["status"]["problems"]
    assert (problem["level"], problem["text"]) == ("bad", TEXTS["everyday.not_carried_out"]["en"])
    assert ask()[2]["status"]["problems"] == [problem]
    host.log.warning("%s", Message("preflight.helps", {"advice": "a smaller picture"}))
    (other,) = ask({"Accept-Language": "zh-CN"})[2]["status"]["problems"]
    assert other["id"] != problem["id"]
    assert other["text"].startswith("内存或显存耗尽")


def test_an_open_tab_takes_less_than_a_hundredth_of_a_core():
    """At one request a second, which is what the page is made for; the processor's time, whatever else the machine does."""
    assert "const EVERY_MS = 1000;" in (ROOT / "javascript/lora_guard.js").read_text(encoding="utf-8")
    cost = panel_poll.measure(20)
    assert 0.1 < cost.percent < 1
    assert cost.percent == pytest.approx(cost.poll_ms / 10)
    # The explanations of its numbers are in each answer.
    assert cost.bytes < 7000
