"""The command line. Everything heavy is imported inside the commands, so that help and mistakes are answered at once."""

import contextlib
import inspect
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

import throughtime as package
from throughtime.app import errors, signals, streams
from throughtime.errors import InputError, unknown_name
from throughtime.launch import Launch, launched
from throughtime.lm.options import ABOUT, KINDS, as_given, check_budgets, flag, usual

if TYPE_CHECKING:
    from throughtime.lm.training import TrainingSummary
    from throughtime.training import Ranks

NAME = "throughtime"
NEEDS_ARGUMENTS = (
    "train",
    "sweep",
    "eval",
    "score",
    "sample",
    "explain",
    "info",
    "pack",
    "quantize",
    "plot",
    "gradients",
    "compare-gradients",
    "task",
)


@dataclass
class Invocation:
    """What holds for one call of the program, whatever the command."""

    traceback: bool = False


class Command(TyperCommand):
    """A command that explains itself, and takes no empty name for that of the current folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the arguments."""
        given, _, _ = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in [] if ctx.resilient_parsing else self.params:  # so are words completed
            values = given.get(parameter.name)
            kind, is_argument = parameter.type_descriptor.annotation, parameter.param_type_name == "argument"  # type: ignore[attr-defined]
            is_of_a_file = kind in (Path, list[Path]) or (is_argument and kind == list[str])
            if is_of_a_file and "" in (values if isinstance(values, list | tuple) else [values]):
                name = parameter.metavar if is_argument else max(parameter.opts, key=len)
                raise InputError(f"{name} is empty: expected the name of a file or folder; is a variable unset?")
        return super().parse_args(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print its help."""
        _print_help(self, ctx)


class Commands(TyperGroup):
    """The commands; an unknown one is answered with the nearest known one."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print what there is."""
        _print_help(self, ctx)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that is named first."""
        if args[0] not in self.commands and f"--{args[0]}" in ("--version", "--help"):
            raise InputError(f"unknown command {args[0]!r}; did you mean --{args[0]}?")
        if args[0] not in self.commands:
            raise unknown_name("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


class Program(typer.Typer):
    """A typer application whose every command explains itself the same way."""

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:  # type: ignore[override]
        """Register a command."""
        return super().command(name, cls=Command, **settings)


app = Program(
    name=NAME, cls=Commands, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: What stands after `throughtime`; `None` takes the process's own.

    Returns:
        0, 2 where the input is at fault, 1 for a bug, 130 after Ctrl-C, 143 after SIGTERM, 129 after SIGHUP (a terminal that was
        closed), 141 where nobody reads the output any more.
    """
    if arguments is not None:
        return _run(list(arguments))
    try:
        signals.end_once()
        streams.prepare()
        if _processes().rank:
            streams.mute()  # what all would say alike is said by the first
        return _run(sys.argv[1:])
    except KeyboardInterrupt:
        return errors.INTERRUPTED
    except InputError as error:
        return errors.report(error, command=NAME)
    finally:
        signals.ignore()


def _run(arguments: list[str]) -> int:
    group = typer.main.get_command(app)
    invocation = Invocation()
    called = next((word for word in arguments if word in group.commands), None)  # type: ignore[attr-defined]
    command = f"{NAME} {called}" if called else NAME
    try:
        with errors.warnings_in_a_line(command):
            code = group.main(_explained(arguments), prog_name=NAME, standalone_mode=False, obj=invocation)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except SystemExit as ended:  # what typer makes of a broken pipe, or of a request for shell completion
        if isinstance(ended.__context__, OSError):
            streams.discard(sys.stdout)
            return errors.BROKEN_PIPE
        return errors.BAD_INPUT if ended.code else 0
    except BrokenPipeError:
        streams.discard(sys.stdout)
        return errors.BROKEN_PIPE
    except Exception as error:
        code = errors.report(error, command=command, with_traceback=invocation.traceback)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            return code
        streams.discard(sys.stdout)  # what couldn't be printed can't be printed at the end either
        return code


def _explained(arguments: list[str]) -> list[str]:
    """Ask for the help of a command that was given nothing to work on."""
    words = [word for word in arguments if word != "--traceback"]
    return [*arguments, "--help"] if not words or (len(words) == 1 and words[0] in NEEDS_ARGUMENTS) else arguments


def _print_help(command: Any, context: Any) -> None:
    from throughtime.app.help import print_help
    from throughtime.app.terminal import results

    print_help(command, context, results())


def _print_version(asked: bool) -> None:
    if asked:
        torch = version("torch")
        print(f"{NAME} {package.__version__} (torch {torch}, Python {platform.python_version()})")
        raise typer.Exit


@app.callback(epilog="[dim]Start with[/]  throughtime explain ybigta  [dim]or[/]  throughtime train book.txt --out run")
def throughtime(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Tell the version, and those of torch and Python.", callback=_print_version, is_eager=True
        ),
    ] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show a bug's traceback.")] = False,
) -> None:
    """Recurrent language models: train, evaluate and sample them, and see backpropagation through time at work."""
    context.obj.traceback = traceback
    if (processes := _processes().size) > 1 and context.invoked_subcommand != "train":
        raise InputError(
            f"{context.invoked_subcommand} works in one process, and {processes} were started; only train works in several: "
            "call it without torchrun"
        )


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
Last = Annotated[bool, typer.Option("--last", help="Take the last weights, not the best that were measured.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, for scripts.")]
Lags = Annotated[
    int | None,
    typer.Option(
        metavar="K", help="Steps that each loss is followed back.", show_default="200, or --within if that is more"
    ),
]
Probe = Annotated[int, typer.Option(metavar="M", help="Losses to follow.")]
Within = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Steps that gradients have to reach, for the verdict.", show_default="a run's --bptt, or 200"
    ),
]


