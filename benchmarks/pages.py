"""Sections of a document that a script writes and another one leaves as they are."""


def section_of(text: str, heading: str) -> str:
    """The section under a heading of the second level; "" if the document has none."""
    _, found, after = text.partition(heading)
    return found + after.partition("\n## ")[0] if found else ""


def replaced(text: str, heading: str, made: str) -> str:
    """A document with a section replaced, or with it at its end; as it is where nothing was made."""
    if not made:
        return text
    old = section_of(text, heading)
    return text.replace(old, made.rstrip() + "\n") if old else text.rstrip() + "\n\n" + made.rstrip() + "\n"
