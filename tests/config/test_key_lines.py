"""The lines of keys in JSON and TOML, against where the text has them."""

import json

import pytest

from tinyllama_ds.config.key_lines import json_lines, key_path, toml_lines

TOML = '''
name = "mine"  # seed = 1
"quoted key".x = 3
text = """
seed = 5
"""
[[stages]]
weights = { a = 1 }
tasks = [
    "b = 1",
]
[[stages]]
tokens = 1
[guard.inner]
a = "[intervals]"
'''


def test_toml() -> None:
    assert toml_lines(TOML) == {
        ("name",): 2,
        ("quoted key", "x"): 3,
        ("text",): 4,
        ("stages", 0): 7,
        ("stages", 0, "weights"): 8,
        ("stages", 0, "tasks"): 9,
        ("stages", 1): 12,
        ("stages", 1, "tokens"): 13,
        ("guard", "inner"): 14,
        ("guard", "inner", "a"): 15,
    }


@pytest.mark.parametrize("indent", [0, 1, 4])
def test_json(indent: int) -> None:
    content = {"a": {"b:": [1, {"c": '}\\" ,'}, {"c": []}], "x": None}, "d\n": {}, "e": 1.5}
    text = json.dumps(content, indent=indent)
    rows = text.split("\n")
    lines = json_lines(text)
    paths = [("a",), ("a", "b:"), ("a", "b:", 1, "c"), ("a", "b:", 2, "c"), ("a", "x"), ("d\n",), ("e",)]
    assert list(lines) == paths
    assert list(lines.values()) == sorted(lines.values())
    for path, line in lines.items():
        assert json.dumps(path[-1]) in rows[line - 1]


def test_what_is_in_one_line_has_no_lines() -> None:
    assert json_lines('{"a": {"b": 1}}\n') == {}


def test_paths_are_written_as_in_the_messages() -> None:
    assert key_path(("stages", 0, "tokens")) == "stages[0].tokens"
