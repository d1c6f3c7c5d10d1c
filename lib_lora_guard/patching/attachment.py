"""One attachment per patched weight: it applies the stack to the weight and takes it back.

Both are idempotent and may be interrupted anywhere: what there is to do is found on the layer, each time anew. Of its three
kinds two work by hooks (`hook_attachments.py`), the third replaces the parameter (`merge_attachment.py`).
"""

from __future__ import annotations

from typing import ClassVar

from ..adapters import Term
from ..errors import LoraMismatchError
from ..planning.mode import Choice, Mode
from .access import ModelAccess, Site
from .plan import PlannedWeight, has_same_factors, is_same_term


class UnusableTermsError(LoraMismatchError):
    """The terms give this weight values that cannot be used. The LoRAs they come from must be left out."""

    def __init__(self, key: str, terms: tuple[Term, ...], message: str) -> None:
        super().__init__(message)
        self.key, self.terms = key, terms


class Attachment:
    """One planned weight, carried out on a model."""

    # No abstract class: a change asks `isinstance` of each attachment, which would take ten times as long.
    mode: ClassVar[Mode]

    def __init__(self, access: ModelAccess, planned: PlannedWeight) -> None:
        self.access, self.planned = access, planned

    @property
    def site(self) -> Site:
        """The parameter in its place."""
        return self.planned.site

    @property
    def terms(self) -> tuple[Term, ...]:
        """The stack on it, in order."""
        return self.planned.terms

    @property
    def choice(self) -> Choice:
        """The mode with its reason."""
        return self.planned.choice

    def carries_out(self, planned: PlannedWeight) -> bool:
        """Returns True if `planned` is what this attachment does already: same layer, mode, terms and strengths."""
        return (
            self.mode is planned.mode
            and self.site.layer is planned.site.layer
            and len(self.terms) == len(planned.terms)
            and all(map(is_same_term, self.terms, planned.terms))
        )

    def differs_in_strengths(self, access: ModelAccess, planned: PlannedWeight) -> bool:
        """Returns True if `planned` is this very weight, stored as before, in the same mode with the same factors, and calls in
        other threads may go on beside an exchange of the strengths.

        Args:
            access: The model as the change of now sees it.
            planned: The weight with its coming stack.
        """
        return (
            self.mode is planned.mode
            and self.site.layer is planned.site.layer
            and self.site.storage == planned.site.storage
            and len(self.terms) == len(planned.terms)
            and all(map(has_same_factors, self.terms, planned.terms))
        )

    def attach(self) -> None:
        """Applies the stack."""
        raise NotImplementedError

    def detach(self) -> None:
        """Takes it back: the weight has its original bits."""
        raise NotImplementedError

    def replace(self, other: Attachment) -> None:
        """Applies the stack in the place of `other`, which is on the same parameter.

        Where both work in the same way this is one step: a forward pass beside it has the one stack or the other. Else
        it may find the weight without any. Idempotent, and undone by `other.replace(self)`.
        """
        other.detach()
        self.attach()

    def is_beside(self, other: Attachment) -> bool:
        """Returns True if `other` is on the same parameter of the same layer."""
        return other.site.layer is self.site.layer and other.site.name == self.site.name

    def drop_device_copies(self) -> None:
        """Frees this attachment's copies on a GPU, if it keeps any; the next forward pass makes them again."""

    @property
    def device_bytes(self) -> int:
        """Bytes on the device while sampling."""
        return 0

    @property
    def is_resident(self) -> bool:
        """True while device copies exist."""
        return False

    @property
    def is_slow(self) -> bool:
        """True if the device had no memory for the stack, so that a part of it was calculated in RAM."""
        return False
