"""The `aligner` command, also as `python -m aligner_middleware`."""

import sys


def main() -> None:
    """Run the command line, and end the process."""
    try:
        from aligner_middleware.cli.app import main as run
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    run()


if __name__ == "__main__":
    main()
