"""The preflight: a minute of measurements on all ranks that names the nodes that fall short."""
