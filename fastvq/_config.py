"""What configurations have in common: frozen plain data, checked when made, stored as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Self

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

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data; a field marked as `ADDED` is left out where it has its default."""
        values: dict[str, Any] = dataclasses.asdict(self)  # type: ignore[call-overload]
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.metadata.get("added") and values[field.name] == field.default:
                del values[field.name]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The configuration stored by :meth:`to_dict`; unknown or missing fields are an error."""
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
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value
