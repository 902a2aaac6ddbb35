"""A process that ends itself with SIGKILL at a chosen file-system operation below chosen folders.

Python announces its file-system operations to audit hooks; what a library does below Python (safetensors, SQLite) is
not seen. A kill falls between any two of Python's own operations, and before or after what a library does, not within.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
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


def arm(folders: Sequence[Path], at: int | None, tell: Callable[[str], None] = lambda kind: None) -> None:
    """Count file-system operations below folders from now on, and die at the one with the number ``at``.

    Args:
        folders: where operations count.
        at: number of the last one, from 1; None: none.
        tell: called with the kind of each.
    """
    roots = tuple(str(folder.resolve()) for folder in folders)
    count = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal count
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
        count += 1
        tell(kind)
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def run_killed(arguments: Sequence[str], folders: Sequence[Path], at: int | None, log: Path) -> tuple[int, list[str]]:
    """Run ``mka`` in a process of its own.

    Args:
        arguments: of the command line.
        folders: of `arm`.
        at: of `arm`.
        log: file that what it prints goes to.

    Returns:
        Its exit code, -9 if it was killed, and the kinds of the operations it came to.
    """
    kinds = log.with_suffix(".kinds")
    kinds.write_text("")
    given = json.dumps([list(arguments), [str(folder) for folder in folders], at, str(kinds)])
    with log.open("w") as output:
        done = subprocess.run([sys.executable, __file__, given], stdout=output, stderr=output, check=False)
    return done.returncode, [json.loads(line) for line in kinds.read_text().splitlines()]


def main(given: str) -> int:
    """Run ``mka`` as `run_killed` asks for it."""
    from mka.cli.main import main as run

    arguments, folders, at, kinds = json.loads(given)
    # Open before counting begins, and unbuffered: a killed process tells what it came to.
    told = os.open(kinds, os.O_WRONLY | os.O_APPEND)
    arm(
        [Path(folder) for folder in folders],
        at,
        lambda kind: os.write(told, json.dumps(kind).encode() + b"\n") and None,
    )
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
