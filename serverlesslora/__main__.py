"""`python -m serverlesslora` is the `serverlesslora` command."""

import sys


def main() -> int:
    if sys.argv[1:2] == ["healthcheck"]:  # every few seconds in a container: not a moment for importing a server
        from serverlesslora.cli import healthcheck

        return healthcheck.main(sys.argv[2:])
    from serverlesslora.cli import main as command

    return command.main()


if __name__ == "__main__":
    sys.exit(main())
