"""One recompression as the registry remembers it, and what moved an alias: what the index page shows."""

import shlex
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mka.evaluation.metrics import METRICS, read_check, shorten_check
from mka.report.decision import MEANINGFUL

CHAMPION = "champion"


@dataclass(frozen=True)
class Recovery:
    """How much of the base was left in one check of the gate; 1 is as good as the base.

    Attributes:
        name: the gate's check, see `mka.evaluation.metrics.Group.check`.
        value: point estimate.
        lower, upper: one-sided 95 % bounds; None where none was recorded.
        threshold: what the gate asked of the lower bound; None where that was not recorded.
    """

    name: str
    value: float
    lower: float | None = None
    upper: float | None = None
    threshold: float | None = None

    @property
    def label(self) -> str:
        """What it is called in a column of them."""
        return shorten_check(self.name)


@dataclass(frozen=True)
class Recompression:
    """One recompression; a figure that was not recorded is None.

    Attributes:
        base_model: label of the base.
        base_revision: its revision.
        name: registered model, or the one it would have become.
        version: its version; None if it was not registered.
        aliases: aliases that point at the version now.
        when: start of the run, with a time zone.
        method, recipe: what made it.
        verdict: of the gate; empty if unknown.
        layers_in, layers_out: decoder layers before and after.
        layer_ratio: 1 - layers_out / layers_in.
        size_ratio: 1 - bytes out / bytes in.
        size, base_size: bytes of the candidate and of its base, as served in 16 bits if both are known so, else as
            stored.
        decode, base_decode: tokens per second, decoding: the slowest round, the median, the fastest; one figure three
            times where no range was recorded.
        command: does the same again.
        recoveries: of every check that was recorded, in the order of the table of metrics.
        run, run_id: name and id of the recorded run; empty if it is gone.
        complete: False if registering the version was interrupted.
        report: its report on this machine.
        page: its page on the registry's server.
    """

    base_model: str
    base_revision: str
    name: str
    version: str | None
    aliases: tuple[str, ...]
    when: datetime
    method: str
    recipe: str
    verdict: str
    layers_in: int | None = None
    layers_out: int | None = None
    layer_ratio: float | None = None
    size_ratio: float | None = None
    size: float | None = None
    base_size: float | None = None
    decode: tuple[float, float, float] | None = None
    base_decode: tuple[float, float, float] | None = None
    command: str = ""
    recoveries: tuple[Recovery, ...] = ()
    run: str = ""
    run_id: str = ""
    complete: bool = True
    report: Path | None = None
    page: str | None = None

    @property
    def is_champion(self) -> bool:
        """Whether the alias "champion" points here."""
        return CHAMPION in self.aliases

    @property
    def size_left(self) -> float | None:
        """Bytes as a share of the base's."""
        return None if self.size_ratio is None else 1 - self.size_ratio

    @property
    def time_left(self) -> float | None:
        """Time per decoded token as a share of the base's."""
        return self.base_decode[1] / self.decode[1] if self.base_decode and self.decode else None

    @property
    def is_demonstration(self) -> bool:
        """Whether the gate asked for less of the base than means something."""
        return any(r.threshold is not None and r.threshold < MEANINGFUL for r in self.recoveries)

    @property
    def commands(self) -> list[tuple[str, str]]:
        """What to type: how this very version is loaded and moved, or made again where it has none; title and line."""
        again = [("run it again", self.command)] if self.command else []
        if self.version is None:
            return again
        name, address = shlex.quote(self.name), f"models:/{self.name}/{self.version}"
        loading = f"import mlflow; model = mlflow.pyfunc.load_model({address!r})"
        back, ahead = (
            f"mka rollback {name} --because TEXT",
            f"mka promote {name} --version {self.version} --because TEXT",
        )
        move = ("roll back", back) if self.is_champion else ("promote", ahead)
        return [move, ("load it in Python", loading), *again]

    @property
    def worst(self) -> Recovery | None:
        """The text that lost most by the first metric that was recorded; the tasks where none was on texts."""
        return min(self.recoveries, key=lambda recovery: (*rank_check(recovery.name), recovery.value), default=None)


@dataclass(frozen=True)
class AliasMove:
    """One move of an alias.

    Attributes:
        name: registered model.
        alias: what moved.
        action: "register", "promote" or "rollback".
        before, after: versions it pointed at; None for none.
        when: None if the record has no readable time.
        who, why: as given by whoever moved it.
    """

    name: str
    alias: str
    action: str
    before: str | None
    after: str | None
    when: datetime | None
    who: str
    why: str


def rank_check(check: str) -> tuple[bool, int]:
    """Texts before what is pooled, then as the table of metrics has them; last what it no longer has."""
    metric, names = read_check(check), list(METRICS)
    return (metric is not None and metric.pooled is not None, names.index(metric.name) if metric else len(names))
