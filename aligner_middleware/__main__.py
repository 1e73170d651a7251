"""`python -m aligner_middleware` is the `aligner` command."""

from aligner_middleware.cli import main

main()
