"""Names in params.json -> callables; the signature of a callable is the schema of its section.

One rule holds for nets, losses, datasets, optimizers and schedules alike: *positional* parameters are
given by the program (the number of classes, the parameters to optimise), *keyword-only* parameters are
the options that a user may write into params.json. Types and ranges stand in the annotations
(`Annotated[float, Field(gt=0)]`), meanings in the `Args:` part of the docstring.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
)
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

Problem = tuple[str, str]  # (dotted key below the section, what is wrong with it and what to do)

STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def in_rising_order(milestones: list[int]) -> list[int]:
    """Refuses a list that is empty, not in order, or names an epoch twice."""
    if not milestones or milestones != sorted(set(milestones)):
        text = "expected epochs in rising order, at least one, got {given}"
        raise PydanticCustomError("rising_order", text, {"given": str(milestones)})
    return milestones


Milestones = Annotated[list[Annotated[int, Field(ge=1)]], AfterValidator(in_rising_order)]  # after how many epochs


class Registry:
    """A set of named callables of one kind, and the schema of the params.json section that picks one.

    Args:
        kind: What an entry is, for messages: `net`, `loss`, `dataset`, ...
        common: A callable whose keyword-only parameters every entry of this registry accepts besides its
            own (the batch size of every dataset, say). `create` does not pass them on: see `split`.
    """

    def __init__(self, kind: str, common: Callable[..., Any] | None = None) -> None:
        self.kind = kind
        self.common = common
        self._entries: dict[str, Callable[..., Any]] = {}
        self._members: dict[str, Callable[[], Iterable[str]]] = {}

    def register(
        self, name: str, members: Callable[[], Iterable[str]] = tuple
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Returns a decorator that registers a callable under `name`.

        A name that ends with "/" is a family: `"torchvision/resnet50"` calls the entry `"torchvision/"`
        with `"resnet50"` before all other arguments, if it is one of `members()`.

        Raises:
            ValueError: The name is taken, or the callable takes `**kwargs` (a typo would pass silently).
        """

        def add(entry: Callable[..., Any]) -> Callable[..., Any]:
            if name in self._entries:
                raise ValueError(f"{self.kind} '{name}' is registered twice: {self._entries[name]!r} and {entry!r}")
            if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(entry).parameters.values()):
                raise ValueError(f"{self.kind} '{name}' takes **kwargs; name its options, so that typos are found")
            self._entries[name] = entry
            self._members[name] = members
            return entry

        return add

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))

    def items(self) -> Iterator[tuple[str, Callable[..., Any]]]:
        """Yields (name, callable) in the order of names; a family under its name with the "/"."""
        yield from sorted(self._entries.items())

    def __getitem__(self, name: str) -> Callable[..., Any]:
        """Returns the callable registered under `name`.

        Raises:
            KeyError: With a message that names the nearest known entry.
        """
        if name in self._entries and not name.endswith("/"):
            return self._entries[name]
        family, slash, member = name.partition("/")
        if slash and family + slash in self._entries:
            members = list(self._members[family + slash]())
            if member in members:
                return functools.partial(self._entries[family + slash], member)
            near = suggest(member, members).replace("did you mean '", f"did you mean '{family}/")
            raise KeyError(f"unknown {self.kind} {name!r}; {near}")
        raise KeyError(f"unknown {self.kind} {name!r}; {suggest(name, self)}")

    def functions(self, entry: Callable[..., Any]) -> tuple[Callable[..., Any], ...]:
        """Returns the callables whose options together a section of `entry` takes."""
        target = entry.func if isinstance(entry, functools.partial) else entry
        return (target, self.common) if self.common else (target,)

    def create(self, section: Mapping[str, Any], *context: Any) -> Any:
        """Calls the entry that `section["name"]` picks with `context` and the section's other options."""
        own, _ = self.split(section)
        return self[section["name"]](*context, **own)

    def split(self, section: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns a section's options as (the entry's own, those that are common to all entries)."""
        common = options_of(self.common) if self.common else {}
        rest = {k: v for k, v in section.items() if k != "name"}
        return {k: v for k, v in rest.items() if k not in common}, {k: v for k, v in rest.items() if k in common}

    def resolve(self, section: Any, common: Callable[..., Any] | None = None) -> tuple[dict[str, Any], list[Problem]]:
        """Checks a section against the signature of its entry and fills in the defaults.

        Args:
            section: As params.json has it.
            common: Whose options it takes besides the entry's own; None: the registry's.

        Returns:
            The section with every option, and all that is wrong with it (then the section is not usable).
        """
        if not isinstance(section, Mapping):
            return {}, [("", f'expected {{"name": ..., options}}, got {section!r}')]
        name = section.get("name")
        if not isinstance(name, str):
            return {}, [("name", f"{'is missing' if name is None else f'{name!r} is not a name'}; {suggest('', self)}")]
        try:
            entry = self[name]
        except KeyError as error:
            return {}, [("name", str(error.args[0]))]
        options = {key: value for key, value in section.items() if key != "name"}
        own, *others = self.functions(entry)
        resolved, problems = check_options(options, own, *([common] if common else others))
        return {"name": name, **resolved}, problems


def checked_by(resolve: Callable[[Any], tuple[Any, list[Problem]]], rule: str) -> WrapValidator:
    """Returns the validator of an option that holds sections of its own; defaults are not filled in.

    Args:
        resolve: Returns every problem of a well-formed value, as (key below the option, text).
        rule: What is well-formed, for the message.
    """

    def validate(value: Any, well_formed: ValidatorFunctionWrapHandler) -> Any:
        try:
            formed = well_formed(value)
        except ValidationError:
            text = {"rule": rule, "value": repr(value)}
            raise PydanticCustomError("form", "expected {rule}; got {value}", text) from None
        problems = [] if value is None else resolve(value)[1]
        if problems:
            faults = [(key, PydanticCustomError("nested", "{text}", {"text": text})) for key, text in problems]
            details = [InitErrorDetails(type=fault, loc=(key,), input=value) for key, fault in faults]
            raise ValidationError.from_exception_data("nested", details)
        return formed

    return WrapValidator(validate)


def labels_of(sections: Iterable[Any]) -> list[str]:
    """Returns what to call each section of a list: its name, numbered where that is taken (`kd_2`); else its place."""
    labels: list[str] = []
    for place, section in enumerate(sections):
        name = section.get("name") if isinstance(section, Mapping) else None
        labels.append(free_name(name if isinstance(name, str) else str(place), labels))
    return labels


def free_name(name: str, taken: Iterable[str]) -> str:
    """Returns a name, numbered if it is taken: `kd`, `kd_2`, `kd_3`."""
    known = set(taken)
    numbers = (f"{name}_{number}" for number in itertools.count(2))
    return name if name not in known else next(free for free in numbers if free not in known)


def suggest(name: str, known: Any) -> str:
    """Returns "did you mean 'x'?" for a near miss, else the list of what is known."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"


