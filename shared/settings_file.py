"""YAML that people write, read so that it means what it shows: nothing is fetched into it from elsewhere.

Studies' configs, their overrides, `site.yaml` and `coordinator.yaml` all come through here.
"""

from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedcmr.shared.errors import UserError
from fedcmr.shared.plain_files import read_plain

MAX_BYTES = 64 * 1024
"""Ten times the longest that ships."""
MAX_DEPTH = 16
INTERPOLATION = "${"


def read_settings(path: Path) -> DictConfig:
    """Read a settings file.

    Guarantees:
        What comes back is in the file, letter for letter: no interpolation (OmegaConf would put an environment variable
        or another key's value there), no anchor or alias (a few lines could stand for gigabytes), no merged mapping,
        and no key twice (of which a reader sees the first, and the last would count).

    Raises:
        UserError: The file is missing, too large, no YAML, or holds one of those.
    """
    try:
        text = read_plain(path, MAX_BYTES).decode()
        check_plain(text, str(path))
        node = OmegaConf.create(text)
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as settings: {reason}") from None
    if not isinstance(node, DictConfig):
        raise UserError(f"{path}: expected keys with values, got a list")
    return node


def check_plain(text: str, where: str) -> None:
    """Refuse YAML that holds more, or less, than it shows; see `read_settings`.

    Args:
        text: A file's content, or an override's value.
        where: Names it in the error.

    Raises:
        UserError: There is an interpolation, an anchor, a merged mapping or a key that comes twice.
        yaml.YAMLError: It is no YAML.
    """
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = f"{where}{_line(event)}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise UserError(f"{line}: expected no anchor (&) or alias (*); write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise UserError(f"{line}: expected lists and blocks at most {MAX_DEPTH} deep")
    _check_node(cast(Any, yaml.compose(text, Loader=yaml.SafeLoader)), where)


def _check_node(node: yaml.Node | None, where: str) -> None:
    """The same for a node and what is in it."""
    if isinstance(node, yaml.ScalarNode) and INTERPOLATION in node.value:
        # The value is not repeated: it may be of the kind that does not belong into a log.
        raise UserError(
            f"{where}{_line(node)}: expected a value, got an interpolation ({INTERPOLATION}...}}); write "
            "the value itself"
        )
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_node(item, where)
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line = f"{where}{_line(key)}"
            if key.tag == "tag:yaml.org,2002:merge":
                raise UserError(f"{line}: expected keys, got a merged mapping (<<); write the keys out")
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise UserError(f"{line}: expected every key once, got {key.value[:64]!r} again; remove one of the two")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            _check_node(key, where)
            _check_node(value, where)


def _line(node: yaml.Node | yaml.Event) -> str:
    """Where a piece stands in its file."""
    return "" if node.start_mark is None else f" line {node.start_mark.line + 1}"
