"""What an RL trainer relies on when it talks to a server, as checks over HTTP (docs/conformance.md)."""
