"""`flwr-clientapp` as a site starts it: Flower's own command, with the bundle judged before it is unpacked.

The SuperNode starts `flwr-clientapp` for every message, by its name on the PATH. `client.deployment.supernode` puts a
command of that name in front which ends up here, see `client.deployment.warm`.
"""

import os
import sys
from pathlib import Path

from client.deployment.bundle import CODE_FOLDERS, check_bundle
from client.policy import load_site

SITE_VARIABLE = "FEDCMR_SITE"
"""Tells the started process the site's folder."""


def main() -> None:
    """Answer one message as the policy in the site's folder allows."""
    allowed = load_site(Path(os.environ[SITE_VARIABLE])).policy.allowed_code_sha256
    for name in [name for name in sys.modules if name.split(".")[0] in CODE_FOLDERS]:
        del sys.modules[name]  # the bundle's own copy is what was judged, and what shall run

    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    unpack = run_clientapp.install_from_fab

    def judged(fab_file: Path | bytes, install_dir: Path | None = None, skip_prompt: bool = False) -> Path:
        content = fab_file if isinstance(fab_file, bytes) else fab_file.read_bytes()
        if allowed:
            check_bundle(content, allowed)
        return unpack(content, install_dir, skip_prompt)

    run_clientapp.install_from_fab = judged
    flwr_clientapp()


if __name__ == "__main__":
    main()
