"""Reads a JSON config, applies changes, and checks every key, type name and argument before anything else happens."""

import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path

from utils.errors import UserError, unknown

DEEPEST = 32  # brackets in one another in a config
MOST_VIEWS = 10_000
LARGEST = 2**63 - 1  # whole number
SIMPLE_KEYS = {
    "name": str,
    "n_gpu": int,
    "seed": int,
    "metrics": list[str],
    "weights": str | None,
    "freeze": list[str],
    "averaged_views": int,
}
SECTION_KEYS = {"optimizer": {"share_lr": float}}  # beside "type" and "args"
JSON_TYPES = (int, float, str, bool, list, dict, type(None))


class ConfigParser:
    """A checked configuration, which reads like a dict and builds what its sections name.

    Args:
        config: the JSON object: `name`, `n_gpu`, `seed` and other SIMPLE_KEYS, and sections. A section either is
            `{"type": NAME, "args": {...}}` or (`trainer`) a plain set of arguments.
        components: section name -> {type name -> constructor}, or section name -> constructor for a plain section.
        supplied: section name -> argument names that the code supplies itself, so that configs need not.

    Raises:
        UserError: an unknown key, type or argument (with the valid choices and the nearest), a missing argument,
            or a value of the wrong type.
    """

    def __init__(self, config: Mapping, components: Mapping, supplied: Mapping[str, set[str]] | None = None):
        self.config = deepcopy(dict(config))
        self.components = components
        self.supplied = supplied or {}
        self._check()

    def __getitem__(self, key: str):
        if key not in self.config:
            raise UserError(f'The config has no "{key}": add it, or take a config from configs/ that has it.')
        return self.config[key]

    def __contains__(self, key: str) -> bool:
        return key in self.config

    def get(self, key: str, default=None):
        return self.config.get(key, default)

    def build(self, section: str, *args, **kwargs):
        """Call the constructor that a section names with the section's arguments.

        Args:
            section: e.g. "optimizer".
            args, kwargs: what the code supplies; supplied keywords that this constructor does not take are left out.

        Raises:
            UserError: the constructor refuses a value.
        """
        constructor, given = self._resolve(section)
        accepted = parameters_of(constructor)
        supplied = {k: v for k, v in kwargs.items() if k in accepted or k not in self.supplied.get(section, ())}
        try:
            return constructor(*args, **{**given, **supplied})
        except (TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise UserError(f'Config section "{section}" ({constructor.__name__}): {error}.') from error

    def complete(self) -> dict:
        """A copy of the config in which every section has the arguments that it leaves out, by their defaults."""
        completed = deepcopy(self.config)
        for section in self._sections:
            constructor, given = self._resolve(section)
            defaults = {n: p.default for n, p in parameters_of(constructor).items() if p.default is not p.empty}
            arguments = {name: list(v) if isinstance(v, tuple) else v for name, v in {**defaults, **given}.items()}
            plain = not isinstance(self.components[section], Mapping)
            completed[section] = arguments if plain else {**completed[section], "args": arguments}
        return completed

    @property
    def _sections(self) -> list[str]:
        return [key for key in self.config if key in self.components and key != "metrics"]

    def _resolve(self, section: str) -> tuple[Callable, dict]:
        component, content = self.components[section], self[section]
        if not isinstance(component, Mapping):
            return component, content
        if not isinstance(content, Mapping) or "type" not in content:
            raise UserError(f'Config section "{section}" needs a "type", one of: {", ".join(sorted(component))}.')
        extra = SECTION_KEYS.get(section, {})
        for key in content.keys() - {"type", "args"}:
            if key not in extra:
                raise unknown(f'key in config section "{section}"', key, {"type", "args", *extra})
            check_type(section, key, content[key], extra[key])
        if not isinstance(content["type"], str) or content["type"] not in component:
            raise unknown(f'type in config section "{section}"', content["type"], component)
        return component[content["type"]], content.get("args", {})

    def _check(self) -> None:
        for key, value in self.config.items():
            if key in SIMPLE_KEYS:
                check_type("config", key, value, SIMPLE_KEYS[key])
            elif key not in self.components:
                raise unknown("key in the config", key, SIMPLE_KEYS.keys() | self.components.keys())
        for key in ("seed", "averaged_views"):
            if self.get(key, 0) < 0:
                raise UserError(f"{key} must be at least 0, not {self[key]}.")
        if self.get("averaged_views", 0) > MOST_VIEWS:
            raise UserError(f"averaged_views must be at most {MOST_VIEWS}, not {self['averaged_views']}.")
        for name in self.get("metrics", []):
            if name not in self.components.get("metrics", {name: None}):
                raise unknown("metric", name, self.components["metrics"])
        for section in self._sections:
            constructor, given = self._resolve(section)
            check_arguments(section, constructor, given, self.supplied.get(section, set()))


def parameters_of(constructor: Callable) -> dict[str, inspect.Parameter]:
    """The arguments of a function or a class by name, with evaluated annotations.

    Where a class takes **options for the class that it extends, those arguments are among them; its own come first.
    """
    found: dict[str, inspect.Parameter] = {}
    is_class = inspect.isclass(constructor)
    for one in inspect.getmro(constructor) if is_class else [constructor]:
        function = vars(one).get("__init__") if is_class else one
        if function is None:
            continue
        try:
            hints = typing.get_type_hints(function)
        except (NameError, TypeError):  # a library whose annotations cannot be evaluated: names are still known
            hints = {}
        parameters = list(inspect.signature(function).parameters.values())[is_class:]
        for p in parameters:
            if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
                found.setdefault(p.name, p.replace(annotation=hints.get(p.name, typing.Any)))
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def check_arguments(where: str, constructor: Callable, given: Mapping, supplied: set[str] = frozenset()) -> None:
    """Check keyword arguments against a signature and its annotations without calling anything.

    Raises:
        UserError: an argument is unknown, missing, or of the wrong type.
    """
    if not isinstance(given, Mapping):
        raise UserError(f'The arguments of config section "{where}" must be a JSON object, not {_shown(given)}.')
    parameters = {name: p for name, p in parameters_of(constructor).items() if name not in supplied}
    for name, value in given.items():
        if name not in parameters:
            raise unknown(f'argument of {constructor.__name__} in config section "{where}"', name, parameters)
        check_type(f"{where}.{constructor.__name__}", name, value, parameters[name].annotation)
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in given]
    if missing:
        raise UserError(f'Config section "{where}" ({constructor.__name__}) lacks the argument "{missing[0]}": add it.')


