"""Help as it is read on 80 columns: every name whole, what it takes beside it, and a default where there is one."""

from typing import Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

Row = tuple[Text, Text]


def print_help(command: Any, context: typer.Context, console: Console) -> None:
    """Print what a command is for, what it takes, and an example."""
    parameters = [parameter for parameter in command.get_params(context) if not parameter.hidden]
    arguments = [parameter for parameter in parameters if parameter.param_type_name == "argument"]
    usage = [context.command_path, "[OPTIONS]", *map(_in_usage, arguments)]
    commands = getattr(command, "commands", {})
    console.print(
        Text.assemble(("Usage: ", "bold"), " ".join([*usage, *["COMMAND …"] * bool(commands)])), soft_wrap=True
    )
    console.print(Padding(Text("\n\n".join(_paragraphs(command))), (1, 0, 1, 2), expand=False))
    rows = [(Text(name, "cyan"), Text(_paragraphs(found)[0])) for name, found in commands.items()]
    _print_panel("Commands", rows, console)
    _print_panel("Arguments", [(_argument_name(argument), _told(argument)) for argument in arguments], console)
    panels: dict[str, list[Row]] = {}
    for option in parameters:
        if option.param_type_name == "option":
            panel = panels.setdefault(option.rich_help_panel or "Options", [])
            panel.append((_option_names(option), _told(option)))
    for title, rows in sorted(panels.items(), key=lambda panel: panel[0] != "Options"):
        _print_panel(title, rows, console)
    if command.epilog:
        console.print(Text.from_markup(f"  {command.epilog}"), soft_wrap=True)


def _paragraphs(command: Any) -> list[str]:
    """Return what a command says of itself, a line for each paragraph: the terminal breaks it, not the source."""
    return [" ".join(paragraph.split()) for paragraph in command.help.strip().split("\n\n")]


def _print_panel(title: str, rows: list[Row], console: Console) -> None:
    if not rows:
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, min_width=max(name.cell_len for name, _ in rows))
    table.add_column()
    for row in rows:
        table.add_row(*row)
    console.print(Text(title, "bold"))
    console.print(Padding(table, (0, 0, 1, 2), expand=False))


def _in_usage(argument: Any) -> str:
    name = _argument_name(argument).plain
    return name if argument.required else f"[{name}]"


def _argument_name(argument: Any) -> Text:
    return Text(argument.display_name_raw.strip("[]"), "cyan")


def _option_names(option: Any) -> Text:
    """Return an option's names and what it takes: "-h, --help", "--[no-]tied", "--hidden H"."""
    positive = option.opts[-1]
    if f"--no-{positive.removeprefix('--')}" in option.secondary_opts:
        return Text(f"--[no-]{positive.removeprefix('--')}", "cyan")
    names = Text(", ".join(sorted(option.opts, key=len)), "cyan")
    return names if option.is_flag or not option.metavar else names.append(f" {option.metavar}", "yellow")


def _told(parameter: Any) -> Text:
    """Return what a parameter is for, and what it is where it isn't given."""
    text = Text.from_markup(parameter.help or "")
    default = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    if parameter.show_default and default not in (None, False, ""):
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        text.append(f" Default {shown}.", "dim")
    return text
