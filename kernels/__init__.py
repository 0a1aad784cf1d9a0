"""Triton kernels. Importing this package imports neither Triton nor PyTorch.

In kernels ``x_ptr`` is a pointer and ``x_ptrs`` a block of them, ``offs_m`` are a block's offsets along m, ``mask_m``
those that exist, ``BLOCK_M`` is its size; other values bear no prefix. A comment gives the shape of each new block.
"""

# The folder lies at the top of the source tree, where Python would also find it as a global package "kernels": a second
# copy of every kernel, and a name that others use too. Some libraries import a package of that name to see whether it
# is the one they know, so that it is there, and empty: nothing in it can be imported or used.
if __name__ != "fastvq.kernels":
    del __path__

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        raise ImportError(f"this package is fastvq.kernels, not {__name__}: use 'import fastvq.kernels'")
