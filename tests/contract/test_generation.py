"""Of every family: prompts of several lengths in one batch are continued as each alone is."""

import pytest
import torch
from support.models import FAMILY_NAMES, make_tiny_model, make_tokenizer

from mka.evaluation.generation import continue_greedily
from mka.evaluation.metrics import Subject
from mka.recipe import EvaluationSettings


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_batch_changes_no_continuation(family):
    model, tokenizer = make_tiny_model(family), make_tokenizer()
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in (9, 3, 24, 5, 17)]
    alone, together = (
        continue_greedily(
            Subject(model, tokenizer, EvaluationSettings(generation=5, batch_size=size), {}, {}, progress=False),
            prompts,
            12,
            "repetition",
            whole=True,
        )
        for size in (1, 5)
    )
    assert alone == together
    ids = torch.tensor([prompts[2]])
    with torch.inference_mode():
        for _ in range(12):
            logits = model(ids, use_cache=False).logits[0, -1]
            logits[2] = -torch.inf  # the end of the text
            ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    assert together[2] == ids[0, -12:].tolist()
