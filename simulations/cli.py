"""`fedcmr-simulate`: several hospitals, one machine, one command."""

import argparse
import sys
from pathlib import Path

from fedcmr.server.command_line import SettingsParser
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.version import add_version


def main() -> int:
    """Parse the command line and run the study."""
    parser = SettingsParser(
        prog="fedcmr-simulate",
        description="Simulate a study on this machine: hospitals with their scanners, private federated training, the "
        "synthetic data set, the regressor and the report. The same command again resumes where it was interrupted.",
        epilog="example: fedcmr-simulate --config acdc data_root=/data/acdc privacy.target_epsilon=3",
    )
    add_version(parser)
    parser.add_config()
    parser.add_argument(
        "--from",
        dest="earlier",
        type=Path,
        metavar="RUN",
        help="begin a new run, --out, from what this one has finished, with its settings: for other settings of "
        "synthesis, regression, segmentation, tasks or evaluation (another baseline) without new private rounds",
    )
    parser.add_argument("--out", type=Path, help="run folder (default: runs/CONFIG)")
    parser.add_argument(
        "--until",
        metavar="STAGE",
        help="stop after this stage: hospitals, prepare, federation, synthesis ...",
    )
    parser.add_argument(
        "--rehearsal", action="store_true", help="prepare, then only rehearse the study: nothing is trained or charged"
    )
    parser.add_argument(
        "--flower",
        action="store_true",
        help="let the sites answer under Flower's own simulation (Ray) instead of in one process tree; slower, and "
        "needs a source checkout with flwr[simulation]",
    )
    parser.add_settings()
    arguments = parser.parse_args()
    return run_command(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    # Imported here: `--help` and a mistyped setting wait for neither torch nor Flower.
    from fedcmr.server.run_folder import CONFIG_NAME
    from fedcmr.simulations.config import default_folder, load_study

    earlier = arguments.earlier
    if earlier is not None and (arguments.out is None or arguments.rehearsal):
        raise UserError("--from begins a new run: give its folder as --out, and leave --rehearsal out")
    name = arguments.config if earlier is None else arguments.given_config or earlier / CONFIG_NAME
    config = load_study(name, arguments.settings)
    from fedcmr.simulations.run import rehearse, simulate
    from fedcmr.simulations.summary import print_summary

    out = arguments.out or default_folder(arguments.config)
    print(f"study {name}: {config.hospitals.source} hospitals -> {out}", file=sys.stderr)
    if arguments.rehearsal and arguments.flower:
        raise UserError("--rehearsal is for one process tree: leave --flower out")
    if arguments.rehearsal:
        rehearse(config, out)
        return
    run = simulate(config, out, arguments.until, arguments.flower, earlier)
    print_summary(run)


if __name__ == "__main__":
    sys.exit(main())
