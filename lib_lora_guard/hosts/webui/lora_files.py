"""Stands in place of `networks.load_lora_for_models`: reads the LoRA file by the guard's own rules.

Forge's own parser drops kinds it has no tuple for (OFT, BOFT, IA3), names it has no map for (SD3 as diffusers writes it),
and what stands in the metadata (alpha and rsLoRA of PEFT). A mismatch is a guess there, by the number of keys left over.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...adapters.base import Adapter, Shape
from ...adapters.file_settings import FileSettings
from ...adapters.files import LoraFile, holds_only_views, parse_tensors, read_lora_file
from ...errors import LoraFileError, LoraMismatchError, Message, about, reason
from ...files import is_file, open_header, shown, state_of
from ...messages import Joined, say, without
from ...models.fit import Fit, Target, fit_file
from ...patching.parameters import named_parameters
from ...patching.room_to_read import room_now_bytes
from ...reporting.lora_rows import FileSheet
from ...reporting.report import clean_text
from ...runtime.factor_copies import own
from ...runtime.file_sheet import sheet_of
from ...runtime.host import FittedLora, LoraPatchers
from ...runtime.image_words import ImageWords
from ...runtime.left_out import Remainder, applied_in_part, nothing_applied, remainder_of
from ...runtime.live_settings import LiveSettings
from ...weights.storage import shape_of
from .patchers import TuplePatchers
from .read_ahead import FileKey, ReadAhead

log = logging.getLogger(__name__)


class LazyState(Mapping[str, torch.Tensor]):
    """Stands for the tensors of a LoRA file. The host reads and maps the file only where something looks inside."""

    def __init__(
        self,
        filename: str,
        load: Callable[[], Mapping[str, torch.Tensor]],
        names: Callable[[], Iterable[str]] | None = None,
    ) -> None:
        """
        Args:
            filename: of the file.
            load: lets the host read it.
            names: returns the names of its tensors without the host; None: of what `load` returns.
        """
        self.filename = filename
        self._load, self._names = load, names
        self._state: Mapping[str, torch.Tensor] | None = None

    @property
    def state(self) -> Mapping[str, torch.Tensor]:
        if self._state is None:
            self._state = self._load()
        return self._state

    @property
    def names(self) -> Iterable[str]:
        """The names of the tensors in the file. They need not the host's reading."""
        return self.state if self._names is None else self._names()

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.state[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.state)

    def __len__(self) -> int:
        return len(self.state)

    def copy(self) -> dict[str, torch.Tensor]:
        return dict(self.state)

    def for_host(self) -> Mapping[str, torch.Tensor]:
        """Returns what the host's own reader of patches can take."""
        return self


