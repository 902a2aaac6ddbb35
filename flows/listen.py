"""Base models are looked at when a webhook says that one has changed, not only by the clock."""

import contextlib
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from mka.errors import MkaError, ServerError
from mka.outside.printable import describe_error, make_printable
from mka.pipeline.recipes import load_recipe
from tasks.machine.workplace import Workplace
from tasks.webhooks import HEADERS, LONGEST_BODY, BadDelivery, Delivery, read_delivery

# Requests answered at a time, seconds one may keep silent, deliveries that wait to be looked at.
AT_ONCE, SILENCE, WAITING = 16, 10, 100


class Receiver(ThreadingHTTPServer):
    """A small server for webhooks; what it was told waits in a queue.

    Attributes:
        deliveries: what was told and believed.
    """

    daemon_threads = True

    def __init__(self, address: tuple[str, int], secrets: Mapping[str, bytes]) -> None:
        """Listen.

        Raises:
            ServerError: if the address is taken or not this machine's.
        """
        self.secrets = secrets
        self.deliveries: queue.Queue[Delivery] = queue.Queue(WAITING)
        self.room = threading.BoundedSemaphore(AT_ONCE)
        try:
            super().__init__(address, Handler)
        except (OSError, OverflowError) as error:
            raise ServerError(f"cannot listen on {address[0]}:{address[1]}: {error}; name another --port") from None

    @property
    def address(self) -> str:
        """Where it listens."""
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread, if there is room."""
        if self.room.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer, and make room."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say in one line that a connection broke."""
        tell(f"webhook from {client_address[0]}: {describe_error(sys.exc_info()[1] or OSError())}")


class Handler(BaseHTTPRequestHandler):
    """One request: checked, read, put into the queue, answered."""

    server: Receiver
    timeout = SILENCE
    server_version, sys_version = "mka", ""

    def do_POST(self) -> None:
        """Take a delivery."""
        try:
            told = read_delivery(self.read_headers(), self.read_body(), self.server.secrets, time.time())
        except BadDelivery as error:
            tell(f"webhook from {self.client_address[0]}: {error.status}, {error}")
            self.answer(error.status, str(error))
            return
        if told is None:
            self.answer(200, "nothing to look at")
            return
        try:
            self.server.deliveries.put_nowait(told)
        except queue.Full:
            self.answer(503, "too many wait; the watch by the clock will find it")
        else:
            self.answer(202, "will be looked at")

    def read_headers(self) -> dict[str, str]:
        """Return what says who sent it, however its names were spelled."""
        return {name: value for name in HEADERS if (value := self.headers.get(name)) is not None}

    def read_body(self) -> bytes:
        """Read what was sent, if it says how much and that is not too much."""
        told = self.headers.get("Content-Length", "")
        if not (told.isascii() and told.isdecimal() and len(told) < 10):
            raise BadDelivery(400, "no Content-Length")
        if int(told) > LONGEST_BODY:
            raise BadDelivery(400, f"a body of more than {LONGEST_BODY} bytes")
        body = self.rfile.read(int(told))
        if len(body) < int(told):
            raise BadDelivery(400, "the body ends early")
        return body

    def answer(self, status: int, line: str) -> None:
        """Answer with one line of text."""
        body = f"{line}\n".encode()
        with contextlib.suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Say nothing: what is refused or looked at is said elsewhere."""


def tell(line: str) -> None:
    """Say one line on stderr."""
    print(make_printable(line), file=sys.stderr, flush=True)


@contextlib.contextmanager
def receiving(address: tuple[str, int], secrets: Mapping[str, bytes]) -> Iterator[Receiver]:
    """Have a receiver within the block."""
    with Receiver(address, secrets) as receiver:
        thread = threading.Thread(target=receiver.serve_forever, daemon=True)
        thread.start()
        try:
            yield receiver
        finally:
            receiver.shutdown()
            thread.join()


def find_concerned(place: Workplace, recipes: Sequence[str], delivery: Delivery) -> list[str]:
    """Return the recipes whose base a delivery tells of; one that cannot be read is said and left out."""
    concerned = []
    for recipe in recipes:
        try:
            if delivery.concerns(load_recipe(place.path(Path(recipe)))):
                concerned.append(recipe)
        except MkaError as error:
            tell(f"{recipe}: {error}")
    return concerned


def listen(
    place: Workplace,
    recipes: Sequence[str],
    look: Callable[[list[str]], Any],
    address: tuple[str, int],
    secrets: Mapping[str, bytes],
) -> None:
    """Look at all recipes once, then at those that a webhook concerns, until interrupted.

    A look that fails is said in one line; the next delivery is looked at all the same.

    Args:
        place: where the project keeps its things.
        recipes: paths of recipes.
        look: looks at some of them, as `flows.watch.watch_base_models` does.
        address: host and port; port 0 is any that is free.
        secrets: of `tasks.webhooks.read_secrets`.

    Raises:
        ServerError: if the address cannot be listened on.
    """
    with receiving(address, secrets) as receiver:
        tell(f"listening on {receiver.address} for webhooks of {' and '.join(secrets)}; {len(recipes)} recipes")
        try_looking(look, list(recipes))
        while True:
            # In steps: nothing interrupts a wait without an end on every system.
            with contextlib.suppress(queue.Empty):
                delivery = receiver.deliveries.get(timeout=1.0)
                concerned = find_concerned(place, recipes, delivery)
                tell(f"{delivery.source} says that {delivery.model} has changed: {len(concerned)} recipes concerned")
                if concerned:
                    try_looking(look, concerned)


def try_looking(look: Callable[[list[str]], Any], recipes: list[str]) -> None:
    """Look at recipes; what fails is one line."""
    try:
        look(recipes)
    except MkaError as error:
        tell(str(error))
    except Exception as error:  # a server that was away is there again for the next delivery
        tell(f"could not look at {', '.join(recipes)}: {describe_error(error)}")
