"""`join` without Flower: what it prints, what it keeps for itself, and whom it waits for."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from fedcmr.client.cli import main
from fedcmr.client.deployment import connection, supernode
from fedcmr.client.deployment.connection import Finding, NotReached
from fedcmr.client.deployment.supernode_log import MAX_BYTES, SuperNodeLog, reason_of
from fedcmr.client.policy import SiteSettings, load_site, write_site
from fedcmr.shared.errors import UserError

RAW = ("EXPERIMENTAL: SuperExec authentication is experimental", "INFO:     Uvicorn running on http://127.0.0.1:1")


@pytest.fixture
def site(tmp_path):
    write_site(tmp_path / "site", SiteSettings("a", {"GE": 9}, 9, coordinator="study.invalid:443", authority="ca.crt"))
    return load_site(tmp_path / "site")


@pytest.fixture
def handlers():
    """`join` takes the signals for itself."""
    kept = {sign: signal.getsignal(sign) for sign in (signal.SIGTERM, signal.SIGINT)}
    yield
    for sign, handler in kept.items():
        signal.signal(sign, handler)


def program(*lines, code=1, stay_s=0.0):
    text = f"import sys, time\nprint({chr(10).join(lines)!r}, flush=True)\ntime.sleep({stay_s})\nsys.exit({code})"
    return [sys.executable, "-S", "-c", text]


def play(monkeypatch, site, *lines, findings=(), **options):
    """`join` with these lines for a SuperNode's, until it has tried three times."""
    tries = []

    def command(*_):
        tries.append(1)
        if len(tries) == 3:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return program(*lines)

    reached = [Finding("coordinator", "study.invalid:443 is reached")]
    monkeypatch.setattr(supernode, "examine", lambda site: list(findings) or reached)
    monkeypatch.setattr(supernode, "examine_way", lambda site: reached)
    monkeypatch.setattr(supernode, "_supernode", command)
    monkeypatch.setattr(supernode, "_executor", lambda *_: program(*RAW, code=0, stay_s=60))
    monkeypatch.setattr(supernode, "WAITS_S", (0.0,))
    supernode.join(site, preforked=False, **options)


def test_flowers_own_output_stays_in_a_log_and_a_refused_site_is_told_why_once(site, monkeypatch, handlers, capfd):
    error = "Exit Code: 305\nFailed to initialize the connection\nClient error '401 Unauthorized' for url 'https://x'"
    play(monkeypatch, site, *RAW, error)
    shown = capfd.readouterr()
    assert shown.out == "" and not any(raw in shown.err for raw in RAW) and "Exit Code" not in shown.err
    assert shown.err.count("not connected: the coordinator refuses this site's key. Remedy: ") == 1
    assert "site a calls study.invalid:443 directly, no proxy is named" in shown.err
    log = (site.folder / "flwr" / "supernode.log").read_text()
    assert all(raw in log for raw in RAW) and log.count("Exit Code: 305") == 3
    assert (site.folder / "flwr" / "supernode.log").stat().st_mode & 0o077 == 0


def test_a_site_that_is_taken_in_says_so(site, monkeypatch, handlers, capfd):
    play(monkeypatch, site, "\x1b[92mINFO \x1b[0m:      SuperNode ID: 14850638311663147760")
    assert "online: the coordinator knows this site" in capfd.readouterr().err


def test_the_proxy_of_the_environment_is_named(site, monkeypatch, handlers, capfd):
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    proxy = "http://user:secret@proxy.hospital.example:3128"  # pragma: allowlist secret
    monkeypatch.setenv("https_proxy", proxy)
    play(monkeypatch, site, "nothing")
    shown = capfd.readouterr().err
    assert "through the proxy proxy.hospital.example:3128 (https_proxy)" in shown and "secret" not in shown


