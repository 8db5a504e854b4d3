"""The YAML contract: typed, frozen, strict."""
