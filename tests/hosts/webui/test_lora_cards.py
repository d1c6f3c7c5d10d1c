"""The line on a LoRA card: what it says, that the page never waits for it, and that nothing else of the page is touched."""

import json
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from support.fake_models import flux_linears, flux_shapes, stored, write_lora, write_safetensors

from lib_lora_guard.hosts.webui import card_facts, lora_cards
from lib_lora_guard.hosts.webui.card_facts import CardFacts, CardReader, card_of, fits, read_lora, read_target
from lib_lora_guard.hosts.webui.lora_cards import LoraCards, card_line
from lib_lora_guard.hosts.webui.takeover import WebTakeover
from lib_lora_guard.runtime.hooks import HookSet, lay
from lib_lora_guard.runtime.live_settings import LiveSettings

SMALL = flux_shapes(hidden=256, double=1, single=1)
XL = {f"input_blocks.4.1.transformer_blocks.0.attn{n}.to_{x}.weight": (640, 2048 if n == 2 and x in "kv" else 640) for n in (1, 2) for x in "qkv"}  # fmt: skip

TEXT = {
    "text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "text_model.encoder.layers.0.mlp.fc2.weight": (768, 3072),
}
SD15 = {f"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_{x}.weight": (320, 768) for x in "kv"}


@pytest.fixture
def files(tmp_path):
    write_lora(tmp_path / "flux.safetensors", flux_linears(SMALL), rank=8)
    write_lora(tmp_path / "xl.safetensors", XL, rank=4)
    (tmp_path / "broken.safetensors").write_bytes(b"<html>")
    write_safetensors(tmp_path / "flux1-dev.safetensors", stored(SMALL, "BF16"))
    return tmp_path


class Page:
    """`ExtraNetworksPage` as far as a card is made there: both hosts call it with and without a template."""

    def create_item_html(self, tabname, item, template=None):
        sort_keys = item.get("sort_keys", {})
        sort_keys["SDversion"] = "x"
        args = {key: item.get(key) for key in ("name", "description", "search_terms")}
        return template.format(**args) if template else args


class LoraPage(Page):
    """`ExtraNetworksPageLora`: it takes the function over from the page."""


def host(files, **options):
    """`(page, cards, hooks)` of a host with the hook in place."""
    loading = {"checkpoint_info": SimpleNamespace(filename=str(files / "flux1-dev.safetensors"))}
    modules = {
        "ui_extra_networks_lora": SimpleNamespace(ExtraNetworksPageLora=type("Lora", (LoraPage,), {})),
        "modules.sd_models": SimpleNamespace(model_data=SimpleNamespace(forge_loading_parameters=loading)),
        "modules.shared": SimpleNamespace(opts=SimpleNamespace(extra_networks_card_description_is_html=False), state=SimpleNamespace(job="")),
    }  # fmt: skip
    cards, hooks = LoraCards(LiveSettings({"lora_guard_language": "en", **options}), modules), HookSet()
    cards.reader._quiet_seconds = 0
    lay(lora_cards.ROWS, cards, modules, hooks)
    return modules["ui_extra_networks_lora"].ExtraNetworksPageLora(), cards, hooks


def item(files, name, **more):
    path = files / f"{name}.safetensors"
    return {"name": name, "filename": str(path), "search_terms": [f"Lora/{name}"], "description": None, **more}


def shown(page, cards, *items):
    """The cards as they are once everything is read: what they show before is not waited for, so nothing is judged yet."""
    for one in items:
        assert "fit" not in (page.create_item_html("txt2img", one)["description"] or "")
    for _ in range(2):  # the file, then the file and the checkpoint
        cards.reader.wait()
        for one in items:
            page.create_item_html("txt2img", one)
    cards.reader.wait()
    return [page.create_item_html("txt2img", one) for one in items]


def test_a_card_says_base_model_rank_and_fit(files, monkeypatch):
    read = []
    monkeypatch.setattr(card_facts, "read_lora", lambda path: (read.append(path.stem), read_lora(path))[1])
    page, cards, _ = host(files)
    mine = item(files, "xl", description="my <b>words</b>")
    flux, xl, broken = shown(page, cards, item(files, "flux"), mine, item(files, "broken"))
    assert flux["description"] == "Flux, LoRA of rank 8, fits flux1-dev"
    assert flux["search_terms"] == ["Lora/flux", "Flux", "LoRA"]
    assert sorted(read) == ["broken", "flux", "xl"], "one look at a header gives both"
    assert xl["description"] == "SDXL, LoRA of rank 4, does not fit flux1-dev | my <b>words</b>"
    assert broken["description"] == "cannot be used: damaged, or no LoRA"
    assert (mine["description"], mine["search_terms"]) == ("my <b>words</b>", ["Lora/xl"])
    assert page.create_item_html("txt2img", item(files, "flux"), "{description}!").startswith("Flux, LoRA of rank 8")