def options_of(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the options of a callable, its keyword-only parameters, as name -> (annotation, default).

    The default of a required option is `...` (pydantic's mark).
    """
    if isinstance(function, functools.partial):  # a member of a family
        function = function.func
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function, include_extras=True)
    parameters = inspect.signature(function).parameters.values()
    return {
        p.name: (hints[p.name], ... if p.default is p.empty else p.default)
        for p in parameters
        if p.kind is p.KEYWORD_ONLY
    }


@functools.cache
def options_model(*functions: Callable[..., Any]) -> type[BaseModel]:
    """Returns the strict pydantic model of the options of `functions` together."""
    fields: dict[str, Any] = {}
    for function in functions:
        fields |= options_of(function)
    return create_model("Options", __config__=STRICT, **fields)


def check_options(options: Mapping[str, Any], *functions: Callable[..., Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Checks options against the signatures of `functions` together, strictly, and fills in defaults."""
    model = options_model(*functions)
    try:
        return model.model_validate(dict(options)).model_dump(), []
    except ValidationError as error:
        return {}, [_problem(detail, model.model_fields) for detail in error.errors()]


_SENTENCES = {
    "missing": "is missing and has no default",
    "greater_than": "{input} is not above {gt}",
    "greater_than_equal": "{input} is below {ge}",
    "less_than": "{input} is not below {lt}",
    "less_than_equal": "{input} is above {le}",
    "finite_number": "{input} is not a finite number",
    "float_type": "expected a number, got {input}",
    "int_type": "expected a whole number, got {input}",
    "int_from_float": "expected a whole number, got {input}",
    "bool_type": "expected true or false, got {input}",
    "string_type": "expected text, got {input}",
    "list_type": "expected a list, got {input}",
    "dict_type": 'expected {{"name": ..., options}}, got {input}',
    "too_short": "{input} has fewer than {min_length} elements",
    "string_too_short": "the text is empty",
    "literal_error": "{input} is not one of {expected}",
}


def _problem(detail: ErrorDetails, known: Mapping[str, Any]) -> Problem:
    # A union reports each of its branches below the key: the option itself is the first element.
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return key, f"unknown option; {suggest(key, known)}"
    sentence = _SENTENCES.get(detail["type"])
    if sentence is None:
        return key, detail["msg"]
    return key, sentence.format(input=repr(detail["input"]), **detail.get("ctx", {}))
