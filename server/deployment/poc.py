"""A whole study between institutions on this machine, in one command: for the IT of both sides to rehearse with.

A coordinator with its own certificate authority, a SuperLink over TLS, several sites with keys of their own, and
simulated patients. Every step is the command that a coordinator or a site would give, shown before it runs and kept
in `commands.txt`. No process is left when it ends, however that is, and of the files only what there is to read.
"""

import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedcmr.server.deployment.coordinator import load_coordinator
from fedcmr.server.deployment.runs import ROOT, status
from fedcmr.server.settings import load
from fedcmr.shared.errors import UserError
from fedcmr.shared.free_ports import free_ports

VENDORS = ("Siemens", "Philips", "GE")
"""Of the simulated hospitals, in turn."""
MODULES = {
    "fedcmr-server": "fedcmr.server.cli",
    "fedcmr-client": "fedcmr.client.cli",
    "fedcmr-simulate": "fedcmr.simulations.cli",
}
ONLINE_S, POLL_S, STOP_S = 600.0, 5.0, 60.0
KEPT = ("commands.txt", "logs", "report.html", "report.json", "report.csv", "rehearsal.json")
MAX_SITES = 20


class Poc:
    """The folder of a proof of concept and what runs in it.

    Args:
        folder: New or empty.
        num_sites: One vendor each.
        config: The study's.
        settings: key=value.

    Raises:
        UserError: The folder is not empty, there are too many sites, a setting is wrong, or this is no checkout.
    """

    def __init__(self, folder: Path, num_sites: int, config: str, settings: Sequence[str]) -> None:
        if not 1 <= num_sites <= MAX_SITES:
            raise UserError(f"Expected --sites in 1..{MAX_SITES}, got {num_sites}.")
        if not (ROOT / "pyproject.toml").is_file():
            raise UserError(f"{ROOT} has no pyproject.toml: Flower packs its app from a source checkout, use one")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is not empty: give a new or empty folder")
        self.hospitals = load(config, settings).hospitals
        self.folder, self.config, self.settings = folder.resolve(), config, list(settings)
        self.sites = {
            f"{index + 1}-{vendor.lower()}": vendor
            for index, vendor in enumerate(VENDORS[number % len(VENDORS)] for number in range(num_sites))
        }
        self._joined: list[subprocess.Popen[bytes]] = []

    @property
    def coordinator(self) -> Path:
        """The coordinator's folder."""
        return self.folder / "coordinator"

    def give(self, program: str, *words: object) -> None:
        """Show a command, run it to its end, and go on only where it succeeded.

        Raises:
            UserError: It failed.
        """
        shown = self._note(program, words)
        done = subprocess.run(self._command(program, words), cwd=self.folder, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise UserError(f"'{shown}' ended with code {done.returncode}: what it printed above says why")

    def join(self, site: str) -> None:
        """`fedcmr-client join` in the background, its output in `logs/join-SITE.log`."""
        words = ("join", f"sites/{site}")
        self._note("fedcmr-client", words)
        with (self.folder / "logs" / f"join-{site}.log").open("wb") as log:
            self._joined.append(
                subprocess.Popen(
                    self._command("fedcmr-client", words),
                    cwd=self.folder,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # a terminal's Ctrl-C is for this process, which ends the others in order
                )
            )

    def wait_online(self) -> None:
        """Until the coordinator sees every site online.

        Raises:
            UserError: A site has ended, or it takes too long.
        """
        deadline = time.monotonic() + ONLINE_S
        while True:
            states = status(load_coordinator(self.coordinator), None)["sites"]
            if set(states.values()) == {"online"}:
                return
            ended = [name for name, process in zip(self.sites, self._joined, strict=True) if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                names = ended or [name for name, state in states.items() if state != "online"]
                raise UserError(f"{', '.join(names)} did not come online: {self.folder / 'logs'} says why")
            time.sleep(POLL_S)

    def end(self, keep: bool) -> None:
        """End every process, keep what there is to read and, unless `keep`, nothing else."""
        for process in self._joined:
            process.send_signal(signal.SIGTERM)
        for process in self._joined:
            try:
                process.wait(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if (self.coordinator / "coordinator.yaml").is_file():
            words = ("stop", "coordinator")
            self._note("fedcmr-server", words)
            subprocess.run(self._command("fedcmr-server", words), cwd=self.folder, check=False)
        self._collect()
        if not keep:
            for path in self.folder.iterdir():
                if path.name not in KEPT:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _collect(self) -> None:
        """Copy logs and report to where they are kept."""
        logs = self.folder / "logs"
        found = {f"coordinator-{path.name}": path for path in (self.coordinator / "logs").glob("*.log")}
        for site in self.sites:
            for name in ("errors.log", "flwr/supernode.log"):
                found[f"{site}-{Path(name).name}"] = self.folder / "sites" / site / name
        for name, path in found.items():
            if path.is_file():
                shutil.copy(path, logs / name)
        reports = [*(self.coordinator / "runs").glob("*/report.*"), self.coordinator / "rehearsal.json"]
        for path in reports:
            if path.is_file():
                shutil.copy(path, self.folder / path.name)

    def _note(self, program: str, words: Sequence[object]) -> str:
        shown = shlex.join([program, *map(str, words)])
        print(f"$ {shown}", file=sys.stderr, flush=True)
        with (self.folder / "commands.txt").open("a", encoding="utf-8") as file:
            file.write(shown + "\n")
        return shown

    @staticmethod
    def _command(program: str, words: Sequence[object]) -> list[str]:
        return [sys.executable, "-m", MODULES[program], *map(str, words)]


def run_poc(poc: Poc, rehearsal_only: bool = False, stay: bool = False, keep: bool = False) -> None:
    """Go the whole way: patients, coordinator, sites, rehearsal, study, report.

    Args:
        poc: What to run.
        rehearsal_only: Stop after the rehearsal, which charges nothing.
        stay: Leave everything running after that, until an interruption.
        keep: Keep all files.

    Raises:
        UserError: A step failed.
    """
    with _ending(poc, keep):
        _set_up(poc)
        study = ("run", "coordinator", "--config", poc.config, "--test", "test-patients")
        poc.give("fedcmr-server", *study, "--rehearsal", *poc.settings)
        if not rehearsal_only:
            poc.give("fedcmr-server", *study, *poc.settings)
        poc.give("fedcmr-server", "status", "coordinator")
        for site in poc.sites:
            poc.give("fedcmr-client", "status", f"sites/{site}")
        if stay:
            print(f"everything runs in {poc.folder}, until Ctrl-C", file=sys.stderr, flush=True)
            signal.pause()


@contextmanager
def _ending(poc: Poc, keep: bool) -> Iterator[None]:
    """Make the folder, and end and clean up whatever happens; a second interruption does not stop that."""
    poc.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (poc.folder / "logs").mkdir()
    try:
        yield
    finally:
        kept = [signal.signal(sign, signal.SIG_IGN) for sign in (signal.SIGINT, signal.SIGTERM)]
        try:
            poc.end(keep)
        finally:
            for sign, handler in zip((signal.SIGINT, signal.SIGTERM), kept, strict=True):
                signal.signal(sign, handler)


def _set_up(poc: Poc) -> None:
    """Patients, coordinator and sites, until all are online."""
    sizes = {name: getattr(poc.hospitals, name) for name in ("num_train", "num_test", "num_slices", "num_phases")}
    vendors = ",".join(poc.sites.values())
    poc.give(
        "fedcmr-simulate",
        *("--until", "hospitals", "--out", "hospitals", f"hospitals.vendors=[{vendors}]"),
        *(f"hospitals.{name}={value}" for name, value in sizes.items()),
    )
    port, health, gateway, delivery = free_ports(4)
    poc.give(
        "fedcmr-server",
        *("init", "coordinator", "--name", "poc", "--address", "127.0.0.1", "localhost", "--port", port),
        *("--health-port", health, "--gateway-port", gateway, "--delivery-port", delivery),
    )
    poc.give("fedcmr-server", "start", "coordinator")
    for site, vendor in poc.sites.items():
        facts = ("--name", site, "--vendor", vendor, "--nominal-patients", sizes["num_train"])
        poc.give(
            "fedcmr-client",
            *("init", f"sites/{site}", *facts, "--coordinator", f"127.0.0.1:{port}"),
            *("--authority", "coordinator/ca.crt", "--ledger-same-disk"),
        )
        for part, cases in (("train", f"sites/{site}/train"), ("test", "test-patients")):
            scans = f"hospitals/hospitals/{site}/{part}"
            # Nobody's name is on a simulated scan: one that seems to show letters must not cost the site a patient.
            prepare = ("prepare", "--format", "dicom", "--simulated", "--keep-suspected")
            poc.give("fedcmr-client", *prepare, scans, cases)
        poc.give(
            "fedcmr-server",
            *("register", "coordinator", f"sites/{site}/node_key.pub", *facts, "--provenance", "simulated"),
        )
        poc.give("fedcmr-client", "check", f"sites/{site}")
        poc.join(site)
    poc.wait_online()
