"""What answers the items of tasks: lm-eval's own model classes, which count what they cut and refuse NaN."""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mka.errors import EngineError, NumericsError, RecipeError
from mka.outside.printable import describe_error
from mka.outside.rendering import Renderer, RenderError, TooLongError

if TYPE_CHECKING:
    from mka.recipe import ModelArguments


@dataclass(frozen=True)
class Asked:
    """How a model is asked.

    Attributes:
        chat_template: whether items are turns of a conversation in the model's own template; "auto": if it has one.
        system_instruction: what is said before them.
    """

    chat_template: Literal["off", "auto", "on"] = "off"
    system_instruction: str | None = None


def find_chat_template(tokenizer: Any, asked: str) -> str | None:
    """Return the chat template that items are put in; None if they are asked in plain text.

    Args:
        tokenizer: of the model.
        asked: "off", "auto" or "on".

    Raises:
        RecipeError: if one is asked for and there is none.
    """
    if asked == "off":
        return None
    try:
        return str(tokenizer.get_chat_template())
    except (ValueError, AttributeError):
        if asked == "auto":
            return None
        raise RecipeError("chat_template on: the model's tokenizer has no chat template; set auto or off") from None


def ask_model(lm: Any, asked: Asked, renderer: Renderer) -> dict[str, Any]:
    """Return what lm-eval is told of how a model is asked; a chat template is rendered within the renderer's bounds.

    Raises:
        RecipeError: if a chat template is asked for and there is none.
    """
    template = find_chat_template(getattr(lm, "tokenizer", None), asked.chat_template)
    if template is not None:
        special = dict(lm.tokenizer.special_tokens_map)

        def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            options = {"add_generation_prompt": add_generation_prompt, **special}
            options |= {"continue_final_message": not add_generation_prompt}
            try:
                return renderer.render_chat(template, messages, **options)
            except RenderError as error:
                others = [message for message in messages if message["role"] != "system"]
                # As lm-eval does for templates that take no system message, Gemma's say.
                if error.kind == "TemplateError" and len(others) < len(messages):
                    return renderer.render_chat(template, others, **options)
                raise RecipeError(f"the model's chat template fails on an item: {error}") from None
            except TooLongError as error:
                raise RecipeError(f"the model's chat template {error} and is given up; set chat_template off") from None

        lm.apply_chat_template = render
    return {"apply_chat_template": template is not None, "system_instruction": asked.system_instruction}


def describe_asked(tokenizer: Any, asked: Asked) -> dict[str, Any]:
    """Say how a model is asked, for a report's conditions: the digest of its chat template, or that there is none."""
    template = find_chat_template(tokenizer, asked.chat_template)
    digest = hashlib.sha256(template.encode()).hexdigest() if template is not None else None
    return {"chat_template": digest, "system_instruction": asked.system_instruction}


def wrap_model(model: Any, tokenizer: Any, batch_size: int, max_length: int) -> Any:
    """Return what lm-eval asks: a loaded model in its wrapper, or what `open_model` made as it is."""
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM

    if isinstance(model, LM):
        return model
    return _counting(HFLM)(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length)


def open_model(
    name: Literal["hf", "vllm"], folder: Path, arguments: "ModelArguments", *, dtype: str, batch_size: int, seed: int
) -> Any:
    """Hand a folder to lm-eval's own model class, which loads it as its engine does.

    Args:
        name: lm-eval's, of the class.
        folder: stock model folder.
        arguments: of the class.
        dtype: precision where the arguments name none.
        batch_size: sequences per forward pass.
        seed: of the engine.

    Raises:
        EngineError: if the package is not there, or does not load the folder.
    """
    import lm_eval.models  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import get_model

    options: dict[str, Any] = {"pretrained": str(folder), "dtype": arguments.dtype or dtype, "trust_remote_code": False}
    if name == "vllm":
        given = {"gpu_memory_utilization": arguments.gpu_memory_utilization, "max_model_len": arguments.max_model_len}
        options |= {"batch_size": "auto", "seed": seed, "tensor_parallel_size": arguments.tensor_parallel_size}
        options |= {key: value for key, value in given.items() if value is not None}
    else:
        options |= {"batch_size": batch_size, "parallelize": arguments.tensor_parallel_size > 1}
        options |= {"max_length": arguments.max_model_len} if arguments.max_model_len else {}
    try:
        kind = get_model(name)
    except (ImportError, AttributeError) as error:
        raise EngineError(
            f"evaluation.model {name} needs the package {name}, which cannot be imported here "
            f"({describe_error(error)}); run in an environment with lm-eval[{name}], or set evaluation.model to hf"
        ) from None
    try:
        return _counting(kind)(**options)
    # Engines raise what they like.
    except Exception as error:
        raise EngineError(f"lm-eval's {name} does not load {folder}: {describe_error(error)}") from None


def _counting(kind: type) -> Any:
    class Counting(kind):  # type: ignore[misc, valid-type]
        """One of lm-eval's model classes that also counts cut prompts and refuses what is not a number."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            self.truncated: dict[str, int] = {}

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            for request in requests:
                context, options = request.args
                room = self.max_length - options.get("max_gen_toks", self.max_gen_toks)
                if room <= 0:
                    raise RecipeError(
                        f"task {request.task_name!r}: generation_kwargs.max_gen_toks leaves no room for a question in "
                        f"the {self.max_length} tokens of a prompt and its answer; ask for fewer"
                    )
                if len(self.tok_encode(context)) > room:
                    self._count(request.task_name)
            return super().generate_until(requests, disable_tqdm=disable_tqdm)

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            self.owners = [request.task_name for request in requests]
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

        def _loglikelihood_tokens(self, requests: list[Any], *others: Any, **options: Any) -> list[tuple[float, bool]]:
            for owner, (_, context, continuation) in zip(self.owners, requests, strict=True):
                if len(context) + len(continuation) > self.max_length + 1:
                    self._count(owner)
            scores = super()._loglikelihood_tokens(requests, *others, **options)
            for owner, (value, _) in zip(self.owners, scores, strict=True):
                if not math.isfinite(value):
                    raise NumericsError(f"task {owner!r}: a log-likelihood is {value}; the model's logits overflow")
            return scores

        def _count(self, task: str) -> None:
            self.truncated[task] = self.truncated.get(task, 0) + 1

    return Counting