def _checked_seed(seed: int | None) -> int | None:
    if seed is not None and not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed}: expected a whole number from 0 to 2^63 − 1")
    return seed


def _with_options_of_training(command: Callable[..., None], *, searched: bool = False) -> Callable[..., None]:
    """Give a command that takes keywords an option for each of training's, left to `TrainingOptions` where it isn't given.

    Args:
        command: The command.
        searched: Whether an option may be a range or choices, too: then it is read as text, or as a list of switches.
    """
    signature = inspect.signature(command)
    kept = [parameter for parameter in signature.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    for name, about in ABOUT.items():
        if not about.panel or (searched and name in OF_SOURCE):
            continue
        spelling = as_given(name, True) + "/" + as_given(name, False) if not about.metavar else flag(name)
        told = _choice(spelling, about.metavar, usual(name), about.panel, about.help)
        of_value = KINDS[name] if not searched else list[bool] if KINDS[name] is bool else str
        kind = Annotated[of_value | None, told]
        kept.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    command.__signature__ = signature.replace(parameters=kept)  # type: ignore[attr-defined]
    return command


def _choice(name: str, metavar: str, usually: str, panel: str, text: str, **more: Any) -> Any:
    """Describe an option of training that is left to `TrainingOptions` where it isn't given."""
    default = f" [dim]Default {usually}.[/]" if usually else ""
    return typer.Option(name, metavar=metavar, help=text + default, show_default=False, rich_help_panel=panel, **more)


READING, ADAPTIVE = "How the text is read", "Learning from what was read (the run stays as it is)"
OF_SOURCE = ("freeze", "grow_vocabulary")  # what is for --from
LONGER = ("minutes", "epochs", "steps", "lr")  # what --resume takes beside the run
CHOICE, BEAMS = "How the next token is chosen", "Beam search"
CHOICES = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "no_repeat_ngram",
    "greedy",
)