def test_words_of_the_line_are_escaped_where_the_host_takes_them_as_html(files):
    page, cards, _ = host(files)
    cards._modules["modules.shared"].opts.extra_networks_card_description_is_html = True
    odd = files / "<i>&.safetensors"
    odd.write_bytes((files / "flux1-dev.safetensors").read_bytes())
    cards._modules["modules.sd_models"].model_data.forge_loading_parameters["checkpoint_info"].filename = str(odd)
    (flux,) = shown(page, cards, item(files, "flux", description="<b>mine</b>"))
    assert flux["description"] == "Flux, LoRA of rank 8, fits &lt;i&gt;&amp;<br><b>mine</b>"


def test_switched_off_and_taken_back_the_cards_are_the_hosts(files):
    page, cards, hooks = host(files, lora_guard_lora_cards=False)
    cards.look_ahead([str(files / "flux.safetensors")])
    (flux,) = shown(page, cards, item(files, "flux"))
    assert (flux["description"], cards.reader._thread) == (None, None)
    page, cards, hooks = host(files)
    (flux,) = shown(page, cards, item(files, "flux"))
    hooks.restore()
    assert page.create_item_html("txt2img", item(files, "flux"))["description"] is None
    assert page.create_item_html.__func__ is Page.create_item_html


def test_headers_are_read_ahead_once_the_webui_is_up(files, monkeypatch):
    page, cards, _ = host(files)
    on_disk = {name: SimpleNamespace(filename=str(files / f"{name}.safetensors")) for name in ("flux", "gone")}
    monkeypatch.setitem(sys.modules, "networks", SimpleNamespace(available_networks=on_disk))
    WebTakeover.app_started(SimpleNamespace(cards=cards))
    cards.reader.wait()
    assert (
        page.create_item_html("txt2img", item(files, "flux"))["description"] == "Flux, LoRA of rank 8, fits flux1-dev"
    )
    monkeypatch.delitem(sys.modules, "networks")
    WebTakeover.app_started(SimpleNamespace(cards=cards))


@pytest.mark.parametrize("odd", [{}, {"filename": None}, {"filename": 3}, {"filename": "\x00"}, {"filename": "none"}])
def test_a_card_of_another_shape_is_shown_as_it_is(files, odd):
    page, _, _ = host(files)
    assert page.create_item_html("txt2img", {"name": "x", **odd})["name"] == "x"


def test_a_page_with_many_cards_waits_for_none(files):
    gate = threading.Event()
    page, cards, _ = host(files)
    cards.reader._is_busy = lambda: not gate.is_set()
    cards.reader._sleep = lambda seconds: gate.wait(5)
    items = []
    for number in range(300):
        path = files / f"{number}.safetensors"
        path.write_bytes(b"")
        items.append(item(files, str(number)))
    items.append(item(files, "flux"))
    started = time.perf_counter()
    for one in items:
        page.create_item_html("txt2img", one)
    # 10 ms on a free core.
    assert time.perf_counter() - started < 0.5
    assert cards.reader._kept.cards == {}
    gate.set()
    cards.reader.wait()
    page.create_item_html("txt2img", items[-1])
    cards.reader.wait()
    assert page.create_item_html("txt2img", items[-1])["description"] == "Flux, LoRA of rank 8, fits flux1-dev"


def test_nothing_is_read_while_the_page_is_made(files):
    """The page and the thread share one interpreter."""
    naps = []

    def until_it_is_quiet(seconds):
        naps.append(seconds)
        reader._quiet_seconds = 0

    reader = CardReader(sleep=until_it_is_quiet, quiet_seconds=60)
    reader.card(files / "flux.safetensors")
    reader.wait()
    # The rest between two files is far shorter.
    assert 30 < naps[0] <= 60
    assert reader.card(files / "flux.safetensors").rank == 8


def test_facts_are_kept_and_a_changed_file_is_read_again(files, monkeypatch):
    folder = files / "data"
    path = files / "flux.safetensors"
    first = CardReader(lambda: folder, sleep=lambda _: None, quiet_seconds=0)
    assert first.card(path) is None
    first.wait()
    facts = first.card(path)
    assert (facts.made_for, facts.kinds, facts.rank, facts.is_dora) == ("Flux", ("lora",), 8, False)
    text = (folder / card_facts.FILE_NAME).read_text()
    assert str(files) not in text
    monkeypatch.setattr(card_facts, "read_lora", lambda path: pytest.fail("read twice"))
    assert CardReader(lambda: folder).card(path) == facts
    monkeypatch.undo()
    write_lora(path, flux_linears(SMALL), rank=16)
    second = CardReader(lambda: folder, sleep=lambda _: None, quiet_seconds=0)
    assert second.card(path) is None
    second.wait()
    assert second.card(path).rank == 16


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"version": 2, "cards": {}}', '{"version": 1, "cards": []}', '{"version": 1, "cards": {"KEY": [1]}}',
     '{"version": 1, "cards": {"KEY": ["<b>", [], 8, false, true]}, "fits": {}}',
     '{"version": 1, "cards": {"KEY": ["Flux", ["<b>"], 8, false, true]}, "fits": {"x": "<b>"}}',
     '{"version": 1, "cards": {"KEY": ["Flux", ["lora"], true, false, true]}}'],
)  # fmt: skip
def test_a_file_of_facts_that_is_none_is_passed_by(files, text):
    folder = files / "data"
    folder.mkdir()
    path = files / "flux.safetensors"
    (folder / card_facts.FILE_NAME).write_text(text.replace("KEY", card_facts._key(path)))
    reader = CardReader(lambda: folder, sleep=lambda _: None, quiet_seconds=0)
    assert reader.card(path) is None
    reader.wait()
    assert reader.card(path).rank == 8
    assert len(json.loads((folder / card_facts.FILE_NAME).read_text())["cards"]) == 1


