"""`benchmarks/pages.py`: a section of a document is replaced, and the rest stays."""

import pages

HEADING = "## One"


def test_a_section_is_replaced_where_it_stands_and_else_put_at_the_end():
    made, old = f"{HEADING}\n\nnew", f"# a\n\n{HEADING}\n\nold\n\n### sub\n\n## next\n\ny\n"
    assert pages.section_of(old, HEADING) == f"{HEADING}\n\nold\n\n### sub\n"
    assert pages.replaced(old, HEADING, made) == f"# a\n\n{HEADING}\n\nnew\n\n## next\n\ny\n"
    assert pages.replaced("# a\n", HEADING, made) == f"# a\n\n{HEADING}\n\nnew\n"
    assert pages.section_of("# a\n", HEADING) == ""
    assert pages.replaced("# a\n", HEADING, "") == "# a\n"
