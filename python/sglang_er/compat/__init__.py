"""Remedies for other packages' defects, each in a module of its own so that it can be deleted alone."""
