"""A tiny Wan transformer that draws moving shapes from a prompt: the whole library end to end, without a download."""