@app.command(epilog="[dim]Example[/]  throughtime train book.txt --out run --cell lstm --hidden 256 --minutes 3")
@_with_options_of_training
def train(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="FILE_OR_FOLDER…", help="Text to learn from; folders are searched.", show_default=False),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="RUN", help="The folder to write the run to.", show_default=False)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN",
            help="Go on with a run that was stopped, where it was; or train it longer, by --minutes, --epochs or --steps.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RUN", help="Go on from a run's weights, with another text.", show_default=False
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="Read options from a file; flags override it.", show_default=False),
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Train a language model on text; Ctrl-C saves, and --resume goes on, or trains longer."""
    given = {name: value for name, value in options.items() if value is not None}
    if resume is not None:
        if paths or out or source or config or set(given) - {*LONGER}:
            raise InputError(
                "--resume RUN goes on with the run's own text and options; expected nothing else but --json and, to train it "
                "longer, one of --minutes, --epochs and --steps with or without --lr"
            )
        with _stoppable(resume), _together():
            summary = _resume(resume, given)
    elif not paths:
        raise InputError("no text given; expected FILE_OR_FOLDER…, such as: throughtime train book.txt --out run")
    elif out is None:
        raise InputError("--out RUN is missing; expected the folder to write the run to, such as --out run")
    else:
        with _stoppable(out), _together() as ranks:
            summary = _train(paths, out, config, given, source, ranks)
    _report_training(summary, as_json)


@app.command(epilog="[dim]Example[/]  throughtime sweep book.txt --out study --hidden 64..512 --lr 1e-3..3e-2")
@partial(_with_options_of_training, searched=True)
def sweep(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="FILE_OR_FOLDER…", help="Text to learn from; folders are searched.", show_default=False),
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="STUDY", help="The folder of the study; its own, to go on with it.", show_default=False),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml",
            help="Read options from a file; lists are choices; flags override it.",
            show_default=False,
        ),
    ] = None,
    trials: Annotated[int, typer.Option(metavar="N", help="How many trainings the study is to have, in all.")] = 20,
    prune: Annotated[
        bool,
        typer.Option(
            "--prune/--no-prune", help="End a trial early that is worse than the median.", show_default="prune"
        ),
    ] = True,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Optuna's storage: that of a database, of Redis, or a journal's file.",
            show_default="SQLite in STUDY",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The study's name in the storage.", show_default="the folder's name"),
    ] = None,
    as_json: Json = False,
    **options: Any,
) -> None:
    """Search options of training with Optuna: many trials, each of them a run.

    Any option may be a range, --hidden 64..512, or choices, --cell lstm,gru,
    or both ways of a switch, --tied --no-tied; all others are the same in each
    trial. Where nothing is searched, cell, width, learning rate and dropout
    are. The budget is each trial's. Ctrl-C saves; the same command goes on,
    and several of them work side by side.
    """
    from throughtime.app.sweeping import print_next_steps, print_study, run_sweep, study_record
    from throughtime.app.terminal import note, print_json, results
    from throughtime.lm.training import read_toml

    if out is None:
        raise InputError("--out STUDY is missing; expected the folder to write the study to, such as --out study")
    given = {name: value for name, value in options.items() if value is not None}
    for switch in [each for each in given if isinstance(given[each], list)]:
        given[switch] = given[switch] if len(set(given[switch])) > 1 else given[switch][0]
    check_budgets(given)
    given = read_toml(config, given) if config else given
    try:
        study, stopped = run_sweep(paths, out, given, trials, storage=storage, name=name, prune=prune)
    except KeyboardInterrupt:  # before a trial's first step, after its last, or twice
        is_there = (out / "study.json").exists()
        note("stopped; the same command goes on with the study" if is_there else "stopped; nothing was trained yet")
        raise typer.Exit(errors.INTERRUPTED) from None
    if as_json:
        print_json(study_record(study))
    else:
        print_study(study, results())
    if stopped is not None:
        note(f"trial {stopped.number} is saved; the same command goes on with it")
        raise typer.Exit(errors.BY_SIGNAL + (stopped.signal or 0))
    if not as_json:
        print_next_steps(study, paths)


@app.command(name="eval", epilog="[dim]Example[/]  throughtime eval run unseen.txt")
def evaluate(
    *,
    run: RunArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Text to score, all of it.", show_default=False)],
    last: Last = False,
    cold: Annotated[
        int | None, _choice("--cold", "W", "carries the state", READING, "Read windows of W tokens from a fresh state.")
    ] = None,
    by_position: Annotated[
        bool,
        typer.Option(
            "--by-position",
            help="Tell the loss by tokens since a cold window's or a sequence's start too.",
            rich_help_panel=READING,
        ),
    ] = False,
    dynamic: Annotated[
        str | None,
        _choice("--dynamic", "RULE", "", ADAPTIVE, "Follow the gradient of what was read, by rms or sgd."),
    ] = None,
    dynamic_lr: Annotated[
        float | None, _choice("--dynamic-lr", "X", "0.002, 0.1 of sgd", ADAPTIVE, "Learning rate of --dynamic.")
    ] = None,
    dynamic_decay: Annotated[
        float | None,
        _choice("--dynamic-decay", "X", "0.02", ADAPTIVE, "How fast rms goes back to the trained weights."),
    ] = None,
    segment: Annotated[int | None, _choice("--segment", "T", "20", ADAPTIVE, "Tokens between two updates.")] = None,
    cache: Annotated[
        int | None, _choice("--cache", "N", "", ADAPTIVE, "Mix in a neural cache of the last N tokens.")
    ] = None,
    cache_weight: Annotated[float | None, _choice("--cache-weight", "P", "0.1", ADAPTIVE, "Its share.")] = None,
    cache_sharpness: Annotated[
        float | None, _choice("--cache-sharpness", "X", "0.3", ADAPTIVE, "How much likeness of states counts.")
    ] = None,
    ngram: Annotated[
        int | None,
        typer.Option(metavar="N", help="Beside it, an N-gram model of the run's training text.", show_default=False),
    ] = None,
    precision: Annotated[
        str, _choice("--precision", "NAME", "float32", READING, "Read it as bfloat16 or int8 weights do.")
    ] = "float32",
    as_json: Json = False,
) -> None:
    """Measure how well a run predicts a text."""
    from throughtime.app.evaluating import Reading, measure, print_measured
    from throughtime.app.terminal import print_json
    from throughtime.lm.run import open_run

    adaptive = {"dynamic_lr": dynamic_lr, "dynamic_decay": dynamic_decay, "segment": segment}
    of_cache = {"cache_weight": cache_weight, "cache_sharpness": cache_sharpness}
    for needed, with_it, options in ((dynamic, "--dynamic RULE", adaptive), (cache, "--cache N", of_cache)):
        for name, value in options.items():
            if needed is None and value is not None:
                raise InputError(f"{flag(name)} is for {with_it}; expected that with it")
    reading = Reading(cold, by_position, dynamic, adaptive, cache, of_cache, ngram, precision)
    measured = measure(open_run(run), file, reading, last=last)
    if as_json:
        print_json(measured.record())
    else:
        print_measured(measured, f"{file}, read by {run}")


@app.command(epilog="[dim]Example[/]  throughtime score run sentences.txt")
def score(
    run: RunArgument,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Lines to score.", show_default=False)],
    nbest: Annotated[
        bool, typer.Option("--nbest", help="Lines are KEY<tab>TEXT or KEY<tab>SCORE<tab>TEXT: print them best first.")
    ] = False,
    weight: Annotated[
        float, typer.Option(metavar="W", help="What a line's log-probability counts beside its own SCORE.")
    ] = 1.0,
    best: Annotated[bool, typer.Option("--best", help="Of --nbest, print only the best of each KEY.")] = False,
    as_json: Json = False,
) -> None:
    """Print the log-probability (in nats) of each line of a file, its end included; or re-rank n-best lists."""
    from throughtime.app.scoring import print_ranking, print_scores
    from throughtime.lm.run import open_run

    if not nbest and (best or weight != 1.0):
        raise InputError("--best and --weight are for n-best lists; expected --nbest with them")
    if nbest:
        print_ranking(open_run(run), file, weight, best, as_json)
    else:
        print_scores(open_run(run), file, as_json)


@app.command(epilog='[dim]Example[/]  throughtime sample run --prompt "Once upon" --length 300 --temperature 0.8')
def sample(
    *,
    context: typer.Context,
    run: RunArgument,
    prompt: Annotated[str, typer.Option(metavar="P", help="Text to go on from.", show_default=False)] = "",
    prompt_file: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Read it from a file; - is standard input.", show_default=False),
    ] = None,
    last: Last = False,
    length: Annotated[int, typer.Option(metavar="N", help="Tokens to generate, at most.")] = 500,
    samples: Annotated[int, typer.Option(metavar="N", help="How many texts.")] = 1,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Stop before this text; \\n, \\t are understood; may be repeated.", show_default=False
        ),
    ] = None,
    alphabet: Annotated[
        str | None,
        typer.Option(metavar="CHARACTERS", help="Write with these characters alone.", show_default=False),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="S", help="Makes the sample repeatable.", show_default=False, callback=_checked_seed),
    ] = None,
    temperature: Annotated[
        float | None, _choice("--temperature", "X", "1", CHOICE, "Below 1: safer; above 1: bolder.")
    ] = None,
    top_k: Annotated[int | None, _choice("--top-k", "K", "", CHOICE, "Choose among the K likeliest.")] = None,
    top_p: Annotated[
        float | None, _choice("--top-p", "P", "", CHOICE, "Choose among the likeliest that make up P.")
    ] = None,
    min_p: Annotated[
        float | None,
        _choice("--min-p", "P", "", CHOICE, "Choose among those at least P times as likely as the likeliest."),
    ] = None,
    typical_p: Annotated[
        float | None, _choice("--typical-p", "P", "", CHOICE, "Choose among the most typical that make up P.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, _choice("--repetition-penalty", "X", "1", CHOICE, "Above 1: what occurred is less likely.")
    ] = None,
    no_repeat_ngram: Annotated[
        int | None, _choice("--no-repeat-ngram", "N", "0", CHOICE, "No N tokens in a row occur twice; 0 is off.")
    ] = None,
    greedy: Annotated[
        bool | None, typer.Option("--greedy", help="Always choose the likeliest.", rich_help_panel=CHOICE)
    ] = None,
    precision: Annotated[
        str, typer.Option(metavar="NAME", help="float32, or bfloat16 or int8, which are faster and nearly as good.")
    ] = "float32",
    beams: Annotated[int | None, _choice("--beams", "K", "", BEAMS, "Search the likeliest text with K beams.")] = None,
    length_penalty: Annotated[
        float | None, _choice("--length-penalty", "A", "1", BEAMS, "Compare ln p / tokens^A.")
    ] = None,
) -> None:
    """Let a run write: the text streams to the terminal."""
    from throughtime.app.sampling import read_prompt, stop_texts, stream, write_beams
    from throughtime.lm.generation import Sampling, beam_search
    from throughtime.lm.run import open_run

    opened = open_run(run)
    prompt = read_prompt(prompt, prompt_file, opened.tokenizer)
    chosen = {name: context.params[name] for name in CHOICES if context.params[name] is not None}
    if beams is None:
        if length_penalty is not None:
            raise InputError("--length-penalty is for beam search; expected --beams with it")
        sampling = Sampling(**opened.generation | chosen)
        stops = stop_texts(stop or ())
        how = {"stop": stops, "samples": samples, "last": last, "alphabet": alphabet, "precision": precision}
        stream(opened, prompt, length, sampling, seed, **how)
        return
    if precision != "float32":
        raise InputError(f"--precision {precision} is for samples; expected it without --beams")
    if chosen or stop or seed is not None:
        raise InputError(
            "--beams searches the likeliest text; expected no option that chooses by chance, and no --stop"
        )
    if not 1 <= samples <= beams:
        raise InputError(f"--samples {samples}: expected from 1 to the {beams} that --beams finds")
    penalty = 1.0 if length_penalty is None else length_penalty
    model = opened.load_model(last=last)
    found = beam_search(model, opened.tokenizer, prompt, length, beams, penalty, alphabet)
    write_beams(prompt, found[:samples], opened.tokenizer)


@app.command(epilog="[dim]Example[/]  throughtime explain ybigta")
def explain(
    word: Annotated[
        str, typer.Argument(metavar="WORD", help="Two letters or more, of any script.", show_default=False)
    ],
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Of --html: where to.", show_default="explain.html"),
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(metavar="H", help="Hidden units.", show_default="3 for a short word")
    ] = None,
    lr: Annotated[float, typer.Option(metavar="X", help="Learning rate η.")] = 0.2,
    clip: Annotated[float, typer.Option(metavar="C", help="Largest global gradient norm c; 0 is off.")] = 1.0,
    seed: Annotated[int, typer.Option(metavar="S", help="Draws the initial weights.", callback=_checked_seed)] = 1,
    html: Annotated[
        bool, typer.Option("--html", help="Write a web page that is stepped through, not to the terminal.")
    ] = False,
) -> None:
    """Work the one-hot RNN of a word through, every number shown, and train it until it spells the word."""
    from throughtime.app.explain import explain as print_explanation
    from throughtime.app.explain import write_page
    from throughtime.app.terminal import note, results
    from throughtime.insight.worked_example import Descent

    descent = Descent(lr, clip)
    if not html:
        if file is not None:
            raise InputError(f"{file}: one WORD is explained; expected a file with --html only")
        print_explanation(word, results(), hidden_size=hidden, seed=seed, descent=descent)
        return
    file = file or Path("explain.html")
    write_page(word, file, hidden_size=hidden, seed=seed, descent=descent)
    note(f"wrote {file}; open it in a browser, it needs no network")


@app.command(epilog="[dim]Example[/]  throughtime gradients --cell lstm --hidden 64 --init forget:1")
def gradients(
    *,
    run: Annotated[
        Path | None,
        typer.Argument(metavar="RUN", help="The folder of a run; or give --cell for a fresh one.", show_default=False),
    ] = None,
    cell: Annotated[
        str | None, typer.Option(metavar="NAME", help="rnn, rnn_relu, lstm or gru, fresh.", show_default=False)
    ] = None,
    hidden: Annotated[
        int | None, typer.Option(metavar="H", help="Hidden units of a layer of --cell.", show_default="64")
    ] = None,
    layers: Annotated[int | None, typer.Option(metavar="L", help="Layers of --cell.", show_default="1")] = None,
    init: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="default, orthogonal[:gain], forget:bias, update:bias, chrono:lag; join by +.",
            show_default="default",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to read.", show_default="a run's held-out text, or white noise"),
    ] = None,
    lags: Lags = None,
    probe: Probe = 16,
    within: Within = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write gradients.html, .json and .png there.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Draws fresh weights.", callback=_checked_seed)] = 1,
    seeds: Annotated[
        int | None,
        typer.Option(metavar="N", help="Measure fresh weights of N seeds.", show_default="1; 3 for other starts"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure how far gradients reach back through time, what carries them, and what would help."""
    from throughtime.app.gradients import Subject, find_subject, measure_subject, print_report, write_report
    from throughtime.app.terminal import note, print_json, results

    subject = Subject(run, cell, hidden, layers, init, text, lags, probe, within, seed, seeds)
    found = find_subject(subject)
    measured = measure_subject(subject, found)
    if as_json:
        print_json(measured.report.to_json())
    else:
        print_report(measured.report, results())
    for line in write_report(measured, found.texts, out) if out else []:
        note(line)


