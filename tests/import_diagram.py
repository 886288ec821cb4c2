"""The imports between the packages of tinyllama_ds as a mermaid diagram: `python tests/import_diagram.py` prints it.

`docs/architecture.md` holds it, and `tests/test_import_diagram.py` compares. An edge that follows from a longer path is
left out, and so are the single modules (errors, files ...), which everything imports.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tinyllama_ds"


def imports() -> dict[str, set[str]]:
    """The packages that each package imports."""
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    found: dict[str, set[str]] = {package: set() for package in packages}
    for package in packages:
        for path in (PACKAGE / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tinyllama_ds."):
                    found[package].add((node.module or "").split(".")[1])
    return {package: (others & packages) - {package} for package, others in found.items()}


def reachable(package: str, edges: dict[str, set[str]]) -> set[str]:
    """All packages below a package."""
    return edges[package].union(*(reachable(other, edges) for other in edges[package]))


def diagram() -> str:
    """The edges without those that follow from a longer path."""
    edges = imports()
    lines = ["graph TD"]
    for package in sorted(edges):
        below = set().union(*(reachable(other, edges) for other in edges[package]))
        lines += [f"  {package} --> {other}" for other in sorted(edges[package] - below)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(diagram())