def test_as_many_facts_as_are_kept_are_read_again(files):
    reader = CardReader(lambda: files)
    key = f"{'😀' * 200}|{2**40}|{2**60}"
    reader._known().cards[key] = CardFacts("Flux", ("lora", "loha"), 128)
    reader._known().fits[f"{key} on {key}"] = True
    reader._keep()
    size = (files / card_facts.FILE_NAME).stat().st_size
    assert size * max(card_facts.MOST_CARDS, card_facts.MOST_PAIRS) < card_facts.LONGEST_BYTES
    assert card_facts._read_kept(files / card_facts.FILE_NAME) == reader._kept


def test_a_folder_that_cannot_be_written_costs_nothing(files):
    reader = CardReader(lambda: files / "flux.safetensors", sleep=lambda _: None, quiet_seconds=0)
    reader.card(files / "xl.safetensors")
    reader.wait()
    assert reader.card(files / "xl.safetensors").made_for == "SDXL"


@pytest.mark.parametrize(
    ("lora", "checkpoint", "expected"),
    [
        ({"flux": SMALL}, SMALL, True),
        ({"flux": SMALL}, flux_shapes(hidden=512, double=1, single=1), False),
        ({"xl": XL}, SMALL, False),
        ({"text": TEXT}, SMALL, None),
        ({"text": TEXT}, {f"cond_stage_model.transformer.{name}": shape for name, shape in TEXT.items()} | SD15, True),
        ({"flux": SMALL}, {"x.weight": (4, 4)}, None),
    ],
    ids=[
        "fits",
        "another size",
        "another architecture",
        "text encoder elsewhere",
        "text encoder there",
        "unknown model",
    ],
)
def test_a_lora_fits_by_the_rule_that_applies_it(files, lora, checkpoint, expected):
    ((name, shapes),) = lora.items()
    matrices = {key: shape for key, shape in shapes.items() if len(shape) == 2}
    write_lora(files / "a.safetensors", matrices, prefix="lora_te_" if name == "text" else "lora_unet_")
    write_safetensors(files / "model.safetensors", stored(checkpoint, "BF16"))
    assert fits(read_lora(files / "a.safetensors"), read_target(files / "model.safetensors")) is expected


def test_a_lora_that_is_mostly_for_a_text_encoder_elsewhere_fits(files):
    tensors = {}
    for module, rows, columns in (
        ("lora_unet_double_blocks_0_img_attn_proj", 256, 256),
        *((f"lora_te1_text_model_encoder_layers_{n}_mlp_fc1", 3072, 768) for n in range(4)),
    ):
        tensors[f"{module}.lora_up.weight"] = ("F16", (rows, 4))
        tensors[f"{module}.lora_down.weight"] = ("F16", (4, columns))
    write_safetensors(files / "both.safetensors", tensors)
    target = read_target(files / "flux1-dev.safetensors")
    assert fits(read_lora(files / "both.safetensors"), target) is True
    elsewhere = {
        name.replace("te1_text_model_encoder_layers", "unet_double_blocks_9"): one for name, one in tensors.items()
    }
    write_safetensors(files / "both.safetensors", elsewhere)
    assert fits(read_lora(files / "both.safetensors"), target) is False, "too much of it has no place in this model"


def test_lines_say_only_what_is_known():
    assert (
        card_line(CardFacts("", ("loha", "diff"), is_dora=True), None, "x")
        == "base model not known, LoHa + diff (DoRA)"
    )
    assert card_line(CardFacts("Wan", ("lokr",)), False, "m" * 60) == f"Wan, LoKr, does not fit {'m' * 18}...{'m' * 19}"
    assert card_line(CardFacts("Flux", ("lora",), 4), True, "x").text("zh") == "Flux，LoRA，秩 4，适合 x"


def test_files_that_are_no_models_say_nothing(files):
    for name in ("none", "flux1-dev", "broken"):
        assert card_of(read_lora(files / f"{name}.safetensors")) == CardFacts(is_readable=False)
    assert read_target(files / "flux.safetensors") is read_target(files / "broken.safetensors") is None
    assert fits(read_lora(files / "broken.safetensors"), read_target(files / "flux1-dev.safetensors")) is None
