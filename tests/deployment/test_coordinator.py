"""The coordinator's folder: certificates that a TLS client believes, sites with keys of their own, errors in a line."""

import json
import socket
import ssl
import stat
import threading

import pytest

from fedcmr.client.deployment.node_key import make_node_key
from fedcmr.server.deployment.coordinator import load_coordinator
from tests.deployment.conftest import free_port, server


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "coordinator"
    ports = ("--port", free_port(), "--health-port", free_port())
    assert server("init", path, "--name", "study", "--address", "fedcmr.example.org", "192.0.2.7", *ports) == 0
    return path


@pytest.fixture
def key(tmp_path):
    (tmp_path / "site").mkdir()
    return make_node_key(tmp_path / "site")


def register(folder, key, name="a", vendor="GE", patients="20"):
    return server("register", folder, key, "--name", name, "--vendor", vendor, "--nominal-patients", patients)


def handshake(folder, authority, name):
    """The error of a TLS client that trusts `authority` and wants `name`; None where it believes the server."""
    ours, theirs = socket.socketpair()
    side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    side.load_cert_chain(folder / "server.crt", folder / "server.key")

    def serve():
        try:
            side.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        ssl.create_default_context(cafile=str(authority)).wrap_socket(ours, server_hostname=name).close()
    except ssl.SSLCertVerificationError as error:
        ours.close()
        return error.verify_message
    finally:
        thread.join()
    return None


@pytest.mark.parametrize("name", ["fedcmr.example.org", "192.0.2.7", "127.0.0.1", "localhost"])
def test_the_servers_certificate_is_believed_by_whoever_has_the_authority(folder, name):
    assert handshake(folder, folder / "ca.crt", name) is None


def test_no_other_name_and_no_other_authority_is_believed(folder, tmp_path):
    assert "Hostname mismatch" in handshake(folder, folder / "ca.crt", "evil.example.org")
    assert server("init", tmp_path / "other", "--name", "study", "--address", "fedcmr.example.org") == 0
    assert handshake(folder, tmp_path / "other" / "ca.crt", "fedcmr.example.org") is not None


def test_secrets_are_for_one_user_only(folder):
    for name in ("ca.key", "server.key"):
        assert stat.S_IMODE((folder / name).stat().st_mode) == 0o600


def test_a_second_init_renews_the_certificate_and_keeps_the_authority(folder):
    before = {name: (folder / name).read_bytes() for name in ("ca.crt", "ca.key", "server.crt")}
    port = load_coordinator(folder).superlink_port
    assert server("init", folder, "--name", "study", "--address", "new.example.org") == 0
    assert (folder / "ca.key").read_bytes() == before["ca.key"]
    assert (folder / "server.crt").read_bytes() != before["server.crt"]
    assert handshake(folder, folder / "ca.crt", "new.example.org") is None
    assert load_coordinator(folder).addresses == ["new.example.org"]
    assert load_coordinator(folder).superlink_port == port


def test_a_folder_of_something_else_is_left_alone(folder, tmp_path, capsys):
    assert server("init", folder, "--name", "other", "--address", "x.org") == 2
    assert "is of study 'study'" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.docx").touch()
    assert server("init", tmp_path / "full", "--name", "other", "--address", "x.org") == 2
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--name", "My Study"], "name"),
        (["--name", "s", "--port", "70000"], "superlink_port"),
        (["--name", "s", "--port", "9095"], "differ"),
    ],
)
def test_settings_out_of_range_are_one_line(arguments, named, tmp_path, capsys):
    assert server("init", tmp_path / "c", "--address", "x.org", *arguments) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1 and not (tmp_path / "c" / "ca.key").exists()


def test_a_registered_site_has_its_facts(folder, key):
    assert register(folder, key) == 0
    site = load_coordinator(folder).sites()["a"]
    assert (site.vendors, site.nominal_patients) == ({"GE": 20}, 20)


def test_a_key_belongs_to_one_site(folder, key, tmp_path, capsys):
    (tmp_path / "second").mkdir()
    other = make_node_key(tmp_path / "second")
    assert register(folder, key) == 0
    assert register(folder, key, name="b") == 2
    assert "site a has that key already" in capsys.readouterr().err
    assert register(folder, other, name="a") == 2
    assert "is registered with another key" in capsys.readouterr().err
    assert register(folder, other, name="b") == 0


@pytest.mark.parametrize(
    ("content", "named"),
    [("ssh-ed25519 AAAA x", "ecdsa"), ("", "ecdsa"), (None, "cannot be read")],
)
def test_what_is_no_key_is_refused(folder, tmp_path, content, named, capsys):
    path = tmp_path / "some.pub"
    if content is not None:
        path.write_text(content)
    assert register(folder, path) == 2
    assert named in capsys.readouterr().err and load_coordinator(folder).sites() == {}


def test_a_private_key_given_by_mistake_is_not_kept(folder, key):
    assert register(folder, key.with_suffix("")) == 2
    assert not (folder / "sites").exists()


