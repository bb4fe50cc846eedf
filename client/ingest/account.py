"""The end of `prepare` and of `import`: what became a case, what did not and why, and what can be trained on."""

from collections.abc import Collection
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fedcmr.client.ingest.destination import REFUSED_NAME
from fedcmr.client.ingest.prepare import Summary
from fedcmr.client.ingest.reasons import REASONS
from fedcmr.client.ingest.refused_list import LIST_NAME
from fedcmr.client.trainable import described, trainable
from fedcmr.shared.provenance import MIXED, PRIVATE, SIMULATED

KINDS = {
    PRIVATE: "private scans of real patients",
    SIMULATED: "simulated: no patient is behind any scan",
    MIXED: "simulated and real scans together",
}
"""Scans that are of no public set, in words."""


def print_account(summary: Summary, destination: Path, console: Console, not_fetched: Collection[str] = ()) -> None:
    """Print it.

    Args:
        summary: What was done.
        destination: The folder of cases.
        console: Where to.
        not_fetched: Codes among the refused of studies that an archive did not hand over.
    """
    console.print(f"recorded as {summary.provenance.terms or KINDS[summary.provenance.kind]}", soft_wrap=True)
    console.print(f"{summary.num_cases} {'case' if summary.num_cases == 1 else 'cases'}, {summary.num_new} of them new")
    counts = [
        ("not fetched", {code: number for code, number in summary.refused.items() if code in not_fetched}),
        ("studies refused", {code: number for code, number in summary.refused.items() if code not in not_fetched}),
        ("files and series left out", summary.left_out),
        ("to look at", summary.warnings),
    ]
    if any(number for _, numbers in counts for number in numbers.values()):
        table = Table("", "reason", "number", "meaning")
        for title, numbers in counts:
            for code, number in sorted(numbers.items()):
                table.add_row(title, code, str(number), REASONS[code])
        console.print(table)
        console.print(f"the same counts are in {destination / REFUSED_NAME}", soft_wrap=True)
        if summary.refused or summary.left_out:
            console.print(f"which ones: {destination / LIST_NAME}, which names patients", soft_wrap=True)
    console.print(described(trainable(destination)), soft_wrap=True)
