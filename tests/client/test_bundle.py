"""A site lets in the version that it has reviewed and no other, judged before anything is unpacked."""

import io
import zipfile

import pytest

from client.code_hash import code_sha256
from client.deployment.bundle import BundleRefused, check_bundle
from simulations.flower_engine import ROOT

CONFIG = b'[tool.flwr.app.components]\nserverapp = "server.app:app"\nclientapp = "client.app:app"\n'


def files() -> dict[str, bytes]:
    """What Flower packs: the sources of this checkout."""
    found = {"pyproject.toml": CONFIG, ".info/CONTENT": b"", "configs/default.yaml": b"seed: 0\n"}
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
        ("client/app.py", b"steal()"),                                       # a reviewed file, changed
        ("shared/extra.py", b""),                                            # one more in a reviewed package
        ("client/app.cpython-311-x86_64-linux-gnu.so", b"\x7fELF"),          # found before app.py
        ("client/app.pyc", b""),
        ("torch.py", b"steal()"),                                            # in front of a library
        ("numpy/__init__.py", b"steal()"),
        ("sitecustomize.py", b"steal()"),
        ("../client/app.py", b"steal()"),
        ("/etc/cron.d/x", b""),
        ("client\\app.py", b""),
        ("configs/x/y.yaml", b""),
        ("data.npz", b""),
        ("pyproject.toml", CONFIG.replace(b"client.app:app", b"server.app:steal")),
        ("pyproject.toml", b"no toml ["),
    ],
)  # fmt: skip
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
