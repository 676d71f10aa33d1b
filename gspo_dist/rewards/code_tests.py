"""The tests of a programming problem, in the forms that data files have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RULE = (
    "the answer of a code record must be its tests: [{input, output}, ...], {inputs, outputs, fn_name}, "
    "{functional: source with asserts}, or one of them as JSON text"
)


@dataclass(frozen=True)
class ProblemTests:
    """What a program must do. Either inputs and outputs, or asserts."""

    inputs: tuple[str, ...] = ()
    """Standard input of each test, or one JSON argument per line where there is a function."""
    outputs: tuple[str, ...] = ()
    """Expected standard output, or the expected result as JSON."""
    function: str | None = None
    asserts: str = ""
    """Python that runs after the program, in its namespace, and raises where it is wrong. The program could
    read it: this is for data that has nothing else."""

    def __len__(self) -> int:
        return 1 if self.asserts else len(self.inputs)


def read_tests(answer: Any, function: str | None = None) -> ProblemTests:
    """The tests in a record's answer. Raises ValueError with the rule for what holds none.

    function: the name to call where the answer itself does not say it (a record's func_name).
    """
    if isinstance(answer, str):
        try:
            answer = json.loads(answer)
        except ValueError as error:
            raise ValueError(f"{RULE}: got a text that is no JSON: {error}") from error
    if isinstance(answer, Mapping):
        return _of_mapping(answer, function)
    if isinstance(answer, Sequence) and not isinstance(answer, (str, bytes)):
        return _of_list(answer, function)
    raise ValueError(f"{RULE}: got {type(answer).__name__}")


def _of_mapping(answer: Mapping[str, Any], function: str | None) -> ProblemTests:
    if isinstance(source := answer.get("functional"), str) and source.strip():
        return ProblemTests(asserts=source)
    inputs, outputs = answer.get("inputs"), answer.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        raise ValueError(f"{RULE}: got the fields {', '.join(map(str, answer)) or 'none'}")
    if len(inputs) != len(outputs) or not inputs:
        raise ValueError(f"{RULE}: got {len(inputs)} inputs and {len(outputs)} outputs")
    name = answer.get("fn_name") or function
    if name is None:
        return ProblemTests(tuple(map(_text, inputs)), tuple(map(_text, outputs)))
    return ProblemTests(tuple(map(_arguments, inputs)), tuple(map(_result, outputs)), name)


def _of_list(tests: Sequence[Any], function: str | None) -> ProblemTests:
    if not tests:
        raise ValueError(f"{RULE}: got an empty list; remove the record")
    inputs, outputs, names, kinds = [], [], set(), set()
    for at, test in enumerate(tests):
        if not isinstance(test, Mapping) or "input" not in test or "output" not in test:
            raise ValueError(f"{RULE}: got test {at} = {str(test)[:80]!r}")
        inputs.append(test["input"])
        outputs.append(test["output"])
        kinds.add(test.get("testtype") or ("functional" if function else "stdin"))
        metadata = test.get("metadata")
        if isinstance(metadata, Mapping) and metadata.get("func_name"):
            names.add(metadata["func_name"])
    names |= {function} if function and not names else set()
    if len(kinds) > 1 or len(names) > 1:
        raise ValueError(
            f"{RULE}: got tests of several kinds: {sorted(kinds)}, functions {sorted(map(str, names))}"
        )
    if kinds == {"functional"}:
        if not names:
            raise ValueError(
                f"{RULE}: got functional tests without the name of a function (metadata.func_name)"
            )
        return ProblemTests(tuple(map(_arguments, inputs)), tuple(map(_result, outputs)), names.pop())
    return ProblemTests(
        tuple(_text(one, "stdin") for one in inputs), tuple(_text(one, "stdout") for one in outputs)
    )


def _text(value: Any, field: str = "") -> str:
    """Standard input or output: a text, a list of lines, or SandboxFusion's {stdin: text}."""
    if isinstance(value, Mapping) and isinstance(value.get(field), str):
        return str(value[field])
    if isinstance(value, list):
        return "\n".join(map(str, value))
    if not isinstance(value, str):
        raise ValueError(
            f"{RULE}: got the input or output {str(value)[:80]!r} of type {type(value).__name__}"
        )
    return value


def _arguments(value: Any) -> str:
    """One JSON argument per line, from that text or from a list of arguments."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"{RULE}: got the arguments {str(value)[:80]!r} of type {type(value).__name__}")
    return "\n".join(map(json.dumps, value))


def _result(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
