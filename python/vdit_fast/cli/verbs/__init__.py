"""One module per verb; each has a ``command`` whose docstring is the help text."""
