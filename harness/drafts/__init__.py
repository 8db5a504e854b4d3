"""First configs: from a folder of images, or from the arguments of another training program."""
