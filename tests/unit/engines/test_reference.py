"""Transformers' own greedy tokens, held against its `generate`."""

import pytest
import torch
from support.models import make_tiny_model, save_model

from mka.engines.reference import END, KEPT, continue_greedily

PROMPTS = [[5, 6, 7, 8], [9], [40, 41, 42]]


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_tokens_are_those_of_generate(family, tmp_path):
    model = make_tiny_model(family)
    folder = save_model(model, tmp_path / family)
    found, ends = continue_greedily(folder, PROMPTS, new_tokens=12, dtype="float32")
    assert ends == (2,)
    for prompt, reference in zip(PROMPTS, found):
        ids = torch.tensor([prompt])
        written = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        expected = [END if token == 2 else token for token in written[0, len(prompt) :].tolist()]
        assert list(reference.tokens) == expected
        likely = model(ids).logits[0, -1].log_softmax(-1)
        step = reference.steps[0]
        assert len(step) == min(KEPT, 97)
        for token, value in step.items():
            assert value == pytest.approx(likely[2 if token == END else token].item(), abs=1e-4)


def test_any_of_several_ends_is_the_end(tmp_path):
    model = make_tiny_model("llama")
    first = int(model(torch.tensor([PROMPTS[0]])).logits[0, -1].argmax())
    model.generation_config.eos_token_id = [2, first]
    folder = save_model(model, tmp_path / "ends")
    (found,), ends = continue_greedily(folder, PROMPTS[:1], new_tokens=12, dtype="float32")
    assert ends == (2, first) and found.tokens == (END,)
    assert first not in found.steps[0] and 2 not in found.steps[0]
