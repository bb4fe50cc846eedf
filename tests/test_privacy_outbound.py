"""What leaves a site, byte for byte: the same number of bytes whatever the data, and nothing that a patient brought."""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from flwr.app import Context, Message, Metadata, RecordDict
from flwr.common.serde import message_to_proto

from fedcmr.client import app as client_app
from fedcmr.client import subject, training
from fedcmr.client.ingest import prepare
from fedcmr.client.ingest.sandbox import Workers
from fedcmr.client.training import Patient
from fedcmr.server.settings import load
from fedcmr.shared.adapters import ADAPTERS
from fedcmr.shared.case import read_index
from fedcmr.shared.records import GRADIENTS, OK, STATISTICS, pack_request
from fedcmr.simulations.grid import InProcessGrid, make_grid, run_server_app
from fedcmr.simulations.run import simulate
from tests.wire_request import usual_request

CANARY = "Zebra-4711-Mustermann"
SMALL = (
    "hospitals.num_train=2",
    "hospitals.num_test=2",
    "hospitals.vendors=[Siemens, GE]",
    "federation.num_views=1",
    "federation.adapter=norm_affine",
    "federation.num_rounds=2",
    "federation.num_processes=1",
    "device=cpu",
    "synthesis.num_cases=2",
    "synthesis.num_steps=1",
    "regression.num_steps=1",
    "regression.batch_size=2",
    "regression.num_tta=1",
    "evaluation.baselines=[]",
    "evaluation.num_bootstrap=100",
)


def on_the_wire(message: Message) -> bytes:
    """A reply's records as Flower sends them, and the whole message that carries them."""
    arrays = [array.data for record in message.content.array_records.values() for array in record.values()]
    return message_to_proto(message).SerializeToString() + b"".join(arrays)


# Constant size


def patients_like(kind: str) -> list[Patient]:
    rng = torch.Generator().manual_seed(0)
    num, num_slices = {"many": (30, 1), "long": (5, 60)}.get(kind, (5, 2))
    patients = []
    for number in range(num):
        images = torch.rand(num_slices, 2, 64, 64, generator=rng)
        masks = torch.randint(0, 4, images.shape, generator=rng).to(torch.uint8)
        codes, vendors = torch.randn(1, 11, generator=rng), torch.zeros(num_slices, dtype=torch.int64)
        patients.append(Patient(f"p{number}", images, masks, codes, vendors))
    if kind == "nan":
        patients = [replace(p, images=p.images * torch.nan, styles=p.styles * torch.nan) for p in patients]
    if kind == "zero":
        patients = [replace(p, images=p.images * 0, styles=p.styles * 0) for p in patients]
    return patients


@pytest.mark.parametrize("task", [STATISTICS, GRADIENTS])
def test_an_update_has_the_same_bytes_whatever_the_data(make_study, prior, monkeypatch, task):
    site = make_study().path / "sites" / "a"
    arrays = {name: value.detach().numpy().copy() for name, value in prior.generator.trainable(ADAPTERS[1]).items()}
    is_statistics = task == STATISTICS
    sizes, contents = set(), set()
    for number, kind in enumerate(("few", "many", "long", "nan", "zero"), start=1):
        monkeypatch.setattr(subject, "cached_patients", lambda *_, kind=kind: patients_like(kind))
        request = usual_request(
            task=task,
            run_id=f"{number:016x}",
            server_round=1 if is_statistics else 2,
            prior_sha256=prior.sha256,
            noise_multiplier=9.0,
            max_grad_norm=4.0,
            local_steps=2 if is_statistics else 1,
            num_views=1,
        )
        metadata = Metadata(1, "m1", 1, 2, "", "", created_at=1e9, ttl=1e9, message_type="train")
        context = Context(1, 2, {"site": str(site), "device": "cpu"}, RecordDict(), {})
        reply = client_app.app(Message(pack_request(arrays, request), metadata=metadata), context)
        assert reply.content["reply"]["code"] == OK
        assert set(reply.content) == {"reply", "arrays"}
        payload = [array.data for array in reply.content["arrays"].values()]
        sizes.add((tuple(map(len, payload)), sum(record.count_bytes() for record in reply.content.values())))
        contents.add(b"".join(payload))
    assert len(sizes) == 1
    assert len(contents) == 5, "each with its own noise"


# A canary


