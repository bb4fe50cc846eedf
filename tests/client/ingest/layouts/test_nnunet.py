"""nnU-Net's raw format: whose image it is and of which phase, and what the labels mean."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from fedcmr.client.ingest.layouts.nnunet import find_nnunet
from fedcmr.client.ingest.layouts.plain import parse_labels
from fedcmr.client.ingest.prepare import prepare
from fedcmr.shared.case import LV, load_cases
from fedcmr.shared.errors import UserError
from tests.client.ingest.test_prepare import heart, loop_ef, write_nifti

KEY = bytes(range(32))
OURS = {"background": 0, "RV": 1, "MLV": 2, "LVC": 3}


def write_raw(root: Path, names: dict[str, int], labels=OURS, masks=True) -> Path:
    """A raw data set; `names` by the phase that each shows."""
    folder = root / "Dataset027_Hearts"
    for part in ("imagesTr", "labelsTr"):
        (folder / part).mkdir(parents=True)
    images, drawn = heart(110)
    for name, phase in names.items():
        write_nifti(folder / "imagesTr" / f"{name}_0000.nii.gz", images[phase].T.astype(np.float32))
        if masks:
            write_nifti(folder / "labelsTr" / f"{name}.nii.gz", drawn[phase].T)
    description = {"channel_names": {"0": "MRI"}, "labels": labels, "numTraining": len(names), "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def write_table(folder: Path, rows: list[list[str]]) -> None:
    with (folder / "cases.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)


PAIR = {"A_ed": 0, "A_es": 1}
FRAMES = {"a_frame01": 0, "a_frame12": 1}
HEADER = ["name", "phase", "patient", "vendor", "field_strength_t"]


@pytest.mark.parametrize("above", [False, True])
def test_names_tell_patient_and_phase_and_dataset_json_the_labels(tmp_path, above):
    folder = write_raw(tmp_path / "scans", PAIR)
    source = folder.parent if above else folder
    summary = prepare(source, tmp_path / "out", "nnunet", key=KEY, vendor="GE", axes="short-axis")
    assert (summary.num_cases, summary.refused, summary.left_out) == (1, {}, {})
    (case,) = load_cases(tmp_path / "out")
    assert case.info.ef == pytest.approx(loop_ef(heart(110)[1]), abs=1e-5)
    assert (case.masks == LV).any()


def test_a_table_tells_them_where_the_names_do_not(tmp_path):
    folder = write_raw(tmp_path / "scans", FRAMES)
    with pytest.raises(UserError, match="2 of 2 images are not named PATIENT_ed or PATIENT_es: add") as error:
        find_nnunet(folder)
    assert "frame01" not in str(error.value)
    write_table(folder, [HEADER, ["a_frame01", "ED", "7", "Philips", "1.5"], ["a_frame12", "es", "7", "", ""]])
    (study,) = find_nnunet(folder, axes="short-axis").studies
    cine = study.read()
    assert (study.patient, cine.vendor, cine.field_strength_t, cine.ends) == ("7", "Philips", 1.5, (0, 1))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([HEADER, ["a_frame01", "systole", "7", "", ""]], "line 2: column phase is neither"),
        ([HEADER, ["a_frame01", "ed", "", "", ""]], "line 2: column patient is empty"),
        ([HEADER, ["a_frame01", "ed", "7", "", ""], ["a_frame01", "es", "7", "", ""]], "line 3: column name is named"),
        ([HEADER[:2], ["a_frame01", "ed"]], "expected a column patient"),
    ],
)
def test_a_mistake_in_the_table_is_named_by_its_line(tmp_path, rows, told):
    folder = write_raw(tmp_path / "scans", FRAMES, masks=False)
    write_table(folder, rows)
    with pytest.raises(UserError, match=told):
        find_nnunet(folder)


@pytest.mark.parametrize(
    "labels", [{"background": 0, "heart": 1, "other": 2}, {"background": 0, "whole": [1, 2]}, None]
)
def test_labels_that_nobody_explains_are_asked_for(tmp_path, labels):
    folder = write_raw(tmp_path / "scans", PAIR, labels=labels)
    with pytest.raises(UserError, match="--labels, for example rv=1,myo=2,lv=3"):
        find_nnunet(folder)
    assert len(find_nnunet(folder, parse_labels("rv=1,myo=2,lv=3")).studies) == 1


def test_what_has_no_partner_no_row_or_no_image_is_refused(tmp_path):
    folder = write_raw(tmp_path / "scans", {"A_ed": 0, "B_ed": 0, "B_es": 1, "C_ed": 0, "D_ed": 0})
    (folder / "labelsTr" / "gone_ed.nii.gz").write_bytes(b"")
    (folder / "notes.xls").write_bytes(b"")
    found = find_nnunet(folder)
    assert ([study.patient for study in found.studies], found.refused) == (["B"], {"missing-file": 3})
    assert found.left_out == {"masks-without-frames": 1, "other-file": 1}
    rows = [["A_ed", "ed", "1", "", ""], ["C_ed", "es", "1", "", ""], ["B_ed", "ed", "1", "", ""]]
    write_table(folder, [HEADER, *rows, ["E", "ed", "2", "", ""]])
    found = find_nnunet(folder)
    assert (found.studies, found.refused) == ([], {"not-in-table": 2, "same-name": 1, "missing-file": 1})


def test_several_channels_and_an_empty_folder_are_one_line(tmp_path):
    folder = write_raw(tmp_path / "scans", PAIR)
    (folder / "imagesTr" / "A_ed_0001.nii.gz").write_bytes(b"")
    with pytest.raises(UserError, match="several channels"):
        find_nnunet(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="in one folder below, got 0"):
        find_nnunet(tmp_path / "empty")


def test_images_without_labels_and_with_labels_for_one_phase_are_cases_too(tmp_path):
    folder = write_raw(tmp_path / "scans", {**PAIR, "B_ed": 0, "B_es": 1})
    (folder / "labelsTr" / "B_es.nii.gz").unlink()
    for phase in ("ed", "es"):
        (folder / "labelsTr" / f"A_{phase}.nii.gz").unlink()
    none, partly = (study.read() for study in find_nnunet(folder, axes="short-axis").studies)
    assert none.masks is None and partly.masks is not None and not partly.masks[1].any()


@pytest.mark.parametrize("text", ['{"labels": {"LV": 1e999}}', "[" * 100_000, '{"labels": {"LV": [3]}}', "\0"])
def test_a_damaged_description_is_one_line(tmp_path, text):
    """The first two, which the fuzzer writes as well, were no `ValueError`."""
    folder = write_raw(tmp_path / "scans", PAIR)
    (folder / "dataset.json").write_text(text)
    with pytest.raises(UserError, match=r"dataset\.json holds no labels"):
        find_nnunet(folder)
