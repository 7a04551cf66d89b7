"""What differs between SGLang versions: one adapter per window, chosen by `engine.compat.adapter()`."""
