"""What the segments of a DICOM segmentation are: their labels and coded property types (PS3.3 C.8.20.2)."""

from pydicom.dataset import Dataset

from fedcmr.shared.case import LV, MYO, RV

CODES = {
    ("SCT", "87878005"): LV,
    ("SRT", "T-32600"): LV,
    ("SNM3", "T-32600"): LV,
    ("SCT", "53085002"): RV,
    ("SRT", "T-32500"): RV,
    ("SNM3", "T-32500"): RV,
    ("SCT", "49848007"): MYO,
    ("SRT", "T-32620"): MYO,
    ("SCT", "74281007"): MYO,
}
"""Coding scheme and value (PS3.16 CID 7151 and 12305): left ventricle, right ventricle, its and any myocardium."""
NAMES = {
    **dict.fromkeys(
        (
            "lv",
            "lvc",
            "lv cavity",
            "lv cav",
            "lvbp",
            "lv bp",
            "lv blood pool",
            "lv bloodpool",
            "lv endo",
            "lv endocardium",
            "left ventricle",
            "left ventricle cavity",
            "left ventricular cavity",
            "cavity of left ventricle",
            "left ventricle blood pool",
            "left ventricular blood pool",
            "heart ventricle left",
        ),
        LV,
    ),
    **dict.fromkeys(
        (
            "rv",
            "rvc",
            "rv cavity",
            "rv cav",
            "rvbp",
            "rv bp",
            "rv blood pool",
            "rv bloodpool",
            "rv endo",
            "rv endocardium",
            "right ventricle",
            "right ventricle cavity",
            "right ventricular cavity",
            "cavity of right ventricle",
            "right ventricle blood pool",
            "right ventricular blood pool",
            "heart ventricle right",
        ),
        RV,
    ),
    **dict.fromkeys(
        (
            "myo",
            "myocardium",
            "lvm",
            "mlv",
            "lv m",
            "lv myo",
            "lvmyo",
            "lv myocardium",
            "lv wall",
            "left ventricle myocardium",
            "left ventricular myocardium",
            "myocardium of left ventricle",
            "heart myocardium",
        ),
        MYO,
    ),
}
"""Segment labels in lower case, with spaces for all but letters and digits. They go before the code: where there is no
code for the wall, both cavity and wall are filed under "left ventricle"."""


def structure_named(label: str) -> int | None:
    """The label of `fedcmr.shared.case` that a structure's name stands for; None where it is another structure's."""
    letters = (letter if letter.isalnum() else " " for letter in label.lower())
    return NAMES.get(" ".join("".join(letters).split()))


def structures_of(elements: Dataset) -> dict[int, int]:
    """Labels of `fedcmr.shared.case` by SegmentNumber, for the segments that are a ventricle or its wall."""
    known = {}
    for segment in elements.get("SegmentSequence") or []:
        structure = structure_named(str(segment.get("SegmentLabel") or ""))
        for code in segment.get("SegmentedPropertyTypeCodeSequence") or []:
            scheme, value = str(code.get("CodingSchemeDesignator")), str(code.get("CodeValue"))
            structure = CODES.get((scheme, value)) if structure is None else structure
        if structure is not None:
            known[int(segment.SegmentNumber)] = structure
    return known
