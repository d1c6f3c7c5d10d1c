"""The list of faults to plant is one for the product as it is: one that is rewritten needs its faults in the new text."""

from collections import Counter

from planted_faults import FAULTS, ROOT, searched_files


def test_each_fault_has_one_entry_whose_text_stands_once_in_the_product():
    product = "\0".join(path.read_text(encoding="utf-8") for path in searched_files(ROOT))
    fitting = Counter(fault.name for fault in FAULTS if product.count(fault.right) == 1)

    assert {name: fitting[name] for name in {fault.name for fault in FAULTS} if fitting[name] != 1} == {}
