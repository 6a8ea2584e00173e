"""One adapter per model family: where attention, text and the token grid are, and how to call attention there."""
