"""Reading a YAML file, and why that failed as one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from serving.errors import ConfigError


class _Repeated(Exception):
    """A mapping has a key twice."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice: by itself the last one wins without a word."""

    # Where mappings are composed: later, what a merge (`<<`) brings looks as if written.
    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            merges = key.tag == "tag:yaml.org,2002:merge"
            name = key.value if merges else self.construct_object(key)
            line = key.start_mark.line + 1
            if name in lines:
                where = _lines(lines[name], line)
                raise _Repeated(f"the key {name!r} is written twice, {where}; keep one")
            lines[name] = line
        return node


def _lines(first: int, second: int) -> str:
    return f"in line {first}" if first == second else f"in lines {first} and {second}"


def read_yaml(path: Path) -> Any:
    """What the file holds; None if that is nothing.

    Raises `ConfigError` where it cannot be read, is not valid YAML, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        # A safe loader.
        return yaml.load(text, Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _Repeated as error:
        raise ConfigError(f"{path}: {error}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - text.rfind("\n", 0, error.position)
        raise ConfigError(f"{_invalid(path)}{_at(line, column)}{error.reason}") from error
    except yaml.MarkedYAMLError as error:
        raise ConfigError(f"{_invalid(path)}{_explain(error)}") from error
    except ValueError as error:  # not UTF-8, or a date that there is not
        raise ConfigError(f"{_invalid(path)}{error}") from error


def _invalid(path: Path) -> str:
    return f"{path}: is not valid YAML: "


def _at(line: int, column: int) -> str:
    return f"line {line}, column {column}: "


def _explain(error: yaml.MarkedYAMLError) -> str:
    """What the parser says, where, and in what: without its excerpt of the text."""
    said, within, began = str(error.problem), error.context, error.context_mark
    if within and began:
        if within.startswith("while "):
            said = f"{said} ({within} that begins in line {began.line + 1})"
        else:
            said = f"{within} {said}"
    # YAML reserves "@": the mistake that everybody makes once.
    if "'@'" in said:
        said = f'{said}; an alias needs quotes, as in version: "@champion"'
    mark = error.problem_mark or began
    return f"{_at(mark.line + 1, mark.column + 1)}{said}" if mark else said
