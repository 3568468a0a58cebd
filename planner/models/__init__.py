"""Models as sequences of blocks: the spec, the readers of config formats, the catalogue."""
