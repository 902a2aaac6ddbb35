"""What a shell offers to complete, and `mka completion`, which teaches it to a shell."""

import contextlib
from collections.abc import Callable, Iterable

import click
from click.shell_completion import CompletionItem, get_completion_class

from mka.cli.console import examples, reports
from mka.errors import MkaError
from mka.terminal import Outcome

Complete = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
SHELLS = ("bash", "zsh", "fish")


def complete_methods(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the methods, with what each does."""
    from mka.methods import get_method, method_names

    names = [name for name in method_names() if name.startswith(incomplete)]
    return [CompletionItem(name, help=get_method(name).summary) for name in names]


def complete_settings(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the settings of the method that was named, with what each is."""
    from mka.methods import get_method
    from mka.recipe import MethodChoice

    with contextlib.suppress(MkaError):
        fields = get_method(context.params.get("method__name") or MethodChoice().name).settings.model_fields
        found = [(f"{name}=", field.description) for name, field in fields.items()]
        return [CompletionItem(name, help=said) for name, said in found if name.startswith(incomplete)]
    return []


def complete_tasks(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the benchmarks, behind a comma as well; those of one's own, where the folder of tables defines some."""
    from mka.evaluation.definitions import read_definitions
    from mka.evaluation.task_tables import MMLU, TASKS
    from mka.recipe import EvaluationSettings

    folder = context.params.get("evaluation__tasks_folder") or EvaluationSettings().tasks_folder
    own: Iterable[str] = ()
    with contextlib.suppress(MkaError):
        own = read_definitions(folder)
    before, comma, begun = incomplete.rpartition(",")
    return [CompletionItem(f"{before}{comma}{name}") for name in [*TASKS, MMLU, *own] if name.startswith(begun)]


def complete_models(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer folders."""
    return [CompletionItem(incomplete, type="dir")]


def complete_forms(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the forms of an export."""
    from mka.export import export_names

    return _offer(export_names(), incomplete)


def complete_types(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the types of weights of the form that was named; of all forms where it has none."""
    from mka.export import type_names

    return _offer(type_names(context.params.get("form")), incomplete)


def complete_engines(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Offer the engines."""
    from mka.engines import ENGINES

    return _offer(ENGINES, incomplete)


def _offer(names: Iterable[str], incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


# What is offered for keys of the recipe; where it is a choice, click offers that.
OF_KEYS: dict[str, Complete] = {
    "method.name": complete_methods,
    "method.settings": complete_settings,
    "evaluation.tasks": complete_tasks,
}


@click.command(
    epilog=examples(
        'eval "$(mka completion bash)"     # in ~/.bashrc',
        'eval "$(mka completion zsh)"      # in ~/.zshrc, behind compinit',
        "mka completion fish > ~/.config/fish/completions/mka.fish",
    )
)
@click.argument("shell", type=click.Choice(SHELLS))
@reports
def completion(shell: str) -> Outcome:
    """Print what makes SHELL complete mka: commands, options, methods, settings, tasks, recipes and types."""
    root = click.get_current_context().find_root()
    found = get_completion_class(shell)
    assert found is not None
    script = found(root.command, {}, "mka", "_MKA_COMPLETE").source()
    return Outcome({"shell": shell, "script": script}, script.strip("\n"))
