"""Every sentence that the code says is in the catalogue, in both languages, with the facts that the code gives it."""

import ast
import copy
import logging
import pickle
import re
import string
from pathlib import Path

from lib_lora_guard.errors import LoraFileError, LoraGuardError, named, reason
from lib_lora_guard.messages import Joined, Message, about, catalogue, message_of, say, without
from lib_lora_guard.messages.catalogue import LANGUAGES, SUBJECTS, TEXTS
from lib_lora_guard.messages.catalogue.panel import LABELS

PACKAGE = Path(catalogue.__file__).parent.parent.parent
SOURCES = [f for f in sorted(PACKAGE.rglob("*.py")) if f.parent.name != "catalogue"]
CATALOGUES = sorted(Path(catalogue.__file__).parent.glob("*.py"))
CHINESE = re.compile(r"[\u4e00-\u9fff]")
SAME_IN_CHINESE = {"lora.alpha", "host.unet"}
"""Names that a Chinese reader knows by their Latin letters."""


def placeholders(text):
    """`(name, format)` of every place in a sentence that a fact goes to."""
    return sorted((name, form) for _, name, form, _ in string.Formatter().parse(text) if name is not None)


def names(text):
    return {name for name, _ in placeholders(text)}


class Uses(ast.NodeVisitor):
    """What one source file says: `keys` of the catalogue by place, with the names of their facts where these stand there;
    `texts` are all its string constants, `patterns` its f-strings as expressions."""

    def __init__(self, file):
        self.file = file
        self.keys, self.texts, self.patterns = [], set(), []
        self.visit(ast.parse(file.read_text(encoding="utf-8")))

    def visit_Constant(self, node):  # ast's name
        if isinstance(node.value, str):
            self.texts.add(node.value)

    def visit_JoinedStr(self, node):  # ast's name
        parts = [re.escape(v.value) if isinstance(v, ast.Constant) else "(.+)" for v in node.values]
        if len(parts) > 1:
            self.patterns.append("".join(parts))
        self.generic_visit(node)

    def visit_Call(self, node):  # ast's name
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = getattr(getattr(node.func, "value", None), "id", "")
        if name == "say" and len(node.args) == 3 and ast.unparse(node.args[0]).endswith("log"):
            self._use(node.args[2], {k.arg for k in node.keywords} - {"exc_info"})
        elif name == "of" and owner.endswith("Error"):
            self._use(node.args[0], {k.arg for k in node.keywords})
        elif name == "Message" and node.args:
            self._use(node.args[0], self._facts(node.args[1]) if len(node.args) > 1 else set())
        self.generic_visit(node)

    def _facts(self, node):
        """Names of a dict as written; None where it is made elsewhere."""
        if not isinstance(node, ast.Dict) or not all(isinstance(key, ast.Constant) for key in node.keys):
            return None
        return {key.value for key in node.keys}

    def _use(self, key, facts):
        if facts is not None and None in facts:
            facts = None
        for choice in (key.body, key.orelse) if isinstance(key, ast.IfExp) else (key,):
            if isinstance(choice, ast.Constant):
                self.keys.append((choice.value, facts, f"{self.file.name}:{key.lineno}"))


USES = [Uses(file) for file in SOURCES]


def test_every_key_in_the_code_is_in_the_catalogue_and_gets_its_facts():
    missing = [(place, key) for use in USES for key, _, place in use.keys if key not in TEXTS]
    assert missing == []
    wrong = [
        (place, key, facts)
        for use in USES
        for key, facts, place in use.keys
        if facts is not None and facts != names(TEXTS[key]["en"])
    ]
    assert wrong == []
    assert sum(len(use.keys) for use in USES) > 80


def test_every_key_of_the_catalogue_is_in_the_code():
    texts = set().union(*(use.texts for use in USES))
    # What the page in the browser says goes there as a whole.
    pages = "".join(file.read_text(encoding="utf-8") for file in (PACKAGE.parent / "javascript").glob("*.js"))
    words = set(re.findall(r"\w+", pages))
    begun = tuple(LABELS + word for word in words if re.fullmatch(r"[a-z]+_", word))
    in_pages = {key for key in TEXTS if key.removeprefix(LABELS) in words or key.startswith(begun)}
    patterns = [re.compile(p) for use in USES for p in use.patterns if re.search(r"[a-z_]\\\.|\\\.[a-z_]", p)]
    unused = [key for key in TEXTS if key not in texts | in_pages and not any(p.fullmatch(key) for p in patterns)]
    assert unused == []


def test_no_key_is_written_twice():
    for file in CATALOGUES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Dict):
                keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
                assert sorted(set(keys)) == sorted(keys), file.name
    assert sum(len(subject.TEXTS) for subject in SUBJECTS) == len(TEXTS)
    assert {f"{subject.__name__.rpartition('.')[2]}.py" for subject in SUBJECTS} | {"__init__.py"} == {
        file.name for file in CATALOGUES
    }


