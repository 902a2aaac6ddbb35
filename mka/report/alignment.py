"""An alignment for people: what it was fitted on, what it cost, and the error every output layer is left with."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mka.report.style import BLUE, render_figure, write_heading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mka.report.style import Format


def describe_alignment(facts: Mapping[str, Any]) -> dict[str, str]:
    """Say what a fit was made on and what it took, label -> value."""
    windows = facts["windows"]
    probes = facts["probes"]
    penalty = f"{facts['penalty']:g}, as given"
    if probes:
        tried = ", ".join(f"{name}: {value:.4g}" for name, value in probes["divergence"].items())
        penalty = (
            f"{facts['penalty']:g}, of {{{tried}}} nats per token on {probes['heldout']:,} tokens of "
            f"{probes['source']}, which those fits on {probes['tokens']:,} tokens had not seen"
        )
    ratio = facts["seconds"] / facts["teacher_seconds"] if facts["teacher_seconds"] else float("nan")
    return {
        "tokens": f"{facts['tokens']:,} in windows of {facts['context']}",
        "random tokens said twice (windows)": str(facts["copies"]),
        "sources (windows)": ", ".join(f"{source} {count}" for source, count in windows.items()),
        "penalty": penalty,
        "time": f"{facts['seconds']:.1f} s, {ratio:.2f} times the base's own pass over these tokens "
        f"({facts['teacher_seconds']:.1f} s)"
        + (f"; choosing the penalty {facts['probe_seconds']:.1f} s" if probes else ""),
    }


def summarise_alignment(facts: Mapping[str, Any]) -> str:
    """Say the same in one line for a terminal."""
    return (
        f"aligned on {facts['tokens']:,} tokens of {len(facts['windows'])} sources, penalty {facts['penalty']:g}, "
        f"in {facts['seconds'] + facts['probe_seconds']:.1f} s"
    )


def layer_rows(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """One row per refitted output layer: its relative error, and the units kept of each source where some competed."""
    rows = []
    for position, record in enumerate(facts["layers"]):
        if "error" not in record:
            continue
        kept = [
            f"{'neurons' if name.startswith('mlp') else 'heads'} "
            + ", ".join(f"{count} of layer {source}" for source, count in record[name].items())
            for name in record
            if name.endswith(" units")
        ]
        rows.append({"layer": str(position), "error": f"{record['error']:.2e}", "kept": "; ".join(kept)})
    return rows


def draw_errors(facts: Mapping[str, Any], form: "Format" = "png") -> bytes:
    """Draw the relative squared error that the output of each refitted layer is left with."""
    errors = {i: record["error"] for i, record in enumerate(facts["layers"]) if "error" in record}

    def draw(figure: "Figure") -> None:
        axes = figure.add_axes((0.09, 0.17, 0.89, 0.58))
        axes.plot(list(errors), list(errors.values()), "o-", color=BLUE, markersize=3.5, linewidth=1.2)
        axes.set_ylim(0.0, 1.08 * max([*errors.values(), 1e-9]))
        axes.set_xlim(-0.7, len(facts["layers"]) - 0.3)
        axes.set_xlabel("output layer (0-based); layers before the first change are copies and have no error")
        axes.set_ylabel("relative squared error")
        axes.grid(axis="y", linewidth=0.6, alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
        note = (
            "Hidden state after each output layer against the base's, on the tokens fitted on, weighted as in the fit."
        )
        write_heading(figure, "What the refit leaves", note)

    return render_figure(draw, (8.6, 3.2), form)
