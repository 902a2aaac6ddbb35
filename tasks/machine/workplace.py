"""Where a run keeps its things: one folder, ignored by git and DVC."""

import os
from dataclasses import dataclass
from pathlib import Path

from mka.outside.project import find_root, find_work
from mka.store.publishing import make_work


@dataclass(frozen=True)
class Workplace:
    """Folders of one project.

    Attributes:
        root: relative paths in recipes start here; see `mka.outside.project.find_root`.
        work: the work folder; see `mka.outside.project.find_work`.
    """

    root: Path
    work: Path

    @property
    def stages(self) -> Path:
        """Stage results, keyed by content."""
        return self.work / "stages"

    @property
    def checks(self) -> Path:
        """Data Docs and the page that sums them up."""
        return self.work / "checks"

    @property
    def last_run(self) -> Path:
        """Facts of the last flow run, for machines."""
        return self.work / "last_run.json"

    @property
    def tracking_uri(self) -> str:
        """The default MLflow store."""
        return f"sqlite:///{self.work / 'mlflow.db'}"

    @property
    def model_artifacts(self) -> str:
        """Where the default MLflow store keeps files."""
        return (self.work / "mlartifacts").as_uri()

    def prepare(self) -> None:
        """Make the work folder.

        Raises:
            OutputError: if it cannot be made or written.
        """
        make_work(self.work)

    def path(self, path: Path) -> Path:
        """Resolve a recipe's path against the root."""
        return path if path.is_absolute() else self.root / path

    def relative(self, path: Path) -> Path:
        """Name a path as seen from the root, or as it is if it lies elsewhere."""
        return path.relative_to(self.root) if path.is_relative_to(self.root) else path


def enter_checkout() -> dict[str, str]:
    """Change into the project's root: the pull step of every deployment.

    A worker runs it in its own environment, so a deployment made on one machine finds the checkout of another.
    """
    root = find_workplace().root
    os.chdir(root)
    return {"directory": str(root)}


def find_workplace() -> Workplace:
    """Return the workplace of the current folder."""
    return Workplace(find_root(), find_work().resolve())
