"""`python -m serving`: the same as `serving`."""

from serving.cli.main import main

main()
