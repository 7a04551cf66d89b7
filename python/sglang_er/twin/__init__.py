"""The twin: W4 copies of the policy's linears, made from the live weights and remade into the same buffers."""
