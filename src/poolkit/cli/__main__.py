"""``python -m poolkit.cli``."""

from poolkit.cli import main

main()
