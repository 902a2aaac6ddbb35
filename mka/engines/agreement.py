"""Whether an engine says what transformers says, and whether a difference is a near-tie or a fault."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mka.engines.exchange import Continuation
from mka.engines.reference import END, Reference


@dataclass(frozen=True)
class Difference:
    """The first token that is another one.

    Attributes:
        prompt: number of the prompt, from 1.
        token: number of the token behind it, from 1.
        engine: the engine's choice, an id, or `END` where it ended the text.
        transformers: transformers' choice.
        engine_logprob: natural log-probability of its choice, by the engine; None if it gave none.
        transformers_logprob: of its choice, by transformers.
        gap: by how many nats transformers finds its own choice more likely than the engine's; at least that, where the
            engine's is none of the most likely that were kept.
        near_tie: that the gap is within the tolerance, so that rounding may have decided.
    """

    prompt: int
    token: int
    engine: int
    transformers: int
    engine_logprob: float | None
    transformers_logprob: float
    gap: float
    near_tie: bool


@dataclass(frozen=True)
class Agreement:
    """What an engine's continuations have in common with transformers'.

    Attributes:
        tokens: tokens compared, each prompt's up to the first difference and that one.
        agreed: of these, those that are the same.
        prompts: prompts compared.
        same: prompts without a difference.
        largest_error: most that a token's log-probability differs, in nats, over the tokens that are the same.
        tolerance: nats within which a difference is rounding.
        differences: the first of each prompt that has one.
        faults: what is wrong, a line each; none if all differences are near-ties.
    """

    tokens: int
    agreed: int
    prompts: int
    same: int
    largest_error: float
    tolerance: float
    differences: tuple[Difference, ...]
    faults: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def compare(
    references: Sequence[Reference], continuations: Sequence[Continuation], tolerance: float, new_tokens: int
) -> Agreement:
    """Compare an engine's greedy continuations with transformers'.

    Up to the first difference both have read the same, so that their log-probabilities there are of the same text.
    Behind it they are not, and nothing more of that prompt is compared.

    Args:
        references: by transformers.
        continuations: by the engine, of the same prompts.
        tolerance: nats that rounding may make of a log-probability.
        new_tokens: tokens that were asked for; an engine that ends a text earlier says so.
    """
    differences, faults, same, agreed, errors = [], [], 0, 0, [0.0]
    if len(continuations) != len(references):
        faults.append(f"it continued {len(continuations)} of {len(references)} prompts")
    for number, (reference, found) in enumerate(zip(references, continuations), 1):
        tokens = (*found.tokens, END) if found.ended else found.tokens
        logprobs = (*found.logprobs, *[None] * (len(tokens) - len(found.logprobs)))
        if len(tokens) < new_tokens and not found.ended:
            faults.append(f"prompt {number}: it stopped after {len(tokens)} of {new_tokens} tokens without an end")
        first = next((at for at, pair in enumerate(zip(reference.tokens, tokens)) if pair[0] != pair[1]), None)
        alike = first if first is not None else min(len(tokens), len(reference.tokens))
        agreed += alike
        same += first is None
        for at in range(alike):
            if (given := logprobs[at]) is not None:
                errors.append(abs(given - reference.steps[at][tokens[at]]))
            elif tokens[at] != END:
                faults.append(f"prompt {number}: token {at + 1} has no finite log-probability")
        if first is not None:
            differences.append(_tell(number, first, reference, tokens[first], logprobs[first], tolerance))
    for difference in differences:
        if not difference.near_tie:
            faults.append(
                f"prompt {difference.prompt}: token {difference.token} is another one, and no near-tie: transformers "
                f"finds its own {difference.gap:.2f} nats more likely, and {tolerance:g} are rounding"
            )
    if max(errors) > tolerance:
        faults.append(f"log-probabilities differ by up to {max(errors):.2f} nats, and {tolerance:g} are rounding")
    compared = agreed + len(differences)
    return Agreement(compared, agreed, len(references), same, max(errors), tolerance, tuple(differences), tuple(faults))


def _tell(
    number: int, at: int, reference: Reference, token: int, logprob: float | None, tolerance: float
) -> Difference:
    step, ours = reference.steps[at], reference.tokens[at]
    gap = step[ours] - step.get(token, min(step.values()))
    near = token in step and gap <= tolerance
    return Difference(number, at + 1, token, ours, logprob, step[ours], gap, near)
