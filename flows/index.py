"""Rebuild the page of all recompressions from the registry.

mka index
mka index --registry http://127.0.0.1:5000
"""

import sys
from functools import partial

from flows.cli.console import run_program
from mka.terminal import Outcome
from tasks.machine.workplace import find_workplace


def rebuild(uri: str | None) -> Outcome:
    """Read the registry and write the page into the work folder; returns its path.

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
        again = "mka run recipes/NAME.yaml"
        print(f"index: the registry holds no recompression yet; make one with {again}", file=sys.stderr)
    return Outcome({"page": str(page), "recompressions": len(history.rows)}, str(page))


main = partial(run_program, "index", "index:index")

if __name__ == "__main__":
    sys.exit(main())
