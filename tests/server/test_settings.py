"""Settings: the file and the dataclasses agree, and every mistake is one clear line."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from fedcmr.server.settings import CONFIG_FOLDER, RENAMED_KEYS, RENAMED_VALUES, Config, _warn_renamed, dump, load
from fedcmr.shared.errors import UserError, run_command


def test_default_yaml_names_every_key_with_the_dataclasses_default():
    written = OmegaConf.load(CONFIG_FOLDER / "default.yaml")
    structured = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(Config())))
    assert OmegaConf.to_container(written) == OmegaConf.to_container(structured)


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path):
    assert load(path.stem, ["data_root=somewhere"]).seed == 0


def test_overrides_win_over_the_experiment_and_the_defaults():
    config = load("smoke", ["privacy.target_epsilon=3", "seed=7"])
    assert (config.privacy.target_epsilon, config.seed) == (3.0, 7)
    assert config.hospitals.num_train == 6  # from smoke.yaml
    assert config.privacy.target_delta == 1e-3  # from default.yaml


@pytest.mark.parametrize("name", ["0123", "on", "1:30", "1_000", "1e3", "2026-11-30", "[siemens] export", "a: b", "#1"])
def test_a_setting_that_is_a_text_comes_as_it_is_written(tmp_path, name):
    assert load("acdc", [f"data_root={name}"]).data_root == name
    config = load("acdc", [f"data_root={name}"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml").data_root == name
    if not set(name) & set("[:#"):
        (tmp_path / "config.yaml").write_text(f"data_root: {name}\n")
        assert load(tmp_path / "config.yaml").data_root == name


def test_quotes_and_null_mean_in_an_override_what_they_do_in_yaml():
    assert load("acdc", ["data_root='0123'"]).data_root == "0123"
    assert load("smoke", ["data_root=somewhere", "data_root=null"]).data_root is None
    with pytest.raises(UserError, match="interpolation"):
        load("acdc", ["data_root=${seed}"])


def test_a_dumped_config_loads_equal(tmp_path):
    config = load("default", ["privacy.target_epsilon=2.5", "synthesis.vendor_shares={GE: 2}"])
    (tmp_path / "config.yaml").write_text(dump(config))
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["privacy.target_epsilon=0"], "privacy.target_epsilon"),
        (["privacy.target_epsilon=-1"], "privacy.target_epsilon"),
        (["privacy.target_epsilon=nan"], "privacy.target_epsilon"),
        (["privacy.target_epsilon=.inf"], "privacy.target_epsilon"),
        (["privacy.target_delta=1"], "privacy.target_delta"),
        (["privcy.enabled=false"], "privcy"),
        (["privacy.enable=false"], "enable"),
        (["hospitals.num_train=many"], "num_train"),
        (["hospitals.vendors=[Acme]"], "hospitals.vendors"),
        (["hospitals.source=acdc"], "data_root"),
        (["hospitals.source=acdc", "data_root=scans"], "hospitals.nominal_patients"),
        (["hospitals.source=prepared", "data_root=scans"], "hospitals.nominal_patients"),
        (["hospitals.nominal_patients=0"], "hospitals.nominal_patients"),
        (["hospitals.nominal_patients={A: 1.5}"], "hospitals.nominal_patients"),
        (["hospitals.nominal_patients={A: {GE: {x: 1}}}"], "hospitals.nominal_patients"),
        (["federation.min_sites=0"], "federation.min_sites"),
        (["hospitals.acdc_test_fold=1"], "folds"),
        (["generator.kind=gan"], "generator.kind"),
        (["evaluation.baselines=[magic]"], "evaluation.baselines"),
        (["evaluation.cross_vendor=[magic]"], "evaluation.cross_vendor"),
        (["evaluation.cross_vendor=[real]"], "pooled_real"),
        (["regression.area_share=1.5"], "regression.area_share"),
        (["seed"], "key=value"),
    ],
)
def test_a_wrong_setting_is_one_line_that_names_it(overrides, named, capsys):
    def command():
        load("default", overrides)

    assert run_command(command) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert named in error


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("num_rounds=3", "federation.num_rounds"),
        ("synthesis.num_tta=1", "regression.num_tta"),
        ("privcy.enabled=false", "privacy.enabled"),
        ("privacy.target_epsiln=3", "privacy.target_epsilon"),
        ("target_epsiln=3", "privacy.target_epsilon"),
        ("flip=false", "regression.augmentation.flip"),
        ("rung=lora", "federation.adapter"),
    ],
)
@pytest.mark.parametrize("layer", ["file", "override"])
def test_a_key_that_there_is_not_is_answered_with_the_one_that_was_meant(override, meant, layer, tmp_path):
    key, value = override.split("=")
    if layer == "file":
        *blocks, name = key.split(".")
        (tmp_path / "own.yaml").write_text("".join(f"{block}:\n  " for block in blocks) + f"{name}: {value}\n")
        arguments = (tmp_path / "own.yaml",)
    else:
        arguments = ("default", [override])
    with pytest.raises(UserError, match=rf"no setting is called '{key}'; did you mean {meant}") as raised:
        load(*arguments)
    assert layer != "file" or "own.yaml" in str(raised.value)


def test_a_key_of_several_blocks_is_answered_with_all_of_them():
    with pytest.raises(UserError, match=r"federation\.learning_rate or regression\.learning_rate"):
        load("default", ["learning_rate=1"])


def test_vendors_are_known_in_any_case():
    overrides = ["hospitals.vendors=[siemens,ge]", "synthesis.vendor_shares={PHILIPS: 2}"]
    config = load("default", [*overrides, "hospitals.nominal_patients={a: {united-imaging: 9}}"])
    assert config.hospitals.vendors == ["Siemens", "GE"] and config.synthesis.vendor_shares == {"Philips": 2.0}
    assert config.hospitals.nominal_patients == {"a": {"United Imaging": 9}}


def test_a_missing_or_broken_file_is_named(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("privacy: [unclosed")
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load(broken)
    with pytest.raises(UserError, match=r"no config 'nowhere'.*smoke"):
        load("nowhere")


def old_keys() -> list[tuple[str, str]]:
    return sorted(RENAMED_KEYS.items())


def value_of(config: Config, key: str):
    block, name = key.split(".")
    return getattr(getattr(config, block), name)


def other_value(key: str) -> str:
    """A legal value of a key that is not its default, as YAML."""
    named = {
        "federation.adapter": "statistics",
        "evaluation.cross_vendor": "[synthetic]",
        "evaluation.show_real_images": "true",
    }
    return named.get(key) or str(value_of(load("default"), key) / 2)


@pytest.mark.parametrize(("old", "new"), old_keys())
@pytest.mark.parametrize("layer", ["file", "override"])
def test_a_key_of_an_earlier_version_is_read_under_its_new_name_and_said_so(old, new, layer, tmp_path, capsys):
    block, name = old.split(".")
    _warn_renamed.cache_clear()
    if layer == "file":
        (tmp_path / "old.yaml").write_text(f"{block}:\n  {name}: {other_value(new)}\n")
        config = load(tmp_path / "old.yaml")
    else:
        config = load("default", [f"{old}={other_value(new)}"])
    assert config == load("default", [f"{new}={other_value(new)}"])
    assert config != load("default")
    warning = capsys.readouterr().err
    assert warning == f"{old} is now {new}; the old name will go in 0.3\n"


@pytest.mark.parametrize(("old", "new"), old_keys())
def test_a_key_under_both_its_names_is_an_error(old, new, capsys):
    overrides = [f"{old}={other_value(new)}", f"{new}={other_value(new)}"]
    assert run_command(lambda: load("default", overrides)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and old in error and new in error


def old_values() -> list[tuple[str, str, str]]:
    return [(key, old, new) for key, values in RENAMED_VALUES.items() for old, new in values.items()]


@pytest.mark.parametrize(("key", "old", "new"), old_values())
@pytest.mark.parametrize("layer", ["file", "override"])
def test_a_value_of_an_earlier_version_is_read_as_todays_and_said_so(key, old, new, layer, tmp_path, capsys):
    block, name = key.split(".")
    _warn_renamed.cache_clear()
    if layer == "file":
        (tmp_path / "old.yaml").write_text(f"{block}:\n  {name}: {old}\n")
        config = load(tmp_path / "old.yaml")
    else:
        config = load("default", [f"{key}={old}"])
    assert value_of(config, key) == new and config == load("default", [f"{key}={new}"])
    assert capsys.readouterr().err == f"{key}={old} is now {key}={new}; the old name will go in 0.3\n"


def test_an_old_key_with_an_old_value_is_read_as_both_of_today():
    assert load("default", ["federation.rung=affine"]).federation.adapter == "norm_affine"


def test_every_renamed_key_stays_in_its_block_and_leads_to_a_key_of_today():
    today = OmegaConf.to_container(OmegaConf.structured(Config()))
    for old, new in RENAMED_KEYS.items():
        (old_block, old_name), (new_block, new_name) = old.split("."), new.split(".")
        assert old_block == new_block
        assert old_name not in today[old_block] and new_name in today[new_block]
