"""An answer belongs to the site whose key sent it."""

import stat

import pytest
from flwr.app import ConfigRecord, RecordDict

from fedcmr.client.deployment.bundle import BundleRefused, check_bundle
from fedcmr.server.federation.senders import BUNDLE_REFUSED, FILE_NAME, Reply, read_nodes, reply_of, write_nodes
from fedcmr.shared.errors import UserError
from fedcmr.shared.records import UNKNOWN_SITE, pack_rehearsal_reply, pack_reply

NODES = {7: "a", 8: "b"}


@pytest.mark.parametrize("pack", [pack_reply, pack_rehearsal_reply])
def test_a_reply_is_its_senders_and_another_name_is_kept_back(pack):
    content = pack("b", "budget-exhausted")
    assert reply_of(8, content, "", NODES) == Reply("b", content)
    assert reply_of(7, content, "", NODES) == Reply("a", None, "names-another-site")
    assert reply_of(9, content, "", NODES) == Reply(UNKNOWN_SITE, None, "node-not-in-study")
    assert reply_of(7, content, "", None) == Reply(None, content), "without a list its word counts"
    unnamed = pack(UNKNOWN_SITE, "settings-unreadable")
    assert reply_of(7, unnamed, "", NODES) == Reply("a", unnamed)


@pytest.mark.parametrize("record", [ConfigRecord({"site": ["b"]}), ConfigRecord({"code": "ok"})])
def test_a_reply_that_says_no_name_is_left_to_the_checks(record):
    content = RecordDict({"reply": record})
    assert reply_of(7, content, "", NODES) == Reply("a", content)


def test_a_refused_bundle_is_that_sites_refusal_and_any_other_error_is_none():
    with pytest.raises(BundleRefused) as refused:
        check_bundle(b"no bundle", [])
    text = f"{type(refused.value)}:<'{refused.value}'>"  # as flwr.supernode.runtime.run_clientapp writes it
    assert text == BUNDLE_REFUSED
    assert reply_of(7, None, text, NODES) == Reply("a", None, "code-not-allowed")
    assert reply_of(9, None, text, NODES) == Reply(UNKNOWN_SITE, None, "node-not-in-study")
    for error in ("<class 'ValueError'>:<'code-not-allowed'>", "code-not-allowed", ""):
        assert reply_of(7, None, error, NODES) == Reply("a", None, "client-error")
    assert reply_of(7, None, text, None) == Reply(None, None, "client-error")


def test_the_list_of_a_run_is_for_its_own_account_and_a_damaged_one_is_a_users_error(make_study):
    run = make_study(num_patients=0)
    assert read_nodes(run) is None
    write_nodes(run, {"a": str(2**64 - 1), "b": "8"})
    assert read_nodes(run) == {2**64 - 1: "a", 8: "b"}
    path = run.path / FILE_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for text in ("{", "[]", '{"a": "seven"}', '{"a": null}'):
        path.write_text(text)
        with pytest.raises(UserError, match=r"nodes\.json.*--resume"):
            read_nodes(run)
