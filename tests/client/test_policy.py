from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from fedcmr.client.policy import SITE_FILE, SitePolicy, SiteSettings, load_site, refusal, round_down, write_site
from fedcmr.server.federation.adapters import plan_adapter
from fedcmr.server.settings import load
from fedcmr.shared.errors import UserError
from fedcmr.shared.privacy import Mechanism, Release

SETTINGS = SiteSettings("north", {"Siemens": 40}, 40)
MINIMAL = "name: north\nvendors: {Siemens: 40}\nnominal_patients: 40\n"


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        SiteSettings(
            "1e3", {"United Imaging": 600, "GE": 300}, 700, prior="prior.safetensors", policy=SitePolicy(0.5, 1e-5, 4.0)
        ),
        SiteSettings(
            "null",
            {"GE": 9},
            9,
            data="/a path: with # é " + "and 'quotes' \"too\" " * 9,
            ledger="~",
            ledger_replica="../copy",
            policy=SitePolicy(
                min_patients=9,
                max_grad_norm=0.1,
                max_rounds=3,
                allowed_code_sha256=["a" * 64, "0" * 64],
                allow_without_privacy=True,
            ),
        ),
        # Values that are wider than their column.
        SiteSettings(
            "n" * 64,
            {"GE": 10**20},
            10**20,
            policy=SitePolicy(
                100 / 3,
                1e-22 / 3,
                1 / 3,
                1e15 / 3,
                1e-5 / 3,
                100 / 3,
                10**20,
                10**20,
                10**20,
                10**21,
                1e6 / 3,
            ),
        ),
    ],
)
def test_settings_are_written_and_loaded_back(tmp_path, settings):
    path = write_site(tmp_path / "site", settings)
    assert load_site(path) == replace(settings, folder=tmp_path / "site")
    assert load_site(path.parent) == load_site(path)


def test_the_file_explains_every_key(tmp_path):
    lines = write_site(tmp_path, SETTINGS).read_text().splitlines()
    for field in [*fields(SiteSettings), *fields(SitePolicy)]:
        if field.name != "folder":
            (line,) = [line for line in lines if line.strip().startswith(f"{field.name}:")]
            assert "  # " in line


def test_writing_twice_is_harmless_and_a_sites_own_edits_stay(tmp_path):
    path = write_site(tmp_path, SETTINGS)
    write_site(tmp_path, SETTINGS)
    edited = path.read_text().replace("max_epsilon: 8.0", "max_epsilon: 2.0")
    path.write_text(edited)
    with pytest.raises(UserError, match="other"):
        write_site(tmp_path, SETTINGS)
    assert path.read_text() == edited


def test_only_the_three_facts_of_a_site_are_required(tmp_path):
    (tmp_path / SITE_FILE).write_text(MINIMAL)
    assert load_site(tmp_path) == replace(SETTINGS, folder=tmp_path)


def test_paths_start_from_the_folder_of_the_file(tmp_path, monkeypatch):
    write_site(tmp_path / "site", replace(SETTINGS, data="/scans/prepared", prior="priors/p.safetensors"))
    monkeypatch.chdir(tmp_path)
    for site in (load_site(tmp_path / "site"), load_site("site")):
        assert str(site.data_path) == "/scans/prepared"
        assert site.ledger_path == tmp_path / "site" / "ledger"
        assert site.replica_path is None
        assert replace(site, ledger_replica="/disk/w").replica_path == Path("/disk/w")
        assert site.prior_path == tmp_path / "site" / "priors" / "p.safetensors"
    assert SETTINGS.prior_path is None


