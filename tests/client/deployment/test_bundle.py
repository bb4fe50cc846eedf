"""A site lets in the version that it has reviewed and no other, checked before anything is unpacked."""

import hashlib
import io
import shutil
import subprocess
import sys
import zipfile
from functools import cache, partial
from importlib.metadata import distribution

import pytest
from flwr.cli.install import install_from_fab
from flwr.common.config import get_project_dir

from fedcmr.client.code_hash import code_sha256, sha256_of_files
from fedcmr.client.deployment.bundle import BundleRefused, check_bundle
from fedcmr.client.deployment.clientapp import SITE_VARIABLE, checking
from fedcmr.client.deployment.commands import write_commands
from fedcmr.client.error_log import read_entries
from fedcmr.shared.errors import UserError
from fedcmr.simulations.flower_engine import ROOT

PROJECT = (
    b'[project]\nname = "fedcmr"\nversion = "1.0.0"\n[tool.flwr.app]\npublisher = "fedcmr"\n'
    b'[tool.flwr.app.components]\nserverapp = "fedcmr:server_app"\nclientapp = "fedcmr:client_app"\n'
)
CONFIG = b'[tool.flwr.app.components]\nserverapp = "fedcmr:server_app"\nclientapp = "fedcmr:client_app"\n'


def files() -> dict[str, bytes]:
    """What Flower packs: the sources of this checkout."""
    found = {"pyproject.toml": CONFIG, ".info/CONTENT": b"", "configs/default.yaml": b"seed: 0\n"}
    found["fedcmr/__init__.py"] = (ROOT / "fedcmr" / "__init__.py").read_bytes()
    for package in ("client", "server", "shared"):
        for path in (ROOT / package).rglob("*.py"):
            found[path.relative_to(ROOT).as_posix()] = path.read_bytes()
    return found


def packed(content: dict[str, bytes], *twice: tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in (*content.items(), *twice):
            archive.writestr(name, data)
    return buffer.getvalue()


def refused(content: bytes, allowed=None) -> bool:
    try:
        check_bundle(content, [code_sha256()] if allowed is None else allowed)
    except BundleRefused as error:
        assert str(error) == "code-not-allowed", "what the server hears is a code"
        return True
    return False


def test_the_reviewed_version_is_let_in():
    assert not refused(packed(files()))
    assert refused(packed(files()), ["0" * 64]), "another version is listed"


def test_a_changed_server_is_the_servers_own_business():
    assert not refused(packed(files() | {"server/app.py": b"print('other')"}))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("client/app.py", b"steal()"),  # a reviewed file, changed
        ("shared/extra.py", b""),  # one more in a reviewed package
        ("client/app.cpython-311-x86_64-linux-gnu.so", b"\x7fELF"),  # found before app.py
        ("client/app.pyc", b""),
        ("torch.py", b"steal()"),  # in front of a library
        ("numpy/__init__.py", b"steal()"),
        ("sitecustomize.py", b"steal()"),
        ("../client/app.py", b"steal()"),
        ("/etc/cron.d/x", b""),
        ("client\\app.py", b""),
        ("configs/x/y.yaml", b""),
        ("data.npz", b""),
        ("pyproject.toml", CONFIG.replace(b"fedcmr:client_app", b"fedcmr.server.app:steal")),
        ("pyproject.toml", b"no toml ["),
    ],
)
def test_a_bundle_with_anything_else_is_refused(name, data):
    assert refused(packed(files() | {name: data}))


def test_a_name_that_comes_twice_is_refused():
    with pytest.warns(UserWarning, match="Duplicate name"):
        content = packed(files(), ("client/app.py", b"steal()"))
    assert refused(content)


def test_a_missing_reviewed_file_is_refused():
    fewer = files()
    del fewer["client/policy.py"]
    assert refused(packed(fewer))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x00" * 100, packed({})])
def test_what_is_no_bundle_is_refused(content):
    assert refused(content)


def test_an_empty_list_lets_nothing_in():
    assert refused(packed(files()), [])


@pytest.fixture
def flower(tmp_path, monkeypatch):
    """Flower's own unpacking into a folder of this test, made to refuse; a loader that tells from which folder."""
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    unpack, make_loader = checking([code_sha256()], install_from_fab, lambda: get_project_dir, get_project_dir)
    return partial(unpack, skip_prompt=True), make_loader


@cache
def bundle() -> bytes:
    """One that Flower's own unpacking takes: with hashes of its files; made once, for a zip holds the time."""
    return packed(files() | {"pyproject.toml": PROJECT, ".info/CONTENT": b"pyproject.toml,%s,0" % sha256(PROJECT)})


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()


def words(content: bytes) -> tuple[str, str, str]:
    """A run's own words for its bundle."""
    return "fedcmr/fedcmr", "1.0.0", sha256(content).decode()


def test_a_checked_bundle_is_loaded_from_where_it_was_unpacked(flower):
    unpack, make_loader = flower
    folder = unpack(bundle())
    assert make_loader()(*words(bundle())) == folder and (folder / "client" / "app.py").is_file()
    (folder / "client" / "__pycache__").mkdir()
    (folder / "client" / "__pycache__" / "app.cpython-311.pyc").touch()
    assert unpack(bundle()) == folder, "the next message finds it there"


