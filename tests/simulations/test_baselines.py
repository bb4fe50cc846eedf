"""Baselines that are studies of their own: their sites, their privacy, their ledgers, and what they answer."""

import json
from pathlib import Path

import pytest

from fedcmr.client.policy import load_site
from fedcmr.server.run_folder import RunFolder, load_run, open_run
from fedcmr.server.settings import load
from fedcmr.shared import checkpoint
from fedcmr.shared.errors import UserError
from fedcmr.simulations.baselines import link_sites, nested_studies, run_baselines

pytestmark = pytest.mark.slow

SMALL = (
    "federation.num_rounds=2",
    "federation.local_steps=1",
    "synthesis.num_cases=4",
    "synthesis.num_slices=2",
    "synthesis.num_steps=1",
    "regression.num_steps=1",
    "regression.batch_size=2",
    "regression.num_tta=1",
    "evaluation.num_bootstrap=100",
    "privacy.target_epsilon=4",
)


def studies(*overrides: str, sites: tuple[str, ...] = ("a", "b", "c")):
    return nested_studies(load("default", list(overrides)), list(sites))


def test_no_baseline_is_a_study_unless_it_is_asked_for():
    assert studies() == {}


def test_each_site_is_left_out_once_with_the_main_studys_privacy():
    found = studies("evaluation.baselines=[leave_one_site_out]", "privacy.target_epsilon=4")
    assert {model: sites for model, (sites, _) in found.items()} == {
        "without_a": ["b", "c"],
        "without_b": ["a", "c"],
        "without_c": ["a", "b"],
    }
    assert all(privacy.target_epsilon == 4 and privacy.enabled for _, privacy in found.values())


def test_other_epsilons_keep_all_sites_and_switch_privacy_on():
    found = studies("evaluation.epsilons=[1, 0.5, 12]", "privacy.enabled=false", "privacy.target_delta=1e-4")
    assert list(found) == ["epsilon_1", "epsilon_0.5", "epsilon_12"]
    for (sites, privacy), value in zip(found.values(), (1, 0.5, 12), strict=True):
        assert sites == ["a", "b", "c"]
        assert (privacy.enabled, privacy.target_epsilon, privacy.target_delta) == (True, value, 1e-4)


def test_the_only_site_cannot_be_left_out():
    with pytest.raises(UserError, match=r"leave_one_site_out needs two sites, got 1"):
        studies("evaluation.baselines=[leave_one_site_out]", sites=("a",))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["evaluation.epsilons=[0]"], "evaluation.epsilons > 0"),
        (["evaluation.epsilons=[1, .nan]"], "evaluation.epsilons > 0"),
        (["evaluation.epsilons=[.inf]"], "evaluation.epsilons > 0"),
        (["evaluation.epsilons=[3, 1, 3.0]"], "evaluation.epsilons to differ"),
        (["evaluation.epsilons=[small]"], "epsilons"),
        (["evaluation.baselines=[leave_one_site_out]", "hospitals.vendors=[GE]"], "without leave_one_site_out"),
    ],
)
def test_a_wrong_setting_is_told_before_anything_is_made(overrides, named):
    with pytest.raises(UserError, match=named):
        load("default", overrides)


@pytest.fixture
def two_sites(make_study, write_cases) -> RunFolder:
    """A prepared run of a Siemens and a Philips site that asks for a site left out and for a larger epsilon."""
    run = make_study(
        *SMALL,
        "evaluation.baselines=[leave_one_site_out]",
        "evaluation.epsilons=[9]",
        "evaluation.fidelity=true",
        "synthesis.vendor_shares={Siemens: 3, Philips: 1}",
        max_epsilon=4.0,
        min_patients=2,
    )
    (run.path / "sites" / "c" / "site.yaml").unlink()
    for number, (name, vendor) in enumerate((("a", "Siemens"), ("b", "Philips"))):
        write_cases(run.path / "test" / "hospitals" / name, vendor, 2, 50 + number)
    return run


def test_nested_studies_answer_on_all_test_patients_and_spend_from_ledgers_of_their_own(two_sites):
    run_baselines(two_sites)
    expected = {
        "without_a": (["b"], "Philips", 4),
        "without_b": (["a"], "Siemens", 4),
        "epsilon_9": (["a", "b"], "", 9),
    }
    for model, (sites, vendor, epsilon) in expected.items():
        answers = json.loads((two_sites.path / "private" / "predictions" / f"{model}.json").read_text())["hospitals"]
        assert sorted(answers["vendors"]) == ["Philips"] * 2 + ["Siemens"] * 2, (
            "a vendor that is left out is tested too"
        )
        assert len(answers["predicted"]) == 4
        nested = two_sites.path / "baselines" / model
        metadata = checkpoint.load(nested / "generator.safetensors")[1]
        assert sorted(metadata["sites"]) == sites
        assert all(epsilon / 1.1 < site["epsilon"] <= epsilon for site in metadata["sites"].values())
        assert not load_run(nested).config.evaluation.fidelity, "the main study's hearts are compared, not these"
        assert not any(site["refused"] for site in metadata["sites"].values())
        if vendor:
            assert json.loads((nested / "report.json").read_text())["synthetic"]["per_vendor"] == {vendor: 4}
        assert {load_site(nested / "sites" / name).policy.max_epsilon for name in sites} == {epsilon}
    assert not list((two_sites.path / "sites").glob("*/ledger/*")), "the main study's budget is untouched"
    assert load_site(two_sites.path / "sites" / "a").policy.max_epsilon == 4

    before = {path: path.stat().st_mtime_ns for path in two_sites.path.rglob("*") if path.name != ".lock"}
    run_baselines(two_sites)
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what is finished is left alone"


def test_linked_sites_use_the_same_cases_also_below_a_symbolic_link(two_sites, tmp_path):
    (tmp_path / "elsewhere" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "deep")
    other = open_run(tmp_path / "link" / "run", two_sites.config)
    for _ in range(2):  # the second time after an interruption
        link_sites(two_sites, other, ["b"], two_sites.config.privacy)
    assert load_run(other.path).site_names() == ["b"]
    assert load_site(other.path / "sites" / "b").data_path.resolve() == (two_sites.path / "sites/b/train").resolve()
    assert (Path(other.path) / "test" / "hospitals" / "a" / "cases.csv").is_file()
