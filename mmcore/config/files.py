"""Recipe files: YAML, the recipes they extend, and overrides from the command line."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from mmcore.config.sections import Recipe
from mmcore.config.typed import build
from mmcore.config.words import expanded
from mmcore.errors import ConfigError


def load_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Recipe:
    """Read a recipe file and apply `section.key=value` overrides.

    Relative paths in data.sources, data.validation, tokenizer.path and training.init_from are taken from the
    folder the command runs in, as in a shell. Raises ConfigError, naming every fault found.
    """
    return build_recipe(read_recipe(path, overrides), origin(path, overrides))


def origin(path: str | Path, overrides: list[str] | tuple[str, ...]) -> str:
    """What a recipe's faults are found in."""
    return f"{path} with --set" if overrides else str(path)


def read_recipe(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> dict[str, Any]:
    """The values that a recipe file, those it extends, and the overrides give, without the defaults.

    Raises ConfigError where a file cannot be read; keys and types are checked by `build_recipe`.
    """
    path = Path(expanded(path))
    values = _read_chain(path, ())
    for override in overrides:
        _apply_override(values, override)
    values.setdefault("name", path.stem)
    return values


def build_recipe(values: dict[str, Any], origin: str = "recipe") -> Recipe:
    """A Recipe from nested plain values. Raises ConfigError, naming every fault found."""
    problems: list[str] = []
    recipe = build(Recipe, values, "", problems)
    if problems:
        raise ConfigError(f"{origin}: " + "; ".join(problems))
    return recipe


def _read_chain(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """A recipe's values laid over those of the recipe it extends."""
    if path.resolve() in seen:
        raise ConfigError(f"{path} extends itself: remove one `extends`")
    if not path.is_file():
        raise ConfigError(f"there is no recipe {path}{_near_file(path)}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        first = " ".join(str(error).split())
        raise ConfigError(f"{path} is not a YAML recipe: {first}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a recipe: it must hold sections such as model and training")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    base = _read_chain(path.parent / expanded(str(parent)), (*seen, path.resolve()))
    base.pop("name", None)
    return _overlay(base, values)


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 3e-4 and 1e12 as numbers (YAML 1.1 wants 3.0e-4) and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def _near_file(path: Path) -> str:
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
    return f": did you mean {path.parent / near[0]}?" if near else ": check the path"


def _overlay(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: write it as section.key=value")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not YAML") from None
    *sections, last = key.strip().split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    values[last] = value
