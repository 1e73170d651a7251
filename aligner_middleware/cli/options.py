"""Options of a command, generated from a pydantic model of settings, the one place of names, types, help and defaults."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import reduce, wraps
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from aligner_middleware.cli.arguments import near

Command = Callable[..., None]
Places = Mapping[str, Sequence[str]]


def options_from(
    model: type[BaseModel],
    parameter: str,
    places: Places | None = None,
    *,
    without: Collection[str] = (),
    as_given: bool = False,
) -> Callable[[Command], Command]:
    """Replace a parameter of a command, a model of settings, by one option for each of the model's fields.

    An option that is left out keeps the model's default. The command gets the validated model; a value that the model
    refuses is an error that names its option.

    Args:
        model: The settings.
        parameter: Name of the command's parameter that takes them.
        places: Options that do not bear their field's name, or that set fields of a nested model: by parameter name the
            fields that they set, such as `{"epochs": ["correction.epochs"]}`. All other fields get options of their own.
        without: Fields that get no option.
        as_given: Whether the command gets a `Given`, the values of the options that were given, and makes the model itself,
            since some values come from elsewhere.
    """
    named = dict(places or {})
    placed = {place.partition(".")[0] for paths in named.values() for place in paths} | set(without)
    named = {name: [name] for name in model.model_fields if name not in placed} | named

    def decorate(command: Command) -> Command:
        @wraps(command)
        def run(**values: Any) -> None:
            given = {name: value for name in named if (value := values.pop(name)) not in (None, [])}
            value = Given(named, given) if as_given else _validated(model, named, given)
            command(**values, **{parameter: value})

        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.name != parameter]
        parameters = [*own, *(_option(model, name, paths) for name, paths in named.items())]
        parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
        run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in parameters}
        return run

    return decorate


class Given:
    """The options of a command that were given.

    Args:
        places: The fields that each option sets.
        values: By name of the option.
    """

    def __init__(self, places: Places, values: Mapping[str, Any]) -> None:
        self._places = places
        self._values = values

    @property
    def content(self) -> dict[str, Any]:
        """The values by field, those of nested models in dicts."""
        content: dict[str, Any] = {}
        for name, value in self._values.items():
            for place in self._places[name]:
                outer, _, last = place.rpartition(".")
                (content.setdefault(outer, {}) if outer else content)[last] = value
        return content

    def refused(self, exc: ValidationError) -> typer.BadParameter | None:
        """Make the error of a value that the model refuses; `None` where it is not that of an option that was given."""
        return _bad_value(exc, {name: paths for name, paths in self._places.items() if name in self._values})


def _option(model: type[BaseModel], name: str, places: Sequence[str]) -> inspect.Parameter:
    field = _field(model, places[0])
    kinds = [kind for kind in get_args(field.annotation) if kind is not type(None)]
    optional = len(kinds) == 1 and type(None) in get_args(field.annotation)
    kind = kinds[0] if optional else field.annotation
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    default = reduce(getattr, places[0].split("."), model())
    option = typer.Option(
        None,
        help=" ".join(filter(None, [field.description, _sets(places), _shown(default)])),
        metavar="|".join(choices) or None,
    )
    # The model tells which value was meant, where it is none of the choices.
    value: Any = str if choices else _typer_type(kind)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option, annotation=value | None)


def _typer_type(kind: Any) -> Any:
    """Give the type that typer reads; of what it cannot read, a text, which the model reads."""
    if get_origin(kind) is tuple and get_args(kind)[1:] == (...,):
        return list[str]
    return str if get_origin(kind) in (Union, UnionType) else kind


def _field(model: type[BaseModel], place: str) -> FieldInfo:
    outer, _, name = place.rpartition(".")
    return (type(model.model_fields[outer].default) if outer else model).model_fields[name]


def _sets(places: Sequence[str]) -> str:
    """Tell which fields of nested models an option sets."""
    return f"Sets {' and '.join(places)}." if "." in places[0] else ""


def _shown(default: Any) -> str:
    """Tell the model's default, unless it is none: then the description tells what happens."""
    if default is None or default == ():
        return ""
    if isinstance(default, bool):
        return f"Default: {'on' if default else 'off'}."
    return f"Default: {' '.join(map(str, default)) if isinstance(default, tuple) else default}."


def _validated(model: type[BaseModel], places: Places, given: Mapping[str, Any]) -> BaseModel:
    content: dict[str, Any] = {}
    for name, value in given.items():
        for place in places[name]:
            outer, _, last = place.rpartition(".")
            target = content.setdefault(outer, model.model_fields[outer].default.model_dump()) if outer else content
            target[last] = value
    try:
        return model(**content)
    except ValidationError as exc:
        raise _bad_value(exc, places) or typer.BadParameter(exc.errors()[0]["msg"]) from exc


def _bad_value(exc: ValidationError, places: Places) -> typer.BadParameter | None:
    error = exc.errors()[0]
    place = ".".join(map(str, error["loc"]))
    for name, paths in places.items():
        if any(f"{place}.".startswith(f"{path}.") for path in paths):
            known = re.findall("'(.*?)'", str(error.get("ctx", {}).get("expected", "")))
            reason = f"{error['input']!r}: {error['msg']}{near(str(error['input']), known)}"
            return typer.BadParameter(reason, param_hint=f"--{name.replace('_', '-')}")
    return None
