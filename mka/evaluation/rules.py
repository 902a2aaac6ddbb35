"""The gate's rules, held against the table of metrics: which there are, and what they may be about."""

from collections.abc import Sequence

from mka.errors import RecipeError, nearest
from mka.evaluation.metrics import FACTS, METRICS, find_subject
from mka.evaluation.served import ENGINE_FACTS
from mka.recipe import EvaluationSettings, GateRule, GateSettings

# What a recipe's `evaluation` measures on, by what a metric is measured on; and all that makes it measure anything.
ASKED_BY = {"texts": "text", "tasks": "tasks"}
MEASURED_BY = (*ASKED_BY.values(), "generation")


def list_rules(settings: GateSettings) -> tuple[GateRule, ...]:
    """Return the gate's rules: those given, else a least recovery of every metric that has a setting for it."""
    if settings.rules:
        return settings.rules
    wanted = {row.subject: getattr(settings, row.required) for row in METRICS.values() if row.required}
    return tuple(GateRule(metric=subject, recovery=recovery) for subject, recovery in wanted.items())


def rules_against_champion(settings: GateSettings) -> GateSettings:
    """Return the gate a candidate has to pass with the champion in the base's place: the same recoveries are asked."""
    asked = [rule.metric for rule in settings.rules if rule.bound == "recovery"]
    if not asked:
        keys = {row.required for row in METRICS.values() if row.required}
        return GateSettings(**dict.fromkeys(keys, settings.champion_recovery))
    return GateSettings(rules=tuple(GateRule(metric=m, recovery=settings.champion_recovery) for m in asked))


def asks_speed(settings: GateSettings) -> bool:
    """Whether a rule is about speed, which is measured apart."""
    return any(rule.metric in FACTS and FACTS[rule.metric].part == "speed" for rule in settings.rules)


def asks_control(settings: GateSettings) -> bool:
    """Whether a rule is about the control, which is measured beside base and candidate."""
    return any(rule.better_than is not None for rule in settings.rules)


def asks_engines(settings: GateSettings) -> bool:
    """Whether a rule is about an engine, which is asked apart."""
    return any(rule.metric in ENGINE_FACTS for rule in settings.rules)


def check_rules(
    gate: GateSettings,
    evaluation: EvaluationSettings | None = None,
    where: str = "recipe",
    engines: Sequence[str] | None = None,
) -> None:
    """Refuse rules about what there is not.

    Args:
        gate: the rules.
        evaluation: what is measured; None: that is not known.
        where: how messages name their origin.
        engines: engines that are asked; None: that is not known.

    Raises:
        RecipeError: on an unknown metric, a recovery of what has none, a metric that evaluation does not ask for, or
            an engine that nobody asks.
    """
    for index, rule in enumerate(gate.rules):
        at, row = f"{where}: 'gate.rules.{index}'", find_subject(rule.metric)
        if row is None and rule.metric not in (*FACTS, *ENGINE_FACTS):
            allowed = [*dict.fromkeys(row.subject for row in METRICS.values()), *FACTS, *ENGINE_FACTS]
            raise RecipeError(
                f"{at}: unknown metric {rule.metric!r}{nearest(rule.metric, allowed)}; allowed: {', '.join(allowed)}"
            )
        if (rule.metric in ENGINE_FACTS) != (rule.engine is not None):
            wants = (
                "needs the engine it is about" if rule.engine is None else f"is about no engine, got {rule.engine!r}"
            )
            raise RecipeError(f"{at}: {rule.metric} {wants}; metrics of an engine: {', '.join(ENGINE_FACTS)}")
        if rule.metric in ENGINE_FACTS:
            _check_engine_rule(rule, at, engines)
            continue
        if rule.bound == "must":
            raise RecipeError(f"{at}: {rule.metric} cannot load; `must` is of the metric engine")
        if rule.bound == "recovery" and not (row and row.of_base):
            raise RecipeError(f"{at}: {rule.metric} has no recovery; bound it by most, least or better_than")
        if row and evaluation is not None and not getattr(evaluation, asks := row.asked or ASKED_BY[row.on]):
            raise RecipeError(f"{at}: {rule.metric} is not measured; ask for it by evaluation.{asks}")
    if gate.rules and evaluation is not None and not any(getattr(evaluation, name) for name in MEASURED_BY):
        raise RecipeError(
            f"{where}: 'gate.rules' judge nothing where nothing is measured; ask for something by "
            f"{', '.join(f'evaluation.{name}' for name in MEASURED_BY)}, or take the rules out"
        )


def _check_engine_rule(rule: GateRule, at: str, engines: Sequence[str] | None) -> None:
    bounds = ENGINE_FACTS[rule.metric].bounds
    if rule.bound not in bounds:
        allowed = " or ".join(bounds)
        raise RecipeError(f"{at}: {rule.metric} is bounded by {allowed}, got {rule.bound}")
    if engines is not None and rule.engine not in engines:
        listed = ", ".join(engines) or "none"
        raise RecipeError(f"{at}: {rule.engine} is not asked; list it under `engines`, which has {listed}")
