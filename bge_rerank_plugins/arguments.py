"""Command-line flags made from the fields of a pydantic model, so that no option is described twice."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection, Iterable
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel

from .settings import RerankSettings

_Model = TypeVar("_Model", bound=BaseModel)


def add_settings(
    parser: argparse.ArgumentParser, default_model: str | None = None, *, without: Collection[str] = ()
) -> None:
    """Adds a flag for every option of `RerankSettings`; one for the model only where it has a default.

    Args:
        parser: The command's parser.
        default_model: The model that is used unless another is named.
        without: Options that change nothing in this command; who gives one is told.
    """
    group = parser.add_argument_group("model and scoring")
    if default_model is not None:
        description = RerankSettings.model_fields["model"].description
        group.add_argument("--model", default=default_model, help=f"{description} (default: {default_model})")
    add_fields(group, RerankSettings, [name for name in RerankSettings.model_fields if name not in {"model", *without}])


def add_fields(
    parser: argparse.ArgumentParser | argparse._ArgumentGroup, model: type[BaseModel], names: Iterable[str]
) -> None:
    """Adds a flag for each of these fields. What is not given on the command line stays out of the namespace."""
    for name in names:
        field = model.model_fields[name]
        text = (field.description or "").replace("%", "%%")
        if not field.is_required() and not any(field.default is none for none in (None, False, "")):
            default = field.default
            text += f" (default: {','.join(map(str, default)) if isinstance(default, list) else default})"
        parser.add_argument(
            flag_of(name),
            dest=name,
            default=argparse.SUPPRESS,
            required=field.is_required(),
            help=text,
            **_flag_kind(field.annotation),
        )


def flag_of(name: str) -> str:
    """The flag of a field."""
    return f"--{name.replace('_', '-')}"


def _flag_kind(annotation: Any) -> dict[str, Any]:
    """How argparse reads a field of this type."""
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    union = () if get_origin(annotation) is list else get_args(annotation)
    kinds = [kind for kind in union or (annotation,) if kind is not NoneType]
    if bool in kinds:
        return {"action": argparse.BooleanOptionalAction}
    if any(get_origin(kind) is list for kind in kinds):
        return {"type": _one_or_list, "metavar": "X[,X...]"}
    return {"type": kinds[0], "metavar": {int: "N", float: "X"}.get(kinds[0], "TEXT")}


def _one_or_list(text: str) -> str | list[str]:
    """Parts between commas, but for those within parentheses, as a measure has them: RBP(p=0.8,rel=1)."""
    parts = re.split(r",(?![^()]*\))", text)
    return parts if len(parts) > 1 else text


def given(arguments: argparse.Namespace, name: str) -> Any:
    """What the user gave for a field, or None."""
    return getattr(arguments, name, None)


def settings_of(arguments: argparse.Namespace, /, **fixed: Any) -> RerankSettings:
    """The options of the scorer among the arguments, with some of them fixed."""
    return fields_of(arguments, RerankSettings, **fixed)


def fields_of(arguments: argparse.Namespace, model: type[_Model], /, **fixed: Any) -> _Model:
    """The fields of a model among the arguments, with some of them fixed."""
    values = {name: value for name, value in vars(arguments).items() if name in model.model_fields}
    return model(**(values | fixed))
