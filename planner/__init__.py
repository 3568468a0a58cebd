"""Choose how to run a model on a cluster: space, integer program, certificate, plan."""

__version__ = "0.1.0"