class LoraFiles:
    """Reads LoRA files for Forge's models; files just used are kept while they are unchanged on disk.

    Those of the last two stacks are kept whatever their size; of the others at most `kept_bytes`, and, where the host's
    option says a number, at most `kept_files`.
    """

    def __init__(
        self,
        settings: LiveSettings | None = None,
        unpatched_shapes: Callable[[torch.nn.Module], Mapping[str, Shape]] = lambda model: {},
        words: ImageWords | None = None,
        patchers: LoraPatchers | None = None,
        state_class: type[LazyState] = LazyState,
    ) -> None:
        """
        Args:
            settings: how much is kept, and whether the host reads LoRA files itself.
            unpatched_shapes: returns the shapes that merged parameters of a model have without their LoRAs.
            words: says what is left out.
            patchers: adds LoRAs to the host's patchers; None for those of Forge.
            state_class: of what stands for the tensors of a file that the host has not read.
        """
        self._state_class = state_class
        self.patchers = patchers or TuplePatchers()
        self._settings, self._unpatched_shapes = settings or LiveSettings(), unpatched_shapes
        self.words = words or ImageWords()
        self._lock = threading.Lock()
        """Protects `_kept`: files are read where images are made, the settings page changes how much is kept."""
        self._kept: OrderedDict[FileKey, LoraFile] = OrderedDict()
        self._in_stack: set[FileKey] = set()
        self._last_stack: set[FileKey] = set()
        self.left_out: dict[str, str] = {}
        """LoRAs of the present stack that were refused as a whole, with the reason."""
        self.missing: dict[str, str] = {}
        """Names in the last prompt that are no LoRA's, with what is said of them."""
        self._in_part: dict[str, tuple[Message, int]] = {}
        """LoRAs of the present stack that are applied in part, with the sentence and its level."""
        self._stack = ""
        """"announced" or "open" inside `announced_stack`."""
        self._matches: weakref.WeakKeyDictionary[LoraFile, Matches] = weakref.WeakKeyDictionary()
        self._left: weakref.WeakKeyDictionary[LoraFile, tuple[Sequence[weakref.ref[Fit]], Remainder]] = (
            weakref.WeakKeyDictionary()
        )
        self._sheets: weakref.WeakKeyDictionary[LoraFile, FileSheet] = weakref.WeakKeyDictionary()
        self._ahead = ReadAhead()
        self._shapes: weakref.WeakKeyDictionary[torch.nn.Module, dict[str, Shape]] = weakref.WeakKeyDictionary()
        """Those of the models that get the present stack, while its files are read: each file asks for them."""
        self._targets: weakref.WeakKeyDictionary[torch.nn.Module, Target] = weakref.WeakKeyDictionary()
        """The names of each model, worked out once for all files."""
        self._named: tuple[FileKey, LoraFile] | None = None
        """A file that was read when the host asked for the names in it, until the host hands it over."""
        self._is_patchable = True
        """False if the last model was one that the host patches itself: its files are not for the guard to read."""

    def load_state(self, original: Callable[..., Any], filename: Any) -> Any:
        """Stands in place of `networks.load_lora_state_dict`."""
        if (
            self.is_host_reading()
            or not _is_hosts_own(original)
            or not isinstance(filename, (str, Path))
            or not is_file(Path(filename))
        ):
            return original(filename)
        return self._state_class(str(filename), lambda: original(filename), lambda: self._names_in(Path(filename)))

    def load_for_models(
        self,
        original: Callable[..., tuple[Any, Any]],
        model: Any,
        clip: Any,
        lora: Any,
        strength_model: float,
        strength_clip: float,
        filename: Any = "default",
        online_mode: bool = False,
    ) -> tuple[Any, Any]:
        """The two patchers, cloned and with the file's patches where it has any for them; as they were where it cannot
        be used, which is said in the log."""
        name = shown(Path(str(filename)).name)
        # Forge builds every stack anew, from a patcher without patches; most of the last one comes again. Who brings a
        # `load_networks` of their own announces nothing, and then the patcher is all there is to go by.
        if self._stack == "announced" or (not self._stack and not self.patchers.has_loras(model)):
            self._stack = self._stack and "open"
            self._last_stack, self._in_stack = self._in_stack, set()
            self.left_out, self._in_part = {}, {}
        if self.is_host_reading():
            return original(model, clip, _for_host(lora), strength_model, strength_clip, filename, online_mode)
        why = self.patchers.not_patchable(model)
        self._is_patchable = why is None
        if why is not None:
            self.words.tell(why)
            # By its name alone.
            return original(model, clip, lora, strength_model, strength_clip, filename, online_mode)
        try:
            file = self._read(filename, lora)
            sides = [
                (model, "model", strength_model, Message("host.unet")),
                (clip, "cond_stage_model", strength_clip, Message("host.text_encoder")),
            ]
            found = [None if p is None else self._match(file, getattr(p, attribute)) for p, attribute, *_ in sides]
        except (LoraFileError, LoraMismatchError) as error:
            # What the guard refused as broken is never handed to the host.
            self.left_out[name] = without(name, reason(error))
            self._tell_left_out(name)
            return model, clip
        except Exception:
            say(log, logging.ERROR, "host.guard_could_not_read", exc_info=True, name=name)
            return original(model, clip, _for_host(lora), strength_model, strength_clip, filename, online_mode)
        fits = [match for match in found if match is not None]
        left = self._remainder(file, fits)
        why = nothing_applied(file, fits, left)
        if why is not None:
            self.left_out[name] = why
            self._tell_left_out(name)
            return model, clip
        patched = []
        for (patcher, _, strength, side), match in zip(sides, found, strict=True):
            if match is None or not match.terms:
                patched.append(patcher)
                continue
            lora_of_side = FittedLora(filename, match.terms, strength, online_mode, file=file, fit=match)
            patched.append(self.patchers.with_lora(patcher, lora_of_side))
            count = sum(len(terms) for terms in match.terms.values())
            say(log, logging.DEBUG, "host.keys_for", name=name, count=count, side=side)
        lacking = applied_in_part(name, file, left)
        if lacking is not None:
            self._in_part[name] = lacking
            self.words.tell(*lacking)
        return patched[0], patched[1]

    @contextlib.contextmanager
    def announced_stack(self, missing: Mapping[str, str], is_empty: bool) -> Iterator[None]:
        """Wraps the host's `load_networks`, which reads the files of a new stack, or none where the stack is the
        same."""
        self.missing, self._stack = dict(missing), "announced"
        self._shapes.clear()
        if is_empty:
            self.left_out, self._in_part = {}, {}
        try:
            yield
        finally:
            self._stack, self._named = "", None
            self._shapes.clear()

    def read_ahead(self, paths: Iterable[Path]) -> contextlib.AbstractContextManager[None]:
        """Reads files of the coming stack in a thread while the host does something else with them first."""
        if self.is_host_reading():
            return contextlib.nullcontext()
        states = [(str(path), state_of(path)) for path in paths]
        with self._lock:
            kept = set(self._kept)
        return self._ahead.of((path, state) for path, state in states if state and (path, state) not in kept)

    def tell_again(self) -> None:
        """Says of the present stack what was said when its files were read, for an image that reads none."""
        for name in self.left_out:
            self._tell_left_out(name)
        for lacking in self._in_part.values():
            self.words.tell(*lacking)

    def remind(self) -> None:
        """Says again what is left out, for an image with the same stack as the last."""
        if self.words.is_open:
            self.tell_again()
        elif self.left_out:
            loras = [Message("host.left_out_of_all", {"name": name, "why": why}) for name, why in self.left_out.items()]
            say(log, logging.WARNING, "host.still_without", loras=Joined(loras, "list.semicolon"))

    def _remainder(self, file: LoraFile, fits: Sequence[Fit]) -> Remainder:
        """Returns what none of the models takes of a file; worked out once for the same models."""
        known = self._left.get(file)
        if known is not None and [fit() for fit in known[0]] == fits:
            return known[1]
        shapes: dict[str, Shape] = {}
        for of_model, match in self._matches.get(file, {}).values():
            if any(match is fit for fit in fits):
                shapes |= of_model
        left = remainder_of(file, fits, shapes)
        self._left[file] = ([weakref.ref(fit) for fit in fits], left)
        return left

    def _tell_left_out(self, name: str) -> None:
        self.words.tell(Message("host.left_out", {"name": name, "why": clean_text(self.left_out[name])}))

    def _read(self, filename: Any, lora: Any) -> LoraFile:
        if not isinstance(lora, LazyState):
            # Another extension hands over tensors that it has made, loaded or changed: these count, not the file.
            return parse_tensors(Path(str(filename)), dict(lora), FileSettings({}))
        path = Path(lora.filename)
        key, file = self._present(path)
        with self._lock:
            self._kept[key] = file
            self._kept.move_to_end(key)
        self._in_stack.add(key)
        self.trim()
        return file

    def _present(self, path: Path) -> tuple[FileKey, LoraFile]:
        """Returns a file as it lies on disk now: one that is kept, or that was read for its names, else it is read.

        Raises:
            LoraFileError: it is missing, broken, no LoRA or too large.
        """
        # The state before it is read: a file that changes afterwards is another one at the next call.
        state = state_of(path) if is_file(path) else None
        if state is None:
            raise LoraFileError(about(shown(path.name), Message("file.missing")))
        key = (str(path), state)
        named, self._named = self._named, None
        with self._lock:
            # The one that is kept may have failed before this one was read.
            file = named[1] if named is not None and named[0] == key else self._kept.get(key)
        # Read again, it is said what is wrong.
        has_failed = file is not None and file.coming is not None and file.coming.has_failed
        if file is None or has_failed:
            file = self._ahead.take(key) or read_lora_file(path, room=self._room, values_may_follow=not has_failed)
            own(tensor for adapter in file.adapters.values() for tensor in adapter.tensors())
        return key, file

    def _names_in(self, path: Path) -> Iterable[str]:
        """Returns the names of a file's tensors. In a stack the host hands the file over right after that, so it is read now.

        Raises:
            FileFormatError: the file cannot be read.
        """
        if self._stack and self._is_patchable:
            try:
                self._named = self._present(path)
                return self._named[1].shapes
            except Exception:
                # Handed over, it is read again, which says what is wrong.
                log.debug("%s: names from the header", path, exc_info=True)
        return open_header(path).tensors

    def _room(self, needed_bytes: int) -> int | None:
        """Returns the RAM for another file. Where it is too little, files that are not of the present stack go."""
        room = room_now_bytes(needed_bytes)
        if room is not None and needed_bytes > room and self.drop_unused():
            room = room_now_bytes(needed_bytes)
        return room

    def has_failed(self, path: Path) -> bool:
        """Returns True if a file of the present stack could not be read after all. It may be there when it is read again."""
        with self._lock:
            found = [file.coming for key, file in self._kept.items() if key in self._in_stack and key[0] == str(path)]
        return any(one is not None and one.has_failed for one in found)

    def is_host_reading(self) -> bool:
        """True if the host reads LoRA files itself."""
        return self._settings.is_host_reading()

    def trim(self) -> None:
        """Gives back files beyond what may be kept, the one used longest ago first."""
        with self._lock:
            for old in [key for key in self._kept if key not in self._in_stack | self._last_stack]:
                is_too_much = sum(state.bytes for _, state in self._kept) > self._settings.kept_files_bytes()
                if is_too_much or 0 < self._settings.kept_files() < len(self._kept):
                    del self._kept[old]

    def drop_unused(self) -> int:
        """Gives back every file that is not of the present stack; returns the bytes."""
        with self._lock:
            unused = [key for key in self._kept if key not in self._in_stack]
            for key in unused:
                del self._kept[key]
        return sum(state.bytes for _, state in unused)

    @property
    def bytes(self) -> int:
        """Bytes on disk of the files that are kept in RAM."""
        with self._lock:
            return sum(state.bytes for _, state in self._kept)

    def sheets(self) -> dict[str, FileSheet]:
        """Returns facts of the files of the present stack, by their names. For any thread; worked out once for each file."""
        with self._lock:
            files = [file for key, file in self._kept.items() if key in self._in_stack]
        sheets = {}
        for file in files:
            sheet = self._sheets.get(file)
            if sheet is None:
                sheet = self._sheets[file] = sheet_of(file)
            left = self._left.get(file)
            share = None if left is None else left[1].modules.share
            sheets[file.path.name] = replace(sheet, share_left_out=share)
        return sheets

    def expect(self, model: torch.nn.Module) -> Callable[[], None]:
        """Returns what works out the names of a model, in any thread: the first file that meets it need not wait for that."""
        target = self._targets[model] = Target(self._shapes_of(model))
        return target.work_out

    def _shapes_of(self, model: torch.nn.Module) -> dict[str, Shape]:
        known = self._shapes.get(model)
        if known is not None:
            return known
        shapes: dict[str, Shape] = {name: shape_of(parameter) for name, parameter in named_parameters(model).items()}
        shapes |= self._unpatched_shapes(model)
        if self._stack:
            self._shapes[model] = shapes
        return shapes

    def _match(self, file: LoraFile, model: torch.nn.Module) -> Fit:
        """Returns the part of the file that fits one model; worked out once, for nothing in it depends on the
        strength."""
        shapes = self._shapes_of(model)
        known = self._matches.setdefault(file, weakref.WeakKeyDictionary())
        if model in known and known[model][0] == shapes:
            return known[model][1]
        target = self._targets.get(model)
        if target is None or target.shapes != shapes:
            target = self._targets[model] = Target(shapes)
        # Asked before: what is computed while the last values come may be computed from other ones.
        coming = None if file.coming is None or file.coming.is_done else file.coming
        match, of_file = _match(file, target), set(map(id, file.adapters.values()))
        made = _made_for(match, of_file)
        if coming is not None and not holds_only_views(made, coming):
            file.wait()
            match = _match(file, target)
            made = _made_for(match, of_file)
        own(tensor for adapter in made for tensor in adapter.tensors())
        known[model] = (shapes, match)
        return match


