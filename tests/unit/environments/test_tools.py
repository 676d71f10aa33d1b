"""Typed functions as tools: their schemas, calls in a model's own form, errors that come back as text."""

from __future__ import annotations

import json
import sys
from typing import Literal

import pytest

from gspo_dist.config import EnvironmentConfig
from gspo_dist.environments.calculator import Calculator, calculate
from gspo_dist.environments.guess import Guess
from gspo_dist.environments.protocol import ToolFailure
from gspo_dist.environments.resolve import resolve
from gspo_dist.environments.tools import ToolEnvironment, format_of, tool_of
from gspo_dist.types import Prompt

SERVER = """
from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

server = MCPServer("sums")

@server.tool()
def add(a: int, b: int) -> int:
    "Adds."
    return a + b

@server.tool()
def refuse() -> str:
    "Never works."
    raise ToolError("not today")

@server.tool()
def end() -> str:
    "Ends the server."
    import os
    os._exit(1)

@server.tool()
def variable() -> str:
    "A variable of its environment."
    import os
    return os.environ["GSPO_OF_THE_SERVER"]

server.run()
"""


def area(
    width: int, height: float = 1.0, unit: Literal["m", "cm"] = "m", tags: list[str] | None = None
) -> str:
    """The area of a rectangle.

    width: how wide it is
    """
    if width < 0:
        raise ValueError("negative")
    return f"{width * height:g} {unit}2"


def ring() -> list:
    """Has no JSON."""
    told: list = []
    told.append(told)
    return told


def hermes(name, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_the_schema_is_that_of_the_signature() -> None:
    function = tool_of(area).schema["function"]
    assert function["name"] == "area"
    assert function["description"] == "The area of a rectangle."
    assert function["parameters"] == {
        "type": "object",
        "properties": {
            "width": {"type": "integer", "description": "how wide it is"},
            "height": {"type": "number"},
            "unit": {"type": "string", "enum": ["m", "cm"]},
            "tags": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["width"],
    }


def test_a_function_without_types_is_refused() -> None:
    def bare(x):
        return x

    def odd(x: complex) -> None: ...

    with pytest.raises(ValueError, match=r"every parameter of bare must have a type.*'x' has none"):
        tool_of(bare)
    with pytest.raises(ValueError, match="parameter 'x' of odd must have a type that JSON knows"):
        tool_of(odd)

    def placed(x: int, /): ...

    with pytest.raises(ValueError, match="placed takes 'x' by its place alone; take the / out"):
        tool_of(placed)


@pytest.mark.parametrize(
    ("form", "turn"),
    [
        ("hermes", "Let me see. " + hermes("area", width=3, height=2)),
        (
            "xml",
            "<tool_call><function=area>\n<parameter=width>\n3\n</parameter>\n<parameter=height>2</parameter></function></tool_call>",
        ),
        ("json", '{"name": "area", "parameters": {"width": 3, "height": 2}}'),
    ],
)
def test_calls_are_read_in_the_models_own_form(form, turn) -> None:
    told = ToolEnvironment([tool_of(area)], form).step(turn)
    assert (told.text, told.done, dict(told.parts)) == (
        "6 m2",
        False,
        {"tool_calls": 1.0, "tool_errors": 0.0},
    )


def test_an_argument_that_is_written_as_text_is_what_the_schema_says() -> None:
    def told(code: str, number: int, tags: list[str], either: int | None = None) -> list:
        return [code, number, tags, either]

    def written(**arguments):
        parts = (f"<parameter={name}>\n{text}\n</parameter>\n" for name, text in arguments.items())
        return f"<function=told>\n{''.join(parts)}</function>"

    env = ToolEnvironment([tool_of(told)], "xml")
    turn = written(code="1", number="2", tags='["a"]', either="null")
    assert json.loads(env.step(turn).text) == ["1", 2, ["a"], None]
    # A program over several lines keeps them, and what is no JSON stays text.
    turn = written(code="x = 1\n\nprint(x)", number="two", tags="a")
    assert json.loads(env.step(turn).text) == ["x = 1\n\nprint(x)", "two", "a", None]


def test_what_is_only_thought_of_is_no_call() -> None:
    env = ToolEnvironment([tool_of(area)], "hermes")
    thought = f"<think>\nI could {hermes('area', width=9)}, or not.\n</think>\n\n"
    assert env.step(thought + "The area is 2.").done
    assert env.step(thought + hermes("area", width=2)).text == "2 m2"
    # A cue may have opened the thinking, so that the turn only closes it.
    assert env.step(thought.removeprefix("<think>\n") + hermes("area", width=2)).parts["tool_calls"] == 1.0


def test_the_form_is_that_of_the_chat_template() -> None:
    assert format_of("... <tool_call>\n{json} ...") == "hermes"
    assert format_of("<tool_call><function=x>") == "xml"
    assert format_of('{"name": f, "parameters": p}') == "json"
    assert format_of(None) == "hermes"


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (hermes("volume"), "Error: there is no tool 'volume'; there are area, ring"),
        (hermes("area", width=-1), "Error: ValueError: negative"),
        (hermes("area"), "Error: TypeError: area() missing 1 required positional argument: 'width'"),
        ("<tool_call>{not json}</tool_call>", "Error: the call is no JSON"),
        ('<tool_call>{"arguments": {}}</tool_call>', "Error: a call must be"),
        ('<tool_call>{"name": "area", "arguments": 3}</tool_call>', "Error: the arguments must be an object"),
        (f"<tool_call>{'[' * 100_000}</tool_call>", "Error: the call is no JSON: maximum recursion depth"),
        (hermes("area", width="wide"), "Error: TypeError"),
        ("<tool_call>", "Error: the call is no JSON"),
        ("<tool_call>[]</tool_call>", "Error: a call must be"),
        (hermes("ring"), "Error: ValueError: Circular reference detected"),
    ],
)
def test_what_goes_wrong_comes_back_as_text(turn, words) -> None:
    told = ToolEnvironment([tool_of(area), tool_of(ring)], "hermes").step(turn)
    assert told.text.startswith(words)
    assert not told.done
    assert told.parts["tool_errors"] == 1.0


