"""`fedcmr-audit`: attacks on the privacy claim, each with a table, JSON and a section of the report.

A run's audits read its sites' patients: they are for a simulation, or for who may see those cases.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from fedcmr.server.command_line import SettingsParser
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.version import add_version
from fedcmr.simulations.audit.file_names import SIMULATED_PAIRS


def main() -> int:
    """Parse the command line and run one audit."""
    arguments = _parser().parse_args()
    return run_command(lambda: _run(arguments))


def _parser() -> SettingsParser:
    parser = SettingsParser(
        prog="fedcmr-audit",
        description="Attack what sites release. A passed audit is evidence, no proof; a failed one of canaries refutes "
        "the claim with 95 % confidence. With a run folder the figures also go to RUN/audit.json, from where "
        "'fedcmr-server report RUN' shows them.",
    )
    add_version(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="canaries | membership | copies")

    canaries = commands.add_parser(
        "canaries",
        help="lower bound on epsilon from patients who took part by a coin",
        description="One-run audit (Mahloujifar et al. 2024): canary patients at many invented sites of a study take "
        "part in the real private training, each by a coin; how many coins can be guessed from what the sites release "
        "bounds epsilon from below. It puts the client's training code and the study's plan of noise to the test: "
        "clip, noise, unit, what a ledger adds up. It does not look at a site's installation, at its ledger's file or "
        "at time. A control lets every canary take part, so that there is nothing to find.",
    )
    _add_study(canaries, "take settings and prior from this run folder")
    canaries.add_argument(
        "--canaries",
        type=int,
        default=500,
        metavar="M",
        help="patients with a coin; 500 right guesses refute claims up to 8.5 at delta 1e-3 (default: %(default)s)",
    )
    canaries.add_argument(
        "--guesses",
        type=int,
        metavar="R",
        help="how many are guessed, chosen beforehand: all can refute the highest claims; fewer leave the doubtful "
        "ones out and often prove more about a sound build (default: M)",
    )
    canaries.add_argument(
        "--broken",
        action="store_true",
        help="also audit builds that are broken on purpose, and a sound one, with the whole budget in one step",
    )
    canaries.add_argument(
        "--claim", type=float, metavar="EPSILON", help="target of these builds (default: that of the study)"
    )
    canaries.add_argument(
        "--repeats", type=int, default=24, help="runs of the study whose ledger forgets (default: %(default)s)"
    )

    membership = commands.add_parser(
        "membership",
        help="can training patients be told from others",
        description="Denoising loss, SimA and a likelihood ratio against shadow generators, on a run's generator or, "
        "without one, on a study of freshly simulated patients.",
    )
    _add_study(membership, "attack this run's generator with its training and test patients")
    membership.add_argument(
        "--patients",
        type=int,
        default=100,
        metavar="N",
        help="without RUN: patients per hospital who train, and as many who do not (default: 100)",
    )
    membership.add_argument("--shadows", type=int, default=8, help="shadow generators; 0: none (default: 8)")
    membership.add_argument(
        "--overfitted",
        action="store_true",
        help="attack a generator without privacy instead, all weights trained for long: must be caught",
    )

    copies = commands.add_parser(
        "copies",
        help="are synthetic images copies of training patients",
        description="Distance of every synthetic image to the nearest training and the nearest held-out patient of "
        "its vendor, whatever the rotation, the hand and a small shift.",
    )
    copies.add_argument("run", type=Path, metavar="RUN", help="finished run folder")
    copies.add_argument("--synthetic", type=Path, metavar="DIR", help="synthetic cases (default: RUN/synthetic)")
    copies.add_argument("--cases", type=int, metavar="N", help="only the first N of each vendor (default: all)")
    copies.add_argument(
        "--pairs",
        type=Path,
        metavar="PNG",
        help="figure of the nearest pairs, for the site's own eyes: it shows training patients (default: "
        f"RUN/{SIMULATED_PAIRS} where all of these and of the test patients are recorded as simulated, none elsewhere)",
    )
    copies.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    return parser


def _add_study(parser: SettingsParser, help_of_run: str) -> None:
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN", help=help_of_run)
    parser.add_argument("--seed", type=int, default=0, help="of invented patients (default: 0)")
    parser.add_argument("--prior", type=Path, help="public prior, without RUN (default: the one that ships)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write the figures there")
    parser.add_settings()


def _run(arguments: argparse.Namespace) -> None:
    if arguments.json and not arguments.json.resolve().parent.is_dir():
        raise UserError(f"{arguments.json.parent} is no folder: give a path for --json in a folder that is there")
    if arguments.run and getattr(arguments, "prior", None):
        raise UserError("--prior is for audits without a run folder: RUN names its own")
    # Imported here: --help needs neither torch nor Flower.
    from fedcmr.simulations.audit import commands

    figures = getattr(commands, arguments.command)(arguments)
    if arguments.json:
        _write(arguments.json, figures)
    if arguments.run:
        from fedcmr.server.report.audit import AUDIT_NAME, read_audit

        path = arguments.run / AUDIT_NAME
        _write(path, {**(read_audit(arguments.run) or {}), arguments.command: figures})
        print(f"{path} holds the figures: 'fedcmr-server report {arguments.run}' shows them", file=sys.stderr)


def _write(path: Path, figures: Any) -> None:
    from fedcmr.server.report.build import as_json
    from fedcmr.shared.checkpoint import write_atomically

    write_atomically(path, (json.dumps(as_json(figures), indent=2) + "\n").encode())


if __name__ == "__main__":
    sys.exit(main())
