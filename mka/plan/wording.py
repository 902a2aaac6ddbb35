"""A plan in words, for terminals, pages and cards."""

from mka.plan.plan import MergedLayer, MergePlan, Step


def name_layers(layers: tuple[int, ...]) -> str:
    """Name source layers, e.g. "layers 3+4"."""
    return f"layer{'s' if len(layers) > 1 else ''} {'+'.join(map(str, layers))}"


def describe_layer(output: int, layer: MergedLayer) -> str:
    """Say in words what one merged output layer is made of."""
    if layer.verb == "take":
        parts = list(_describe_halves(layer))
    else:
        parts = [f"{weight:.3g} × source layer {source}" for source, weight in zip(layer.sources, layer.weights)]
    return f"output layer {output} = {' + '.join(parts)}"


def describe_steps(plan: MergePlan) -> list[str]:
    """Say in words what was decided, in order."""
    made = {source: layer for layer in plan.layers for source in layer.sources}
    # Methods that try merges say what they chose by in their settings; a search compares nothing else.
    tried = plan.settings.get("selection") in ("divergence", "both")
    measure = "divergence" if tried or plan.search else "similarity"

    def say(step: Step) -> str:
        if not step.right:
            return f"{name_layers(step.left)} deleted (score {step.score:.4g})"
        layer = made[step.left[0]]
        score = (
            f"{measure} {step.score:.4g} nats per token" if measure == "divergence" else f"{measure} {step.score:.3f}"
        )
        how = f"weights {step.weight:.3g} and {1 - step.weight:.3g}"
        if layer.verb == "take":
            how = ", ".join(_describe_halves(layer))
        elif layer.sources == step.left + step.right and len(step.right) > 1 and len(set(layer.weights)) == 1:
            how = f"the mean of {len(layer.sources)} layers"
        return f"{name_layers(step.left)} and {name_layers(step.right)} became one ({score}; {how})"

    return [say(step) for step in plan.steps]


def label_sources(layer: MergedLayer) -> list[tuple[int, float, str]]:
    """Return (source, share, label) of every source layer that something is left of.

    The share of a sum is its weight, the label that weight. Of a layer of halves the share is one half per sublayer,
    split where several layers compete for it; the label is A for attention, M for the MLP.
    """
    if layer.verb == "combine":
        parts = [(s, w, f"{w:.2f}".replace("0.", ".", 1)) for s, w in zip(layer.sources, layer.weights)]
        return [part for part in parts if part[1] != 0.0]
    labels = []
    for source in layer.used:
        halves = [
            (name, len(chosen)) for name, chosen in (("A", layer.attention), ("M", layer.mlp)) if source in chosen
        ]
        labels.append((source, sum(0.5 / count for _, count in halves), "".join(name for name, _ in halves)))
    return labels


def _describe_halves(layer: MergedLayer) -> tuple[str, str]:
    def say(what: str, units: str, chosen: tuple[int, ...]) -> str:
        if len(chosen) == 1:
            return f"{what} of source layer {chosen[0]}"
        return f"the {units} that matter most of source layers {', '.join(map(str, chosen))}"

    return say("attention", "heads", layer.attention), say("MLP", "neurons", layer.mlp)
