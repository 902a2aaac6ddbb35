"""What a run says on stderr while it works."""

import re

# Name, seconds or a dash, and how a stage came to its result: a line per stage, the same of a command and of a flow.
STAGE = re.compile(r"\S.{19} +(–|[\d,]+\.\d s)  (reused|computed): \S.*")


def split_stages(err: str) -> tuple[list[str], str]:
    """Return the names of the stages that said they ended, and everything else on stderr."""
    lines = err.splitlines(keepends=True)
    stages = [line[:20].rstrip() for line in lines if STAGE.fullmatch(line.rstrip("\n"))]
    return stages, "".join(line for line in lines if not STAGE.fullmatch(line.rstrip("\n")))
