"""What a request offers the model to call, and how free it is to: `tools` and `tool_choice`, and their older names.

`required` and a named function are held to by a grammar, so that a call always comes and always fits its schema. A
model that is free to call or not is held to the schemas of functions that are `strict`, once it has begun a call.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import Meta

from serverlesslora.errors import InvalidRequest
from serverlesslora.gateway.structured import schema_grammar
from serverlesslora_ipc.messages import Grammar

MOST_TOOLS = 128  # OpenAI's limit

_NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

FunctionName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionObject(msgspec.Struct, frozen=True):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: FunctionObject


class FunctionChoice(msgspec.Struct, frozen=True):
    name: str


class NamedTool(msgspec.Struct, frozen=True):
    type: Literal["function"]
    function: FunctionChoice


class AllowedTools(msgspec.Struct, frozen=True):
    mode: Literal["auto", "required"]
    tools: list[NamedTool]


class NamedChoice(msgspec.Struct, frozen=True, tag_field="type", tag="function"):
    function: FunctionChoice


class AllowedChoice(msgspec.Struct, frozen=True, tag_field="type", tag="allowed_tools"):
    allowed_tools: AllowedTools


Tools = Annotated[list[Tool], Meta(max_length=MOST_TOOLS)]
Functions = Annotated[list[FunctionObject], Meta(max_length=MOST_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice
FunctionCallChoice = Literal["none", "auto"] | FunctionChoice


class Offer(NamedTuple):
    """`tools` are what the template sees. A request that offers nothing to call has no Offer."""

    tools: tuple[dict[str, Any], ...]
    schemas: Mapping[str, dict[str, Any]]  # of the parameters, of those that may be called
    is_required: bool = False
    forced: str | None = None  # the one function that must be called
    parallel: bool = True  # more than one call
    is_legacy: bool = False  # asked for with `functions`: the answer is a `function_call`
    strict: Mapping[str, str] = {}  # by function that says so: the parameter in which it does

    @property
    def is_certain(self) -> bool:
        """Whether a call must come."""
        return self.is_required or self.forced is not None

    @property
    def grammar(self) -> Grammar | None:
        """What the output must match; None where the model is free to call or not, and how."""
        param = "functions" if self.is_legacy else "tools"
        if self.forced is not None:
            return schema_grammar(self.schemas[self.forced], param)
        if self.is_required:
            return schema_grammar(calls_schema(self.schemas, parallel=self.parallel), param)
        strict = next((self.strict[name] for name in self.schemas if name in self.strict), None)
        return None if strict is None else self.grammar_with(None, strict)

    def grammar_with(self, answer: Any, param: str) -> Grammar:
        """Calls that fit, where the function is strict, and an answer without a call that matches this schema."""
        definitions = {
            str(place): _moved(schema, f"#/$defs/{place}") if name in self.strict else {"type": "object"}
            for place, (name, schema) in enumerate(self.schemas.items())
        }
        told = {"functions": {name: {"$ref": f"#/$defs/{place}"} for place, name in enumerate(self.schemas)}}
        asked = told | {"$defs": definitions} | ({} if answer is None else {"answer": answer})
        return Grammar("tools", schema_grammar(asked, param).text, param)

    def finish_reason(self, reason: str, *, has_called: bool) -> str:
        """As OpenAI: a call that was forced by name ends with "stop"."""
        if reason != "stop" or not has_called or self.forced is not None:
            return reason
        return "function_call" if self.is_legacy else "tool_calls"


def offer_of(tools: list[Tool] | None, choice: ToolChoice | None, *, parallel: bool) -> Offer | None:
    if not tools:
        if choice not in (None, "none") and not (tools == [] and choice == "auto"):
            raise InvalidRequest("'tool_choice' is only allowed when 'tools' are given.", param="tool_choice")
        return None
    return _offered([tool.function for tool in tools], "tools", choice, parallel=parallel)


def _offered(functions: list[FunctionObject], param: str, choice: ToolChoice | None, *, parallel: bool) -> Offer | None:
    places = [f"{param}[{place}]" + (".function" if param == "tools" else "") for place in range(len(functions))]
    strict = {each.name: f"{place}.strict" for each, place in zip(functions, places, strict=True) if each.strict}
    offer = Offer(tuple(map(_lean, functions)), _schemas(functions, places), parallel=parallel, strict=strict)
    match choice:
        case "none":
            return None
        case "required":
            return offer._replace(is_required=True)
        case NamedChoice(function=FunctionChoice(name=name)):
            _check_known(name, offer, "tool_choice")
            return offer._replace(forced=name, parallel=False)
        case AllowedChoice(allowed_tools=allowed):
            offer = _narrowed(offer, allowed)
            return offer._replace(is_required=allowed.mode == "required")
    return offer


def legacy_offer(functions: list[FunctionObject] | None, choice: FunctionCallChoice | None) -> Offer | None:
    """`functions` and `function_call`, which OpenAI replaced by tools: one call at most."""
    if not functions:
        if choice not in (None, "none") and not (functions == [] and choice == "auto"):
            raise InvalidRequest("'function_call' is only allowed when 'functions' are given.", param="function_call")
        return None
    if choice == "none":
        return None
    named = NamedChoice(choice) if isinstance(choice, FunctionChoice) else None
    if named is not None and named.function.name not in {function.name for function in functions}:
        raise InvalidRequest(f"'{named.function.name}' is not among the 'functions'.", param="function_call")
    offer = _offered(functions, "functions", named, parallel=False)
    return None if offer is None else offer._replace(is_legacy=True)


def calls_schema(schemas: Mapping[str, dict[str, Any]], *, parallel: bool) -> dict[str, Any]:
    """A list of at least one call. Each function's schema is kept whole under a name of its own, with what it refers
    to, so that two functions may define the same name differently."""
    places = {name: f"#/$defs/{place}" for place, name in enumerate(schemas)}
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {
            "anyOf": [
                {
                    "type": "object",
                    "properties": {"name": {"const": name}, "parameters": {"$ref": place}},
                    "required": ["name", "parameters"],
                    "additionalProperties": False,
                }
                for name, place in places.items()
            ]
        },
        "$defs": {str(place): _moved(schema, f"#/$defs/{place}") for place, schema in enumerate(schemas.values())},
    }
    return schema if parallel else schema | {"maxItems": 1}


def _moved(schema: Any, root: str) -> Any:
    """With references to its own root turned to where the root is now."""
    if isinstance(schema, list):
        return [_moved(each, root) for each in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: root + value[1:]
        if key == "$ref" and isinstance(value, str) and value.startswith("#")
        else _moved(value, root)
        for key, value in schema.items()
    }


def _lean(function: FunctionObject) -> dict[str, Any]:
    """As the client wrote it: what was not given is not in the prompt. `strict` is our affair, not the model's."""
    told = msgspec.to_builtins(function)
    return {
        "type": "function",
        "function": {key: value for key, value in told.items() if value is not None and key != "strict"},
    }


