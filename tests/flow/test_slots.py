"""Slots: one holder at a time, with a server and without; a dead holder does not keep it."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mka.errors import RecipeError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.flow


def overlap(name, holders):
    """Hold a slot in several threads; return the largest number of them that were inside at the same time."""
    from tasks.machine.slots import hold_slot

    inside, most, lock = 0, 0, threading.Lock()

    def hold():
        nonlocal inside, most
        with hold_slot(name):
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.3)
            with lock:
                inside -= 1

    threads = [threading.Thread(target=hold) for _ in range(holders)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return most


@pytest.fixture
def no_server(monkeypatch, tmp_path):
    monkeypatch.setattr("tasks.machine.slots.is_on_server", lambda: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("MKA_SLOTS", "1")


def test_on_one_machine_a_slot_has_one_holder_unless_told_otherwise(no_server, monkeypatch, capsys):
    assert overlap("alone", 3) == 1
    assert "waiting: another run holds the slot alone (MKA_SLOTS=2 makes room for one more)" in capsys.readouterr().err
    monkeypatch.setenv("MKA_SLOTS", "2")
    assert overlap("alone", 3) == 2
    monkeypatch.setenv("MKA_SLOTS", "none")
    with pytest.raises(RecipeError, match="MKA_SLOTS is 'none'; allowed: a number above 0"):
        overlap_once()


def overlap_once():
    from tasks.machine.slots import hold_slot

    with hold_slot("alone"):
        pass


def test_a_killed_holder_gives_its_slot_back(no_server, tmp_path):
    code = (
        f"import tempfile, time; tempfile.tempdir = {str(tmp_path)!r}\n"
        "from tasks.machine import slots\nslots.is_on_server = lambda: False\n"
        "with slots.hold_slot('alone'):\n    print('holds', flush=True)\n    time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline().strip() == "holds"
        waiter = threading.Thread(target=overlap_once)
        waiter.start()
        waiter.join(1.5)
        assert waiter.is_alive()
        holder.send_signal(signal.SIGKILL)
        waiter.join(30)
        assert not waiter.is_alive()
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.usefixtures("prefect_server")
def test_on_a_server_a_slot_is_a_concurrency_limit_that_an_operator_may_raise():
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

    assert overlap("mka-test-slot", 2) == 1
    with get_client(sync_client=True) as client:
        assert client.read_global_concurrency_limit_by_name("mka-test-slot").limit == 1
        client.update_global_concurrency_limit("mka-test-slot", GlobalConcurrencyLimitUpdate(limit=2))
    assert overlap("mka-test-slot", 3) == 2


def test_slots_are_named_after_the_machine_and_the_model():
    from tasks.machine.slots import compute_slot, registry_slot

    assert compute_slot().startswith(("mka-cpu-", "mka-gpu-")) and compute_slot() == compute_slot()
    assert registry_slot("promotion", "My model/2") == "mka-promotion-my-model-2"
