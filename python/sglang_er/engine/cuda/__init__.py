"""What only exists on a GPU: recording SGLang's forwards."""
