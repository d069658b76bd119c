"""The plan put into a model: parallel layers, head numbers, the vision encoder on whole images."""
