"""HTML pages from templates/*.html: one self-contained file each, every value escaped, charts drawn in it as SVG."""

import io
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from typing import Any

from tinyllama_ds.text_table import text_table

# Light and dark. Series are Okabe and Ito's colors, which people with any color vision tell apart.
_COLORS = {
    "background": ("#ffffff", "#16181c"),
    "text": ("#1d2126", "#e4e6ea"),
    "faint": ("#5d656f", "#9aa3ad"),
    "line": ("#d9dde2", "#343a42"),
    "pass": ("#17692b", "#6cc585"),
    "fail": ("#a11212", "#ff8d85"),
    "series-0": ("#0072b2", "#5ab4e6"),
    "series-1": ("#d55e00", "#ff9a4d"),
    "series-2": ("#009e73", "#3fcfa3"),
    "series-3": ("#aa4499", "#e08fd0"),
    "series-4": ("#b8860b", "#e6bd4f"),
    "series-5": ("#56707f", "#a9bfca"),
}


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
    return environment.get_template(template).render(colors=_COLORS, **values)


def chart(draw: Callable[[Any], None], title: str, is_wide: bool = False) -> Chart:
    """What `draw` puts into matplotlib axes, as SVG in the colors of the page's style sheet."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    placeholders = {name: f"#0{number:x}0{number:x}f{number:x}" for number, name in enumerate(_COLORS)}
    with matplotlib.rc_context(_settings(placeholders)):
        figure = Figure(figsize=(10.4, 3.4) if is_wide else (5.1, 2.3), layout="constrained")
        figure.patch.set_visible(False)
        draw(figure.subplots())
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])  # each drawing of the page has a figure_1
    for name, color in placeholders.items():
        svg = svg.replace(color, f"var(--{name})")
    return Chart(title, Markup(svg), is_wide)


def _settings(colors: dict[str, str]) -> Any:
    from matplotlib.rcsetup import cycler

    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "",
        "text.parse_math": False,
        "font.size": 8.5,
        "text.color": colors["text"],
        "axes.labelcolor": colors["faint"],
        "xtick.color": colors["faint"],
        "ytick.color": colors["faint"],
        "axes.edgecolor": colors["line"],
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": colors["line"],
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 1.2,
        "axes.prop_cycle": cycler("color", [color for name, color in colors.items() if name.startswith("series")]),
    }
