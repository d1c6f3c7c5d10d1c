"""The recording behind the tab's pictures in docs has today's words in both languages."""

import json

from support.recorded_answer import RECORDED, answer_in

from lib_lora_guard.messages.catalogue import LANGUAGES, TEXTS
from lib_lora_guard.ui.panel import labels


def texts(part):
    """All texts of an answer."""
    if isinstance(part, dict):
        return [text for one in part.values() for text in texts(one)]
    if isinstance(part, list):
        return [text for one in part for text in texts(one)]
    return [part] if isinstance(part, str) else []


def test_the_recording_is_told_in_the_words_of_the_catalogue():
    for language in LANGUAGES:
        answer = answer_in(language)
        assert (answer["language"], answer["labels"]) == (language, labels(language))
        said = texts(answer["lines"]) + texts(answer["status"])
        assert len(said) > 100
        assert not any("{" in text for text in said)
        assert TEXTS["allocator.off"][language] in said
    lines = {line["number"]: (line["text"], line["why"]) for line in answer["lines"]}
    assert lines[12][0] == "LG-R06：LoRA 占用 146 MB 显存，已为其预留"
    assert "此处占用 146 MB" in lines[12][1]
    assert lines[34][1] is None
    assert lines[33][0].startswith(
        "KModel：style.safetensors 强度 0.8：使用 304 个键，跳过 0 个，旁路（融合） 304 个（低秩） | pose"
    )
    assert "KModel 的 LoRA 已更改，用时 42 毫秒" in lines[33][1]
    card, _ = answer["status"]["memory"]
    assert [part["about"] for part in card["used"]] == [
        TEXTS[f"panel.about.part.{part}"]["zh"] for part in ("ours", "others", "cache")
    ]


def test_the_parts_of_the_recorded_card_make_the_whole():
    card = answer_in("en")["status"]["memory"][0]
    assert round(card["free_mb"] + sum(part["mb"] for part in card["used"])) == round(card["total_mb"]) == 12806


def test_an_answer_with_sentences_stays_as_it_is(tmp_path):
    answer = {**json.loads(RECORDED.read_text(encoding="utf-8")), "lines": [{"text": "said", "image": 1}]}
    (tmp_path / "answer.json").write_text(json.dumps(answer), encoding="utf-8")
    assert answer_in("zh", tmp_path / "answer.json")["lines"] == answer["lines"]
