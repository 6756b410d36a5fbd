"""The largest scores of all pairs of a batch, found a tile at a time."""
