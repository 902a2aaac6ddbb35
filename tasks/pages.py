"""What a run shows at its end: artifacts on its Prefect page, and a summary on the terminal."""

import base64
from collections.abc import Mapping
from typing import Any

from prefect.artifacts import create_image_artifact, create_link_artifact, create_markdown_artifact, create_table_artifact
from tabulate import tabulate

from mka.products import Product
from mka.report import result_table
from tasks.compression import Job
from tasks.evaluation import open_report
from tasks.registry import CANDIDATE
from tasks.reporting import Evidence, registered_address


def publish_artifacts(job: Job, evidence: Evidence, page: Product) -> None:
    """Put the result table, the gate's numbers, the similarity picture and a link to the report on the run's page."""
    key = job.recipe.name.replace("_", "-").replace(".", "-")
    rows = result_table(open_report(evidence.base_report), open_report(evidence.candidate_report))
    create_table_artifact(rows, key=f"{key}-results", description=f"{job.recipe.name}: base and candidate")
    lines = "\n".join(evidence.gate.facts["lines"])
    create_markdown_artifact(f"```\n{lines}\n```", key=f"{key}-gate", description="Gate")
    create_link_artifact(
        (page.folder / "report.html").as_uri(), link_text="report.html", key=f"{key}-report", description="Report"
    )
    picture = page.folder / "similarity.png"
    if picture.exists():
        encoded = base64.b64encode(picture.read_bytes()).decode()
        create_image_artifact(
            f"data:image/png;base64,{encoded}", key=f"{key}-similarity", description="Layer similarity and merges"
        )


def print_summary(job: Job, evidence: Evidence, facts: Mapping[str, Any]) -> None:
    """Print base and candidate side by side, the verdict, and where everything is."""
    rows = result_table(open_report(evidence.base_report), open_report(evidence.candidate_report))
    print()
    print(tabulate(rows, headers="keys", tablefmt="simple", colalign=("left", "right", "right", "right"), disable_numparse=True))
    print("± is one standard error; a seeded subset of each task, sized for a small machine, unless n says otherwise.")
    print()
    print("\n".join(evidence.gate.facts["lines"]))
    print()
    registration = facts["registry"]
    if registration["name"]:
        version = f"{registration['name']} version {registration['version']}"
        where = f"{version}, aliases {', '.join(registration['aliases']) or 'none'}"
        where += " (already there)" if registration["reused"] else ""
    else:
        where = "not registered: the gate refused it"
    work = job.place.work
    print(
        tabulate(
            [
                ("candidate", facts["candidate"]),
                ("report", facts["report"]),
                ("plan", facts["plan"]),
                ("registered", where),
                ("load it", f"mlflow.pyfunc.load_model('{registered_address(job.recipe, CANDIDATE)}')"),
                ("MLflow pages", f"mlflow server --backend-store-uri {registration['tracking_uri']} --host 127.0.0.1 --port 5000"),
                ("Prefect pages", f"PREFECT_HOME={work / 'prefect'} prefect server start --host 127.0.0.1"),
                ("data checks", f"python -m webbrowser {facts['checks']}"),
            ],
            tablefmt="plain",
        )
    )
