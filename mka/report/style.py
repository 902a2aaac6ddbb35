"""What all pictures share: colours, headings, and files that fit a light page and a dark one.

Colours are Okabe and Ito's colour-blind safe set. An SVG names its colours of ink and paper by variables with two
values each, and takes those of the page it is shown on; a PNG has an opaque light background, which reads on both.
"""

import io
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Format = Literal["png", "svg"]

INK, MUTED, FAINT, PAPER = "#1f2328", "#57606a", "#d5d9de", "#ffffff"
BLUE, VERMILION, GREEN, AMBER = "#0072b2", "#d55e00", "#009e73", "#e69f00"
# Of text on a colour that is the same on every page; the last digit keeps them apart from ink and paper.
ON_LIGHT, ON_DARK = "#1f2329", "#fffffe"
# Colour -> the same on a dark page. Paper is there what cards of the page are.
DARK = {
    INK: "#e4e7eb",
    MUTED: "#9aa4af",
    FAINT: "#343c46",
    PAPER: "#1b2027",
    BLUE: "#56b4e9",
    VERMILION: "#f0803c",
    GREEN: "#2fc193",
}
LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8, "borderpad": 0}
STYLE: dict[str, Any] = {"font.size": 8.5, "svg.hashsalt": "mka", "text.parse_math": False}
STYLE |= dict.fromkeys(("text.color", "axes.labelcolor"), INK)
STYLE |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), MUTED)
STYLE |= {"axes.facecolor": PAPER, "grid.color": FAINT}


def write_heading(figure: "Figure", title: str, note: str) -> None:
    """Title and note, left-aligned at the top."""
    height = figure.get_figheight()
    figure.text(0.02, 1 - 0.28 / height, title, fontsize=11, fontweight="bold", va="center")
    figure.text(0.02, 1 - 0.49 / height, note, fontsize=8, color=MUTED, va="center")


def render_figure(draw: Any, size: tuple[float, float], form: Format) -> bytes:
    """Run one drawing function on a fresh figure, outside pyplot, which would keep it alive."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, facecolor=PAPER)
        draw(figure)
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
        figure.savefig(buffer, format=form, dpi=160, metadata=metadata)
    return follow_page(buffer.getvalue()) if form == "svg" else buffer.getvalue()


def follow_page(picture: bytes) -> bytes:
    """Let an SVG take the colours of a dark page where it is shown on one."""
    text = picture.decode("utf-8")
    names = {colour: f"--c{number}" for number, colour in enumerate(DARK)}
    for colour, name in names.items():
        text = text.replace(f": {colour}", f": var({name})")
    light = "".join(f"{name}:{colour};" for colour, name in names.items())
    dark = "".join(f"{name}:{DARK[colour]};" for colour, name in names.items())
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}</style>"
    start = text.index(">", text.index("<svg")) + 1
    return f"{text[:start]}{style}{text[start:]}".encode()
