"""How commands are parsed: one value per option, help that fits a screen, and messages in our own words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

HELP_ALL = "--help-all"
_UsageError: Any = typer.BadParameter.__bases__[0]  # where it lives depends on the version of typer


class _InOwnWords:
    """Parse like typer, refuse what it lets pass, and say what is wrong in a sentence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of a command line.

        Raises:
            typer.BadParameter: or its base, with one sentence and exit code 2.
        """
        this: Any = self
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)  # pyright: ignore[reportAttributeAccessIssue]
        options = args[: args.index("--")] if "--" in args else args
        if HELP_ALL in options and isinstance(self, TyperCommand):
            ctx.meta[HELP_ALL] = True
            typer.echo(ctx.get_help())
            ctx.exit()
        try:
            opts, _, order = this.make_parser(ctx).parse_args(args=list(args))
            if not {"-h", "--help"} & set(options):
                _refuse_repeated_and_empty(opts, order)
            return super().parse_args(ctx, args)  # pyright: ignore[reportAttributeAccessIssue]
        except _UsageError as error:
            if type(error).__name__ == "NoArgsIsHelpError":
                raise
            raise _refusal(ctx, error) from None


class Command(_InOwnWords, TyperCommand):
    """A command whose help lists options without a panel; those of a panel are named, and explained by --help-all."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options; hidden ones with --help-all alone."""
        explained = ctx.meta.get(HELP_ALL, False)
        parameters: list[Any] = self.get_params(ctx)
        arguments = [p for p in parameters if p.param_type_name == "argument"]
        panels: dict[str | None, list[Any]] = {None: []}
        for option in (p for p in parameters if p.param_type_name == "option" and not p.hidden):
            panels.setdefault(getattr(option, "rich_help_panel", None), []).append(option)
        if arguments:
            with formatter.section("Arguments"):
                records = [p.get_help_record(ctx) for p in arguments]
                formatter.write_dl([(name.partition(" <")[0], text) for name, text in records])
        for panel, options in panels.items() if explained else [(None, panels[None])]:
            with formatter.section(panel or "Options"):
                formatter.write_dl([p.get_help_record(ctx) for p in options])
        more = [(panel, "  ".join(p.opts[-1] for p in options)) for panel, options in panels.items() if panel]
        if more and not explained:
            with formatter.section(f"More, explained by {HELP_ALL}"):
                formatter.write_dl(more)


class Group(_InOwnWords, TyperGroup):
    """The program, whose help shows the first sentence of each command."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of commands."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, command.get_short_help_str(limit=200)) for name, command in self.commands.items()]
            )

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that the first word names."""
        if not ctx.resilient_parsing and args and args[0] not in self.commands:
            what = "option" if args[0].startswith("-") else "command"
            raise _UsageError(_with_hint(ctx, f"there is no {what} {args[0]}{_meant(args[0], self.commands)}"))
        return super().resolve_command(ctx, args)


def sentence(error: Any) -> str:
    """Say what is wrong with the value of a parameter, without the parameter's name and without a full stop.

    Args:
        error: a `typer.BadParameter`, of a callback of ours or of the parser.
    """
    found = getattr(error.__cause__, "errors", None)
    if found is None:
        return error.message.strip().rstrip(".")
    first = found()[0]
    kind, given, limits = first["type"], first.get("input"), first.get("ctx", {})
    option = getattr(error, "param", None)
    least, most = (getattr(option, name, None) for name in ("min", "max"))
    if kind.startswith("int"):
        return f"takes a whole number, not {given!r}"
    if kind.startswith("float"):
        return f"takes a number, not {given!r}"
    if kind in ("greater_than_equal", "less_than_equal") or least is not None or most is not None:
        return f"must be {_between(least, most)}, not {given}"
    choices = getattr(getattr(option, "type_descriptor", None), "choices", None)
    if choices:
        names = [str(getattr(choice, "value", choice)) for choice in choices]
        return f"takes {' or '.join(filter(None, [', '.join(names[:-1]), names[-1]]))}, not {given!r}"
    return f"{limits.get('error', first['msg'])}".strip().rstrip(".")


def _refuse_repeated_and_empty(opts: dict[str, Any], order: Iterable[Any]) -> None:
    seen: list[Any] = []
    for option in (p for p in order if p.param_type_name == "option"):
        name = max(option.opts, key=len)
        if option in seen and not option.multiple and not option.count:
            raise _UsageError(f"{name} may be given once only.")
        seen.append(option)
        values = opts.get(option.name)
        if any(value == "" for value in (values if isinstance(values, list) else [values])):
            raise _UsageError(f"{name} must not be empty.")


def _refusal(ctx: Any, error: Any) -> Exception:
    """Word a refusal of the parser."""
    kind, option = type(error).__name__, vars(error).get("param")
    name = getattr(error, "option_name", "") or ("" if option is None else _name_of(option))
    message = str(error.message).strip()
    if kind == "NoSuchOption":
        close = [one for p in ctx.command.get_params(ctx) if p.param_type_name == "option" for one in p.opts]
        message = f"there is no option {name}{_meant(name, [*close, HELP_ALL])}"
    elif kind == "MissingParameter":
        metavar = option.metavar if option is not None and option.param_type_name == "option" else None
        message = f"{name}{f' {metavar}' if metavar else ''} is missing; "
    elif kind == "BadOptionUsage":
        message = f"{name} takes no value." if "not take" in message else f"{name} needs a value."
    elif kind == "BadParameter":
        found = sentence(error)
        message = f"{name}{' ' if found.startswith(('must', 'takes', 'needs')) else ': '}{found}."
    elif "unexpected extra argument" in message:
        message = f"{message[message.rfind('(') + 1 :].rstrip(').')}: more than {ctx.command.name} takes."
    return _UsageError(_with_hint(ctx, message))


def _with_hint(ctx: Any, message: str) -> str:
    return f"{message}{ctx.command_path} -h shows what there is." if message.endswith("; ") else message


def _name_of(parameter: Any) -> str:
    return (
        (parameter.metavar or parameter.name)
        if parameter.param_type_name == "argument"
        else max(parameter.opts, key=len)
    )


def _meant(given: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, sorted(known), 1)
    return f"; did you mean {close[0]}?" if close else "; "


def _between(least: float | None, most: float | None) -> str:
    if most is None:
        return f"at least {least:g}"
    return f"at most {most:g}" if least is None else f"from {least:g} to {most:g}"
