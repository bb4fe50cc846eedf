"""Where scans come from: recorded once, when they are prepared or a site is registered, and never guessed.

What nobody recorded counts as scans of real patients that are private. Whoever states something about a study's
patients, or shows an image of one, reads it here and nowhere else.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedcmr.shared.errors import UserError
from fedcmr.shared.file_names import PREPARED_NAME

SIMULATED, PUBLIC, PRIVATE, MIXED = "simulated", "public", "private", "mixed"
EXPORTER = "fedcmr"
"""Manufacturer of the synthetic DICOM files that `fedcmr-server synthesize` exports."""


@dataclass(frozen=True)
class PublicSet:
    """A data set that anybody may ask for.

    Attributes:
        citation: What its terms ask to be cited.
        terms: What may be done with it, in a clause.
    """

    citation: str
    terms: str


PUBLIC_SETS = {
    "ACDC": PublicSet(
        "Bernard et al. (2018), IEEE Transactions on Medical Imaging 37:2514",
        "CC BY-NC-SA 4.0, for research: cite it, no commercial use, share what is made from it alike",
    ),
    "M&Ms": PublicSet(
        "Campello et al. (2021), IEEE Transactions on Medical Imaging 40:3543",
        "research only: cite it, no commercial use",
    ),
    "M&Ms-2": PublicSet(
        "Martin-Isla et al. (2023), IEEE Journal of Biomedical and Health Informatics 27:3302",
        "research only: cite it, no commercial use",
    ),
    "Sunnybrook": PublicSet("Radau et al. (2009), The MIDAS Journal", "CC0 1.0: no condition, citing it is asked for"),
}
"""The layouts of `prepare` that are a public set's own."""


@dataclass(frozen=True)
class Provenance:
    """Where the scans of a site, a folder or a test set come from.

    Attributes:
        kind: "simulated": drawn by a program, of no patient. "public": of `source`. "private": of real patients, or
            unknown. "mixed": simulated and real ones together, in what `together` joined.
        source: The public sets' names, joined by ", "; else empty.
        terms: Terms of use of the public sets, with their citations, joined by "; "; else empty.
    """

    kind: str = PRIVATE
    source: str = ""
    terms: str = ""

    @property
    def is_simulated(self) -> bool:
        """Whether no patient's scan is among them."""
        return self.kind == SIMULATED

    def as_json(self) -> dict[str, str]:
        """As files keep it."""
        return asdict(self)


PRIVATE_REAL = Provenance()
SIMULATED_SCANS = Provenance(SIMULATED)


def public(name: str) -> Provenance:
    """The provenance of a public set, by its name in any spelling ("mnms", "M&Ms").

    Raises:
        UserError: The set is not known here.
    """
    known = {_letters(key): key for key in PUBLIC_SETS}
    key = known.get(_letters(name))
    if key is None:
        raise UserError(
            f"Expected a public data set of {', '.join(PUBLIC_SETS)}, got {name!r}; another set's scans "
            "count as private"
        )
    entry = PUBLIC_SETS[key]
    return Provenance(PUBLIC, key, f"{key} ({entry.citation}) is {entry.terms}")


def parse(text: str) -> Provenance:
    """What somebody wrote: "private", "simulated" or "public:NAME".

    Raises:
        UserError: It is none of these.
    """
    kind, _, name = text.partition(":")
    if kind == PUBLIC and name:
        return public(name)
    if text == SIMULATED:
        return SIMULATED_SCANS
    if text == PRIVATE:
        return PRIVATE_REAL
    raise UserError(f"Expected a provenance of private, simulated or public:NAME, got {text!r}.")


def from_json(value: Any) -> Provenance:
    """A provenance that a file holds; whatever is not exactly one counts as private."""
    if not isinstance(value, Mapping):
        return PRIVATE_REAL
    if value.get("kind") == SIMULATED:
        return SIMULATED_SCANS
    if value.get("kind") == PUBLIC:
        try:
            return public(str(value.get("source")))
        except UserError:
            return PRIVATE_REAL
    return PRIVATE_REAL


def of_folder(folder: Path) -> Provenance:
    """What a prepared folder's `prepared.json` records; private where it says nothing or cannot be read."""
    try:
        content = json.loads((folder / PREPARED_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return PRIVATE_REAL
    return from_json(content.get("provenance")) if isinstance(content, dict) else PRIVATE_REAL


def together(parts: Iterable[Provenance]) -> Provenance:
    """The provenance of scans from several places: private as soon as one part is, and where there is none.

    Simulated scans together with real ones make it "mixed", which shows no more than "private" does.
    """
    found = list(dict.fromkeys(parts))
    if len(found) < 2:
        return found[0] if found else PRIVATE_REAL
    sources, terms = (
        dict.fromkeys(text for part in found if (text := getattr(part, name))) for name in ("source", "terms")
    )
    kinds = {part.kind for part in found}
    kind = MIXED if kinds & {SIMULATED, MIXED} else PRIVATE if PRIVATE in kinds else PUBLIC
    return Provenance(kind, ", ".join(sources), "; ".join(terms))


def _letters(name: str) -> str:
    """A name without what people spell differently."""
    return "".join(letter for letter in name.lower().replace("&", "n") if letter.isalnum())
