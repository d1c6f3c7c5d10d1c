import sys

import pytest


@pytest.fixture(scope="module", autouse=True)
def _no_model_cards():
    """No page of text beside each file, which PEFT fills in from a template: longer work than the file itself."""
    with pytest.MonkeyPatch.context() as patch:
        if (peft := sys.modules.get("peft")) is not None:
            patch.setattr(peft.PeftModel, "create_or_update_model_card", lambda self, folder: None)
        yield
