"""Where cells run: threads of the flow's process, worker processes on this machine, or workers of a Dask scheduler."""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mka.bench.recipe import BenchRecipe, Cell, FanOut
from mka.errors import RecipeError, ServerError, require_extra
from tasks.machine.slots import is_on_server

if TYPE_CHECKING:
    from mka.bench.parts import Bench, Measured
    from mka.bench.results import Failed


THREAD_LIMITS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
CONNECT_SECONDS = 10


def choose_fan_out(written: FanOut, workers: int | None) -> FanOut:
    """Return what the recipe says, with the number of workers that was asked for instead of its own.

    Raises:
        RecipeError: if the recipe names a scheduler, which has its own workers.
        ExtraError: if the extra of its engine is not installed.
        ServerError: if that scheduler does not answer, or its workers could not reach a Prefect server.
    """
    if written.engine == "dask":
        require_extra("dask", "fan_out.engine 'dask'")
    if written.address is None:
        return written if workers is None else written.model_copy(update={"workers": workers})
    if workers is not None:
        raise RecipeError(
            f"--workers {workers}: the recipe's fan_out.address is {written.address}, which has its own workers; leave "
            f"one of the two out"
        )
    _require_scheduler(written.address)
    return written


def _require_scheduler(address: str) -> None:
    from distributed import Client

    if not is_on_server():
        raise ServerError(
            f"fan_out.address is {address} and no Prefect server is named, but workers cannot reach the temporary one "
            f"of a run; set PREFECT_API_URL to a server that they reach"
        )
    try:
        with Client(address, timeout=CONNECT_SECONDS, set_as_default=False) as client:
            found = client.scheduler_info(n_workers=-1)["workers"]
    except Exception as error:  # also what TLS and a stranger's port raise
        raise ServerError(
            f"Dask scheduler {address} (fan_out.address) does not answer: {' '.join(str(error).split())}; start it "
            f"(`dask scheduler`), or leave the address out to have workers on this machine"
        ) from None
    if not found:
        print(f"waiting: Dask scheduler {address} has no workers yet", file=sys.stderr, flush=True)


@contextmanager
def open_runner(fan_out: FanOut, cells: int) -> Iterator[Any]:
    """Start what runs so many cells, as one of Prefect's task runners; worker processes end with the block."""
    if fan_out.engine == "threads":
        from prefect.task_runners import ThreadPoolTaskRunner

        with ThreadPoolTaskRunner(max_workers=fan_out.workers or 1) as runner:
            yield runner
        return
    from prefect_dask import DaskTaskRunner

    if fan_out.address is not None:
        with DaskTaskRunner(address=fan_out.address) as runner:
            yield runner
        return
    with start_workers(min(fan_out.workers or 1, cells)) as cluster, DaskTaskRunner(cluster=cluster) as runner:
        yield runner


@contextmanager
def start_workers(count: int) -> Iterator[Any]:
    """Start worker processes on this machine, as a cluster of Dask's; they end with the block.

    Cores are shared out among them: threads of several processes that want the same cores wait for one another at
    every matrix product.
    """
    import torch
    from distributed import LocalCluster

    threads = str(max(1, torch.get_num_threads() // count))
    with _keep_environment():
        os.environ.update(dict.fromkeys(THREAD_LIMITS, threads))
        cluster = LocalCluster(
            n_workers=count,
            threads_per_worker=1,
            # Dask would kill a worker that loads a large model.
            memory_limit=None,
            # No dashboard. Its server cannot be switched off: on 127.0.0.1 like the rest, and any port that is free.
            dashboard_address=None,
            scheduler_kwargs={"dashboard_address": "127.0.0.1:0"},
            silence_logs=logging.ERROR,
        )
        with cluster:
            yield cluster


def submit_cells(
    runner: Any, fan_out: FanOut, recipe: BenchRecipe, bench: "Bench", cells: Sequence[Cell]
) -> dict[Any, Cell]:
    """Hand cells over, all at once; returns who is to be asked for which.

    Args:
        runner: from `open_runner`.
        fan_out: what it was opened with.
        recipe: as written, see `tasks.sweep.sent_bench`.
        bench: the opened comparison.
        cells: what is to be run.
    """
    from tasks.sweep.cells import run_bench_cell
    from tasks.sweep.sent_bench import send_bench

    if fan_out.engine == "threads":
        return {runner.submit(run_bench_cell, {"bench": bench, "cell": cell}): cell for cell in cells}
    sent = send_bench(recipe, bench)
    with _name_server():
        return {runner.submit(run_bench_cell, {"bench": sent, "cell": cell}): cell for cell in cells}


def take_result(future: Any, fan_out: FanOut, cell: Cell) -> "Measured | Failed":
    """Return what came of a cell whose future is done; that its workers died is told like any other failure.

    Raises:
        ServerError: if the scheduler is gone.
        MkaError: what would fail every other cell too.
    """
    from mka.bench.results import Failed

    if fan_out.engine == "threads":
        return future.result()
    from distributed import CancelledError, KilledWorker

    try:
        result = future.result()
    except KilledWorker as error:
        died = error.allowed_failures + 1
        return Failed(cell, f"worker processes that died while they had it: {died}; out of memory?", expected=False)
    except CancelledError:
        raise ServerError("the Dask scheduler is gone, or dropped the connection; its own log says why") from None
    future.wrapped_future.release()  # else Dask runs the cell again when the worker that keeps its result dies
    return result


@contextmanager
def _name_server() -> Iterator[None]:
    """Name this run's Prefect server, else each worker would start a temporary one of its own on the same database."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: str(get_client(sync_client=True).api_url)}):
        yield


@contextmanager
def _keep_environment() -> Iterator[None]:
    """Undo what is done to the environment within the block: Dask leaves settings there, at restarts of workers too."""
    before = dict(os.environ)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
