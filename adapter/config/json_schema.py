"""The YAML schema as a JSON schema, for editors that complete and explain keys.

    python -m adapter.config.json_schema > configs/schema.json

A config names it in its first line: `# yaml-language-server: $schema=schema.json`.
"""

from __future__ import annotations

import json
from typing import Any

from adapter.config.schema import Config, Generation


def json_schema() -> dict[str, Any]:
    """Return what a YAML file may hold, which is more than the models say: forms that are read into theirs first."""
    schema = Config.model_json_schema()
    sections, keys = schema["$defs"], schema["properties"]
    sections["Generation"] = Generation.model_json_schema()
    keys["generation"] = {"$ref": "#/$defs/Generation", "description": keys["generation"]["description"]}
    sections["Request"]["required"].remove("id")
    for holder, key in ((keys, "requests"), (sections["Message"]["properties"], "content")):
        listed = {name: holder[key].pop(name) for name in ("type", "items")}
        holder[key]["anyOf"] = [{"type": "string"}, listed]
    for key in ("eos_token_id", "forced_eos_token_id"):
        sections["Generation"]["properties"][key]["anyOf"].append({"type": "integer", "minimum": 0})
    return _untitled(schema)


def _untitled(value: Any, names: bool = False) -> Any:
    """Leave out pydantic's titles, which repeat the names of keys. names: the keys of `value` are a section's own."""
    if isinstance(value, list):
        return [_untitled(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: _untitled(item, key in ("properties", "$defs") and not names)
            for key, item in value.items() if names or key != "title"}


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1))
