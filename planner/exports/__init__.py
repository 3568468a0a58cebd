"""One exporter per target; ``registry`` finds them by name."""
