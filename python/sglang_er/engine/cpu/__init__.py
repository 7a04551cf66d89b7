"""The CPU platform: what an unmodified SGLang needs to serve text models on any x86-64 CPU."""
