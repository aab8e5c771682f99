"""Command line options made of settings, so that an option is declared once: on its field."""

import functools
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

import annotated_types
import typer
from pydantic.fields import FieldInfo

from nested_lm.config.section import Section
from nested_lm_lab.evaluation.options import Option, options_of, read_settings


def with_options(model: type[Section]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a verb the options that the fields of `model` declare. It is called with what they make as `settings`.

    The options stand where `settings` stands among the verb's own.

    Raises:
        ConfigError: from the verb: an option's value that cannot be.
    """

    def decorate(verb: Callable[..., Any]) -> Callable[..., Any]:
        options = options_of(model)

        @functools.wraps(verb)
        def run(**given: Any) -> Any:
            return verb(settings=read_settings(model, {name: given.pop(name) for name in options}), **given)

        parameters: list[inspect.Parameter] = []
        for own in inspect.signature(verb, eval_str=True).parameters.values():
            if own.name == "settings":
                parameters += [_parameter(name, model.model_fields[name], option) for name, option in options.items()]
            else:
                parameters.append(own.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def _parameter(name: str, field: FieldInfo, option: Option) -> inspect.Parameter:
    kind, default, named = _type_and_default(field, option), field.default, (option.name,) if option.name else ()
    info: Any
    if option.argument:
        info, default = typer.Argument(help=option.help, metavar=option.metavar), None
    else:
        least = next((entry.ge for entry in _constraints(field) if isinstance(entry, annotated_types.Ge)), None)
        bound = {"min": least} if least is not None and kind in (int, int | None) else {}
        info = typer.Option(*named, help=option.help, metavar=option.metavar, **bound)
        if option.off:
            default = False
        elif option.repeat:
            default = None
        elif option.read is not None:
            default = option.shown
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[kind, info], default=default)


def _type_and_default(field: FieldInfo, option: Option) -> Any:
    """The type that typer reads: of words that are read here, a string."""
    if option.off:
        return bool
    if option.repeat or option.argument:
        return list[str] | None if option.read else list[Path] | None
    kind = _bare(field.annotation)
    if option.read is not None or kind not in (int, float, bool, Path):
        kind = str
    return kind if field.default is not None and (option.read is None or option.shown) else kind | None


def _bare(annotation: Any) -> Any:
    """The type without constraints and without None."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif get_origin(annotation) in (Union, types.UnionType):
            annotation = next(part for part in get_args(annotation) if part is not type(None))
        else:
            return annotation


def _constraints(field: FieldInfo) -> list[Any]:
    """Limits of a field's value, those inside a union included."""
    found = list(field.metadata)
    for part in get_args(field.annotation):
        if get_origin(part) is Annotated:
            for entry in get_args(part)[1:]:
                found += entry.metadata if isinstance(entry, FieldInfo) else [entry]
    return found
