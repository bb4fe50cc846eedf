"""The sender of a reply: the site whose key sent it, whatever name the reply itself states.

In a deployment Flower knows every site by its public key and gives it a node id. The coordinator keeps the node id of
every site, and every run begins with this list in its folder. Without a list, as in one process tree and in Flower's
simulation, all nodes are the run's own, and the name in the reply counts.
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
"""File of a run folder: site -> Flower's node id. Only this account can read it: a secret node id cannot be claimed."""
CLIENT_ERROR, OTHER_NAME, STRANGER = "client-error", "names-another-site", "node-not-in-study"
CODE_NOT_ALLOWED = "code-not-allowed"
BUNDLE_REFUSED = f"<class 'fedcmr.client.deployment.bundle.BundleRefused'>:<'{CODE_NOT_ALLOWED}'>"
"""Flower's error where a site lets no code run, so that no code of ours can reply. Nothing is charged then."""

Nodes = Mapping[int, str]


@dataclass(frozen=True)
class Reply:
    """What a node sent back.

    Attributes:
        site: Site whose key sent it; "unknown" for a node that is not in the list, None where there is no list.
        content: Its records, as they came; None where there are none to check.
        code: Why there are none: "code-not-allowed" is a refusal, anything else a reason to drop it. Else "".
    """

    site: str | None
    content: Mapping[str, Any] | None
    code: str = ""


def reply_of(node: int, content: Mapping[str, Any] | None, error: str, nodes: Nodes | None) -> Reply:
    """Find the sender of a reply, and hold back a reply that states another site's name.

    Args:
        node: Flower's id of the node that sent it.
        content: Its records; None where Flower delivers an error in their place.
        error: The error's text; it is compared with `BUNDLE_REFUSED` and used for nothing else.
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
    """Write the list of a run; `numbers` are Flower's node ids by the name of the site."""
    write_atomically(run.path / FILE_NAME, (json.dumps(dict(numbers)) + "\n").encode())


def read_nodes(run: RunFolder) -> Nodes | None:
    """Flower's node id -> site; None where the run has no list.

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
    """The site's name in a reply; None where it is not text: such a reply is dropped later because of its form."""
    record = content.get(REPLY, content.get(REHEARSAL))
    site = record.get("site") if isinstance(record, Mapping) else None
    return site if isinstance(site, str) else None
