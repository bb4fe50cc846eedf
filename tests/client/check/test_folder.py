"""The check's figures, flags and troubles, against a recount of the files and cases made to be odd."""

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from fedcmr.client.check.contact_sheet import image_of
from fedcmr.client.check.flags import FLAGS, flags_of
from fedcmr.client.check.folder import check, complain, write_report
from fedcmr.client.check.report import TROUBLES
from fedcmr.client.cli import main
from fedcmr.client.ingest.reasons import REASONS
from fedcmr.shared.case import ED, ES, LV, MYO, RV, Case, CaseInfo, read_index, save_case, write_index
from fedcmr.shared.errors import UserError


def make_case(
    name="p00",
    *,
    num_slices=9,
    spacing=10.0,
    cavities=(16.0, 11.0),
    middle=(48.0, 48.0),
    labelled=True,
    vendor="GE",
    tesla=1.5,
    group=None,
    seed=0,
) -> Case:
    """A cavity in its wall next to another cavity, contracting, darker muscle around it, noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:96, :96] - np.array(middle)[:, None, None]
    masks = np.zeros((2, num_slices, 96, 96), np.uint8)
    for phase, cavity in enumerate(cavities):
        masks[phase][:, np.hypot(y, x + 26) < 12] = RV
        masks[phase][:, np.hypot(y, x) < cavity + 6] = MYO
        masks[phase][:, np.hypot(y, x) < cavity] = LV
    frames = np.array([0.2, 0.8, 0.15, 0.9])[masks] + rng.normal(0, 0.03, masks.shape)
    areas = (masks == LV).sum(axis=(1, 2, 3))
    ef = 1 - areas[ES] / areas[ED] if labelled else math.nan
    info = CaseInfo(name, vendor, tesla, float(ef), group or name)
    masks = masks if labelled else np.zeros_like(masks)
    return Case(info, frames.clip(0, 1).astype(np.float32), masks, np.array([spacing, 1.5, 1.5], np.float32))


def write(folder, *cases, refused=None, details=None):
    for case in cases:
        save_case(folder, case)
    write_index(folder, [case.info for case in cases])
    if refused is not None:
        (folder / "refused.json").write_text(json.dumps(refused))
    if details is not None:
        (folder / "details.json").write_text(json.dumps(details))
    return folder


@pytest.fixture
def mixed(tmp_path):
    """Seven cases of six patients, three of them odd, with everything that `prepare` leaves next to them."""
    cases = [make_case(f"p{i:02d}", num_slices=8 + i, spacing=8 + i, cavities=(16, 8 + 1.3 * i)) for i in range(4)]
    cases += [
        make_case("p04", num_slices=4, vendor="Siemens", tesla=3.0, group="p00"),
        make_case("p05", labelled=False, vendor="Philips", tesla=math.nan),
        make_case("p06", spacing=17.7, cavities=(16, 3)),
    ]
    details = {
        case.info.pseudonym: {"num_phases": 20 + i, "ed_phase": 0, "es_phase": 9, "warnings": []}
        for i, case in enumerate(cases[:6])
    }
    details["p02"]["warnings"] = ["burned-in-suspected"]
    refused = {
        "studies": {"uneven-phases": 2, "not-a-code-of-ours": 1},
        "left_out": {"not-cine": 31, "duplicate": 0},
        "warnings": {"burned-in-suspected": 1, "unused-row": 3},
    }
    return write(tmp_path / "out", *cases, refused=refused, details=details)


def test_json_holds_the_figures_of_a_recount(mixed):
    assert main(["check", str(mixed)]) == 0
    report = json.loads((mixed / "check.json").read_text())
    with (mixed / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    files = {row["pseudonym"]: dict(np.load(mixed / "cases" / f"{row['pseudonym']}.npz")) for row in rows}
    efs = [float(row["ef"]) for row in rows if row["ef"]]
    assert report["num_cases"] == len(rows) == 7
    assert report["num_patients"] == len({row["group"] for row in rows}) == 6
    assert report["num_labelled"] == sum(file["masks"].any() for file in files.values()) == 6
    assert report["vendors"] == {v: sum(row["vendor"] == v for row in rows) for v in ("GE", "Philips", "Siemens")}
    assert report["field_strengths_t"] == {"1.5": 5, "3": 1, "unknown": 1}
    assert report["num_phases"] == [20, 25]
    assert report["num_slices"] == [min(f["frames"].shape[1] for f in files.values()), 11]
    assert report["slice_spacing_mm"] == pytest.approx([8, 17.7])
    assert report["ef"] == pytest.approx([min(efs), max(efs)])
    bins = [0] * 20
    for ef in efs:
        bins[int(ef * 20)] += 1
    assert report["ef_histogram"] == bins
    assert (report["num_unusable"], report["troubles"]) == (0, {})
    numbers = {
        kind: {code: entry["number"] for code, entry in report[kind].items()}
        for kind in ("flags", "studies_refused", "left_out", "warnings")
    }
    assert numbers == {
        "flags": {"wide-spacing": 1, "few-slices": 1, "ef-at-bound": 1, "burned-in-suspected": 1},
        "studies_refused": {"uneven-phases": 2, "not-a-code-of-ours": 1},
        "left_out": {"not-cine": 31},
        "warnings": {"burned-in-suspected": 1, "unused-row": 3},
    }
    assert report["studies_refused"]["uneven-phases"]["meaning"] == REASONS["uneven-phases"]
    assert "another version" in report["studies_refused"]["not-a-code-of-ours"]["meaning"]
    cases = {case["pseudonym"]: case for case in report["cases"]}
    assert cases["p02"]["flags"] == ["burned-in-suspected"] and cases["p00"]["flags"] == []
    assert (cases["p03"]["num_phases"], cases["p03"]["es_phase"], cases["p06"]["num_phases"]) == (23, 9, None)
    assert cases["p05"]["ef"] is None and cases["p05"]["labelled"] is False


def test_what_is_printed_and_what_json_says_agree(mixed, capsys):
    assert main(["check", str(mixed)]) == 0
    printed = capsys.readouterr().out
    for text in (
        "7, 6 with masks",
        "20 to 25",
        "4 to 11",
        "GE 5, Philips 1, Siemens 1",
        "known in 6 cases",
        "uneven-phases",
        "not-cine",
        "few-slices",
        "check.html",
    ):
        assert text in printed
    assert main(["check", "--json", str(mixed)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((mixed / "check.json").read_text())


def test_an_ordinary_case_has_no_flag_with_or_without_masks():
    for seed in range(3):
        assert flags_of(make_case(seed=seed)) == []
        assert flags_of(make_case(seed=seed, labelled=False)) == []


@pytest.mark.parametrize(
    ("flag", "case"),
    [
        ("no-heart-near-middle", make_case(middle=(48, 66))),
        ("no-heart-near-middle", make_case(middle=(48, 92), labelled=False)),
        ("few-slices", make_case(num_slices=5)),
        ("wide-spacing", make_case(spacing=12.5)),
        ("ef-at-bound", make_case(cavities=(16, 15.5))),
        ("ef-at-bound", make_case(cavities=(16, 6))),
    ],
)
def test_an_odd_case_has_the_flag_that_names_it_and_no_other(flag, case):
    assert flags_of(case) == [flag]


def test_a_heart_that_is_grey_in_grey_has_low_contrast():
    case = make_case()
    dull = replace(case, frames=(0.4 + 0.3 * case.frames).astype(np.float32))
    assert flags_of(dull) == ["low-contrast"]


def test_two_frames_that_do_not_differ_show_no_heart():
    case = make_case(labelled=False)
    frames = np.stack([case.frames[0]] * 2)
    assert "no-heart-near-middle" in flags_of(replace(case, frames=frames))


def test_every_trouble_is_counted_and_the_report_is_written_all_the_same(tmp_path, capsys):
    good = [make_case(f"g{i}", seed=i) for i in range(3)]
    case = make_case()
    blank = np.zeros_like(case.frames)
    hollow = np.where(case.masks == LV, 0, case.masks).astype(np.uint8)
    broken = [
        ("missing", "case-missing", case),
        ("cut", "case-unreadable", case),
        ("junk", "case-unreadable", case),
        ("nikon", "other-vendor", replace(case, info=replace(case.info, vendor="Nikon"))),
        ("small", "wrong-size", replace(case, frames=case.frames[..., 9:87, 9:87], masks=case.masks[..., 9:87, 9:87])),
        ("blank", "no-contrast", replace(case, frames=np.stack([case.frames[0], blank[0]]))),
        ("hollow", "no-left-ventricle", replace(case, masks=hollow)),
        ("wrong", "ef-differs", replace(case, info=replace(case.info, ef=0.9))),
    ]
    bad = [replace(one, info=replace(one.info, pseudonym=name, group=name)) for name, _, one in broken]
    out = write(tmp_path / "out", *good, *bad)
    write_index(out, [*read_index(out), good[2].info])
    (out / "cases" / "missing.npz").unlink()
    whole = (out / "cases" / "cut.npz").read_bytes()
    (out / "cases" / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (out / "cases" / "junk.npz").write_bytes(whole[:200] + bytes(300) + whole[500:])
    assert main(["check", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and "10 of 12 cases cannot be used" in error
    report = json.loads((out / "check.json").read_text())
    expected = {code: sum(one == code for _, one, _ in broken) for _, code, _ in broken} | {"named-twice": 2}
    assert {code: entry["number"] for code, entry in report["troubles"].items()} == expected
    assert expected.keys() == TROUBLES.keys()
    for code, number in expected.items():
        assert f"{number}: {TROUBLES[code]}" in error
    assert {case["pseudonym"]: case["trouble"] for case in report["cases"]} == {
        "g0": None,
        "g1": None,
        "g2": "named-twice",
        **{name: code for name, code, _ in broken},
    }
    assert (out / "check.html").read_text().count("named-twice") == 3, "in the table of marks and at both rows"


def test_a_folder_in_which_everything_was_refused_says_why(tmp_path, capsys):
    (tmp_path / "refused.json").write_text('{"studies": {"ambiguous-stack": 4}, "left_out": {}}')
    assert main(["check", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "holds no case" in printed.err and "ambiguous-stack" in printed.out
    assert "4 studies refused" in (tmp_path / "check.html").read_text()
    assert json.loads((tmp_path / "check.json").read_text())["ef"] is None


def test_a_folder_of_an_earlier_version_is_checked_without_what_it_lacks(tmp_path):
    report = check(write(tmp_path, make_case()))
    assert (report.num_phases, report.refused, report.flags, report.num_cases) == (None, {}, {}, 1)
    complain(tmp_path, report)


@pytest.mark.parametrize("name", ["refused.json", "details.json"])
@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_counts_are_the_users_to_mend(tmp_path, name, content):
    write(tmp_path, make_case())
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="damaged"):
        check(tmp_path)


def test_entries_of_the_wrong_kind_are_unknown(tmp_path):
    details = {"p00": {"num_phases": "many", "ed_phase": 1.5, "es_phase": -1, "warnings": "no"}, "p01": 3}
    refused = {"studies": {"uneven-phases": "2"}, "left_out": [1], "warnings": {"unused-row": True}}
    write(tmp_path, make_case(), make_case("p01"), refused=refused, details=details)
    report = check(tmp_path)
    write_report(tmp_path, report)
    assert (report.num_phases, report.refused, report.left_out, report.warnings) == (None, {}, {}, {})
    assert all(case.flags == () for case in report.cases)


def test_the_second_check_says_the_same(mixed):
    texts = []
    for _ in range(2):
        main(["check", str(mixed)])
        texts.append((mixed / "check.json").read_bytes() + (mixed / "check.html").read_bytes())
    assert texts[0] == texts[1]


def test_contours_enclose_the_masks_and_nothing_else():
    """Every pixel's middle lies inside the drawn curves exactly where the label says so, holes and all."""
    from matplotlib.path import Path as Curve

    case = make_case()
    masks = case.masks.copy()
    masks[ED, 4, 40:44, 40:44] = RV  # an island within the wall and the cavity
    masks[ES, 4, :6, :9] = RV  # and one in the corner
    case = replace(case, masks=masks)
    image = image_of(case)
    assert (image.slice_number, image.width, image.height) == (5, 194, 96)
    areas = {"lv": masks[:, 4] == LV, "rv": masks[:, 4] == RV, "myo": np.isin(masks[:, 4], (MYO, LV))}
    middles = np.stack(np.meshgrid(np.arange(194) + 0.5, np.arange(96) + 0.5), axis=-1).reshape(-1, 2)
    for name, area in areas.items():
        expected = np.zeros((96, 194), bool)
        expected[:, :96], expected[:, 98:] = area
        inside = np.zeros(96 * 194, int)
        for curve in image.contours[name].split("M")[1:]:
            start, moves = curve.rstrip("Z").split("l")
            steps = np.array(moves.replace("-", " -").split(), int).reshape(-1, 2)
            points = np.cumsum([np.array(start.split(), int), *steps], axis=0) / 2
            inside += Curve(points, closed=False).contains_points(middles)
        np.testing.assert_array_equal(inside.reshape(96, 194) % 2 == 1, expected, err_msg=name)


def test_codes_of_flags_troubles_and_reasons_do_not_collide():
    assert not FLAGS.keys() & TROUBLES.keys() and not (FLAGS | TROUBLES).keys() & REASONS.keys()
