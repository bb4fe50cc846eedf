"""Every code that a site may answer with is explained to its own people, as in the guide."""

import re
from pathlib import Path

from fedcmr.client.refusals import MEANINGS, in_words
from fedcmr.shared.records import CODES, OK

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "deployment.md"


def test_every_code_has_a_meaning_and_a_remedy():
    assert MEANINGS.keys() == CODES - {OK}
    for code, (meaning, remedy) in MEANINGS.items():
        assert meaning and remedy and in_words(code) == f"{code}: {meaning}. Remedy: {remedy}"
        assert re.search(rf"^\| `{code}` \|", GUIDE.read_text(), re.MULTILINE), "the guide explains it too"
    assert in_words("a patient's gradient failed") == "a patient's gradient failed"