def test_both_languages_say_the_same_facts():
    for key, texts in TEXTS.items():
        assert re.fullmatch(r"[a-z_]+(\.[a-z0-9_]+)+", key)
        assert set(texts) == set(LANGUAGES), key
        wanted = placeholders(texts["en"])
        assert wanted == placeholders(texts["zh"]), key
        assert all(re.fullmatch(r"[a-z_][a-z0-9_]*", name) for name, _ in wanted), f"{key}: a fact has a name"
        message = Message(key, {name: 1234.5 if form else f"<{name}>" for name, form in wanted})
        for language in LANGUAGES:
            said = message.text(language)
            assert not set("{}\n") & set(said), key
            assert all(f"<{name}>" in said for name, form in wanted if not form), key


def test_chinese_is_chinese_and_english_is_not():
    for key, texts in TEXTS.items():
        english, chinese = texts["en"], texts["zh"]
        assert english.strip()
        assert not CHINESE.search(english), key
        words = re.sub(r"\{[^}]*\}", "", english)
        if key not in SAME_IN_CHINESE and re.search(r"\b[a-z]{3}", words):
            assert CHINESE.search(chinese), key
        # Between Chinese characters stand the punctuation marks of Chinese.
        assert not re.search(r"[\u4e00-\u9fff]([,;?!]|: )", chinese), key
        assert "..." not in chinese, key


def test_a_message_is_its_english_sentence():
    message = Message("lora.made_for", {"lora": "SDXL", "model": "Flux"})
    assert message == "made for SDXL, this is Flux; use a LoRA for Flux, or load a SDXL model"
    assert isinstance(message, str)
    assert type(str(message)) is str
    assert "SDXL" in message.text("zh")
    assert message.text("zh") != message.text("en") == message
    for other in (copy.deepcopy(message), pickle.loads(pickle.dumps(message))):
        assert (other, other.key, other.facts, other.text("zh")) == (
            message,
            message.key,
            message.facts,
            message.text("zh"),
        )


def test_messages_inside_a_message_are_translated():
    inner = Joined(["a", Message("memory.ram"), Joined(["b", "c"], "list.and")])
    message = about("x.safetensors", Message("host.still_without", {"loras": inner}))
    assert message == "x.safetensors: still without a, RAM, b and c"
    assert message.text("zh") == "x.safetensors：仍未应用：a，内存，b和c"
    assert copy.deepcopy(inner).text("zh") == pickle.loads(pickle.dumps(inner)).text("zh") == inner.text("zh")
    louder = message.map(lambda fact: fact.upper() if isinstance(fact, str) else fact)
    assert louder == "X.SAFETENSORS: still without A, RAM, B and C"


def test_a_sentence_does_not_repeat_the_name_that_it_is_about():
    message = about("a.safetensors", Message("file.missing"))
    assert without("a.safetensors", message).key == "file.missing"
    assert without("b.safetensors", message) is message
    assert without("a.safetensors", "plain") == "plain"


def test_braces_in_a_name_stay_braces():
    assert about("{model}", "{0}{x}") == "{model}: {0}{x}"


def test_facts_of_another_kind_stop_nothing():
    assert "nonsense" in Message("report.lora", {"name": "a", "strength": "nonsense", "used": 1, "skipped": 0})
    assert Message("host.updated", {}).startswith("LoRA Guard was updated")


def test_errors_carry_sentences_and_say_why():
    error = LoraFileError.of("lora.none", count=3, first="a.weight")
    assert isinstance(error, ValueError)
    assert str(error) == (
        "no LoRA keys found among 3 tensors (first: a.weight), so it can change nothing; load a checkpoint as the model, else "
        "download the file again"
    )
    assert error.message.text("zh").startswith("3 个张量中没有任何 LoRA 键（第一个：a.weight），因此不会有任何效果；")
    assert reason(error) is error.message
    assert reason(pickle.loads(pickle.dumps(error))).key == "lora.none"
    assert reason(MemoryError(Message("memory.ram"))).key == "memory.ram"
    assert (reason(KeyError("a")), named(KeyError("a"))) == ("'a'", "KeyError: 'a'")
    assert (reason(LoraGuardError("plain")), named(LoraGuardError("plain"))) == ("plain", "plain")
    assert str(LoraGuardError()) == LoraGuardError().message == ""
    # An exception as a fact is its reason: it would keep alive what was there when it was raised.
    outer = Message("host.still_without", {"loras": error})
    assert outer.facts["loras"] is error.message


def test_the_log_finds_the_message():
    records = []
    log = logging.Logger("x", logging.INFO)
    handler = logging.Handler()
    handler.emit = records.append
    log.addHandler(handler)
    say(log, logging.INFO, "host.in_place", version="1")
    say(log, logging.DEBUG, "host.in_place", version="2")
    log.info("%s", Message("memory.ram"))
    log.info("%s is short", Message("memory.ram"))
    log.info("nothing")
    first, second, third, fourth = (message_of(record) for record in records)
    assert (first.key, second.key) == ("host.in_place", "memory.ram")
    assert (third, fourth) == ("RAM is short", "nothing")
    assert records[0].getMessage() == "1 in place of Forge's LoRA patcher"
    assert records[0].filename == Path(__file__).name, "the record names who said it"
