"""Read a config: YAML, overrides and JSON-lines requests into the schema. All problems are reported at once.

    config = load_config("configs/demo_tp4.yaml", ["tensor_parallel.tp_size=2"])

Precedence: override > file > default. A relative path is relative to whoever states it: the directory of the YAML or
JSON-lines file, and for an override the current directory.
"""

from __future__ import annotations

import difflib
import io
import json
import os
import re
import reprlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from adapter.config import hub
from adapter.config.files import open_regular, read_text
from adapter.config.schema import Config, Generation, Request, Section, absolute
from adapter.config.yaml_text import parse_yaml
from policies.errors import UserError, shortened

T = TypeVar("T", bound=Section)
Bases = dict[str, Path]  # what relative paths are relative to, under these keys
BASED = ("model", "adapters", "weights", "requests", "output")
OVERRIDDEN = {  # key -> the bases of what it states
    "model": ("model", "adapters"), "model.path": ("model",), "model.adapters": ("adapters",), "weights": ("weights",),
    "weights.original": ("weights",), "requests": ("requests",), "output": ("output",)}
ALLOWED = {  # pydantic's type of an error -> what is allowed, with the numbers of the error's context
    "bool_type": "a boolean", "int_type": "an integer", "float_type": "a number", "finite_number": "a finite number",
    "string_type": "a string", "list_type": "a list", "tuple_type": "a list", "dict_type": "a mapping",
    "model_type": "a mapping", "model_attributes_type": "a mapping", "literal_error": "{expected}",
    "greater_than": "greater than {gt}", "greater_than_equal": "greater than or equal to {ge}",
    "less_than": "less than {lt}", "less_than_equal": "less than or equal to {le}",
    "string_too_short": "at least {min_length} character long", "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}
KINDS = {str: "a string", bool: "a boolean", int: "an integer", float: "a number", list: "a list", dict: "a mapping",
         type(None): "null"}
MOST_BYTES = 8 << 20  # of a YAML file; requests may be in a file of their own, which may be of any size
MISSING = "missing; it must be given"
COMMAND_LINE = "command line"  # where overrides come from, in messages
_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 120
_short.maxlevel = 3


@dataclass(frozen=True)
class Source:
    """This is who stated a config, for messages.

    name: of its file or mapping; tree: what that holds; overrides: the dotted keys that the command line set in it.
    """

    name: str
    tree: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()

    def message(self, problems: Sequence[str]) -> str:
        """List all problems, those of overrides marked as such, under a line that names whoever stated one."""
        stated = [self._blamed(problem) for problem in problems]
        sources = {source for sources, _ in stated for source in sources}
        names = " and the ".join(name for name in (self.name, COMMAND_LINE) if name in sources)
        heading = f"{names}: {len(problems)} problem{'s' * (len(problems) > 1)}"
        return "\n  - ".join([heading, *shortened([problem for _, problem in stated])])

    def _blamed(self, problem: str) -> tuple[tuple[str, ...], str]:
        """Return who stated the value that a problem is about, and the problem after a word about overrides. A problem
        begins with the key of that value."""
        if problem.startswith("override "):
            return (COMMAND_LINE,), problem
        for key in self.overrides:
            if _is_about(problem, key, " :."):
                return (COMMAND_LINE,), f"override {problem}"
            steps = key.split(".")
            for n in range(1, len(steps)):  # a section that an override is part of
                if _is_about(problem, ".".join(steps[:n]), " ") and not problem.endswith(MISSING):
                    if _holds(self.tree, steps[:n]):
                        return (self.name, COMMAND_LINE), f"with overrides {problem}"
                    return (COMMAND_LINE,), f"override {problem}"
        return (self.name,), problem


def _is_about(problem: str, key: str, ends: str) -> bool:
    """Whether a problem begins with `key`, which one of `ends` follows."""
    return problem.startswith(key) and problem[len(key):len(key) + 1] in tuple(ends)


def _holds(tree: Any, steps: Sequence[str]) -> bool:
    for step in steps:
        if not isinstance(tree, Mapping) or step not in tree:
            return False
        tree = tree[step]
    return True


def load_config(path: str | Path, overrides: Sequence[str] = (), download: bool = True) -> Config:
    """Read a YAML file, put `key.sub=value` overrides over it, check it. Raises UserError with every problem.

    download: models that are named by hub ids are downloaded, and model.path is their directory; otherwise it stays
    the id, a relative path. Adapters are downloaded in any case.
    """
    path, problems = Path(path), []
    if os.path.isdir(path):  # unlike Path.is_dir it has an answer to a name that is too long
        raise UserError(f"{path}: cannot be read, a directory; --config wants a YAML file, and a model's directory "
                        "goes into it, as `model: {path: ...}`")
    home = path.absolute().parent
    tree, bases = _read_yaml(path), dict.fromkeys(BASED, home)
    stated, keys = tree, []
    for override in overrides:
        key, equals, text = override.partition("=")
        try:
            if not equals or not all(key.split(".")):
                raise UserError("write key.sub=value")
            tree = _put(tree, key.split("."), parse_yaml(text))
            keys.append(key)
        except UserError as error:
            problems.append(f"override {override!r}: {error}")
        bases |= dict.fromkeys(OVERRIDDEN.get(key, ()), Path.cwd())
    config = _build(tree, bases, Source(str(path), stated, tuple(keys)), problems)
    return on_disk(config) if download else _adapters_on_disk(config)


def on_disk(config: Config) -> Config:
    """The same config with the directories of models that it names by hub ids, downloaded. Raises UserError."""
    model, weights = config.model, config.weights
    if not model.path.is_absolute():
        path = hub.download(str(model.path), model.revision, "model.path")
        config = config.model_copy(update={"model": model.model_copy(update={"path": path})})
    if weights.original is not None and not weights.original.is_absolute():
        path = hub.download(str(weights.original), weights.original_revision, "weights.original")
        config = config.model_copy(update={"weights": weights.model_copy(update={"original": path})})
    return _adapters_on_disk(config)


def _adapters_on_disk(config: Config) -> Config:
    paths = tuple(path if path.is_absolute() else hub.download(str(path), None, "model.adapters")
                  for path in config.model.adapters)
    return config.model_copy(update={"model": config.model.model_copy(update={"adapters": paths})})


def load_section(kind: type[T], path: str | Path, least: str) -> T:
    """A YAML file that holds one section, such as a hardware file; `least` is the least it must say, for the message
    where it says nothing. Raises UserError with every problem."""
    problems: list[str] = []
    return _or_raise(_validate(kind, _read_yaml(Path(path), least), {}, {}, problems), Source(str(path)), problems)


def from_dict(mapping: Mapping[str, Any], base_dir: str | Path = ".", name: str = "config") -> Config:
    """The same for a mapping; relative paths are relative to `base_dir`. Raises UserError with every problem."""
    base = Path(base_dir).absolute()
    return on_disk(_build(dict(mapping), dict.fromkeys(BASED, base), Source(name), []))


def parse_request(mapping: Mapping[str, Any], base_dir: str | Path = ".", name: str = "request") -> Request:
    """One request that is not part of a file, `id` included. Raises UserError with every problem."""
    problems: list[str] = []
    request = _validate(Request, mapping, {"requests": Path(base_dir).absolute()}, {}, problems)
    return _or_raise(request, Source(name), problems)


def _show(value: Any) -> str:
    """A value as a message has it, however large it is."""
    text = _short.repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def _build(tree: dict[str, Any], bases: Bases, source: Source, problems: list[str]) -> Config:
    """Fill in what spans fields (the requests file, ids, generation names), then let the schema judge."""
    where: dict[int, str] = {}
    if isinstance(file := tree.get("requests"), str):
        path = absolute(file, bases["requests"])
        requests, where = _read_json_lines(path, problems)
        tree, bases = {**tree, "requests": requests}, {**bases, "requests": path.parent}
    if isinstance(stated := tree.get("requests"), list):
        numbered = [{"id": str(i), **r} if isinstance(r, dict) else r for i, r in enumerate(stated, start=1)]
        tree = {**tree, "requests": numbered}
        problems += _repeated_ids(numbered, where)
    if isinstance(generation := tree.get("generation"), dict):
        tree = {**tree, "generation": {key: value for key, value in generation.items() if value is not None}}
        problems += _generation_problems(tree["generation"])
    return _or_raise(_validate(Config, tree, bases, where, problems), source, problems)


def _validate(kind: type[T], tree: Any, bases: Bases, where: dict[int, str], problems: list[str]) -> T | None:
    try:
        return kind.model_validate(tree, context=bases)
    except ValidationError as error:
        problems += [_say(kind, problem, where) for problem in error.errors(include_url=False)]
        return None


def _or_raise(result: T | None, source: Source, problems: list[str]) -> T:
    if result is None or problems:
        raise UserError(source.message(problems))
    return result


def _say(kind: type[Section], problem: Mapping[str, Any], where: dict[int, str]) -> str:
    """Word one of pydantic's errors as a line: the dotted key, the value, what is allowed, the nearest known word."""
    steps = [step for step in problem["loc"] if not str(step).startswith("<")]  # <...> are tags of unions, not keys
    key = ".".join(map(str, steps))
    if where and len(steps) > 1 and steps[0] == "requests":
        key = f"{where[steps[1]]} {'.'.join(map(str, steps[2:]))}".rstrip()
    what, value, context = problem["type"], problem["input"], problem.get("ctx", {})
    if what == "missing":
        return f"{key}: {MISSING}"
    if what == "extra_forbidden":
        message = "unknown key" + _nearest(str(steps[-1]), _known_keys(kind, steps[:-1]), elsewhere=_leaves(kind))
    elif what == "value_error":
        message = str(context["error"])
    elif what in ALLOWED:
        message = f"it should be {ALLOWED[what].format(**context)}"
    else:
        message = problem["msg"]
    if what.endswith("_type"):
        message = f"{_kind(value)}; {message}"
    if what == "float_type" and isinstance(value, str):
        message += " (in YAML 1e-5 is text, 1.0e-5 a number)"
    if what == "literal_error":
        message += _nearest(str(value), [word.strip("'") for word in re.split(", | or ", context["expected"])], False)
    return f"{key} = {_show(value)}: {message}"


def _kind(value: Any) -> str:
    return KINDS.get(type(value), f"a {type(value).__name__}")


def _nearest(word: str, known: Sequence[str], show: bool = True, elsewhere: Mapping[str, str] | None = None) -> str:
    """The nearest of `known` in words, or of the keys of `elsewhere`, whose value is named then; and what is known."""
    others = elsewhere or {}
    close = difflib.get_close_matches(word.lower(), [*known, *others], n=1)
    nearest = [name if name in known else others[name] for name in close]
    listed = f" (known: {', '.join(known)})" if show else ""
    return (f"; did you mean {nearest[0]!r}?" if nearest else "") + listed


def _leaves(kind: type[Section]) -> dict[str, str]:
    """Each key of the sections of `kind` -> its dotted key, the first of those with one name."""
    found: dict[str, str] = {}
    for name, field_info in kind.model_fields.items():
        section = Generation if kind is Config and name == "generation" else field_info.annotation
        if isinstance(section, type) and issubclass(section, Section):
            found = {leaf: f"{name}.{leaf}" for leaf in section.model_fields} | found
    return found


def _known_keys(kind: Any, steps: Iterable[str | int]) -> list[str]:
    """The keys of the section that `steps` leads to: through fields, and through unions, lists and annotations."""

    def sections(annotation: Any) -> Iterator[type[Section]]:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            yield annotation
        for inner in get_args(annotation):
            yield from sections(inner)

    for step in steps:
        if step in kind.model_fields:
            kind = next(sections(kind.model_fields[step].annotation))
    return sorted(kind.model_fields)


def _repeated_ids(requests: Sequence[Any], where: dict[int, str]) -> list[str]:
    places: dict[Hashable, list[str]] = {}
    for index, request in enumerate(requests):
        if isinstance(request, dict) and isinstance(request["id"], str):
            places.setdefault(request["id"], []).append(where.get(index, f"requests.{index}"))
    return [
        f"{' and '.join(at)} have the same id {name!r} (the default is the position, from 1); ids must differ"
        for name, at in places.items()
        if len(at) > 1
    ]


REFUSED = {  # names of GenerationConfig that cannot hold over ranks or batches here -> why, or what to use
    "max_length": "it counts the prompt; use max_new_tokens",
    "max_time": "every rank has a clock of its own, and they would stop at different tokens",
    "num_return_sequences": "one answer per request; state the request twice",
    "return_dict_in_generate": "the answer is its tokens",
    "cache_implementation": "caches are sized by the shard, Transformers' other ones by the whole model",
    **dict.fromkeys(("stop_strings", "prompt_lookup_num_tokens", "watermarking_config", "num_beam_groups",
                     "diversity_penalty", "penalty_alpha", "dola_layers", "constraints", "force_words_ids"),
                    "not supported"),
}


def _generation_problems(generation: dict[Any, Any]) -> list[str]:
    """Judge names and values by GenerationConfig, and types that it does not look at by the schema."""
    from transformers import GenerationConfig

    names = [name for name in vars(GenerationConfig()) if not name.startswith("_") and name != "transformers_version"]
    problems = [f"{key} = {_show(value)}: unknown name{_nearest(str(key), names, show=False)}"
                for key, value in generation.items() if key not in names]
    problems += [f"{key} = {_show(value)}: {REFUSED[key]}" for key, value in generation.items() if key in REFUSED]
    _validate(Generation, generation, {}, {}, problems)
    if not problems:
        checks = signature(GenerationConfig.validate).parameters
        strict: dict[str, Any] = {"strict": True} if "strict" in checks else {}  # Transformers 4.49 has none
        try:
            GenerationConfig(**generation).validate(**strict)
        except Exception as error:  # whatever Transformers finds, the user can mend
            return [f"generation = {_show(generation)}: Transformers refuses it: {error}"]
    return [f"generation.{problem}" for problem in problems]


def _put(tree: Any, keys: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of `tree` with one value replaced; YAML anchors share mappings, so nothing is changed in place."""
    if not isinstance(tree, dict):
        raise UserError(f"{_show(tree)} has no keys to set {keys[0]!r} in; override it as a whole")
    return {**tree, keys[0]: value if len(keys) == 1 else _put(tree.get(keys[0], {}), keys[1:], value)}


def _unreadable(path: Path, error: OSError | ValueError) -> str:
    return f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"


def _read_yaml(path: Path, least: str = "model: {path: ...}") -> dict[str, Any]:
    try:
        text = read_text(path, MOST_BYTES, "utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(_unreadable(path, error)) from None
    try:
        tree = parse_yaml(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        found = "is empty" if tree is None else f"holds {_kind(tree)}"
        raise UserError(f"{path}: {found}; a mapping with at least `{least}` is needed")
    return tree


def _strict_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise ValueError(f"key {sorted(twice)[0]!r} appears twice")
    return dict(pairs)


def _read_json_lines(path: Path, problems: list[str]) -> tuple[list[Any], dict[int, str]]:
    """The requests of a JSON-lines file, and of each the `file:line` that it stands at."""
    requests: list[Any] = []
    where: dict[int, str] = {}
    before = len(problems)
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig", newline="\n") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    _read_json_line(line, f"{path}:{number}", requests, where, problems)
    except (OSError, ValueError) as error:
        problems.append(f"requests: {_unreadable(path, error)}")
    if not requests and len(problems) == before:
        problems.append(f"requests: {path} holds no requests")
    return requests, where


def _read_json_line(line: str, at: str, requests: list[Any], where: dict[int, str], problems: list[str]) -> None:
    try:
        request = json.loads(line, object_pairs_hook=_strict_object)
    except (ValueError, RecursionError) as error:
        problems.append(f"{at}: not a JSON object: {error}")
    else:
        where[len(requests)] = at
        requests.append(request)
