"""Tables on the console."""

from tinyllama_ds.text_table import text_table


def test_numbers_are_aligned_to_the_right_and_words_to_the_left() -> None:
    table = text_table(
        [("zero1", "12", "ok"), ("zero3_keep", "3,241", "too slow")], ("", "tok/s", "note"), words=(0, 2)
    )
    assert table.splitlines() == [
        "            tok/s  note",
        "zero1          12  ok",
        "zero3_keep  3,241  too slow",
    ]


def test_the_last_cell_of_a_short_row_runs_over_the_columns_that_it_lacks() -> None:
    table = text_table([("a", "1", "2"), ("bb", "RuntimeError: out of memory")], ("", "x", "y"))
    assert table.splitlines() == ["    x  y", "a   1  2", "bb  RuntimeError: out of memory"]


def test_headers_without_text_take_no_line() -> None:
    assert text_table([("a", "1"), ("b", "22")], ("", "")) == "a   1\nb  22"
    assert text_table([]) == ""