@app.command(name="compare-gradients", epilog="[dim]Example[/]  throughtime compare-gradients rnn lstm lstm@chrono:200")
def compare_gradients(
    *,
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN_OR_CELL…", help="Folders of runs, or cells: lstm, lstm@forget:3.", show_default=False
        ),
    ],
    hidden: Annotated[
        int | None, typer.Option(metavar="H", help="Hidden units of a layer of the cells.", show_default="64")
    ] = None,
    layers: Annotated[int | None, typer.Option(metavar="L", help="Layers of the cells.", show_default="1")] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text to read.", show_default="a run's held-out text, or white noise"),
    ] = None,
    lags: Lags = None,
    probe: Probe = 16,
    within: Within = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write compare-gradients.json and .png there.", show_default=False),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", help="Draws fresh weights.", callback=_checked_seed)] = 1,
    seeds: Annotated[int, typer.Option(metavar="N", help="Measure each cell with fresh weights of N seeds.")] = 1,
    as_json: Json = False,
) -> None:
    """Measure how far the gradients of several cells or runs reach, side by side."""
    from throughtime.app.compare import compare, comparison_record, print_comparison, read_subjects, write_comparison
    from throughtime.app.terminal import note, print_json, results

    sizes = {"hidden": hidden, "layers": layers}
    options = {"text": text, "lags": lags, "probe": probe, "within": within, "seed": seed, "seeds": seeds}
    reports = compare(read_subjects(names, **sizes, **options))
    if as_json:
        print_json(comparison_record(reports))
    else:
        print_comparison(reports, results())
    for line in write_comparison(reports, out) if out else []:
        note(line)