@pytest.fixture
def everything_sent(monkeypatch) -> list[bytes]:
    """Every message that the grid carried, both ways, as bytes."""
    sent: list[bytes] = []
    original = InProcessGrid.send_and_receive

    def spy(self, messages, *, timeout=None):
        messages = list(messages)
        replies = list(original(self, messages, timeout=timeout))
        sent.extend(on_the_wire(message) for message in (*messages, *replies))
        return replies

    monkeypatch.setattr(InProcessGrid, "send_and_receive", spy)
    return sent


@pytest.fixture
def no_hurry(monkeypatch):
    """Children of `prepare` may take an hour: on a machine under load the limit would cost a site a patient."""
    monkeypatch.setattr(prepare, "Workers", partial(Workers, seconds=3600.0))


def mark_scans(hospitals: Path) -> int:
    """Put the canary into every header and every study's path; returns how many files have it."""
    files = sorted(hospitals.rglob("*.dcm"))
    for path in files:
        dataset = pydicom.dcmread(path)
        dataset.PatientName, dataset.InstitutionName = CANARY, CANARY
        dataset.SeriesDescription = f"{dataset.get('SeriesDescription', '')} {CANARY}"[:64]
        dataset.PatientComments = CANARY
        dataset.save_as(path)
    for study in {path for part in hospitals.glob("*/*") for path in part.iterdir()}:
        study.rename(study.with_name(f"{CANARY}-{study.name}"))
    return len(files)


def contents(folder: Path) -> Iterator[tuple[Path, bytes]]:
    """Every file's name and bytes; of compressed cases also what is in them."""
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder)).encode()
        yield path, name
        if path.is_file():
            yield path, path.read_bytes()
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                yield path, b"".join(array.tobytes() for array in arrays.values())


@pytest.mark.slow
def test_a_canary_in_dicom_in_a_path_and_in_an_exception_is_nowhere_but_at_its_site(
    tmp_path, tiny_prior, monkeypatch, everything_sent, no_hurry, capfd, caplog
):
    """Site 1 answers; site 2, whose folder bears the canary too, fails with it while it trains."""
    caplog.set_level(logging.DEBUG)
    config = load("smoke", [f"prior={tiny_prior}", *SMALL])
    run = simulate(config, tmp_path / "run", until="hospitals")
    assert mark_scans(run.path / "hospitals") > 100
    run = simulate(config, run.path, until="prepare")
    assert [len(read_index(run.path / "sites" / name / "train")) for name in run.site_names()] == [2, 2]
    found = [path for path, content in contents(run.path / "sites") if CANARY.encode() in content]
    assert found == [], "prepared cases, their index, settings and counts"
    shutil.rmtree(run.path / "hospitals")  # the scans themselves never leave the hospital

    site = run.path / "sites" / "2-ge"
    (site / "train").rename(site / CANARY)
    settings = (site / "site.yaml").read_text()
    (site / "site.yaml").write_text(
        settings.replace('"../../sites/2-ge/train"', f'"{CANARY}"').replace('data: "train"', f'data: "{CANARY}"')
    )
    assert CANARY in (site / "site.yaml").read_text()
    real = training.fine_tune

    def fails_at_one_site(generator, patients, *args, **kwargs):
        if broken == patients[0].name:
            raise RuntimeError(f"{CANARY} cannot be read: {site / CANARY} \udcff")
        return real(generator, patients, *args, **kwargs)

    broken = subject.cached_patients(site / CANARY, tiny_prior, ("GE",))[0].name
    monkeypatch.setattr(training, "fine_tune", fails_at_one_site)
    capfd.readouterr()
    caplog.clear()
    with make_grid(run) as grid:
        run_server_app(grid, {"run-dir": str(run.path.resolve())})

    (line,) = [line for line in run.metrics() if line.get("round") == 2]
    assert line["refused"] == {"2-ge": "internal-error"} and line["answered"] == ["1-siemens"]
    assert CANARY in (site / "errors.log").read_text(), "the site's own people should find it"
    shutil.rmtree(site)
    canary = CANARY.encode()
    assert (run.path / "report.html").is_file()
    assert [path for path, content in contents(run.path) if canary in content] == []
    assert len(everything_sent) == 8, "two sites, two rounds, both ways"
    assert not any(canary in content for content in everything_sent)
    printed = capfd.readouterr()
    assert CANARY not in printed.out + printed.err + caplog.text
