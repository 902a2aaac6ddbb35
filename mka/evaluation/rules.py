"""The gate's rules, held against the table of metrics: which there are, and what they may be about."""

from mka.errors import RecipeError, nearest
from mka.evaluation.metrics import FACTS, METRICS, find_subject
from mka.recipe import GateRule, GateSettings, Measurement


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


def check_rules(gate: GateSettings, evaluation: Measurement | None = None, where: str = "recipe") -> None:
    """Refuse rules about what there is not.

    Raises:
        RecipeError: on an unknown metric, a recovery of what has none, or a metric that evaluation does not ask for.
    """
    for index, rule in enumerate(gate.rules):
        at, row = f"{where}: 'gate.rules.{index}'", find_subject(rule.metric)
        if row is None and rule.metric not in FACTS:
            allowed = [*dict.fromkeys(row.subject for row in METRICS.values()), *FACTS]
            raise RecipeError(
                f"{at}: unknown metric {rule.metric!r}{nearest(rule.metric, allowed)}; allowed: {', '.join(allowed)}"
            )
        if rule.bound == "recovery" and not (row and row.of_base):
            raise RecipeError(f"{at}: {rule.metric} has no recovery; bound it by most, least or better_than")
        if row and row.asked and evaluation is not None and not getattr(evaluation, row.asked):
            raise RecipeError(f"{at}: {rule.metric} is not measured; ask for it by evaluation.{row.asked}")
