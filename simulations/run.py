"""The whole path on one machine: hospitals, prepared cases, the federation, the study, a summary."""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedcmr.client.ingest.layouts.kinds import LAYOUTS
from fedcmr.client.ingest.layouts.plain import parse_labels
from fedcmr.client.ingest.prepare import prepare
from fedcmr.client.policy import SitePolicy, SiteSettings, load_site, write_site
from fedcmr.client.trainable import trainable
from fedcmr.server.experiments.continuation import begin_from
from fedcmr.server.experiments.preconditions import check_can_run, check_patients_unseen
from fedcmr.server.federation.state import StudySite, check_delta, write_study
from fedcmr.server.rehearsal.rehearsal import FILE_NAME, show
from fedcmr.server.run_folder import LOG_NAME, RunFolder, begun_run, copy_cases
from fedcmr.server.settings import Config, HospitalsConfig
from fedcmr.server.study import STAGES as SERVER_STAGES
from fedcmr.server.study import Stage, Study, run_stages
from fedcmr.shared.cores import num_cores
from fedcmr.shared.errors import UserError
from fedcmr.shared.permissions import private_folder
from fedcmr.shared.privacy import largest_delta
from fedcmr.shared.provenance import SIMULATED_SCANS, Provenance, of_folder, public
from fedcmr.simulations.baselines import run_baselines
from fedcmr.simulations.flower_engine import simulating_superlink
from fedcmr.simulations.grid import make_grid, run_server_app
from fedcmr.simulations.hospital import write_hospital


@dataclass(frozen=True)
class Hospital:
    """One site of a simulation.

    Attributes:
        name: Name of the site's folder.
        vendors: Vendor of its scanners -> public number of patients.
        train: Folder of its prepared cases, or where they will be.
        nominal_patients: The public number that divides its updates.
        provenance: Where its scans come from.
        test: Folder of its prepared test patients; None where the test patients are no site's.
    """

    name: str
    vendors: dict[str, int]
    train: Path
    nominal_patients: int
    provenance: Provenance
    test: Path | None = None


def simulate(
    config: Config,
    out: Path,
    until: str | None = None,
    under_flower: bool = False,
    earlier: Path | None = None,
) -> RunFolder:
    """Run the study, or resume it.

    Args:
        config: The settings.
        out: The run folder.
        until: The last of `STAGES` to do; None for all.
        under_flower: Whether the sites answer under Flower's own simulation (Ray), and not in this process tree.
        earlier: A run folder whose finished stages the new one takes over: see
            `fedcmr.server.experiments.continuation.begin_from`.

    Raises:
        UserError: Something that the user can correct.
    """
    if until is not None and until not in (names := [stage.name for stage in STAGES]):
        raise UserError(f"--until: expected one of {', '.join(names)}, got {until!r}")
    check_can_run(config)
    if earlier is None:
        _check_sites(config)
    else:
        begin_from(earlier, out, config, _take_sites)
    with begun_run(out, config) as run:
        if not run_stages(Study(run), SITE_STAGES, until):
            if under_flower:
                _run_under_flower(run, until or "")
            else:
                with make_grid(run) as grid:
                    run_server_app(grid, {"run-dir": str(run.path.resolve()), "until": until or ""})
    return run


def _take_sites(earlier: RunFolder, folder: Path) -> None:
    """Give a new run folder an earlier run's sites: the same cases and ledgers, as they are the same patients.

    Neither is copied, so the earlier run stays where it is for as long as the new one needs its sites.
    """
    for name in earlier.site_names():
        site = load_site(earlier.path / "sites" / name)
        place = folder.resolve() / "sites" / name

        def moved(path: Path | None, place: Path = place) -> str | None:
            return None if path is None else os.path.relpath(path, place)

        write_site(
            place,
            replace(
                site,
                data=str(moved(site.data_path)),
                test=moved(site.test_path),
                ledger=str(moved(site.ledger_path)),
                ledger_replica=moved(site.replica_path),
                test_ledger=str(moved(site.test_ledger_path)),
            ),
        )


