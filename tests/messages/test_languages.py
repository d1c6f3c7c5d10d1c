"""The language that a reader gets."""

import pytest

from lib_lora_guard.messages.languages import is_chinese, language_of, system_locale
from lib_lora_guard.settings import Language

CHINESE = [
    "zh_CN",
    "zh-Hans (Stable)",
    "zh-Hant",
    "zh_TW",
    "chinese-all-0313",
    "Chinese-English",
    "zh",
    "ZH-cn",
    "简体中文",
]
OTHER = ["", "None", "en_US", "ja_JP", "de_DE", "ko_KR", "C", "POSIX", "English_United States", "azhar", "Tchèque"]


@pytest.mark.parametrize("name", [*CHINESE, "Chinese (Simplified)_China", "chs", "zh_CN.UTF-8", "[中文] all"])
def test_names_of_chinese(name):
    assert is_chinese(name)
    assert language_of("auto", name, "en_US") == "zh"
    assert language_of("auto", None, name) == "zh"


@pytest.mark.parametrize("name", OTHER)
def test_other_names(name):
    assert not is_chinese(name)
    assert language_of("auto", name, "en_US") == "en"
    assert language_of("auto", None, name) == "en"


def test_the_language_comes_from_the_setting_then_the_host_then_the_system():
    assert language_of("en", "zh_CN", "zh_CN") == "en"
    assert language_of("zh", "ja_JP", "en_US") == "zh"
    assert language_of("auto", "ja_JP", "zh_CN") == "en"
    for nothing in (None, "", "None", " none "):
        assert language_of("auto", nothing, "zh_CN") == "zh"
    assert language_of("auto") == "en"
    assert language_of("klingon", None, "zh_CN") == "zh"


@pytest.mark.parametrize(
    ("language", "expected"), [(Language.ENGLISH, "en"), (Language.CHINESE, "zh"), (Language.AUTO, "zh")]
)
def test_the_setting_itself_may_be_passed(language, expected):
    assert language_of(language, "zh_CN") == expected


def test_the_system_is_asked_in_the_order_of_gettext():
    assert system_locale({"LANG": "de_DE.UTF-8", "LC_ALL": "zh_CN.UTF-8"}) == "zh_CN.UTF-8"
    assert system_locale({"LANGUAGE": "zh_CN:en", "LANG": "en_US"}) == "zh_CN"
    assert system_locale({"LC_ALL": "", "LANG": "en_GB"}) == "en_GB"


@pytest.mark.parametrize(
    ("told", "expected"), [("Chinese (Simplified)_China", "zh"), ("English_United States", "en"), (None, "en")]
)
def test_windows_has_no_such_variables(monkeypatch, told, expected):
    monkeypatch.setattr("locale.getlocale", lambda *_: (told, "936"))
    monkeypatch.setattr("locale.setlocale", lambda *_: "C")
    assert language_of("auto", None, system_locale({})) == expected


def test_a_locale_that_python_cannot_read_is_no_error(monkeypatch):
    def fail(*_):
        raise ValueError("unknown locale: UTF-8")

    monkeypatch.setattr("locale.getlocale", fail)
    assert system_locale({}) == ""
