"""Typed functions as tools: their schemas from their signatures, and the calls that a policy writes.

A call is read in the form of the model's own chat template, after the thinking that a turn may begin with. A
turn without a call ends the episode: it is the policy's last word. Whatever goes wrong in a call (no such
tool, a wrong argument, an exception of the function) comes back as text, for the policy to read.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gspo_dist.environments.protocol import Observation, ToolFailure
from gspo_dist.types import Prompt

JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


@dataclass(frozen=True)
class Tool:
    """One function that a policy may call."""

    schema: Mapping[str, Any]
    """As chat templates take it: {"type": "function", "function": {name, description, parameters}}."""
    call: Callable[..., Any]
    """With the arguments as keywords. What it returns is text, or becomes JSON."""

    @property
    def name(self) -> str:
        return str(self.schema["function"]["name"])


@dataclass(frozen=True)
class ToolCall:
    """A call as the policy wrote it."""

    name: str
    arguments: Mapping[str, Any]
    error: str = ""
    """Why it cannot be read, where it cannot."""
    is_text: bool = False
    """Whether the arguments stand as text: what each is, the tool's schema says."""


def tool_of(function: Callable[..., Any]) -> Tool:
    """A plain function as a tool. ValueError: a parameter has no type, or none that JSON knows.

    Its docstring's first paragraph is the description. A line "name: text" in it describes a parameter.
    Example: add(a: int, b: int = 0) has the parameters {"a": integer, "b": integer}, of which a is required.
    """
    name, described = function.__name__, inspect.getdoc(function) or ""
    hints = typing.get_type_hints(function)
    properties: dict[str, Any] = {}
    required = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise ValueError(
                f"environment.tools: a call names its arguments, and {name} takes {parameter.name!r} by its "
                "place alone; take the / out of its signature"
            )
        if parameter.name not in hints or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(
                f"environment.tools: every parameter of {name} must have a type, from which its schema is "
                f"made: {parameter.name!r} has none; write it as {parameter.name}: str, for example"
            )
        kind = _json_type(name, parameter.name, hints[parameter.name])
        text = re.search(rf"^\s*:?(?:param )?{parameter.name}:\s*(.+)$", described, re.MULTILINE)
        properties[parameter.name] = {**kind, **({"description": text.group(1)} if text else {})}
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    about = {"name": name, "description": described.split("\n\n")[0], "parameters": parameters}
    return Tool({"type": "function", "function": about}, function)


def _json_type(owner: str, name: str, kind: Any) -> dict[str, Any]:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        kinds = [one for one in inner if one is not type(None)]
        if len(kinds) == 1:
            return _json_type(owner, name, kinds[0])
        return {"anyOf": [_json_type(owner, name, one) for one in kinds]}
    if origin is Literal:
        return {"type": JSON_TYPES[type(inner[0])], "enum": list(inner)}
    plain = origin or kind
    if plain not in JSON_TYPES:
        raise ValueError(
            f"environment.tools: parameter {name!r} of {owner} must have a type that JSON knows (str, int, "
            f"float, bool, list, dict, Literal, or one of them or None): got {kind}"
        )
    extra = {"items": _json_type(owner, name, inner[0])} if plain is list and inner else {}
    return {"type": JSON_TYPES[plain], **extra}


# --- the calls that a policy writes ---

_HERMES = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_XML_CALL = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|$)", re.DOTALL)
_XML_ARGUMENT = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


def _hermes(turn: str) -> list[ToolCall]:
    """<tool_call>{"name": ..., "arguments": {...}}</tool_call>: Hermes, Qwen2.5, Qwen3."""
    return [_from_json(body) for body in _HERMES.findall(turn)]


def _from_json(body: str) -> ToolCall:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        return ToolCall("", {}, f"the call is no JSON: {error}")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return ToolCall("", {}, 'a call must be {"name": ..., "arguments": {...}}')
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, dict):
        return ToolCall(value["name"], {}, "the arguments must be an object")
    return ToolCall(value["name"], arguments)


def _xml(turn: str) -> list[ToolCall]:
    """<function=NAME><parameter=KEY>value</parameter></function>: Qwen3-Coder."""
    return [
        ToolCall(name, dict(_XML_ARGUMENT.findall(body)), is_text=True)
        for name, body in _XML_CALL.findall(turn)
    ]


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    """An argument that was written as text. What the schema calls a string stays one: 007 is no number."""
    if schema.get("type") == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _bare_json(turn: str) -> list[ToolCall]:
    """A turn that is one JSON object with a name: Llama 3."""
    text = turn.strip().removeprefix("<|python_tag|>").strip()
    return [_from_json(text)] if text.startswith("{") and '"name"' in text else []


FORMATS: dict[str, Callable[[str], list[ToolCall]]] = {"hermes": _hermes, "xml": _xml, "json": _bare_json}
"""How a model writes its calls."""


def format_of(chat_template: str | None) -> str:
    """The form of calls that a chat template teaches; hermes where it teaches none."""
    template = chat_template or ""
    if "<function=" in template:
        return "xml"
    if "<tool_call>" not in template and '"parameters"' in template:
        return "json"
    return "hermes"


class ToolEnvironment:
    """An episode whose answers are those of tools. It keeps nothing between its turns."""

    def __init__(self, tools: Sequence[Tool], form: str) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.calls = FORMATS[form]

    def reset(self, prompt: Prompt, seed: int) -> None:
        """Nothing is said: the prompt describes the tools."""

    def step(self, turn: str) -> Observation:
        """The results of the turn's calls, one per line. Parts: calls, and those that went wrong."""
        # What a reasoning model only thinks of calling is no call.
        calls = self.calls(turn.rpartition("</think>")[2])
        if not calls:
            return Observation(done=True)
        told = [self._answer(call) for call in calls]
        wrong = sum(not right for _, right in told)
        parts = {"tool_calls": float(len(calls)), "tool_errors": float(wrong)}
        return Observation("\n".join(text for text, _ in told), parts=parts)

    def _answer(self, call: ToolCall) -> tuple[str, bool]:
        """(the result as text, whether the call went right)."""
        tool = self.tools.get(call.name)
        if call.error:
            return f"Error: {call.error}", False
        if tool is None:
            return f"Error: there is no tool {call.name!r}; there are {', '.join(self.tools)}", False
        try:
            result = tool.call(**self._arguments(call, tool))
            return result if isinstance(result, str) else json.dumps(result, default=str), True
        except ToolFailure:
            raise
        except Exception as error:  # a tool's failure is the policy's to read
            return f"Error: {type(error).__name__}: {error}", False

    @staticmethod
    def _arguments(call: ToolCall, tool: Tool) -> Mapping[str, Any]:
        if not call.is_text:
            return call.arguments
        known = tool.schema["function"]["parameters"].get("properties", {})
        return {name: _value(text, known.get(name, {})) for name, text in call.arguments.items()}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """There is nothing to take up: the tools are asked again."""