def test_a_refused_bundle_is_told_to_the_sites_own_people(flower, tmp_path, monkeypatch):
    """The coordinator alone once heard of it."""
    monkeypatch.setenv(SITE_VARIABLE, str(tmp_path))
    unpack, make_loader = flower
    with pytest.raises(BundleRefused, match="code-not-allowed"):
        unpack(packed(files() | {"client/app.py": b"steal()"}))
    with pytest.raises(BundleRefused, match="code-not-allowed"):
        make_loader()("fedcmr/fedcmr", "9.9.9", "0" * 8)
    assert [entry.code for entry in read_entries(tmp_path)] == ["code-not-allowed"] * 2


def test_nothing_is_loaded_that_was_not_checked(flower):
    with pytest.raises(BundleRefused):
        flower[1]()(*words(bundle()))


@pytest.mark.parametrize(
    ("position", "word"),
    [(0, "other/app"), (1, "0.9.0"), (1, "1.0.0.0/../../x"), (2, "f" * 64)],
    ids=["publisher", "earlier version", "way out of the folder", "another bundle"],
)
def test_the_servers_words_for_a_run_lead_to_no_other_folder(flower, position, word):
    """Folders of earlier versions, which may be listed no more, stay where they were unpacked."""
    flower[0](bundle())
    changed = list(words(bundle()))
    changed[position] = word
    with pytest.raises(BundleRefused):
        flower[1]()(*changed)


@pytest.mark.parametrize("left", ["half unpacked", "changed", "one more", "a link"])
def test_a_folder_that_is_not_the_bundle_is_unpacked_again(flower, left, tmp_path):
    """Flower takes a folder of the right name as it is; its name has eight digits of a hash."""
    folder = flower[0](bundle())
    if left == "half unpacked":
        shutil.rmtree(folder / "client")
    elif left == "changed":
        (folder / "client" / "app.py").write_text("steal()")
    elif left == "one more":
        (folder / "torch.py").write_text("steal()")
    else:
        (tmp_path / "elsewhere").mkdir()
        (folder / "torch").symlink_to(tmp_path / "elsewhere")
    assert flower[0](bundle()) == folder
    assert (folder / "client" / "app.py").read_bytes() == files()["client/app.py"]
    assert not (folder / "torch.py").exists() and not (folder / "torch").exists()


def test_every_other_kind_of_app_has_a_command_that_refuses(tmp_path):
    write_commands(tmp_path, tmp_path.parent / "no-worker")
    commands = {entry.name for entry in distribution("flwr").entry_points if entry.name.startswith("flwr-")}
    assert {path.name for path in tmp_path.iterdir()} == commands >= {"flwr-agentapp", "flwr-serverapp"}
    for name in commands - {"flwr-clientapp", "flwr-agentapp"}:  # tests/deployment has the agent's
        done = subprocess.run([tmp_path / name, "--token", "x"], capture_output=True, text=True, check=False)
        assert done.returncode == 1 and f"{name}: refused" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "hidden", ["client/hash_chained_log.py", "client/policy.py", "client/__init__.py", "shared/privacy.py"]
)
def test_no_file_hides_in_the_name_of_another_one(hidden):
    """A name with a line break once stood for two lines of the fingerprint, and one file was missing."""
    honest = files()
    pinned = sorted(name for name in honest if name.startswith(("client/", "shared/")) and name.endswith(".py"))
    following = pinned[pinned.index(hidden) + 1]
    fewer = {name: data for name, data in honest.items() if name not in (hidden, following)}
    name = f"{hidden} {sha256(honest[hidden])}\n{following}"
    assert refused(packed(fewer | {name: honest[following]}))
    with pytest.raises(UserError, match="file name"):
        sha256_of_files(fewer | {name: honest[following]})


def test_the_fingerprint_tells_names_from_contents():
    """No two sets of files share a fingerprint, however their names and contents are cut from the same bytes."""
    sets = [
        {"client/a.py": b"xy"},
        {"client/a.py": b"x", "client/b.py": b"y"},
        {"client/a.py": b"", "client/b.py": b"xy"},
        {"client/a.py": b"xclient/b.pyy"},
        {"client/a.pyx.py": b"y"},
        {"client/a.pyx.py": b""},
        {"client/a.py": b"x.py"},
        {"client/a.py": b"x" + bytes(7) + b"\x0bclient/b.py" + bytes(7) + b"\x01y"},
        {"shared/a.py": b"xy"},
        {},
    ]
    assert len({sha256_of_files(each) for each in sets}) == len(sets)
    assert sha256_of_files(sets[1]) == sha256_of_files(dict(reversed(sets[1].items()))), "the order does not count"
    assert sha256_of_files(sets[0] | {"server/a.py": b"other"}) == sha256_of_files(sets[0])


@pytest.mark.parametrize(
    "name",
    [
        "client/a\n.py",
        "client/a .py",
        "client/../a.py",
        "client//a.py",
        "/client/a.py",
        "client/.a.py",
        "client/\u0430.py",
        "client/a\0.py",
        "client\\a.py",
        "client/a.py/",
        "client/\u202ea.py",
    ],
)
def test_only_plain_names_have_a_fingerprint(name):
    assert refused(packed(files() | {name: b""}))
    with pytest.raises(UserError, match="file name"):
        sha256_of_files({name: b""})


def test_what_judges_a_bundle_loads_no_library_that_takes_long():
    """Without the pre-forked worker it starts for every message."""
    code = (
        "import sys, fedcmr.client.deployment.clientapp as _; print(*{'torch', 'opacus', 'monai'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
