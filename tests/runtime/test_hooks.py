import types

import pytest

from lib_lora_guard.runtime.hooks import HookSet


def make_owner():
    return types.SimpleNamespace(double=lambda x: 2 * x, add=lambda x, y=1: x + y)


def plus_hundred(original, *args, **kwargs):
    return original(*args, **kwargs) + 100


def test_hooks_are_installed_and_undone_in_reverse():
    owner = make_owner()
    before = owner.double, owner.add
    hooks = HookSet()
    with hooks:
        hooks.add(owner, "double", plus_hundred)
        hooks.add(owner, "double", plus_hundred)
        hooks.add(owner, "add", plus_hundred)
    assert owner.double(1) == 202
    assert owner.add(1, y=2) == 103
    hooks.restore()
    assert (owner.double, owner.add) == before
    assert hooks.hooks == []


def test_a_failure_while_installing_undoes_the_ones_before():
    owner = make_owner()
    before = owner.double

    def install():
        with HookSet() as hooks:
            hooks.add(owner, "double", plus_hundred)
            hooks.add(owner, "missing", plus_hundred)

    with pytest.raises(AttributeError):
        install()
    assert owner.double is before


def test_a_wrapper_of_someone_else_stays_and_ours_passes_through():
    owner = make_owner()
    hooks = HookSet()
    hooks.add(owner, "double", plus_hundred)
    ours = owner.double
    theirs = owner.double = lambda x: -ours(x)
    assert owner.double(1) == -102
    hooks.restore()
    assert owner.double is theirs
    assert owner.double(1) == -2
