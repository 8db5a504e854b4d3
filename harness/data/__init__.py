"""Images: the index of a folder, the sampling of an epoch, and the loaders that carry it out."""