def test_the_replicas_key_of_an_earlier_version_is_read_and_said_so(tmp_path, capsys):
    (tmp_path / SITE_FILE).write_text(MINIMAL + "ledger_witness: ../copy\n")
    assert load_site(tmp_path) == load_site(tmp_path) == replace(SETTINGS, ledger_replica="../copy", folder=tmp_path)
    warning = capsys.readouterr().err
    assert warning == f"{tmp_path / SITE_FILE}: ledger_witness is now ledger_replica; the old name will go in 0.3\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "north",
        "- north",
        "name: [",
        "\x00",
        "name: north\n",
        MINIMAL + "name: south\n",
        MINIMAL + "nickname: n\n",
        MINIMAL + "folder: /tmp\n",
        MINIMAL + "data: null\n",
        MINIMAL + "policy: null\n",
        MINIMAL + "policy: {max_epsilom: 8}\n",
        MINIMAL + "policy: {max_epsilon: .nan}\n",
        MINIMAL + "policy: {max_epsilon: .inf}\n",
        MINIMAL + "policy: {max_epsilon: 0}\n",
        MINIMAL + "policy: {max_epsilon: eight}\n",
        MINIMAL + "policy: {max_delta: -1e-3}\n",
        MINIMAL + "policy: {max_delta: .nan}\n",
        MINIMAL + "policy: {max_delta: 0.1}\n",  # four patients of 40 might be published
        MINIMAL + "policy: {min_noise_multiplier: 0}\n",
        MINIMAL + "policy: {min_noise_multiplier: .nan}\n",
        MINIMAL + "policy: {max_grad_norm: -1}\n",
        MINIMAL + "policy: {max_delta: 0.003}\n",  # more than a tenth of a patient's worth
        MINIMAL + "policy: {max_noise_multiplier: 0.2}\n",  # below the least
        MINIMAL + "policy: {max_noise_multiplier: .inf}\n",
        MINIMAL + "policy: {min_sample_rate: 0}\n",
        MINIMAL + "policy: {min_sample_rate: 1.1}\n",
        MINIMAL + "policy: {max_local_steps: 0}\n",
        MINIMAL + "policy: {max_views: 0}\n",
        MINIMAL + "policy: {max_seconds: 0}\n",
        MINIMAL + "policy: {max_seconds: .nan}\n",
        MINIMAL + "policy: {max_grad_norm: .inf}\n",
        MINIMAL + "policy: {min_patients: 0}\n",
        MINIMAL + "policy: {min_patients: 41}\n",  # more than it says it has
        MINIMAL + "policy: {max_epsilon: -1}\n",
        MINIMAL + "policy: {max_rounds: 0}\n",
        MINIMAL + "policy: {max_rounds: 1.5}\n",
        MINIMAL + "policy: {allowed_code_sha256: [abc]}\n",
        MINIMAL + "policy: {allowed_code_sha256: null}\n",
        MINIMAL + "policy: {allow_without_privacy: perhaps}\n",
        MINIMAL + "ledger_replica: ledger/copy\n",  # would be lost with the ledger
        MINIMAL + "ledger_replica: ./ledger\n",
        MINIMAL + "ledger_witness: ./ledger\n",
        MINIMAL + "ledger_replica: a\nledger_witness: a\n",
        MINIMAL.replace("40", "forty"),
        MINIMAL.replace("40", "40.5"),
        MINIMAL.replace("40", "true"),
        MINIMAL.replace("40", "-40"),
        MINIMAL.replace("Siemens", "Kodak"),
        MINIMAL.replace("north", "../north"),
        MINIMAL.replace("north", "''"),
        MINIMAL.replace("north", "n" * 65),
    ],
)
def test_settings_that_cannot_be_are_refused_in_one_line_that_names_the_file(tmp_path, text):
    (tmp_path / SITE_FILE).write_text(text)
    with pytest.raises(UserError) as caught:
        load_site(tmp_path)
    assert SITE_FILE in str(caught.value)
    assert "fedcmr-client init" in str(caught.value), "the remedy"
    assert "\n" not in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="fedcmr-client init"):
        load_site(tmp_path)
    (tmp_path / SITE_FILE).write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(UserError, match=SITE_FILE):
        load_site(tmp_path)


# What a policy refuses

POLICY = SitePolicy(
    min_noise_multiplier=0.5,
    max_noise_multiplier=50.0,
    min_sample_rate=0.5,
    max_delta=1e-3,
    max_grad_norm=2.0,
    min_patients=10,
    max_rounds=3,
    max_local_steps=10,
    max_views=16,
)
REQUEST = {
    "private": True,
    "release": Release(0.5, 1.0, 10),
    "target_delta": 1e-3,
    "max_grad_norm": 2.0,
    "num_patients": 10,
    "server_round": 3,
    "num_views": 16,
}


def refused(policy, *, private, release, target_delta, max_grad_norm, **asked):
    """`refusal` of a mechanism with these terms."""
    mechanism = Mechanism(**asdict(release), max_grad_norm=max_grad_norm, target_delta=target_delta, private=private)
    return refusal(policy, mechanism, **asked)