def _run_under_flower(run: RunFolder, until: str) -> None:
    """The ServerApp's stages under Flower's simulation; no process of it is left.

    Raises:
        UserError: Flower did not start, or the study did not come to its end.
    """
    last = next(stage for stage in STAGES if stage.name == (until or STAGES[-1].name))
    run.unlock()  # the ServerApp is another process and takes it
    with tempfile.TemporaryDirectory(prefix="fedcmr-flower-") as folder, simulating_superlink(Path(folder)) as engine:
        engine.run(run.path, len(run.site_names()), num_cores(), until=until, stream=True)
    if last.wanted(run.config) and not last.has_parts and not run.is_done(last.name):
        raise UserError(
            f"the study has not come to {last.name}: what Flower showed above, and {run.path / LOG_NAME}, say why"
        )


def rehearse(config: Config, out: Path) -> None:
    """Prepare a study and rehearse it, and print what was found; it can be run in the same folder afterwards.

    Raises:
        UserError: Something that the user can correct, or the study cannot start.
    """
    run = simulate(config, out, "prepare")
    with make_grid(run) as grid:
        run_server_app(grid, {"run-dir": str(run.path.resolve()), "rehearsal": True})
    show(json.loads((run.path / FILE_NAME).read_text(encoding="utf-8")))


def _check_sites(config: Config) -> None:
    """Look, before a run folder is made, whether the sites are where the settings say and their numbers can be.

    Raises:
        UserError: They are not.
    """
    hospitals = config.hospitals
    names = [_site_name(vendor, index) for index, vendor in enumerate(hospitals.vendors)]
    if hospitals.source != "phantom":
        root = Path(config.data_root or "")
        if not root.is_dir():
            raise UserError(f"data_root={root} is not a folder: give the one that holds the scans")
        names = {
            "acdc": lambda: list(hospitals.acdc_train_folds),
            "prepared": lambda: _prepared_names(root),
            "layouts": lambda: list(_layout_options(hospitals, root)),
        }[hospitals.source]()
    if not isinstance(hospitals.nominal_patients, Mapping):  # numbers by site and vendor are looked at with the cases
        check_delta(config.privacy, dict.fromkeys(names, hospitals.nominal_patients or hospitals.num_train))


def _write_hospitals(study: Study) -> None:
    """The simulated hospitals' exports: DICOM with masks, train and test patients apart."""
    run, config = study.run, study.config
    hospitals = config.hospitals
    for index, vendor in enumerate(hospitals.vendors):
        name = _site_name(vendor, index)
        for part, num in (("train", hospitals.num_train), ("test", hospitals.num_test)):
            write_hospital(
                run.path / "hospitals" / name / part,
                vendor,
                num,
                hospitals.num_slices,
                hospitals.num_phases,
                seed=config.seed * 1000 + 2 * index + (part == "test"),
                prefix=f"{name}-{part}",
                num_processes=num_cores(),
            )


def _prepare(study: Study) -> None:
    """Prepare every site's training cases and the held-out ones, and write the study's public facts."""
    run, config = study.run, study.config
    source = config.hospitals.source
    root = Path(config.data_root) if config.data_root is not None else Path()
    sites = {
        "phantom": _prepare_phantom,
        "acdc": _prepare_acdc,
        "prepared": _use_prepared,
        "layouts": _prepare_layouts,
    }[source](run, root)
    tests = [index.parent for index in sorted((run.path / "test").glob("**/cases.csv"))]
    check_patients_unseen(config, [*(site.train for site in sites), *tests])
    check_delta(config.privacy, {site.name: site.nominal_patients for site in sites})
    for site in sites:
        policy = SitePolicy(
            max_epsilon=config.privacy.target_epsilon,
            max_delta=min(config.privacy.target_delta, largest_delta(site.nominal_patients)),
            min_sample_rate=config.privacy.sample_rate,
            min_patients=2,
            max_local_steps=max(SitePolicy.max_local_steps, config.federation.local_steps),
            max_views=max(SitePolicy.max_views, config.federation.num_views),
            allow_without_privacy=not config.privacy.enabled,
        )
        folder = run.path / "sites" / site.name
        data = os.path.relpath(site.train, folder)
        test = None if site.test is None else os.path.relpath(site.test, folder)
        write_site(
            folder,
            SiteSettings(
                site.name,
                site.vendors,
                site.nominal_patients,
                data=data,
                test=test,
                ledger_same_disk=True,
                prior=config.prior,
                policy=policy,
            ),
        )
    write_study(run, {site.name: StudySite(site.vendors, site.nominal_patients, site.provenance) for site in sites})


