"""Summary of a run on the terminal: results, privacy, time, and where the files are."""

import json
import resource
import sys

from rich.table import Table

from fedcmr.server.federation.evaluation import federated_table
from fedcmr.server.report.collect import results_table, who_took_part
from fedcmr.server.report.summary import from_the_sites
from fedcmr.server.run_folder import RunFolder
from fedcmr.server.settings import MAIN_TASK
from fedcmr.server.tasks.registry import tasks_of
from fedcmr.shared.console import plain_console

FILES = {
    "report.html": "the report, one file for a browser",
    "report.json": "its figures",
    "report.csv": "the same figures as a tidy CSV",
    "synthetic": "the synthetic data set with labels and datasheet",
    "generator.safetensors": "what the sites added to the public prior",
    "regressor.safetensors": "the ResNet50; regressor.md is its card",
    "segmentation.safetensors": "the U-Net; segmentation.json is its card",
    "metrics.jsonl": "every round and stage, measured",
    "sites": "the hospitals: prepared cases, site settings, ledgers",
}

PIPE_WIDTH = 110
"""Columns where there is no terminal: the table of results, unbroken."""


def print_summary(run: RunFolder) -> None:
    """Print the tables of a finished run; for an unfinished one what is there."""
    console = plain_console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    if (run.path / "report.json").exists():
        report = json.loads((run.path / "report.json").read_text(encoding="utf-8"))
        console.print(results_table(run))
        if sentence := from_the_sites(report):
            console.print(sentence, highlight=False, soft_wrap=True)
        for name, task in tasks_of(run.config).items():
            for test_set in report.get(task.part) or {} if name != MAIN_TASK else ():
                for table in task.tables(report, test_set):
                    console.print(table)
        if report.get("federated_evaluation"):
            console.print(federated_table(report["federated_evaluation"]))
        for sentence in who_took_part(run):
            console.print(sentence, highlight=False, soft_wrap=True)
        privacy = report["privacy"]
        if privacy["epsilon"] is None:
            console.print("privacy: none, it was switched off")
        else:
            console.print(
                f"privacy: epsilon {privacy['epsilon']:.2f} at delta {privacy['delta']:g} "
                f"per patient ({privacy['accountant']} accountant)",
                highlight=False,
            )
    stages = Table(title="stages", title_justify="left")
    stages.add_column("stage")
    stages.add_column("seconds", justify="right")
    for stage, seconds in run.stage_seconds().items():
        stages.add_row(stage, f"{seconds:.0f}")
    console.print(stages)
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    console.print(f"peak memory of the largest process: {peak / 2**20:.1f} GB", highlight=False)
    for name, meaning in FILES.items():
        if (run.path / name).exists():
            console.print(f"{run.path / name}: {meaning}", highlight=False, soft_wrap=True)
