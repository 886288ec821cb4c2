"""HTML pages from templates/*.html: one self-contained file each, every value escaped, charts drawn in it as SVG."""

import io
import re
import tomllib
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyllama_ds.text_table import text_table

_TEMPLATES = Path(__file__).with_name("templates")


@dataclass(frozen=True)
class Table:
    """A table for a page and for the console; `head` is empty or as long as every row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    text_columns: Container[int] = (0,)  # aligned to the left; the others to the right, as numbers are

    def as_text(self) -> str:
        """Title, indented columns and the note."""
        body = text_table(self.rows, self.head, self.text_columns).splitlines()
        note = [f"({self.note})"] if self.note else []
        return "\n  ".join([self.title, *body, *note])

    def as_markdown(self) -> str:
        """The rows alone."""
        rule = ["---" if column in self.text_columns else "---:" for column, _ in enumerate(self.head)]
        return "\n".join(f"| {' | '.join(row)} |" for row in (self.head, rule, *self.rows))


@dataclass(frozen=True)
class Chart:
    """A drawing, over the width of the page if it is wide, else over half of it."""

    title: str
    svg: Any  # markupsafe.Markup
    is_wide: bool


def render(template: str, **values: Any) -> str:
    """The page of a template, which gets `title`, `verdict`, `passed` and what its own blocks need."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("tinyllama_ds"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(colors=_colors(), **values)


def chart(draw: Callable[[Any], None], title: str, is_wide: bool = False) -> Chart:
    """What `draw` puts into matplotlib axes, as SVG in the colors of the page's style sheet."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    with matplotlib.rc_context(fname=_TEMPLATES / "page.mplstyle"):
        figure = Figure(figsize=(10.4, 3.4) if is_wide else (5.1, 2.3), layout="constrained")
        figure.patch.set_visible(False)
        draw(figure.subplots())
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])  # each drawing of the page has a figure_1
    for name, (light, _) in _colors().items():
        svg = svg.replace(light, f"var(--{name})")
    return Chart(title, Markup(svg), is_wide)


def _colors() -> dict[str, tuple[str, str]]:
    """Light and dark, by name."""
    return tomllib.loads((_TEMPLATES / "colors.toml").read_text())
