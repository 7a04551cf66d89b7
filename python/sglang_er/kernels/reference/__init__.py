"""Every op in plain torch: slow, obvious, on any device. The other implementations are compared with it."""
