"""Whether hearts that are drawn from a hospital's private statistics look like patients whom nobody has seen.

    python -m fedcmr.simulations.benchmarks.shapes --site Siemens TRAIN TEST --site GE TRAIN TEST... --json FILE

Each site's training patients release their shapes as in round 1 of a study; hearts are drawn from that population, and
their geometry is compared with that of the site's test patients: the Wasserstein distance of every entry of the shape
vector, in units of the public hearts' spread. Beside it the distance of hearts as they are drawn without a release, and
that of the training patients themselves, which is what so few patients leave to chance.
"""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import wasserstein_distance

from fedcmr.client.training import load_patients
from fedcmr.server.federation.round import run_round
from fedcmr.server.federation.state import StudySite, initial_state
from fedcmr.server.generation.population import draw_population, measured
from fedcmr.server.generation.synthesis import EF_RANGE
from fedcmr.server.settings import load
from fedcmr.shared.case import load_cases, read_index
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.device import pick_device
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.shape import GEOMETRY_NAMES, ShapeDistribution, case_shape
from fedcmr.shared.version import add_version
from fedcmr.shared.views import slice_pairs
from fedcmr.simulations.in_process import SitesInProcess

NUM_HEARTS, NUM_SLICES = 200, 8
USUAL, PATIENTS = "hearts without a release", "training patients"


def main() -> int:
    """Draw, compare and print."""
    parser = argparse.ArgumentParser(
        prog="python -m fedcmr.simulations.benchmarks.shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    parser.add_argument(
        "--site",
        nargs=3,
        action="append",
        required=True,
        metavar=("VENDOR", "TRAIN", "TEST"),
        help="prepared cases of one vendor: who releases, and who is compared; may be given several times",
    )
    parser.add_argument(
        "--epsilons", nargs="+", type=float, default=[math.inf, 8.0, 3.0, 1.0], help="of a whole study; inf: no privacy"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    options = parser.parse_args()
    return run_command(lambda: _run(options))


def shapes_of(folder: Path) -> NDArray[np.float64]:
    """The standardised geometry of a folder's cases, shape (N, 13).

    Raises:
        UserError: There is no case with contours.
    """
    size = len(GEOMETRY_NAMES)
    rows = [case_shape(case, *slice_pairs(case))[:size].numpy() for case in load_cases(folder) if case.masks.any()]
    if not rows:
        raise UserError(f"{folder} holds no case with contours: there is no shape to compare")
    return np.array(rows, np.float64)


def distances(drawn: NDArray[np.float64], patients: NDArray[np.float64]) -> dict[str, float]:
    """Wasserstein distance of every entry that both know, and their mean."""
    found = {}
    for index, name in enumerate(GEOMETRY_NAMES):
        one, other = (values[np.isfinite(values[:, index]), index] for values in (drawn, patients))
        if len(one) and len(other):
            found[name] = float(wasserstein_distance(one, other))
    return {**found, "mean": float(np.mean(list(found.values())))}


def released(folders: Mapping[str, Path], epsilon: float) -> dict[str, ShapeDistribution]:
    """Vendor -> its population as a study's first round releases it, one site a vendor."""
    privacy = ["privacy.enabled=false"] if math.isinf(epsilon) else [f"privacy.target_epsilon={epsilon}"]
    config = load("default", ["federation.shape=true", "federation.adapter=statistics", *privacy])
    prior = load_prior()
    patients = {vendor: load_patients(folder, prior, [vendor]) for vendor, folder in folders.items()}
    sites = {vendor: StudySite({vendor: len(group)}, len(group)) for vendor, group in patients.items()}
    there = SitesInProcess(prior, patients, sites, pick_device(config.device))
    state, _ = run_round(initial_state(config, prior, sites), sites, config, there.train)
    return {
        vendor: ShapeDistribution(torch.from_numpy(mean), torch.from_numpy(state.shape_std[vendor]))
        for vendor, mean in state.shape_mean.items()
    }


def drawn_shapes(populations: Mapping[str, ShapeDistribution], vendor: str) -> NDArray[np.float64]:
    """The geometry of hearts of a vendor, of evenly spread ejection fractions; shape (`NUM_HEARTS`, 13)."""
    efs = torch.linspace(*EF_RANGE, NUM_HEARTS)
    rng = torch.Generator().manual_seed(0)
    hearts = draw_population(populations, [vendor] * NUM_HEARTS, NUM_SLICES, efs, rng, show_progress=True)
    return measured(hearts, NUM_SLICES)[0].numpy()


def compare(sites: Sequence[tuple[str, Path, Path]], epsilons: Sequence[float]) -> dict[str, Any]:
    """{vendor: {row: distances}}: the rows are `USUAL`, one for each epsilon, and `PATIENTS`."""
    folders = {vendor: train for vendor, train, _ in sites}
    for vendor, folder in folders.items():
        if vendor not in {info.vendor for info in read_index(folder)}:
            raise UserError(f"{folder} holds no case of {vendor}: expected --site VENDOR TRAIN TEST")
    tested = {vendor: shapes_of(test) for vendor, _, test in sites}
    usual = {vendor: drawn_shapes({}, vendor) for vendor in folders}
    rows = {vendor: {USUAL: distances(usual[vendor], tested[vendor])} for vendor in folders}
    for epsilon in epsilons:
        populations = released(folders, epsilon)
        name = "released without noise" if math.isinf(epsilon) else f"released, epsilon {epsilon:g}"
        for vendor in folders:
            rows[vendor][name] = distances(drawn_shapes(populations, vendor), tested[vendor])
    for vendor, folder in folders.items():
        rows[vendor][PATIENTS] = distances(shapes_of(folder), tested[vendor])
    return rows


def table_of(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Table:
    """For the terminal."""
    table = Table("vendor", "hearts", *GEOMETRY_NAMES, "mean", box=None, pad_edge=False)
    for vendor, of_vendor in rows.items():
        for name, found in of_vendor.items():
            cells = (f"{found[entry]:.2f}" if entry in found else "-" for entry in (*GEOMETRY_NAMES, "mean"))
            table.add_row(vendor, name, *cells)
    return table


def _run(options: argparse.Namespace) -> None:
    sites = [(vendor, Path(train), Path(test)) for vendor, train, test in options.site]
    rows = compare(sites, options.epsilons)
    Console(width=190).print(table_of(rows))
    if options.json:
        write_atomically(options.json, (json.dumps({"num_hearts": NUM_HEARTS, "rows": rows}, indent=1) + "\n").encode())
        print(f"wrote {options.json}")


if __name__ == "__main__":
    raise SystemExit(main())
