"""The PyTorch side: runs an exported bundle. Imports no jax, and torch only when something is loaded."""
