"""What systems and anonymisers write where a number, a name or a manufacturer is missing."""

import re

WORDS = frozenset(
    {
        "anon",
        "anonym",
        "anonyme",
        "anonymous",
        "anonymised",
        "anonymized",
        "deidentified",
        "desconocido",
        "empty",
        "inconnu",
        "missing",
        "na",
        "nil",
        "noid",
        "none",
        "notapplicable",
        "notavailable",
        "notknown",
        "null",
        "redacted",
        "removed",
        "unbekannt",
        "undefined",
        "unknown",
        "unspecified",
    }
)
"""In lower case, without spaces and signs."""


def is_placeholder(text: str) -> bool:
    """Whether a text says nothing: only signs or zeros, `XXX`, or one of `WORDS`; so does an empty one."""
    word = "".join(re.findall(r"[^\W_]+", text.casefold()))
    return not word.strip("0") or word in WORDS or (len(word) > 1 and not word.strip("x"))
