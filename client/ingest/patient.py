"""What scans and tables say about a patient besides the heart: sex and pathology group, brought to one spelling.

Both describe groups of patients, for an evaluation by subgroup, and neither identifies one. Other words than those
listed here become unknown: a field that is meant for a code may hold a name.
"""

from collections.abc import Iterable

PATHOLOGIES = {
    code.upper(): code
    for code in (
        "NOR",
        "MINF",
        "DCM",
        "HCM",
        "RV",  # ACDC: RV is an abnormal right ventricle
        "HHD",
        "ARV",
        "AHS",
        "IHD",
        "LVNC",
        "Other",  # M&Ms, next to NOR, DCM and HCM
        "LV",
        "ARR",
        "FALL",
        "CIA",
        "TRI",  # M&Ms-2, next to NOR, HCM and RV (there: dilated)
        "HF-I",
        "HF-NI",
        "HYP",
        "N",  # Sunnybrook: heart failure with and without infarct, hypertrophy, normal
    )
}
"""Codes of the data sets, by their capitals. They are kept as each data set has them: its definitions are its own."""
SEX_WORDS = {"F": "F", "M": "M", "FEMALE": "F", "MALE": "M"}


def pathology_code(text: str) -> str:
    """A code of `PATHOLOGIES`; empty for any other text."""
    return PATHOLOGIES.get(text.strip().upper(), "")


def sex_code(text: str) -> str:
    """One of `fedcmr.shared.case.SEXES`; empty for any other text, as "O" (other) of PatientSex (0010,0040)."""
    return SEX_WORDS.get(text.strip().upper(), "")


def agreed_sex(texts: Iterable[str]) -> str:
    """The one sex that the images of a stack name; empty where they name several or none."""
    return agreed(sex_code(text) for text in set(texts) if text.strip())


def agreed(codes: Iterable[str]) -> str:
    """The code that all sources give; empty where they differ or there is none: no study is refused for that."""
    distinct = set(codes)
    return distinct.pop() if len(distinct) == 1 else ""