def _prepare_phantom(run: RunFolder, root: Path) -> list[Hospital]:
    """One site per vendor; its test patients become part of the test set `hospitals`."""
    config = run.config
    sites = []
    for index, vendor in enumerate(config.hospitals.vendors):
        name = _site_name(vendor, index)
        train = run.path / "sites" / name / "train"
        for part, target in (("train", train), ("test", run.path / "test" / "hospitals" / name)):
            prepare(
                run.path / "hospitals" / name / part,
                target,
                "dicom",
                key=_key(config),
                num_processes=num_cores(),
                provenance=SIMULATED_SCANS,
            )
        numbers = nominal_patients(config.hospitals, name, [vendor])
        sites.append(Hospital(name, numbers, train, sum(numbers.values()), SIMULATED_SCANS, target))
    return sites


def _prepare_acdc(run: RunFolder, root: Path) -> list[Hospital]:
    """Sites and test set by the fixed folds of ACDC's patient numbers."""
    config = run.config
    sites = []
    for name, fold in config.hospitals.acdc_train_folds.items():
        train = run.path / "sites" / name / "train"
        prepare(root, train, "acdc", folds=[fold], key=_key(config), num_processes=num_cores())
        sites.append(_hospital(config, name, train))
    folds = [config.hospitals.acdc_test_fold]
    prepare(root, run.path / "test" / "acdc", "acdc", folds=folds, key=_key(config), num_processes=num_cores())
    return sites


def _use_prepared(run: RunFolder, root: Path) -> list[Hospital]:
    """Sites whose cases are prepared already: DATA_ROOT/SITE/train is used in place, DATA_ROOT/SITE/test is copied."""
    sites = []
    for name in _prepared_names(root):
        site = _hospital(run.config, name, (root / name / "train").resolve())
        test = root / name / "test"
        sites.append(replace(site, test=test.resolve()) if test.is_dir() else site)
    check_delta(run.config.privacy, {site.name: site.nominal_patients for site in sites})
    for site in sites:  # only now: what is wrong with a site leaves no copy behind
        if site.test is not None:
            copy_cases(site.test, private_folder(run.path / "test" / "hospitals") / site.name)
    return sites


def _prepared_names(root: Path) -> list[str]:
    """The sites of a folder of prepared cases.

    Raises:
        UserError: There is none.
    """
    names = sorted(path.parent.parent.name for path in root.glob("*/train/cases.csv"))
    if not names:
        raise UserError(f"{root} holds no SITE/train/cases.csv: prepare the sites with 'fedcmr-client prepare'")
    return names


def _prepare_layouts(run: RunFolder, root: Path) -> list[Hospital]:
    """Sites whose scans lie in DATA_ROOT/SITE/{train,test}, each in a layout of its own; DATA_ROOT/SITE/test is tested.

    People have drawn the test patients' contours, whatever a site's own are.
    """
    sites = []
    for name, options in _layout_options(run.config.hospitals, root).items():
        given = run.config.hospitals.layouts[name]
        train, test = (run.path / "sites" / name / "train", run.path / "test" / "hospitals" / name)
        for part, target in (("train", train), ("test", test)):
            source = root / name / part
            contours = given.get("contours", "drawn") if part == "train" else "drawn"
            key, num_processes = _key(run.config), num_cores()
            prepare(source, target, given["format"], key=key, num_processes=num_processes, contours=contours, **options)
        sites.append(replace(_hospital(run.config, name, train), test=test))
    return sites


