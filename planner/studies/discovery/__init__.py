"""From what a machine's own tools print to a cluster file."""
