"""YAML text -> plain data. No tag runs code, no key is given twice, and aliases cannot fill the memory."""

from __future__ import annotations

from typing import Any

import yaml

from policies.errors import UserError

MOST_ALIASED = 100_000  # values that aliases add to those written down


class _Loader(yaml.SafeLoader):
    """SafeLoader takes the last of two equal keys without a word; here they are an error."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node, seen = super().compose_mapping_node(anchor), set[tuple[str, str]]()
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return node

    def get_single_node(self) -> Any:
        """A few lines of aliases of aliases can stand for more values than memory holds: refused before any is made."""
        node, counts = super().get_single_node(), dict[int, int]()
        if node is not None and (count := _count(node, counts)) > len(counts) + MOST_ALIASED:
            raise yaml.MarkedYAMLError(problem=f"with its aliases written out it has {count} values; at most "
                                       f"{MOST_ALIASED} may come from aliases", problem_mark=node.start_mark)
        return node


def _count(node: Any, counts: dict[int, int]) -> int:
    """How many values a YAML node has, aliases written out. Raises MarkedYAMLError where one contains itself."""
    count = counts.setdefault(id(node), 0)
    if not count:
        parts = node.value if not isinstance(node, yaml.ScalarNode) else ()
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in parts for part in pair]
        for part in parts:
            if counts.get(id(part)) == 0:
                raise yaml.MarkedYAMLError(problem="a value contains itself, by an alias", problem_mark=part.start_mark)
        count = counts[id(node)] = 1 + sum(_count(part, counts) for part in parts)
    return count


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds. Raises UserError with the line of what is wrong in it."""
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{line}{error.problem or error.context}") from None
    except Exception as error:  # PyYAML lets through what int(), date() and others raise at odd values
        raise UserError(f"not valid YAML: {error}") from None
