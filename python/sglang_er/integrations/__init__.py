"""RL frameworks that start the server themselves. None of them is a dependency."""
