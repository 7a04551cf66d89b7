"""Exact chain rejection sampling: filters, acceptance, and the noise of seeded sampling. No SGLang."""
