import sys

from s2a_cli.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
