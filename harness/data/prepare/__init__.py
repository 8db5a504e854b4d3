"""Image folders made from archives and well-known data sets."""
