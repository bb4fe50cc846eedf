"""`fedcmr-client`: what a site's data manager does before the site takes part in a study."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import indent
from typing import Any

from rich.table import Table

from fedcmr.client.archive.cli import add_import
from fedcmr.client.check.folder import HTML_NAME, check, complain, write_report
from fedcmr.client.check.html_report import facts
from fedcmr.client.check.report import CheckReport, as_json, meaning
from fedcmr.client.deidentify import KEY_NAME, read_key
from fedcmr.client.deployment.cli import add_commands
from fedcmr.client.fetch.cli import add_fetch
from fedcmr.client.ingest.account import print_account
from fedcmr.client.ingest.destination import REFUSED_NAME
from fedcmr.client.ingest.layouts.kinds import LAYOUTS
from fedcmr.client.ingest.layouts.layout import SHORT_AXIS
from fedcmr.client.ingest.layouts.plain import parse_labels
from fedcmr.client.ingest.options import add_case_options
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.ingest.refused_list import printable
from fedcmr.client.whois import trace
from fedcmr.shared.case import INDEX_NAME, VENDORS
from fedcmr.shared.command_parser import CommandParser
from fedcmr.shared.console import plain_console
from fedcmr.shared.cores import num_cores
from fedcmr.shared.errors import UserError, run_command
from fedcmr.shared.provenance import PRIVATE_REAL, PUBLIC_SETS, SIMULATED_SCANS, public
from fedcmr.shared.site_facts import parse_vendors
from fedcmr.shared.version import add_version

console = plain_console()
STEPS = """\
the way into a study:
  1. prepare or import     scans become cases without identifiers
     check CASES           what is there, and a page with an image of each; whois where one is wrong
  2. init                  the site's settings and key, with the code that is installed
     check SITE            whether the site can join
  3. join or service       take part
     status, budget        what was answered and refused, what was spent and what is left
  4. fetch                 the study's synthetic cases
"""
PREPARE = """\
Scans -> cases without identifiers. Repeat an interrupted call to resume. What --format expects in SRC:

