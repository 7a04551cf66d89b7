"""SGLang's Marlin kernel (W4A16) behind our ops: its own layout (`marlin_weight.py`), its own compiled module."""
