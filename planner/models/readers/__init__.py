"""Readers of model configs, one function per architecture, found by ``registry``."""
