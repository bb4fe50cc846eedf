"""Known vulnerabilities of the locked packages, by pip-audit; ends with 1 where there is one that is not listed here.

Where no vulnerability data can be reached, as on a machine without the Internet, it says so in one line and ends with
0. Arguments are passed on to pip-audit, for example `-s osv`.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
IGNORED: dict[str, str] = {}
"""Identifier of a vulnerability -> why it cannot be used here."""
CONTROL = "requests==2.19.0"
"""A release with known vulnerabilities: who finds none there was told nothing."""


def audit(requirements: str, arguments: list[str]) -> list[dict[str, Any]]:
    """Packages with what pip-audit knows of each; none where it came to no end."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements)
        file.flush()
        command = [
            sys.executable,
            "-m",
            "pip_audit",
            "--requirement",
            file.name,
            "--no-deps",
            "--disable-pip",
            "--format",
            "json",
            "--progress-spinner",
            "off",
            *arguments,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return []
    return packages


def locked() -> str:
    """Everything that `make venv` installs, a package a line: the lock without its hashes, and torch."""
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    names = [line.removesuffix("\\").strip() for line in lines if re.match(r"[A-Za-z0-9]", line)]
    torch = re.search(r"^TORCH := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert torch is not None, "the Makefile names torch's version"
    return "\n".join([*names, torch[1]]) + "\n"


def main(arguments: list[str]) -> int:
    """Ask and tell; returns the exit code."""
    if not any(package.get("vulns") for package in audit(CONTROL + "\n", arguments)):
        print("pip-audit: no vulnerability data can be reached from here; the locked packages were not checked")
        return 0
    packages = audit(locked(), arguments)
    found = [(package, vulnerability) for package in packages for vulnerability in package.get("vulns", [])]
    left = [(package, one) for package, one in found if not {one["id"], *one.get("aliases", [])} & set(IGNORED)]
    for package, one in left:
        fixed = ", ".join(one["fix_versions"]) or "no release"
        print(f"{package['name']} {package['version']}: {one['id']}, fixed in {fixed}")
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    print(
        f"pip-audit: {len(left)} known vulnerabilities in {len(packages) - len(skipped)} locked packages; "
        f"{len(found) - len(left)} ignored for a reason, {len(skipped)} packages unknown to the service"
    )
    return 1 if left or not packages else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
