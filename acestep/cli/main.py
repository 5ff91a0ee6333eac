"""The `acestep` command.

Its subcommands are found through the entry-point group `acestep.commands`, so that the library's command line can offer what the service
brings (`config`, `serve`, `status`, ...) without importing it. What is imported here, before Ctrl-C is caught, is next to nothing.
"""

from __future__ import annotations

import sys

from acestep.cli import interrupt


def main() -> None:
    """Run the command line: expected errors become one line and exit code 1, Ctrl-C exit code 130."""
    interrupt.ends_at_once()
    try:
        from acestep.cli.app import app
        from acestep.errors import AceStepError

        try:
            app()
        except AceStepError as error:
            print(f"error ({error.type}): {error.message}", file=sys.stderr)
            sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
