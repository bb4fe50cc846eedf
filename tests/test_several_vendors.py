"""A hospital with scanners of several vendors is one site: one ledger, one clip per patient, a style per vendor."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Context, Message, Metadata, RecordDict

from fedcmr.client.app import app
from fedcmr.client.ledger import Ledger
from fedcmr.client.policy import load_site
from fedcmr.client.trainable import trainable
from fedcmr.client.training import Patient, load_patients, patient_gradient, statistics
from fedcmr.server.federation.federate import federate
from fedcmr.shared import checkpoint, privacy
from fedcmr.shared.case import Case, save_case, write_index
from fedcmr.shared.models.prior import load_prior
from fedcmr.shared.privacy import Mechanism, clip_to_norm, epsilon, moment_vectors
from fedcmr.shared.records import OK, Request, decode, pack_request
from fedcmr.shared.site_facts import facts_line
from fedcmr.shared.style_statistics import SECOND_NORM, two_step_mean
from fedcmr.simulations.grid import make_grid
from tests.conftest import make_case
from tests.wire_request import usual_request

DELTA = 1e-3
SIZE = 11


def in_group(case: Case, group: str) -> Case:
    return replace(case, info=replace(case.info, group=group))


def write_both(folder: Path, num: int = 6) -> None:
    """Patients scanned on a Siemens and on a darker Philips scanner."""
    cases = []
    for index in range(num):
        dark = make_case(f"q{index:02d}", "Philips", 50 + index)
        dark = replace(dark, frames=dark.frames * np.float32(0.5))
        cases += [make_case(f"p{index:02d}", "Siemens", index), dark]
    cases = [in_group(case, f"g{case.info.pseudonym[1:]}") for case in cases]
    for case in cases:
        save_case(folder, case)
    write_index(folder, [case.info for case in cases])


@pytest.fixture
def study(make_study):
    """Site "a" has both scanners; every patient of it was on both."""
    run = make_study("federation.num_rounds=2", "federation.local_steps=1")
    site = run.path / "sites" / "a"
    write_both(site / "train")
    facts = {"vendors": {"Siemens": 6, "Philips": 6}, "nominal_patients": 6}
    text = (site / "site.yaml").read_text()
    text = text.replace('vendors: {"Siemens": 5}', f"vendors: {json.dumps(facts['vendors'])}")
    (site / "site.yaml").write_text(text.replace("nominal_patients: 5", "nominal_patients: 6"))
    content = json.loads((run.path / "study.json").read_text())
    content["sites"]["a"] = facts
    (run.path / "study.json").write_text(json.dumps(content))
    assert load_site(site).vendors == facts["vendors"]
    return run


@pytest.fixture
def request_of(prior):
    def make(**changes) -> Request:
        request = usual_request(prior_sha256=prior.sha256, noise_multiplier=0.62, target_delta=DELTA)
        if changes.get("task") == "statistics":
            changes = {"server_round": 1, "max_grad_norm": 4.0, "local_steps": 2, "noise_multiplier": 9.0} | changes
        return replace(request, **changes)

    return make


def ask(site, prior, request):
    arrays = {name: value.detach().numpy().copy() for name, value in prior.generator.trainable().items()}
    metadata = Metadata(1, "m1", 1, 2, "", "", created_at=1e9, ttl=1e9, message_type="train")
    context = Context(1, 2, {"site": str(site), "device": "cpu"}, RecordDict(), {})
    return app(Message(pack_request(arrays, request), metadata=metadata), context).content


def test_a_patient_of_both_scanners_pays_once_and_stays_under_the_cap(study, prior, request_of):
    site = study.path / "sites" / "a"
    request = request_of()
    assert ask(site, prior, request)["reply"]["code"] == OK
    ledger = Ledger(site / "ledger")
    assert ledger.releases() == [request.mechanism.release]
    spent = epsilon([request.mechanism.release], DELTA)[0]
    assert ledger.spent(DELTA) == pytest.approx(spent) and spent < 8
    assert epsilon([request.mechanism.release] * 2, DELTA)[0] > 8, "as two sites the same patient would have paid that"
    found = trainable(site / "train", load_site(site).vendors)
    assert (found.num_patients, found.vendors) == (6, {"Philips": 6, "Siemens": 6})


def test_statistics_come_back_for_every_vendor_that_the_site_declares(study, prior, request_of):
    reply = ask(study.path / "sites" / "a", prior, request_of(task="statistics"))
    decode(reply["arrays"], {"style_mean": (2, SIZE), "style_square": (2, SIZE)})


@pytest.mark.parametrize(
    "stated",
    [
        facts_line("a", {"Siemens": 6}, 6),
        facts_line("a", {"Siemens": 6, "Philips": 6, "GE": 6}, 6),
        facts_line("a", {"Siemens": 6, "Philips": 6}, 7),
        facts_line("b", {"Siemens": 6, "Philips": 6}, 6),
    ],
    ids=["fewer", "more", "another-size", "another-site"],
)
def test_a_server_that_counts_with_other_facts_is_refused_before_anything_is_charged(study, prior, request_of, stated):
    site = study.path / "sites" / "a"
    others = facts_line("c", {"GE": 5}, 5)
    right = facts_line("a", {"Siemens": 6, "Philips": 6}, 6)
    request = request_of(task="statistics")
    assert ask(site, prior, replace(request, sites=f"{stated}\n{others}"))["reply"]["code"] == "facts-differ"
    assert Ledger(site / "ledger").releases() == []
    assert "fedcmr-server register" in (site / "errors.log").read_text()
    assert ask(site, prior, replace(request, sites=f"{right}\n{others}"))["reply"]["code"] == OK


def test_a_study_publishes_a_style_for_each_of_the_sites_vendors(study):
    with make_grid(study) as grid:
        federate(grid, study, load_prior(study.prior_path()))
    arrays, metadata = checkpoint.load(study.path / "generator.safetensors")
    assert {name for name in arrays if name.startswith("code_mean")} == {
        f"code_mean/{vendor}" for vendor in ("Siemens", "Philips", "GE")
    }
    assert metadata["sites"]["a"]["vendors"] == ["Philips", "Siemens"]
    assert [line["answered"] for line in study.metrics()] == [["a", "b", "c"]] * 2


def test_gradients_see_every_slice_with_its_own_vendors_style(tmp_path, prior, monkeypatch):
    write_both(tmp_path, num=1)
    (patient,) = load_patients(tmp_path, prior, ("Philips", "Siemens"))
    assert patient.styles.shape == (2, SIZE) and patient.vendors.tolist() == [1, 1, 1, 0, 0, 0]
    assert patient.styles[0, 0] < patient.styles[1, 0] - 0.3, "lv_mean of the dark scanner"
    seen = []

    loss = prior.generator.loss

    def recorded(images, condition, rng):
        seen.append((images, condition.style))
        return loss(images, condition, rng)

    monkeypatch.setattr("fedcmr.client.training.augment_in_equal_time", lambda images, masks, rng, **_: (images, masks))
    monkeypatch.setattr(prior.generator, "loss", recorded)
    patient_gradient(prior.generator, patient, 32, seed=1)
    ((images, codes),) = seen
    of_slice = [next(k for k in range(6) if torch.equal(image, patient.images[k])) for image in images]
    assert set(of_slice) == set(range(6)), "slices of both scans are averaged in one gradient"
    for number, code in zip(of_slice, codes, strict=True):
        assert torch.equal(code, patient.styles[patient.vendors[number]])


def invented(name: str, vendors: tuple[int, ...], seed: int, scale: float = 3.0) -> Patient:
    """A patient with one slice of each of these vendors, of two."""
    rng = torch.Generator().manual_seed(seed)
    codes = torch.zeros(2, SIZE)
    codes[list(vendors)] = scale * torch.randn(len(vendors), SIZE, generator=rng)
    blank = torch.zeros(len(vendors), 2, 64, 64)
    return Patient(name, blank, blank.to(torch.uint8), codes, torch.tensor(vendors))


@pytest.mark.parametrize("vendors", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("scale", [0.5, 3.0, 1e30, math.nan])
def test_a_patient_moves_each_look_by_at_most_its_clip_whatever_its_vendors(monkeypatch, vendors, scale):
    """The sums before noise, as `statistics` asks for them; the second step's centre is public and held fixed."""
    sums = []
    centre = np.random.default_rng(5).normal(size=2 * SIZE) * 5

    def spy(per_patient, clip, noise_multiplier, dimension, rng):
        sums.append((original(list(per_patient), clip, 0.0, dimension, None), clip))
        return centre if dimension == 2 * SIZE else np.zeros(dimension)

    original = privacy.private_sum
    monkeypatch.setattr(privacy, "private_sum", spy)
    others = [invented(f"p{number}", vendors, number) for number, vendors in enumerate([(0,), (1,), (0, 1)])]
    mechanism = Mechanism(1.0, 1.0, 1, 0.7, 1e-3, private=True, nominal_patients=3)
    statistics([*others, invented("extra", vendors, 9, scale)], mechanism, [2, 3])
    statistics(others, mechanism, [2, 3])
    assert [clip for _, clip in sums] == [0.7, 1.0] * 2
    for (with_patient, clip), (without, _) in zip(sums[:2], sums[2:], strict=True):
        moved = with_patient - without
        assert np.linalg.norm(moved) <= clip * (1 + 1e-9)
        absent = [vendor for vendor in (0, 1) if vendor not in vendors]
        assert not moved.reshape(-1, 2, SIZE)[:, absent].any(), "nothing is said of a vendor without a scan"