def test_it_waits_for_a_coordinator_that_is_not_up_yet(site, monkeypatch, handlers, capfd):
    monkeypatch.setattr(supernode, "RETRY_S", 0.01)
    down = Finding("coordinator", "study.invalid:443 is not reached", ok=False, passing=True)
    play(monkeypatch, site, "SuperNode ID: 1", findings=[down])
    shown = capfd.readouterr().err
    assert "waiting for the coordinator, 60 minutes at most (--wait): study.invalid:443 is not reached" in shown
    assert shown.index("waiting for") < shown.index("online: ")


def test_it_waits_no_longer_than_it_may_and_for_nothing_else(site, monkeypatch, handlers):
    monkeypatch.setattr(supernode, "RETRY_S", 0.01)
    down = Finding("coordinator", "study.invalid:443 is not reached", ok=False, passing=True)
    monkeypatch.setattr(supernode, "examine", lambda site: [down])
    monkeypatch.setattr(supernode, "examine_way", lambda site: [down])
    started = time.monotonic()
    with pytest.raises(UserError, match=r"is not reached; waited 0\.01 minutes"):
        supernode.join(site, wait_minutes=0.01)
    assert 0.5 < time.monotonic() - started < 30
    monkeypatch.setattr(supernode, "examine", lambda site: [down, Finding("key", "is missing", ok=False)])
    with pytest.raises(UserError, match="cannot join: key: is missing"):
        supernode.join(site, wait_minutes=60)


def test_several_things_that_are_wrong_are_told_line_by_line(site, monkeypatch, handlers, capfd):
    wrong = [Finding(name, f"no {name}", ok=False) for name in ("cases", "key")]
    monkeypatch.setattr(supernode, "examine", lambda site: wrong)
    with pytest.raises(UserError, match="2 things have to be put right first"):
        supernode.join(site)
    told = "".join(capfd.readouterr())
    assert [line[20:] for line in told.splitlines()] == ["cases: no cases", "key: no key"]


def test_without_a_coordinator_nothing_is_said_twice(site):
    found = connection.examine_way(replace(site, coordinator=None))
    assert [("HOST:PORT" in one.text) for one in found] == [True, False, False]
    assert not any(one.ok or one.passing for one in found)


def test_what_lies_behind_a_coordinator_that_is_not_reached_is_not_looked_at(site, monkeypatch):
    def unreached(site):
        raise NotReached("down")

    def looked_at(site):
        raise AssertionError

    monkeypatch.setattr(connection, "_coordinator", unreached)
    monkeypatch.setattr(connection, "_certificate", looked_at)
    monkeypatch.setattr(connection, "_clock", looked_at)
    found = connection.examine_way(site)
    assert [one.name for one in found] == ["coordinator", "certificate", "clock"]
    assert all(one.passing and not one.ok for one in found)


@pytest.mark.parametrize("value", ["-1", "soon", "inf"])
def test_the_bound_is_a_number_of_minutes(value, capsys):
    with pytest.raises(SystemExit):
        main(["join", "site", f"--wait={value}"])
    assert "minutes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("Exit Code: 305\nServer error '502 Bad Gateway' for url", "SuperLink does not"),
        ("Exit Code: 305\nClient error '404 Not Found' for url", "same version"),
        ("Exit Code: 305\n[code: 2004] Failed to activate SuperNode.", "still knows it from before, for a minute, or"),
        ("Exit Code: 305\n[code: 2004] Failed to activate SuperNode.", "ask whether node_key.pub is registered"),
    ],
)
def test_the_end_of_a_supernode_is_told_in_words(text, told):
    assert told in reason_of(text)
    assert reason_of("SuperNode ID: 14015021\nSent successfully") is None


def test_the_log_has_a_size(tmp_path):
    log = SuperNodeLog(tmp_path, lambda: None)
    with subprocess.Popen(
        [sys.executable, "-S", "-c", f"print(('x' * 1000 + chr(10)) * {3 * MAX_BYTES // 1000})"], stdout=subprocess.PIPE
    ) as process:
        log._read(process.stdout)
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes.keys() == {"supernode.log", "supernode.log.1"} and max(sizes.values()) < MAX_BYTES + 5000
