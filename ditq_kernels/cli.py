"""``ditq``: its commands, which stand with what they run, and what becomes of their errors."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from . import environment
from .analysis import command as analyze
from .benchmark import options as bench_and_tune
from .demo import command as demo
from .evaluation import command as evaluate
from .files import check_writable
from .inspect import command as inspect
from .integrations import command as quantize_and_generate
from .layer.errors import UnsupportedError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
# What a user can mend; anything else is a defect of ours and shows its traceback.
USER_ERRORS = (ValueError, OSError, ImportError, UnsupportedError)


def _say_error(error: BaseException) -> None:
    message = " ".join(str(error).split())  # other libraries' messages come in several lines
    if isinstance(error, ModuleNotFoundError):
        message += "; pip install 'ditq_kernels[demo]' brings what the commands need"
    print(f"ditq: error: {message}", file=sys.stderr)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_) -> None:
        from . import __version__

        print(f"ditq_kernels {__version__}")
        parser.exit()


def _judge(model):
    """The embedded classifier for pictures that it knows."""
    from .demo.classifier import judge_of

    return judge_of(model)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ditq",
        description="Diffusion transformers in 8 and 4 bits: calibrated from one sampling step, no training.",
        epilog="DITQ_BACKEND=reference|cpu|triton|cuda chooses the backend, DITQ_PRINT_CONFIG=1 shows the kernel that "
        "each product runs on, DITQ_DEBUG=1 shows tracebacks.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version, and stop")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run, help: str, example: str, device: bool = True) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=f"examples:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        if device:
            sub.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
        return sub

    quantize_and_generate.add_commands(command)
    demo.add_commands(command)
    analyze.add_commands(command)
    evaluate.add_commands(command, _judge)
    bench_and_tune.add_commands(command)
    inspect.add_commands(command)
    environment.add_commands(command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for what the user can mend, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        if isinstance(getattr(args, "out", None), Path):
            check_writable(args.out)  # said now, and not when the work is done
        return args.run(args)
    except KeyboardInterrupt:
        print("ditq: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever read the output has seen enough; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except USER_ERRORS as error:
        if os.environ.get("DITQ_DEBUG"):
            raise
        _say_error(error)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
