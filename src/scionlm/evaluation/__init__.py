"""What a model is worth on held-out text: losses per domain, per document, and text that it writes."""
