"""Matches the names of modules with the patterns of a PEFT configuration, in time linear in the names.

PEFT (`peft.utils.other.get_pattern_key`) takes the first entry, in the order of the JSON, whose key fits:
`re.match(rf"(.*\\.)?({key})$", name)`. Python's `re` may run for ever on an expression that a file chooses
(`(a+)+b`), so the expressions run on an automaton here. Keys without special characters, of which a file may have one
for each module, are looked up.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ..errors import LoraFileError, Message
from ..files import shown

MOST_STATES = 4000
"""States of all automata of one configuration. Each costs a step for every new place in a name."""
LONGEST_EXPRESSION = 500
"""Characters of one expression."""
_DEEPEST = 30
"""Groups inside each other. Reading one takes a Python frame or two."""
_ANCHORS = {"^": "^", "\\A": "^", "$": "$", "\\Z": "$"}
_SPECIAL = frozenset("\\[](){}|+*?^$")


class Patterns:
    """The entries of one `alpha_pattern` or `rank_pattern`."""

    def __init__(self, entries: Mapping[str, Any]) -> None:
        """Reads all keys.

        Raises:
            LoraFileError: a key is no regular expression, or one that is not understood.
        """
        self._literals: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        """Place in the JSON by length, places of dots (each stands for any character), and text without these."""
        self._whole: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        """The same for keys that begin with `^`: they are the whole name."""
        self._expressions: list[tuple[int, Expression]] = []
        self._values = list(entries.values())
        states = 0
        for place, key in enumerate(entries):
            plain = key.removesuffix("$")
            table = self._whole if plain.startswith("^") else self._literals
            plain = plain.removeprefix("^")
            if plain and not _SPECIAL.intersection(plain):
                dots = tuple(n for n, letter in enumerate(plain) if letter == ".")
                table.setdefault(len(plain), {}).setdefault(dots, {}).setdefault(plain, place)
                continue
            expression = Expression(rf"(.*\.)?({key})$", key)
            states += expression.states
            if states > MOST_STATES:
                raise LoraFileError.of("lora.patterns_too_long", pattern=shown(key))
            self._expressions.append((place, expression))

    def first(self, name: str) -> Any:
        """The value of the first entry that fits a module's name; None if none does."""
        places = [place for place, expression in self._expressions if expression.fits(name)][:1]
        if self._whole:
            places += _found(self._whole, name)
        if self._literals:
            places += _found(self._literals, name)
            dot = name.find(".")
            while dot >= 0:
                places += _found(self._literals, name[dot + 1 :])
                dot = name.find(".", dot + 1)
        return self._values[min(places)] if places else None


def _found(table: Mapping[int, Mapping[tuple[int, ...], Mapping[str, int]]], end: str) -> list[int]:
    """The places of all keys without special characters that are equal to the end of a name."""
    found = []
    for dots, keys in table.get(len(end), {}).items():
        text = end
        for dot in dots:
            if text[dot] != ".":
                text = f"{text[:dot]}.{text[dot + 1 :]}"
        place = keys.get(text)
        # A line's end is the one character that a dot does not stand for.
        if place is not None and "\n" not in end:
            found.append(place)
    return found


