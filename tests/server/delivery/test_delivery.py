"""What a partner gets: the released set as it is, a part of it, or new cases on demand."""

import math
import shutil
import subprocess
from itertools import islice

import numpy as np
import pytest

from fedcmr.server.delivery.on_demand import BATCH, OnDemandSampler
from fedcmr.server.delivery.released_set import open_released_set
from fedcmr.server.delivery.serve import Service
from fedcmr.server.delivery.service import Offer
from fedcmr.shared.case import load_cases, read_index
from fedcmr.shared.delivery.delivery_pb2 import Selection
from fedcmr.shared.errors import UserError
from tests.server.delivery.conftest import PER_VENDOR, STYLES, content


def test_the_whole_set_arrives_byte_for_byte(service, finished, fetch, place, tmp_path, capsys):
    assert fetch(service.port) == 0
    assert "24 synthetic cases of pilot" in (shown := capsys.readouterr().out) and "epsilon 7.90" in shown
    sent, got = content(finished.path / "synthetic"), content(tmp_path / "out")
    assert {name for name in got if name not in sent} == {"fetch.json"}
    assert all(got[name] == sent[name] for name in got if name not in ("fetch.json", "SHA256SUMS"))
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=tmp_path / "out", check=True)
    assert len(load_cases(tmp_path / "out")) == 24
    assert fetch(service.port) == 0, "the same command again has nothing to do"
    last, described = place.audit()[-2], place.audit()[-1]
    assert (last["method"], last["site"], last["cases"], last["code"]) == (
        "/fedcmr.delivery.v1.Delivery/Stream",
        "st-elsewhere",
        24,
        "OK",
    )
    assert described["method"].endswith("Describe") and described["selection"] == "all"
    assert place.token not in (place.folder / "logs" / "delivery.log").read_text()


def test_vendor_and_range_of_ejection_fractions_select(service, finished, fetch, tmp_path):
    infos = [info for info in read_index(finished.path / "synthetic") if info.vendor in ("GE", "Siemens")]
    low, high = sorted(info.ef for info in infos)[3], sorted(info.ef for info in infos)[9]  # both ends are included
    assert fetch(service.port, "--vendor", "GE", "--vendor", "Siemens", "--ef", low, high) == 0
    expected = [info for info in infos if low <= info.ef <= high]
    got = read_index(tmp_path / "out")
    assert [info.pseudonym for info in got] == [info.pseudonym for info in expected] and len(got) == 7
    assert {path.stem for path in (tmp_path / "out" / "cases").iterdir()} == {info.pseudonym for info in expected}
    note = (tmp_path / "out" / "DATASHEET.md").read_text().splitlines()[0]
    assert "7 of the 24 cases" in note and "GE and Siemens" in note


def test_what_matches_nothing_is_an_error_that_tells_what_there_is(service, fetch, tmp_path, capsys):
    assert fetch(service.port, "--vendor", "Canon") == 2
    assert "nothing matches Canon: the set has 8 GE, 8 Philips, 8 Siemens" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert fetch(service.port, "--ef", "20", "40") == 2
    assert "as fractions" in capsys.readouterr().err
    assert fetch(service.port, "--on-demand", "3") == 2
    assert "makes no cases on demand" in capsys.readouterr().err


def test_cases_on_demand_are_what_was_requested(place, offer, sampler, fetch, tmp_path, capsys):
    with Service(place.folder, Offer(**{**vars(offer), "sampler": sampler}), "127.0.0.1", 0) as service:
        options = ("--on-demand", 9, "--seed", 3, "--vendor", "Philips", "--ef", 0.3, 0.4)
        assert fetch(service.port, *options) == 0
        assert fetch(service.port, *options, out="again") == 0
        assert fetch(service.port, "--on-demand", 101, out="many") == 2
        assert "at most 100" in capsys.readouterr().err
        assert fetch(service.port, "--on-demand", 3, "--vendor", "Canon", out="canon") == 2
        assert "not Canon" in capsys.readouterr().err
        assert fetch(service.port, "--on-demand", 3, "--ef", 0.3, 0.301, out="narrow") == 2
        assert "0.02 apart" in capsys.readouterr().err
    infos = read_index(tmp_path / "out")
    assert len(infos) == 9 and all(info.vendor == "Philips" and 0.3 <= info.ef <= 0.4 for info in infos)
    assert max(info.ef for info in infos) - min(info.ef for info in infos) > 0.05, "spread over the range"
    assert content(tmp_path / "out") == content(tmp_path / "again")
    assert "sampled with seed 3" in (tmp_path / "out" / "DATASHEET.md").read_text().splitlines()[0]


def test_a_case_on_demand_depends_on_seed_and_number_alone(sampler: OnDemandSampler):
    query = sampler.query(Selection(), seed=1)
    straight = list(islice(sampler.cases(query), BATCH + 4))
    for start in (0, 2, BATCH - 1, BATCH):
        rest = islice(sampler.cases(query, straight[start].info.pseudonym), 2)
        for case, expected in zip(rest, straight[start + 1 :], strict=False):
            assert repr(case.info) == repr(expected.info)  # no field strength: NaN
            np.testing.assert_array_equal(case.frames, expected.frames)
    assert [case.info.vendor for case in straight[:6]] == [*STYLES, *STYLES]
    assert len({case.info.pseudonym for case in straight}) == len(straight)
    assert [case.info.pseudonym for case in straight] == sorted(case.info.pseudonym for case in straight)
    other = next(sampler.cases(sampler.query(Selection(), seed=2)))
    assert other.info.pseudonym != straight[0].info.pseudonym and not np.array_equal(other.frames, straight[0].frames)


def test_ejection_fractions_of_cases_on_demand_are_spread_evenly_for_every_vendor(sampler: OnDemandSampler):
    query = sampler.query(Selection(vendors=["GE", "Siemens"], min_ef=0.2, max_ef=0.7), seed=5)
    requested = [pair for batch in range(4) for pair in zip(*query.requested(batch), strict=True)]
    for vendor in ("GE", "Siemens"):
        efs = np.sort([ef for name, ef in requested if name == vendor])
        assert len(efs) == 4 * BATCH // 2
        gaps = np.diff([0.2, *efs, 0.7])
        assert gaps.max() < 3 * 0.5 / len(efs) and math.isclose(gaps.sum(), 0.5)


@pytest.mark.parametrize("damage", ["a case", "the index", "the checksums"])
def test_a_set_that_is_not_what_was_released_is_not_served(damage, finished, place, fetch, tmp_path, capsys):
    folder = tmp_path / "synthetic"
    shutil.copytree(finished.path / "synthetic", folder)
    if damage == "the checksums":
        (folder / "SHA256SUMS").unlink()
    if damage == "the index":
        (folder / "cases.csv").write_bytes((folder / "cases.csv").read_bytes().replace(b"GE", b"Canon"))
    if damage != "a case":
        with pytest.raises(UserError, match=r"write the release again|finish the run"):
            open_released_set(folder)
        return
    path = folder / "cases" / f"syn-{PER_VENDOR:05d}.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with Service(place.folder, Offer("pilot", "", open_released_set(folder), None, 1), "127.0.0.1", 0) as service:
        assert fetch(service.port) == 2
    assert "not the one that was released" in capsys.readouterr().err
    assert len(list((tmp_path / "out" / "cases").iterdir())) == PER_VENDOR, "those before it are whole"
    assert not (tmp_path / "out" / "cases.csv").exists()
