"""What an engine made of a candidate, for page and card."""

from collections.abc import Mapping
from typing import Any


def describe_served(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the name with its version, one sentence, and rows of quantity, base, candidate and ratio.

    Args:
        name: of the engine.
        found: what `mka.pipeline.serve` keeps of it.
    """
    engine, conditions = found["engine"], found["conditions"]
    told = "it makes of the candidate what transformers makes" if found["loads"] else str(found["reason"])
    lengths = f"prompts of {conditions['prompt_tokens']} tokens, {conditions['new_tokens']} decoded"
    device = engine.get("device") or "no answer"
    return {
        "name": " ".join(filter(None, (name, engine.get("version")))),
        "told": told,
        "conditions": f"{conditions['dtype']}, {device}, {conditions['threads']} threads, {lengths}",
        "rows": found["rows"],
    }
