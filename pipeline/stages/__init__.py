"""The stages, one module each; the folder is the registry."""