def test_several_calls_are_answered_in_order_and_a_turn_without_one_is_the_last() -> None:
    env = ToolEnvironment([tool_of(area)], "hermes")
    assert env.step(hermes("area", width=1) + hermes("area", width=2)).text == "1 m2\n2 m2"
    assert env.step("The area is 2.").done


@pytest.mark.slow
def test_tools_of_an_mcp_server(tmp_path, monkeypatch) -> None:
    """A real server in a process of its own, over its standard input and output. One that ends costs the
    episode, which is no answer to its policy, and the next call finds another one.
    """
    monkeypatch.setenv("GSPO_OF_THE_SERVER", "its key")
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    maker = resolve(EnvironmentConfig(tools=(f"mcp:{sys.executable} {path}",)))
    assert [tool["function"]["name"] for tool in maker.facts["tools"]] == [
        *("add", "refuse", "end", "variable"),
    ]
    assert maker.facts["tools"][0]["function"]["parameters"]["required"] == ["a", "b"]
    env = maker.make()
    assert env.step(hermes("add", a=2, b=40)).text == "42"
    told = env.step(hermes("refuse"))
    assert "not today" in told.text
    assert told.parts["tool_errors"] == 1.0
    assert env.step(hermes("variable")).text == "its key"
    with pytest.raises(ToolFailure, match=r"the MCP server .*server.py' ended while end was called"):
        env.step(hermes("end"))
    assert env.step(hermes("add", a=1, b=2)).text == "3"
    path.unlink()
    with pytest.raises(ToolFailure, match="ended while end was called"):
        env.step(hermes("end"))
    for _ in range(2):
        with pytest.raises(ToolFailure, match=r"server.py' does not start: .*"):
            env.step(hermes("add", a=1, b=2))


def test_an_mcp_server_that_does_not_start_is_told_by_its_command() -> None:
    with pytest.raises(ValueError, match="the MCP server '/no/such/program x' does not answer"):
        resolve(EnvironmentConfig(tools=("mcp:/no/such/program x",)))


def test_names_that_are_no_tools_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 'calculate2'.*calculate"):
        resolve(EnvironmentConfig(tools=("calculate2",)))
    with pytest.raises(ValueError, match="must have names of their own: 'calculate' comes twice"):
        resolve(EnvironmentConfig(tools=("calculate", "gspo_dist.environments.calculator:calculate")))
    with pytest.raises(ValueError, match="two ways to say what answers"):
        EnvironmentConfig(factory="guess", tools=("calculate",))


@pytest.mark.parametrize(
    ("text", "value"), [("2+3*4", "14"), ("(2+3)*4", "20"), ("7/2", "3.5"), ("-3-4", "-7"), ("6/3", "2")]
)
def test_the_calculator_computes(text, value) -> None:
    assert calculate(text) == value


@pytest.mark.parametrize("text", ["2**99", "__import__('os')", "a+1", "1+", "9" * 201])
def test_the_calculator_computes_nothing_else(text) -> None:
    with pytest.raises(ValueError, match=r"only numbers|no expression|at most 200"):
        calculate(text)


def test_a_calculators_episode() -> None:
    env = Calculator()
    env.reset(Prompt("p", (1,), "q"), 0)
    assert env.step("so 347+285=").text == "632"
    assert env.step("1/0=").text == "?"
    assert env.step("#632").done


def test_a_game_of_guesses() -> None:
    game = Guess(highest=9)
    game.reset(Prompt("p", (1,), "q"), 0)
    other = Guess(highest=9)
    other.reset(Prompt("p2", (1,), "q"), 99)  # the number is the prompt's, not the seed's
    assert game.number == other.number
    game.number = 3
    assert game.step("5").text == "<"
    assert game.step("1 or 2").text == ">"
    assert game.step("").text == "?"
    resumed = Guess()
    resumed.load_state_dict(json.loads(json.dumps(game.state_dict())))
    told = resumed.step("3")
    assert (told.done, told.reward, resumed.guesses) == (True, 1.0, 4)
