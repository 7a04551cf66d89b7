"""GRPO on the written-out addition task: rollouts from a server with sglang-er, training in PyTorch on the CPU."""