def of_one_vendor(codes, clip, noise_multiplier, nominal_patients, rng):
    """The formulae of the version that knew one vendor a site."""
    total = np.sum([clip_to_norm(code, clip) for code in codes], axis=0)
    centre = (total + rng.normal(0.0, noise_multiplier * clip, size=codes.shape[1])) / nominal_patients
    narrow = SECOND_NORM * clip
    vectors = np.sum([*moment_vectors(codes - centre, narrow)], axis=0)
    noised = (vectors + rng.normal(0.0, noise_multiplier, size=len(vectors))) * math.sqrt(2) / nominal_patients
    offset, square = noised[: len(centre)] * narrow, noised[len(centre) :] * (narrow**2 / 2)
    mean = centre + offset / (1 + 2 * SECOND_NORM**2)
    noise = math.sqrt(2) * SECOND_NORM * clip * noise_multiplier / nominal_patients
    return mean, square - offset**2 + noise**2 + mean**2


def test_with_one_vendor_the_released_numbers_are_those_of_before():
    codes = np.random.default_rng(0).normal(0.4, 2.0, (7, SIZE))
    released = two_step_mean(codes, 4.0, 1.3, np.full(SIZE, 9), np.random.default_rng(1), np.ones(codes.shape, bool))
    for ours, before in zip(released, of_one_vendor(codes, 4.0, 1.3, 9, np.random.default_rng(1)), strict=True):
        np.testing.assert_array_equal(ours, before)


def test_without_noise_each_vendors_figures_are_those_of_its_own_patients():
    rng = np.random.default_rng(0)
    codes = rng.normal([0.3] * 3 + [-0.6] * 3, 0.2, (8, 6))
    known = np.ones((8, 6), bool)
    known[:3, 3:] = known[6:, :3] = False  # three patients of the first vendor alone, two of the second
    mean, square = two_step_mean(np.where(known, codes, 0), 50.0, 0.0, np.repeat([6, 5], 3), None, known)
    for columns in (slice(0, 3), slice(3, 6)):
        own = codes[known[:, columns.start], columns]
        np.testing.assert_allclose(mean[columns], own.mean(axis=0))
        np.testing.assert_allclose(square[columns], (own**2).mean(axis=0))
