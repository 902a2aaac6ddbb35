"""A model tried by hand: prompts answered one after another, by its chat template or as plain text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mka.errors import CheckpointError, RecipeError
from mka.evaluation.speed import greedy_options


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn.

    Attributes:
        new_tokens: most tokens of an answer.
        temperature: 0 takes the most likely token each time.
        seed: every answer is drawn anew of it, so that the same prompt after the same conversation gives the same.
    """

    new_tokens: int = 256
    temperature: float = 0.7
    seed: int = 0


@dataclass
class Chat:
    """A conversation with a loaded model.

    Attributes:
        model: of `mka.model.loading.load_model`.
        tokenizer: its tokenizer.
        decoding: how answers are drawn.
        turns: what was said so far, oldest first; stays empty without a chat template.
    """

    model: Any
    tokenizer: Any
    decoding: Decoding
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def has_template(self) -> bool:
        """Whether the model was taught to answer; else prompts are continued as plain text, each on its own."""
        return bool(self.tokenizer.chat_template)

    def answer(self, prompt: str, show: Callable[[str], Any]) -> tuple[str, int]:
        """Answer a prompt; where the conversation is longer than the model reads, its oldest turns are left out.

        Args:
            prompt: what is said.
            show: called with each piece of text as it comes.

        Returns:
            The answer, and its tokens.

        Raises:
            RecipeError: if the prompt alone leaves no room for an answer.
            CheckpointError: if the chat template fails.
        """
        import torch

        said = {"role": "user", "content": prompt}
        inputs = self._encode([*self.turns, said])
        positions = getattr(self.model.config, "max_position_embeddings", None) or 1 << 30
        while (length := inputs["input_ids"].shape[1]) + min(self.decoding.new_tokens, positions // 2) > positions:
            if not self.turns:
                break
            del self.turns[:2]
            inputs = self._encode([*self.turns, said])
        if length >= positions:
            raise RecipeError(f"the prompt is {length:,} tokens, the model has {positions:,} positions; say less")
        options = greedy_options(self.model, min(self.decoding.new_tokens, positions - length))
        if self.decoding.temperature > 0:
            options |= {"do_sample": True, "temperature": self.decoding.temperature}
        torch.manual_seed(self.decoding.seed)
        with torch.inference_mode():
            output = self.model.generate(**inputs, **options, streamer=make_streamer(self.tokenizer, show))
        made = output[0, length:]
        text = self.tokenizer.decode(made, skip_special_tokens=True)
        if self.has_template:
            self.turns += [said, {"role": "assistant", "content": text}]
        return text, len(made)

    def _encode(self, turns: list[dict[str, str]]) -> Mapping[str, Any]:
        """Return what the model reads: ids and mask, (1, T) each."""
        if not self.has_template:
            inputs = self.tokenizer(turns[-1]["content"], return_tensors="pt", verbose=False)
            if not inputs["input_ids"].numel():
                raise RecipeError("the prompt has no tokens; say something")
        else:
            try:
                inputs = self.tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
            except Exception as error:  # whatever a template's author raises
                raise CheckpointError(f"the model's chat template fails: {error}") from None
        return {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}


def make_streamer(tokenizer: Any, show: Callable[[str], Any]) -> Any:
    """Return what transformers hands tokens to as they come: whole words are shown."""
    from transformers import TextStreamer

    class Shown(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(text)

    return Shown(tokenizer, skip_prompt=True, skip_special_tokens=True)