def check_type(where: str, name: str, value: object, kind: object) -> None:
    """Raise UserError if a JSON value does not fit a type annotation."""
    if fits(value, kind):
        return
    if isinstance(value, int) and abs(value) > LARGEST:
        raise UserError(f'"{name}" in {where} must lie between -2^63 and 2^63.')
    wanted = getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind)
    raise UserError(f'"{name}" in {where} must be of type {wanted}, not {_shown(value)}.')


def fits(value: object, kind: object) -> bool:
    """Whether a JSON value fits a type annotation; annotations that JSON knows nothing of accept everything.

    >>> fits(1, float), fits(True, int), fits(None, int | None), fits(["a"], list[int])
    (True, False, True, False)
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin in (list, tuple, Sequence, Iterable):
        return isinstance(value, (list, tuple)) and all(fits(item, parts[0]) for item in value)
    if kind in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, kind)):
            return False
        return abs(value) <= LARGEST if isinstance(value, int) else math.isfinite(value)
    if kind is typing.Any or not isinstance(kind, type):
        return True
    return isinstance(value, kind) or not isinstance(value, JSON_TYPES)


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def read_json(path: str | Path) -> dict:
    """Read a config file.

    Raises:
        UserError: the file is missing, is no valid JSON, or is no JSON object.
    """
    path = Path(path)
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        there = sorted(str(p) for p in path.parent.glob("*.json"))
        near = get_close_matches(str(path)[:200], there, n=3, cutoff=0)
        hint = f" Nearest of the {len(there)} in {path.parent}: {', '.join(near)}." if near else ""
        raise UserError(f"There is no config file {path}: give the path of a JSON config with -c.{hint}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The config file {path} cannot be read: {error}.") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}.") from error
    except ValueError as error:
        raise UserError(f"{path} cannot be a config: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold one JSON object, the config.")
    return content


def parse_assignment(text: str) -> tuple[str, object]:
    """Split "KEY;PATH=VALUE"; the value is read as JSON where it is JSON, else as a string.

    >>> parse_assignment("optimizer;args;lr=0.05"), parse_assignment("name=mine")
    (('optimizer;args;lr', 0.05), ('name', 'mine'))
    """
    path, equals, value = text.partition("=")
    path = path.strip()
    if not equals or not path:
        raise UserError(f'--set needs KEY;PATH=VALUE, for example --set "optimizer;args;lr=0.05", not "{text[:200]}".')
    try:
        _check_value(path)
        try:
            return path, parse_json(value)
        except json.JSONDecodeError:
            _check_value(value)
            return path, value
    except ValueError as error:
        raise UserError(f'--set "{path[:100]}" cannot be a value of the config: {error}.') from error


def parse_json(text: str) -> object:
    """Read JSON of the size and depth of a config.

    Raises:
        json.JSONDecodeError: it is no JSON.
        ValueError: it is nested too deeply, or holds a number of thousands of digits or a control character.
    """
    try:
        content = json.loads(text)
    except json.JSONDecodeError:
        raise
    except RecursionError:
        raise ValueError("its brackets are nested too deeply") from None
    except ValueError:
        raise ValueError("a number in it has too many digits") from None
    _check_value(content)
    return content


def _check_value(value: object, depth: int = 0) -> None:
    if depth > DEEPEST:
        raise ValueError("its brackets are nested too deeply")
    if isinstance(value, str) and not all(c == " " or c.isprintable() or c in "\t\u200d" for c in value):
        raise ValueError(f"{ascii(value[:100])} holds a character that cannot be printed")
    if isinstance(value, (dict, list)):
        for part in [*value, *value.values()] if isinstance(value, dict) else value:
            _check_value(part, depth + 1)


def merge(config: Mapping, changes: Mapping) -> dict:
    """A copy of a config with changes applied in their order.

    Args:
        config: the JSON object.
        changes: whole sections ("data_loader": {...}) or single values by path ("optimizer;args;lr": 0.05).

    Raises:
        UserError: a part of a path is a value, not a section.
    """
    merged = deepcopy(dict(config))
    for path, value in changes.items():
        *parents, last = path.split(";")
        section = merged
        for depth, key in enumerate(parents):
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise UserError(f'Cannot set "{path}": "{";".join(parents[: depth + 1])}" is a value, not a section.')
        section[last] = deepcopy(value)
    return merged


def differences(before: Mapping, now: Mapping, path: str = "") -> dict[str, tuple[object, object]]:
    """The values in which two configs differ: path -> (before, now), each None where it is absent."""
    found: dict[str, tuple[object, object]] = {}
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found |= differences(old, new, f"{path}{key};")
        elif old != new:
            found[f"{path}{key}"] = (old, new)
    return found
