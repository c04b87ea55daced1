"""Values to and from the journal, by the annotations of the functions that they are for.

Three rules make a replay see what the first run saw:

* A value is *always* read back from its journal form, also the first time. The columns are `json`, not `jsonb`, so that
  form is kept to the letter: no number is rewritten, no key moved.
* An input is recognised by its *digest*: canonical JSON (sorted keys) without what equals its default, so that a new
  field or parameter with a default does not make old journals diverge.
* What PostgreSQL or JSON cannot hold (U+0000, NaN) is refused where it is made.

Fields stand there by their names: aliases are for others than ourselves.
"""

import hashlib
import inspect
import json
import typing
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, Generic, TypeAlias, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, from_json
from typing_extensions import TypedDict

from saga import limits
from saga.errors import PayloadError, SagaDeclarationError

T = TypeVar("T")

_KINDS: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
DIGEST_BYTES: Final = 16
_Write: TypeAlias = Callable[..., bytes]
_Read: TypeAlias = Callable[[str], Any]


def name_of(function: object) -> str:
    """What people call a function, for messages."""
    return getattr(function, "__qualname__", repr(function))


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """A function's annotations as types.

    Raises:
        SagaDeclarationError: a name in them cannot be found.
    """
    try:
        return typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise SagaDeclarationError(
            name_of(function),
            f"has an annotation that cannot be read ({error})",
            "import the classes in its annotations where it is defined, and not under TYPE_CHECKING",
        ) from error


class Value(Generic[T]):
    """Values of one annotation: the result of a step, a request, a signal."""

    def __init__(self, annotation: Any, what: str) -> None:
        """For values of the type `annotation`; `what` names them in messages.

        Raises:
            SagaDeclarationError: pydantic knows no JSON form for the type.
        """
        self.what: Final = what
        self.annotation: Final = annotation
        adapter: TypeAdapter[T] = _adapter(annotation, what)
        self._has_defaults, self._has_sets = _traits(adapter)
        self._write, self._read = _forms(adapter)
        self._adapter: Final = adapter

    def encode(self, value: T) -> str:
        """The journal form.

        Raises:
            PayloadError: the value is not of the type, or has no JSON form.
        """
        return _dump(self._write, value, self.what).decode()

    def recognise(self, value: T) -> tuple[str, bytes]:
        """The journal form, and its digest: equal for equal values, whatever defaults were added since.

        Raises:
            PayloadError: the value is not of the type, or has no JSON form.
        """
        body = _dump(self._write, value, self.what)
        bare = self._write(value, exclude_defaults=True) if self._has_defaults else body
        return body.decode(), _digest(bare, has_sets=self._has_sets)

    def decode(self, text: str) -> T:
        """The value of a journal form.

        Raises:
            PayloadError: it is of another type than the annotation says now.
        """
        return cast("T", _load(self._read, text, self.what))

    def read(self, text: str) -> T:
        """The value of what a person wrote.

        Raises:
            PayloadError: it is no such value; says where.
        """
        try:
            return self._adapter.validate_json(text, by_alias=True, by_name=True)
        except ValidationError as error:
            raise PayloadError(
                self.what, f"does not fit ({_problems(error)})", "correct it, and say it again"
            ) from error

    def digest(self, value: T) -> bytes:
        """Equal for equal values, whatever the order of keys, and whatever defaults were added since."""
        return self.recognise(value)[1]


class Arguments:
    """The arguments of one function after its first parameter, which is the context."""

    def __init__(self, function: Callable[..., Any], *, skip: int = 1) -> None:
        """Read them from the function's signature.

        Args:
            function: with every parameter annotated.
            skip: leading parameters that are not part of the call.

        Raises:
            SagaDeclarationError: a parameter has no annotation, or is of a kind that cannot be journalled.
        """
        self.name: Final = name_of(function)
        hints = hints_of(function)
        parameters = list(inspect.signature(function).parameters.values())[skip:]
        for parameter in parameters:
            _check_parameter(self.name, parameter, hints)
        self.names: Final = tuple(p.name for p in parameters)
        self._positional: Final = tuple(p.name for p in parameters if p.kind is not p.KEYWORD_ONLY)
        self._keyword: Final = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
        self._signature: Final = inspect.Signature(parameters)
        whole = _adapter(_typed_dict({p.name: hints[p.name] for p in parameters}), self.name)
        self._defaults: Final = self._default_forms(parameters)
        self._has_defaults, self._has_sets = _traits(whole)
        self._write, self._read = _forms(whole)

    def _default_forms(self, parameters: list[inspect.Parameter]) -> dict[str, Any]:
        """What defaults look like in a digest; an argument equal to its default is left out of it."""
        forms: dict[str, Any] = {}
        for parameter in parameters:
            if parameter.default is not parameter.empty:
                adapter: TypeAdapter[Any] = TypeAdapter(object)
                try:
                    whole = adapter.dump_json(parameter.default, exclude_defaults=True)
                except PydanticSerializationError as error:
                    raise SagaDeclarationError(
                        f"{self.name}({parameter.name})", f"has a default without a JSON form ({error})", "use None"
                    ) from error
                forms[parameter.name] = json.loads(whole)
        return forms

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments by name, defaults included.

        Raises:
            TypeError: as the function itself would.
        """
        if not kwargs and len(args) == len(self.names) == len(self._positional):
            return dict(zip(self.names, args, strict=True))
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def unbind(self, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments as they are passed: by position, and by keyword."""
        return [values[name] for name in self._positional], {name: values[name] for name in self._keyword}

    def encode(self, values: dict[str, Any]) -> str:
        """The journal form.

        Raises:
            PayloadError: an argument is not of its type, or has no JSON form.
        """
        return _dump(self._write, values, self.name).decode()

    def recognise(self, values: dict[str, Any]) -> tuple[str, bytes]:
        """The journal form, and its digest: equal for equal arguments, whatever defaults were added since.

        Raises:
            PayloadError: an argument is not of its type, or has no JSON form.
        """
        body = _dump(self._write, values, self.name)
        bare = self._write(values, exclude_defaults=True) if self._has_defaults else body
        return body.decode(), _digest(bare, self._defaults, has_sets=self._has_sets)

    def decode(self, text: str) -> dict[str, Any]:
        """The arguments of a journal form; parameters that were added since have their defaults.

        Raises:
            PayloadError: they do not fit the function as it is now.
        """
        found = json.loads(text)
        missing = [name for name in self.names if name not in found]
        if not missing:
            return cast("dict[str, Any]", _load(self._read, text, self.name))
        unknown = [name for name in missing if name not in self._defaults]
        if unknown:
            raise PayloadError(self.name, f"has a parameter {unknown[0]!r} that the journal lacks", "give it a default")
        filled = json.dumps({**found, **{name: self._defaults[name] for name in missing}})
        return cast("dict[str, Any]", _load(self._read, filled, self.name))

    def digest(self, values: dict[str, Any]) -> bytes:
        """Equal for equal arguments, whatever the order of keys, and whatever defaults were added since."""
        return self.recognise(values)[1]


