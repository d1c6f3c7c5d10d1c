"""Tables of pictures of a running Forge Neo: the guard's and Neo's own distance from a reference, in grey levels.

A table is a function `table(neo, side)` that yields `((row, case), make an image)` in order. Four servers one after the other make
them: a test-only one that merges in fp64 into fp32 weights (`extension/`), Neo with the guard, and Neo with the guard off in its
settings "Automatic" and "(fp16 LoRA)". In the cases "without" and "removed" no LoRA is in use, and the guard's two pictures must be
the same bits.
"""

import argparse
import dataclasses
import functools
import pickle
from pathlib import Path

from real_forge.run import difference, markdown, show

from real_neo.neo import attempt, linked, running, write_docs

AUTOMATIC, FP16_LORA = "Automatic", "Automatic (fp16 LoRA)"
SIDES = {
    "reference": ("reference", AUTOMATIC),
    "guard": ("guard", AUTOMATIC),
    "stock": ("stock", AUTOMATIC),
    "stock (fp16 LoRA)": ("stock", FP16_LORA),
}
LIMIT_LEVELS = 1
"""The rounding of a pixel."""
SEEN_LEVELS = 8


@dataclasses.dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        make: yields its pictures.
        what: head of its first column.
        flags: of the command line of all its servers.
        fp16_lora: it is of interest what Neo's setting "(fp16 LoRA)" does.
        env: environment of all its servers.
        differ: two cases whose reference pictures are different ones, or what was tried did nothing.
    """

    make: object
    what: str
    flags: tuple = ()
    fp16_lora: bool = False
    env: tuple = ()
    differ: tuple = ()


def images_of(label, name, table, folder):
    """`{(row, case): image or error}` of one server, and its console."""
    side, low_bits = SIDES[label]
    images = {}
    with linked(), running(side, low_bits, folder, table.flags, env=dict(table.env)) as neo:
        neo.low_bits = low_bits
        for key, make in table.make(neo, side):
            images[key] = attempt(make)
            if isinstance(images[key], str):
                print(f"{label}, {name}, {key}: {images[key]}"[:300], flush=True)
        return images, neo.console()


def kept(label, name, table, folder):
    """The pictures of one side, made unless they are in the folder."""
    path = folder / f"{label}-{name}.pickle"
    if not path.exists():
        (folder / name).mkdir(exist_ok=True)
        path.write_bytes(pickle.dumps(images_of(label, name, table, folder / name)))
        print(f"made: {label}, {name}", flush=True)
    return pickle.loads(path.read_bytes())


def _base(images, row):
    """The picture without LoRAs that a row starts from."""
    return images.get((row, "without"), next((image for (_, case), image in images.items() if case == "without"), ""))


def rows_of(name, table, results):
    """Rows of the table in docs and a sentence for each fault.

    A row has, for each of its cases: what the LoRA does, Neo's distance from the reference, the guard's.
    """
    guard, truths = results["guard"][0], results["reference"][0]
    stocks = [label for label in results if label.startswith("stock")]
    cases = list(dict.fromkeys(case for _, case in truths if case not in ("without", "removed", "before")))
    rows, wrong = {}, []
    for (row, case), image in guard.items():
        truth = truths.get((row, case), "")
        off = difference(image, truth)
        if off is None or off[0] > LIMIT_LEVELS:
            wrong.append(f"{name}, {row}, {case}: {show(off)} off: {image if isinstance(image, str) else ''}"[:300])
        if case == "removed" and difference(image, _base(guard, row)) != (0, 0.0):
            wrong.append(f"{name}, {row}: removed, the picture is not the first one")
        if case not in cases:
            continue
        base = _base(truths, row)
        comparable = not isinstance(truth, str) and not isinstance(base, str) and base.shape == truth.shape
        effect = show(difference(truth, base)) if comparable else ""
        cells = [
            effect,
            *(show(difference(results[label][0].get((row, case), ""), truth)) for label in stocks),
            show(off),
        ]
        rows.setdefault(row, {})[case] = cells
    for row in rows if table.differ else ():
        gap = difference(*(truths[row, case] for case in table.differ))
        if gap is None or gap[0] < SEEN_LEVELS:
            wrong.append(f"{name}, {row}: {' and '.join(table.differ)} are the same picture: {show(gap)}")
    faults = results["guard"][1].count("Traceback")
    # Neo's start writes one when its folder has no remote.
    if faults > results["stock"][1].count("Traceback"):
        wrong.append(f"{name}: {faults} tracebacks in the guard's console")
    empty = [""] * (2 + len(stocks))
    head = [table.what]
    for case in cases:
        words = f"{case}: " if case else ""
        head += [f"{words}effect", *(("Neo", "Neo, (fp16 LoRA)")[: len(stocks)]), "guard"]
    lines = [[row, *(cell for case in cases for cell in cells.get(case, empty))] for row, cells in rows.items()]
    return head, lines, wrong


def main(tables, description, before=lambda: None, after=lambda: None):
    """The command line of a script of tables."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=",".join(tables))
    parser.add_argument("--sides", default=",".join(SIDES), help="without all of them pictures are made, and no table")
    parser.add_argument("--keep", type=Path, required=True, help="folder in which pictures and consoles stay")
    parser.add_argument("--write-docs", action="store_true")
    options = parser.parse_args()
    options.keep.mkdir(parents=True, exist_ok=True)
    wrong = []
    try:
        before()
        for name in options.tables.split(","):
            table = tables[name]
            wanted = [label for label in SIDES if table.fp16_lora or label != "stock (fp16 LoRA)"]
            chosen = [label for label in wanted if label in options.sides.split(",")]
            results = {label: kept(label, name, table, options.keep) for label in chosen}
            if chosen != wanted:
                continue
            head, rows, faults = rows_of(name, table, results)
            print(f"\n{name}\n{markdown(head, rows)}", flush=True)
            wrong += faults
            if options.write_docs:
                write_docs(name, markdown(head, rows))
    finally:
        after()
    print("\n".join(wrong) or "all as it should be")
    return bool(wrong)


def image_with(neo, model, **settings):
    """Makes an image later."""
    return functools.partial(neo.image, model, **settings)
