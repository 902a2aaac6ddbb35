"""The MLflow run of one flow run: opened before anything is computed, ended however that ends."""

import getpass
import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

from mka.errors import RegistryError
from mka.outside.printable import describe_error, make_printable
from mka.recipe import Recipe
from tasks.machine.servers import Server
from tasks.machine.workplace import Workplace
from tasks.provenance import read_code_commit
from tasks.registry.tracking import EXPERIMENT, connect_registry, registry_address

# Tags of a run: the registered model it is to make a version of, its key, whose process it is, and its flow run.
REGISTERS, KEY, PROCESS, FLOW_RUN = "mka.registers", "mka.key", "mka.process", "mka.flow_run"
# Tag of a run that was removed again: the run that holds the same already.
SAME_AS = "mka.same_as"
NOTE = "mlflow.note.content"
# Which of MLflow's two faces its pages show: the other one, of traces and agents, is the default.
KIND = {"mlflow.experimentKind": "custom_model_development"}
ABOUT = (
    "Recompressions, a run each: settings and figures of base, control (the same rounding, all layers kept) and "
    "candidate, its tables, report, plan and data checks; `gate/…` is what the gate judged. What it did not refuse is "
    "a version of the registered model that tag `mka.registers` names."
)
# What a machine does is sampled so often, and the mean of so many samples is kept.
SAMPLE_SECONDS, SAMPLES = 10, 3


@contextmanager
def keep_mlflow_run(place: Workplace, recipe: Recipe, name: str, command: str, flow_run: str) -> Iterator[str]:
    """Open a run in the registry that lasts until `register` has filled it; yields its id.

    Whatever ends a recompression before that is written on it: FAILED with the line that says why, KILLED if somebody
    ended it. What could write nothing any more, because its process was killed, the next one of the same model ends.

    Args:
        place: where the project keeps its things.
        recipe: says which store, and what the run is to register.
        name: of the run.
        command: does the same again.
        flow_run: id of the flow run.

    Raises:
        RegistryError: if the registry cannot be reached.
    """
    uri = registry_address(place, recipe)
    with connect_registry(uri) as client:
        _end_killed(client, recipe.registered_name)
        tags = _describe_start(place, recipe, command, flow_run)
        experiment = _open_experiment(client, place, uri)
        opened = client.create_run(experiment, tags=tags, run_name=name).info.run_id
    try:
        with _watch_machine(uri, opened):
            yield opened
    except BaseException as error:
        with suppress(RegistryError):  # it is what ended the flow, perhaps, and the flow says so
            _end_run(uri, opened, command, error)
        raise


@contextmanager
def fill_run(opened: str, key: str) -> Iterator[None]:
    """Make an open run the one that MLflow's own functions write to; it is finished at the end, or failed."""
    import mlflow

    # MLflow compares a run with the experiment it was set to last, perhaps in another store.
    mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run(run_id=opened, tags={KEY: key}, log_system_metrics=False):
        yield


def drop_run(client: Any, opened: str, same_as: str) -> None:
    """Take an open run out of the list: another run holds the same, and this one found nothing new."""
    if opened == same_as:  # its own registration, tried again
        return
    client.set_tag(opened, SAME_AS, same_as)
    client.set_tag(opened, NOTE, f"Nothing new: run {same_as} holds the same.")
    client.set_terminated(opened, "FINISHED")
    client.delete_run(opened)


def _open_experiment(client: Any, place: Workplace, uri: str) -> str:
    """Return the experiment's id; it is made where it is missing, and told what it is for."""
    from mlflow.exceptions import MlflowException

    about = KIND | {NOTE: ABOUT}
    if (found := client.get_experiment_by_name(EXPERIMENT)) is None:
        kept = place.model_artifacts if uri == place.tracking_uri else None
        try:
            return str(client.create_experiment(EXPERIMENT, kept, tags=about))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another model's first run was faster
                raise
        found = client.get_experiment_by_name(EXPERIMENT)
    for tag, value in about.items():
        if tag not in found.tags:  # what a person wrote there stays
            client.set_experiment_tag(found.experiment_id, tag, value)
    return str(found.experiment_id)


def describe_source(place: Workplace, command: str) -> dict[str, str]:
    """Return what MLflow's pages call the source, of a run or of a model: the command, and the code's commit."""
    commit, _, changed = read_code_commit(place.root).partition("+")
    return {
        "mlflow.user": getpass.getuser(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": make_printable(command),
        "mlflow.source.git.commit": commit,
        "mlflow.source.git.dirty": str(bool(changed)),
    }


def _describe_start(place: Workplace, recipe: Recipe, command: str, flow_run: str) -> dict[str, str]:
    process = _identify_process()
    return {
        REGISTERS: recipe.registered_name,
        PROCESS: f"{process.pid} {process.created} {socket.gethostname()}",
        FLOW_RUN: flow_run,
        NOTE: make_printable(f"Has begun, and registered nothing yet: `{command}`"),
        **describe_source(place, command),
        "recipe": recipe.name,
        "base_model": recipe.model.label,
        "method": recipe.method.name,
    }


def _identify_process() -> Server:
    import psutil

    return Server("run", os.getpid(), psutil.Process().create_time(), "", "")


@contextmanager
def _watch_machine(uri: str, opened: str) -> Iterator[None]:
    """Write what the machine does (`system/…`) into a run, by MLflow's own monitor, until the run ends."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    # What it cannot write any more, because the run was dropped or the server is gone, is no news here.
    logging.getLogger("mlflow.system_metrics").setLevel(logging.CRITICAL)
    with connect_registry(uri):
        monitor = SystemMetricsMonitor(opened, SAMPLE_SECONDS, SAMPLES, tracking_uri=uri)
    monitor.start()
    try:
        yield
    finally:
        monitor.finish()


def _end_run(uri: str, opened: str, command: str, error: BaseException) -> None:
    with connect_registry(uri) as client:
        if client.get_run(opened).info.status == "FINISHED":
            return
        killed = not isinstance(error, Exception)
        why = "interrupted" if killed else describe_error(error)
        client.set_tag(opened, NOTE, f"Nothing was registered: {why}\n\nAgain: `{make_printable(command)}`")
        client.set_terminated(opened, "KILLED" if killed else "FAILED")


def _end_killed(client: Any, name: str) -> None:
    """End the runs of a registered model whose processes were killed before they could."""
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return
    running = f"tags.`{REGISTERS}` = '{name}' and attributes.status = 'RUNNING'"
    for left in client.search_runs([experiment.experiment_id], running):
        if _is_gone(left.data.tags):
            client.set_tag(left.info.run_id, NOTE, "Nothing was registered: its process was killed.")
            client.set_terminated(left.info.run_id, "KILLED")


def _is_gone(tags: Mapping[str, str]) -> bool:
    """Whether nobody fills a run any more: its process is gone, or its flow run has ended where it was on a server."""
    pid, _, rest = tags.get(PROCESS, "").partition(" ")
    created, _, host = rest.partition(" ")
    if host == socket.gethostname():
        return Server("run", int(pid), float(created), "", "").find() is None
    return not host or _has_ended(tags.get(FLOW_RUN, ""))


def _has_ended(flow_run: str) -> bool:
    """Whether the Prefect server knows that a flow run has ended; of another server's it knows nothing."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(flow_run)).state
    except (ObjectNotFound, ValueError):
        return False
    return state is not None and state.is_final()
