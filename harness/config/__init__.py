"""The config: YAML files read into typed, frozen, strict objects."""
