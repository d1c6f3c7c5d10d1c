"""Two ways to write a prompt, held against a small copy of the WebUI's prompt parser and text-processing engines."""

import functools
import types

import pytest

from lib_lora_guard.hosts.webui.prompt_tokens import Encoding, PromptTokens

PARSER = """
import re

def get_multicond_prompt_list(prompts):
    indexes, flat = [], []
    for prompt in prompts:
        parts = [re.match(r"(.*?)(?::([.0-9]+))?\\\\s*$", part, re.S).groups() for part in re.split(r"\\\\bAND\\\\b", prompt)]
        indexes.append([(len(flat) + place, float(weight or 1)) for place, (_, weight) in enumerate(parts)])
        flat += [text for text, _ in parts]
    return indexes, flat, {}

def get_learned_conditioning_prompt_schedules(prompts, steps, hires_steps=None, use_old_scheduling=False):
    def schedule(prompt):
        found = re.search(r"\\\\[([^:]*):([^:]*):\\\\s*([0-9]+)\\\\s*\\\\]", prompt)
        if found is None:
            return [[steps, prompt]]
        texts = [prompt[:found.start()] + found[part] + prompt[found.end():] for part in (1, 2)]
        return [[int(found[3]), texts[0]], [steps, texts[1]]]
    return [schedule(prompt) for prompt in prompts]

def get_learned_conditioning(model, prompts, steps): ...
def get_multicond_learned_conditioning(model, prompts, steps): ...
""".replace("\\\\", "\\")
ENGINE = """
import re

class Chunk: ...

class {name}:
    def __init__(self, keeps_blanks):
        self.keeps_blanks, self.emphasis, self.asked = keeps_blanks, Emphasis(), 0

    def tokenize(self, text):
        return re.findall(r"\\s|[^\\s]+" if self.keeps_blanks else r"[^\\s]+", text)

    def tokenize_line(self, line):
        self.asked += 1
        chunk = Chunk()
        chunk.tokens, chunk.multipliers = [], []
        for part in re.split(r"(\\([^()]*\\))", line):
            weighted = re.fullmatch(r"\\((.*):([.0-9]+)\\)", part)
            tokens = self.tokenize(weighted[1] if weighted else part)
            chunk.tokens += tokens
            chunk.multipliers += [float(weighted[2]) if weighted else 1.0] * len(tokens)
        return ([chunk], 7) if {counts} else [chunk]

    def __call__(self, texts): ...

class Emphasis:
    name = "Original"
"""
MODEL = """
class Model:
    def get_learned_conditioning(self, texts): ...
"""


def module_of(name, source):
    module = types.ModuleType(name)
    exec(source, module.__dict__)
    return module


def t5(keeps_blanks=False, name="T5TextProcessingEngine", place="backend.text_processing.t5_engine"):
    return getattr(module_of(place, ENGINE.format(name=name, counts=True)), name)(keeps_blanks)


def classic():
    name = "ClassicTextProcessingEngine"
    source = ENGINE.format(name=name, counts=False)
    return getattr(module_of("backend.text_processing.classic_engine", source), name)(False)


class World:
    def __init__(self, **engines):
        self.parser = module_of("modules.prompt_parser", PARSER)
        self.model = module_of("backend.diffusion_engine.flux", MODEL).Model()
        vars(self.model).update(engines or {"text_processing_engine_l": classic(), "text_processing_engine_t5": t5()})
        opts = types.SimpleNamespace(emphasis="Original")
        self.shared = types.SimpleNamespace(sd_model=self.model, opts=opts)
        self.function = self.parser.get_multicond_learned_conditioning

    def same(self, some, others):
        tokens = PromptTokens(self.parser, self.shared)
        return tokens.are_same([some], [others], Encoding(self.function, 20, None, (False,)))


@pytest.mark.parametrize(
    ("some", "others", "are_same"),
    [
        ("a lighthouse on a cliff", "a lighthouse on a cliff ", True),
        ("a lighthouse on a cliff", " a  lighthouse\non a cliff  ", True),
        ("a lighthouse", "a light house", False),
        ("a cat, a dog", "a cat , a dog", False),
        ("a (red cat:1.2)", "a  (red cat :1.2) ", True),
        ("a (red cat:1.2)", "a (red cat:1 .2)", False),
        ("a (red:1.2) cat", "a (red cat:1.2)", False),
        ("a [cat:dog:5]", "a  [cat:dog: 5] ", True),
        ("a [cat:dog:15]", "a [cat:dog:1 5]", False),
        ("a [cat:dog:5]", "a [cat:dog:6]", False),
        ("a cat AND a dog:0.5", "a cat  AND a dog :0.5 ", True),
        ("a cat AND a dog:0.5", "a catAND a dog:0.5", False),
        ("a cat AND a dog:0.5", "a cat AND a dog:0.6", False),
        ("", "", True),
        ("[:x:5]", "[ :x:5]", False),
    ],
)
def test_the_same_is_what_has_the_same_tokens_emphasis_and_steps(some, others, are_same):
    world = World()
    assert world.same(some, others) is are_same
    assert world.same(others, some) is are_same
    if "AND" not in some:
        world.function = world.parser.get_learned_conditioning
        assert world.same(some, others) is are_same


def test_an_empty_negative_prompt_is_not_one_of_blanks():
    """SDXL puts zeros in its place."""
    world = World()
    world.function = world.parser.get_learned_conditioning
    assert not world.same("", " ")
    assert world.same(" ", "  ")


def test_every_engine_of_the_model_is_asked():
    world = World(text_processing_engine_l=classic(), text_processing_engine_t5=t5(keeps_blanks=True))
    assert not world.same("a cat", "a  cat")
    assert world.same("a cat", "a cat")
    assert world.model.text_processing_engine_l.asked == world.model.text_processing_engine_t5.asked == 4


def test_an_embedding_is_known_by_itself():
    engine, others = t5(), iter("ab")

    def tokenize_line(line):
        return [types.SimpleNamespace(tokens=[0], fixes=[next(others)])]

    engine.tokenize_line = types.MethodType(of_module("backend.text_processing.t5_engine", tokenize_line), engine)
    assert not World(text_processing_engine=engine).same("a", "a ")


def of_module(name, function):
    """`function` as if a module of this name had it; it is called without its first argument."""
    return module_of(name, "def make(function):\n    return lambda self, *args: function(*args)\n").make(function)


def not_an_engine(world):
    world.model.text_processing_engine_qwen = t5(name="QwenTextProcessingEngine")


def engine_of_an_extension(world):
    world.model.text_processing_engine_t5 = t5(place="an_extension.engines")


def around_an_engine(world):
    engine = world.model.text_processing_engine_l
    original = type(engine).__call__

    @functools.wraps(original)
    def call(self, texts):
        return original(self, [text + "!" for text in texts])

    type(engine).__call__ = call


def around_the_model(world):
    world.model.get_learned_conditioning = lambda texts: None


def another_function(world):
    world.function = lambda *args: None


def emphasis_of_before(world):
    world.shared.opts.emphasis = "No norm"


def no_engine(world):
    vars(world.model).clear()


def an_error(world):
    world.parser.get_multicond_prompt_list = None


@pytest.mark.parametrize(
    "change",
    [
        not_an_engine,
        engine_of_an_extension,
        around_an_engine,
        around_the_model,
        another_function,
        emphasis_of_before,
        no_engine,
        an_error,
    ],
)
def test_where_the_tokenizers_do_not_decide_nothing_is_the_same(change):
    world = World()
    assert world.same("a cat", "a cat ")
    change(world)
    assert not world.same("a cat", "a cat ")
