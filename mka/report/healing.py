"""A healing for people: what it read, what it fell by, why it ended, and what more text would give at a guess."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mka.healing.curve import predict
from mka.report.style import AMBER, BLUE, VERMILION, render_figure, write_heading

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mka.report.style import Format


def describe_healing(facts: Mapping[str, Any]) -> dict[str, str]:
    """Say what was trained on what, and what came of it, label -> value."""
    rows = {
        "how": _describe_mode(facts),
        "tokens": f"{facts['tokens']:,} in windows of {facts['context']}",
        "sources (windows)": ", ".join(f"{source} {count}" for source, count in facts["windows"].items()),
        "measured on": f"{facts['heldout_tokens']:,} tokens of {facts['heldout_source']}, which was not trained on",
        "divergence from the base": f"{_fall(facts)} nats per token",
        "ended": f"{facts['ended']}; {_kept(facts)}",
        "time": f"{facts['seconds']:,.0f} s, {facts['tokens'] / max(facts['seconds'], 1e-9):,.0f} tokens/s",
    }
    if facts.get("tried"):
        rows["rates given up"] = _describe_tried(facts)
    return rows | ({"more tokens": said} if (said := describe_prediction(facts)) else {})


def summarise_healing(facts: Mapping[str, Any]) -> str:
    """Say the same in one line for a terminal."""
    return (
        f"healed on {facts['tokens']:,} tokens, divergence from the base {_fall(facts)} nats per token on "
        f"{facts['heldout_source']}, {facts['ended']}, in {facts['seconds']:,.0f} s"
        + (f"; {_kept(facts)}" if facts["kept"] == "start" else "")
        + (f"; at rate {facts['rate']:g}, after {_describe_tried(facts)}" if facts.get("tried") else "")
    )


def _describe_tried(facts: Mapping[str, Any]) -> str:
    """Say which higher rates were begun with, and what they did."""

    def describe(tried: Mapping[str, Any]) -> str:
        came_to = "not finite" if tried["heldout"] is None else f"{tried['heldout']:.3f}"
        return f"{tried['rate']:g} ({facts['start']:.3f} → {came_to} in {tried['tokens']:,} tokens)"

    return ", ".join(map(describe, facts["tried"]))


def _kept(facts: Mapping[str, Any]) -> str:
    if facts["kept"] != "start":
        return "the best weights kept"
    # Steps that are too large look like text that teaches nothing.
    rate = f"; try a heal.rate below {facts['rate']:g}" if facts.get("rate") else ""
    return f"the start kept: nothing after it was nearer to the base{rate}"


def describe_prediction(facts: Mapping[str, Any]) -> str:
    """Say what more tokens would give; empty if the curve does not tell."""
    found = predict(facts.get("curve", ()))
    guesses = " and ".join(f"{value:.3f} at {int(tokens):,}" for tokens, value in found.items())
    return f"a guess by a power law through this run's points: {guesses} tokens" if found else ""


def draw_curve(facts: Mapping[str, Any], form: "Format" = "png") -> bytes:
    """Draw the divergence from the base against the tokens read: of training text, of held-out text, and the guess."""
    curve = facts["curve"]
    trained = [(point["tokens"], point["loss"]) for point in curve if "loss" in point]
    measured = [(point["tokens"], point["heldout"]) for point in curve if "heldout" in point]
    guesses = [(int(tokens), value) for tokens, value in predict(curve).items()][:1]

    def draw(figure: "Figure") -> None:
        axes = figure.add_axes((0.09, 0.17, 0.89, 0.58))
        axes.plot(*zip(*trained), color=AMBER, linewidth=1.0, label="text trained on, per step")
        axes.plot(*zip(*measured), "o-", color=BLUE, markersize=4, linewidth=1.4, label=facts["heldout_source"])
        for tokens, value in guesses:
            last = measured[-1]
            axes.plot(*zip(last, (tokens, value)), "x:", color=VERMILION, linewidth=1.2, label="a guess, not measured")
        axes.set_ylim(0.0, 1.08 * max(value for _, value in measured + trained))
        axes.set_xlim(left=0)
        axes.set_xlabel("tokens read")
        axes.set_ylabel("KL(base || model), nats per token")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(axis="y", linewidth=0.6, alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
        write_heading(
            figure, "What healing gave", "Divergence from the base; the held-out source was never trained on."
        )

    return render_figure(draw, (8.6, 3.2), form)


def _describe_mode(facts: Mapping[str, Any]) -> str:
    if facts["mode"] == "local":
        return "local: each layer follows the base's hidden states"
    first = facts["first_layer"]
    trained = {"all": "all layers", "changed": f"layers from {first} on", "lora": f"low-rank additions from {first} on"}
    what = trained.get(facts["train"], f"head and last layers, from {first} on")
    return f"distil: {what}, follow the base's logits, peak rate {facts['rate']:g}"


def _fall(facts: Mapping[str, Any]) -> str:
    return f"{facts['start']:.3f} → {facts['best']:.3f}"
