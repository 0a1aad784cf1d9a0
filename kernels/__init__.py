"""Triton kernels. Importing this package imports neither Triton nor PyTorch."""

# The folder lies at the top of the source tree, where Python would also find it as a global package "kernels": a second
# copy of every kernel, and a name that others use too.
if __name__ != "fastvq.kernels":
    raise ImportError(f"this package is fastvq.kernels, not {__name__}: use 'import fastvq.kernels'")
