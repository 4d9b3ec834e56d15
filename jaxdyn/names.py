"""Names that rooms with and without JAX share."""

COMPONENTS = ("representation", "gradient", "cross")
"""The components by which kernels and updates are split, as `types.Components` has them."""
