"""What configurations have in common: frozen plain data, checked when made, stored as JSON."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any, Self

from fastvq._names import names_like
from fastvq.errors import ArgumentError, ArgumentTypeError

# Metadata of fields that there were not always. With its default such a field is not written, so that records and
# checksums of what does without it stay what they were.
ADDED = MappingProxyType({"added": True})


class Config:
    """Base of frozen dataclasses that hold settings of models and of training runs."""

    def __post_init__(self) -> None:
        # JSON and command lines know lists only; tuples keep the configuration hashable and comparable.
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            object.__setattr__(self, field.name, _tuples(getattr(self, field.name)))

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.__repr__ = Config.__repr__  # type: ignore[method-assign]  # before dataclass would make one of all fields

    def __repr__(self) -> str:
        """Fields with other values than their defaults, as they are typed."""
        told = []
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING or value != field.default:
                told.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(told)})"

    @classmethod
    def of(cls, config: object, fields: Mapping[str, Any]) -> Self:
        """The configuration ``config`` with some ``fields`` replaced, or where it is None the one of these fields.

        Raises:
            ArgumentError, ArgumentTypeError: something else, or fields that there are not; names the nearest.
        """
        if config is not None and not isinstance(config, cls):
            raise ArgumentTypeError(
                f"config: expected a {cls.__name__}, or its fields as keywords, got {type(config).__name__} {config!r}"
            )
        cls.require_fields(cls.__name__, fields)
        if config is not None:
            return dataclasses.replace(config, **fields) if fields else config  # type: ignore[type-var]
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]  # type: ignore[arg-type]
        missing = [name for name in required if name not in fields]
        if missing:
            raise ArgumentError(f"{cls.__name__}: missing fields {missing}; give them as keywords, or a configuration")
        return cls(**fields)

    @classmethod
    def require_fields(cls, name: str, given: Iterable[str]) -> None:
        """Names of fields must be those of fields.

        Args:
            name: what the message calls it all.
            given: the names.

        Raises:
            ArgumentError: one of these is no field; names the nearest.
        """
        known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        for field in given:
            if field not in known:
                raise ArgumentError(f"{name}: no field {field!r}, expected one of {names_like(field, known)}")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; a field marked as `ADDED` is left out where it has its default."""
        values: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.metadata.get("added") and values[field.name] == field.default:
                del values[field.name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration whose fields :meth:`to_dict` gave as ``values``.

        Raises:
            ArgumentError, ArgumentTypeError: unknown or missing fields, or no fields.
        """
        if not isinstance(values, Mapping):
            raise ArgumentTypeError(f"{cls.__name__}: expected a mapping of fields, got {type(values).__name__}")
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(set(values) - set(fields))
        required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
        missing = sorted(required - set(values))
        if unknown or missing:
            raise ArgumentError(f"{cls.__name__}: unknown fields {unknown}, missing fields {missing}")
        return cls(**values)

    @property
    def least_tensors(self) -> int:
        """A number of tensors that a model of this configuration has at least, found without building it."""
        return 0

    def _require(self, check: Callable[..., object], *names: str, optional: bool = False, **bounds: Any) -> None:
        """Apply a check of `fastvq._check` to fields; ``optional`` ones may be None."""
        for name in names:
            value = getattr(self, name)
            if not (optional and value is None):
                check(name, value, **bounds)


def _tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(v) for v in value)
    # NumPy's integers are none to JSON.
    return int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else value
