"""The diagram of docs/architecture.md is that of the source."""

from pathlib import Path

from import_diagram import diagram, imports, reachable


def test_the_page_has_the_diagram_of_the_source() -> None:
    page = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text()
    block = page.split("```mermaid\n")[1].split("\n```")[0]
    assert block == diagram(), "`python tests/import_diagram.py` prints the new one"


def test_there_is_no_import_cycle() -> None:
    edges = imports()
    assert {"commands", "model", "train"} <= set(edges)
    assert not [package for package in edges if package in reachable(package, edges)]
