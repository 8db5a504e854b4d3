"""Image folders created from archives and well-known data sets."""
