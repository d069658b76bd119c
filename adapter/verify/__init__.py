"""TP=N against one process on the same weights: tensors, modules, logits, tokens."""