def test_a_request_at_every_limit_is_allowed():
    assert refused(POLICY, **REQUEST) is None
    assert refused(POLICY, **REQUEST | {"release": Release(50.0, 0.5, 10)}) is None


def test_by_default_every_patient_takes_part_in_every_step():
    asked = REQUEST | {"release": Release(1.0, 0.999, 1)}
    assert refused(SitePolicy(), **asked) == "sample-rate-below-minimum"


@pytest.mark.parametrize("name", ["default", "smoke"])
def test_the_shipped_studies_are_within_the_default_policy(name):
    config = load(name, [])
    num_steps = (config.federation.num_rounds - 1) * config.federation.local_steps
    for adapter in ("statistics", "norm_affine"):
        for release in plan_adapter(adapter, config.privacy, num_steps).values():
            asked = REQUEST | {
                "release": replace(release, num_steps=min(release.num_steps, config.federation.local_steps)),
                "target_delta": config.privacy.target_delta,
                "num_views": config.federation.num_views,
                "max_grad_norm": max(config.privacy.max_grad_norm, config.privacy.statistics_clip),
                "num_patients": 20,
            }
            assert refused(SitePolicy(), **asked) is None


@pytest.mark.parametrize(("nominal", "largest"), [(20, 5e-3), (100, 1e-3), (1000, 1e-4)])
def test_a_site_promises_at_most_a_tenth_of_a_patients_worth_of_delta(nominal, largest):
    """With delta = 1 / N, to publish one patient in full would count as private."""
    assert SiteSettings("a", {"GE": nominal}, nominal, policy=SitePolicy(max_delta=largest)).policy.max_delta == largest
    for delta in (1.01 * largest, 1 / nominal):
        with pytest.raises(UserError, match="nominal_patients"):
            SiteSettings("a", {"GE": nominal}, nominal, policy=SitePolicy(max_delta=delta))


@pytest.mark.parametrize(
    ("value", "down"), [(0.0025, 2e-3), (1e-3, 1e-3), (7.69e-4, 7e-4), (9.99e-5, 9e-5), (1e-4, 1e-4)]
)
def test_a_delta_is_rounded_down_to_one_digit(value, down):
    assert round_down(value) == down


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"num_patients": 9}, "too-few-patients"),
        ({"num_patients": 0}, "too-few-patients"),
        ({"private": False}, "privacy-off-not-allowed"),
        ({"release": Release(0.49, 1.0, 1)}, "noise-below-minimum"),
        ({"release": Release(0.0, 1.0, 1)}, "noise-below-minimum"),
        ({"target_delta": 1.1e-3}, "delta-above-cap"),
        ({"max_grad_norm": 2.1}, "clip-above-cap"),
        ({"max_grad_norm": float("inf")}, "clip-above-cap"),
        ({"server_round": 4}, "rounds-exhausted"),
        ({"release": Release(51.0, 1.0, 10)}, "noise-above-cap"),
        ({"release": Release(1.0, 0.49, 10)}, "sample-rate-below-minimum"),
        ({"release": Release(1.0, 1.0, 11)}, "steps-above-cap"),
        ({"num_views": 17}, "views-above-cap"),
        ({"private": False, "release": Release(0.0, 1.0, 11)}, "steps-above-cap"),
    ],
)
def test_a_request_beyond_a_limit_is_refused_with_its_code(change, code):
    assert refused(POLICY, **{**REQUEST, **change}) == code


def test_privacy_can_be_off_only_where_the_site_allows_it():
    without = {**REQUEST, "private": False, "release": Release(0.0, 1.0, 1), "max_grad_norm": 1e9}
    assert refused(POLICY, **without) == "privacy-off-not-allowed"
    assert refused(replace(POLICY, allow_without_privacy=True), **without) is None


def test_allowing_studies_without_privacy_does_not_loosen_those_with_it():
    generous = replace(POLICY, allow_without_privacy=True)
    assert refused(generous, **{**REQUEST, "release": Release(0.0, 1.0, 1)}) == "noise-below-minimum"


@pytest.mark.parametrize("change", [{"target_delta": 0.0}, {"max_grad_norm": 0.0}])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_terms_that_void_a_guarantee_make_no_mechanism(change, value):
    with pytest.raises(ValueError, match=next(iter(change))):
        refused(POLICY, **REQUEST | dict.fromkeys(change, value))