def _is_hosts_own(reader: Any) -> bool:
    """False where another extension came first: what it makes of the file counts then. Its wrapper may carry the host's
    name and attributes, but not the host's code."""
    inner = reader.__wrapped__ if hasattr(reader, "cache_info") else reader
    if isinstance(inner, functools.partial):
        inner = inner.func
    code = getattr(inner, "__code__", None)
    return code is not None and code.co_name in _READERS


def _for_host(lora: Any) -> Any:
    return lora.for_host() if isinstance(lora, LazyState) else lora


_READERS = ("load_lora_state_dict", "load_torch_file")
"""Forge's function, and the one that Forge Neo's is made from."""


Matches = weakref.WeakKeyDictionary[torch.nn.Module, tuple[dict[str, Shape], Fit]]


def _made_for(match: Fit, of_file: Container[int]) -> list[Adapter]:
    """Returns the adapters that were made of those of the file (`of_file`, by their ids): parts of them."""
    adapters = (term.adapter for on_key in match.terms.values() for term in on_key)
    return [adapter for adapter in adapters if id(adapter) not in of_file]


def _match(file: LoraFile, target: Target) -> Fit:
    """Raises LoraMismatchError where the file was made for another model."""
    fit = fit_file(file, target, is_all=False)
    if fit.refused is not None:
        raise LoraMismatchError(fit.refused)
    return fit
