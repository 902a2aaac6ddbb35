"""Which packages are installed, and from which folders; everything else about the project is in pyproject.toml.

An environment gets two names, `mka` and `mka_flows`: what is called `flows` and `tasks` in a checkout would take these
names from everybody else in it. `flows/installed` finds them again in both layouts.
"""

from setuptools import find_packages, setup

library = find_packages(include=["mka", "mka.*"])
orchestrated = find_packages(include=["flows", "flows.*", "tasks", "tasks.*"], exclude=["flows.installed"])

setup(
    packages=[*library, "mka_flows", *(f"mka_flows.{name}" for name in orchestrated)],
    package_dir={"mka_flows": "flows/installed", "mka_flows.flows": "flows", "mka_flows.tasks": "tasks"},
)
