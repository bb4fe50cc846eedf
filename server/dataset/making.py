"""How a synthetic data set was made, in the sentences of its datasheet: drawn and rendered, or bent from public scans.

What is a picture of nobody and what is a picture of somebody bent out of shape differ in what may be said of them: whom
they show, who drew the labels, and whether patients of the set are independent of each other.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedcmr.server.generation.guide_scans import GuideScans
from fedcmr.shared.checkpoint import write_atomically

NAME = "making.json"


@dataclass(frozen=True)
class Making:
    """What the facts of a release say about it.

    Attributes:
        scans: The public scans that were bent, "ACDC: 79"; empty where every heart was drawn and rendered.
        num_scans: How many of them could be used.
        is_refined: Whether the generator went over the bent scans.
        terms: What may be done with what is made from them.
    """

    scans: str = ""
    num_scans: int = 0
    is_refined: bool = True
    terms: Sequence[str] = ()

    def opening(self, private: bool) -> str:
        """Whom the images show."""
        if self.scans:
            return (
                "Every image is a scan of a patient from a public data set, bent into the shape of another heart and\n"
                "brought to a vendor's grey values. So it shows a person, if out of shape: one whose scan anybody may\n"
                "ask for. "
                + (
                    "No image shows a patient of the sites that took part."
                    if private
                    else "What was learnt from the sites' patients was learnt without differential privacy."
                )
            )
        if private:
            return (
                "No image in this folder shows a person. Every heart was drawn by a shape model and rendered by a "
                "generator."
            )
        return (
            "Every heart was drawn by a shape model and rendered by a generator. The generator was trained without\n"
            "differential privacy, and may have learnt images of its training by heart."
        )

    def masks(self) -> str:
        """Who drew the labels."""
        if self.scans:
            return (
                "They were drawn on the public scans, by the people who made these\n  sets, and bent with the images; "
                "nobody has drawn them afterwards."
            )
        return "The image was rendered over them;\n  nobody has drawn them afterwards."

    def independence(self) -> str:
        """How to split the set."""
        if self.scans:
            return (
                f"{self.num_scans} scans are behind the patients, so that many show the same body: `group` in "
                "cases.csv names the scan.\n  Split by it, as nnU-Net's and MONAI's folds here do."
            )
        return (
            "Patients are independent of each other; there is no recommended split, but a patient's two phases belong "
            "together."
        )

    def sentence(self) -> str:
        """How an image came to be."""
        if not self.scans:
            return (
                "A parametric heart gives the masks, the masks give the ejection fraction, and a generator renders the "
                "image."
            )
        last = "the generator then went over it" if self.is_refined else "no network went over it"
        return (
            "A parametric heart says where cavity, muscle and right ventricle should lie. A public scan\n"
            f"({self.scans}) is bent until they do, with the labels that people drew on it, and its grey values are\n"
            f"brought to the vendor's style; {last}. The ejection fraction is that of the bent labels."
        )

    def annotation(self) -> str:
        """Who drew the labels, for Croissant."""
        if self.scans:
            return "Contours that the makers of the public sets drew on their scans, bent with the images."
        return "None: the image was rendered over its masks, nobody has drawn them afterwards."

    def derivation(self) -> str:
        """How an image came to be, for DICOM (Derivation Description, PS3.3 C.7.6.1)."""
        if self.scans:
            return f"Bent from a scan of a public data set ({self.scans}), grey values changed"
        return "Rendered by a generative model over a parametric heart"

    def comment(self) -> str:
        """Whom it shows, for DICOM (Patient Comments, PS3.3 C.7.1.1)."""
        return "Synthetic: a public scan, bent" if self.scans else "Synthetic image, not a person"

    def facts(self) -> dict[str, Any]:
        """As the facts of a release keep it."""
        return {**asdict(self), "terms": list(self.terms)}


DRAWN = Making()


def making_of(facts: Mapping[str, Any]) -> Making:
    """What `Making.facts` wrote; hearts were drawn where a release of an earlier version says nothing."""
    return Making(**facts.get("making", {}))


def from_guides(guides: GuideScans | None, num_steps: int) -> Making:
    """The making of a study with these guides, and so many steps of its sampler."""
    if guides is None:
        return DRAWN
    scans = ", ".join(f"{name}: {number}" for name, number in guides.sets.items())
    return Making(scans, len(guides.scans), num_steps > 0, guides.terms)


def keep_making(facts: Mapping[str, Any], run: Path) -> None:
    """Write how a study's set was made into its run folder, for the report."""
    write_atomically(run / NAME, (json.dumps(facts["making"], indent=1) + "\n").encode())


def kept_making(run: Path) -> Making:
    """What `keep_making` wrote; hearts were drawn where it wrote nothing."""
    path = run / NAME
    return Making(**json.loads(path.read_bytes())) if path.is_file() else DRAWN