@app.command(epilog="[dim]Example[/]  throughtime task adding --cell lstm")
def task(
    *,
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="adding, adding-sum, copy, order, lag or digits.", show_default=False)
    ],
    cell: Annotated[
        str | None, typer.Option(metavar="NAME", help="mlp, rnn, gru or lstm.", show_default="each in turn")
    ] = None,
    length: Annotated[
        int | None, typer.Option(metavar="T", help="Steps; the delay of copy.", show_default="the task's own")
    ] = None,
    hidden: Annotated[int, typer.Option(metavar="H", help="Hidden units.")] = 64,
    steps: Annotated[int, typer.Option(metavar="N", help="Most updates of the weights.")] = 2000,
    lr: Annotated[float, typer.Option(metavar="X", help="Learning rate of Adam.")] = 5e-3,
    init: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="As in gradients.", show_default="orthogonal, and chrono for gates"),
    ] = None,
    equal_size: Annotated[
        bool, typer.Option("--equal-size", help="Give each cell as many weights as an LSTM of --hidden units has.")
    ] = False,
    seed: Annotated[int, typer.Option(metavar="S", help="Draws everything random.", callback=_checked_seed)] = 1,
    seeds: Annotated[
        int, typer.Option(metavar="N", help="Train with N seeds, of --seed and the numbers after it.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Train small networks on a task that needs long memory, and see who solves it."""
    from throughtime.app.tasks import (
        check_sizes,
        describe,
        print_result,
        print_spread,
        run_task,
        task_record,
        widths_of,
    )
    from throughtime.app.terminal import print_json, results
    from throughtime.insight.tasks import CELLS, make_task

    chosen = make_task(name, length)
    check_sizes(chosen, hidden, steps, seeds)
    cells = CELLS if cell is None else (cell,)
    widths = widths_of(chosen, cells, hidden, equal_size)
    options = {"steps": steps, "learning_rate": lr, "initialisation": init}
    if not as_json:
        describe(chosen, results())
    came = []
    for result in run_task(chosen, cells, widths, range(seed, seed + seeds), **options):
        came.append(result)
        if not as_json:
            print_result(result, chosen, results())
    if as_json:
        print_json({"results": [task_record(result, chosen) for result in came]})
    elif seeds > 1:
        print_spread(came, results())


@app.command(epilog="[dim]Example[/]  throughtime info run")
def info(run: RunArgument, as_json: Json = False) -> None:
    """Tell what a run is: sizes, parameters, data, results."""
    from throughtime.app.reports import Facts, run_record, run_rows
    from throughtime.app.terminal import print_json, results
    from throughtime.lm.run import open_run

    opened = open_run(run)
    if as_json:
        print_json(run_record(opened))
    else:
        results().print(Facts(str(run), run_rows(opened)))


@app.command(epilog="[dim]Example[/]  throughtime pack run shakespeare-lstm")
def pack(
    run: RunArgument,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write, a new one.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Make a folder to be shared: a run's weights, tokenizer and figures with a model card, without its text and paths."""
    from throughtime.app.terminal import note, print_json, results
    from throughtime.lm.packing import pack as write
    from throughtime.lm.run import open_run

    files = write(open_run(run), out)
    if as_json:
        print_json({"packed": str(out), "files": files})
        return
    for name, size in files.items():
        results().print(f"{size:>12,}  {name}", soft_wrap=True)
    note(f"packed {out} without text and paths, but with the vocabulary; its README.md is what others will read")


@app.command(epilog="[dim]Example[/]  throughtime quantize run")
def quantize(
    run: RunArgument,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Text to measure on.", show_default="what the run held out"),
    ] = None,
    last: Last = False,
    as_json: Json = False,
) -> None:
    """Measure what bfloat16 and int8 weights cost a run, in perplexity, and what they bring."""
    from throughtime.app.quantizing import measure_precisions, print_costs, records
    from throughtime.app.terminal import print_json
    from throughtime.lm.run import open_run

    opened = open_run(run)
    found = measure_precisions(opened, file, last=last)
    if as_json:
        print_json({"precisions": records(found)})
    else:
        print_costs(found, opened, f"{file or 'held-out text'}, read by {run}")


@app.command(epilog="[dim]Example[/]  throughtime export run model.c")
def export(
    run: RunArgument,
    out: Annotated[
        Path, typer.Argument(metavar="FILE", help="What to write: model.c or model.onnx.", show_default=False)
    ],
    precision: Annotated[
        str, typer.Option(metavar="NAME", help="Of C: float32, or int8: a quarter of the size.", show_default="float32")
    ] = "float32",
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What its names in C begin with.", show_default="the file's name"),
    ] = None,
    last: Last = False,
    as_json: Json = False,
) -> None:
    """Write a run's model as one C99 file, which needs nothing but libm, or as ONNX: from token ids and a state to logits."""
    from throughtime.app.exporting import described, write
    from throughtime.app.terminal import note, print_json
    from throughtime.lm.run import open_run

    opened = open_run(run)
    done = write(opened, out, precision=precision, name=name, last=last)
    if as_json:
        print_json(done._asdict() | {"path": str(done.path)})
        return
    for line in described(opened, done):
        note(line)


@app.command(epilog="[dim]Example[/]  throughtime plot run")
def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN…", help="Folders of runs, drawn into one picture.", show_default=False)
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to.", show_default="loss.png in the first run's folder"),
    ] = None,
) -> None:
    """Draw the loss along training."""
    from throughtime.app.plotting import plot_losses
    from throughtime.lm.run import open_run
    from throughtime.plain import printable

    print(printable(str(plot_losses([open_run(run) for run in runs], out))))


