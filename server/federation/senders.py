"""Whose a reply is: the site's whose key sent it, whatever name the reply itself says.

In a deployment Flower knows every site by its public key, and has a number for it. The coordinator keeps which number
is whose, and every run begins with a list of it in its folder. Without a list, as in one process tree and in Flower's
simulation, all nodes are the run's own, and a reply's own word counts.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedcmr.server.run_folder import RunFolder
from fedcmr.shared.checkpoint import write_atomically
from fedcmr.shared.errors import UserError
from fedcmr.shared.records import REHEARSAL, REPLY, UNKNOWN_SITE

FILE_NAME = "nodes.json"
"""In a run folder: site -> Flower's number. For this account alone: a number that nobody knows cannot be claimed."""
CLIENT_ERROR, OTHER_NAME, STRANGER = "client-error", "names-another-site", "node-not-in-study"
CODE_NOT_ALLOWED = "code-not-allowed"
BUNDLE_REFUSED = f"<class 'fedcmr.client.deployment.bundle.BundleRefused'>:<'{CODE_NOT_ALLOWED}'>"
"""Flower's words where a site lets no code run, so that no code of ours can answer. Nothing is charged then."""

Nodes = Mapping[int, str]


@dataclass(frozen=True)
class Reply:
    """What a node sent back.

    Attributes:
        site: Whose key sent it; "unknown" for a node that is not in the list, None where there is no list.
        content: Its records, as they came; None where there is nothing to look into.
        code: Why there is nothing: "code-not-allowed" is a refusal, anything else a reason to drop it. Else "".
    """

    site: str | None
    content: Mapping[str, Any] | None
    code: str = ""


def reply_of(node: int, content: Mapping[str, Any] | None, error: str, nodes: Nodes | None) -> Reply:
    """Tell whose a reply is, and keep back one that says another site's name.

    Args:
        node: Flower's number of the node that sent it.
        content: Its records; None where Flower brings an error in their place.
        error: The error's text; it is compared with `BUNDLE_REFUSED` and goes no further.
        nodes: What `read_nodes` returned.
    """
    if nodes is not None and node not in nodes:
        return Reply(UNKNOWN_SITE, None, STRANGER)
    site = None if nodes is None else nodes[node]
    if content is None:
        return Reply(site, None, CODE_NOT_ALLOWED if site is not None and error == BUNDLE_REFUSED else CLIENT_ERROR)
    if site is not None and _said(content) not in (None, UNKNOWN_SITE, site):
        return Reply(site, None, OTHER_NAME)
    return Reply(site, content)


def write_nodes(run: RunFolder, numbers: Mapping[str, str]) -> None:
    """Write the list of a run; `numbers` are Flower's, by the name of the site."""
    write_atomically(run.path / FILE_NAME, (json.dumps(dict(numbers)) + "\n").encode())


def read_nodes(run: RunFolder) -> Nodes | None:
    """Flower's number -> site; None where the run has no list.

    Raises:
        UserError: The list cannot be read.
    """
    path = run.path / FILE_NAME
    if not path.exists():
        return None
    try:
        return {int(number): str(site) for site, number in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        raise UserError(f"{path}: expected {{SITE: NUMBER}}; 'fedcmr-server run --resume' writes it again") from None


def _said(content: Mapping[str, Any]) -> str | None:
    """The name that a reply says; None where it is no text, which is dropped for its form later."""
    record = content.get(REPLY, content.get(REHEARSAL))
    site = record.get("site") if isinstance(record, Mapping) else None
    return site if isinstance(site, str) else None
