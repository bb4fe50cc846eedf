"""YAML that people write, read so that it means what it shows: nothing is fetched into it from elsewhere.

Studies' configs, their overrides, `site.yaml` and `coordinator.yaml` all come through here.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedcmr.shared.errors import UserError
from fedcmr.shared.plain_files import read_plain

MAX_BYTES = 64 * 1024
"""Ten times the longest that ships."""
MAX_DEPTH = 16
INTERPOLATION = "${"
NULLS, NULL_TAG = ("", "~", "null"), "tag:yaml.org,2002:null"


def read_settings(path: Path, schema: type | None = None) -> DictConfig:
    """Read a settings file; settings of `schema` that are texts come as they are written, also 0123, on or 1:30.

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
        if isinstance(node, DictConfig) and schema is not None:
            _as_written(node, schema, yaml.compose(text, Loader=yaml.SafeLoader))
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


def read_overrides(overrides: Collection[str], schema: type) -> DictConfig:
    """Settings of the form key=value; those that are texts come as they are written, as in `read_settings`.

    Raises:
        UserError: A value holds what `check_plain` refuses.
        yaml.YAMLError: A value that is no text is no YAML.
    """
    last = {override.partition("=")[0]: override for override in overrides}
    texts = {}
    for key, override in last.items():
        value, where = override.partition("=")[2], f"override {key[:64]!r}"
        if _is_text(_kind_of(schema, key)) and value.lower() not in NULLS and value[:1] not in ("'", '"'):
            if INTERPOLATION in value:
                raise UserError(f"{where}: expected no interpolation ({INTERPOLATION}); write the value out")
            texts[key] = value
        else:
            check_plain(value, where)
    given = OmegaConf.from_dotlist([override for key, override in last.items() if key not in texts])
    for key, value in texts.items():
        OmegaConf.update(given, key, value, force_add=True)
    return given


def _as_written(given: DictConfig, schema: type, node: yaml.Node | None) -> None:
    """Put back what YAML took for a number, a truth value or a time although the setting is a text."""
    if not isinstance(node, yaml.MappingNode):
        return
    kinds = dict(_fields(schema))
    for key, value in node.value:
        kind = kinds.get(key.value)
        if is_dataclass(kind) and isinstance(given.get(key.value), DictConfig):
            _as_written(given[key.value], cast(type, kind), value)
        elif _is_text(kind) and isinstance(value, yaml.ScalarNode) and value.tag != NULL_TAG:
            given[key.value] = value.value
        elif (
            kind == list[str]
            and isinstance(value, yaml.SequenceNode)
            and all(isinstance(item, yaml.ScalarNode) and item.tag != NULL_TAG for item in value.value)
        ):
            given[key.value] = [item.value for item in value.value]


def _kind_of(schema: type, key: str) -> Any:
    """The type of a setting by its full name; None for one that there is not."""
    kind: Any = schema
    for name in key.split("."):
        kind = dict(_fields(kind)).get(name) if is_dataclass(kind) and isinstance(kind, type) else None
    return kind


def _is_text(kind: Any) -> bool:
    """Whether a setting is a text, perhaps none."""
    return kind in (str, str | None)


def check_keys(
    given: Mapping[Any, Any],
    schema: type,
    where: str = "",
    renamed: Mapping[str, str] | None = None,
    no_keys: Collection[str] = (),
) -> None:
    """Refuse keys that a schema has not, and name those that were probably meant.

    Args:
        given: Keys and values, blocks as mappings.
        schema: A dataclass; its fields that are dataclasses are blocks.
        where: Names the file, or the overrides, in the error.
        renamed: Names of earlier versions and what they are today, both with their block.
        no_keys: Fields of the schema that no file may set.

    Raises:
        UserError: There is such a key.
    """
    known, blocks = [key for key in _keys(schema) if key not in no_keys], list(_blocks(schema))
    for key in _given_keys(given, known, blocks):
        if key in known or key in blocks:
            continue
        meant = _nearest(key, known, renamed or {})
        hint = f"; did you mean {' or '.join(meant)}?" if meant else ""
        raise UserError(f"{where and where + ': '}no setting is called {key[:64]!r}{hint}")


def _keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Full names of all settings, blocks not counted."""
    for name, kind in _fields(schema):
        if is_dataclass(kind):
            yield from _keys(cast(type, kind), f"{prefix}{name}.")
        else:
            yield prefix + name


def _blocks(schema: type, prefix: str = "") -> Iterator[str]:
    """Full names of all blocks."""
    for name, kind in _fields(schema):
        if is_dataclass(kind):
            yield prefix + name
            yield from _blocks(cast(type, kind), f"{prefix}{name}.")


def _fields(schema: type) -> Iterator[tuple[str, Any]]:
    kinds = get_type_hints(schema)
    for field in fields(schema):
        yield field.name, kinds[field.name]


def _given_keys(
    given: Mapping[Any, Any], known: Collection[str], blocks: Collection[str], prefix: str = ""
) -> Iterator[str]:
    """Full names of what is given; of a block that there is not, the first that is in it."""
    for name, value in given.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key in blocks:
            yield from _given_keys(value, known, blocks, f"{key}.")
        else:  # what is in a setting that is a mapping, such as numbers by site, is no setting
            yield key if key in known else _first_leaf(key, value)


def _first_leaf(key: str, value: Any) -> str:
    while isinstance(value, Mapping) and value:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key


def _nearest(key: str, known: Collection[str], renamed: Mapping[str, str]) -> list[str]:
    """The settings of the same name in other blocks, or those spelt nearly so."""
    name = _last(key)
    same = [other for other in known if _last(other) == name] or [
        today for old, today in renamed.items() if _last(old) == name
    ]
    if same:
        return same
    close = get_close_matches(key, known, n=2, cutoff=0.8)
    names = get_close_matches(name, sorted({_last(other) for other in known}), n=2, cutoff=0.75)
    return close or [other for other in known if _last(other) in names]


def _last(key: str) -> str:
    return key.rpartition(".")[2]


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