def test_without_services_every_command_says_so(folder, key, tmp_path, write_cases, capsys):
    assert register(folder, key) == 0
    write_cases(tmp_path / "patients", "GE", 2, seed=1)
    assert server("run", folder, "--test", tmp_path / "patients", "--config", "smoke") == 2
    assert "services do not run" in capsys.readouterr().err
    assert not (folder / "runs").exists(), "nothing was begun"
    assert server("status", folder) == 0
    shown = capsys.readouterr().out
    assert "does not run" in shown and "site a" in shown and "unknown" in shown
    assert server("stop", folder) == 0
    assert "nothing was running" in capsys.readouterr().out


def test_a_mistake_is_told_before_a_run_folder_is_made(folder, key, tmp_path, write_cases, monkeypatch, capsys):
    """`--resume` could not put right what the folder's settings say."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("fedcmr.server.deployment.runs.require_services", lambda _: None)
    assert register(folder, key) == 0
    write_cases(tmp_path / "patients", "GE", 2, seed=1)
    for setting, told in (("device=cuda", "no CUDA device"), ("prior=nowhere.safetensors", "nowhere.safetensors")):
        assert server("run", folder, "--test", tmp_path / "patients", setting) == 2
        assert told in capsys.readouterr().err and not (folder / "runs").exists()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copytree", full)
    assert server("run", folder, "--test", tmp_path / "patients") == 2
    assert not (folder / "runs" / "default").exists()


def test_a_run_needs_sites_and_patients_to_judge_on(folder, key, tmp_path, write_cases, capsys):
    write_cases(tmp_path / "patients", "GE", 2, seed=1)
    assert server("run", folder, "--test", tmp_path / "patients") == 2
    assert "no site is registered" in capsys.readouterr().err
    assert register(folder, key) == 0
    assert server("run", folder) == 2
    assert "needs --test" in capsys.readouterr().err
    assert server("run", folder, "--resume") == 2
    assert "no run to go on with" in capsys.readouterr().err


def test_status_tells_how_far_a_run_is_and_who_did_not_take_part(folder, make_study, capsys):
    run = make_study("federation.min_sites=2")
    common = {"stage": "federation", "dropped": {}, "epsilon": 1.5}
    run.metric(
        {**common, "round": 1, "answered": ["a", "b"], "refused": {"c": "too-few-patients"}, "silent": 0, "missing": 0}
    )
    run.metric({**common, "round": 2, "answered": ["a"], "refused": {}, "silent": 2, "missing": 1})
    assert server("status", folder, "--out", run.path, "--json") == 0
    facts = json.loads(capsys.readouterr().out)["run"]
    assert (facts["round"], facts["num_rounds"], facts["sites"], facts["quorum"]) == (2, 3, 3, 2)
    assert (facts["answered"], facts["silent"], facts["missing"]) == (["a"], 2, 1)
    assert facts["refused"] == {"c": "too-few-patients"}, "of an earlier round"
    assert server("status", folder, "--out", run.path) == 0
    shown = capsys.readouterr().out
    assert "1 of 3 sites answered (2 are needed)" in shown and "refused: too-few-patients" in shown
    assert "of 2 in the last round" in shown and "1 more were needed" in shown


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_status_is_shown_anew_when_it_changes_until_the_report_is_there(form, folder, monkeypatch, capsys):
    """Once, not at every look; and Ctrl-C is no error."""
    run = {"num_rounds": 2, "answered": [], "sites": 1, "quorum": 1, "epsilon": None, "silent": 0, "missing": 0}
    run |= {"refused": {}, "dropped": {}, "participation": {}}
    looks = [
        {"services": {"superlink": True}, "healthy": True, "sites": {}, "run": {**run, "round": 0, "stages": stages}}
        for stages in ([], [], ["federation"], ["federation"], ["federation", "report"])
    ]
    waits = []
    monkeypatch.setattr("fedcmr.server.deployment.runs.status", lambda *_: looks[len(waits)])
    monkeypatch.setattr("time.sleep", waits.append)
    assert server("status", folder, "--watch", "--every", 3, *form) == 0
    shown = capsys.readouterr().out
    assert waits == [3] * 4
    if form:
        assert [json.loads(line)["run"]["stages"] for line in shown.splitlines()] == [
            [],
            ["federation"],
            ["federation", "report"],
        ]
    else:
        assert shown.count("health") == 3 and "nothing yet" in shown and "federation, report" in shown

    def interrupted(_):
        raise KeyboardInterrupt

    waits.clear()
    monkeypatch.setattr("time.sleep", interrupted)
    assert server("status", folder, "--watch") == 0


@pytest.mark.parametrize("text", [None, "name: [", "name: study\ncolour: red\n", "name: study\nhealth_port: 0\n"])
def test_settings_that_cannot_be_are_one_line(folder, text, capsys):
    path = folder / "coordinator.yaml"
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert server("start", folder) == 2
    error = capsys.readouterr().err
    assert "coordinator.yaml" in error and error.count("\n") == 1
