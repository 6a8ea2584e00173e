"""``python -m vdit_fast.cli``."""

from vdit_fast.cli import main

main()