def _layout_options(hospitals: HospitalsConfig, root: Path) -> dict[str, dict[str, Any]]:
    """What `prepare` takes for each site of `hospitals.layouts`, all of them looked at before one is prepared.

    Raises:
        UserError: A site's folder is not there, or what is said of its layout cannot be.
    """
    options = {}
    for name, given in sorted(hospitals.layouts.items()):
        if given["format"] not in LAYOUTS:
            raise UserError(
                f"hospitals.layouts.{name}.format is {given['format']}: expected one of {', '.join(LAYOUTS)}"
            )
        for part in ("train", "test"):
            if not (root / name / part).is_dir():
                raise UserError(
                    f"{root / name / part} is not a folder: hospitals.layouts names a site {name}, give its scans there"
                )
        options[name] = {
            "labels": parse_labels(given["labels"]) if "labels" in given else None,
            "provenance": public(given["public"]) if "public" in given else None,
            "axes": given.get("axes"),
        }
    return options


def _key(config: Config) -> bytes:
    """The pseudonyms' key: from the seed, so that two equal runs have equal names. A real site's key is secret."""
    return hashlib.sha256(f"fedcmr simulation {config.seed}".encode()).digest()


def _site_name(vendor: str, index: int) -> str:
    """A folder's name for a simulated site; several sites may share a vendor."""
    return f"{index + 1}-{vendor.lower().replace(' ', '-')}"


def nominal_patients(hospitals: HospitalsConfig, site: str, vendors: Sequence[str]) -> dict[str, int]:
    """A site's public numbers of patients by vendor, from the settings and never from its cases.

    Raises:
        UserError: The settings name no number for the site, or not one for each of its vendors.
    """
    given = hospitals.num_train if hospitals.nominal_patients is None else hospitals.nominal_patients
    if isinstance(given, Mapping):
        if site not in given:
            raise UserError(f"hospitals.nominal_patients names no number for site {site}: add it")
        given = given[site]
    if isinstance(given, Mapping):
        if set(given) != set(vendors):
            raise UserError(
                f"hospitals.nominal_patients of site {site}: expected a number for each of "
                f"{', '.join(vendors)}, got {', '.join(given)}"
            )
        return {vendor: int(given[vendor]) for vendor in vendors}
    if len(vendors) > 1:
        raise UserError(
            f"site {site} has scans of several vendors: hospitals.nominal_patients has to be "
            f"{{{site}: {{{', '.join(f'{vendor}: number' for vendor in vendors)}}}}}"
        )
    return {vendor: int(given) for vendor in vendors}


def _hospital(config: Config, name: str, train: Path) -> Hospital:
    """A site of prepared cases that can be trained on, with its public numbers.

    Raises:
        UserError: There is none.
    """
    found = trainable(train)
    if not found.patients:
        raise UserError(f"{train} has no case that can be trained on: 'fedcmr-client check' says why; or leave it out")
    numbers = nominal_patients(config.hospitals, name, sorted(found.vendors))
    return Hospital(name, numbers, train, sum(numbers.values()), of_folder(train))


SITE_STAGES = (
    Stage(
        "hospitals",
        "simulated hospitals: patients, scanners, DICOM exports",
        _write_hospitals,
        wanted=lambda config: config.hospitals.source == "phantom",
    ),
    Stage("prepare", "every site's scans become cases without identifiers", _prepare, ("hospitals",)),
    Stage(
        "baselines",
        "baselines that look at the sites' own cases",
        lambda study: run_baselines(study.run),
        ("prepare",),
        has_parts=True,
    ),
)
"""What a simulation does before the ServerApp, because it plays the sites too."""
STAGES = (*SITE_STAGES, *SERVER_STAGES)
"""The whole course of a simulated study."""
