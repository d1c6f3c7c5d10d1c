"""The characters that hypothesis puts into texts by itself, for `strategies.text(ANY_SIGNS)`."""

from hypothesis import strategies

# All that UTF-8 has. By the name of the codec hypothesis would encode and decode each of a million, which takes seconds.
ANY_SIGNS = strategies.characters(exclude_categories=["Cs"])
