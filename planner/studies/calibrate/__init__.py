"""Fit device, stack and link profiles from measurements."""