""" + "".join(f"  {name:<7} {indent(layout.expects, 10 * ' ').lstrip()}\n" for name, layout in LAYOUTS.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    return run_command(lambda: command(options))


def _parser() -> argparse.ArgumentParser:
    """Commands and their options."""
    parser = CommandParser(
        prog="fedcmr-client",
        description=__doc__.replace("`", ""),
        epilog=STEPS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(parser)
    commands: Any = parser.add_subparsers(required=True, metavar="COMMAND")

    sub = commands.add_parser(
        "prepare",
        help="scans -> cases without identifiers",
        description=PREPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sub.add_argument("source", type=Path, metavar="SRC", help="folder of scans; only read")
    sub.add_argument("destination", type=Path, metavar="DST", help="folder of cases to make, or to resume")
    sub.add_argument("--format", required=True, choices=tuple(LAYOUTS), help="how the scans are stored")
    files = sub.add_argument_group("how the files are to be read")
    files.add_argument(
        "--labels",
        metavar="rv=1,myo=2,lv=3",
        help="for --format plain and nnunet: what the masks' numbers mean; background=5 leaves one out",
    )
    files.add_argument(
        "--axes",
        choices=(SHORT_AXIS,),
        help="for --format plain and nnunet, what a header cannot say: every stack is a short axis seen from the apex, "
        "its slices along the longest voxel side; headers that show a short axis are read all the same",
    )
    files.add_argument(
        "--ef-table",
        type=Path,
        metavar="CSV",
        help="ejection fractions for scans without masks: a column patient, spelt as in the scans, and a "
        "column ef_fraction (0.55) or ef_percent (55)",
    )
    origin = sub.add_argument_group(
        "where the scans come from, which the study's report says; private where nothing says so"
    )
    source = origin.add_mutually_exclusive_group()
    source.add_argument(
        "--public",
        metavar="NAME",
        help=f"the scans are of this public data set: {', '.join(PUBLIC_SETS)}; "
        "DST remembers it with its terms, and reports name it (--format acdc, mnms and mnms2 imply it)",
    )
    source.add_argument(
        "--simulated",
        action="store_true",
        help="a program drew the scans, no patient is behind any: reports may show them",
    )
    source.add_argument(
        "--private",
        action="store_true",
        help="the scans are private and of real patients, whatever "
        "--format and the files say; without these three options all counts as that but a public set's own layout, "
        "and DICOM of which every file says that fedcmr-server synthesize made it",
    )
    files.add_argument(
        "--issuers-differ",
        action="store_true",
        help="for --format dicom, take a PatientID of another issuer (IssuerOfPatientID) for another "
        "patient: only if you know that each issuer numbers its own patients and is spelt in one way; "
        "otherwise a number is one patient whoever issued it",
    )
    add_case_options(sub, _positive)
    sub.set_defaults(command=_prepare)

    sub = commands.add_parser(
        "whois",
        help="which patient and scans are behind a pseudonym, for who holds the key",
        description="Computes the pseudonyms anew with the site's key, for no file links them with patients: from the "
        "scans, which are read again, and of studies that 'import' fetched from what it noted, which that key alone "
        "opens. What it prints names patients.",
    )
    sub.add_argument("destination", type=Path, metavar="DST", help="folder that 'prepare' or 'import' made")
    sub.add_argument(
        "pseudonyms",
        nargs="+",
        metavar="PSEUDONYM",
        help="of a case, or of a patient (the column group of cases.csv)",
    )
    sub.add_argument("--key", type=Path, help=f"file with the pseudonyms' secret (default: {KEY_NAME} next to DST)")
    sub.add_argument(
        "--source",
        type=Path,
        nargs="+",
        default=[],
        metavar="SRC",
        help="folders of the scans (default: those that 'prepare' was called with; after 'import' none is needed)",
    )
    sub.add_argument(
        "--num-processes",
        type=_positive,
        default=num_cores(),
        help="child processes that read the scans (default: one per core that this process may use, %(default)s)",
    )
    sub.set_defaults(command=_whois)

    sub = commands.add_parser(
        "check",
        help="what a folder of cases holds, or whether a site can join its study",
        description="Reads every case of DST, prints what is there and why studies were refused, "
        "and writes DST/check.json and DST/check.html, a report with images that stays at the "
        "site. Exits with 2 where a case is damaged, or nothing can be trained on.",
    )
    sub.add_argument(
        "destination",
        type=Path,
        metavar="DST",
        help="folder that 'prepare' made, or a site's folder: then whether the site can join its study",
    )
    sub.add_argument("--json", action="store_true", help="print JSON instead of tables")
    sub.set_defaults(command=_check)

    sub = commands.add_parser("budget", help="how much privacy the site's releases have cost, and what is left")
    sub.add_argument("site", type=Path, metavar="SITE_FOLDER", help="folder of site.yaml")
    sub.add_argument("--json", action="store_true", help="print JSON")
    sub.add_argument(
        "--repair",
        action="store_true",
        help="repair a lost or damaged copy of the ledger from the other, or accept a clock that was set "
        "back; is noted in the ledger and lowers nothing that either copy says was spent",
    )
    sub.add_argument(
        "--compare",
        type=Path,
        metavar="REPORT.json",
        help="compare with what the coordinator of a study "
        "says this site has released; exits with 2 where the ledger has forgotten some of it",
    )
    sub.set_defaults(command=_budget)

    sub = commands.add_parser("code", help="print the SHA-256 of the installed code, for policy.allowed_code_sha256")
    sub.set_defaults(command=_code)

    sub = commands.add_parser("init", help="write a commented site.yaml")
    sub.add_argument("site", type=Path, metavar="SITE_FOLDER", help="folder to write it to; made where needed")
    sub.add_argument("--name", required=True, help="the site's name in the study")
    sub.add_argument(
        "--vendor",
        required=True,
        nargs="+",
        metavar="V",
        help=f"of the site's scanners, of {', '.join(VENDORS)}; of several each with a public round "
        "number near its patients: Siemens=40 Philips=20",
    )
    sub.add_argument(
        "--nominal-patients",
        required=True,
        type=_positive,
        help="public round number near that of all patients, one with scans of two vendors once; divides "
        "sums over patients",
    )
    sub.add_argument("--max-epsilon", type=float, help="cap on epsilon over all studies together")
    sub.add_argument("--max-delta", type=float, help="cap on delta; at most, and by default, about 0.1 / patients")
    sub.add_argument(
        "--ledger-replica",
        metavar="FILE",
        help="of the ledger's second copy, on another disk; its folder must be there when the site joins",
    )
    sub.add_argument("--ledger-witness", dest="ledger_replica", help=argparse.SUPPRESS)  # its name in earlier versions
    sub.add_argument(
        "--ledger-same-disk",
        action="store_true",
        help="keep both copies on one disk all the same: a "
        "restored backup of it then forgets what was spent, and nothing at the site notices",
    )
    sub.add_argument(
        "--coordinator",
        metavar="HOST:PORT",
        help="of a study between institutions: also makes the "
        "site's key, and allows the code that is installed here and no other",
    )
    sub.add_argument("--authority", type=Path, metavar="ca.crt", help="the coordinator's certificate authority; copied")
    sub.set_defaults(command=_init)

    add_import(commands, _positive)
    add_commands(commands)
    add_fetch(commands, _positive)
    return parser


def _positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _prepare(options: argparse.Namespace) -> None:
    """Prepare a folder and account for what was refused."""
    key = None if options.key is None else read_key(options.key)
    labels = None if options.labels is None else parse_labels(options.labels)
    provenance = (
        public(options.public)
        if options.public is not None
        else SIMULATED_SCANS
        if options.simulated
        else PRIVATE_REAL
        if options.private
        else None
    )
    console.print(f"preparing {options.source} ({options.format}) -> {options.destination}", soft_wrap=True)
    summary = prepare(
        options.source,
        options.destination,
        options.format,
        labels=labels,
        ef_table=options.ef_table,
        key=key,
        num_processes=options.num_processes,
        keep_suspected=options.keep_suspected,
        provenance=provenance,
        vendor=options.vendor,
        one_study_one_patient=options.one_study_one_patient,
        issuers_differ=options.issuers_differ,
        contours=options.contours,
        segmenter=options.segmenter,
        axes=options.axes,
    )
    print_account(summary, options.destination, console)


def _whois(options: argparse.Namespace) -> None:
    """Print which patient and scans are behind pseudonyms."""
    key = read_key(options.destination.resolve().parent / KEY_NAME if options.key is None else options.key)
    found = trace(options.destination, options.pseudonyms, key, options.source, options.num_processes)
    # No table: a number or a path that is cut, or broken over two lines, finds no scan.
    for one in found:
        console.print(one.pseudonym)
        for name in ("patient", "accession", "study", "path"):
            console.print(f"  {name:<10}{printable(getattr(one.place, name))}", soft_wrap=True)
    missing = len(set(options.pseudonyms) - {one.pseudonym for one in found})
    if missing:
        raise UserError(
            f"{missing} of the pseudonyms {'is' if missing == 1 else 'are'} of no study in these scans, and of none "
            "that was imported: give the folder that it was prepared from with --source"
        )


def _check(options: argparse.Namespace) -> None:
    """Write what a folder of cases holds as JSON and as HTML, and print it."""
    if (options.destination / "site.yaml").is_file():
        from fedcmr.client.deployment.cli import check_site

        check_site(options.destination, options.json, console)
        return
    if not options.destination.is_dir():
        raise UserError(f"{options.destination} is no folder: give a folder of cases, or a site's folder")
    if not any((options.destination / name).exists() for name in (INDEX_NAME, REFUSED_NAME)):
        raise UserError(
            f"{options.destination} is neither a folder of cases, made by 'fedcmr-client prepare' or 'import', nor a "
            "site's folder, made by 'fedcmr-client init'"
        )
    report = check(options.destination)
    write_report(options.destination, report)
    if options.json:
        print(json.dumps(as_json(report), indent=2, allow_nan=False))
    else:
        table = Table("", str(options.destination))
        for name, value in facts(report):
            table.add_row(name, value)
        console.print(table)
        _print_marks(report)
        console.print(f"report with images, for the site alone: {options.destination / HTML_NAME}", soft_wrap=True)
    complain(options.destination, report)


def _print_marks(report: CheckReport) -> None:
    """Troubles, flags and refusals by code, where there are any."""
    table = Table("", "code", "number", "meaning")
    for title, numbers in (
        ("cases that cannot be used", report.troubles),
        ("not trained on", report.not_trained),
        ("cases to look at", report.flags),
        ("studies refused", report.refused),
        ("files and series left out", report.left_out),
        ("used all the same", report.other_warnings),
    ):
        for code, number in numbers.items():
            table.add_row(title, code, str(number), meaning(code))
    if table.row_count:
        console.print(table)


def _budget(options: argparse.Namespace) -> None:
    """Print what the ledger has charged."""
    # Imported here: the accountant takes seconds to load, and no other command needs it.
    from fedcmr.client.budget import open_ledger, open_test_ledger, print_budget, read_budget
    from fedcmr.client.compare import compare, describe
    from fedcmr.client.compare import complain as complain_of

    settings, ledger = open_ledger(options.site)
    test_ledger = open_test_ledger(settings)
    if options.repair:
        ledger.repair()
        if test_ledger is not None:
            test_ledger.repair()
    if options.compare is not None:
        found = compare(settings.name, ledger, test_ledger, options.compare)
        print(json.dumps(asdict(found), indent=2) if options.json else "\n".join(describe(found)))
        complain_of(found, settings)
        return
    budget = read_budget(settings, ledger)
    if test_ledger is not None:
        budget["test"] = read_budget(settings, test_ledger)
    if options.json:
        print(json.dumps(budget, indent=2, allow_nan=False))
        return
    print_budget(budget, console)
    if "test" in budget:
        console.print("test patients, who have a budget of their own: none of them is trained on")
        print_budget(budget["test"], console)
    if options.repair:
        console.print(
            "repaired: compare the last lines with the reports of the studies this site took part in; a run "
            "that is missing was spent all the same"
        )


def _code(options: argparse.Namespace) -> None:
    """Print the fingerprint of the code."""
    from fedcmr.client.code_hash import code_sha256

    print(code_sha256())


def _init(options: argparse.Namespace) -> None:
    """Write a site's settings."""
    from fedcmr.client.code_hash import code_sha256
    from fedcmr.client.deployment.connection import copy_authority
    from fedcmr.client.deployment.node_key import make_node_key
    from fedcmr.client.policy import SitePolicy, SiteSettings, round_down, write_site
    from fedcmr.shared.privacy import largest_delta

    if (options.coordinator is None) != (options.authority is None):
        raise UserError("--coordinator and --authority belong together: give both or none")
    deployed = options.coordinator is not None
    largest = largest_delta(max(1, options.nominal_patients))
    max_delta = min(SitePolicy.max_delta, round_down(largest)) if options.max_delta is None else options.max_delta
    caps = {"max_epsilon": options.max_epsilon, "max_delta": max_delta}
    policy = SitePolicy(
        **{name: value for name, value in caps.items() if value is not None},
        allowed_code_sha256=[code_sha256()] if deployed else [],
    )
    authority = copy_authority(options.authority, options.site) if deployed else None
    vendors = parse_vendors(options.vendor, options.nominal_patients)
    settings = SiteSettings(
        options.name,
        vendors,
        options.nominal_patients,
        coordinator=options.coordinator,
        ledger_replica=options.ledger_replica,
        ledger_same_disk=options.ledger_same_disk,
        authority=authority,
        policy=policy,
    )
    path = write_site(options.site, settings)
    console.print(f"wrote {path}: read its comments before the site takes part", soft_wrap=True)
    if deployed:
        public = make_node_key(options.site)
        console.print(
            f"send {public} to the coordinator, with the site's name, vendors and nominal patients; then "
            "'fedcmr-client check' and 'join' on this folder",
            soft_wrap=True,
        )


if __name__ == "__main__":
    sys.exit(main())
