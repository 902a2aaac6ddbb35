"""A process that ends itself with SIGKILL at a chosen file-system operation below chosen folders, or in a database.

Python announces its file-system operations to audit hooks, and SQLite each statement that it is about to run; what
another library does below Python (safetensors) is not seen. A kill falls between any two of those operations, and
before or after what such a library does, not within.
"""

import importlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

# Audit event -> which of its arguments name paths.
OPERATIONS = {
    "open": (0,),
    "os.rename": (0, 1),
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.link": (0, 1),
    "os.symlink": (0, 1),
    "os.truncate": (0,),
    "os.utime": (0,),
    "os.chmod": (0,),
    "os.listdir": (0,),
    "os.scandir": (0,),
    "shutil.copyfile": (0, 1),
    "shutil.rmtree": (0,),
    "shutil.move": (0, 1),
}
# First words of statements after which a database is another.
WRITES = ("INSERT", "UPDATE", "DELETE", "COMMIT", "CREATE")


def arm(folders: Sequence[Path], at: int | None, tell: Callable[[str], None] = lambda kind: None) -> None:
    """Count operations from now on, and die at the one with the number ``at``.

    What counts are file-system operations below the folders, and statements that write into SQLite databases.

    Args:
        folders: where operations count.
        at: number of the last one, from 1; None: none.
        tell: called with the kind of each.
    """
    roots = tuple(str(folder.resolve()) for folder in folders)
    count = 0

    def come_to(kind: str) -> None:
        nonlocal count
        count += 1
        tell(kind)
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    def read_statement(statement: str) -> None:
        first = statement.lstrip().partition(" ")[0].rstrip(";").upper()
        if first in WRITES:
            come_to(f"sql {first.lower()}")

    connect = sqlite3.connect

    def connect_watched(*arguments: object, **options: object) -> sqlite3.Connection:
        connection = connect(*arguments, **options)
        connection.set_trace_callback(read_statement)
        return connection

    sqlite3.connect = sqlite3.dbapi2.connect = connect_watched

    def watch(event: str, arguments: tuple) -> None:
        places = OPERATIONS.get(event)
        if places is None:
            return
        named = (arguments[place] for place in places if place < len(arguments))
        paths = [str(Path(os.fsdecode(n)).absolute()) for n in named if isinstance(n, str | bytes | os.PathLike)]
        if not any(path.startswith(roots) for path in paths):
            return
        kind = event
        if event == "open":
            flags = arguments[2] if len(arguments) > 2 and isinstance(arguments[2], int) else 0
            mode = arguments[1] if len(arguments) > 1 else None
            writes = flags & (os.O_WRONLY | os.O_RDWR) or (isinstance(mode, str) and set(mode) & set("wax+"))
            kind = "open to write" if writes else "open to read"
        come_to(kind)

    sys.addaudithook(watch)


def draw_kills(operations: Sequence[str], count: int, seed: int = 0) -> Iterator[tuple[int, str]]:
    """Yield numbers of operations with their kinds: as many of every kind as of any other, at places drawn at random.

    Args:
        operations: kinds of those that an undisturbed run came to.
        count: how many.
        seed: of the places.
    """
    rng, by_kind = random.Random(seed), defaultdict(list)
    for number, kind in enumerate(operations, 1):
        by_kind[kind].append(number)
    kinds = sorted(by_kind)
    for turn in range(count):
        kind = kinds[turn % len(kinds)]
        yield rng.choice(by_kind[kind]), kind


def run_killed(
    command: Sequence[str], folders: Sequence[Path], at: int | None, log: Path, environment: Mapping[str, str]
) -> tuple[int, list[str]]:
    """Run a command of this project in a process of its own.

    Args:
        command: the module of its ``main``, and the arguments for that.
        folders: of `arm`.
        at: of `arm`.
        log: file that what it prints goes to.
        environment: of the process.

    Returns:
        Its exit code, -9 if it was killed, and the kinds of the operations it came to.
    """
    kinds = log.with_suffix(".kinds")
    kinds.write_text("")
    given = json.dumps([list(command), [str(folder) for folder in folders], at, str(kinds)])
    with log.open("w") as output:
        program = [sys.executable, __file__, given]
        done = subprocess.run(program, stdout=output, stderr=output, env=environment, check=False)
    return done.returncode, [json.loads(line) for line in kinds.read_text().splitlines()]


def main(given: str) -> int:
    """Run the command as `run_killed` asks for it."""
    (program, *arguments), folders, at, kinds = json.loads(given)
    # A flow settles its environment before it imports Prefect.
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    module = importlib.import_module(program)
    # Open before counting begins, and unbuffered: a killed process tells what it came to.
    told = os.open(kinds, os.O_WRONLY | os.O_APPEND)
    arm(
        [Path(folder) for folder in folders],
        at,
        lambda kind: os.write(told, json.dumps(kind).encode() + b"\n") and None,
    )
    return int(module.main(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
