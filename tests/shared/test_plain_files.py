"""What somebody else has put in a file's place: a device, a pipe, more than fits, or a header that fills the memory."""

import json
import os
import struct
import time

import numpy as np
import pytest

from fedcmr.client.cli import main
from fedcmr.shared import checkpoint
from fedcmr.shared.case import read_index
from fedcmr.shared.errors import UserError
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.plain_files import read_plain


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


ODD = pytest.mark.parametrize("make", [pipe, device, lambda path: path.mkdir()], ids=["pipe", "device", "folder"])


@ODD
def test_what_is_no_regular_file_is_not_read(tmp_path, make):
    make(tmp_path / "x")
    with pytest.raises(OSError):
        read_plain(tmp_path / "x", 100)


def test_a_link_to_a_file_is_read_and_one_that_is_too_long_is_not(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert read_plain(tmp_path / "b", 100) == b"x" * 100
    with pytest.raises(OSError, match="larger than 99 bytes"):
        read_plain(tmp_path / "b", 99)


@ODD
@pytest.mark.parametrize(
    ("layout", "name"), [("mnms", "x.csv"), ("mnms2", "dataset_information.csv"), ("plain", "cases.csv")]
)
def test_a_table_that_is_none_ends_prepare_at_once(tmp_path, capsys, make, layout, name):
    """The table is read before any child process is asked, so nothing watched over it."""
    (tmp_path / "s" / "frames").mkdir(parents=True)
    make(tmp_path / "s" / name)
    assert main(["prepare", "--format", layout, str(tmp_path / "s"), str(tmp_path / "d"), "--num-processes", "1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error


@ODD
def test_a_key_and_an_index_that_are_none_are_one_line(tmp_path, make):
    make(tmp_path / "pseudonym.key")
    (tmp_path / "s").mkdir()
    make(tmp_path / "cases.csv")
    with pytest.raises(UserError):
        read_index(tmp_path)
    assert main(["prepare", "--format", "dicom", str(tmp_path / "s"), str(tmp_path / "d"), "--num-processes", "1"]) == 2


def safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def header(**metadata) -> bytes:
    return json.dumps({"__metadata__": metadata}).encode()


DAMAGED = {
    "many arrays": safetensors(
        json.dumps({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}).encode()
    ),
    "no metadata": safetensors(b"{}"),
    "deep metadata": safetensors(header(json="[" * 100_000, architecture="[" * 100_000)),
    "huge network": safetensors(
        header(architecture=json.dumps({"channels": [10**6, 10**6], "num_res_blocks": 1, "norm_num_groups": 16}))
    ),
    "no network": safetensors(header(architecture='{"channels": []}')),
    "lying length": struct.pack("<Q", 2**63 - 1) + b"{}",
    "short": b"\1",
    "empty": b"",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_damaged_weights_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    started = time.process_time()
    for load in (checkpoint.load, load_prior):
        with pytest.raises(UserError) as caught:
            load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert time.process_time() - started < 2, "nothing large was made of it"


def test_whole_weights_are_still_read(tmp_path):
    checkpoint.save(tmp_path / "x.safetensors", {f"a{i}": np.zeros(1, np.float32) for i in range(2000)}, {})
    assert len(checkpoint.load(tmp_path / "x.safetensors")[0]) == 2000