@app.command(epilog="[dim]Example[/]  throughtime demo")
def demo(
    minutes: Annotated[float, typer.Option(metavar="M", help="Training time.")] = 1.0,
) -> None:
    """Train on Python's own standard library for a minute, measure, and write a sample."""
    from throughtime.app.demo import run_demo

    run_demo(Path("demo-run"), minutes)


def _processes() -> Launch:
    """Return which of several processes this one is; where the environment speaks of them in part only, training refuses it."""
    with contextlib.suppress(InputError):
        return launched()
    return Launch()


@contextlib.contextmanager
def _together() -> Iterator["Ranks"]:
    """Meet the processes that were started with this one; of their errors the first to come is said, whoever's it is."""
    from throughtime.training import joined
    from throughtime.training.ranks import SaidElsewhereError

    try:
        with joined() as ranks:
            yield ranks
    except SaidElsewhereError:
        raise typer.Exit(errors.BAD_INPUT) from None
    except Exception:
        streams.unmute()
        raise


def _train(
    paths: list[Path], out: Path, config: Path | None, given: dict[str, Any], run: Path | None, ranks: "Ranks"
) -> "TrainingSummary":
    from throughtime.app.progress import display, observed, probe_gradients, said
    from throughtime.lm.continuing import options_from
    from throughtime.lm.presets import for_minutes
    from throughtime.lm.reading import find_files
    from throughtime.lm.run import open_run
    from throughtime.lm.training import TrainingOptions, read_toml
    from throughtime.lm.training import train as start

    opened = None

    def choose() -> tuple[TrainingOptions, str | None]:
        nonlocal opened
        source = f"--config {config}" if config else ""
        values = read_toml(config, given) if config else given
        if run is not None:
            opened = open_run(run)
            return options_from(opened, values, source), None
        include = TrainingOptions.from_values(values, source).include  # before any file is looked up, all is checked
        found = find_files(paths, include, out).files
        values, reason = for_minutes(values, sum(file.stat().st_size for file, _ in found))
        return TrainingOptions.from_values(values, source), reason

    options, reason = ranks.of_first(choose)  # the others needn't see the text
    with display(options.level) as shown:
        probe = probe_gradients if options.gradients_every else None
        return start(paths, out, options, observed(shown, out, reason), shown.reading, said(shown), probe, opened)


