"""The YAML at the head of a card that Hugging Face's Hub reads; a reader elsewhere sees a few plain lines."""

from collections.abc import Mapping
from typing import Any

import yaml


def front_matter(values: Mapping[str, Any]) -> str:
    """A block between two lines of dashes, keys in the order given.

    https://huggingface.co/docs/hub/datasets-cards and https://huggingface.co/docs/hub/model-cards.
    """
    return f"---\n{yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1000)}---\n"