class Expression:
    """A regular expression as an automaton: its time is linear in the name, whatever the expression is.

    It understands what describes names: characters, classes, groups, alternatives, repetitions, `^` and `$`. The
    states of the automaton are numbers; those reached so far are remembered by the states and the next character.
    """

    def __init__(self, text: str, shown_as: str | None = None) -> None:
        """Reads the expression.

        Args:
            text: the expression; it must fit the whole name.
            shown_as: the file's own spelling, for the error.

        Raises:
            LoraFileError: it is no regular expression, too long, or has a part that is not understood.
        """
        self._said = text if shown_as is None else shown_as
        self._text, self._place = text, 0
        self._edges: list[list[int]] = []
        """Steps that take no character, by state."""
        self._takes: list[re.Pattern[str] | None] = []
        """The characters that lead to the next state, by state."""
        self._anchors: dict[int, str] = {}
        try:
            if len(text) > LONGEST_EXPRESSION:
                raise ValueError
            start, end = self._alternatives(0)
            if self._place != len(self._text):
                raise ValueError
            # Last: older Pythons warn of flags inside, which are refused above.
            re.compile(text)
        except (re.error, ValueError, IndexError, OverflowError, RecursionError) as error:
            why = str(error) if isinstance(error, re.error) else ""
            raise self._not_understood(why) from None
        self._end = end
        self._closures: dict[tuple[frozenset[int], bool], frozenset[int]] = {}
        self._steps: dict[tuple[frozenset[int], str], frozenset[int]] = {}
        self._first = self._closure(frozenset({start}), at_start=True)

    @property
    def states(self) -> int:
        """The number of states."""
        return len(self._edges)

    def fits(self, name: str) -> bool:
        """True if the expression matches the whole name, as `re.fullmatch`."""
        states = self._first
        for letter in name:
            known = self._steps.get((states, letter))
            if known is None:
                known = self._steps[states, letter] = self._step(states, letter)
            if not known:
                return False
            states = known
        return self._end in self._closure(states, at_start=not name, at_end=True)

    def _step(self, states: frozenset[int], letter: str) -> frozenset[int]:
        reached = {n + 1 for n in states if (take := self._takes[n]) is not None and take.match(letter)}
        return self._closure(frozenset(reached))

    def _closure(self, states: frozenset[int], *, at_start: bool = False, at_end: bool = False) -> frozenset[int]:
        """All states that are reached without a character."""
        reached, waiting = set(states), list(states)
        while waiting:
            state = waiting.pop()
            anchor = self._anchors.get(state)
            if (anchor == "^" and not at_start) or (anchor == "$" and not at_end):
                continue
            for following in self._edges[state]:
                if following not in reached:
                    reached.add(following)
                    waiting.append(following)
        return frozenset(reached)

    # Reading. Each part gives its first and its last state.

    def _alternatives(self, depth: int) -> tuple[int, int]:
        if depth > _DEEPEST:
            raise ValueError
        start, end = self._state(), self._state()
        while True:
            first, last = self._sequence(depth)
            self._edges[start].append(first)
            self._edges[last].append(end)
            if self._peek() != "|":
                return start, end
            self._place += 1

    def _sequence(self, depth: int) -> tuple[int, int]:
        start = last = self._state()
        while self._peek() not in ("", "|", ")"):
            begin = self._place
            first, end = self._atom(depth)
            least, most = self._repetition()
            if (least, most) != (1, 1):
                first, end = self._repeated(begin, first, end, least, most, depth)
            self._edges[last].append(first)
            last = end
        return start, last

    def _atom(self, depth: int) -> tuple[int, int]:
        letter = self._next()
        if letter == "(":
            if self._peek() == "?":
                if not (name := re.compile(r"\?(:|P<\w+>)").match(self._text, self._place)):
                    raise ValueError
                self._place = name.end()
            part = self._alternatives(depth + 1)
            if self._next() != ")":
                raise ValueError
            return part
        if letter == "\\":
            letter += self._next()
            if letter not in _ANCHORS and letter[1].isalnum() and letter[1] not in "dDwWsSnt":
                raise ValueError
        elif letter == "[":
            begin = self._place
            if self._peek() == "^":
                self._place += 1
            if self._peek() == "]":
                self._place += 1
            while (inside := self._next()) != "]":
                if inside == "\\":
                    self._next()
            letter = f"[{self._text[begin : self._place]}"
        elif letter in "*+?{":
            # A brace that begins no number stands for itself.
            if letter != "{" or re.compile(r"\d*(,\d*)?\}").match(self._text, self._place):
                raise ValueError
            letter = "\\{"
        if letter in _ANCHORS:
            start, end = self._state(), self._state()
            self._anchors[start] = _ANCHORS[letter]
            self._edges[start].append(end)
            return start, end
        start = self._state()
        self._takes[start] = re.compile(letter if len(letter) > 1 or letter == "." else re.escape(letter))
        return start, self._state()

    def _repetition(self) -> tuple[int, int | None]:
        """The least and the most number of times; None for any."""
        found = re.compile(r"([*+?]|\{(\d+)\}|\{(\d*),(\d*)\})\??").match(self._text, self._place)
        if found is None:
            return 1, 1
        self._place = found.end()
        if self._peek() == "+":
            raise ValueError  # Possessive: it fits less than the automaton would.
        sign = found[1]
        if sign in ("*", "+", "?"):
            return (1 if sign == "+" else 0), (1 if sign == "?" else None)
        if found[2] is not None:
            return int(found[2]), int(found[2])
        return int(found[3] or 0), (int(found[4]) if found[4] else None)

    def _repeated(self, begin: int, first: int, end: int, least: int, most: int | None, depth: int) -> tuple[int, int]:
        """The part of the text from `begin`, read again for each time that it may stand there."""
        after = self._place
        count = max(least if most is None else most, 1)
        parts = [(first, end)]
        for _ in range(count - 1):
            if self.states > MOST_STATES:
                raise ValueError
            self._place = begin
            parts.append(self._atom(depth))
        self._place = after
        start, stop = self._state(), self._state()
        last = start
        for number, (into, out) in enumerate(parts):
            if number >= least:
                self._edges[last].append(stop)
            self._edges[last].append(into)
            last = out
            if most is None and number == count - 1:
                self._edges[out].append(into)
        if most != 0:
            self._edges[last].append(stop)
        else:
            self._edges[start] = [stop]
        return start, stop

    def _state(self) -> int:
        if len(self._edges) > MOST_STATES:
            raise ValueError
        self._edges.append([])
        self._takes.append(None)
        return len(self._edges) - 1

    def _peek(self) -> str:
        return self._text[self._place : self._place + 1]

    def _next(self) -> str:
        letter = self._text[self._place]
        self._place += 1
        return letter

    def _not_understood(self, why: str) -> LoraFileError:
        reason = Message("lora.pattern_why", {"why": shown(why)}) if why else ""
        return LoraFileError.of("lora.pattern", pattern=shown(self._said), why=reason)
