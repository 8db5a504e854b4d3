"""Networks by name, and ghost batch norm."""
