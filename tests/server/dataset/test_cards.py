"""What programs read of a synthetic data set and of a model: Croissant, and the Hub's YAML at the head of the cards."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from fedcmr.client.fetch.fetch import _without_front_matter
from fedcmr.server.dataset.croissant import CROISSANT_NAME, FIELDS
from fedcmr.server.dataset.writer import LABEL_COLUMNS, write_release
from fedcmr.server.front_matter import front_matter
from fedcmr.server.tasks.ejection_fraction.model_card import HEAD
from tests.server.dataset.test_writer import FACTS, PRIVACY, synthetic_case

HUB_KEYS = {
    "license",
    "license_name",
    "license_link",
    "pretty_name",
    "task_categories",
    "size_categories",
    "annotations_creators",
    "tags",
    "configs",
}
"""https://github.com/huggingface/hub-docs/blob/main/datasetcard.md"""
SEEN = [0.7, float("nan"), 0.71]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A data set with all exports."""
    folder = tmp_path_factory.mktemp("release") / "synthetic"
    cases = [synthetic_case(number) for number in range(3)]
    write_release(folder, cases, None, SEEN, FACTS, dicom=True, nifti=True, nnunet=True)
    return folder


def head_of(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


@pytest.mark.slow
def test_mlcroissant_finds_no_error_and_reads_the_labels(release):
    import mlcroissant  # with pandas and rdflib, which take seconds

    dataset = mlcroissant.Dataset(str(release / CROISSANT_NAME))
    assert not dataset.metadata.issues.errors
    rows = list(dataset.records("patients"))
    assert [row["patients/pseudonym"] for row in rows] == [b"syn-00000", b"syn-00001", b"syn-00002"]
    assert rows[0]["patients/ef"] == pytest.approx(0.75) and rows[1]["patients/ef_measured"] != 0
    assert tuple(FIELDS) == LABEL_COLUMNS


def test_croissant_holds_the_checksums_the_terms_and_what_the_datasheet_says_of_privacy(release):
    content = json.loads((release / CROISSANT_NAME).read_text())
    objects = {one["@id"]: one for one in content["distribution"] if one["@type"] == "cr:FileObject"}
    for name, one in objects.items():
        assert one["sha256"] == hashlib.sha256((release / name).read_bytes()).hexdigest()
    assert objects.keys() == {"labels.csv", "cases.csv", "DATASHEET.md"}
    found = {path for one in content["distribution"] if "includes" in one for path in release.glob(one["includes"])}
    left = {path.name for path in set(release.rglob("*")) - found if path.is_file()} - objects.keys()
    assert left == {CROISSANT_NAME, "SHA256SUMS", "datalist.json", "dataset.json", "splits_final.json"}
    assert content["license"] == FACTS["terms"]
    assert "epsilon 7.98 at delta 0.001" in content["rai:personalSensitiveInformation"][0]


def test_without_privacy_croissant_says_so(tmp_path):
    facts = {**FACTS, "privacy": {**PRIVACY, "epsilon": None}}
    write_release(tmp_path / "s", [synthetic_case(0)], None, [0.7], facts)
    content = json.loads((tmp_path / "s" / CROISSANT_NAME).read_text())
    assert "without differential privacy" in content["rai:personalSensitiveInformation"][0]
    assert "differential-privacy" not in head_of((tmp_path / "s" / "DATASHEET.md").read_text())["tags"]
    assert [one["@id"] for one in content["distribution"] if "includes" in one] == ["cases"]


def test_the_datasheet_begins_with_what_the_hub_reads(release):
    text = (release / "DATASHEET.md").read_text()
    head = head_of(text)
    assert head.keys() <= HUB_KEYS and head.keys() >= {"license", "pretty_name", "task_categories", "size_categories"}
    assert (head["license"], head["size_categories"], head["task_categories"]) == (
        "other",
        ["n<1K"],
        ["image-segmentation"],
    )
    assert {"synthetic", "differential-privacy"} <= set(head["tags"])
    assert text.split("---\n", 2)[2].startswith("\n# Datasheet")


def test_a_models_card_begins_with_what_the_hub_reads():
    head = head_of(front_matter(HEAD))
    assert head == HEAD and head.keys() <= {"license", "license_name", "tags", "metrics"}


def test_a_part_of_a_set_is_not_headed_by_the_whole_sets_yaml(release):
    text = (release / "DATASHEET.md").read_text()
    assert _without_front_matter(text).startswith("# Datasheet") and "pretty_name" not in _without_front_matter(text)
    assert _without_front_matter("# Old\n\n---\nrule") == "# Old\n\n---\nrule"


def test_nnunet_and_monai_find_every_image_and_no_patient_in_two_parts_of_a_fold(release):
    (root,) = (release / "nnunet").iterdir()
    described = json.loads((root / "dataset.json").read_text())
    names = {path.name.removesuffix("_0000.nii.gz") for path in (root / "imagesTr").iterdir()}
    assert names == {path.name.removesuffix(".nii.gz") for path in (root / "labelsTr").iterdir()}
    assert root.name.startswith("Dataset901_") and described["numTraining"] == len(names) == 6
    assert described["channel_names"] == {"0": "MRI"} and described["file_ending"] == ".nii.gz"
    assert described["labels"] == {"background": 0, "RV": 1, "myocardium": 2, "LV": 3}
    for split in json.loads((root / "splits_final.json").read_text()):
        train, val = ({name[:-3] for name in split[part]} for part in ("train", "val"))
        assert val and not train & val and {*split["train"], *split["val"]} == names
    listed = json.loads((release / "datalist.json").read_text())["training"]
    assert len(listed) == 6 and all((release / one[key]).is_file() for one in listed for key in ("image", "label"))
    assert {one["patient"]: one["fold"] for one in listed} == {"syn-00000": 0, "syn-00001": 1, "syn-00002": 2}
    assert listed[0]["ef"] == pytest.approx(0.75)


def test_monai_reads_the_datalist(release):
    from monai.data import load_decathlon_datalist

    items = load_decathlon_datalist(str(release / "datalist.json"), True, "training", base_dir=str(release))
    assert len(items) == 6 and Path(items[0]["image"]).is_file() and Path(items[0]["label"]).is_file()
