"""What `s2a` and `python -m s2a_cli` run."""

import sys


def main() -> int:
    """Runs the command line and returns its exit code; 130 for a Ctrl-C while it is imported."""
    try:
        from s2a_cli.cli.main import main as run
    except KeyboardInterrupt:
        print("s2a: interrupted", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
