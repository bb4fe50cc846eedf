"""A server that was broken into: whatever it sends, nothing lands outside the folder and nothing bad inside it."""

import hashlib
import io
import zipfile
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import pytest
from numpy.lib import format as npy

from fedcmr.shared.delivery.contract import MAX_CASE_BYTES, MAX_MESSAGE_BYTES, PROTOCOL
from fedcmr.shared.delivery.delivery_pb2 import CaseHeader, CaseRow, Chunk, Description
from fedcmr.shared.delivery.delivery_pb2_grpc import DeliveryServicer
from tests.conftest import make_case
from tests.server.delivery.conftest import content, served


def file_of(**changes) -> bytes:
    """A case's file, with some arrays replaced; None leaves one out."""
    case = make_case("x", "GE", seed=1, num_slices=2)
    arrays = {"frames": case.frames, "masks": case.masks, "spacing_mm": case.spacing_mm, **changes}
    file = io.BytesIO()
    np.savez_compressed(file, **{name: array for name, array in arrays.items() if array is not None})
    return file.getvalue()


GOOD = file_of()


def zipped(**members: bytes) -> bytes:
    """A zip of these members, next to those of a good case."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(GOOD)) as good, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in good.namelist():
            if name not in members:
                archive.writestr(name, good.read(name))
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def npy_of(shape: tuple[int, ...], data: bytes, descr: str = "<f4") -> bytes:
    file = io.BytesIO()
    npy.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
    return file.getvalue() + data


def header(name: str = "b", data: bytes = GOOD, **changes) -> Chunk:
    row = {"pseudonym": name, "vendor": "GE", "field_strength_t": float("nan"), "ef": 0.5, "group": "b"}
    whole = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    whole |= {key: changes.pop(key) for key in ("size", "sha256") if key in changes}
    return Chunk(header=CaseHeader(row=CaseRow(**{**row, **changes}), **whole))


def case(name: str = "b", data: bytes = GOOD, **changes) -> list[Chunk]:
    return [header(name, data, **changes), Chunk(data=data)]


class Hostile(DeliveryServicer):
    """Sends a good case "a", then whatever it likes."""

    def __init__(self, then: Callable[[], Iterator[Chunk]], **described):
        self._then, self._described = then, described

    def Describe(self, request, context):  # noqa: N802
        return Description(
            **{
                "protocol": PROTOCOL,
                "study": "pilot",
                "release_sha256": "0" * 64,
                "datasheet": "# x\n",
                "privacy": "none",
                "matching_cases": 2,
                "matching_bytes": 1000,
                **self._described,
            }
        )

    def Stream(self, request, context):  # noqa: N802
        if not request.after:
            yield from case("a")
        yield from self._then()


def endless() -> Iterator[Chunk]:
    number = 0
    while True:
        yield from case(f"b{number:09d}")
        number += 1


SENT = {
    "a name that climbs": lambda: case("../../evil"),
    "an absolute name": lambda: case("/tmp/evil"),
    "a name with a slash": lambda: case("b/evil"),
    "a hidden name": lambda: case(".bashrc"),
    "a name with a zero byte": lambda: case("b\0"),
    "an empty name": lambda: case(""),
    "a long name": lambda: case("b" * 65),
    "a group that climbs": lambda: case(group="../x"),
    "the same case again": lambda: case("a"),
    "a case before the last one": lambda: case("A"),
    "an unknown vendor": lambda: case(vendor="=cmd()"),
    "a case not requested": lambda: case(vendor="Philips"),
    "an impossible ejection fraction": lambda: case(ef=1.5),
    "an infinite ejection fraction": lambda: case(ef=float("inf")),
    "a free text": lambda: case(pathology="Jane Doe, 1950"),
    "no such sex": lambda: case(sex="?"),
    "a field strength of none": lambda: case(field_strength_t=-1.0),
    "a huge size": lambda: case(size=2**40),
    "a size of none": lambda: case(size=0),
    "just too large": lambda: case(size=MAX_CASE_BYTES + 1),
    "a hash that is none": lambda: case(sha256="0"),
    "a wrong hash": lambda: case(sha256="0" * 64),
    "more bytes than announced": lambda: case(size=len(GOOD) - 1),
    "fewer bytes than announced": lambda: case(size=len(GOOD) + 1),
    "data without a case": lambda: [Chunk(data=GOOD)],
    "empty data": lambda: [header(), Chunk(data=b"")],
    "an empty message": lambda: [Chunk()],
    "two headers": lambda: [header(), header("c")],
    "too large a message": lambda: [header(size=MAX_CASE_BYTES), Chunk(data=bytes(MAX_MESSAGE_BYTES + 1))],
    "fewer cases than described": lambda: [],
    "more cases than described": lambda: endless(),
    "garbage": lambda: case(data=b"\0" * 1000),
    "half a zip": lambda: case(data=GOOD[: len(GOOD) // 2]),
    "a pickle": lambda: case(data=file_of(frames=np.array([{"a": 1}], dtype=object))),
    "a missing array": lambda: case(data=file_of(masks=None)),
    "one array more": lambda: case(data=zipped(**{"../../evil.npy": b"x"})),
    "frames of another type": lambda: case(data=file_of(frames=np.zeros((2, 2, 96, 96), np.float64))),
    "frames beyond their range": lambda: case(data=file_of(frames=np.full((2, 2, 96, 96), np.nan, np.float32))),
    "masks of another shape": lambda: case(data=file_of(masks=np.zeros((2, 2, 9, 9), np.uint8))),
    "unknown labels": lambda: case(data=file_of(masks=np.full((2, 2, 96, 96), 9, np.uint8))),
    "no spacing": lambda: case(data=file_of(spacing_mm=np.zeros(3, np.float32))),
    "a claim of terabytes": lambda: case(data=zipped(**{"frames.npy": npy_of((2, 2**20, 2**10, 2**10), b"x")})),
    "a bomb": lambda: case(data=zipped(**{"frames.npy": npy_of((2, 2, 2**13, 2**12), bytes(2**29))})),
    "a negative shape": lambda: case(data=zipped(**{"frames.npy": npy_of((-2, -2, 1, 1), bytes(16))})),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", SENT)
def test_what_a_hostile_server_sends_is_not_kept(what, place, fetch, tmp_path, capsys):
    before = content(tmp_path)
    options = (("grpc.max_send_message_length", -1),)
    with served(place, Hostile(SENT[what]), *options) as port:
        assert fetch(port, "--vendor", "GE", "--patience", 0) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1 and "Traceback" not in shown
    assert "tell the coordinator" in shown and "evil" not in shown
    after = content(tmp_path)
    good = {"out/cases/a.npz", *(f"out/cases/b{i:09d}.npz" for i in range(1)), "out/fetch.json", "out/arrived.jsonl"}
    assert {name: data for name, data in after.items() if not name.startswith("out/")} == before
    assert {name for name in after if name.startswith("out/")} <= good
    assert after["out/cases/a.npz"] == GOOD, "what came before is whole"


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ({"protocol": 2}, "version 2 of the delivery protocol"),
        ({"protocol": 0}, "version 0 of the delivery protocol"),
        ({"matching_cases": 2**60}, "tell the coordinator"),
        ({"matching_bytes": 2**60}, "MiB free"),
        ({"datasheet": "x" * (MAX_MESSAGE_BYTES + 1)}, "tell the coordinator"),
    ],
)
def test_what_a_hostile_server_says_of_itself_is_not_believed(described, words, place, fetch, tmp_path, capsys):
    with served(place, Hostile(lambda: case(), **described), ("grpc.max_send_message_length", -1)) as port:
        assert fetch(port, "--patience", 0) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("out/cases/*"))


def test_a_server_s_words_cannot_command_the_terminal(place, fetch, tmp_path, capsys):
    described = {"study": "\x1b[2Jpilot\r\n", "privacy": "\x1b]0;title\x07none", "datasheet": "# x\x1b[2J\n\ttext\n"}
    with served(place, Hostile(lambda: case(), **described)) as port:
        assert fetch(port) == 0
    assert "\x1b" not in (shown := capsys.readouterr().out) and "\x07" not in shown and "pilot" in shown
    assert (tmp_path / "out" / "DATASHEET.md").read_text() == "# x[2J\n\ttext\n"

    class Abusive(Hostile):
        def Describe(self, request, context):  # noqa: N802
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "\x1b[31mcall this number\n" + "x" * 5000)

    with served(place, Abusive(lambda: case())) as port:
        assert fetch(port, out="other") == 2
    assert "\x1b" not in (shown := capsys.readouterr().err) and len(shown) < 400


def test_a_service_of_another_kind_is_told(place, fetch, capsys):
    class Other(DeliveryServicer):
        """Knows none of the methods."""

    with served(place, Other()) as port:
        assert fetch(port) == 2
    assert "is no delivery service of this version" in capsys.readouterr().err
