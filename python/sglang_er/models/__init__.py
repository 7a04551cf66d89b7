"""Small trained models, and big ones that compute the same function: see docs/models.md. Imports no sglang."""
