"""`python -m rast`: the command line."""

from rast.cli import main

main()
