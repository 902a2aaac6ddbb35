"""Flows: the story of a recompression, top to bottom.

Importing this package settles the environment of the libraries before any of them is imported: no telemetry, a private
Prefect home in the work folder for runs without a server, and enough patience for its first start.
"""

import os
import warnings

from mka.terminal import SHARED_MACHINE
from tasks.machine.workplace import find_workplace
from tasks.refusing import shorten_refusals

_WORK = find_workplace().work
for _name, _value in {
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "GX_ANALYTICS_ENABLED": "false",
    "DVC_NO_ANALYTICS": "1",
    "PREFECT_HOME": str(_WORK / "prefect"),
    # The first start creates a database, which takes longer than Prefect's default of 20 s on a small machine.
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    # The automation that finds runs nobody runs any more counts on it; the default is 180.
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
    "PREFECT_CLI_COLORS": "false",
    "HF_DATASETS_CACHE": str(_WORK / "datasets"),
    "TOKENIZERS_PARALLELISM": "false",
    **SHARED_MACHINE,
}.items():
    os.environ.setdefault(_name, _value)

# Prefect makes its home, but not the folders above it; those are made by whoever begins a flow, in one place.
warnings.filterwarnings("ignore", message="Failed to create the Prefect home directory")
shorten_refusals()
