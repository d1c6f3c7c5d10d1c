"""The scales of 4-bit weights on their way to the card. torch's meta device plays the card: no copy from there can be made."""

from types import SimpleNamespace

import pytest
import torch

from lib_lora_guard.hosts.webui.quant_states import QuantStates

CARD = torch.device("meta")


def state(nested=False):
    inner = state() if nested else None
    return SimpleNamespace(
        absmax=torch.rand(64), code=torch.linspace(-1, 1, 16), offset=torch.tensor(0.5) if nested else None,
        nested=nested, state2=inner, blocksize=64,
    )  # fmt: skip


def host_copies(found, device=None):
    """As both hosts do: each tensor by its own copy, to where it lies if no device is given."""
    assert found is None or device is None or found.absmax.device == device
    return found


@pytest.mark.parametrize("nested", [False, True])
def test_everything_lies_on_the_card_when_the_host_copies_it_and_the_state_in_ram_stays(nested):
    found = state(nested)
    before = dict(vars(found))
    there = QuantStates(lambda: True).copy_quant_state(host_copies, found, CARD)
    tensors = [there.absmax, there.code] + ([there.offset, there.state2.absmax, there.state2.code] if nested else [])
    assert {one.device for one in tensors} == {CARD}
    assert there.blocksize == 64
    assert vars(found) == before
    assert found.absmax.device.type == "cpu"


def test_layers_with_the_same_table_share_it_and_others_have_their_own():
    states, other = QuantStates(lambda: True), state()
    other.code = other.code.flip(0)
    tables = [states.copy_quant_state(host_copies, one, CARD).code for one in (state(), state(), other)]
    assert tables[0] is tables[1]
    assert tables[2] is not tables[0]
    states.drop()
    assert states.copy_quant_state(host_copies, state(), CARD).code is not tables[0]


@pytest.mark.parametrize("case", ["off", "none", "no device", "to ram", "on the card"])
def test_everything_else_is_the_hosts_own(case):
    found = None if case == "none" else state()
    if case == "on the card":
        found.absmax = found.absmax.to(CARD)
    device = {"no device": None, "to ram": torch.device("cpu")}.get(case, CARD)

    def original(given, target):
        assert given is found
        assert target is device
        return "the host's"

    assert QuantStates(lambda: case != "off").copy_quant_state(original, found, device) == "the host's"
