"""How the audits' figures look on a terminal, and the figure of the nearest pairs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.table import Table
from torch import Tensor

from fedcmr.simulations.audit.copies import Nearest, Pairs

NUM_PAIRS = 6


def canaries(figures: Sequence[Mapping[str, Any]]) -> Table:
    """One row per build."""
    table = Table(title="one-run audit with canary patients", title_justify="left")
    headings = (
        "build",
        "claimed epsilon",
        "lower bound (95 %)",
        "provable at most",
        "right guesses",
        "canaries",
        "p of the claim",
        "verdict",
    )
    for name in headings:
        table.add_column(name, justify="left" if name in ("build", "verdict") else "right")
    for row in figures:
        runs = f", {row['num_runs']} runs" if row["num_runs"] > 1 else ""
        name = "control: all took part" if row["control"] else row["build"].replace("_", " ")
        table.add_row(
            f"{name} ({row['adapter']}, {row['num_steps']} steps{runs})",
            "-" if row["control"] else f"{row['claimed_epsilon']:.2f}",
            f"{row['lower_bound']:.2f}",
            f"{row['highest_provable']:.2f}",
            f"{row['num_correct']} of {row['num_guesses']}",
            f"{row['num_canaries']} at {row['num_sites']} sites",
            "-" if row["control"] else f"{row['p_value']:.2g}",
            row["verdict"],
        )
    return table


def membership(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row per attack."""
    table = Table(title="membership inference", title_justify="left")
    for name in (
        "attack",
        "members / others",
        "AUC (95 %)",
        "TPR at 1 % FPR (95 %)",
        "largest member / other, sd",
        "members above all others (p)",
        "control: members / members, AUC (p)",
    ):
        table.add_column(name, justify="left" if name == "attack" else "right")
    for attack, row in figures.items():
        table.add_row(
            attack,
            f"{row['num_members']} / {row['num_others']}",
            "{:.3f} ({:.3f} to {:.3f})".format(row["auc"], *row["auc_ci95"]),
            "{:.3f} ({:.3f} to {:.3f})".format(row["tpr"], *row["tpr_ci95"]),
            f"{row['largest_member']:.2f} / {row['largest_other']:.2f}",
            f"{row['num_above_all_others']} ({row['p_above_all_others']:.2g})",
            f"{row['control_auc']:.3f} ({row['p_control']:.2g})",
        )
    return table


def copies(figures: Mapping[str, Any]) -> Table:
    """One figure per row."""
    table = Table(title="copies", title_justify="left", show_header=False)
    low, high = figures["share_ci95"]
    rows = (
        ("synthetic images", f"{figures['num_images']} ({', '.join(figures['vendors'])})"),
        ("training / held-out patients", f"{figures['num_training']} / {figures['num_held_out']}"),
        ("nearer to training than to held-out (0.5: no copies)", f"{figures['share']:.3f} ({low:.3f} to {high:.3f})"),
        ("smallest distance between two people", f"{figures['smallest_between_people']:.3f}"),
        ("smallest distance to a training patient", f"{figures['smallest_to_training']:.3f}"),
        (f"copies of training images (below {figures['threshold']:.3f})", f"{figures['num_copies']}"),
        ("as near to a held-out image", f"{figures['num_near_held_out']}"),
    )
    for name, value in rows:
        table.add_row(name, value)
    return table


def draw_pairs(path: Path, parts: Sequence[tuple[Pairs, Pairs, Pairs, Nearest, Nearest]]) -> None:
    """Write the synthetic images nearest to a training patient, over that patient's and the nearest held-out one.

    The figure shows patients who trained: it is only for those who may see them.

    Args:
        path: A PNG in a folder that is there.
        parts: Per vendor the synthetic, training and held-out images, and the distances of the first to the others.
    """
    found = sorted(
        (
            (float(near.distance[row].min()), number, row)
            for number, (_, _, _, near, _) in enumerate(parts)
            for row in range(len(near.distance))
        )
    )[:NUM_PAIRS]
    figure = Figure(figsize=(1.9 * len(found), 11), layout="constrained")
    axes = figure.subplots(6, len(found), squeeze=False)
    for column, (_, number, row) in enumerate(found):
        synthetic, training, held_out, near, far = parts[number]
        shown: list[tuple[str, Tensor, float | None]] = [("synthetic", synthetic.images[row], None)]
        for name, pairs, nearest in (("training", training, near), ("held out", held_out, far)):
            patient = int(np.argmin(nearest.distance[row]))
            index = int(nearest.index[row, patient])
            shown.append((name, pairs.images[index], float(nearest.distance[row, patient])))
        for place, (name, pair, distance) in enumerate(shown):
            for phase in range(2):
                axis = axes[2 * place + phase, column]
                axis.imshow(pair[phase].numpy(), cmap="gray", vmin=-1, vmax=1)
                axis.set_axis_off()
                if phase == 0:
                    axis.set_title(name if distance is None else f"{name}, {distance:.3f}", fontsize=8)
    figure.savefig(path, dpi=90)