def _schemas(functions: list[FunctionObject], places: list[str]) -> dict[str, dict[str, Any]]:
    schemas: dict[str, dict[str, Any]] = {}
    for function, place in zip(functions, places, strict=True):
        if function.name in schemas:
            raise InvalidRequest(
                f"The function '{function.name}' is given twice.", param=place.removesuffix(".function")
            )
        schema = _NO_PARAMETERS if function.parameters is None else {"type": "object"} | function.parameters
        where = f"{place}.parameters"
        if schema["type"] != "object":
            raise InvalidRequest(f"The parameters of '{function.name}' must be a schema of type 'object'.", param=where)
        schema_grammar(schema, where)  # refuses what is too large or too deep, for templates too
        schemas[function.name] = schema
    return schemas


def _narrowed(offer: Offer, allowed: AllowedTools) -> Offer:
    names = [tool.function.name for tool in allowed.tools]
    for name in names:
        _check_known(name, offer, "tool_choice.allowed_tools")
    if not names:
        raise InvalidRequest("'allowed_tools' must name at least one tool.", param="tool_choice.allowed_tools")
    # The prompt keeps all definitions: OpenAI made this form so that the prompt, and what is cached of it, stays.
    return offer._replace(schemas={name: offer.schemas[name] for name in names})


def _check_known(name: str, offer: Offer, param: str) -> None:
    if name not in offer.schemas:
        raise InvalidRequest(f"'{name}' is not among the 'tools'.", param=param)
