"""An archive with four studies, and the cases that the same files give."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedcmr.client.ingest.prepare import prepare
from fedcmr.simulations.benchmarks.orthanc import Orthanc
from tests.client.archive.studies import write_studies

KEY = bytes(range(32))


@pytest.fixture(scope="session")
def studies(tmp_path_factory) -> Path:
    return write_studies(tmp_path_factory.mktemp("studies") / "export")


@pytest.fixture(scope="session")
def from_files(tmp_path_factory, studies) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "train"
    prepare(studies, folder, "dicom", key=KEY)
    return folder


@pytest.fixture(scope="session")
def archive(tmp_path_factory, studies) -> Iterator[Orthanc]:
    folder = tmp_path_factory.mktemp("archive")
    with Orthanc(folder) as orthanc:
        orthanc.store(sorted(studies.rglob("*.dcm")))
        yield orthanc
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def key_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("key") / "pseudonym.key"
    path.write_text(KEY.hex())
    path.chmod(0o600)
    return path
