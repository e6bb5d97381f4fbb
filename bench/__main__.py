"""`python -m bench COMMAND`, or `cammask bench COMMAND` from a checkout. Errors are one line on stderr and exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from cammask_fast.cli import Parser

COMMANDS = {
    "kernels": ("bench.kernels", "what the kernels need, compiled without a GPU, or the CPU path against op by op"),
    "step": ("bench.step.race", "one optimiser step against the authors' algorithm"),
    "maps": ("bench.maps", "every map by every metric, and as the source of masks, on the embedded benchmark"),
    "less-work": ("bench.step.less_work", "what the settings that save work cost in accuracy, on the embedded benchmark"),
    "data": ("bench.data.loaders", "the loaders against torchvision's"),
    "checkpoints": ("bench.checkpoints", "how long a checkpoint holds up the training"),
    "scaling": ("bench.scaling", "a model of data-parallel training on many GPUs"),
    "audit": ("bench.audit", "whether an audit tells the truth, on the embedded benchmark"),
    "soak": ("bench.soak", "a run of several processes under random faults, against the same run undisturbed"),
    "growth": ("bench.growth", "whether a long run keeps its size in memory, with each loader"),
    "gpu": ("bench.gpu", "tests and microbenchmarks on a CUDA machine"),
    "report": ("bench.pages", "write the tables of bench/results into the README and docs/"),
}
"""Module with add_arguments(parser) and main(options) -> exit code, imported when the command is chosen."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns its exit code, 2 after an error and 130 after Ctrl-C, with one line on stderr."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        options = build_parser(arguments[0] if arguments else "").parse_args(arguments)
        return options.run(options)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (ValueError, OSError) as error:
        return _fail(" ".join(str(error).split()) or type(error).__name__, 2)


def _fail(message: str, code: int) -> int:
    print(f"bench: error: {message}", file=sys.stderr)
    return code


def build_parser(chosen: str) -> Parser:
    """All commands, with the arguments of the chosen one."""
    parser = Parser(prog="bench", description="Measurements; they need a checkout of the repository.", allow_abbrev=False)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name == chosen:
            found = import_module(module)
            found.add_arguments(command)
            command.set_defaults(run=found.main)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