def _resume(run: Path, longer: dict[str, Any]) -> "TrainingSummary":
    from throughtime.app.progress import display, observed, probe_gradients, said
    from throughtime.lm.run import open_run
    from throughtime.lm.training import resume
    from throughtime.training import Budget

    learning_rate = longer.pop("lr", None)
    check_budgets(longer)
    budget = Budget(**longer) if longer else None
    if budget is None and learning_rate is not None:
        raise InputError("--lr with --resume is for training longer; expected --minutes, --epochs or --steps with it")
    reason = None if budget is None else f"{budget.describe()} more, on a schedule of its own"
    with display(open_run(run).tokenizer.level) as shown:
        observer = observed(shown, run, reason)
        return resume(run, observer, said(shown), probe_gradients, longer=budget, learning_rate=learning_rate)


def _report_training(summary: "TrainingSummary", as_json: bool) -> None:
    from throughtime.app.reports import Facts, training_record, training_rows
    from throughtime.app.terminal import note, print_json, results
    from throughtime.plain import shell_word

    try:
        if as_json:
            print_json(training_record(summary))
        else:
            results().print(Facts(str(summary.run), training_rows(summary)))
    except OSError:
        if not summary.interrupted:
            raise
        streams.discard(sys.stdout)  # a terminal that was closed can't be told any more
    if summary.interrupted:
        note(f"stopped and saved; go on with: throughtime train --resume {shell_word(summary.run)}")
        raise typer.Exit(errors.BY_SIGNAL + summary.signal if summary.signal else errors.INTERRUPTED)
    if not as_json:
        note(f"let it write: throughtime sample {shell_word(summary.run)}")


@contextlib.contextmanager
def _stoppable(run: Path) -> Iterator[None]:
    """Say what is left after a Ctrl-C that came before the first step, after the last, or twice."""
    from throughtime.app.terminal import note
    from throughtime.lm.run import MODEL

    try:
        yield
    except KeyboardInterrupt:
        saved = f"the weights are in {run}" if (run / MODEL).exists() else "nothing was trained yet"
        note(f"stopped; {saved}")
        raise typer.Exit(errors.INTERRUPTED) from None
