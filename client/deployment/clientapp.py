"""`flwr-clientapp` as a site starts it: Flower's own command, with the bundle checked before it is unpacked.

The SuperNode starts `flwr-clientapp` for every message, by its name on the PATH. `fedcmr.client.deployment.supernode`
puts a command of that name in front which ends up here, see `fedcmr.client.deployment.commands`.

Flower unpacks the bundle that it was sent, and then runs what lies in the folder that the server's own words for the
run name, id and version. So both are fixed: the bundle by its bytes, and the folder by being the one just unpacked.
"""

import contextlib
import importlib
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fedcmr.client import error_log
from fedcmr.client.deployment.bundle import BundleRefused, check_bundle, is_unpacked
from fedcmr.client.policy import load_site

SITE_VARIABLE = "FEDCMR_SITE"
"""Tells the started process the site's folder."""


def main() -> None:
    """Answer one message as the policy in the site's folder allows."""
    allowed = load_site(Path(os.environ[SITE_VARIABLE])).policy.allowed_code_sha256
    for name in [name for name in sys.modules if name.split(".")[0] == "fedcmr"]:
        del sys.modules[name]  # the bundle's own copy is what was checked, and what shall run

    from flwr.common.config import get_project_dir
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    run_clientapp.install_from_fab, run_clientapp.get_load_client_app_fn = checking(
        allowed, run_clientapp.install_from_fab, run_clientapp.get_load_client_app_fn, get_project_dir
    )
    flwr_clientapp()


def refuse_agent() -> None:
    """`flwr-agentapp`: Flower's own command, which reports that it failed before a file is unpacked.

    A command that only ended would be started again and again, and the SuperNode would do nothing else.
    """
    agent = importlib.import_module("flwr.supercore.task_process.agent.run_agentapp")
    command = importlib.import_module("flwr.supercore.cli").flwr_agentapp

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise _noted(BundleRefused("code-not-allowed"))

    for step in ("install_from_fab", "load_app"):
        getattr(agent, step)  # a Flower that has renamed it runs nothing
        setattr(agent, step, refuse)
    sys.argv[0] = "flwr-agentapp"
    command()


def _noted(refused: BundleRefused) -> BundleRefused:
    """The same, after the site's own people were told in errors.log."""
    with contextlib.suppress(Exception):  # whatever happens to the log, the refusal stands
        error_log.note(Path(os.environ[SITE_VARIABLE]), str(refused))
    return refused


def checking(
    allowed: list[str], unpack: Callable[..., Path], make_loader: Callable[..., Any], folder_of: Callable[..., Path]
) -> tuple[Callable[..., Path], Callable[..., Any]]:
    """Flower's two steps, made to refuse.

    Args:
        allowed: Fingerprints that the site has approved.
        unpack: Bundle to folder; leaves a folder that is there as it is.
        make_loader: Makes what imports the ClientApp of a run, given the run's words for it.
        folder_of: The folder that these words name.

    Returns:
        In place of `unpack`: the bundle is checked first, and the folder holds it when this returns. In place of
        `make_loader`: it loads from no other folder, and nothing at all where nothing was checked before.
    """
    approved: list[Path] = []

    def checked(fab_file: Path | bytes, install_dir: Path | None = None, skip_prompt: bool = False) -> Path:
        content = fab_file if isinstance(fab_file, bytes) else fab_file.read_bytes()
        try:
            check_bundle(content, allowed)
        except BundleRefused as refused:
            raise _noted(refused) from None
        folder = unpack(content, install_dir, skip_prompt)
        if not is_unpacked(content, folder):
            shutil.rmtree(folder)
            folder = unpack(content, install_dir, skip_prompt)
            if not is_unpacked(content, folder):
                raise _noted(BundleRefused("code-not-allowed"))
        approved[:] = [folder]
        return folder

    def loader(*arguments: Any, **keywords: Any) -> Any:
        load = make_loader(*arguments, **keywords)

        def load_approved(*words: str) -> Any:
            if approved != [folder_of(*words)]:
                raise _noted(BundleRefused("code-not-allowed"))
            return load(*words)

        return load_approved

    return checked, loader


if __name__ == "__main__":
    main()
