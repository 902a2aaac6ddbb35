"""Slots: what two runs must not do at the same time.

With a Prefect server a slot is one of its global concurrency limits, so that runs on several machines see each other;
it is made with room for one where it is missing, and `prefect gcl update NAME --limit 2` makes room for more. Without a
server it is a file lock, which the operating system gives back when its holder dies; `MKA_SLOTS=2` makes room for more
that compute.
"""

import getpass
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mka.errors import RecipeError

# A killed holder keeps a server's slot for so long.
LEASE_SECONDS = 60
POLL_SECONDS = 0.5


def compute_slot() -> str:
    """Name the slot of this machine's accelerator, or of its cores and memory if it has none."""
    import torch

    device = "gpu" if torch.cuda.is_available() else "cpu"
    return f"mka-{device}-{_clean(socket.gethostname())}"


def registry_slot(purpose: str, model: str) -> str:
    """Name the slot of whoever registers, or moves the aliases of, one registered model."""
    return f"mka-{purpose}-{_clean(model)}"


def _clean(name: str) -> str:
    return re.sub(r"[^a-z0-9.-]+", "-", name.lower())


def is_on_server() -> bool:
    """Whether a Prefect server was named; otherwise each flow starts a temporary one of its own."""
    from prefect.settings import get_current_settings

    return bool(get_current_settings().api.url)


@contextmanager
def hold_slot(name: str, room: int | None = None) -> Iterator[None]:
    """Wait for a slot and hold it; says so on the terminal if it has to wait.

    Args:
        name: of the slot.
        room: how many may hold it where there is no server; None: as many as `MKA_SLOTS` says.

    Raises:
        RecipeError: if `MKA_SLOTS` is not a number above 0.
    """
    with _hold_on_server(name) if is_on_server() else _hold_on_machine(name, room):
        yield


@contextmanager
def _hold_on_server(name: str) -> Iterator[None]:
    from prefect.concurrency.sync import concurrency

    if _make_limit(name):
        _say_waiting(f"{name} (prefect gcl inspect {name})")
    # Losing the lease to a restart of the server must not end hours of work.
    with concurrency(name, lease_duration=LEASE_SECONDS, strict=True, raise_on_lease_renewal_failure=False):
        yield


def _make_limit(name: str) -> bool:
    """Make sure the limit exists; return whether it is full."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError

    with get_client(sync_client=True) as client:
        try:
            limit = client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            try:
                client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
            except ObjectAlreadyExists:
                pass
            except PrefectHTTPStatusError as error:
                if error.response.status_code != 409:  # another run made it a moment ago
                    raise
            return False
        return limit.active_slots >= limit.limit


@contextmanager
def _hold_on_machine(name: str, room: int | None) -> Iterator[None]:
    from filelock import FileLock, Timeout

    only, room = room is not None, room or _read_room()
    folder = Path(tempfile.gettempdir()) / f"mka-slots-{getpass.getuser()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    locks = [FileLock(folder / f"{name}.{number}.lock") for number in range(room)]
    waiting = False
    while True:
        for lock in locks:
            try:
                lock.acquire(blocking=False)
            except Timeout:
                continue
            try:
                yield
            finally:
                lock.release()
            return
        if not waiting:
            _say_waiting(name if only else f"{name} (MKA_SLOTS={room + 1} makes room for one more)")
            waiting = True
        time.sleep(POLL_SECONDS)


def _read_room() -> int:
    room = os.environ.get("MKA_SLOTS", "1")
    if not room.isdecimal() or int(room) < 1:
        raise RecipeError(f"MKA_SLOTS is {room!r}; allowed: a number above 0, how many runs may compute at a time")
    return int(room)


def _say_waiting(what: str) -> None:
    print(f"waiting: another run holds the slot {what}", file=sys.stderr, flush=True)
