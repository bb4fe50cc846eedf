"""Chromium without a window, for the tests that look at a page."""

import subprocess
from pathlib import Path


def chromium(profile: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Chromium run to its end with a profile of its own; what it prints is kept."""
    return subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--enable-logging=stderr",
            f"--user-data-dir={profile}",
            "--window-size=1400,900",
            "--hide-scrollbars",
            *arguments,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
