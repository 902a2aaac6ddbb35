"""Rebuild the page of all recompressions from the registry.

python -m flows.index
python -m flows.index --registry http://127.0.0.1:5000
"""

import sys
from collections.abc import Sequence

from flows.command_line import run_command
from tasks.machine.workplace import find_workplace


def parse_arguments(arguments: Sequence[str]) -> str | None:
    """Read the command line; returns the registry's address, None for the one in the work folder."""
    import argparse

    parser = argparse.ArgumentParser(
        prog="python -m flows.index",
        description="Write one page of all recompressions: what came out, what is in use, who moved an alias and why. "
        "It reads the registry, changes nothing there, and prints the page's path.",
        epilog="example: python -m flows.index && python -m webbrowser data/work/index.html",
    )
    parser.add_argument(
        "--registry",
        metavar="URI",
        help="MLflow store, e.g. http://127.0.0.1:5000 or sqlite:////full/path/mlflow.db; "
        "default: MLFLOW_TRACKING_URI, else mlflow.db in the work folder (MKA_WORK, or data/work)",
    )
    return parser.parse_args(arguments).registry


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page and print its path; a registry that cannot be read is one line on stderr and exit code 2."""
    uri = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    return run_command("index", lambda: rebuild(uri), is_flow=False)


def rebuild(uri: str | None) -> None:
    """Read the registry, write the page, print its path.

    Raises:
        MkaError: if the registry cannot be read or the page cannot be written.
    """
    # Imports MLflow, which takes seconds that --help need not cost.
    from tasks.registry.index import read_history, write_history

    place = find_workplace()
    place.prepare()
    history = read_history(place, uri)
    page = write_history(place, history)
    if not history.rows:
        again = "python -m flows.recompress recipes/NAME.yaml"
        print(f"index: the registry holds no recompression yet; make one with {again}", file=sys.stderr)
    print(page)


if __name__ == "__main__":
    sys.exit(main())
