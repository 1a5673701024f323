"""Read arguments from one YAML or JSON file."""

import functools
import re
from pathlib import Path
from typing import Any

from zero_sft.errors import ArgumentError
from zero_sft.json_text import DuplicateKeyError, JsonError, parse_json
from zero_sft.options.command_line import RawArgument


def read_file(path: Path) -> list[RawArgument]:
    """Read the arguments in a YAML or JSON file, which holds a mapping from names to values.

    Raises:
        ArgumentError: no such file, not YAML or JSON, not a mapping, or a name given twice.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        raise ArgumentError(f"can't read the arguments file {path}: {reason}", code="arguments.file_unreadable") from error
    pairs = _json_pairs(path, text) if path.suffix.lower() == ".json" else _yaml_pairs(path, text)
    names = [name for name, _ in pairs]
    for name in names:
        if not isinstance(name, str) or names.count(name) > 1:
            problem = "is given twice" if isinstance(name, str) else "is not a name"
            raise ArgumentError(
                f"{path}: {name!r} {problem}. Write each argument once, as `name: value`.", code="arguments.file_bad_key"
            )
    return [RawArgument(name=name.replace("-", "_"), value=value, origin=str(path)) for name, value in pairs]


def _json_pairs(path: Path, text: str) -> list[tuple[Any, Any]]:
    try:
        content = parse_json(text)
    except DuplicateKeyError as error:
        raise ArgumentError(f"{path}: {error}. Write it once.", code="arguments.file_bad_key") from error
    except JsonError as error:
        raise ArgumentError(
            f"{path} can't be used as JSON: {error.place_and_reason}. Expected one object of names and values.",
            code="arguments.file_not_json",
        ) from error
    if not isinstance(content, dict):
        raise ArgumentError(
            f"{path}: expected one JSON object of names and values, got {type(content).__name__}",
            code="arguments.file_not_an_object",
        )
    return list(content.items())


def _yaml_pairs(path: Path, text: str) -> list[tuple[Any, Any]]:
    import yaml

    loader = _plain_loader()(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise ArgumentError(
                f"{path}: expected lines of `name: value`, got {type(loader.construct_document(node)).__name__}",
                code="arguments.file_not_an_object",
            )
        if any(key.tag == _MERGE for key, _ in node.value):
            raise ArgumentError(
                f"{path}: merge keys (<<) are not supported; write each argument out.", code="arguments.file_merge_key"
            )
        return [
            (loader.construct_object(key, deep=True), loader.construct_object(value, deep=True)) for key, value in node.value
        ]
    except yaml.YAMLError as error:
        # PyYAML's message quotes the line, which may contain a token.
        raise ArgumentError(
            f"{path} is not YAML: {_without_quotes(error)}. Expected lines of `name: value`.", code="arguments.file_not_yaml"
        ) from None
    except (RecursionError, ValueError) as error:  # ValueError: an impossible date, or a number of thousands of digits
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else "a date or number in it is impossible"
        raise ArgumentError(
            f"{path} is not YAML: {reason}. Expected lines of `name: value`, with quotes around text that looks like a number.",
            code="arguments.file_not_yaml",
        ) from None
    finally:
        loader.dispose()


_MERGE = "tag:yaml.org,2002:merge"


@functools.cache
def _plain_loader() -> Any:
    """Return PyYAML's safe loader, which also refuses duplicate keys, and leaves two number formats of YAML 1.1 as text.

    These are 010 (8) and 1:30 (90).
    """
    import yaml

    class PlainLoader(yaml.SafeLoader):
        """Read numbers as the command line does, and each key once."""

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """Return a dict; PyYAML would silently keep the last of two equal keys."""
            if isinstance(node, yaml.MappingNode):
                texts = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE]
                if len(set(texts)) < len(texts):
                    raise yaml.constructor.ConstructorError(None, None, "two equal keys in the mapping", node.start_mark)
            return super().construct_mapping(node, deep)

        def construct_number(self, node: Any) -> Any:
            """Return a number, or the text if YAML 1.1 would read it in another base."""
            text = self.construct_scalar(node)
            if ":" in text or re.fullmatch(r"[-+]?0[0-9_]+", text):
                return text
            return self.construct_yaml_int(node) if node.tag.endswith(":int") else self.construct_yaml_float(node)

    for kind in ("int", "float"):
        PlainLoader.add_constructor(f"tag:yaml.org,2002:{kind}", PlainLoader.construct_number)
    return PlainLoader


def _without_quotes(error: Any) -> str:
    """Describe a problem and its position without quoting the file.

    PyYAML notices a bad token where the next one begins, and a missing bracket behind the list. Its context has the place of
    the token or of the bracket that opens the list.
    """
    problem = re.sub(r"(['\"])(?!<).{6,}?\1", "...", str(getattr(error, "problem", None) or "it can't be read"))
    context, start, mark = (getattr(error, name, None) for name in ("context", "context_mark", "problem_mark"))
    mark = start if start and str(context).startswith("while scanning") else mark or start
    if mark is None:
        return problem
    opened = f", in the brackets opened on line {start.line + 1}" if start and " flow " in str(context) else ""
    return f"{problem} (line {mark.line + 1}, column {mark.column + 1}{opened})"
