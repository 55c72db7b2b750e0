"""Names, errors and figures as text for one line."""

import pytest

from s2a_cli.common import text


def test_numbers_within_texts_are_sorted_by_value():
    texts = ["blocks.10.attn", "blocks.2.mlp", "blocks.2.attn", "0.05", "layer12", "layer2", "x²"]
    assert sorted(texts, key=text.natural) == [
        "0.05", "blocks.2.attn", "blocks.2.mlp", "blocks.10.attn", "layer2", "layer12", "x²",
    ]  # fmt: skip
    assert sorted(["²", "10", "9"], key=text.natural) == ["9", "10", "²"]  # a digit that is no number


def test_a_list_of_names_has_an_end():
    assert text.listed([]) == ""
    assert text.listed(["a", "b"]) == "a, b"
    assert text.listed("abcdefg", 4) == "a, b, c, d and 3 more"
    assert text.listed(iter("abc"), 2, "; ") == "a; b and 1 more"
    assert text.listed(["a\nb"]) == "a\\nb"


@pytest.mark.parametrize(("count", "said"), [(0, "0 images"), (1, "1 image"), (2, "2 images")])
def test_a_count_agrees_with_its_noun(count, said):
    assert text.counted(count, "image") == said


def test_a_long_text_is_cut():
    assert text.brief("x" * 100) == "x" * 100
    assert text.brief("x" * 101) == "x" * 97 + "..."
    assert text.printable("a\x1b[2J", 4) == "a\\x1"


def test_what_an_error_says():
    error = ValueError("first\n second")
    assert (text.first_line(error), text.one_line(error)) == ("first", "first second")
    assert text.type_and_first_line(error) == "ValueError: first"
    assert (text.first_line(ValueError()), text.one_line(ValueError())) == ("ValueError", "ValueError")
    assert text.type_and_first_line(ValueError()) == "ValueError: "
