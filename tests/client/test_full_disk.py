"""A site whose disk is full answers with a code; once there is space it continues, and nothing is charged twice.

Where the charge found room and what follows did not, the round is lost: its failure is an answer, and the next round is
asked as ever.
"""

from dataclasses import replace

import pytest
from flwr.app import Context, Message, Metadata, RecordDict

from fedcmr.client.app import app
from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import SITE_FILE, load_site, write_site
from fedcmr.shared.records import INTERNAL_ERROR, OK, UNCHARGED_CODES, pack_request
from tests.wire_request import usual_request


def ask(site, content):
    metadata = Metadata(1, "m1", 1, 2, "", "", created_at=1e9, ttl=1e9, message_type="train")
    reply = app(
        Message(content, metadata=metadata), Context(1, 2, {"site": str(site), "device": "cpu"}, RecordDict(), {})
    )
    assert not reply.has_error()
    return reply.content


@pytest.mark.parametrize("num_pages", range(3))
def test_a_full_disk_is_a_code_and_the_round_is_charged_once(make_study, prior, small_disk, fill, tmp_path, num_pages):
    folder, disk = make_study().path / "sites" / "a", small_disk(tmp_path / "disk")
    site = load_site(folder)
    (folder / SITE_FILE).unlink()
    write_site(folder, replace(site, ledger=str(disk / "ledger")))
    arrays = {name: value.detach().numpy().copy() for name, value in prior.generator.trainable().items()}
    request = usual_request(prior_sha256=prior.sha256, num_views=1)
    content = pack_request(arrays, request)

    fill(disk, num_pages)  # 0: no room for the charge, 1: for its second copy, 2: for the reply
    refused = ask(folder, content)
    assert refused["reply"]["code"] in UNCHARGED_CODES | {INTERNAL_ERROR} and "arrays" not in refused
    fill(disk, None)
    charged = len(Ledger(disk / "ledger").charges())
    assert charged or refused["reply"]["code"] in UNCHARGED_CODES, "what is said to be uncharged may yet be"

    answered = ask(folder, content)
    assert answered["reply"]["code"] == (INTERNAL_ERROR if charged else OK)
    (charge,) = Ledger(disk / "ledger").charges()
    assert (charge["reply"] is None) == bool(charged) and (charge["failure"] is None) != bool(charged)
    again = ask(folder, content)
    assert again["reply"] == answered["reply"] and again.get("arrays") == answered.get("arrays"), "the same again"
    assert ask(folder, pack_request(arrays, replace(request, server_round=3)))["reply"]["code"] == OK
    assert len(Ledger(disk / "ledger").charges()) == 2
