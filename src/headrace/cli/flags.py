"""One flag per field of a model of options, for a command that takes them resolved."""

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from rich.markup import escape
from typer import Context
from typer.core import TyperGroup
from typer.main import get_command

from headrace.cli.options import CLUSTERS, Options, PolicyChoice, flag, resolve
from headrace.types.errors import ConfigError

Command = Callable[..., None]
EXAMPLES = tuple(sorted(path.stem for path in CLUSTERS.glob("*.yaml")))
PLAIN = (str, int, float, bool, Path)
"""Types that a flag has; what is more than that is written as text."""


class LateGroup(TyperGroup):
    """The commands of `headrace trace`, which are read when one of them is wanted: numpy takes its time to load."""

    def list_commands(self, ctx: Context) -> list[str]:
        return self._loaded().list_commands(ctx)

    def get_command(self, ctx: Context, cmd_name: str) -> Any:
        return self._loaded().get_command(ctx, cmd_name)

    def _loaded(self) -> TyperGroup:
        from headrace.cli.trace import app

        group = get_command(app)
        assert isinstance(group, TyperGroup)
        return group


class Source:
    """Where a command's settings file comes from: the flag `--config`."""

    parameter: Any = Annotated[
        Path | None,
        typer.Option(
            "--config", help="YAML file of settings, keys named as the flags", envvar="HEADRACE_CONFIG"
        ),
    ]
    default: Any = None
    kept: str | None = None
    """The name under which the command itself gets it."""

    def file(self, given: Path | None) -> tuple[Path | None, str]:
        """The file, and how messages call it."""
        return given, "--config"


class ClusterSource(Source):
    """An argument, a file or an example's name."""

    parameter = Annotated[
        Path | None,
        typer.Argument(
            metavar="[CLUSTER.YAML]",
            help="The deployment: YAML, keys named as the flags, the same that serve --config takes; or an example's name: "
            + ", ".join(EXAMPLES),
            show_default=False,
        ),
    ]
    kept = "file"

    def file(self, given: Path | None) -> tuple[Path | None, str]:
        if given is None or given.exists():
            return given, f"{given}"
        if str(given) in EXAMPLES:
            return CLUSTERS / f"{given}.yaml", f"{given}"
        raise ConfigError(
            f"there is no file {given}, and no example of that name; there are: {', '.join(EXAMPLES)}"
        )


class RecordingSource(Source):
    """An argument, the folder of a recording, which says how it was served."""

    parameter = Annotated[
        Path,
        typer.Argument(metavar="DIR", help="What `headrace serve --record DIR` wrote", show_default=False),
    ]
    default = inspect.Parameter.empty
    kept = "folder"

    def file(self, given: Path | None) -> tuple[Path | None, str]:
        assert given is not None
        path = given / "cluster.yaml"
        if not path.is_file():
            raise ConfigError(f"{given} is no recording of `headrace serve --record`: it has no cluster.yaml")
        return path, f"{path}"


def takes(
    options: type[Options], arguments: tuple[str, ...] = ("model",), source: Source | None = None
) -> Callable[[Command], Command]:
    """Give a command one flag per field of `options`; it gets them resolved, as its first parameter."""
    chosen = source or Source()

    def decorate(command: Command) -> Command:
        own = list(inspect.signature(command).parameters.values())[1:]
        wanted = {parameter.name for parameter in own}
        own = [parameter for parameter in own if parameter.name != chosen.kept]

        @wraps(command)
        def run(**given: Any) -> None:
            named = {name: given.pop(name) for name in options.model_fields}
            stated = {k: v for k, v in named.items() if v is not None}
            path = given.pop("config")
            file, called = chosen.file(path)
            if chosen.kept is not None and chosen.kept in wanted:
                given[chosen.kept] = path
            command(resolve(options, file, stated, called), **given)

        flags = [
            _parameter(name, field.annotation, field, name in arguments)
            for name, field in options.model_fields.items()
        ]
        run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            sorted([*own, _config(chosen), *flags], key=lambda p: p.kind)
        )
        return run

    return decorate


def _parameter(name: str, annotation: Any, field: Any, positional: bool) -> inspect.Parameter:
    default = field.get_default(call_default_factory=True)
    shown = default.name if isinstance(default, PolicyChoice) else default
    text = f"{field.description}" + (f" [default: {shown}]" if shown not in (None, False, "") else "")
    text = escape(text)  # a bracket would be taken for markup, and left out
    kind = _kind(annotation)
    variable = f"HEADRACE_{name.upper()}"
    if positional:
        info: Any = typer.Argument(help=text, envvar=variable, show_default=False, show_envvar=False)
    else:
        long = "--" + name.replace("_", "-") if name == "model" else flag(name)
        declared = f"{long}/--no-{long[2:]}" if kind is bool else long
        info = typer.Option(declared, help=text, envvar=variable, show_default=False, show_envvar=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def _kind(annotation: Any) -> Any:
    """What a flag's text is read as: one plain type, else the text itself."""
    union = get_origin(annotation) in (Union, UnionType)
    types = [part for part in (get_args(annotation) if union else (annotation,)) if part is not type(None)]
    return types[0] if len(types) == 1 and types[0] in PLAIN else str


def _config(source: Source) -> inspect.Parameter:
    return inspect.Parameter(
        "config", inspect.Parameter.KEYWORD_ONLY, default=source.default, annotation=source.parameter
    )