def _typed_dict(fields: dict[str, Any]) -> Any:
    make: Any = TypedDict  # checkers know the class syntax only
    return make("Arguments", fields)


def _adapter(annotation: Any, what: str) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(annotation)
    except Exception as error:
        raise SagaDeclarationError(
            what, f"the type {annotation!r} has no JSON form ({error})", "use types that pydantic can write and read"
        ) from error


def _forms(adapter: TypeAdapter[Any]) -> tuple[_Write, _Read]:
    """To and from the journal: fields by their names, whatever their aliases are, and none that is computed."""
    write = partial(adapter.serializer.to_json, by_alias=False, round_trip=True)
    return write, partial(adapter.validator.validate_json, by_alias=False, by_name=True)


def _traits(adapter: TypeAdapter[Any]) -> tuple[bool, bool]:
    """Whether anything in values of the type may equal a default, and whether there are sets in them.

    Without defaults what is dumped is the same with and without them. A set is written in an order that is another one
    in each process.
    """
    has_defaults = has_sets = False
    seen: set[int] = set()
    queue: list[object] = [adapter.core_schema]
    while queue:
        node = queue.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, dict):
            has_defaults |= "default" in node or "default_factory" in node
            has_sets |= node.get("type") in ("set", "frozenset")
            queue.extend(node.values())
        elif isinstance(node, list | tuple):
            queue.extend(node)
    return has_defaults, has_sets


def _check_parameter(owner: str, parameter: inspect.Parameter, hints: Mapping[str, Any]) -> None:
    field = f"{owner}({parameter.name})"
    if parameter.kind not in _KINDS:
        raise SagaDeclarationError(field, "collects arguments", "name each parameter: the journal stores them by name")
    if parameter.name not in hints:
        raise SagaDeclarationError(field, "has no annotation", "annotate it: the journal is read by annotations")


def _dump(write: _Write, value: object, what: str) -> bytes:
    try:
        body = write(value, warnings="error")
    except (ValueError, TypeError, AttributeError) as error:
        raise PayloadError(
            what, f"cannot be written as JSON ({error})", "pass what the annotation says, of types that JSON has"
        ) from error
    if len(body) > limits.PAYLOAD_MAX_BYTES:
        raise PayloadError(
            what,
            f"needs {len(body)} bytes",
            f"stay below {limits.PAYLOAD_MAX_BYTES}: store the bulk elsewhere and pass a reference",
        )
    # The searches are cheap and may hit innocent text; only then is the document read with care.
    if b"\\u0000" in body or b"NaN" in body or b"Infinity" in body:
        _refuse_unstorable(body, what)
    return body


def _load(read: _Read, text: str, what: str) -> Any:
    try:
        return read(text)
    except ValidationError as error:
        raise PayloadError(
            what, f"cannot be read from the journal ({_problems(error)})", "let the type accept what was written before"
        ) from error


def _problems(error: ValidationError) -> str:
    return "; ".join(
        f"{'.'.join(map(str, problem['loc'])) or 'value'}: {problem['msg']}"
        for problem in error.errors(include_url=False, include_context=False, include_input=False)
    )


def _refuse_unstorable(body: bytes, what: str) -> None:
    def refuse(constant: str) -> None:
        raise PayloadError(what, f"contains {constant}, which JSON does not have", "use None or text instead")

    def walk(value: object) -> None:
        if isinstance(value, str):
            if "\x00" in value:
                raise PayloadError(what, "contains U+0000, which PostgreSQL cannot store", "remove the character")
        elif isinstance(value, dict):
            for name, item in value.items():
                walk(name)
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(json.loads(body, parse_constant=refuse))


_canonical: Final = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode


def _digest(body: bytes, defaults: Mapping[str, Any] | None = None, *, has_sets: bool) -> bytes:
    form = from_json(body)
    if defaults:
        for name, default in defaults.items():
            if name in form and form[name] == default:
                del form[name]
    if has_sets:
        form = _without_order(form)
    return hashlib.blake2b(_canonical(form).encode(), digest_size=DIGEST_BYTES).digest()


def _without_order(form: Any) -> Any:
    """The same for every order of lists: in JSON a set is one."""
    if isinstance(form, list):
        return sorted(map(_without_order, form), key=_canonical)
    return {name: _without_order(value) for name, value in form.items()} if isinstance(form, dict) else form
