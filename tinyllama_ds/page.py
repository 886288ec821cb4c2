"""One look for the pages that the toolkit writes: one HTML file that needs nothing else, by day, by night, on paper."""

import html
import io
import re
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

# Colours by day and by night. Series are Okabe and Ito's, which people with any colour vision tell apart.
_COLOURS = {
    "paper": ("#ffffff", "#16181c"),
    "ink": ("#1d2126", "#e4e6ea"),
    "faint": ("#5d656f", "#9aa3ad"),
    "line": ("#d9dde2", "#343a42"),
    "good": ("#17692b", "#6cc585"),
    "bad": ("#a11212", "#ff8d85"),
    "series-0": ("#0072b2", "#5ab4e6"),
    "series-1": ("#d55e00", "#ff9a4d"),
    "series-2": ("#009e73", "#3fcfa3"),
    "series-3": ("#aa4499", "#e08fd0"),
    "series-4": ("#b8860b", "#e6bd4f"),
    "series-5": ("#56707f", "#a9bfca"),
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70em; margin: 2em auto; padding: 0 1em;
  background: var(--paper); color: var(--ink) }
h1 { font-size: 1.45em; line-height: 1.3; margin: 0 0 .3em } h2 { font-size: 1.15em; margin: 2em 0 .2em }
h3 { font-size: 1em; margin: 1em 0 0 } .good { color: var(--good) } .bad { color: var(--bad) }
.note, dt, figcaption { color: var(--faint); margin: 0 } .scroll { overflow-x: auto }
table { border-collapse: collapse; margin: .5em 0 1.5em; font-variant-numeric: tabular-nums }
td, th { padding: .25em 1em .25em 0; text-align: right; border-bottom: 1px solid var(--line); vertical-align: top }
.words { text-align: left } figure { margin: 1em 0 0 } svg { width: 100%; height: auto; display: block }
img { max-width: 100%; background: #fff } pre { overflow-x: auto; white-space: pre-wrap; overflow-wrap: anywhere }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27em), 1fr)); gap: .5em 2em }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.5em, 1fr)); gap: 1em; margin: 1.5em 0 }
dl div { display: flex; flex-direction: column; justify-content: space-between }
dd { font-size: 1.3em; margin: 0; font-variant-numeric: tabular-nums } summary { cursor: pointer; margin: .6em 0 }
.sample { margin: .4em 0 .8em; padding: .2em 0 .2em .8em; border-left: 3px solid var(--line) }
.sample pre { margin: .2em 0 } mark { background: none; color: var(--series-0) }
@media screen and (max-width: 40em) { .wide svg { width: 44em } }
@media print { body { margin: 0; max-width: none; font-size: 12px } h2, h3 { break-after: avoid }
  .grid { grid-template-columns: 1fr 1fr }
  figure, tr, .sample { break-inside: avoid } }
"""


def page(title: str, verdict: str, is_good: bool, body: str) -> str:
    """A whole page; `title` and `verdict` are text, `body` is HTML. It may load nothing and run nothing."""
    day, night = ("".join(f"--{name}:{pair[n]};" for name, pair in _COLOURS.items()) for n in (0, 1))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        "<meta name=color-scheme content='light dark'><meta http-equiv=Content-Security-Policy"
        " content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{html.escape(title)}</title><style>:root {{ {day} }}"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {night} }} }}{_STYLE}</style>"
        f"<h1 class={'good' if is_good else 'bad'}>{html.escape(verdict)}</h1>{body}</html>\n"
    )


def section(title: str, body: str, note: str = "") -> str:
    """A heading, a note as text, and what is HTML already; nothing without a body."""
    return f"<h2>{html.escape(title)}</h2>{_note(note)}{body}" if body else ""


def _note(text: str) -> str:
    return f"<p class=note>{html.escape(text)}</p>" if text else ""


def folded(title: str, body: str) -> str:
    """What is HTML already, behind a title that opens it."""
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def preformatted(text: str) -> str:
    """Text as it stands."""
    return f"<pre>{html.escape(text)}</pre>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], words: Container[int] = (0,)) -> str:
    """Text cells; the columns of these numbers are aligned to the left, the others to the right, as numbers are."""

    def row_of(tag: str, cells: Sequence[str]) -> str:
        kinds = (" class=words" if number in words else "" for number in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{kind}>{html.escape(cell)}" for kind, cell in zip(kinds, cells, strict=True))

    lines = [row_of("td", row) for row in rows]
    first = row_of("th", head) if any(head) else ""
    return f"<div class=scroll><table>{first}{''.join(lines)}</table></div>" if lines else ""


def drawing(draw: Callable[[Any], None], title: str, is_wide: bool = False) -> str:
    """What `draw` puts into matplotlib axes, as SVG in the page's colours, over the width of the page or of half."""
    import matplotlib
    from matplotlib.figure import Figure

    stand_ins = {name: f"#0{number:x}0{number:x}f{number:x}" for number, name in enumerate(_COLOURS)}
    with matplotlib.rc_context(_settings(stand_ins)):
        figure = Figure(figsize=(10.4, 3.4) if is_wide else (5.1, 2.3), layout="constrained")
        figure.patch.set_visible(False)
        axis = figure.subplots()
        draw(axis)
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    svg = re.sub(r'<g id="[^"]*"', "<g", svg[svg.index("<svg") :])  # each drawing of the page has a figure_1
    for name, colour in stand_ins.items():
        svg = svg.replace(colour, f"var(--{name})")
    kind = " class='wide scroll'" if is_wide else ""
    return f"<figure{kind}><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


def _settings(colours: dict[str, str]) -> Any:
    from matplotlib.rcsetup import cycler

    series = [colour for name, colour in colours.items() if name.startswith("series")]
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": "",
        "text.parse_math": False,
        "font.size": 8.5,
        "text.color": colours["ink"],
        "axes.labelcolor": colours["faint"],
        "xtick.color": colours["faint"],
        "ytick.color": colours["faint"],
        "axes.edgecolor": colours["line"],
        "axes.facecolor": "none",
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.color": colours["line"],
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.linewidth": 1.2,
        "axes.prop_cycle": cycler("color", series),
    }
