"""The wheel of this checkout, and environments that have it with no more than what it asks for."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
# Of a person who has just installed it: nothing of this process but where programs and temporary files are.
KEPT = ("PATH", "TMPDIR", "LANG", "OMP_NUM_THREADS")


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the sources, with the setuptools of this environment and no registry.

    In a copy, since a build leaves its products where it was started, and takes those of the last one with it.
    """
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():  # one that was removed is listed until that is committed
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    run_pip("wheel", *options, str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


def read_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def list_requirements(wheel: Path, *extras: str) -> list[Requirement]:
    """What the wheel asks for here, by itself and with extras."""
    asked = [Requirement(text) for text in read_metadata(wheel).get_all("Requires-Dist")]
    return [
        requirement
        for requirement in asked
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def close(requirements: Iterable[Requirement]) -> set[str]:
    """Names of the packages that requirements come to in this environment, with all that those ask for."""
    seen: set[tuple[str, str]] = set()
    todo = list(requirements)
    while todo:
        requirement = todo.pop()
        for extra in ("", *requirement.extras):
            key = canonicalize_name(requirement.name), extra
            if key in seen:
                continue
            seen.add(key)
            for text in metadata.requires(requirement.name) or ():
                asked = Requirement(text)
                if asked.marker is None or asked.marker.evaluate({"extra": extra}):
                    todo.append(asked)
    return {name for name, _ in seen}


@dataclass(frozen=True)
class Installed:
    """An environment with the wheel, and a folder to type commands in."""

    environment: Path
    folder: Path

    @property
    def site(self) -> Path:
        (site,) = self.environment.glob("lib/python3.*/site-packages")
        return site

    def run(self, program: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        """Type a command of the environment in the folder."""
        command = [str(self.environment / "bin" / program), *arguments]
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        return subprocess.run(
            command,
            cwd=self.folder,
            env=kept | {"HOME": str(self.folder.parent), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=600,
        )

    def list_site(self) -> set[str]:
        """Everything in the environment's packages but what Python compiled."""
        return {str(path.relative_to(self.site)) for path in self.site.rglob("*") if "__pycache__" not in path.parts}


def install(wheel: Path, place: Path, *extras: str) -> Installed:
    """Install the wheel into an environment of its own, whose packages are links to those of this one.

    Links, and not this environment's folder: that has every package, and this project as it is developed.
    """
    made = Installed(place / "environment", place / "here")
    made.folder.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", made.environment], check=True)
    packages = place / "packages"
    packages.mkdir()
    for name in close(list_requirements(wheel, *extras)):
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            source = Path(str(distribution.locate_file(top)))
            if source.suffix != ".pth" and source.exists() and not (packages / top).exists():
                (packages / top).symlink_to(source)
    (made.site / "packages.pth").write_text(f"{packages}\n")
    python = str(made.environment / "bin" / "python")
    run_pip("--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel))
    return made


def run_pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
