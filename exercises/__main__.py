"""The exercises' own commands: ``python exercises hint | reset | update | build``."""

import argparse
import sys

from grader import build, keep, live
from grader.spec import SpecError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="python exercises",
        description="Hints, fresh cells and new notebooks.",
        epilog="for example: python exercises hint lm.1 2",
    )
    commands = top.add_subparsers(dest="command", metavar="command")
    one = commands.add_parser("hint", help="print a hint")
    one.add_argument("id", help="an exercise, such as lm.1")
    one.add_argument("level", nargs="?", type=int, default=1, help="1, 2 or 3")
    one = commands.add_parser("reset", help="put one stub back; the answer is kept")
    one.add_argument("id", help="an exercise, such as lm.1")
    one = commands.add_parser(
        "update", help="take new notebooks and put your answers into them"
    )
    one.add_argument("--pull", action="store_true", help="git pull first")
    one.add_argument(
        "--from", dest="folder", metavar="FOLDER",
        help="take the answers from the exercises/ of another copy",
    )  # fmt: skip
    one = commands.add_parser("build", help="write the notebooks from solutions/")
    one.add_argument("--check", action="store_true", help="only say what has drifted")
    return top


def main(arguments: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    options = parser().parse_args(arguments)
    if options.command is None:
        parser().print_help()
        return 2
    try:
        if options.command == "hint":
            print(live.hint_text(options.id, options.level))
        elif options.command == "reset":
            print(keep.reset(options.id))
        elif options.command == "update":
            print(keep.update(options.folder, pull=options.pull))
        else:
            return write_all(options.check)
    except (keep.KeepError, SpecError, ValueError) as error:
        print(f"{options.command}: {error}", file=sys.stderr)
        return 2
    return 0


def write_all(only_check: bool) -> int:
    """Write the generated files that differ, or only name them."""
    drifted = [
        (path, text)
        for path, text in build.outputs().items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for path, text in drifted:
        print(f"{path.name}: {'has drifted' if only_check else 'written'}")
        if not only_check:
            keep.replace(path, text)
    return int(only_check and bool(drifted))


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")
    sys.exit(main())
