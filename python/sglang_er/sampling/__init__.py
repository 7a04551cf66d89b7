"""Exact chain rejection sampling: filters, drafting, acceptance. No SGLang."""
