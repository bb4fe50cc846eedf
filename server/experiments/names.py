"""Names of a study's models for the reader, and their order in tables."""

MAIN_MODEL = "synthetic_only"
FEDERATED_SEGMENTER, PUBLIC_SEGMENTER = "federated_segmenter", "public_segmenter"
ALL, WITHOUT = "all", "without "
"""Rows of the cross-vendor evaluation: trained on all vendors, and the prefix of a row that leaves one out."""
NAMES = {
    MAIN_MODEL: "synthetic hearts only",
    "pooled_real": "real scans, pooled",
    "federated_without_privacy": "sites, without privacy",
    "prior_only": "public prior only",
    "predict_the_mean": "guess the mean",
    FEDERATED_SEGMENTER: "public segmenter, tuned at the sites",
    PUBLIC_SEGMENTER: "public segmenter",
}
FAMILIES = {"epsilon_": "sites, epsilon {}", "local_only_": "site {} alone", "without_": "without site {}"}
"""Models of which a study has several: prefix of their keys, and their name."""
_ORDER = (
    MAIN_MODEL,
    FEDERATED_SEGMENTER,
    "pooled_real",
    "federated_without_privacy",
    "prior_only",
    PUBLIC_SEGMENTER,
    *FAMILIES,
    "",
    "predict_the_mean",
)
"""Order of the models, from the best case for the sites' data to the baseline without images; "" is any other model."""


def model_name(key: str) -> str:
    """A model's name for the reader."""
    if key in NAMES:
        return NAMES[key]
    family = family_of(key)
    return FAMILIES[family].format(key.removeprefix(family)) if family else key.replace("_", " ")


def family_of(key: str) -> str | None:
    """The beginning that a model's key shares with others of its kind; None for one of its own."""
    return next((family for family in FAMILIES if key.startswith(family) and key != family), None)


def model_rank(key: str) -> tuple[int, float, str]:
    """Sorts models for the reader, the members of a family by their number or name."""
    family = family_of(key)
    place = family or key
    position = _ORDER.index(place if place in _ORDER else "")
    try:
        number = float(key.removeprefix(family or ""))
    except ValueError:
        number = 0.0
    return position, number, key
